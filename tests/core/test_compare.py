"Overlap of masks: scikit-learn's and scipy's numbers, the value expected by chance, and the axioms of a distance."
from __future__ import annotations

import tracemalloc

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from scipy import stats
from scipy.spatial.distance import jaccard as scipy_jaccard
from sklearn.metrics import jaccard_score
from toys import LAYOUT, MODEL

from subnet_explorer.core import compare
from subnet_explorer.core.compare import jaccard, jaccard_chance, jaccard_distance
from subnet_explorer.core.errors import SpaceMismatch, SubnetError, UnknownName
from subnet_explorer.core.intervals import student_interval
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.masks import Masks, overlaps, survival, votes
from subnet_explorer.core.space import Group, ModelId, Space, unit_space

TENSORS = Group("a", "weight", 0, "q", (7, 3)), Group("b", "weight", 1, "q", (10,)), Group("c", "head", 1, "head", (1,))
SPACE = Space(TENSORS, LAYOUT, MODEL)                                           # no multiple of eight
LARGE = Space((Group("a", "weight", 0, "q", (40, 50)), Group("b", "weight", 1, "q", (900,))), LAYOUT, MODEL)
OTHER = Space(SPACE.groups, LAYOUT, ModelId("toy", None, "c", "other weights"))

average = pytest.mark.parametrize("average", ["micro", "macro"])


def bits(mask: Mask) -> np.ndarray: return np.concatenate([b.ravel() for _, b in mask.items()])


@st.composite
def masks(draw):
    "A mask of SPACE, often with empty or full tensors."
    def some(n): return st.sampled_from([[0] * n, [1] * n]) | st.lists(st.integers(0, 1), min_size=n, max_size=n)
    return Mask.of(SPACE, {g.name: np.array(draw(some(g.size)), bool).reshape(g.shape) for g in SPACE.groups})


# ── against other people's code ──────────────────────────────────────────────────────────────────────────────────────

@given(masks(), masks())
def test_micro_is_the_distance_over_all_bits(a, b):
    assert jaccard_distance(a, b) == pytest.approx(scipy_jaccard(bits(a), bits(b)))
    assert jaccard_distance(a, b) == pytest.approx(1 - jaccard_score(bits(a), bits(b), zero_division=1.0))


@given(masks(), masks())
def test_macro_is_the_mean_over_tensors(a, b):
    pairs = [(a[g.name].ravel(), b[g.name].ravel()) for g in SPACE.groups]
    expected = np.mean([1 - jaccard_score(x, y, zero_division=1.0) for x, y in pairs])
    assert jaccard_distance(a, b, "macro") == pytest.approx(expected)


@average
@pytest.mark.parametrize("p, q", [(.5, .5), (.1, .6), (.02, .03)])
def test_chance_is_what_random_masks_give(average, p, q):
    one, other = np.random.default_rng(0).random((40, 50)) < p, np.random.default_rng(1).random(900) < q
    a, b = Mask.of(LARGE, {"a": one, "b": other}), Mask.random(LARGE, q, seed=1)
    simulated = np.mean([jaccard_distance(a.random_like(i), b.random_like(1000 + i), average) for i in range(60)])
    assert jaccard_chance(a, b, average) == pytest.approx(simulated, abs=.004)


@pytest.mark.parametrize("p, q", [(.014, .014), (.05, .05), (.014, .3), (.5, .5)])
def test_chance_overlap_of_two_seeds_in_closed_form(p, q):
    """One minus the distance is the overlap |A & B| / |A | B|.

    By chance it is d / (2 - d) at one density d, and pq / (p + q - pq) at two."""
    tensors = Group("a", "weight", 0, "q", (1000, 300)), Group("b", "weight", 1, "q", (100_000,))
    space = Space(tensors, LAYOUT, MODEL)
    pair = Masks([({"seed": i}, Mask.random(space, d, i)) for i, d in enumerate((p, q))])
    t = jaccard(pair, by="seed").query("a != b").iloc[0]
    assert 1 - t.chance == pytest.approx(p * q / (p + q - p * q), rel=1e-4)
    assert 1 - t.distance == pytest.approx(1 - t.chance, rel=.15)
    if p == q: assert 1 - t.chance == pytest.approx(p / (2 - p), rel=1e-4)


# ── degenerate cases ─────────────────────────────────────────────────────────────────────────────────────────────────

@average
@pytest.mark.parametrize("measure", [jaccard_distance, jaccard_chance])
def test_empty_and_full_masks(average, measure):
    empty, full = Mask.full(SPACE, False), Mask.full(SPACE)
    same, apart = [(empty, empty), (full, full)], [(empty, full), (full, empty)]
    assert [measure(a, b, average) for a, b in same + apart] == pytest.approx([0, 0, 1, 1], abs=1e-12)


@average
def test_identical_and_opposite_masks(average):
    a = Mask.random(LARGE, .3, seed=0)
    assert jaccard_distance(a, a, average) == 0 and jaccard_distance(a, ~a, average) == 1
    assert 0 < jaccard_chance(a, a, average) < 1
    half = Mask.of(SPACE, {"a": np.zeros((7, 3), bool), "b": np.ones(10, bool), "c": np.zeros(1, bool)})
    expected = {"micro": 22 / 32, "macro": 2 / 3}[average]           # tensors that are empty on one side only
    assert jaccard_distance(half, Mask.full(SPACE), average) == pytest.approx(expected)


def test_masks_of_other_spaces_and_unknown_averages():
    a = Mask.full(SPACE)
    for other, what in ((OTHER, "models"), (LARGE, "spaces")):
        says = f"cannot compare masks of different {what}"
        with pytest.raises(SpaceMismatch, match=says): jaccard_distance(a, Mask.full(other))
    with pytest.raises(SpaceMismatch): jaccard_chance(a, Mask.full(OTHER))
    with pytest.raises(UnknownName, match="micro"): jaccard_distance(a, a, "mirco")


# ── the axioms ───────────────────────────────────────────────────────────────────────────────────────────────────────

@average
@given(a=masks(), b=masks(), c=masks())
def test_it_is_a_distance(average, a, b, c):
    def d(x, y): return jaccard_distance(x, y, average)
    assert d(a, b) == d(b, a) and 0 <= d(a, b) <= 1 and (d(a, b) == 0) == (a == b)
    assert d(a, c) <= d(a, b) + d(b, c) + 1e-12


@average
@given(a=masks(), b=masks())
def test_chance_is_symmetric_and_bounded(average, a, b):
    chance = jaccard_chance(a, b, average)
    assert chance == pytest.approx(jaccard_chance(b, a, average)) and -1e-12 <= chance <= 1 + 1e-12


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────

@average
def test_the_table_of_single_masks(average):
    ms = {n: Mask.random(SPACE, d, seed=i) for i, (n, d) in enumerate([("z", .2), ("a", .5), ("m", .9)])}
    t = jaccard(Masks([({"task": n}, m) for n, m in ms.items()]), by="task", average=average)
    in_order = [(x, y) for x in ms for y in ms]                                     # of the collection
    assert list(zip(t.a, t.b, strict=True)) == in_order
    assert t.distance.tolist() == [jaccard_distance(ms[x], ms[y], average) for x in ms for y in ms]
    assert t.chance.tolist() == pytest.approx([jaccard_chance(ms[x], ms[y], average) for x in ms for y in ms])


def test_seeds_are_averaged_and_never_compared_with_themselves():
    ms = {(n, s): Mask.random(SPACE, .5, seed=10 * i + s) for i, n in enumerate("xy") for s in range(3)}
    many = Masks([({"task": n, "seed": s}, m) for (n, s), m in ms.items()])
    t = jaccard(many, by="task").set_index(["a", "b"]).distance
    for x in "xy":
        for y in "xy":
            pairs = [(s, r) for s in range(3) for r in range(3) if x != y or s != r]
            assert t[x, y] == pytest.approx(np.mean([jaccard_distance(ms[x, s], ms[y, r]) for s, r in pairs]))
    assert t["x", "x"] > 0
    with pytest.raises(UnknownName, match="did you mean task"): jaccard(many, by="tsk")


# ── counts from packed bits ──────────────────────────────────────────────────────────────────────────────────────────

@st.composite
def collections(draw):
    "Several masks of one space whose tensors are smaller and larger than a word and a block."
    sizes = draw(st.lists(st.sampled_from([1, 7, 8, 63, 64, 65, 200, 5000]), min_size=1, max_size=3))
    space = Space(tuple(Group(f"g{i}", "weight", i, "q", (n,)) for i, n in enumerate(sizes)), LAYOUT, MODEL)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    density = draw(st.sampled_from([0, .01, .5, 1]))
    def some(): return Mask.of(space, {g.name: rng.random(g.shape) < density for g in space.groups})
    return Masks([({"seed": s}, some()) for s in range(draw(st.integers(1, 20)))])


@given(collections())
def test_counts_are_those_of_unpacked_bits(many):
    both, histogram, share = overlaps(many), votes(many), survival(many)
    for t, g in enumerate(many[0].space.groups):
        stack = np.stack([m[g.name] for _, m in many])
        assert np.array_equal(both[:, :, t], stack.astype(int) @ stack.T)
        assert np.array_equal(histogram[t], np.bincount(stack.sum(0), minlength=len(many) + 1))
        assert np.array_equal(share[g.name], stack.sum(0) / len(many))


@pytest.mark.parametrize("n", [2, 3, 255, 256, 300])
def test_many_masks_and_many_blocks(n):
    size = 70_001 if n > 3 else 64 * (1 << 16) + 9000                         # more than a block of votes; of overlaps
    space, rng = Space((Group("g", "weight", 0, "q", (size,)),), LAYOUT, MODEL), np.random.default_rng(0)
    stack = np.stack([np.append(rng.random(size - 1) < .5, True) for _ in range(n)])
    many = Masks([({"seed": s}, Mask.of(space, {"g": row})) for s, row in enumerate(stack)])
    total = stack.sum(0)
    assert np.array_equal(votes(many)[0], np.bincount(total, minlength=n + 1))
    assert np.array_equal(survival(many)["g"], total / n)
    if n < 10: assert np.array_equal(overlaps(many)[:, :, 0], [[(a & b).sum() for a in stack] for b in stack])


def test_counting_leaves_masks_packed(tmp_path):
    "Nothing but the packed bits of masks stays in memory, and files are read on first use."
    space = Space((Group("g", "weight", 0, "q", (1000, 8000)),), LAYOUT, MODEL)
    files = [Mask.random(space, .5, s).save(tmp_path / f"{s}.mask") for s in range(4)]
    tracemalloc.start()
    many = Masks([({"seed": s}, f) for s, f in enumerate(files)])
    assert tracemalloc.get_traced_memory()[0] < 1e5
    overlaps(many)
    votes(many)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 4.2e6 and most < 8e6                                          # four masks of 1 MB; unpacked 32 MB
    with pytest.raises(SubnetError, match="no mask to compare"): overlaps(Masks([]))


# ── all pairs at once ────────────────────────────────────────────────────────────────────────────────────────────────

def one_by_one(many: Masks, by: str, average: str) -> pd.DataFrame:
    "The table of all pairs as it was once made: a pair after the other, in Python."
    names, both, masks = many.index[by].tolist(), overlaps(many).astype(float), [m for _, m in many]
    kept, order, n = np.einsum("iit->it", both), list(dict.fromkeys(names)), range(len(names))

    def distance(both, either):
        if average == "micro": both, either = both.sum(keepdims=True), either.sum(keepdims=True)
        return float(1 - np.mean(np.divide(both, either, out=np.ones_like(both), where=either > 0)))

    def row(i, j):
        return dict(a=names[i], b=names[j], distance=distance(both[i, j], kept[i] + kept[j] - both[i, j]),
                    chance=jaccard_chance(masks[i], masks[j], average),
                    empty=float(not kept[i].any() and not kept[j].any()))

    pairs = pd.DataFrame([row(i, j) for i in n for j in n if i != j or len(order) == len(names)])
    out = pairs.groupby(["a", "b"], sort=False).mean().reset_index()
    return out.sort_values(["a", "b"], key=lambda names: names.map(order.index), ignore_index=True)


def unlike(space: Space, n: int, seed: int) -> list[Mask]:
    "Masks of any density, some of them empty or full."
    rng, found = np.random.default_rng(seed), [Mask.full(space, False), Mask.full(space, False), Mask.full(space)]
    for density in rng.random(n - 3):
        found.append(Mask.of(space, {g.name: rng.random(g.shape) < density for g in space.groups}))
    return [found[i] for i in rng.permutation(n)]


WIDE = tuple(Group(f"w{i}", "weight", i, "q", (5000 + 7 * i,)) for i in range(3))
LONG = (Group("l", "weight", 0, "q", (64 * (1 << 17) + 9,)), Group("s", "weight", 0, "k", (3,)))
MANY = tuple(Group(f"t{i}", "weight", i, "q", (i + 1,)) for i in range(140))      # more than are summed in one go


@average
@pytest.mark.parametrize("name", ["unique", "seeds", "numbers"])
@pytest.mark.parametrize("groups, n", [(unit_space(12, 12, mlps=True).groups, 40), (TENSORS, 5), (WIDE, 12),
                                       (LONG, 4), (MANY, 5)], ids=["units", "small", "wide", "long", "many"])
def test_all_pairs_are_those_of_one_after_the_other(average, name, groups, n):
    "With empty masks, several seeds, and names of any kind."
    labels = {"unique": [f"t{i}" for i in range(n)], "seeds": ["zab"[i % 3] for i in range(n)],
              "numbers": [i % 4 for i in range(n)]}[name]
    ms = unlike(Space(groups, LAYOUT, MODEL), n, seed=n)
    many = Masks([({"task": label}, m) for label, m in zip(labels, ms, strict=True)])
    pd.testing.assert_frame_equal(jaccard(many, "task", average), one_by_one(many, "task", average),
                                  rtol=1e-10, atol=1e-10)


@average
def test_blocks_of_pairs(average, monkeypatch):
    "The size of blocks changes nothing."
    space = unit_space(12, 12, mlps=True)
    many = Masks([({"task": i}, m) for i, m in enumerate(unlike(space, 30, seed=1))])
    whole = jaccard(many, "task", average)
    for pairs in (1, 100, 10_000):
        monkeypatch.setattr(compare, "CACHE", pairs)
        pd.testing.assert_frame_equal(jaccard(many, "task", average), whole, rtol=1e-12)


def test_masks_without_a_name_are_left_out():
    ms = unlike(SPACE, 5, seed=0)
    many = Masks([({"task": "a"}, ms[0]), ({"task": "b"}, ms[1]), ({}, ms[2]), ({}, ms[3])])
    assert jaccard(many, "task").distance.tolist() == one_by_one(many, "task", "micro").distance.tolist()


@average
def test_a_thousand_masks_take_little_memory(average):
    space = unit_space(12, 12, mlps=True)
    many = Masks([({"task": i}, Mask.random(space, (i % 9 + 1) / 10, i)) for i in range(1000)])
    tracemalloc.start()
    table = jaccard(many, "task", average)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(table) == 1_000_000 and most < 256e6


# ── intervals ────────────────────────────────────────────────────────────────────────────────────────────────────────

some_values = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8).filter(lambda x: np.ptp(x) > 1e-3)

@given(some_values, st.sampled_from([.5, .9, .95]))
def test_students_intervals_are_those_of_scipy(x, level):
    ours = student_interval(x, level)
    assert ours["n"] == len(x) and ours["mean"] == pytest.approx(np.mean(x))
    assert ours["std"] == pytest.approx(np.std(x, ddof=1))
    theirs = stats.t.interval(level, len(x) - 1, np.mean(x), stats.sem(x))
    assert [ours["low"], ours["high"]] == pytest.approx(theirs, rel=1e-6, abs=1e-6)
