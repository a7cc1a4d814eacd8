"The format of mask files: what it holds, what a reader must refuse, and what it may cost."
from __future__ import annotations

import copy
import gc
import hashlib
import io
import json
import math
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from fixtures.make_masks import MASKS, drawn, masks, space_of
from fuzzing import ODD, changed, places, removed
from hypothesis import given, strategies as st

from subnet_explorer import __version__
from subnet_explorer.core.bits import Bits
from subnet_explorer.core.errors import SubnetError
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.maskfile import (
    GROWTH,
    LONGEST,
    ROOM,
    MaskFileError,
    expand_gaps,
    mask_bytes,
    packed_size,
    read_mask,
    read_mask_file,
)
from subnet_explorer.core.space import Space
from subnet_explorer.core.tensors import sealed

EARLIER = MASKS.parent / "earlier"
VECTORS = json.loads((MASKS / "vectors.json").read_text())
vectors = pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["path"].split(".")[0])
versions = pytest.mark.parametrize("version", [1, 3])


def read(data: bytes, trusted: bool = False) -> Bits: return read_mask(io.BytesIO(data), "a file", trusted)


def head_of(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8:8 + length])["__metadata__"]["subnet_explorer"])


def tensors_of(data: bytes) -> dict[str, np.ndarray]:
    from safetensors.numpy import load
    return load(data)


def written(head: Any, tensors: dict[str, np.ndarray], version: int = 3) -> bytes:
    "A file with any header, with the checksum that belongs to it, or without one as earlier versions wrote it."
    from safetensors.numpy import save
    text = head if isinstance(head, str) else json.dumps(head)
    return sealed(tensors, {"subnet_explorer": text}) if version > 2 else save(tensors, {"subnet_explorer": text})


def some(version: int = 3, densities: tuple[float, ...] = (.5, .5)) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    "Header and tensors of a good file."
    data = mask_bytes(drawn(space_of((3, 5), (16,)), *densities))
    head = head_of(data) | {"format": f"subnet_explorer.mask/{version}"}
    if version == 1: del head["gaps"]
    return head, tensors_of(data)


def cost(data: bytes) -> tuple[int, float]:
    "Most memory beyond the file, in bytes, and seconds of a reading that may fail; what other tests hold costs none."
    gc.freeze()
    began = time.process_time()
    with suppress(MaskFileError): read(data)
    seconds = time.process_time() - began
    gc.unfreeze()
    tracemalloc.start()
    with suppress(MaskFileError): read(data)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most - len(data), seconds


# ── what it holds ────────────────────────────────────────────────────────────────────────────────────────────────────

@vectors
def test_vectors(vector):
    data = (MASKS / vector["path"]).read_bytes()
    mask = Mask.load(MASKS / vector["path"])
    assert hashlib.sha256(data).hexdigest() == vector["sha256"] and mask.id == vector["id"]
    assert mask.density == pytest.approx(vector["density"], abs=1e-6)
    for name, told in vector["tensors"].items():
        assert np.flatnonzero(mask[name] == ("kept" in told)).tolist() == next(iter(told.values()))
    wanted = masks()[vector["path"].split(".")[0]]
    assert (mask.id, dict(mask.meta)) == (wanted.id, dict(wanted.meta))
    if head_of(data)["library"] == __version__: assert mask_bytes(wanted) == data == mask_bytes(mask)


def test_every_way_of_storing_is_among_the_vectors():
    heads = [head_of((MASKS / v["path"]).read_bytes()) for v in VECTORS]
    assert {rare for head in heads for rare in head["gaps"].values()} == {0, 1} and any(not h["gaps"] for h in heads)
    assert {"weight", "block", "head", "mlp"} <= {g["kind"] for head in heads for g in head["space"]["groups"]}


numbers = st.integers(-2 ** 70, 2 ** 70) | st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(), inside, max_size=3), max_leaves=8)
shapes = st.lists(st.sampled_from([(), (1,), (7,), (8,), (3, 5), (1001,), (64, 65), (2, 3, 4)]), min_size=1, max_size=4)


@given(shapes, st.dictionaries(st.text(), plain, max_size=3), st.data())
def test_round_trip(shapes, meta, data):
    densities = [data.draw(st.sampled_from([0, .001, .02, .5, .99, 1])) for _ in shapes]
    bits = drawn(space_of(*shapes), *densities)
    bits = Bits(bits.space, bits.packed, meta)
    file = mask_bytes(bits)
    again = read(file)
    assert again == bits and again.packed == bits.packed and again.space == bits.space and dict(again.meta) == meta
    assert mask_bytes(again) == file and all(type(p) is bytes for p in again.packed)
    assert len(tensors_of(file)) == len(shapes)                           # other programs read it, too


def test_numbers_that_json_does_not_have():
    bits = drawn(space_of((9,)), .5)
    again = read(mask_bytes(Bits(bits.space, bits.packed, {"loss": math.nan, "all": [math.inf], 3: Path("a")})))
    assert dict(again.meta) == {"loss": None, "all": [None], "3": "a"}


@pytest.mark.parametrize("file", sorted(EARLIER.rglob("*mask.safetensors")), ids=lambda f: f.parent.name)
def test_files_of_earlier_versions(file):
    data = file.read_bytes()
    mask, head = Mask.load(file), head_of(data)
    assert head["format"] in ("subnet_explorer.mask/1", "subnet_explorer.mask/2") and mask.id == head["id"]
    assert dict(mask.meta) == head["meta"] and read(mask_bytes(mask)) == mask


# ── what cannot be written ───────────────────────────────────────────────────────────────────────────────────────────

def test_masks_that_no_file_can_hold():
    good = drawn(space_of((3, 5)), .5)
    for shapes in ((), ((0,),), ((3, 0), (4,))):                          # no coordinates in all, or in a tensor
        space = space_of(*shapes)
        with pytest.raises(SubnetError, match="no file can hold"):
            mask_bytes(Bits(space, tuple(bytes(packed_size(g.size)) for g in space.groups)))
    twice = Space((good.space.groups[0],) * 2, good.space.layout, good.space.model)
    for bits in (Bits(twice, good.packed * 2), Bits(good.space, (b"\0\1",)), Bits(good.space, (b"\0",))):
        with pytest.raises(SubnetError, match="no file can hold"): mask_bytes(bits)
    with pytest.raises(SubnetError, match="shorten its meta"):
        mask_bytes(Bits(good.space, good.packed, {"note": "a" * LONGEST}))


def test_a_large_and_empty_mask_has_enough_packed_bits_to_be_read_again():
    space = space_of(*[(1 << 27,)] * 5)
    bits = Bits(space, tuple(bytes(1 << 24) for _ in space.groups))
    data = mask_bytes(bits)
    gaps = head_of(data)["gaps"]
    assert 0 < len(gaps) < 5 and len(gaps) << 24 <= ROOM + GROWTH * len(data) and read(data) == bits


# ── what must be refused ─────────────────────────────────────────────────────────────────────────────────────────────

@versions
@pytest.mark.parametrize("shape", [[4], [1], [15, 1, 2], [1 << 40], [1 << 62, 8], [0], [3, 5, 0]])
def test_a_shape_that_does_not_fit_its_bytes(version, shape):
    "It was read, as a mask of density 2.0."
    head, tensors = some(version)
    head["space"]["groups"][0]["shape"] = shape
    space = Space.from_json(head["space"])
    head["id"] = Bits(space, tuple(a.tobytes() for a in tensors.values())).id
    with pytest.raises(MaskFileError): read(written(head, tensors, version))


@versions
@pytest.mark.parametrize("field", ["format", "library", "id", "space", "meta", "gaps"])
def test_a_field_that_is_missing(version, field):
    head, tensors = some(version)
    if field not in head: return
    with pytest.raises(MaskFileError): read(written(removed(head, [field]), tensors, version))


@versions
@pytest.mark.parametrize("meta", [None, [], "a", 1])
def test_provenance_of_another_type(version, meta):
    head, tensors = some(version)
    with pytest.raises(MaskFileError, match="meta"): read(written({**head, "meta": meta}, tensors, version))


def test_bits_after_the_last_coordinate():
    head, tensors = some()
    tensors["layer.0.q"] = tensors["layer.0.q"] | np.array([0, 1], np.uint8)
    head["id"] = Bits(Space.from_json(head["space"]), tuple(a.tobytes() for a in tensors.values())).id
    with pytest.raises(MaskFileError, match="other bits than coordinates"): read(written(head, tensors))


def test_what_is_said_of_the_layout_is_covered():
    data = mask_bytes(drawn(space_of((3, 5)), .5))
    for a, b in ((b'n_heads\\":4', b'n_heads\\":2'), (b'seed\\":0', b'seed\\":1'), (b"Z\\\\u00fc", b"Z\\\\u00fd")):
        assert data.count(a) == 1
        with pytest.raises(MaskFileError, match="checksum"): read(data.replace(a, b))


@versions
def test_tensors_that_are_none_of_the_space(version):
    head, tensors = some(version)
    for other in ({**tensors, "x": np.zeros(1, np.uint8)}, {"layer.0.q": tensors["layer.0.q"]},
                  {k: a.astype(np.int8) for k, a in tensors.items()}, {k: a[None] for k, a in tensors.items()}):
        with pytest.raises(MaskFileError): read(written(head, other, version))


def test_unknown_fields_and_versions():
    head, tensors = some()
    with pytest.raises(MaskFileError, match="unknown field 'x'"): read(written({**head, "x": 1}, tensors))
    newer = {**head, "format": "subnet_explorer.mask/4", "x": 1}
    with pytest.raises(MaskFileError, match="a newer subnet_explorer"): read(written(newer, tensors))
    with pytest.raises(MaskFileError, match="no checksum"): read(written(head, tensors, version=2))
    first, tensors = some(1)
    assert read(written({**first, "x": 1}, tensors, version=1)) == read(written(head, tensors))
    assert read(written(first, tensors)) == read(written(head, tensors))      # with a checksum, which must fit then


# ── gaps ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def frame(content: bytes, **how: Any) -> np.ndarray:
    return np.frombuffer(zstandard.ZstdCompressor(level=1, **how).compress(content), np.uint8)


def of_gaps(size: int, stored: np.ndarray, packed: bytes, version: int = 3) -> bytes:
    "A file of one tensor of gaps."
    head, _ = some(version)
    space = space_of((size,))
    head |= {"space": space.to_json(), "gaps": {"layer.0.q": 1}, "id": Bits(space, (packed,)).id}
    return written(head, {"layer.0.q": stored}, version)


def test_a_small_file_takes_little_memory():
    "729 bytes took 3.3 GB."
    size = 8 * ROOM * 100
    for version in (2, 3):
        data = of_gaps(size, frame(b""), b"", version)
        most, seconds = cost(data)
        assert len(data) < 1000 and most < 1e6 and seconds < 1
        with pytest.raises(MaskFileError, match=r"3,355,443,200 bytes in memory.*trusted=True"): read(data)


def test_beyond_the_bounds_where_a_file_is_trusted(tmp_path):
    size = 8 * (ROOM + (1 << 20))
    data = of_gaps(size, frame(b""), bytes(size // 8), 2)
    (tmp_path / "m").write_bytes(data)
    with pytest.raises(MaskFileError, match="trusted=True"): Mask.load(tmp_path / "m")
    assert Mask.load(tmp_path / "m", trusted=True).count == 0
    long = Bits(space_of((9,)), (bytes(2),), {"note": "a"})
    head = head_of(mask_bytes(long)) | {"meta": {"note": "a" * LONGEST}, "format": "subnet_explorer.mask/2"}
    (tmp_path / "m").write_bytes(written(head, tensors_of(mask_bytes(long)), 2))
    with pytest.raises(MaskFileError, match="more than 524,288"): Mask.load(tmp_path / "m")
    assert Mask.load(tmp_path / "m", trusted=True) == long


BOMBS = {
    "zeros": frame(bytes(10_000_000)), "as long as packed bits": frame(bytes(ROOM)), "no length": frame(b"\1" * 9,
    write_content_size=False), "two frames": np.concatenate([frame(b"\1" * 9), frame(bytes(10_000_000))]),
    "cut": frame(bytes(range(200)))[:-20], "rubbish after it": np.append(frame(b"\1" * 9), [1] * 9).astype(np.uint8),
    "no frame": np.zeros(40, np.uint8), "nothing": np.zeros(0, np.uint8), "endless": frame(b"\xff" * 1_000_000),
    "without end": frame(b"\1\xff"), "longer than packed bits": frame(b"\1" * (ROOM + 1)),
}  # fmt: skip


@pytest.mark.parametrize("stored", BOMBS.values(), ids=BOMBS)
def test_gaps_that_are_none(stored):
    for size in (1000, 100_000, 8 * ROOM):
        data = of_gaps(size, stored, bytes(packed_size(size)))
        most, seconds = cost(data)
        assert most < 64e6 and seconds < 1
        with pytest.raises(MaskFileError): read(data)


def test_a_window_that_needs_much_memory_is_refused():
    parameters = zstandard.ZstdCompressionParameters(window_log=27, compression_level=1)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=1 << 24)
    stored = np.frombuffer(packer.compress(bytes(1 << 24)) + packer.flush(), np.uint8)
    with pytest.raises(Exception, match=r"memory|window"): expand_gaps(stored.tobytes(), 8 << 24, 1)


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", ["weights", "gaps", "units"])
def test_a_file_that_was_cut_anywhere(name):
    data = (MASKS / f"{name}.mask.safetensors").read_bytes()
    for length in range(len(data)):
        with pytest.raises(MaskFileError): read(data[:length])
    with pytest.raises(MaskFileError): read(data + b"\0")


@pytest.mark.parametrize("name", ["weights", "gaps"])
def test_every_bit_counts(name):
    data = bytearray((MASKS / f"{name}.mask.safetensors").read_bytes())
    for at in range(len(data)):
        for bit in range(8):
            data[at] ^= 1 << bit
            with pytest.raises(MaskFileError): read(bytes(data))
            data[at] ^= 1 << bit
    read(bytes(data))


def test_every_bit_of_a_file_without_checksum():
    "The id covers the bits, names and shapes."
    file = min(EARLIER.rglob("mask.safetensors"), key=lambda f: f.stat().st_size)
    data, mask = bytearray(file.read_bytes()), Mask.load(file)
    for at in range(len(data)):
        bit = 1 << at % 8
        data[at] ^= bit
        with suppress(MaskFileError): assert read(bytes(data)) == mask
        data[at] ^= bit


# ── liars ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def check_harmless(data: bytes) -> bool:
    "Whether a file was refused; one that was not is a mask. Either takes little time and memory."
    most, seconds = cost(data)
    assert most < 64e6 and seconds < 1
    try: found = read(data)
    except MaskFileError: return True
    assert 0 <= found.density <= 1 and read(mask_bytes(found)) == found
    assert [len(p) for p in found.packed] == [packed_size(g.size) for g in found.space.groups]
    return False


HEAD, TENSORS = some(densities=(.5, .01))
PATHS = [path for path in places(HEAD) if path and path[0] != "meta"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_odd_values_anywhere_in_a_header(path):
    "More than a thousand headers, with the checksums that belong to them; labels are the only thing one may make up."
    refused = [check_harmless(written(changed(HEAD, path, odd), TENSORS)) for odd in ODD]
    refused.append(check_harmless(written(removed(HEAD, path), TENSORS)))
    assert sum(refused) >= len(ODD) // 2


def test_headers_that_are_no_headers():
    text = json.dumps(HEAD)
    deep = "[" * 100_000 + "]" * 100_000
    for odd in ("", "{", "null", "[]", text + "}", text[:-1] + "," + text[1:], deep,
                text.replace('"seed": 0', '"seed": NaN'),
                text.replace('"meta": {', '"meta": {"a": 1e999, '),
                text.replace('"meta": {', '"meta": {"a": Infinity, '),
                text.replace('"meta": {', '"meta": {"a": ' + "9" * 5000 + ", "),
                text.replace('"meta": {', '"meta": {"a": ' + deep + ", "), '{"a":' * 50_000):
        assert check_harmless(written(odd, TENSORS)), odd[:100]


@pytest.mark.parametrize("fill", ["[]", "{}", "[[[[]]]]", "1.5", '"a"', '{"a":0}', "0"])
def test_headers_that_fill_the_memory(fill):
    n = (LONGEST - 3000) // (len(fill) + 2 * fill.count('"') + 1)
    many, text = ",".join([fill] * n), json.dumps(HEAD)
    check_harmless(written(text.replace('"meta": {', f'"meta": {{"a": [{many}], '), TENSORS))
    assert check_harmless(written(text.replace('"groups": [', f'"groups": [{many}, '), TENSORS))


def test_as_many_tensors_as_a_header_can_hold():
    groups = [{**HEAD["space"]["groups"][0], "name": f"{i:x}", "shape": [8]} for i in range(2200)]
    head = copy.deepcopy(HEAD)
    head["space"]["groups"], head["gaps"] = groups, {}
    space = Space.from_json(head["space"])
    head["id"] = Bits(space, (b"\1",) * len(groups)).id
    data = written(head, {g.name: np.ones(1, np.uint8) for g in space.groups})
    assert not check_harmless(data)


OUTER = ("dtype", "shape", "data_offsets")


@pytest.mark.parametrize("field", [*OUTER, "all"])
def test_odd_values_in_the_header_of_the_tensors(field):
    from fuzzing import reseal, with_header
    data = written(HEAD, TENSORS)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    for name in TENSORS:
        path = [name] if field == "all" else [name, field]
        for odd in (*ODD, [0, 1 << 62], [1, 0], [2, 4], [0, 3], "F64", "U16", "BF16", "U8 "):
            other = changed(header, path, odd)
            if other != header: assert check_harmless(reseal(with_header(other, data[end:])))
        assert check_harmless(reseal(with_header(removed(header, path), data[end:])))


def test_other_files(tmp_path):
    for name, data in (("none", b""), ("short", b"\1\0"), ("long", (1 << 63).to_bytes(8, "little") + b"{}")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MaskFileError, match=name): read_mask_file(tmp_path / name)
