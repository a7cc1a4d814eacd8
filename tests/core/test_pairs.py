"Paired gains: what is paired with what, what is left out, and how many comparisons there are."

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from subnet_explorer.core.intervals import estimate
from subnet_explorer.core.pairs import Pairs, Unpaired, corrected, sign_test


def table(seeds=3, items=5, draws=2, groups=("x", "y"), seed=0) -> pd.DataFrame:
    "A condition with seeds, one with draws, one with neither."
    rng = np.random.default_rng(seed)
    sides: dict[str, list[tuple[float, float]]] = {"found": [(s, np.nan) for s in range(seeds)]}
    sides["full"] = [(np.nan, np.nan)]
    sides["random"] = [(np.nan, d) for d in range(draws)]
    rows = [{"under": under, "seed": s, "draw": d, "group": g, "item": i, "score": rng.normal()}
            for under, drawn in sides.items() for s, d in drawn for g in groups for i in range(items)]
    return pd.DataFrame(rows)


def pairs(t: pd.DataFrame) -> Pairs: return Pairs(t, ["seed", "draw"], items=["item"], groups=["group"])


@settings(max_examples=15)
@given(st.integers(2, 4), st.integers(3, 6), st.integers(1, 3), st.integers(0, 99))
def test_differences_are_those_of_arrays(seeds, items, draws, seed):
    "Seeds of one side meet the draws of the other; groups are averaged; what has no seed stands beside all."
    t = table(seeds, items, draws, seed=seed)
    found, random, full = (t[t.under == name].score.to_numpy() for name in ("found", "random", "full"))
    a = found.reshape(seeds, 1, 2, items)
    g = pairs(t).gains("found").set_index("against")
    for other, b in (("random", random.reshape(1, draws, 2, items)), ("full", full.reshape(1, 1, 2, items))):
        d = a - b
        want = estimate([d[:, :, 0], d[:, :, 1]], ("seed", "draw", "item"))
        row = g.loc[other]
        assert row[["mean", "low", "high", "p"]].tolist() == pytest.approx([want.mean, want.low, want.high, want.p])
        assert (row["items"], row.seeds) == (2 * items, seeds * d.shape[1])
        each = np.concatenate([d[:, :, 0].mean((0, 1)), d[:, :, 1].mean((0, 1))])
        assert (row.wins, row.losses) == ((each > 0).sum(), (each < 0).sum())
        assert row.sign == pytest.approx(stats.binomtest(int(row.wins), len(each)).pvalue)


def test_only_what_both_sides_have_counts():
    t = table()
    less = t[(t.under != "full") | (t.item != 3)]
    assert pairs(less).gains("found", "full")["items"].item() == 8
    apart = t.assign(item=t.item + 100 * (t.under == "full"))
    with pytest.raises(Unpaired, match="'found' and 'full' have no item in common: 0, 1, 2, 3, 4 against 100"):
        pairs(apart).gains("found", "full")
    other = pd.concat([t, t[t.under == "found"].assign(under="later", seed=t.seed + 1)])
    assert pairs(other).gains("found", "later").seeds.item() == 2
    with pytest.raises(Unpaired, match="no seed in common"):
        pairs(other.assign(seed=other.seed + 9 * (other.under == "later"))).gains("found", "later")


def test_an_undefined_score_takes_its_seed_out_of_both_sides():
    t = table()
    holes = t.assign(score=t.score.where((t.under != "found") | (t.seed != 1) | (t.item != 2)))
    row, without = (pairs(x).gains("found", "full").iloc[0] for x in (holes, t[t.seed != 1]))
    assert (row.seeds, row.undefined) == (2, 2) and row["mean"] == pytest.approx(without["mean"])
    none = pairs(t.assign(score=t.score.where(t.under != "found"))).gains("found", "full").iloc[0]
    assert np.isnan(none["mean"]) and none.seeds == 0 and none.undefined == 30


def test_one_seed_and_one_item():
    "No interval, and no p; the comparison does not count in the family."
    t = table(seeds=1, items=1, groups=("x",))
    row = pairs(t).gains("found", "full").iloc[0]
    assert row["mean"] == t.score[0] - t.score[t.under == "full"].item()
    assert np.isnan([row.low, row.high, row.p, row.holm, row.bh]).all()


@given(st.lists(st.one_of(st.floats(0, 1), st.just(float("nan"))), max_size=12))
def test_corrections(p):
    known = np.array([v for v in p if not np.isnan(v)])
    t = corrected(p)
    if not len(known): return
    assert t.bh.dropna().tolist() == pytest.approx(stats.false_discovery_control(known))
    order = np.argsort(known, kind="stable")
    holm, most = np.empty(len(known)), 0.0
    for rank, i in enumerate(order): holm[i] = most = min(1.0, max(most, (len(known) - rank) * known[i]))
    assert t.holm.dropna().tolist() == pytest.approx(holm.tolist())
    assert t.holm.isna().tolist() == np.isnan(p).tolist()


def test_families_of_equals():
    "Of families of four comparisons of equals, one in twenty has a finding by Holm's rule."
    rng, found = np.random.default_rng(0), 0
    for _ in range(60):
        t = pd.DataFrame([{"under": u, "seed": s, "score": rng.normal()} for u in "abcde" for s in range(3)])
        found += (Pairs(t, ["seed"]).gains().holm < .05).any()
    assert found / 60 < .14


def test_means_are_those_of_the_design():
    t = table()
    row = pairs(t).means().set_index("under").loc["found"]
    a = t[t.under == "found"].score.to_numpy().reshape(3, 1, 2, 5)
    want = estimate([a[:, :, 0], a[:, :, 1]], ("seed", "draw", "item"))
    assert row[["mean", "low", "high"]].tolist() == pytest.approx([want.mean, want.low, want.high])
    assert (row.seeds, row["items"], sign_test(3, 3)) == (3, 10, 1.0)
