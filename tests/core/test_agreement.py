"Statistics of agreement: statsmodels' and krippendorff's numbers, small matrices by hand, and what is undefined."
from __future__ import annotations

import json
import warnings

import krippendorff
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import pearsonr, spearmanr
from statsmodels.stats.contingency_tables import cochrans_q, mcnemar as sm_mcnemar
from statsmodels.stats.inter_rater import fleiss_kappa as sm_fleiss
from statsmodels.stats.multitest import multipletests

from subnet_explorer.cli import main
from subnet_explorer.core.agreement import (
    agreement,
    cochran,
    consensus,
    fleiss_kappa,
    holm,
    krippendorff_alpha,
    mcnemar,
)
from subnet_explorer.core.compare import jaccard_chance, jaccard_distance, overlap, stability, survival_table
from subnet_explorer.core.intervals import correlation
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.scores import Scores
from subnet_explorer.core.masks import Masks
from subnet_explorer.core.space import Group, ModelId, Space, unit_space
from subnet_explorer.core.layout import Layout
from subnet_explorer.core.errors import SpaceMismatch, SubnetError, UnknownFamily, UnknownName
from subnet_explorer.core.formats import BadMasks, read_masks, write_masks
from subnet_explorer.core.store import Run, Store

LAYOUT = Layout("bert", 2, 4, 4, 4, 16, 32, False, (), "embeddings.word_embeddings.weight", 40)
MODEL = ModelId("toy", None, "c", "w")
HEADS = Space((Group("h0", "head", 0, "head", (4,)), Group("h1", "head", 1, "head", (4,))), LAYOUT, MODEL)
UNITS = Space((Group("h0", "head", 0, "head", (4,)), Group("m0", "mlp", 0, "mlp", (1,)), Group("h1", "head", 1, "head", (4,)), Group("m1", "mlp", 1, "mlp", (1,))), LAYOUT, MODEL)


def raters(bits: np.ndarray, space: Space = HEADS, **labels) -> Masks:
    "A mask for each row (raters, units), labelled with a seed."
    ends = np.cumsum([0, *(g.size for g in space.groups)])
    return Masks([({**labels, "seed": s}, Mask.of(space, {g.name: row[a:b].reshape(g.shape).astype(bool) for g, a, b in zip(space.groups, ends, ends[1:])})) for s, row in enumerate(bits)])


matrices = st.integers(2, 6).flatmap(lambda n: hnp.arrays(np.int64, (n, 8), elements=st.integers(0, 1)) | hnp.arrays(np.int64, (n, 1), elements=st.integers(0, 1)).map(lambda a: a.repeat(8, 1)))
counts = lambda bits: np.stack([(1 - bits).sum(0), bits.sum(0)], 1)            # (unit, category), as statsmodels wants it


# ── against other people's code ──────────────────────────────────────────────────────────────────────────────────────

@given(matrices)
def test_kappa_and_alpha(bits):
    row = agreement(raters(bits), samples=10).iloc[0]
    assert row["items"] == 8 and row.raters == len(bits) and row.prevalence == pytest.approx(bits.mean())
    if bits.all() or not bits.any():
        assert np.isnan([row.kappa, row.alpha, row.low, row.high]).all() and row.agreement == 1
        assert row.note == f"undefined: all masks agree on one category ({'kept' if bits.all() else 'removed'})"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert np.isnan(sm_fleiss(counts(bits)))
        with pytest.raises(ValueError): krippendorff.alpha(bits, level_of_measurement="nominal")
        return
    assert row.kappa == pytest.approx(sm_fleiss(counts(bits)))
    for level in ("nominal", "interval"): assert row.alpha == pytest.approx(krippendorff.alpha(bits, level_of_measurement=level))      # the same for two categories
    assert "all masks" not in row.note


@given(matrices)
def test_cochran(bits):
    row = cochran(raters(bits)).iloc[0]
    if (bits == bits[0]).all():
        assert np.isnan([row.q, row.p]).all() and row.note == "undefined: the masks are equal"
        return
    found = cochrans_q(bits.T)
    assert (row.q, row.p, row.df) == (pytest.approx(found.statistic, abs=1e-9), pytest.approx(found.pvalue), found.df) and row.note == ""


@given(matrices, st.booleans())
def test_pairs(bits, exact):
    t = mcnemar(raters(bits), exact=exact)
    assert len(t) == len(bits) * (len(bits) - 1) // 2
    for r in t.itertuples():
        a, b = bits[r.a], bits[r.b]
        assert (r.only_a, r.only_b) == ((a > b).sum(), (b > a).sum())
        if (a == b).all(): assert np.isnan([r.statistic, r.p, r.holm]).all() and r.note == "undefined: the masks are equal"; continue
        found = sm_mcnemar([[(a & b).sum(), r.only_a], [r.only_b, ((1 - a) & (1 - b)).sum()]], exact=exact, correction=False)
        assert r.p == pytest.approx(found.pvalue)
        if not exact: assert r.statistic == pytest.approx(found.statistic) == pytest.approx(cochrans_q(np.stack([a, b], 1)).statistic)
    defined = t.p.notna()
    if defined.any(): assert t.holm[defined].tolist() == pytest.approx(multipletests(t.p[defined], method="holm")[1].tolist())


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
    if len(set(values[0])) == 1 or len(set(values[1])) == 1: assert np.isnan(t["rank"][0]); return
    assert t["rank"][0] == pytest.approx(spearmanr(*values).statistic)
    assert t.distance[1] == 0 and t["rank"][1] == pytest.approx(1)


# ── by hand ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("bits, kappa, alpha, q", [
    ([[1, 0, 1, 0, 1, 0, 1, 0]] * 3, 1, 1, np.nan),                                       # all raters equal, both categories used
    ([[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]], -1, 1 - 15 * 8 / 64, 0),       # opposite: rates are equal, so Q is 0
    ([[1] * 8, [1] * 8, [0] * 8], -.5, 1 - 23 * 8 / 128, 16),                             # one dissenting seed: P = 1/3, Pe = 5/9
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
        t = agreement(raters(np.full((3, 10), value), UNITS))
        assert t.kind.tolist() == ["head", "mlp"] and t.kappa.isna().all() and t.note.str.startswith("undefined: all masks agree on one category").all()
        assert cochran(raters(np.full((3, 10), value), UNITS)).q.isna().all() and mcnemar(raters(np.full((3, 10), value), UNITS)).holm.isna().all()


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
    again = agreement(raters(bits, large), samples=4000, seed=1).iloc[0]
    assert again.low != row.low and agreement(raters(bits, large), samples=4000).iloc[0].low == row.low


def test_samples_without_kappa_are_reported():
    t = agreement(raters(np.array([[1] + [0] * 7, [1] + [0] * 7])))
    assert t.kappa[0] == 1 and t.low[0] == t.high[0] == 1 and t.note[0].startswith("undefined in 3")        # (7/8)^8 = 34 % of the samples miss the only kept unit


# ── matrices over seeds and tasks ────────────────────────────────────────────────────────────────────────────────────

TASKS = np.random.default_rng(1).integers(0, 2, (3, 5, 10))                    # (task, seed, unit)
MANY = raters(TASKS[0], UNITS, task="a") | raters(TASKS[1], UNITS, task="b") | raters(TASKS[2], UNITS, task="c")


def test_survival_over_seeds():
    one, all_ = survival_table(MANY.sel(task="b")), survival_table(MANY)
    assert np.allclose(one["mean"], TASKS[1].mean(0)) and np.allclose(one["std"], TASKS[1].std(0, ddof=1))
    assert np.allclose(all_["mean"], TASKS.sum(0).mean(0)) and np.allclose(all_["std"], TASKS.sum(0).std(0, ddof=1))
    assert all_[["kind", "layer", "unit"]].values.tolist()[3:7] == [["head", 1, 4], ["mlp", 1, 1], ["head", 2, 1], ["head", 2, 2]]
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
            shared = (TASKS[i] & TASKS[j])[:, heads].sum(1)
            assert t.loc[("head", a, b), "mean"] == shared.mean() and t.loc[("head", a, b), "std"] == pytest.approx(shared.std(ddof=1))
    x, y = TASKS[0], TASKS[1]
    chance = np.mean([x[s, heads].sum() * y[s, heads].sum() / 8 for s in range(5)])
    assert t.loc[("head", "a", "b"), "chance"] == pytest.approx(chance)


def test_tables_by_task():
    t = agreement(MANY, by="task", samples=10)
    assert t[["task", "kind"]].values.tolist() == [[a, k] for a in "abc" for k in ("head", "mlp")]
    assert t.kappa[0] == agreement(MANY.sel(task="a"), samples=10).kappa[0]
    assert len(mcnemar(MANY, by="task")) == 3 * 2 * 10 and len(cochran(MANY, by="task")) == 6
    assert agreement(MANY.sel(seed=0), over="task", samples=10).raters.tolist() == [3, 3]


@pytest.mark.parametrize("wrong, says", [
    (lambda: agreement(MANY), "several masks have the same 'seed'"),
    (lambda: agreement(MANY.sel(task="a", seed=0)), "at least two masks"),
    (lambda: cochran(MANY.sel(task="a") | MANY.sel(task="b", seed=0), by="task"), "task='b' has one"),
    (lambda: fleiss_kappa(np.array([3, 4])), "at least two masks"),
    (lambda: krippendorff_alpha(np.array([0, 0, 0])), "one unit"),
    (lambda: overlap(MANY.sel(task="a", seed=0) | MANY.sel(task="b", seed=1), by="task"), "cannot be paired"),
    (lambda: survival_table(MANY.sel(task="a") | MANY.sel(task="b", seed=0)), "equally many masks"),
    (lambda: stability({}), "no scores"),
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
    assert fleiss_kappa(v) == pytest.approx(fleiss_kappa(v / 10 ** 9)) and krippendorff_alpha(v) == pytest.approx(fleiss_kappa(v), abs=1e-9)


def test_chance_of_units_that_stand_alone_in_their_tensor():
    "An MLP is a tensor of one bit: matching by tensor would leave nothing to chance."
    mlps = unit_space(12, mlps=True)
    masks = [Mask.random(unit_space(1, 12), .5, seed=s) for s in range(400)]
    masks = [Mask.of(mlps, {f"layer.{i}.mlp": m["layer.0.head"][[i]] for i in range(12)}) for m in masks]
    drawn = [jaccard_distance(a, b) for a, b in zip(masks[::2], masks[1::2])]
    assert jaccard_chance(*masks[:2]) == pytest.approx(2 / 3) == pytest.approx(np.mean(drawn), abs=.03)


def test_stable_units():
    t = survival_table(MANY)
    assert (t.of == 3).all() and t.stable.tolist() == (TASKS.sum(0).mean(0) > 1.5).tolist()
    assert survival_table(MANY, more_than=2 / 3).stable.tolist() == (TASKS.sum(0).mean(0) > 2 + 1e-9).tolist()


@given(hnp.arrays(float, (2, 9), elements=st.integers(0, 3).map(float)))
def test_correlation(xy):
    found = correlation(*xy)
    if len(set(xy[0])) == 1 or len(set(xy[1])) == 1: assert np.isnan([found["r"], found["p"]]).all() and found["note"].startswith("undefined: all values of"); return
    assert (found["r"], found["p"], found["note"]) == (pytest.approx(pearsonr(*xy).statistic), pytest.approx(pearsonr(*xy).pvalue), "")


# ── other people's masks ─────────────────────────────────────────────────────────────────────────────────────────────

def arrays(folder, bits: dict, mlps: dict | None = None):
    "Arrays on disk as published: bits[task, seed] (layers, heads)."
    for (task, seed), b in bits.items():
        place = folder / task / f"seed_{seed}"
        place.mkdir(parents=True)
        np.save(place / "head_mask.npy", np.asarray(b, np.float32))
        if mlps is not None: np.save(place / "mlp_mask.npy", np.asarray(mlps[task, seed], np.float32))
    return folder


def test_published_arrays(tmp_path):
    rng = np.random.default_rng(0)
    keys = [(t, s) for t in ("RTE", "CoLA") for s in (1337, 42, 86)]
    heads, mlps = {k: rng.integers(0, 2, (3, 5)) for k in keys}, {k: rng.integers(0, 2, 3) for k in keys}
    arrays(tmp_path, heads, mlps)
    (tmp_path / "README").write_text("x"); (tmp_path / ".git").mkdir(); np.save(tmp_path / "RTE" / "seed_42" / "head_importance.npy", rng.random((3, 5)))
    masks = Store.read(tmp_path, format="npy")
    assert masks.index.values.tolist() == [["CoLA", 42], ["CoLA", 86], ["CoLA", 1337], ["RTE", 42], ["RTE", 86], ["RTE", 1337]]
    for labels, m in masks:
        k = labels["task"], labels["seed"]
        assert np.array_equal([m[f"layer.{i}.head"] for i in range(3)], heads[k]) and np.array_equal([m[f"layer.{i}.mlp"][0] for i in range(3)], mlps[k])
    again = read_masks(write_masks(masks, tmp_path / "again"))
    assert [m for _, m in again] == [m for _, m in masks] and np.load(tmp_path / "again" / "RTE" / "seed_42" / "mlp_mask.npy").tolist() == mlps["RTE", 42].tolist()
    assert Mask.load(masks[0].save(tmp_path / "x.safetensors")) == masks[0]                   # a space without a model survives a file
    with pytest.raises(UnknownFamily, match="mask.rebase"): masks[0].to("weight")
    with pytest.raises(SubnetError, match="coordinates differ"): masks.rebase(UNITS)           # a model with another number of heads


@pytest.mark.parametrize("only", ["head", "mlp"])
def test_published_arrays_of_one_kind(tmp_path, only):
    bits = {("RTE", s): np.eye(3)[:2] for s in (1, 2)}
    arrays(tmp_path, bits, {k: [1, 0] for k in bits})
    for f in tmp_path.rglob("*_mask.npy"):
        if not f.name.startswith(only): f.unlink()
    masks = read_masks(tmp_path)
    assert masks[0].space.kind == only and masks[0].space == unit_space(2, 3 if only == "head" else None, only == "mlp")


def spoil(value, name="head_mask.npy"): return lambda d: np.save(d / "RTE" / "seed_2" / name, value)
def drop(name): return lambda d: (d / "RTE" / "seed_2" / name).unlink()

@pytest.mark.parametrize("change, error, says", [
    (spoil(np.full((2, 3), .5)), BadMasks, "6 of 6 values are neither 0 nor 1, e.g. 0.5. Are these importance"),
    (spoil(np.array([[1, 0, np.nan], [1, 1, 1]])), BadMasks, "1 of 6 values are neither 0 nor 1, e.g. nan"),
    (spoil(np.array([[1, 0, 1], [2, 1, 1]])), BadMasks, "neither 0 nor 1, e.g. 2"),
    (spoil(np.ones(6)), BadMasks, r"shape \(6,\), expected \(layers, heads\)"),
    (spoil(np.ones((0, 3))), BadMasks, r"shape \(0, 3\)"),
    (spoil(np.ones((2, 1)), "mlp_mask.npy"), BadMasks, r"shape \(2, 1\), expected \(layers,\)"),
    (spoil(np.ones(3), "mlp_mask.npy"), BadMasks, "head_mask.npy has 2 layers and mlp_mask.npy has 3"),
    (spoil(np.array([["a"] * 3] * 2)), BadMasks, "no zeros and ones"),
    (spoil(np.array([[None] * 3] * 2, object)), BadMasks, "cannot be read as an array"),
    (lambda d: (d / "RTE" / "seed_2" / "head_mask.npy").write_bytes(b"\x93NUMPY"), BadMasks, "cannot be read as an array"),
    (lambda d: (d / "RTE" / "seed_2" / "head_mask.npy").write_bytes(b""), BadMasks, "cannot be read as an array"),
    (spoil(np.ones((2, 4))), SpaceMismatch, r"seeds with different spaces: .*seed_1 has head_mask.npy \(2, 3\).*seed_2 has head_mask.npy \(2, 4\)"),
    (drop("mlp_mask.npy"), SpaceMismatch, "seeds with different spaces"),
    (lambda d: [f.unlink() for f in (d / "SST-2").rglob("mlp_mask.npy")], SpaceMismatch, "tasks with different spaces"),
    (lambda d: [f.unlink() for f in (d / "RTE" / "seed_2").iterdir()], BadMasks, "neither head_mask.npy nor mlp_mask.npy"),
    (lambda d: (d / "RTE" / "seed_2").rename(d / "RTE" / "seed_two"), BadMasks, "whole number"),
    (lambda d: (d / "RTE" / "seed_2").rename(d / "RTE" / "seed_01"), BadMasks, "seed 1 twice"),
    (lambda d: (d / "figures").mkdir(), BadMasks, "figures holds no folder of a seed"),
], ids=["scores", "nan", "two", "flat", "no layers", "column", "layers", "words", "objects", "cut short", "empty file", "seeds differ", "one without MLPs", "tasks differ", "empty seed", "seed name", "twice", "no seeds"])
def test_arrays_that_are_no_masks(tmp_path, capsys, change, error, says):
    keys = [(t, s) for t in ("RTE", "SST-2") for s in (1, 2)]
    change(arrays(tmp_path, {k: np.eye(3)[:2] for k in keys}, {k: [1, 0] for k in keys}))
    with pytest.raises(error, match=says): read_masks(tmp_path)
    assert main(["agreement", str(tmp_path), "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and error.__name__ in err


def test_folders_that_hold_no_masks(tmp_path):
    with pytest.raises(BadMasks, match="no folder"): read_masks(tmp_path / "nothing")
    with pytest.raises(BadMasks, match="no masks in"): read_masks(tmp_path)
    arrays(tmp_path / "heads_mlps", {("RTE", 1): np.eye(2)})
    with pytest.raises(BadMasks, match="Are the tasks in .*heads_mlps"): read_masks(tmp_path)
    with pytest.raises(BadMasks, match="Give the folder above"): read_masks(tmp_path / "heads_mlps" / "RTE")
    with pytest.raises(UnknownName, match="format"): read_masks(tmp_path, format="pickle")
    with pytest.raises(SubnetError, match="use mask.save"): write_masks(Masks([({"task": "a", "seed": 0}, Mask.full(Space(HEADS.groups[:1], LAYOUT, MODEL)))]), tmp_path / "out")
    with pytest.raises(SubnetError, match="same task and seed"): write_masks(MANY | MANY, tmp_path / "out")


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────

FIELDS = {"seeds", "kappa", "alpha", "raw_agreement", "prevalence", "q", "q_p", "survivors", "super_survivors", "mean_jaccard_distance"}

def agree(capsys, *args) -> dict:
    capsys.readouterr()
    assert main(["agreement", *map(str, args), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == 1
    return json.loads(out, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))


def test_the_command_by_hand(tmp_path, capsys):
    """Four heads in two layers; of task A two seeds agree and one dissents in one head, of task B all keep the same.

    A: votes of the heads 3, 3, 1, 0, so P = (1 + 1 + 1/3 + 1)/4 = 5/6, p = 7/12, Pe = 74/144; Q = 2 (3·(4+4+9) − 49)/(21 − 19) = 2 with two degrees of freedom;
    Jaccard distances 0, 1/3, 1/3. Overlaps with B (two heads: 1, 2) under one seed: 2, 2, 2."""
    a, b = np.array([[1, 1], [0, 0]]), np.array([[1, 1], [1, 0]])
    arrays(tmp_path, {("A", 0): a, ("A", 1): a, ("A", 2): b, **{("B", s): a for s in range(3)}})
    out = agree(capsys, tmp_path)
    assert set(out) == {"tasks", "overlap"} and set(out["tasks"]["A"]) == FIELDS and set(out["tasks"]["B"]) == FIELDS | {"notes"}
    one = out["tasks"]["A"]
    assert one["seeds"] == [0, 1, 2] and one["survivors"] == pytest.approx(7 / 3) and one["super_survivors"] == 2
    assert one["raw_agreement"] == pytest.approx(5 / 6) and one["prevalence"] == pytest.approx(7 / 12) and one["kappa"] == pytest.approx((5 / 6 - 74 / 144) / (1 - 74 / 144))
    assert one["alpha"] == pytest.approx(1 - 11 * 1 / (7 * 5)) and one["q"] == pytest.approx(2) and one["q_p"] == pytest.approx(np.exp(-1)) and one["mean_jaccard_distance"] == pytest.approx(2 / 9)
    two = out["tasks"]["B"]
    assert (two["kappa"], two["alpha"], two["q"], two["q_p"], two["mean_jaccard_distance"]) == (1, 1, None, None, 0)
    assert two["notes"] == {"q": "undefined: the masks are equal", "q_p": "undefined: the masks are equal"}
    assert out["overlap"] == {"tasks": ["A", "B"], "mean": [[pytest.approx(7 / 3), 2], [2, 2]], "std": [[pytest.approx(3 ** -.5), 0], [0, 0]]}


def test_the_command_against_other_packages(tmp_path, capsys):
    rng = np.random.default_rng(3)
    tasks = {t: (rng.random((5, 12, 12)) < p).astype(int) for t, p in (("CoLA", .7), ("RTE", .4), ("WNLI", .1))}
    mlps = {t: rng.integers(0, 2, (5, 12)) for t in tasks}
    arrays(tmp_path, {(t, s): b[s] for t, b in tasks.items() for s in range(5)}, {(t, s): b[s] for t, b in mlps.items() for s in range(5)})
    for kind, found in (("head", tasks), ("mlp", mlps)):
        out = agree(capsys, tmp_path, "--kind", kind)
        for t, b in found.items():
            bits, row = b.reshape(5, -1), out["tasks"][t]
            q = cochrans_q(bits.T)
            assert set(row) == FIELDS and [row[k] for k in ("kappa", "alpha", "q", "q_p", "prevalence", "survivors", "super_survivors")] == pytest.approx(
                [sm_fleiss(counts(bits)), krippendorff.alpha(bits, level_of_measurement="nominal"), q.statistic, q.pvalue, bits.mean(), bits.sum(1).mean(), bits.all(0).sum()])
            far = [1 - (x & y).sum() / (x | y).sum() for i, x in enumerate(bits) for y in bits[:i]]
            assert row["mean_jaccard_distance"] == pytest.approx(np.mean(far))
        for i, x in enumerate(found):
            for j, y in enumerate(found):
                shared = (found[x] & found[y]).reshape(5, -1).sum(1)
                assert (out["overlap"]["mean"][i][j], out["overlap"]["std"][i][j]) == pytest.approx((shared.mean(), shared.std(ddof=1)))


def test_the_command_names_what_is_undefined(tmp_path, capsys):
    full, none = np.ones((2, 2)), np.zeros((2, 2))
    arrays(tmp_path, {**{("full", s): full for s in (1, 2, 3)}, **{("none", s): none for s in (1, 2)}, ("alone", 7): np.eye(2)})
    out = agree(capsys, tmp_path)
    alone, kept, gone = (out["tasks"][t] for t in ("alone", "full", "none"))
    assert [alone[k] for k in ("seeds", "prevalence", "survivors", "super_survivors")] == [[7], .5, 2, 2]
    nothing = {"kappa", "alpha", "raw_agreement", "q", "q_p", "mean_jaccard_distance"}
    assert all(alone[k] is None for k in nothing) and alone["notes"] == dict.fromkeys(nothing, "undefined: there is one seed only")
    for row, word in ((kept, "kept"), (gone, "removed")):
        assert {k for k in FIELDS if row[k] is None} == {"kappa", "alpha", "q", "q_p"} == set(row["notes"])
        assert row["notes"]["kappa"] == row["notes"]["alpha"] == f"undefined: all masks agree on one category ({word})"
        assert row["raw_agreement"] == 1 and row["mean_jaccard_distance"] == 0
    assert out["overlap"]["tasks"] == ["alone", "full", "none"]
    assert out["overlap"]["mean"] == [[2, None, None], [None, 4, 0], [None, 0, 0]] and out["overlap"]["std"] == [[None, None, None], [None, 0, 0], [None, 0, 0]]
    assert sum("no seed in common" in n for n in out["notes"]) == 2 and "overlap of alone and alone: one seed in common, so no standard deviation." in out["notes"]
    assert any(n.startswith("tasks have different seeds") for n in out["notes"])
    assert main(["agreement", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "nan" not in said.lower() and "alone: kappa, alpha, raw_agreement, q, q_p, mean_jaccard_distance undefined: there is one seed only" in said and "not whether they agree" in said


def test_the_command_on_a_store(tmp_path, capsys):
    "Runs on fine-tuned copies (other weights, the same shape) are compared by place; runs of other shapes are not."
    store = Store(tmp_path / "runs")
    def run(task, seed, kind, mask):
        labels, config = {"task": task, "seed": seed, "kind": kind}, {"t": task, "s": seed, "k": kind}
        return Run(store.path(labels, config), config, labels).finish(mask)
    tuned = lambda seed: Space(UNITS.groups, LAYOUT, ModelId(f"copy-{seed}", None, "c", f"w{seed}"))
    masks = {s: Mask.random(tuned(s), .5, seed=s) for s in range(3)}
    for s, m in masks.items(): run("RTE", s, "bad", ~m); run("RTE", s, "random", m)
    assert main(["agreement", str(tmp_path)]) == 2
    assert "several masks of task 'RTE' have the same 'seed'" in capsys.readouterr().err
    for s, m in masks.items(): run("RTE", s, "good", m)
    out = agree(capsys, tmp_path, "--where", "kind=good")
    by_default = agree(capsys, tmp_path)                       # of a study of tickets the good masks are counted
    assert by_default["tasks"] == out["tasks"] and by_default["notes"] == ["this is a study of lottery tickets: its good masks are compared; ask for others with --where kind=NAME.", *out["notes"]]
    bits = np.array([np.concatenate([m[g.name] for g in UNITS.groups if g.kind == "head"]) for m in masks.values()]).astype(int)
    assert out["tasks"]["RTE"]["kappa"] == pytest.approx(sm_fleiss(counts(bits))) and "3 models with different weights" in out["notes"][0]
    assert agree(capsys, tmp_path, "--where", "kind=bad", "--kind", "mlp")["tasks"]["RTE"]["seeds"] == [0, 1, 2]
    for args, says in ((["--where", "kind=godo"], "did you mean good"), (["--where", "knid=good"], "did you mean kind"), (["--kind", "heads", "--where", "kind=good"], "did you mean head")):
        assert main(["agreement", str(tmp_path), *args]) == 2 and says in capsys.readouterr().err
    Run(store.path({"task": "RTE", "seed": 4, "kind": "good"}, {"s": 4}), {"s": 4}, {"task": "RTE", "seed": 4, "kind": "good"})
    assert "1 of 10 runs are not finished and left out." in agree(capsys, tmp_path, "--where", "kind=good")["notes"]
    run("RTE", 3, "good", Mask.full(unit_space(3, 4)))
    assert main(["agreement", str(tmp_path), "--where", "kind=good"]) == 2 and "SpaceMismatch" in capsys.readouterr().err


def test_consensus_refuses(tmp_path):
    for wrong, says in ((lambda: consensus(MANY, "neuron"), "unknown kind of unit"), (lambda: consensus(MANY | MANY), "have the same 'seed'"), (lambda: consensus(MANY | Masks([({"task": "a"}, MANY[0])])), "have no label"),
                        (lambda: consensus(Masks([])), "label"), (lambda: correlation([1, 2], [1, 2]), "at least three"), (lambda: correlation([1, 2, np.inf], [1, 2, 3]), "NaN or infinite")):
        with pytest.raises(SubnetError, match=says): wrong()
