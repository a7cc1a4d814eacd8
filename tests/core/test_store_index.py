"The index of a store: whatever happens to its runs, a store says what a look without an index says."
from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from subnet_explorer import Mask, Run, Store
from subnet_explorer.core import store as chapter
from subnet_explorer.core.errors import SubnetError
from subnet_explorer.core.files import inside
from subnet_explorer.core.folders import kept_masks, kept_runs, open_study, tidy, tidy_leases
from subnet_explorer.core.run import LOG, MASK
from subnet_explorer.core.space import unit_space
from subnet_explorer.core.store import INDEX, index

SPACE = unit_space(2, 3)
Told = tuple[dict[str, Any], dict[str, str], dict[str, Any]]


def made(store: Store, task: str, seed: int, done: bool = True) -> Path:
    "The folder of a run."
    labels, config = {"task": task, "seed": seed}, {"seed": seed, "task": task, "model": "m (weights 1)"}
    run = Run(store.path(labels, config), config, labels)
    if not run.done: run.log(step=len(run.rows), loss=.5)
    if done and not run.done: run.finish(Mask.random(SPACE, .5, seed=seed))
    assert run.folder is not None
    return run.folder


def told(folder: Path) -> Told:
    "All that a store says: runs that it serves, what is broken, masks."
    store = Store(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs = {run.folder.name: (run.labels, run.config, run.id, run.done) for run in store if run.folder}
        try: masks = {str(path): labels for labels, path in store.masks().rows()}
        except SubnetError: masks = {}
    return runs, {path.name: why for path, why in store.broken.items()}, masks


def without_index(folder: Path) -> Told:
    "The same by a look that knows nothing, and leaves the index as it is."
    file = folder / INDEX
    kept = file.read_bytes() if file.exists() else None
    file.unlink(missing_ok=True)
    found = told(folder)
    file.unlink(missing_ok=True)
    if kept is not None: file.write_bytes(kept)
    return found


def check(folder: Path) -> None:
    assert told(folder) == without_index(folder)


@pytest.fixture
def old(monkeypatch) -> None:
    "What was written just now counts as settled, as after two seconds."
    monkeypatch.setattr(chapter, "SETTLED", -1 << 62)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    "Count how often files are opened, by name."
    found: Counter[str] = Counter()
    watching = True

    def hear(event: str, given: tuple[Any, ...]) -> None:
        if watching and event == "open" and isinstance(given[0], (str, Path)): found[os.path.basename(given[0])] += 1

    sys.addaudithook(hear)      # it cannot be taken away again, only told to be still
    try: yield found
    finally: watching = False


# ── truth ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def flip(file: Path, chance: random.Random, keep_time: bool) -> None:
    "Change a byte in place; also with the time set back, as a copying tool does."
    data, before = bytearray(file.read_bytes()), file.stat()
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    with file.open("rb+") as f: f.write(data)
    if keep_time: os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap(one: Path, other: Path) -> None:
    "Exchange two folders."
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def spoiled_index(folder: Path, chance: random.Random) -> None:
    "Remove, cut, change or replace the index."
    file = folder / INDEX
    if not file.exists(): return
    data = file.read_bytes()
    how = chance.randrange(5)
    if how == 0: file.unlink()
    if how == 1: file.write_bytes(data[:chance.randrange(len(data))])
    if how == 2: flip(file, chance, False)
    if how == 3: file.write_text(json.dumps({"a": {"stamp": [1], "labels": {}, "config": {}, "broken": ""}}))
    if how == 4: file.write_bytes(data.replace(b'"library": "', b'"library": "0'))


def act(folder: Path, chance: random.Random) -> None:
    "Do one thing to a store."
    store, there = Store(folder), [p.parent for p in sorted(folder.glob("*/config.json"))]
    place = chance.choice(there) if there else None
    what = chance.randrange(10)
    if what <= 2 or place is None:
        made(store, chance.choice("abc"), chance.randrange(12), chance.random() < .6)
    elif what == 3: shutil.rmtree(place)
    elif what == 4: flip(chance.choice([f for f in place.iterdir() if f.is_file()]), chance, chance.random() < .5)
    elif what == 5: (place / chance.choice([LOG, MASK, "config.json"])).unlink(missing_ok=True)
    elif what == 6: shutil.copytree(place, folder / f"copy-{chance.randrange(99):02d}", dirs_exist_ok=True)
    elif what == 7 and len(there) > 1: swap(place, next(p for p in there if p != place))
    elif what == 8: spoiled_index(folder, chance)
    elif (place / LOG).exists():
        with (place / LOG).open("a") as f: f.write(chance.choice(["{}\n", "junk\n", '{"step": 9}\n', "x"]))


@pytest.mark.parametrize("seed", range(25))
def test_a_store_says_what_a_look_without_index_says(seed, tmp_path, old):
    "Whatever is done between two calls: entries are written down at once here, so that most are believed."
    chance = random.Random(seed)
    for _ in range(30):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with suppress(SubnetError): act(tmp_path, chance)      # a run that is damaged cannot be continued
        check(tmp_path)


def test_settled_by_the_clock(tmp_path):
    "The same without help: a run that was changed just now is not written down, and is two seconds later."
    folder = made(Store(tmp_path), "a", 0)
    check(tmp_path)
    assert not (tmp_path / INDEX).exists()
    time.sleep(2.2)
    check(tmp_path)
    assert list(json.loads((tmp_path / INDEX).read_text())["runs"]) == [folder.name]
    with counted() as opened: assert len(Store(tmp_path).runs(task="a")) == 1
    assert opened == {INDEX: 1}
    flip(folder / MASK, random.Random(0), True)
    check(tmp_path)
    with pytest.warns(UserWarning, match="1 run is damaged"): assert not Store(tmp_path).runs()


def test_a_file_that_is_changed_twice_at_once(tmp_path, monkeypatch):
    "Where times are coarse, a change right after the look has the same stamp: it is seen all the same."
    coarse = 1_000_000_000
    real = chapter.stamp_of

    def stamp_of(folder: Any) -> tuple[int, ...]:
        return tuple(n // coarse * coarse if n > 1 << 50 else n for n in real(folder))

    monkeypatch.setattr(chapter, "stamp_of", stamp_of)
    folder = made(Store(tmp_path), "a", 0)
    whole = (folder / MASK).read_bytes()
    assert not told(tmp_path)[1]
    (folder / MASK).write_bytes(whole[:-1] + bytes([whole[-1] ^ 128]))
    assert list(told(tmp_path)[1]) == [folder.name]


def test_repaired_runs_are_served_at_once(tmp_path, old):
    folder = made(Store(tmp_path), "a", 0)
    whole = (folder / MASK).read_bytes()
    (folder / MASK).write_bytes(whole[:-3])
    assert list(told(tmp_path)[1]) == [folder.name]
    (folder / MASK).write_bytes(whole)
    assert list(told(tmp_path)[0]) == [folder.name] and not told(tmp_path)[1]


def test_other_indexes_are_not_believed(tmp_path, old, monkeypatch):
    "Of another version, of another store, or with other words under the same checksum."
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other): made(Store(folder), "a", 0)
    for folder in (one, other): told(folder)
    shutil.copy(one / INDEX, other / INDEX)
    check(other)
    said = (one / INDEX).read_bytes()
    assert b'"task":"a"' in said
    (one / INDEX).write_bytes(said.replace(b'"task":"a"', b'"task":"z"'))
    assert next(iter(told(one)[0].values()))[0] == {"task": "a", "seed": 0}
    monkeypatch.setattr(chapter, "__version__", "0.0.1")
    with counted() as opened: Store(one).runs()
    assert opened["config.json"] >= 1
    (one / INDEX).unlink()
    (one / INDEX).mkdir()
    check_served(one)


def check_served(folder: Path) -> None:
    "Whether the runs are served, whatever stands in place of the index."
    assert len(told(folder)[0]) == len(list(folder.glob("*/config.json")))


# ── several processes ────────────────────────────────────────────────────────────────────────────────────────────────

_CHILD = """
import random, sys, warnings
from pathlib import Path
sys.path[:0] = sys.argv[3:]
warnings.simplefilter("ignore")
from test_store_index import act, told
from subnet_explorer.core import store
from subnet_explorer.core.errors import SubnetError
store.SETTLED = 50_000_000
chance = random.Random(int(sys.argv[2]))
for _ in range(60):
    try:
        if chance.random() < .5: act(Path(sys.argv[1]), chance)
        else: told(Path(sys.argv[1]))
    except (OSError, SubnetError): pass      # the other process has just removed it
"""


@pytest.mark.parametrize("seed", range(2))
def test_two_processes_at_once(seed, tmp_path):
    "Both change runs and write the index; whatever is left of it, nothing in it is wrong."
    for task in "abc":
        for number in range(6): made(Store(tmp_path), task, number)
    words = [sys.executable, "-c", _CHILD, str(tmp_path)]
    here = str(Path(__file__).parent)
    children = [subprocess.Popen([*words, str(10 * seed + i), here], stderr=subprocess.PIPE) for i in range(2)]
    for _ in range(10): told(tmp_path)
    for child in children:
        _, said = child.communicate(timeout=240)
        assert child.returncode == 0, said.decode()
    check(tmp_path)
    assert not list(tmp_path.glob(".writing-*"))


def test_a_run_that_is_finished_while_it_is_read_is_not_damaged(tmp_path, monkeypatch):
    "The log is read before the last line was written, and then the mask is there."
    folder, reads = made(Store(tmp_path), "a", 0, done=False), []
    real = chapter.reason_of_damage

    def slowly(place: Path) -> str:
        reads.append(place)
        if len(reads) > 1: return real(place)
        Run.open(place).finish(Mask.random(SPACE, .5, seed=0))
        return "it was cut short"

    monkeypatch.setattr(chapter, "reason_of_damage", slowly)
    [run] = Store(tmp_path).runs()
    assert run.folder == folder and run.done and len(reads) == 2


# ── what it costs, in files ──────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def many(tmp_path, old) -> Path:
    "A study of sixty runs whose index is up to date."
    store = open_study(tmp_path / "study", {"recipe": "toy"})
    assert store is not None
    for task in "abc":
        for seed in range(20): made(store, task, seed)
    assert len(store.runs()) == 60
    return store.folder


USES: dict[str, Callable[[Path], Any]] = {
    "runs": lambda folder: Store(folder).runs(task="a"),
    "masks": lambda folder: Store(folder).masks(task="a"),
    "iterated": lambda folder: [run.labels for run in Store(folder)],
    "broken": lambda folder: Store(folder).broken,
    "repr": lambda folder: repr(Store(folder)),
    "kept_runs": lambda folder: kept_runs(folder.parent),
    "kept_masks": lambda folder: kept_masks(folder.parent),
}


@pytest.mark.parametrize("use", USES)
def test_what_has_not_changed_is_not_opened(use, many):
    before = (many / INDEX).stat()
    with counted() as opened: USES[use](many)
    assert sum(n for name, n in opened.items() if name in ("config.json", LOG, MASK)) == 0
    assert opened[INDEX] <= 1 and (many / INDEX).stat().st_mtime_ns == before.st_mtime_ns


def test_what_has_changed_is_opened(many):
    "One run that goes on, one new one: their files, the index twice, nothing else."
    made(Store(many), "d", 0)
    with (sorted(many.iterdir())[3] / LOG).open("a") as f: f.write("junk\n")
    with counted() as opened, pytest.warns(UserWarning, match="damaged"): assert len(Store(many).runs()) == 60
    assert opened["config.json"] <= 4 and opened[LOG] <= 2 and opened[MASK] <= 2


def test_settings_are_there_without_the_files(many):
    "The configuration stands in the index, as it was asked for; it is the same object for the run that was opened."
    found = {run.id: run for run in Store(many)}
    for run in found.values():
        assert run.folder is not None
        opened = Run.open(run.folder)
        assert (opened.config, opened.labels, opened.id) == (run.config, run.labels, run.id)
    assert next(iter(found.values())).config is next(iter(found.values())).config


def test_places_of_new_runs_are_not_looked_up_by_listing(many, monkeypatch):
    "A large store is listed a few times a second, not once for every new run; earlier names are found all the same."
    monkeypatch.setattr(chapter, "SMALL", 10)
    monkeypatch.setattr(chapter, "SHARE", 1e9)
    listed: list[Any] = []
    real = os.listdir
    monkeypatch.setattr(chapter.os, "listdir", lambda *given: (listed.append(given), real(*given))[1])
    store = Store(many)
    for seed in range(50): assert not store.path({"task": "new", "seed": seed}, {"seed": seed}).exists()
    assert len(listed) == 1


def test_runs_of_earlier_versions_are_found(tmp_path):
    "By labels that are no plain words, also if they came after the last look."
    store, labels, config = Store(tmp_path), {"task": "a b/c", "seed": 0}, {"seed": 0}
    place = store.path(labels, config)
    assert not place.exists() and "%" in place.name
    earlier = Run(tmp_path / f"a_b_c-0-{'0' * 8}", config, labels)
    assert store.path(labels, config) == earlier.folder


# ── places where nothing can be written, and names that are no runs ──────────────────────────────────────────────────

def test_nothing_is_written_where_nothing_may_be(tmp_path, old):
    "While a block may write in one folder alone, the store in another one is read without its index."
    made(Store(tmp_path / "there"), "a", 0)
    (tmp_path / "here").mkdir()
    with inside(tmp_path / "here"): assert len(Store(tmp_path / "there").runs()) == 1
    assert not (tmp_path / "there" / INDEX).exists()
    assert not list((tmp_path / "there").glob(".writing-*"))


def test_a_store_that_is_not_there(tmp_path):
    store = Store(tmp_path / "none")
    assert not store.runs() and not store.broken and repr(store).endswith("0 runs)") and not store.folder.exists()
    (tmp_path / "file").write_text("x")
    assert not Store(tmp_path / "file").runs()


def test_what_is_being_removed_is_no_run(tmp_path):
    folder = made(Store(tmp_path), "a", 0)
    shutil.copytree(folder, tmp_path / ".removing-00000000-1-00000000")
    shutil.copytree(folder, tmp_path / ".damaged")
    assert list(index(tmp_path)) == [folder.name] and "1 runs" in repr(Store(tmp_path))


def test_left_overs_are_swept_in_one_walk(many):
    "Files and folders of passing names, states of finished runs, leases of processes that are gone."
    place = sorted(many.iterdir())[1]
    (place / "state.safetensors").write_text("x")
    (place / f".writing-{'0' * 8}-1-{'0' * 8}").mkdir()
    os.utime(place / f".writing-{'0' * 8}-1-{'0' * 8}", (0, 0))
    (place / ".leases").mkdir()
    assert {path.name[:9] for path in tidy(many.parent)} == {"state.saf", ".writing-"}
    assert not tidy_leases(many.parent) and not (place / ".leases").exists()


def test_kept_runs_of_anything(tmp_path, old):
    "Runs side by side with models of others, studies and folders of them; damaged ones are named."
    for name in ("b", "a"):
        store = open_study(tmp_path / "studies" / name, {"recipe": name})
        assert store is not None
        made(store, name, 0)
    made(Store(tmp_path), "c", 0)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"hidden_size": 4}')
    made(Store(tmp_path / "model" / "below"), "d", 0)
    for _ in range(2): assert [run.labels["task"] for run in kept_runs(tmp_path)] == ["c", "d", "a", "b"]
    whole = next((tmp_path / "studies" / "a" / "runs").glob("a-*"))
    (whole / MASK).write_bytes(b"")
    with pytest.warns(UserWarning, match="is left out"): assert len(kept_runs(tmp_path)) == 3
    with pytest.raises(SubnetError, match=r"damaged|cannot read"): Run.open(whole).mask.id  # noqa: B018
