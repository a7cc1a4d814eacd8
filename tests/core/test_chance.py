"The Jaccard distance expected of random masks: against all masks of tiny spaces, scipy's laws, and random masks."
from __future__ import annotations

from functools import cache
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from toys import LAYOUT, MODEL

from subnet_explorer.core import chance
from subnet_explorer.core.agreement import consensus
from subnet_explorer.core.bits import matched_tensors
from subnet_explorer.core.chance import expected_distances
from subnet_explorer.core.compare import against, jaccard, jaccard_chance, jaccard_distance
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.masks import Masks
from subnet_explorer.core.space import Group, Space, unit_space

average = pytest.mark.parametrize("average", ["micro", "macro"])
POOLED = Space((Group("h0", "head", 0, "head", (3,)), Group("h1", "head", 1, "head", (2,)),
                Group("m0", "mlp", 0, "mlp", (1,)), Group("m1", "mlp", 1, "mlp", (1,))), LAYOUT, MODEL)
APART = Space((Group("a", "weight", 0, "q", (4,)), Group("b", "weight", 1, "q", (3,))), LAYOUT, MODEL)
MIXED = Space((*POOLED.groups[:2], Group("w", "weight", 0, "q", (3,))), LAYOUT, MODEL)


# ── all masks of tiny spaces ─────────────────────────────────────────────────────────────────────────────────────────

def all_like(space: Space, per_pool: tuple[int, ...]) -> list[np.ndarray]:
    "The bits of every mask that keeps so many of each pool, tensor after tensor."
    starts = np.cumsum([0, *(g.size for g in space.groups)])
    places = [[i for t in pool for i in range(starts[t], starts[t + 1])] for pool in matched_tensors(space)]
    every = product(*(combinations(where, n) for where, n in zip(places, per_pool, strict=True)))
    return [np.isin(np.arange(starts[-1]), np.concatenate([[], *kept])) for kept in every]


def plain(space: Space, a: np.ndarray, b: np.ndarray, average: str) -> float:
    "The distance of two masks, written out."
    ends = np.cumsum([g.size for g in space.groups])[:-1]
    pairs = [(a, b)] if average == "micro" else list(zip(np.split(a, ends), np.split(b, ends), strict=True))
    return 1 - np.mean([(x & y).sum() / (x | y).sum() if (x | y).any() else 1 for x, y in pairs])


def some_mask(space: Space, per_pool: tuple[int, ...]) -> Mask:
    bits = np.split(all_like(space, per_pool)[-1], np.cumsum([g.size for g in space.groups])[:-1])
    return Mask.of(space, {g.name: b for g, b in zip(space.groups, bits, strict=True)})


@average
@pytest.mark.parametrize("space", [POOLED, APART, MIXED], ids=["units", "weights", "both"])
def test_the_mean_over_all_pairs_of_masks(space, average):
    "Every count of every pool, empty and full ones as well: the mean over all masks with these counts."
    sizes = [sum(space.groups[t].size for t in pool) for pool in matched_tensors(space)]
    counts = list(product(*(range(n + 1) for n in sizes)))
    for one, other in list(product(counts, counts))[::5]:
        pairs = product(all_like(space, one), all_like(space, other))
        expected = np.mean([plain(space, a, b, average) for a, b in pairs])
        a, b = some_mask(space, one), some_mask(space, other)
        assert jaccard_chance(a, b, average) == pytest.approx(expected, abs=1e-12)


def counted_mask(space: Space, heads: int, mlps: int, seed: int) -> Mask:
    "A mask that keeps so many heads and MLPs."
    rng = np.random.default_rng(seed)
    left = {"head": rng.permutation(sum(g.size for g in space.groups if g.kind == "head")) < heads,
            "mlp": rng.permutation(space.layout.n_layers) < mlps}
    return Mask.of(space, {g.name: left[g.kind].reshape(-1, g.size)[g.layer].reshape(g.shape) for g in space.groups})


@average
def test_the_mean_over_masks_that_random_like_draws(average):
    space = unit_space(3, 4, mlps=True)
    a, b = counted_mask(space, 5, 1, 0), counted_mask(space, 8, 2, 1)
    drawn = [jaccard_distance(a.random_like(2 * s), b.random_like(2 * s + 1), average) for s in range(1500)]
    assert abs(jaccard_chance(a, b, average) - np.mean(drawn)) < 4 * np.std(drawn) / np.sqrt(len(drawn))
    quotient = (5 * 8 / 12 + 2 / 3) / (16 - 5 * 8 / 12 - 2 / 3)
    if average == "micro": assert abs(1 - quotient - jaccard_chance(a, b)) > .004         # not the same thing


# ── scipy's laws ─────────────────────────────────────────────────────────────────────────────────────────────────────

def by_scipy(sizes: list[int], a: list[int], b: list[int]) -> float:
    "One less the expected quotient, with the law of the overlap as a convolution."
    law = np.ones(1)
    for n, x, y in zip(sizes, a, b, strict=True):
        law = np.convolve(law, stats.hypergeom.pmf(np.arange(min(x, y) + 1), n, x, y))
    both, kept = np.arange(len(law)), sum(a) + sum(b)
    return float(1 - law @ (both / (kept - both))) if kept else 0.0


def weights(sizes: list[int]) -> Space:
    return Space(tuple(Group(f"g{i}", "weight", i, "q", (n,)) for i, n in enumerate(sizes)), LAYOUT, MODEL)


@st.composite
def counted(draw, most: int = 60, pools: int = 4):
    "Sizes of some tensors, and what two masks keep of them."
    sizes = draw(st.lists(st.integers(1, most), min_size=1, max_size=pools))
    return sizes, [draw(st.integers(0, n)) for n in sizes], [draw(st.integers(0, n)) for n in sizes]


@given(counted())
def test_tensors_one_by_one(case):
    sizes, a, b = case
    found = {k: expected_distances(weights(sizes), np.array([a]), np.array([b]), k).item() for k in ("micro", "macro")}
    assert found["micro"] == pytest.approx(by_scipy(sizes, a, b), abs=1e-10)
    one_by_one = [by_scipy([n], [x], [y]) for n, x, y in zip(sizes, a, b, strict=True)]
    assert found["macro"] == pytest.approx(np.mean(one_by_one), abs=1e-10)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.data())
def test_tensors_of_one_pool(sizes, data):
    "A tensor of a pool by the law of three categories: in both, in one mask, in none."
    n = sum(sizes)
    a, b = data.draw(st.integers(0, n)), data.draw(st.integers(0, n))
    space = Space(tuple(Group(f"h{i}", "head", i, "head", (k,)) for i, k in enumerate(sizes)), LAYOUT, MODEL)
    counts = np.array([[min(k, max(0, kept - sum(sizes[:i]))) for i, k in enumerate(sizes)] for kept in (a, b)])
    shares = []
    for k in sizes:
        share = 0.0
        for both in range(max(0, a + b - n), min(a, b) + 1):
            union, p = a + b - both, stats.hypergeom.pmf(both, n, a, b)
            for x, y in product(range(k + 1), range(k + 1)):
                if x + y > k: continue
                q = stats.multivariate_hypergeom.pmf([x, y, k - x - y], [both, union - both, n - union], k)
                share += p * q * (x / (x + y) if x + y else 1)
        shares.append(share)
    assert expected_distances(space, counts[:1], counts[1:], "macro").item() == pytest.approx(1 - np.mean(shares))
    assert expected_distances(space, counts[:1], counts[1:]).item() == pytest.approx(by_scipy([n], [a], [b]), abs=1e-10)


# ── masks that keep many ─────────────────────────────────────────────────────────────────────────────────────────────

@settings(max_examples=40)
@given(st.data())
def test_the_expansion_is_within_nine_digits(data):
    "Around the count from which it is used, tensors of all densities."
    sizes = data.draw(st.lists(st.integers(300, 3000), min_size=1, max_size=3))
    a, b = ([data.draw(st.integers(0, n)) for n in sizes] for _ in "ab")
    at_least = max(sum(a), sum(b)) >= chance.FEW
    found = expected_distances(weights(sizes), np.array([a]), np.array([b])).item()
    assert found == pytest.approx(by_scipy(sizes, a, b), abs=1e-9 if at_least else 1e-10)


@pytest.mark.parametrize("p", [1e-5, .02, .2, .41, .5, .7, .99])
@pytest.mark.parametrize("q", [1e-5, .3, .5])
def test_eighty_five_million_weights(p, q):
    "The law is summed where it is not negligible, by the quotients of neighbours."
    n = 85_000_000
    a, b = int(p * n), int(q * n)
    mean, sd = a * b / n, np.sqrt(a * b * (n - a) / n * (n - b) / n / n)
    x = np.arange(max(0, int(mean - 12 * sd - 9)), min(a, b, int(mean + 12 * sd + 50)) + 1, dtype=float)
    logs = np.cumsum(np.log((a - x[:-1]) / (x[1:]) * (b - x[:-1]) / (n - a - b + x[1:])))
    law = np.exp(np.append(0, logs) - max(0, logs.max()))
    expected = 1 - (law / law.sum()) @ (x / (a + b - x))
    found = [expected_distances(weights([n]), np.array([[a]]), np.array([[b]]), k).item() for k in ("micro", "macro")]
    assert found == pytest.approx([expected] * 2, abs=1e-9)


def test_a_mask_with_few_against_one_with_many():
    sizes, few, many = [40, 5000], [3, 7], [20, 2500]
    counts = np.array([few, many, [0, 0]])
    table = expected_distances(weights(sizes), counts, counts)
    for i, j in product(range(3), range(3)):
        assert table[i, j] == pytest.approx(by_scipy(sizes, counts[i].tolist(), counts[j].tolist()), abs=1e-9)


# ── in use ───────────────────────────────────────────────────────────────────────────────────────────────────────────

@cache
def some_masks(n: int = 9) -> Masks:
    space = unit_space(12, 12, mlps=True)
    return Masks([({"task": "t", "seed": s}, counted_mask(space, 15 * s + 4, s + 2, s)) for s in range(n)])


@average
def test_everybody_shows_the_same_value(average):
    "Tables of pairs, one against many, and the consensus of a task."
    masks = some_masks()
    table = jaccard(masks, "seed", average).set_index(["a", "b"]).chance
    for (labels, mask) in masks:
        rows = list(against(mask, [m for _, m in masks], average))
        assert [r["chance"] for r in rows] == pytest.approx(table[labels["seed"]].tolist(), abs=1e-12)
    heads = unit_space(12, 12)
    parts = [Mask.of(heads, {g.name: m[g.name] for g in heads.groups}) for _, m in masks]
    pairs = [jaccard_chance(a, b) for a, b in combinations(parts, 2)]
    assert consensus(masks, samples=10).jaccard_chance[0] == pytest.approx(np.mean(pairs), abs=1e-12)


def test_what_two_masks_share_by_chance():
    a, b = some_masks()[2], some_masks()[6]
    row, = against(a, [b])
    drawn = [(a.random_like(2 * s) & b.random_like(2 * s + 1)).count for s in range(500)]
    assert abs(row["shared_chance"] - np.mean(drawn)) < 4 * np.std(drawn) / np.sqrt(len(drawn))


@average
def test_two_empty_masks_are_equal(average):
    for space in (POOLED, APART, MIXED):
        none = Mask.full(space, False)
        assert jaccard_chance(none, none, average) == 0
        assert jaccard_chance(none, Mask.full(space), average) == pytest.approx(1)
        assert jaccard_chance(Mask.full(space), Mask.full(space), average) == pytest.approx(0, abs=1e-12)
