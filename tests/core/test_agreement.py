"Statistics of agreement: statsmodels' and krippendorff's numbers, small matrices by hand, and what is undefined."
from __future__ import annotations

import warnings

import krippendorff
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import hypergeom, pearsonr, spearmanr
from statsmodels.stats.contingency_tables import cochrans_q, mcnemar as sm_mcnemar
from statsmodels.stats.inter_rater import fleiss_kappa as sm_fleiss
from statsmodels.stats.multitest import multipletests
from toys import LAYOUT, MODEL

from subnet_explorer.core.agreement import (
    agreement,
    annotator_kappa,
    cochran,
    consensus,
    fleiss_kappa,
    holm,
    krippendorff_alpha,
    mcnemar,
)
from subnet_explorer.core.compare import jaccard_chance, jaccard_distance, overlap, stability, survival_table
from subnet_explorer.core.errors import SpaceMismatch, SubnetError, UnknownName
from subnet_explorer.core.intervals import correlation
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.masks import Masks
from subnet_explorer.core.scores import Scores
from subnet_explorer.core.space import Group, Space, unit_space

H0, H1 = Group("h0", "head", 0, "head", (4,)), Group("h1", "head", 1, "head", (4,))
M0, M1 = Group("m0", "mlp", 0, "mlp", (1,)), Group("m1", "mlp", 1, "mlp", (1,))
HEADS, UNITS = Space((H0, H1), LAYOUT, MODEL), Space((H0, M0, H1, M1), LAYOUT, MODEL)


def mask_of(row: np.ndarray, space: Space) -> Mask:
    "The mask with these bits, one tensor after another."
    parts = np.split(row.astype(bool), np.cumsum([g.size for g in space.groups])[:-1])
    return Mask.of(space, {g.name: part.reshape(g.shape) for g, part in zip(space.groups, parts, strict=True)})


def raters(bits: np.ndarray, space: Space = HEADS, **labels) -> Masks:
    "A mask for each row (raters, units), labelled with a seed."
    return Masks([({**labels, "seed": seed}, mask_of(row, space)) for seed, row in enumerate(bits)])


def some_matrices(n: int) -> st.SearchStrategy[np.ndarray]:
    "Zeros and ones of `n` raters and eight units, often the same for all units."
    bit = st.integers(0, 1)
    equal = hnp.arrays(np.int64, (n, 1), elements=bit).map(lambda a: a.repeat(8, 1))
    return hnp.arrays(np.int64, (n, 8), elements=bit) | equal


matrices = st.integers(2, 6).flatmap(some_matrices)


def counts(bits: np.ndarray) -> np.ndarray:      # (unit, category), as statsmodels wants it
    return np.stack([(1 - bits).sum(0), bits.sum(0)], 1)


# ── against other people's code ──────────────────────────────────────────────────────────────────────────────────────

@given(matrices)
def test_kappa_and_alpha(bits):
    row = agreement(raters(bits), samples=10).iloc[0]
    assert row["items"] == 8 and row.raters == len(bits) and row.prevalence == pytest.approx(bits.mean())
    if bits.all() or not bits.any():
        assert np.isnan([row.kappa, row.alpha, row.low, row.high]).all() and row.agreement == 1
        category = "kept" if bits.all() else "removed"
        assert row.note == f"undefined: all masks agree on one category ({category})"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert np.isnan(sm_fleiss(counts(bits)))
        with pytest.raises(ValueError): krippendorff.alpha(bits, level_of_measurement="nominal")
        return
    assert row.kappa == pytest.approx(sm_fleiss(counts(bits)))
    for level in ("nominal", "interval"):                      # the same for two categories
        assert row.alpha == pytest.approx(krippendorff.alpha(bits, level_of_measurement=level))
    assert "all masks" not in row.note


@given(matrices)
def test_cochran(bits):
    row = cochran(raters(bits)).iloc[0]
    if (bits == bits[0]).all():
        assert np.isnan([row.q, row.p]).all() and row.note == "undefined: the masks are equal"
        return
    found = cochrans_q(bits.T)
    assert row.q == pytest.approx(found.statistic, abs=1e-9) and row.p == pytest.approx(found.pvalue)
    assert row.df == found.df and row.note == ""


@given(matrices, st.booleans())
def test_pairs(bits, exact):
    t = mcnemar(raters(bits), exact=exact)
    assert len(t) == len(bits) * (len(bits) - 1) // 2
    for r in t.itertuples():
        a, b = bits[r.a], bits[r.b]
        assert (r.only_a, r.only_b) == ((a > b).sum(), (b > a).sum())
        if (a == b).all():
            assert np.isnan([r.statistic, r.p, r.holm]).all() and r.note == "undefined: the masks are equal"
            continue
        table = [[(a & b).sum(), r.only_a], [r.only_b, ((1 - a) & (1 - b)).sum()]]
        found = sm_mcnemar(table, exact=exact, correction=False)
        assert r.p == pytest.approx(found.pvalue)
        if exact: continue
        assert r.statistic == pytest.approx(found.statistic)
        assert r.statistic == pytest.approx(cochrans_q(np.stack([a, b], 1)).statistic)
    defined = t.p.notna()
    if not defined.any(): return
    assert t.holm[defined].tolist() == pytest.approx(multipletests(t.p[defined], method="holm")[1].tolist())


@given(st.lists(st.floats(0, 1) | st.just(np.nan), max_size=12))
def test_holm(p):
    p = np.array(p, float)
    defined = np.isfinite(p)
    assert np.isnan(holm(p)[~defined]).all()
    if defined.any(): assert holm(p)[defined] == pytest.approx(multipletests(p[defined], method="holm")[1])


@given(hnp.arrays(float, (2, 8), elements=st.integers(0, 5).map(float)))
def test_rank_correlation(values):
    few, many = (Scores(HEADS, {"h0": v[:4], "h1": v[4:]}) for v in values)
    t = stability({10: few, 200: many})
    if len(set(values[0])) == 1 or len(set(values[1])) == 1:
        assert np.isnan(t["rank"][0])
        return
    assert t["rank"][0] == pytest.approx(spearmanr(*values).statistic)
    assert t.distance[1] == 0 and t["rank"][1] == pytest.approx(1)


# ── by hand ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("bits, kappa, alpha, q", [
    # all raters equal, both categories used
    ([[1, 0, 1, 0, 1, 0, 1, 0]] * 3, 1, 1, np.nan),
    # opposite: rates are equal, so Q is 0
    ([[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]], -1, 1 - 15 * 8 / 64, 0),
    # one dissenting seed: P = 1/3, Pe = 5/9
    ([[1] * 8, [1] * 8, [0] * 8], -.5, 1 - 23 * 8 / 128, 16),
])
def test_small_matrices(bits, kappa, alpha, q):
    row = agreement(raters(np.array(bits)), samples=20).iloc[0]
    assert (row.kappa, row.alpha) == pytest.approx((kappa, alpha))
    assert cochran(raters(np.array(bits))).q[0] == pytest.approx(q, nan_ok=True)


def test_equal_rates_are_not_agreement():
    apart = raters(np.eye(8)[:5])
    assert cochran(apart).p[0] == 1 and agreement(apart).kappa[0] < 0
    assert "not agreement" in cochran.__doc__ and "not agreement" in mcnemar.__doc__


def test_empty_and_full_masks():
    for value in (0, 1):
        same = raters(np.full((3, 10), value), UNITS)
        t = agreement(same)
        assert t.kind.tolist() == ["head", "mlp"] and t.kappa.isna().all()
        assert t.note.str.startswith("undefined: all masks agree on one category").all()
        assert cochran(same).q.isna().all() and mcnemar(same).holm.isna().all()


def test_kinds_are_counted_apart():
    bits = np.random.default_rng(0).integers(0, 2, (4, 10))
    heads = bits[:, [0, 1, 2, 3, 5, 6, 7, 8]]
    both, alone = agreement(raters(bits, UNITS)).set_index("kind"), agreement(raters(heads)).set_index("kind")
    assert both.loc["head", "kappa"] == alone.loc["head", "kappa"] and both.loc["mlp", "items"] == 2
    assert cochran(raters(bits, UNITS)).q[0] == cochran(raters(heads)).q[0]


# ── the bootstrap ────────────────────────────────────────────────────────────────────────────────────────────────────

def test_the_interval_is_that_of_resampled_units():
    rng = np.random.default_rng(0)
    large = Space((Group("h", "head", 0, "head", (144,)),), LAYOUT, MODEL)
    bits = np.where(rng.random((5, 144)) < .3, rng.integers(0, 2, (5, 144)), rng.integers(0, 2, 144))
    slow = [sm_fleiss(counts(bits[:, rng.integers(0, 144, 144)])) for _ in range(1500)]
    row = agreement(raters(bits, large), samples=4000).iloc[0]
    assert (row.low, row.high) == pytest.approx(np.quantile(slow, [.025, .975]), abs=.015)
    assert row.low < row.kappa < row.high
    other = agreement(raters(bits, large), samples=4000, seed=1).iloc[0]
    assert other.low != row.low and agreement(raters(bits, large), samples=4000).iloc[0].low == row.low


def test_samples_without_kappa_are_reported():
    t = agreement(raters(np.array([[1] + [0] * 7, [1] + [0] * 7])))
    assert t.kappa[0] == 1 and t.low[0] == t.high[0] == 1
    assert t.note[0].startswith("undefined in 3")              # (7/8)^8 = 34 % of the samples miss the only kept unit


# ── matrices over seeds and tasks ────────────────────────────────────────────────────────────────────────────────────

TASKS = np.random.default_rng(1).integers(0, 2, (3, 5, 10))                    # (task, seed, unit)
MANY = raters(TASKS[0], UNITS, task="a") | raters(TASKS[1], UNITS, task="b") | raters(TASKS[2], UNITS, task="c")


def test_survival_over_seeds():
    one, every = survival_table(MANY.sel(task="b")), survival_table(MANY)
    assert np.allclose(one["mean"], TASKS[1].mean(0)) and np.allclose(one["std"], TASKS[1].std(0, ddof=1))
    assert np.allclose(every["mean"], TASKS.sum(0).mean(0)) and np.allclose(every["std"], TASKS.sum(0).std(0, ddof=1))
    where = every[["kind", "layer", "unit"]].values.tolist()
    assert where[3:7] == [["head", 1, 4], ["mlp", 1, 1], ["head", 2, 1], ["head", 2, 2]]
    assert survival_table(MANY.sel(task="b", seed=0))["std"].isna().all()
    weights = Space((Group("a", "weight", 0, "q", (7, 3)), Group("b", "weight", 1, "q", (10,))), LAYOUT, MODEL)
    ms = [Mask.random(weights, .3 + .1 * s, seed=s) for s in range(3)]
    t = survival_table(Masks([({"seed": s}, m) for s, m in enumerate(ms)]))
    assert t.unit.tolist() == [0, 0] and np.allclose(t["mean"], np.mean([m.table().density for m in ms], 0))


def test_overlap_over_seeds():
    t = overlap(MANY, by="task").set_index(["kind", "a", "b"])
    heads = np.array([0, 1, 2, 3, 5, 6, 7, 8])
    for i, a in enumerate("abc"):
        for j, b in enumerate("abc"):
            shared, row = (TASKS[i] & TASKS[j])[:, heads].sum(1), t.loc[("head", a, b)]
            assert row["mean"] == shared.mean() and row["std"] == pytest.approx(shared.std(ddof=1))
    x, y = TASKS[0], TASKS[1]
    chance = np.mean([x[s, heads].sum() * y[s, heads].sum() / 8 for s in range(5)])
    assert t.loc[("head", "a", "b"), "chance"] == pytest.approx(chance)


def test_tables_by_task():
    t = agreement(MANY, by="task", samples=10)
    assert t[["task", "kind"]].values.tolist() == [[a, k] for a in "abc" for k in ("head", "mlp")]
    assert t.kappa[0] == agreement(MANY.sel(task="a"), samples=10).kappa[0]
    assert len(mcnemar(MANY, by="task")) == 3 * 2 * 10 and len(cochran(MANY, by="task")) == 6
    assert agreement(MANY.sel(seed=0), over="task", samples=10).raters.tolist() == [3, 3]


ONE_SHORT = MANY.sel(task="a") | MANY.sel(task="b", seed=0)
UNPAIRED = MANY.sel(task="a", seed=0) | MANY.sel(task="b", seed=1)


@pytest.mark.parametrize("wrong, says", [
    (lambda: agreement(MANY), "several masks have the same 'seed'"),
    (lambda: agreement(MANY.sel(task="a", seed=0)), "at least two masks"),
    (lambda: cochran(ONE_SHORT, by="task"), "task='b' has one"),
    (lambda: fleiss_kappa(np.array([3, 4])), "at least two masks"),
    (lambda: krippendorff_alpha(np.array([0, 0, 0])), "one unit"),
    (lambda: overlap(UNPAIRED, by="task"), "cannot be paired"),
    (lambda: survival_table(ONE_SHORT), "equally many masks"),
    (lambda: stability({}), "no scores"),
    (lambda: consensus(MANY, "neuron"), "unknown kind of unit"),
    (lambda: consensus(MANY | MANY), "have the same 'seed'"),
    (lambda: consensus(MANY | Masks([({"task": "a"}, MANY[0])])), "have no label"),
    (lambda: consensus(Masks([])), "label"),
    (lambda: correlation([1, 2], [1, 2]), "at least three"),
    (lambda: correlation([1, 2, np.inf], [1, 2, 3]), "NaN or infinite"),
])
def test_refusals(wrong, says):
    with pytest.raises(SubnetError, match=says): wrong()


def test_masks_of_other_spaces_and_unknown_labels():
    other = raters(np.ones((2, 8)), HEADS)
    with pytest.raises(SpaceMismatch): agreement(Masks([({"seed": 0}, MANY[0]), ({"seed": 1}, other[0])]))
    with pytest.raises(UnknownName, match="did you mean seed"): agreement(MANY, over="sed")
    with pytest.raises(UnknownName, match="did you mean task"): overlap(MANY, by="tsk")


def test_large_counts_do_not_overflow():
    v = np.array([10 ** 11, 10 ** 9, 10 ** 9, 10 ** 10])
    assert fleiss_kappa(v) == pytest.approx(fleiss_kappa(v / 10 ** 9))
    assert krippendorff_alpha(v) == pytest.approx(fleiss_kappa(v), abs=1e-9)


def test_chance_of_units_that_stand_alone_in_their_tensor():
    "An MLP is a tensor of one bit: matching by tensor would leave nothing to chance."
    mlps = unit_space(12, mlps=True)
    drawn = [Mask.random(unit_space(1, 12), .5, seed=s)["layer.0.head"] for s in range(400)]
    masks = [mask_of(bits, mlps) for bits in drawn]
    distances = [jaccard_distance(a, b) for a, b in zip(masks[::2], masks[1::2], strict=True)]
    expected = hypergeom(12, 6, 6).expect(lambda both: 1 - both / (12 - both))
    assert jaccard_chance(*masks[:2]) == pytest.approx(expected) == pytest.approx(np.mean(distances), abs=.03)


def test_stable_units():
    t = survival_table(MANY)
    assert (t.of == 3).all() and t.stable.tolist() == (TASKS.sum(0).mean(0) > 1.5).tolist()
    assert survival_table(MANY, more_than=2 / 3).stable.tolist() == (TASKS.sum(0).mean(0) > 2 + 1e-9).tolist()


@given(hnp.arrays(float, (2, 9), elements=st.integers(0, 3).map(float)))
def test_correlation(xy):
    found = correlation(*xy)
    if len(set(xy[0])) == 1 or len(set(xy[1])) == 1:
        assert np.isnan([found["r"], found["p"]]).all() and found["note"].startswith("undefined: all values of")
        return
    expected = pearsonr(*xy)
    assert (found["r"], found["p"]) == (pytest.approx(expected.statistic), pytest.approx(expected.pvalue))
    assert found["note"] == ""


# ── more than two categories ─────────────────────────────────────────────────────────────────────────────────────────

def plain_kappa(rows: list[list[str]]) -> float:
    "Fleiss' kappa, label by label: the share of equal pairs of labels of an item, corrected for chance."
    rows = [[x for x in row if x is not None] for row in rows]
    rows = [row for row in rows if len(row) > 1]
    pairs = [[a == b for i, a in enumerate(row) for j, b in enumerate(row) if i != j] for row in rows]
    agreed, every = np.mean([np.mean(p) for p in pairs]), [x for row in rows for x in row]
    chance = sum((every.count(c) / len(every)) ** 2 for c in set(every))
    return (agreed - chance) / (1 - chance)


@given(st.integers(2, 5).flatmap(lambda n: st.lists(
    st.lists(st.sampled_from(["a", "b", "c", None]), min_size=n, max_size=n), min_size=1, max_size=8)))
def test_annotators_with_gaps(rows):
    table = np.array(rows, object)
    known = [[x for x in row if x is not None] for row in rows]
    used = [row for row in known if len(row) > 1]
    if not used:
        with pytest.raises(SubnetError, match="two raters have labelled"): annotator_kappa(table)
        return
    found = annotator_kappa(table)
    assert (found["items"], found["left_out"]) == (len(used), len(rows) - len(used))
    if len({x for row in used for x in row}) == 1:
        assert np.isnan(found["kappa"]) and found["note"] == "undefined: all labels are one category"
    else:
        assert found["kappa"] == pytest.approx(plain_kappa(rows)) and not found["note"].startswith("undefined:")


@given(hnp.arrays(np.int64, st.tuples(st.integers(2, 9), st.integers(2, 5)), elements=st.integers(0, 3)))
def test_annotators_without_gaps_as_statsmodels(table):
    counts = np.array([[np.sum(row == c) for c in range(4)] for row in table])
    if len(np.unique(table)) > 1: assert annotator_kappa(table)["kappa"] == pytest.approx(sm_fleiss(counts))


def test_an_interval_of_annotators_is_over_items():
    "Twice the items, each twice: the same kappa, and an interval that is narrower by about the root of two."
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 3, 60)
    table = np.where(rng.random((60, 3)) < .7, truth[:, None], rng.integers(0, 3, (60, 3)))
    found, more = annotator_kappa(table), annotator_kappa(np.concatenate([table, table]))
    assert found["low"] < found["kappa"] < found["high"] and more["kappa"] == pytest.approx(found["kappa"])
    widths = [some["high"] - some["low"] for some in (found, more)]
    assert 1.2 < widths[0] / widths[1] < 1.7
    assert annotator_kappa(table, level=.5)["low"] > found["low"] and annotator_kappa(table) == found


def test_the_example_of_fleiss():
    "Fleiss (1971), table 1 as often printed: ten subjects, fourteen raters, five categories, kappa 0.21."
    counts = [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
              [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]
    table = np.array([np.repeat(np.arange(5), row) for row in counts])
    assert annotator_kappa(table)["kappa"] == pytest.approx(.210, abs=5e-4)
