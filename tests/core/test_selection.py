"Stability selection: shares and sets by hand, the bound in simulations, and what is refused."
from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from toys import LAYOUT, MODEL

from subnet_explorer.core.errors import SubnetError, UnknownName
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.masks import Masks
from subnet_explorer.core.selection import (
    NO_BOUND,
    false_survivors,
    half_samples,
    selection_table,
    stability_selection,
)
from subnet_explorer.core.space import Group, Space

P = 60
GROUPS = (Group("h0", "head", 0, "head", (20,)), Group("h1", "head", 1, "head", (40,)),
          Group("m0", "mlp", 0, "mlp", (1,)))
SPACE, HEADS = Space(GROUPS, LAYOUT, MODEL), Space(GROUPS[:2], LAYOUT, MODEL)


def mask_of(row: np.ndarray, space: Space = SPACE) -> Mask:
    parts = np.split(row.astype(bool), np.cumsum([g.size for g in space.groups])[:-1])
    return Mask.of(space, {g.name: part for g, part in zip(space.groups, parts, strict=True)})


def bits(mask: Mask) -> np.ndarray: return np.concatenate([b.ravel() for _, b in mask.items()])


def collection(rows: np.ndarray, seeds: int = 1, space: Space = SPACE) -> Masks:
    "Masks of some seeds, each on the same subsamples."
    return Masks([({"seed": i % seeds, "subsample": i // seeds}, mask_of(row, space)) for i, row in enumerate(rows)])


rows = st.integers(2, 12).flatmap(lambda n: hnp.arrays(bool, (n, P + 1)))


@given(rows, st.floats(.5, 1, exclude_min=True), st.sampled_from([1, 2]))
def test_shares_sets_and_counts(rows, threshold, seeds):
    rows = rows[:len(rows) // seeds * seeds]
    if len(rows) < 2: return
    found, share = stability_selection(collection(rows, seeds), threshold), rows.mean(0)
    assert np.allclose(np.concatenate([found.probability[g.name] for g in GROUPS]), share)
    assert (bits(found.stable) == (share >= threshold - 1e-9)).all()
    t = found.table().set_index("kind")
    for kind, part in (("head", slice(0, P)), ("mlp", slice(P, P + 1))):
        q, p = rows[:, part].sum(1).mean(), rows[:, part].shape[1]
        assert t.q[kind] == pytest.approx(q) and t.units[kind] == p and t.masks[kind] == len(rows)
        assert t.bound[kind] == pytest.approx(q ** 2 / (2 * threshold - 1) / p)
        assert (t.stable[kind], t.super_survivors[kind]) == ((share[part] >= threshold - 1e-9).sum(),
                                                             (share[part] == 1).sum())
    units = found.units()
    assert len(units) == P + 1 and units.probability.is_monotonic_decreasing
    assert units.stable.sum() == found.stable.count


@given(rows)
def test_super_survivors_are_stable_and_a_higher_threshold_keeps_fewer(rows):
    masks = collection(rows)
    sets = [bits(stability_selection(masks, t).stable) for t in (.51, .7, .9, 1.0)]
    assert all((high <= low).all() for low, high in pairwise(sets))
    assert (sets[-1] == bits(masks.intersection())).all()
    bounds = [stability_selection(masks, t).table().bound[0] for t in (.51, .7, .9, 1.0)]
    assert bounds == sorted(bounds, reverse=True)


@pytest.mark.parametrize("strength, q, threshold", [(0, 12, .6), (1.5, 15, .7), (3, 10, .9), (0, 30, .8)])
def test_false_survivors_stay_below_the_bound(strength, q, threshold):
    "Units with a score, of which some matter, searched anew on halves of noisy items; many studies."
    rng, false, items = np.random.default_rng(int(q * 10 + strength)), [], 40
    matters = np.arange(P) < 6
    for study in range(60):
        data = rng.normal(size=(items, P)) + strength * matters / np.sqrt(items / 2)
        means = np.stack([data[half].mean(0) for half in half_samples(items, 25, seed=study)])
        kept = means >= np.sort(means, 1)[:, -q][:, None]
        found = stability_selection(collection(kept, space=HEADS), threshold)
        false.append((bits(found.stable) & ~matters).sum() if strength else found.stable.count)
    bound = false_survivors(q, P, threshold)
    assert found.table().q[0] == q and found.table().bound[0] == pytest.approx(bound)
    assert np.mean(false) <= bound
    assert max(false) > 0 or bound < 3                                        # the bound is no matter of course


def test_seeds_that_share_their_data_have_no_bound():
    "Fifty seeds of one search of noise agree on units that make no difference: the bound would be wrong."
    luck = np.arange(P) < 12
    row = np.append(luck, True)
    same = Masks([({"seed": s, "task": "a"}, mask_of(row)) for s in range(50)])
    found = stability_selection(same, subsample=None)
    assert found.stable.count == 13 > false_survivors(12, P, .9)
    assert found.table().bound.isna().all() and set(found.table().note) == {NO_BOUND} and NO_BOUND in repr(found)
    one = Masks([({"seed": 0, "task": "b"}, mask_of(row))])
    assert selection_table(same | one, "task").task.unique().tolist() == ["a"]
    assert selection_table(one, "task").empty and selection_table(Masks([]), "task").empty


@settings(max_examples=30)
@given(st.integers(2, 41), st.integers(1, 5), st.integers(0, 9))
def test_halves(items, pairs, seed):
    halves = half_samples(items, pairs, seed)
    assert len(halves) == 2 * pairs and {len(h) for h in halves} == {items // 2}
    for a, b in zip(halves[::2], halves[1::2], strict=True):
        assert len(np.union1d(a, b)) == items // 2 * 2 and set(a) | set(b) <= set(range(items))


def test_what_is_shown():
    found = stability_selection(collection(np.ones((4, P + 1)), 2))
    assert repr(found).splitlines() == ["StabilitySelection(4 masks, threshold 0.9)",
                                        "  head: 60 of 60 stable, 60 in all masks, at most 75 false expected",
                                        "  mlp: 1 of 1 stable, 1 in all masks, at most 1.2 false expected"]
    assert "super_survivors" in found._repr_html_()


@pytest.mark.parametrize("wrong, error, says", [
    (lambda m: stability_selection(m, .5), SubnetError, "above 0.5"),
    (lambda m: stability_selection(m, 1.1), SubnetError, "at most 1"),
    (lambda m: stability_selection(m.sel(seed=0, subsample=0)), SubnetError, "at least two masks, 1 given"),
    (lambda m: stability_selection(m, subsample=None), SubnetError, "several masks have the same seed: select"),
    (lambda m: stability_selection(m | m), SubnetError, "several masks have the same seed and subsample"),
    (lambda m: stability_selection(m, subsample="half"), UnknownName, "unknown label 'half'"),
    (lambda m: half_samples(1, 1), SubnetError, "at least two items"),
], ids=["half", "more", "one", "seeds", "twice", "label", "items"])
def test_what_is_refused(wrong, error, says):
    with pytest.raises(error, match=says): wrong(collection(np.ones((4, P + 1)), 2))
