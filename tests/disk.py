"""The disk below a folder, as one process sees it: every change is announced to a watch, which may end the process,
refuse the change, or remember what would be lost if the power failed now.

`watched(folder, watch)` lets the watch see what the functions of `os` and files that are opened for writing do there.
"""
from __future__ import annotations

import builtins
import io
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

CHANGES = ("open", "write", "fsync", "fsync-folder", "replace", "link", "rename", "unlink", "mkdir", "rmdir")
"What can happen on a disk."
_NAMES = ("replace", "rename", "link", "unlink", "remove", "rmdir", "mkdir", "fsync", "open")
_REAL: dict[str, Any] = {name: getattr(os, name) for name in _NAMES}
_OPEN = io.open


@dataclass
class Change:
    "Something that is done to a path."
    what: str
    path: Path
    to: Path | None = None                           # of a new name
    file: Any = None                                 # of a write: the file, and what is written
    data: bytes = b""
    new: bool = False                                # of opening: whether there was nothing of this name

    def do_half(self) -> None:
        "Write half of what is to be written."
        if self.what != "write": return
        self.file.write(self.data[:len(self.data) // 2])
        self.file.flush()


class Watch:
    "Sees changes; this one lets all of them happen."

    def before(self, change: Change) -> None:
        "Called before a change."

    def after(self, change: Change) -> None:
        "Called after it."


# ── seeing ───────────────────────────────────────────────────────────────────────────────────────────────────────────

class _Disk:
    "Stands between a process and the functions of `os`."

    def __init__(self, root: Path, watch: Watch) -> None: self.root, self.watch = os.path.realpath(root), watch

    def place(self, path: Any, folder: int | None = None) -> Path | None:
        "A path below the folder; None for all others."
        if isinstance(path, int): full = os.readlink(f"/proc/self/fd/{path}")
        elif folder is not None: full = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
        else: full = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(os.fsdecode(path)))
        return Path(full) if full == self.root or full.startswith(self.root + os.sep) else None

    def function(self, name: str) -> Callable[..., Any]:
        "A function of `os` that announces what it does."
        def call(*given: Any, **named: Any) -> Any:
            change = self.change(name, given, named)
            if change is None: return _REAL[name](*given, **named)
            self.watch.before(change)
            out = _REAL[name](*given, **named)
            self.watch.after(change)
            return out
        return call

    def change(self, name: str, given: tuple[Any, ...], named: dict[str, Any]) -> Change | None:
        "What a call changes, if anything."
        if name == "open" and not given[1] & os.O_CREAT: return None
        path = self.place(given[0], named.get("dir_fd"))
        if path is None: return None
        what = {"remove": "unlink"}.get(name, name)
        if what == "fsync" and path.is_dir(): what = "fsync-folder"
        to = self.place(given[1]) if name in ("replace", "rename", "link") else None
        return Change(what, path, to, new=name == "open" and not path.exists())

    def opened(self, path: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
        "`open`, with files below the folder that announce what is written."
        place = None if isinstance(path, int) or not set(mode) & set("wxa+") else self.place(path)
        if place is None: return _OPEN(path, mode, *given, **named)
        change = Change("open", place, new=not place.exists())
        self.watch.before(change)
        file = _OPEN(path, mode, *given, **named)
        self.watch.after(change)
        return _File(self.watch, place, file)


class _File:
    "A file that announces what is written, and keeps nothing back."

    def __init__(self, watch: Watch, path: Path, file: Any) -> None:
        self._watch, self._path, self._file = watch, path, file

    def __getattr__(self, name: str) -> Any: return getattr(self._file, name)
    def __enter__(self) -> _File: return self
    def __exit__(self, *why: object) -> None: self._file.close()

    def write(self, data: Any) -> int:
        "Write and announce it."
        change = Change("write", self._path, file=self._file, data=data)
        self._watch.before(change)
        count = self._file.write(data)
        self._file.flush()
        self._watch.after(change)
        return count


@contextmanager
def watched(root: Path, watch: Watch) -> Iterator[None]:
    "Let a watch see what the block changes in a folder."
    disk = _Disk(root, watch)
    for name in _NAMES: setattr(os, name, disk.function(name))
    builtins.open = io.open = disk.opened      # type: ignore[assignment]
    try: yield
    finally:
        for name in _NAMES: setattr(os, name, _REAL[name])
        builtins.open = io.open = _OPEN


# ── counting, ending, refusing ───────────────────────────────────────────────────────────────────────────────────────

class Count(Watch):
    "Counts changes."

    def __init__(self) -> None: self.counts: Counter[str] = Counter()
    def before(self, change: Change) -> None: self.counts[change.what] += 1


def die() -> NoReturn:
    "End this process as a kill does: without a word, and with nothing tidied."
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a killed process goes on")


@dataclass
class Moment(Watch):
    "Does something at one change of a kind: the `number`th."
    what: str
    number: int
    when: str = "before"                            # or "half", of a write, or "after"
    seen: int = 0

    def before(self, change: Change) -> None:
        if change.what != self.what: return
        self.seen += 1
        if self.seen < self.number or self.when == "after": return
        if self.when == "half": change.do_half()
        self.act(change)

    def after(self, change: Change) -> None:
        if self.when == "after" and change.what == self.what and self.seen >= self.number: self.act(change)

    def act(self, change: Change) -> None:
        "What is done at that moment."
        die()


@dataclass
class Refuse(Moment):
    "Lets the system refuse a change."
    number_of_error: int = 0
    lasting: bool = True                            # whether it refuses all later ones of the kind, too
    happened: list[str] = field(default_factory=list)

    def act(self, change: Change) -> None:
        if self.happened and not self.lasting: return
        self.happened.append(change.what)
        raise OSError(self.number_of_error, os.strerror(self.number_of_error), str(change.path))


class NoLinks(Watch):
    "A file system without hard links, under another watch."

    def __init__(self, inner: Watch) -> None: self.inner = inner
    def after(self, change: Change) -> None: self.inner.after(change)

    def before(self, change: Change) -> None:
        self.inner.before(change)
        if change.what == "link": raise PermissionError(1, "Operation not permitted", str(change.path))


# ── what is lost without power ───────────────────────────────────────────────────────────────────────────────────────

@dataclass(eq=False)
class File:
    "Bytes that are surely on the disk, and those that programs see."
    durable: bytes
    current: bytes


@dataclass(eq=False)
class Folder:
    "Names that programs see, and what each has been since the folder was last sent to the disk, oldest first."
    names: dict[str, File | Folder] = field(default_factory=dict)
    past: dict[str, list[File | Folder | None]] = field(default_factory=dict)

    def put(self, name: str, what: File | Folder | None) -> None:
        "Give a name to something else; None: to nothing."
        self.past.setdefault(name, [self.names.get(name)]).append(what)
        if what is None: self.names.pop(name, None)
        else: self.names[name] = what


def as_it_is(path: Path) -> Folder:
    "A folder, all of which is on the disk."
    found = Folder()
    for inside in path.iterdir() if path.is_dir() else ():
        if inside.is_dir(): found.names[inside.name] = as_it_is(inside)
        else:
            data = inside.read_bytes()
            found.names[inside.name] = File(data, data)
    return found


class PowerCut(Watch):
    "Remembers what is not on the disk yet; at the `number`th change, builds what a disk could hold, and ends."

    def __init__(self, root: Path, number: int, rng: random.Random, built: Path) -> None:
        self.root, self.left, self.rng, self.built = Path(os.path.realpath(root)), number, rng, built
        self.tree = Folder({self.root.name: as_it_is(self.root)} if root.exists() else {})

    def folder_of(self, path: Path) -> Folder:
        "The folder in which something is."
        found = self.tree
        for name in path.relative_to(self.root.parent).parts[:-1]:
            inner = found.names[name]
            assert isinstance(inner, Folder)
            found = inner
        return found

    def node(self, path: Path) -> Any:
        "What is there."
        return self.folder_of(path).names[path.name]

    def before(self, change: Change) -> None:
        self.left -= 1
        if self.left: return
        change.do_half()
        if change.what == "write": self.wrote(change.path)
        Choice(self.rng).build(self.tree, self.built)
        die()

    def wrote(self, path: Path) -> None:
        "Take over what a file holds now."
        with _OPEN(path, "rb") as file: self.node(path).current = file.read()

    def after(self, change: Change) -> None:
        path, to = change.path, change.to
        if change.what == "write": self.wrote(path)
        elif change.what == "fsync": self.node(path).durable = self.node(path).current
        elif change.what == "fsync-folder": self.node(path).past.clear()
        elif change.what == "mkdir": self.folder_of(path).put(path.name, Folder())
        elif change.what in ("unlink", "rmdir"): self.folder_of(path).put(path.name, None)
        elif change.what == "open":
            if change.new: self.folder_of(path).put(path.name, File(b"", b""))
        else:
            assert to is not None
            self.folder_of(to).put(to.name, self.node(path))
            if change.what != "link": self.folder_of(path).put(path.name, None)


class Choice:
    "One of the states in which a disk can be after the power failed."

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.built = rng, set[int]()
        self.bold = rng.choice((0.1, 0.5, 0.9))      # how much is lost

    def build(self, folder: Folder, place: Path) -> None:
        "Write it."
        _REAL["mkdir"](place)
        for name in sorted({*folder.names, *folder.past}):
            states = folder.past.get(name, [folder.names.get(name)])
            found = self.rng.choice(states) if self.rng.random() < self.bold else states[-1]
            if isinstance(found, File): self.write(place / name, self.content(found))
            elif found is not None and id(found) not in self.built:
                self.built.add(id(found))
                self.build(found, place / name)

    def write(self, path: Path, data: bytes) -> None:
        with _OPEN(path, "wb") as file: file.write(data)

    def content(self, file: File) -> bytes:
        "What may be in a file: what was sent to the disk, and anything of the rest."
        if file.durable == file.current: return file.current
        kept, rest = file.durable, file.current[len(file.durable):]
        ways = (b"", rest, rest[:self.rng.randrange(len(rest) + 1)], bytes(len(rest)), self.rng.randbytes(len(rest)))
        return kept + self.rng.choice(ways)
