"""Files that are damaged on purpose, and what becomes of them.

`damage` changes the bytes of a file in one of many ways. `fuzz` damages files, reads each, and counts what came of it:

- `right`: the value that was written;
- `refused`: a named error;
- `resealed`: another value, from a file whose checksum was computed anew after the change, as only a liar does;
- `unsealed`: another value, from a file whose header lost its checksum and nothing else, as if an earlier version had
  written it, which again only a liar does;
- `wrong`: another value, which must never happen; `raw`: any other exception; `memory`, `slow`: beyond the bounds.

`python tests/fuzzing.py mask 100000 --seed 1` runs it and prints the counts; `python tests/fuzzing.py state 100000
--studies FOLDER` takes the files of that kind in a folder of studies. So may any script, with files of its own.
"""
from __future__ import annotations

import argparse
import copy
import hashlib
import io
import json
import random
import re
import resource
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from subnet_explorer.core.errors import SubnetError
from subnet_explorer.core.files import read_json
from subnet_explorer.core.log import read_log
from subnet_explorer.core.maskfile import read_mask
from subnet_explorer.core.run import read_state
from subnet_explorer.core.tensors import TensorFile, open_sealed, sealed
from subnet_explorer.measure.patterns import PatternCNN

FIXTURES = Path(__file__).resolve().parent / "fixtures"
BAD = ("wrong", "raw", "memory", "slow")
Value = Any
Reader = Callable[[bytes], Value]      # raises `SubnetError` for what is damaged


# ── checksums ────────────────────────────────────────────────────────────────────────────────────────────────────────

_DIGITS = re.compile(rb'"checksum":"([0-9a-f]{64})"')


def _split(data: bytes) -> tuple[bytes, bytes]:
    "Header with its length, and what comes after it."
    end = 8 + int.from_bytes(data[:8], "little")
    return data[:end], data[end:]


def _digest(data: bytes) -> tuple[re.Match[bytes], str] | None:
    "The digits of the checksum, and what they should be; None if there are none."
    header, rest = _split(data)
    found = _DIGITS.search(header)
    if found is None: return None
    blank = header[:found.start(1)] + b"0" * 64 + header[found.end(1):]
    return found, hashlib.sha256(blank + rest).hexdigest()


def reseal(data: bytes) -> bytes:
    "The same bytes with the checksum that they should have."
    digest = _digest(data)
    if digest is None: return data
    found, digits = digest
    return data[:found.start(1)] + digits.encode() + data[found.end(1):]


def is_sealed(data: bytes) -> bool:
    "Whether a file has the checksum that it should have."
    digest = _digest(data)
    return digest is not None and digest[0][1] == digest[1].encode()


# ── bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def _flip(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))): out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _overwrite(data: bytes, rng: random.Random) -> bytes:
    at, length = rng.randrange(len(data)), rng.choice((1, 1, 2, 4, 16, 64))
    return data[:at] + rng.randbytes(len(data[at:at + length])) + data[at + length:]


def _truncate(data: bytes, rng: random.Random) -> bytes: return data[:rng.randrange(len(data))]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.choice((rng.randrange(len(data)), len(data)))
    return data[:at] + rng.randbytes(rng.choice((1, 2, 8, 100))) + data[at:]


def _piece(data: bytes, rng: random.Random) -> tuple[int, int]:
    at = rng.randrange(len(data))
    return at, min(len(data), at + rng.choice((1, 4, 16, 64, 512)))


def _duplicate(data: bytes, rng: random.Random) -> bytes:
    a, b = _piece(data, rng)
    return data[:b] + data[a:b] + data[b:]


def _remove(data: bytes, rng: random.Random) -> bytes:
    a, b = _piece(data, rng)
    return data[:a] + data[b:]


def _zero(data: bytes, rng: random.Random) -> bytes:
    a, b = _piece(data, rng)
    return data[:a] + bytes(b - a) + data[b:]


def _swap(data: bytes, rng: random.Random) -> bytes:
    length = rng.choice((1, 4, 16, 64))
    if len(data) < 2 * length: return data
    a = rng.randrange(len(data) - 2 * length + 1)
    b = rng.randrange(a + length, len(data) - length + 1)
    return data[:a] + data[b:b + length] + data[a + length:b] + data[a:a + length] + data[b + length:]


def _header_length(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    near = length + rng.randint(-9, 9)
    odd = rng.choice((near, 0, len(data) - 8, len(data), 1 << 20, 1 << 63, (1 << 64) - 1, rng.randrange(1 << 64)))
    return (odd % (1 << 64)).to_bytes(8, "little") + data[8:]


# ── JSON of the header ───────────────────────────────────────────────────────────────────────────────────────────────

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, -1, 7, 255, 1 << 31, 1 << 40, 1 << 62, 1 << 63, 10 ** 30, 1.5, 1e300, float("nan"),
    float("inf"), "", "a", "é\ud800", "0" * 16, "weight", "subnet_explorer.mask/1", "subnet_explorer.mask/4", [], {},
    [1], [-1], [0], [True], [1, 1], [1 << 40, 1 << 40], [1 << 62, 1 << 62, 0], ["a"], {"a": 1}, [[[[[[]]]]]],
)
"Values that stand where others should."


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    "The paths of all values in plain data."
    yield path
    if isinstance(value, dict):
        for key, inside in value.items(): yield from places(inside, (*path, key))
    if isinstance(value, list):
        for i, inside in enumerate(value): yield from places(inside, (*path, i))


def changed(value: Any, path: Sequence[Any], new: Any) -> Any:
    "Plain data with another value in one place."
    if not path: return new
    out = copy.copy(value)
    out[path[0]] = changed(value[path[0]], path[1:], new)
    return out


def removed(value: Any, path: Sequence[Any]) -> Any:
    "Plain data without what is in one place."
    out = copy.copy(value)
    if len(path) > 1: out[path[0]] = removed(value[path[0]], path[1:])
    elif path: del out[path[0]]
    return out


def with_header(header: Any, rest: bytes) -> bytes:
    "A file with another header."
    text = (header if isinstance(header, str) else json.dumps(header, separators=(",", ":"))).encode(errors="replace")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + rest


def _mutated(value: Any, rng: random.Random) -> Any:
    "Plain data, odd in one place."
    path = rng.choice(list(places(value)))
    way = rng.randrange(8)
    if way == 0: return removed(value, path)
    if way == 1: return changed(value, path, value)                   # the whole inside of itself
    old = value
    for key in path: old = old[key]
    if way == 2 and isinstance(old, dict): return changed(value, path, {**old, rng.choice("abc"): rng.choice(ODD)})
    if way in (2, 3) and type(old) is int: return changed(value, path, old + rng.choice((-8, -1, 1, 8, 1 << 16)))
    if way in (2, 3) and isinstance(old, list): return changed(value, path, old + old or [0])
    return changed(value, path, rng.choice(ODD))


def _edit(data: bytes, rng: random.Random) -> bytes:
    "Another header, with or without the checksum that this would need; the same where damage made it unreadable."
    try: out = _edited(data, rng)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError): return data
    return reseal(out) if rng.random() < .7 else out


def _edited(data: bytes, rng: random.Random) -> bytes:
    header, rest = _split(data)
    said = json.loads(header[8:])
    texts = said.get("__metadata__", {})
    inner = [key for key, text in texts.items() if text.startswith("{")]
    if inner and rng.random() < .8:
        key = rng.choice(inner)
        text = json.dumps(_mutated(json.loads(texts[key]), rng))
        if rng.random() < .05: text = text.replace(":", ":" + "[" * rng.choice((50, 5000)), 1)
        if rng.random() < .05: text = text[:-1] + "," + text[1:]      # every field twice
        said = changed(said, ("__metadata__", key), text)
    else: said = _mutated(said, rng)
    return with_header(said, rest)


WAYS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip, _flip, _overwrite, _truncate, _insert, _duplicate, _remove, _zero, _swap, _header_length,
    _edit, _edit, _edit,
)


def damage(data: bytes, rng: random.Random) -> bytes:
    "The bytes of a file with something wrong in them, sometimes with a checksum that fits that."
    out = rng.choice(WAYS)(data, rng)
    while rng.random() < .15 and out: out = rng.choice(WAYS)(out, rng)
    return reseal(out) if rng.random() < .1 else out


# ── counts ───────────────────────────────────────────────────────────────────────────────────────────────────────────

SECONDS, BYTES, SAMPLE = 1.0, 64_000_000, 500


def _outcome(reader: Reader, data: bytes, expected: Value, original: bytes) -> tuple[str, Exception | None]:
    "What became of a file."
    began = time.process_time()
    try: found = reader(data)
    except SubnetError as e:
        if isinstance(e.__cause__, MemoryError): return "memory", e
        result, error = "refused", None
    except Exception as e: return "raw", e
    else: result, error = _kind_of(data, found == expected, original), None
    return ("slow" if time.process_time() - began > SECONDS else result), error


def _kind_of(data: bytes, same: bool, original: bytes) -> str:
    if same: return "right"
    if is_sealed(data): return "resealed"
    return "unsealed" if is_sealed(original) and _texts(original) - _texts(data) == {"checksum"} else "wrong"


def _texts(data: bytes) -> set[str]:
    "Names of the texts in a header; none if it cannot be read."
    try: return set(json.loads(_split(data)[0][8:])["__metadata__"])
    except (ValueError, TypeError, LookupError, RecursionError): return set()


def _measured(reader: Reader, data: bytes) -> int:
    "Most memory that a reader takes, beyond the file itself, in bytes."
    tracemalloc.start()
    with suppress(Exception): reader(data)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most - len(data)


def fuzz(
    kind: str,                                  # for messages
    files: Sequence[tuple[bytes, Value]],       # what is written, and what must be read
    reader: Reader,
    n: int,
    seed: int,
    keep: Path | None = None,                   # folder for files of which something bad came
) -> Counter[str]:
    "Damage files `n` times, and count what becomes of them."
    rng, counts = random.Random(seed), Counter[str]()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + (4 << 30), limits[1]))
    try:
        for i in range(n):
            original, expected = rng.choice(files)
            data = damage(original, rng)
            result, error = _outcome(reader, data, expected, original)
            if i % SAMPLE == 0 and _measured(reader, data) > BYTES: result = "memory"
            counts[result] += 1
            if result in BAD: _report(f"{kind}-{seed}-{i}-{result}", data, error, keep)
    finally: resource.setrlimit(resource.RLIMIT_AS, limits)
    return counts


def _address_space() -> int:
    "Bytes of addresses that the process has taken so far."
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _report(name: str, data: bytes, error: Exception | None, keep: Path | None) -> None:
    "Say what is bad, and keep the file."
    print(f"{name}: {len(data)} bytes, {type(error).__name__}: {error}"[:300], file=sys.stderr)
    if keep is None: return
    keep.mkdir(parents=True, exist_ok=True)
    (keep / name).write_bytes(data)


# ── files of the library ─────────────────────────────────────────────────────────────────────────────────────────────

def read_whole(data: bytes) -> Value:
    "All that a mask file says."
    bits = read_mask(io.BytesIO(data), "fuzz")
    return bits.id, bits.packed, bits.space.layout, bits.space.model, json.dumps(dict(bits.meta))


def read_bits(data: bytes) -> Value:
    "What the identity of a mask covers: all that earlier versions of the format protected."
    bits = read_mask(io.BytesIO(data), "fuzz")
    return bits.id, bits.packed


def read_tensors(data: bytes) -> Value:
    "Arrays and texts of a file of tensors."
    try:
        file = TensorFile(io.BytesIO(data))
        arrays = {name: file.array(entry).tobytes() for name, entry in file.entries.items()}
        file.check(None)
        return arrays, file.about
    except ValueError as why: raise SubnetError(str(why)) from why


def _paths() -> Mapping[str, Iterable[Path]]:
    "Mask files by kind."
    earlier = sorted((FIXTURES / "earlier").rglob("mask.safetensors"), key=lambda p: (p.stat().st_size, str(p)))
    return {"mask": sorted((FIXTURES / "masks").glob("*.safetensors")), "earlier": earlier[:20]}


def _tensors() -> list[bytes]:
    "Some files of tensors."
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {"a": rng.random((3, 5)), "b": np.arange(7, dtype=np.int16)}
    arrays |= {"c": np.array(True), "d": np.zeros((0, 2))}
    return [sealed(arrays, {"state": json.dumps({"step": 3})}), sealed({"x": rng.random(200)}, {})]


def whole_log(file: Path) -> Value:
    "Rows of a log that was ended; whatever else is said of it is a named error here."
    log = read_log(file)
    if log.damage or log.torn or not log.ended or log.lines != len(log.rows): raise SubnetError(str(log.damage))
    return log.rows


def all_of(file: Path) -> Value:
    "Arrays and texts of a file of tensors or a mask."
    arrays, about = open_sealed(file, earlier=None)
    return {name: values.tobytes() for name, values in arrays.items()}, about


def state_of(file: Path) -> Value:
    "What a search goes on from."
    state = read_state(file.parent)
    assert state is not None
    return {name: t.numpy().tobytes() for name, t in state[0].items()}, state[1]


def classifier_of(file: Path) -> Value:
    "Weights of a pattern classifier, and what goes with them."
    cnn = PatternCNN.load(file)
    return {name: t.numpy().tobytes() for name, t in cnn.net.state_dict().items()}, cnn.meta


OWN: dict[str, tuple[str, Callable[[Path], Value]]] = {
    "json": ("*.json", read_json), "log": ("*.jsonl", whole_log), "sealed": ("*.safetensors", all_of),
    "soft": ("soft.safetensors", all_of), "heads": ("heads.safetensors", all_of),
    "weights": ("weights.safetensors", all_of), "scores": ("scores/*.safetensors", all_of),
    "state": ("state.safetensors", state_of), "patterns": ("patterns.safetensors", classifier_of),
}
"Kinds of files in study folders: where they are, and how they are read."


def of_studies(kind: str, folder: Path, place: Path) -> tuple[list[tuple[bytes, Value]], Reader]:
    "Files of a kind in a folder of studies with what they say, and their reader, which writes them in `place`."
    pattern, read = OWN[kind]
    place.mkdir(parents=True, exist_ok=True)
    file = place / pattern.split("/")[-1].replace("*", "file")

    def reader(data: bytes) -> Value:
        file.write_bytes(data)
        return read(file)
    found = [path.read_bytes() for path in sorted(folder.rglob(pattern)) if path.name != ".index.json"]
    if kind == "log": found = [data for data in found if b'"end": ' in data]
    return [(data, reader(data)) for data in dict.fromkeys(found)], reader


def of_kind(kind: str) -> tuple[list[tuple[bytes, Value]], Reader]:
    "Files of a kind with what they hold, and their reader."
    readers: dict[str, Reader] = {"mask": read_whole, "earlier": read_bits, "tensors": read_tensors}
    reader = readers[kind]
    found = _tensors() if kind == "tensors" else [p.read_bytes() for p in _paths()[kind]]
    return [(data, reader(data)) for data in found], reader


def main() -> int:
    "Run it as the command line says; the status is 1 if anything bad came of a file."
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("kind", choices=["mask", "earlier", "tensors", *OWN])
    given.add_argument("n", type=int)
    given.add_argument("--seed", type=int, default=0)
    given.add_argument("--keep", type=Path, help="folder for files of which something bad came")
    given.add_argument("--studies", type=Path, help=f"folder of studies whose files are damaged: {', '.join(OWN)}")
    given.add_argument("--place", type=Path, default=Path("build/fuzzing"), help="folder for a damaged file")
    args = given.parse_args()
    if args.kind in OWN and not args.studies: given.error(f"{args.kind} needs --studies FOLDER")
    own = args.kind in OWN
    files, reader = of_studies(args.kind, args.studies, args.place) if own else of_kind(args.kind)
    if not files: given.error(f"no file {OWN[args.kind][0]} in {args.studies}")
    began = time.perf_counter()
    counts = fuzz(args.kind, files, reader, args.n, args.seed, args.keep)
    seconds = time.perf_counter() - began
    print(json.dumps({"kind": args.kind, "n": args.n, "seed": args.seed, **dict(counts), "seconds": round(seconds, 1)}))
    return int(any(counts[bad] for bad in BAD))


if __name__ == "__main__": sys.exit(main())
