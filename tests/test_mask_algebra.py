"Masks and scores as values: Boolean algebra, packing, files, ranking, kinds. Nothing here but the last section needs a model."
from __future__ import annotations

import dataclasses
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from subnet_explorer.mask import Mask, MaskFileError, Scores
from subnet_explorer.masks import Masks
from subnet_explorer.space import FAMILIES, Group, Layout, ModelId, Space, SpaceMismatch, SubnetError, UnknownName

LAYOUT = Layout("bert", 4, 4, 4, 4, 16, 32, False, (), "embeddings.word_embeddings.weight", 40)


def space_with(shapes: list[tuple[int, ...]], weights: str = "0" * 16) -> Space:
    "A space of tensors of arbitrary shapes, two per layer."
    return Space(tuple(Group(f"g{i}", "weight", i // 2, "qk"[i % 2], s) for i, s in enumerate(shapes)), LAYOUT, ModelId("toy", None, "c", weights))


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
    return Scores(space, {g.name: draw(hnp.arrays(float, g.shape, elements=st.sampled_from([-1.5, -0.0, 0.0, .25, 2.0]))) for g in space.groups})


def flat(m: Mask) -> np.ndarray: return np.concatenate([b.reshape(-1) for _, b in m.items()])


# ── algebra ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@given(masks(2))
def test_every_operation_is_the_one_of_numpy(ab):
    a, b = ab
    for found, wanted in ((a & b, flat(a) & flat(b)), (a | b, flat(a) | flat(b)), (a ^ b, flat(a) ^ flat(b)), (a - b, flat(a) & ~flat(b)), (~a, ~flat(a))):
        assert np.array_equal(flat(found), wanted)
        assert found.count == wanted.sum() and found.space is a.space
        for g, packed in zip(found.space.groups, found.packed):        # nothing may hide in the padding
            assert not np.unpackbits(np.frombuffer(packed, np.uint8))[g.size:].any()


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
    same = Mask.of(a.space, dict((g.name, b) for g, b in a.items()), method="other", seed=3)
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


@pytest.mark.parametrize("bits, says", [({}, "no bits for 'g0'"), ({"g0": np.ones(4, bool)}, "shape"), ({"g0": np.ones((3, 5), bool), "g1": np.ones(1)}, "unknown tensor")])
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
    assert again == m and again.packed == m.packed and again.space == m.space and dict(again.meta) == dict(m.meta)


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
        try: assert Mask.load(file) == m                               # a flip in the provenance does no harm
        except MaskFileError: pass


# ── random controls ──────────────────────────────────────────────────────────────────────────────────────────────────

@given(masks(1), st.integers(0, 2**32))
def test_random_like_keeps_as_many_in_every_tensor(ms, seed):
    (m,) = ms
    r = m.random_like(seed)
    assert r.table().kept.tolist() == m.table().kept.tolist()
    assert r == m.random_like(seed) and r.meta["seed"] == seed and r.meta["parents"] == [m.id]


@given(spaces, st.floats(0, 1), st.integers(0, 99))
def test_random_density(space, density, seed):
    assert [b.sum() for _, b in Mask.random(space, density, seed).items()] == [round(density * g.size) for g in space.groups]


def test_random_like_is_uniform():
    m = Mask.of(space_with([(13,), (10,)]), {"g0": np.arange(13) < 4, "g1": np.arange(10) < 9})
    n = 600
    share = sum(flat(m.random_like(s)).astype(float) for s in range(n)) / n
    p = np.repeat([4 / 13, .9], [13, 10])
    assert (np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / n)).all()
    assert len({m.random_like(s) for s in range(20)}) > 15


# ── ranking ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def by_hand(s: Scores, scope: str, counts, sign: int) -> dict[str, np.ndarray]:
    "Sort all coordinates of a pool by (score, position) and take the first."
    key = {"global": lambda g: 0, "layer": lambda g: g.layer, "tensor": lambda g: g.name}[scope]
    out = {g.name: np.zeros(g.size, bool) for g in s.space.groups}
    for pool in dict.fromkeys(map(key, s.space.groups)):
        all_ = [(sign * v, g.name, i) for g in s.space.groups if key(g) == pool for i, v in enumerate(s[g.name].reshape(-1))]
        order = sorted(range(len(all_)), key=lambda j: (-all_[j][0], j))
        for j in order[:counts(pool, len(all_))]: out[all_[j][1]][all_[j][2]] = True
    return {g.name: out[g.name].reshape(g.shape) for g in s.space.groups}


@given(scores(), st.floats(0, 1), st.sampled_from(["global", "layer", "tensor"]))
def test_top_is_a_plain_sort(s, density, scope):
    assert s.top(density, scope) == Mask.of(s.space, by_hand(s, scope, lambda _, n: round(density * n), +1))


@given(scores(), st.floats(0, 1), st.integers(0, 9), st.sampled_from(["global", "layer", "tensor"]))
def test_bottom_is_a_plain_sort_of_the_same_size(s, density, seed, scope):
    like = Mask.random(s.space, density, seed)
    key = {"global": lambda g: 0, "layer": lambda g: g.layer, "tensor": lambda g: g.name}[scope]
    kept = lambda pool, _: sum(b.sum() for g, b in like.items() if key(g) == pool)
    found = s.bottom(like, scope)
    assert found == Mask.of(s.space, by_hand(s, scope, kept, -1)) and found.count == like.count


@given(scores(), st.floats(0, 1), st.floats(0, 1), st.sampled_from([-1.5, 0.0, .2, 2.0]))
def test_more_density_only_adds(s, d1, d2, threshold):
    assert s.top(min(d1, d2)) <= s.top(max(d1, d2))
    assert np.array_equal(flat(s.above(threshold)), np.concatenate([v.reshape(-1) > threshold for v in s.values.values()]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_must_be_finite(bad):
    with pytest.raises(SubnetError, match="not all finite"): Scores(space_with([(3,)]), {"g0": np.array([0, bad, 1])})


@pytest.mark.parametrize("density, says", [(50, "did you mean 0.5"), (-.1, "between 0 and 1"), (float("nan"), "between 0 and 1")])
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


def test_a_wrong_number_is_an_unknown_name_too():
    m = Mask.full(space_with([(3,)]))
    many = Masks([({"seed": s}, m) for s in (0, 1, 2)])
    with pytest.raises(UnknownName, match="did you mean"): many.sel(seed=10)       # "1" and "0" are near


# ── kinds ────────────────────────────────────────────────────────────────────────────────────────────────────────────

@cache
def tiny_space(family: str, kind: str) -> Space:
    from subnet_explorer.pocket import tiny
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
    from subnet_explorer.pocket import tiny
    model = tiny(family)
    for block in ((16, 1), (3, 5)):                                    # 3 × 5 sticks out at the edges
        m = Mask.random(Space.of(model, "block", block=block), .5, seed=1)
        fine = m.to("weight")
        assert fine.space == Space.of(model, "weight")
        for g, bits in m.items():
            assert np.array_equal(fine[g.name][::block[0], ::block[1]], bits)
            assert np.array_equal(fine[g.name], np.kron(bits, np.ones(block, bool))[:fine[g.name].shape[0], :fine[g.name].shape[1]])
