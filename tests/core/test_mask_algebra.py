"Masks and scores as values: Boolean algebra, packing, files, ranking, kinds; only the last section needs a model."
from __future__ import annotations

import dataclasses
import json
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from subnet_explorer.core.bits import quantile_bins
from subnet_explorer.core.errors import SpaceMismatch, SubnetError, UnknownName
from subnet_explorer.core.layout import FAMILIES, Layout
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.maskfile import MaskFileError, from_gaps, to_gaps
from subnet_explorer.core.masks import Masks
from subnet_explorer.core.scores import Scores, kth, top_k
from subnet_explorer.core.space import Group, ModelId, Space

LAYOUT = Layout("bert", 4, 4, 4, 4, 16, 32, False, (), "embeddings.word_embeddings.weight", 40)
TOY = ModelId("toy", None, "c", "0" * 16)


def space_with(shapes: list[tuple[int, ...]], weights: str = "0" * 16) -> Space:
    "A space of tensors of arbitrary shapes, two per layer."
    groups = tuple(Group(f"g{i}", "weight", i // 2, "qk"[i % 2], s) for i, s in enumerate(shapes))
    return Space(groups, LAYOUT, ModelId("toy", None, "c", weights))


shapes = st.lists(st.lists(st.integers(1, 11), min_size=1, max_size=2).map(tuple), min_size=1, max_size=4)
spaces = shapes.map(space_with)


@st.composite
def masks(draw, n: int = 1):
    "`n` masks of one random space."
    space = draw(spaces)
    return [Mask.of(space, {g.name: draw(hnp.arrays(bool, g.shape)) for g in space.groups}) for _ in range(n)]


@st.composite
def scores(draw):
    "Scores with many ties."
    space = draw(spaces)
    few = st.sampled_from([-1.5, -0.0, 0.0, .25, 2.0])
    return Scores(space, {g.name: draw(hnp.arrays(float, g.shape, elements=few)) for g in space.groups})


def flat(m: Mask) -> np.ndarray: return np.concatenate([b.reshape(-1) for _, b in m.items()])


def no_padding(m: Mask) -> bool:
    "Whether nothing hides behind the last coordinate of any tensor."
    tails = [np.unpackbits(np.frombuffer(p, np.uint8))[g.size:] for p, g in zip(m.packed, m.space.groups, strict=True)]
    return not any(tail.any() for tail in tails)


# ── algebra ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@given(masks(2))
def test_every_operation_is_the_one_of_numpy(ab):
    a, b = ab
    x, y = flat(a), flat(b)
    for found, wanted in ((a & b, x & y), (a | b, x | y), (a ^ b, x ^ y), (a - b, x & ~y), (~a, ~x)):
        assert np.array_equal(flat(found), wanted)
        assert found.count == wanted.sum() and found.space is a.space
        assert no_padding(found)


@given(masks(3))
def test_laws(abc):
    a, b, c = abc
    none, all_ = Mask.full(a.space, False), Mask.full(a.space)
    assert ~(a & b) == ~a | ~b and ~(a | b) == ~a & ~b
    assert a & a == a | a == a and ~~a == a
    assert a & (b | c) == (a & b) | (a & c) and a | (b & c) == (a | b) & (a | c)
    assert a & (a | b) == a and (a ^ b) ^ b == a and a ^ b == (a | b) - (a & b)
    assert a - b == a & ~b and (a - b) & b == none and (a - b) | (a & b) == a
    assert a | ~a == all_ and a & ~a == none


@given(masks(2))
def test_subset_and_counts(ab):
    a, b = ab
    assert (a <= b) == bool((~flat(a) | flat(b)).all())
    assert a & b <= a <= a | b
    assert (a & b).count + (a | b).count == a.count + b.count
    assert a.count + (~a).count == a.space.size
    assert a.density == flat(a).mean() and a.sparsity == pytest.approx(1 - a.density)
    t = a.table()
    assert t.kept.tolist() == [b.sum() for _, b in a.items()] and t["size"].sum() == a.space.size


@given(masks(1), st.data())
def test_identity_is_space_and_bits(ms, data):
    (a,) = ms
    same = Mask.of(a.space, {g.name: b for g, b in a.items()}, method="other", seed=3)
    assert same == a and hash(same) == hash(a) and same.id == a.id and len({a, same}) == 1
    g = data.draw(st.sampled_from(a.space.groups))
    at = data.draw(st.integers(0, g.size - 1))
    bits = {k.name: b for k, b in a.items()}
    bits[g.name].reshape(-1)[at] ^= True
    other = Mask.of(a.space, bits)
    assert other != a and (a ^ other).count == 1
    moved = a.rebase(dataclasses.replace(a.space, model=ModelId("toy", None, "c", "1" * 16)))
    assert moved != a and moved.packed == a.packed
    with pytest.raises(SpaceMismatch, match="different models"): a & moved


def test_a_mask_does_not_change():
    space = space_with([(3, 5)])
    bits = np.ones((3, 5), bool)
    m = Mask.of(space, {"g0": bits})
    bits[:] = False
    assert m.count == 15
    m["g0"][:] = False
    assert m.count == 15 and m["g0"].all()
    with pytest.raises(dataclasses.FrozenInstanceError): m.packed = ()


@pytest.mark.parametrize("bits, says", [
    ({}, "no bits for 'g0'"),
    ({"g0": np.ones(4, bool)}, "shape"),
    ({"g0": np.ones((3, 5), bool), "g1": np.ones(1)}, "unknown tensor"),
])
def test_wrong_bits_are_refused(bits, says):
    with pytest.raises(SubnetError, match=says): Mask.of(space_with([(3, 5)]), bits)


def test_only_masks_of_one_space_combine():
    a, b = (Mask.full(space_with([s])) for s in ((8,), (2, 4)))        # the same bytes, another shape
    assert a.packed == b.packed and a != b
    for op in (lambda: a & b, lambda: a <= b, lambda: a - b):
        with pytest.raises(SpaceMismatch): op()
    with pytest.raises(SubnetError): a & np.ones(8, bool)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────

@given(masks(1))
def test_saved_and_loaded(ms):
    (m,) = ms
    m = dataclasses.replace(m, meta={"method": "test", "seed": 1, "parents": ["x"]})
    with tempfile.TemporaryDirectory() as d:
        again = Mask.load(m.save(Path(d) / "sub" / "m.safetensors"))
        assert [p.name for p in (Path(d) / "sub").iterdir()] == ["m.safetensors"]       # no temporary file stays
    assert again == m and again.packed == m.packed and again.space == m.space
    assert dict(again.meta) == dict(m.meta)


def refused(file: Path) -> bool:
    "Every flip is noticed."
    try: Mask.load(file)
    except MaskFileError: return True
    return False


@given(masks(1), st.data())
def test_a_damaged_file_is_never_another_mask(ms, data):
    (m,) = ms
    with tempfile.TemporaryDirectory() as d:
        file = m.save(Path(d) / "m")
        good = bytearray(file.read_bytes())
        file.write_bytes(good[:data.draw(st.integers(0, len(good) - 1), label="cut")])
        with pytest.raises(MaskFileError): Mask.load(file)
        at = data.draw(st.integers(0, len(good) - 1), label="byte")
        good[at] ^= 1 << data.draw(st.integers(0, 7), label="bit")
        file.write_bytes(good)
        assert refused(file)


@st.composite
def rare(draw):
    "A mask of tensors of any density, most of them large enough to be worth compressing."
    sizes = draw(st.lists(st.sampled_from([1, 9, 800, 4095, 4096, 30_011]), min_size=1, max_size=3))
    space, densities = space_with([(n,) for n in sizes]), [0, 1e-4, .001, .014, .05, .1, .12, .13, .3, .5]
    rng, bits = np.random.default_rng(draw(st.integers(0, 999))), {}
    for g in space.groups:
        bits[g.name] = rng.random(g.shape) < draw(st.sampled_from(densities))
        if draw(st.booleans()): bits[g.name] = ~bits[g.name]
    return Mask.of(space, bits, method="test")


def head_of(file: Path) -> dict:
    from safetensors import safe_open
    with safe_open(str(file), "np") as f: return json.loads(f.metadata()["subnet_explorer"])


@given(rare())
def test_files_of_any_density(m):
    with tempfile.TemporaryDirectory() as d:
        file = m.save(Path(d) / "m")
        again, head = Mask.load(file), head_of(file)
        same = Mask(m.space, tuple(bytes(p) for p in m.packed), m.meta).save(Path(d) / "same")
        assert again == m and again.packed == m.packed and dict(again.meta) == dict(m.meta)
        assert same.read_bytes() == file.read_bytes()
        for g, b in m.items():
            share = min(b.mean(), 1 - b.mean())
            if g.size < 700 or share > .125: assert g.name not in head["gaps"]              # packed bits are no longer
            elif g.size > 4000 and share < .1: assert head["gaps"][g.name] == (b.mean() <= .5)
        assert head["format"] == "subnet_explorer.mask/3"


@given(rare(), st.data())
def test_a_damaged_file_of_gaps_is_never_another_mask(m, data):
    with tempfile.TemporaryDirectory() as d:
        file = m.save(Path(d) / "m")
        good = bytearray(file.read_bytes())
        file.write_bytes(good[:data.draw(st.integers(0, len(good) - 1), label="cut")])
        with pytest.raises(MaskFileError): Mask.load(file)
        bits_from = 8 + int.from_bytes(good[:8], "little")
        last = len(good) - 1
        at = data.draw(st.integers(0, last) | st.integers(min(bits_from, last), last), label="byte")
        good[at] ^= 1 << data.draw(st.integers(0, 7), label="bit")
        file.write_bytes(good)
        assert refused(file)


def test_a_file_without_provenance_is_no_mask_file(tmp_path):
    from safetensors.numpy import save as encode
    m = Mask.random(space_with([(3, 5)]), .5, seed=0)
    head = {"format": "subnet_explorer.mask/1", "id": m.id, "space": m.space.to_json()}
    tensors = {"g0": np.frombuffer(m.packed[0], np.uint8)}
    (tmp_path / "m").write_bytes(encode(tensors, {"subnet_explorer": json.dumps(head)}))
    with pytest.raises(MaskFileError, match="truncated, or no mask file"): Mask.load(tmp_path / "m")


def test_files_of_the_first_format(tmp_path):
    "Sparse tensors were packed bits then, and still are where they are read from such a file."
    from safetensors.numpy import save as encode
    m = Mask.random(space_with([(5000,), (3, 5)]), .01, seed=0)
    head = {"format": "subnet_explorer.mask/1", "library": "0.1.0", "id": m.id, "space": m.space.to_json()}
    head["meta"] = {"seed": 0}
    packed = zip(m.space.by_name, m.packed, strict=True)
    tensors = {name: np.frombuffer(p, np.uint8).copy() for name, p in packed}
    (tmp_path / "old").write_bytes(encode(tensors, {"subnet_explorer": json.dumps(head)}))
    assert Mask.load(tmp_path / "old") == m
    head["format"] = "subnet_explorer.mask/4"
    (tmp_path / "new").write_bytes(encode(tensors, {"subnet_explorer": json.dumps(head)}))
    with pytest.raises(MaskFileError, match="a newer subnet_explorer"): Mask.load(tmp_path / "new")


@pytest.mark.parametrize("content", [b"", b"\0" * 40, None])
def test_gaps_that_are_none(tmp_path, content):
    "No zstd frame, nothing, or a frame that would fill the memory."
    import zstandard
    from safetensors.numpy import save as encode
    m = Mask.random(space_with([(5000,)]), .01, seed=0)
    if content is None: content = zstandard.ZstdCompressor().compress(b"\0" * 10_000_000)
    head = {"format": "subnet_explorer.mask/2", "library": "0.1.0", "id": m.id, "space": m.space.to_json()}
    head |= {"meta": {}, "gaps": {"g0": 1}}
    tensors = {"g0": np.frombuffer(content, np.uint8)}
    (tmp_path / "m").write_bytes(encode(tensors, {"subnet_explorer": json.dumps(head)}))
    with pytest.raises(MaskFileError): Mask.load(tmp_path / "m")


some_gaps = st.sampled_from([0, 1, 2, 253, 254, 255, 256, 509, 510, 511, 100_000])


@given(st.lists(some_gaps, max_size=6), st.integers(0, 600))
def test_gaps(gaps, tail):
    at = np.cumsum(np.array(gaps, int) + 1) - 1
    bits = np.zeros(at[-1] + 1 + tail if gaps else tail, bool)
    bits[at] = True
    code, n = to_gaps(bits), len(bits)
    pieces = np.split(code, [len(code) // 3, len(code) // 2])
    assert from_gaps(pieces, n) == np.packbits(bits).tobytes() and len(code) == sum(g // 255 + 1 for g in gaps)
    if n: assert from_gaps([code], n, rare=0) == np.packbits(~bits).tobytes()
    assert code.tolist() == [b for g in gaps for b in [255] * (g // 255) + [g % 255]]
    if gaps:
        with pytest.raises(ValueError): from_gaps([code], int(at[-1]))
        endless = np.append(code, np.uint8(255))
        with pytest.raises(ValueError): from_gaps([endless], n + 255)


# ── random controls ──────────────────────────────────────────────────────────────────────────────────────────────────

@st.composite
def mixed(draw):
    "A mask of structured kinds and of others, of any number of layers."
    kinds = draw(st.sets(st.sampled_from(["head", "mlp", "layer", "neuron", "bias", "weight"]), min_size=1))
    sizes = {"head": (4,), "mlp": (1,), "layer": (1,), "neuron": (7,), "bias": (5,), "weight": (3, 4)}
    layers = range(draw(st.integers(1, 5)))
    space = Space(tuple(Group(f"layer.{i}.{k}", k, i, k, sizes[k]) for i in layers for k in sorted(kinds)), LAYOUT, TOY)
    return Mask.of(space, {g.name: draw(hnp.arrays(bool, g.shape)) for g in space.groups})


@given(mixed(), st.integers(0, 2**32))
def test_random_like_keeps_as_many_heads_mlps_and_layers_and_as_many_of_all_else_in_every_tensor(m, seed):
    def kept(x):
        t = x.table()
        return t.groupby(t.kind.where(t.kind.isin(["head", "mlp", "layer"]), t.name)).kept.sum().to_dict()
    r = m.random_like(seed)
    assert kept(m) == kept(r) and r.space is m.space and r == m.random_like(seed)


@pytest.mark.parametrize("kind", ["head", "mlp", "layer", "head+mlp"])
def test_random_masks_of_units_are_not_the_mask_itself(kind):
    """One coordinate a tensor leaves no choice within tensors: units are drawn over all layers.

    Each is drawn equally often, and as many as by `random_matched`."""
    from subnet_explorer.search.prune import random_matched
    sizes = {"head": 4, "mlp": 1, "layer": 1}
    kinds = kind.split("+")
    space = Space(tuple(Group(f"layer.{i}.{k}", k, i, k, (sizes[k],)) for i in range(8) for k in kinds), LAYOUT, TOY)
    m = Mask.of(space, {g.name: np.full(g.shape, g.layer < 3) for g in space.groups})
    drawn = [m.random_like(s) for s in range(300)]
    share = sum(flat(d).astype(float) for d in drawn) / len(drawn)
    assert (np.abs(share - 3 / 8) < 5 * np.sqrt(3 / 8 * 5 / 8 / 300)).all() and len(set(drawn)) > 40
    def by_kind(x): return x.table().groupby("kind").kept.sum().to_dict()
    assert all(by_kind(d) == by_kind(m) == by_kind(random_matched(m, [], s)) for s, d in enumerate(drawn[:20]))


@given(masks(1), st.integers(0, 2**32))
def test_random_like_keeps_as_many_in_every_tensor(ms, seed):
    (m,) = ms
    r = m.random_like(seed)
    assert r.table().kept.tolist() == m.table().kept.tolist()
    assert r == m.random_like(seed) and r.meta["seed"] == seed and r.meta["parents"] == [m.id]


@given(spaces, st.floats(0, 1), st.integers(0, 99))
def test_random_density(space, density, seed):
    kept = [b.sum() for _, b in Mask.random(space, density, seed).items()]
    assert kept == [round(density * g.size) for g in space.groups]


def test_random_like_is_uniform():
    m = Mask.of(space_with([(13,), (10,)]), {"g0": np.arange(13) < 4, "g1": np.arange(10) < 9})
    n = 600
    share = sum(flat(m.random_like(s)).astype(float) for s in range(n)) / n
    p = np.repeat([4 / 13, .9], [13, 10])
    assert (np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / n)).all()
    assert len({m.random_like(s) for s in range(20)}) > 15


@given(scores(), st.data(), st.integers(1, 6), st.integers(0, 99))
def test_random_masks_within_strata(s, data, bins, seed):
    "As many in every tensor and quantile bin, computed here with sorted lists; equal scores share a bin."
    m = Mask.of(s.space, {g.name: data.draw(hnp.arrays(bool, g.shape)) for g in s.space.groups})
    r = m.random_like(seed, strata=s, bins=bins)
    assert r == m.random_like(seed, strata=s, bins=bins)
    assert r.table().kept.tolist() == m.table().kept.tolist()
    for g in s.space.groups:
        values = s[g.name].reshape(-1).tolist()
        edges = [sorted(values)[len(values) * i // bins] for i in range(1, bins)]
        bin_of = np.array([sum(v >= e for e in edges) for v in values])
        assert np.array_equal(bin_of, quantile_bins(s[g.name].reshape(-1), bins))
        drawn, kept = r[g.name].reshape(-1), m[g.name].reshape(-1)
        for b in set(bin_of): assert (drawn & (bin_of == b)).sum() == (kept & (bin_of == b)).sum()


def test_random_masks_within_strata_are_uniform():
    space = space_with([(40,)])
    s = Scores(space, {"g0": np.arange(40.0)[::-1]})
    m = Mask.of(space, {"g0": np.isin(np.arange(40), [0, 1, 2, 11, 30])})
    n = 800
    share = sum(flat(m.random_like(i, strata=s, bins=4)).astype(float) for i in range(n)) / n
    p = np.repeat([.3, .1, 0, .1], 10)
    assert (np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / n)).all()


def test_strata_of_units_span_all_layers():
    "Heads are few: they are matched over the whole model, in strata too."
    space = Space(tuple(Group(f"layer.{i}.head", "head", i, "head", (4,)) for i in range(6)), LAYOUT, TOY)
    s = Scores(space, {g.name: np.arange(4.0) + 4 * g.layer for g in space.groups})
    # one head in the lower half of scores, one in the upper
    m = Mask.of(space, {g.name: np.arange(4) < (g.layer in (0, 5)) for g in space.groups})
    drawn = [flat(m.random_like(i, strata=s, bins=2)) for i in range(60)]
    assert all(d[:12].sum() == d[12:].sum() == 1 for d in drawn) and len({d.tobytes() for d in drawn}) > 20
    with pytest.raises(SpaceMismatch): Mask.full(space_with([(3,)])).random_like(0, strata=s)


@given(masks(1), st.floats(0, 1), st.integers(0, 99))
def test_resized_is_exact_and_nested(ms, density, seed):
    (m,) = ms
    r = m.resized(density, seed)
    assert r.count == round(density * m.space.size) and (r <= m if r.count <= m.count else m <= r)
    assert r == m.resized(density, seed) and r.meta["parents"] == [m.id] and m.resized(m.density, seed) == m
    assert no_padding(r)


@pytest.mark.parametrize("density", [.1, .8])
def test_resized_is_uniform_over_all_tensors(density):
    bits = {"g0": np.arange(13) < 4, "g1": np.arange(10).reshape(2, 5) < 5, "g2": np.ones(1, bool)}
    m = Mask.of(space_with([(13,), (2, 5), (1,)]), bits)
    n, kept = 800, flat(m)
    share = sum(flat(m.resized(density, s)).astype(float) for s in range(n)) / n
    k = round(density * 24)
    p = np.where(kept, min(1, k / 10), max(0, k - 10) / 14)
    assert (np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / n)).all()


# ── ranking ──────────────────────────────────────────────────────────────────────────────────────────────────────────

POOLS = {"global": lambda g: 0, "layer": lambda g: g.layer, "tensor": lambda g: g.name}


def by_hand(s: Scores, scope: str, counts, sign: int) -> dict[str, np.ndarray]:
    "Sort all coordinates of a pool by (score, position) and take the first."
    key = POOLS[scope]
    out = {g.name: np.zeros(g.size, bool) for g in s.space.groups}
    for pool in dict.fromkeys(map(key, s.space.groups)):
        inside = [g for g in s.space.groups if key(g) == pool]
        all_ = [(sign * v, g.name, i) for g in inside for i, v in enumerate(s[g.name].reshape(-1))]
        order = sorted(range(len(all_)), key=lambda j: (-all_[j][0], j))
        for j in order[:counts(pool, len(all_))]: out[all_[j][1]][all_[j][2]] = True
    return {g.name: out[g.name].reshape(g.shape) for g in s.space.groups}


@given(scores(), st.floats(0, 1), st.sampled_from(["global", "layer", "tensor"]))
def test_top_is_a_plain_sort(s, density, scope):
    assert s.top(density, scope) == Mask.of(s.space, by_hand(s, scope, lambda _, n: round(density * n), +1))


@given(scores(), st.floats(0, 1), st.integers(0, 9), st.sampled_from(["global", "layer", "tensor"]))
def test_bottom_is_a_plain_sort_of_the_same_size(s, density, seed, scope):
    like = Mask.random(s.space, density, seed)
    def kept(pool, _): return sum(b.sum() for g, b in like.items() if POOLS[scope](g) == pool)
    found = s.bottom(like, scope)
    assert found == Mask.of(s.space, by_hand(s, scope, kept, -1)) and found.count == like.count
    assert s.top(like=like, scope=scope) == Mask.of(s.space, by_hand(s, scope, kept, +1))


def test_top_is_told_once_how_many():
    s = Scores(space_with([(4,)]), {"g0": np.arange(4.0)})
    for arguments in ({}, {"density": .5, "like": Mask.full(s.space)}):
        with pytest.raises(SubnetError, match="one of density and like"): s.top(**arguments)
    with pytest.raises(SpaceMismatch): s.top(like=Mask.full(space_with([(5,)])))


@given(scores(), st.floats(0, 1), st.floats(0, 1), st.sampled_from([-1.5, 0.0, .2, 2.0]))
def test_more_density_only_adds(s, d1, d2, threshold):
    assert s.top(min(d1, d2)) <= s.top(max(d1, d2))
    above = np.concatenate([v.reshape(-1) > threshold for v in s.values.values()])
    assert np.array_equal(flat(s.above(threshold)), above)


special = [float(np.float32(v)) for v in (-0.0, 0.0, 1.0, -1.0, 1e-40, -1e-40, 3e38)]
narrow = st.sampled_from(special) | st.floats(-1, 1, width=32)
values = {
    np.float64: narrow | st.sampled_from([5e-324, -1e-310, 1e300]) | st.floats(-1, 1),
    np.float32: narrow,
    np.float16: st.floats(-8, 8, width=16),
    np.int64: st.integers(-4, 4),
}
some_values = st.sampled_from([*values]).flatmap(lambda t: hnp.arrays(t, st.integers(1, 120), elements=values[t]))


@given(some_values, st.integers(1, 5), st.data())
def test_the_kth_value_is_that_of_a_sort(flat, sample, data):
    "With samples so small that the bracket misses, meets ties, or is everything."
    cuts = sorted(data.draw(st.lists(st.integers(0, len(flat)), max_size=2)))
    for k in {1, len(flat), data.draw(st.integers(1, len(flat)))}:
        assert kth(np.split(flat, cuts), k, sample) == kth([flat], k) == np.sort(flat)[len(flat) - k]


LARGE = {                       # values made of normal ones
    "normal": lambda x, rng: x,
    "zeros": lambda x, rng: np.where(rng.random(len(x)) < .9, np.float32(0) * np.sign(x), x),
    "shares": lambda x, rng: np.round(x) / 5,
    "sorted": lambda x, rng: np.sort(x),
    "rows": lambda x, rng: np.tile(x[:1000], 601)[:len(x)],
    "equal": lambda x, rng: np.full(len(x), np.float32(.3)),
    "denormal": lambda x, rng: x * np.float32(1e-42),
    "float64": lambda x, rng: x + rng.random(len(x)) * 1e-12,
    "mixed": lambda x, rng: x,
}


@pytest.mark.parametrize("kind", LARGE)
def test_large_scores(kind):
    "Above the size from which the cut is bracketed: the cut, and which of equal values are kept."
    rng, n = np.random.default_rng(0), 600_011
    x = LARGE[kind](rng.standard_normal(n, dtype=np.float32), rng)
    space = space_with([(n - 20,), (20,)])
    parts = [x[:n - 20], x[n - 20:].astype(np.float64) + 1e-9 if kind == "mixed" else x[n - 20:]]
    s = Scores(space, {"g0": parts[0], "g1": parts[1]})
    flat_ = np.concatenate(parts)
    for sign, pick in ((1, s.top), (-1, lambda d: s.bottom(Mask.random(space, d, 0)))):
        order = np.argsort(-sign * flat_, kind="stable")
        for density in (1e-5, .3, .5, .9, 1.0):
            found = pick(density)
            wanted = np.zeros(n, bool)
            wanted[order[:found.count]] = True
            assert found.count in (round(density * n), sum(round(density * g.size) for g in space.groups))
            assert np.array_equal(flat(found), wanted)
    assert np.array_equal(top_k(flat_, 1000), np.isin(np.arange(n), np.argsort(-flat_, kind="stable")[:1000]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_must_be_finite(bad):
    with pytest.raises(SubnetError, match="not all finite"): Scores(space_with([(3,)]), {"g0": np.array([0, bad, 1])})


@pytest.mark.parametrize("density, says", [
    (50, r"did you mean 0\.5"),
    (-.1, "between 0 and 1"),
    (float("nan"), "between 0 and 1"),
])
def test_densities_are_fractions(density, says):
    space = space_with([(3,)])
    with pytest.raises(SubnetError, match=says): Scores(space, {"g0": np.zeros(3)}).top(density)
    with pytest.raises(SubnetError, match=says): Mask.random(space, density, 0)


# ── collections ──────────────────────────────────────────────────────────────────────────────────────────────────────

@given(masks(4))
def test_reductions(ms):
    many = Masks([({"task": "AB"[i // 2], "seed": i % 2}, m) for i, m in enumerate(ms)])
    stack = np.stack([flat(m) for m in ms])
    assert np.array_equal(flat(many.union()), stack.any(0)) and np.array_equal(flat(many.intersection()), stack.all(0))
    survival = many.survival()
    assert np.allclose(np.concatenate([v.reshape(-1) for v in survival.values.values()]), stack.mean(0))
    assert many.intersection(by="task").by("task")["B"] == ms[2] & ms[3]
    assert [labels for labels, _ in many.sel(task="A", seed=[1])] == [{"task": "A", "seed": 1}]


@given(masks(5), st.integers(1, 5), st.data())
def test_majority_counts_votes(ms, n, data):
    ms = ms[:n]
    found = Masks([({"seed": i}, m) for i, m in enumerate(ms)])
    share = data.draw(st.sampled_from([1e-9, 1 / 3, .4, .5, .6, 2 / 3, .9, 1]) | st.floats(1e-6, 1))
    votes = sum(flat(m).astype(int) for m in ms)
    r = found.majority(share)
    assert np.array_equal(flat(r), votes >= max(1, share * n - 1e-9))
    assert no_padding(r)
    assert found.majority(1) == found.intersection() and found.majority(1 / n) == found.union()


@pytest.mark.parametrize("share", [0, -.5, 1.01])
def test_a_majority_of_none_is_refused(share):
    one = Masks([({}, Mask.full(space_with([(3,)])))])
    with pytest.raises(SubnetError, match=r"above 0 and at most 1"): one.majority(share)
    with pytest.raises(SubnetError, match="no mask to take"): Masks([]).majority()


def test_a_wrong_number_is_an_unknown_name_too():
    m = Mask.full(space_with([(3,)]))
    many = Masks([({"seed": s}, m) for s in (0, 1, 2)])
    with pytest.raises(UnknownName, match="did you mean"): many.sel(seed=10)       # "1" and "0" are near


# ── kinds ────────────────────────────────────────────────────────────────────────────────────────────────────────────

@cache
def tiny_space(family: str, kind: str) -> Space:
    from subnet_explorer.model.load import tiny
    return Space.of(tiny(family), kind)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["head", "neuron", "mlp", "layer", "head+mlp", "head+neuron"])
def test_coarse_to_fine_and_back(family, kind):
    space = tiny_space(family, kind)
    for seed in range(4):
        m = Mask.random(space, .5, seed) if seed else Mask.full(space, False)
        for how, keep in (("minimal", "any"), ("minimal", "all"), ("minimal", .7), ("full", "all")):
            fine = m.to("weight", how=how)
            assert fine.to(kind, keep=keep) == m, (how, keep, seed)
            assert all(g.kind in ("weight", "bias") for g in fine.space.groups)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_to_weights_and_back(family):
    from subnet_explorer.model.load import tiny
    model = tiny(family)
    for block in ((16, 1), (3, 5)):                                    # 3 × 5 sticks out at the edges
        m = Mask.random(Space.of(model, "block", block=block), .5, seed=1)
        fine = m.to("weight")
        assert fine.space == Space.of(model, "weight")
        for g, bits in m.items():
            assert np.array_equal(fine[g.name][::block[0], ::block[1]], bits)
            rows, columns = fine[g.name].shape
            assert np.array_equal(fine[g.name], np.kron(bits, np.ones(block, bool))[:rows, :columns])


@pytest.mark.parametrize("value", [.3, -1, np.nan, 1e-9, 2, np.inf, "1"])
def test_only_zeros_and_ones_are_a_mask(value):
    space = space_with([(4,)])
    odd = np.array([1, 0, 1, 0]).astype(type(value))
    odd[3] = value
    with pytest.raises(SubnetError, match=r"zeros and ones.*Scores\(space"): Mask.of(space, {"g0": odd})
    for right in (np.array([1., 0, 1, 0]), [True, False, True, False], np.array([1, 0, 1, 0], np.uint8)):
        assert Mask.of(space, {"g0": right}).count == 2
