"Figures: what they show is what was computed, in every format, with any label."
from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from subnet_explorer import compare, plots
from subnet_explorer.core.errors import SpaceMismatch, SubnetError, UnknownName
from subnet_explorer.core.escape import Html
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.masks import Masks
from subnet_explorer.core.scores import Scores
from subnet_explorer.core.space import unit_space
from subnet_explorer.look.paper import CannotDraw, print_plotly
from subnet_explorer.measure.maps import BadMap

UNITS = unit_space(3, 4, mlps=True)
NASTY = "<b>Co$L$A</b> & </script><script>alert(1)</script>"
TASKS = (NASTY, "RTE")
BITS = np.random.default_rng(0).integers(0, 2, (2, 3, 15))      # (task, seed, unit)


def mask(row: np.ndarray) -> Mask:
    "Keep units by their bits: four heads and an MLP for each layer."
    def bits(g): return row[5 * g.layer + (4 if g.kind == "mlp" else 0):][:g.size].astype(bool)
    return Mask.of(UNITS, {g.name: bits(g) for g in UNITS.groups})


MANY = Masks([({"task": t, "seed": s}, mask(BITS[i, s])) for i, t in enumerate(TASKS) for s in range(3)])
SCORES = Scores(UNITS, {g.name: np.arange(g.size) + 10. * g.layer for g in UNITS.groups})


def score(task: str, seed: int, kind: str, stage: str) -> dict[str, object]:
    value = (kind == "good") * .5 + .1 * seed + .01 * len(task)
    return dict(task=task, seed=seed, kind=kind, stage=stage, score=value)


KINDS = (("full", "full"), ("good", "pruned"), ("good", "retrained"), ("super-<i>", "pruned"))
TABLE = pd.DataFrame([score(t, s, k, g) for t in TASKS for k, g in KINDS for s in range(3)])
UNDEFINED = TABLE.assign(score=TABLE.score.where(TABLE.stage != "retrained"))
PATTERNS = (("block", .5), ("diagonal", .3), ("<u>other", .2))
SHARES = pd.DataFrame([dict(task=t, pattern=p, share=v) for t in TASKS for p, v in PATTERNS])
ONE_SEED = MANY.sel(task="RTE", seed=0)
ALONE = MANY.sel(task="RTE", seed=0) | MANY.sel(task=NASTY, seed=1)
FULL = Masks([(label, Mask.full(UNITS)) for label, _ in MANY])

PRECISION = pd.DataFrame(
    [("full", .44, .38, .50), (NASTY, .61, .55, .67)], columns=["condition", "value", "low", "high"],
)
RATIOS = pd.DataFrame(
    [(NASTY, "target", 90.), (NASTY, "<u>", 1.03), ("random", "target", 1.), ("random", "<u>", 1.02)],
    columns=["under", "data", "ratio"],
)
PROBES = pd.DataFrame(
    [("subnetwork", NASTY, 1., 0, .7, 24), ("mlp", "", 0., 2, .5, 900), ("linear", "", 0., 0, .6, 0)],
    columns=["probe", "granularity", "lam", "rank", "score", "bits"],
)
LOSSES = pd.DataFrame(
    [("full", 1., .9), (NASTY, 3., .6), (NASTY, 2., .8)], columns=["method", "loss", "score"],
)
STEPS = np.arange(25, 401, 25)
LOG = pd.DataFrame(dict(step=STEPS, loss=4 * np.exp(-STEPS / 100), density=.5 - STEPS / 4000))
COURSE = pd.DataFrame({
    "seed": 0, "step": STEPS, "target": 1 + STEPS / 100, NASTY: 1.01, "sparsity": STEPS / 500, "chosen": STEPS == 300,
})
ANSWERS = pd.DataFrame(
    [("full", 1, "bird", .8), ("full", 2, NASTY, .1), (NASTY, 1, "fish", .6), (NASTY, 2, "bird", .3)],
    columns=["under", "rank", "token", "probability"],
)
TOKENS = ["[CLS]", "a", NASTY, "[MASK]", "[SEP]"]
MAPS = {n: (np.random.default_rng(i).dirichlet(np.ones(5), (3, 4, 5)), TOKENS) for i, n in enumerate(("full", NASTY))}
PLACES = np.random.default_rng(0).normal(size=(40, 2))
POINTS = pd.DataFrame(PLACES, columns=["x", "y"])
POINTS = POINTS.assign(relation=[NASTY, "IsA"] * 20, under=["full"] * 20 + ["<u>"] * 20)
DISTANCES = compare.jaccard(MANY.sel(task="RTE"), by="seed")
WORDS = ["[CLS]", "[MASK]", "."]
MAP = np.full((2, 4, 3, 3), 1 / 3)
WEIGHTS = pd.DataFrame(
    [(1, "q", h, 10, h) for h in (1, 2)] + [(1, NASTY, 0, 40, 9)],
    columns=["layer", "matrix", "head", "size", "kept"],
)
RANKED = pd.DataFrame(
    [("IsA", NASTY, "bird", "full", 3.), ("IsA", NASTY, "bird", "<u>", 1.), ("HasA", "car", "wheel", "full", 900.5)],
    columns=["relation", "sub", "obj", "mask", "rank"],
)

EXAMPLES = pd.DataFrame(
    [
        (NASTY, under, "a [MASK] of $x$", NASTY, i, token, .5 / i, 1)
        for under in ("full", "<u>")
        for i, token in ((1, NASTY), (2, "fin"))
    ],
    columns=["model", "under", "prompt", "obj", "place", "token", "probability", "rank"],
)
GAINS = pd.DataFrame(
    [("copa", NASTY, .1, .05, .15), ("copa", "IsA", .02, np.nan, np.nan), (NASTY, "IsA", -.1, -.2, -.01)],
    columns=["task", "relations", "mean", "low", "high"],
)
APART = pd.DataFrame(dict(under=["full", "<u>"], k=3, value=.6, low=.5, high=.7, chance=.4))

FIGURES = {
    "density": lambda: plots.density(MANY[0], NASTY),
    "densities": lambda: plots.densities({"one": MANY[0], NASTY: MANY[1]}),
    "jaccard": lambda: plots.jaccard(compare.jaccard(ALONE, by="task")),
    "survival": lambda: plots.survival(MANY.sel(task="RTE")),
    "survival of tasks": lambda: plots.survival(MANY),
    "survival, one seed": lambda: plots.survival(ONE_SEED),
    "overlap": lambda: plots.overlap(compare.overlap(MANY, by="task")),
    "overlap, one seed": lambda: plots.overlap(compare.overlap(MANY.sel(seed=0), by="task"), "mlp"),
    "consensus": lambda: plots.consensus(compare.consensus(MANY, samples=50)),
    "consensus, one seed": lambda: plots.consensus(compare.consensus(MANY.sel(seed=0)), units="heads"),
    "consensus, constant": lambda: plots.consensus(compare.consensus(FULL, "mlp")),
    "importance": lambda: plots.importance(SCORES),
    "importance of MLPs": lambda: plots.importance(SCORES, 1, kind="mlp"),
    "placement": lambda: plots.placement(WEIGHTS),
    "answer_map": lambda: plots.answer_map(RANKED),
    "answer_examples": lambda: plots.answer_examples(EXAMPLES, f"Picked by {NASTY}."),
    "gain_flows": lambda: plots.gain_flows(GAINS),
    "gain_flows, only losses": lambda: plots.gain_flows(GAINS.assign(mean=-.1, low=-.2, high=-.05)),
    "gain_map": lambda: plots.gain_map(GAINS),
    "relation_map": lambda: plots.relation_map(POINTS, APART),
    "bars": lambda: plots.bars(PRECISION, title="Macro P@1"),
    "tickets": lambda: plots.tickets(TABLE, label=NASTY),
    "tickets, interval": lambda: plots.tickets(TABLE, spread="interval", dots=False),
    "tickets, one seed": lambda: plots.tickets(TABLE[TABLE.seed == 0]),
    "tickets, undefined": lambda: plots.tickets(UNDEFINED),
    "removal": lambda: plots.removal(RATIOS, tolerance=.1),
    "pareto": lambda: plots.pareto(PROBES),
    "scatter": lambda: plots.scatter(LOSSES, "loss", "score", "method"),
    "curves": lambda: plots.curves({NASTY: LOG, "b": LOG}),
    "tradeoff": lambda: plots.tradeoff(COURSE, tolerance=.1),
    "predictions": lambda: plots.predictions(ANSWERS),
    "mask_attention": lambda: plots.mask_attention(MAPS),
    "tsne": lambda: plots.tsne(POINTS),
    "patterns": lambda: plots.patterns(SHARES, by="task"),
    "patterns side by side": lambda: plots.patterns(SHARES, by="task", stacked=False),
    "patterns of one": lambda: plots.patterns(SHARES[SHARES.task == "RTE"]),
}
figures = pytest.mark.parametrize("name", FIGURES)


@figures
def test_every_format(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f = FIGURES[name]()
        svg, page = f.save(tmp_path / "x.svg").read_text(), f.save(tmp_path / "x.html").read_text()
        assert f.save(tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
        assert f.save(tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")
    assert svg.count("<svg ") == 1
    for text in (page, svg):
        assert "<script>alert" not in text and Html.escape(f.alt) in text
    assert isinstance(f.data, pd.DataFrame) and len(f.data) and "nan" not in f.alt
    assert len(json.dumps(f._repr_mimebundle_())) < 300_000
    size = f.plotly.layout
    assert size.width < 2000 and size.height < 2000
    with pytest.raises(plots.CannotDraw, match=r"use one of \.html, \.svg, \.png, \.pdf"): f.save(tmp_path / "x.jpg")
    assert {p.name for p in tmp_path.iterdir()} == {"x.svg", "x.html", "x.png", "x.pdf"}      # nothing half-written


@figures
def test_heat_maps_have_a_labelled_scale_and_axes_a_name(name):
    f = FIGURES[name]()
    heat = [t for t in f.plotly.data if t.type == "heatmap"]
    for t in heat: assert f.plotly.layout[t.coloraxis].colorbar.title.text
    if heat or name.split(",")[0] in ("tsne", "relation_map", "curves", "removal", "tradeoff", "gain_flows"):
        return      # panels, or what lines lead from and to, are named instead
    assert f.plotly.layout.yaxis.title.text


def test_panels_are_named():
    for name in ("tsne", "curves", "removal", "tradeoff"):
        f = FIGURES[name]()
        panels = {(t.xaxis, t.yaxis) for t in f.plotly.data}
        assert len(f.plotly.layout.annotations) == len(panels) and all(a.text for a in f.plotly.layout.annotations)


def test_all_figures_in_one_report(tmp_path):
    risky = pd.DataFrame({"word": ["<script>alert(1)</script>", "x" * 80], "value": [.5, np.nan]})
    made = [make() for make in FIGURES.values()]
    figures = ("Figures", "What & where.\n\nMore.", [*made, plots.attention_pair(MAPS)])
    sections = [figures, ("Tables", "", [risky, MANY[0]])]
    page = plots.report(tmp_path / "report.html", "A <study>", sections, {"seeds": [0, 1]}).read_text()
    assert "How it was made" in page and "[0, 1]" in page
    assert "<script>alert" not in page and "x" * 80 in page and "A &lt;study&gt;" in page
    assert page.count('role="figure"') == len(made)
    assert page.count("<script>/**\n* plotly.js") == 1


def words(fig: plots.Figure) -> set[str]:
    "Texts inside the panels of a drawn figure."
    return {t.get_text() for ax in plots.draw(fig.plotly).axes for t in ax.texts}


def with_mode(fig: plots.Figure, mode: str) -> list[go.Scatter]:
    "Traces that are drawn as markers, lines or text."
    return [t for t in fig.plotly.data if getattr(t, "mode", None) == mode]


# ── what they show ───────────────────────────────────────────────────────────────────────────────────────────────────

def test_answers_by_hand():
    f = plots.answer_map(RANKED)
    assert np.allclose(np.array(f.plotly.data[0].z, float), [[1 / 3, 1], [1 / 900.5, np.nan]], equal_nan=True)
    assert "first under: full 0, <u> 1. Nobody answers HasA: car – wheel." in f.alt
    assert {"0.33", "rank 3", "rank 900.5"} <= words(f)


def test_survival_by_hand():
    f = plots.survival(MANY.sel(task="RTE"))
    heads, mlps = f.plotly.data
    bits = BITS[1].reshape(3, 3, 5)      # (seed, layer, unit)
    assert np.allclose(np.array(heads.z, float), bits.mean(0)[:, :4].T)
    assert np.allclose(np.array(mlps.z, float), bits.mean(0)[:, 4:].T)
    mean, std = bits.mean(0)[2, 0], bits.std(0, ddof=1)[2, 0]
    assert heads.text[0][2] == f'{mean:.2f}<br><span style="font-size:75%">± {std:.2f}</span>'
    assert {f"{mean:.2f}", f"± {std:.2f}"} <= words(f)


def test_survival_of_tasks_counts_them():
    every = plots.survival(MANY)
    counts = BITS.sum(0).reshape(3, 3, 5).mean(0)
    assert np.allclose(np.array(every.plotly.data[0].z, float), counts[:, :4].T)
    assert every.plotly.layout.coloraxis.cmax == 2
    assert f"Stable (kept in more than half of 2): {(BITS.sum(0).mean(0) > 1).sum()} of 15." in every.alt
    assert plots.survival(compare.survival_table(MANY)).alt == every.alt


def test_overlap_by_hand():
    f = plots.overlap(compare.overlap(MANY, by="task"))
    heads = BITS.reshape(2, 3, 3, 5)[..., :4].reshape(2, 3, 12)
    shared = np.einsum("asu,bsu->abs", heads, heads)
    assert np.allclose(np.array(f.plotly.data[0].z, float), shared.mean(-1))
    mean, std = shared[0, 1].mean(), shared[0, 1].std(ddof=1)
    chance = np.mean(heads[0].sum(1) * heads[1].sum(1) / 12)
    assert {f"{mean:.1f}", f"± {std:.1f}", f"({chance:.1f})"} <= words(f)
    assert not any("(" in f.plotly.data[0].text[i][i] for i in range(2))      # a task and itself: chance says nothing


def test_consensus_names_what_is_undefined():
    full = Masks([({"task": "full", "seed": s}, Mask.full(UNITS)) for s in range(3)])
    alone = Masks([({"task": "alone", "seed": 0}, MANY[0])])
    t = compare.consensus(MANY.sel(task="RTE") | full | alone)
    f = plots.consensus(t, units="heads")
    undefined = with_mode(f, "text")
    assert [len(x.x) for x in undefined] == [2, 1, 1] and "undefined" in words(f)      # κ twice
    assert "full κ undefined, raw agreement 1.00, prevalence 1.00" in f.alt
    assert "alone κ undefined, raw agreement undefined" in f.alt
    votes = np.array(f.plotly.data[-1].z, float)
    assert votes[1].tolist() == [0, 0, 0, 12] and np.isnan(votes[2]).tolist() == [False, False, True, True]
    kappa = next(x for x in f.plotly.data if x.error_x.array is not None)
    ends = [kappa.x[0] - kappa.error_x.arrayminus[0], kappa.x[0] + kappa.error_x.array[0]]
    assert np.allclose(ends, [t.low[0], t.high[0]])


def test_importance_by_hand():
    f = plots.importance(SCORES, remove=3)
    assert (f.data.removed_next.sum(), f.data.kept.sum()) == (3, 9)
    assert f.plotly.data[-1].x == (2, 2)      # scores 0, 1, 2 go
    first = {g.name: np.arange(g.size) < (g.name == "layer.0.head") for g in UNITS.groups}
    left = Mask.full(UNITS) - Mask.of(UNITS, first)
    assert plots.importance(SCORES, remove=3, alive=left).plotly.data[-1].x == (3, 3)
    ties = Scores(UNITS, {g.name: np.ones(g.size) for g in UNITS.groups})
    assert plots.importance(ties, remove=2).data.removed_next.sum() == 2


def test_tickets_by_hand():
    f = plots.tickets(TABLE)
    row = f.data[(f.data.task == "RTE") & (f.data.stage == "retrained")].iloc[0]
    s = TABLE[(TABLE.task == "RTE") & (TABLE.stage == "retrained")].score
    expected = (s.mean(), s.std(), s.mean() - s.std(), s.mean() + s.std(), 3)
    assert (row["mean"], row["std"], row.low, row.high, row.n) == pytest.approx(expected)
    drawn = plots.draw(f.plotly).axes[1]
    bars = {round(p.get_x() + p.get_width() / 2, 6): p.get_height() for p in drawn.patches}
    assert bars == pytest.approx({0: .13, 1 - .2: .63, 1 + .2: .63, 2: .13})      # two side by side
    assert [len(t.x) for t in with_mode(f, "markers")] == [12, 12]


def test_tickets_say_what_is_known_of_the_spread():
    once = plots.tickets(TABLE[TABLE.seed == 0]).data
    assert once["std"].isna().all() and (once.n == 1).all()
    wide = plots.tickets(TABLE, spread="interval").data
    narrow = plots.tickets(TABLE.assign(score=TABLE.score.round(0)), spread="interval").data
    assert ((wide.low <= wide["mean"]) & (wide["mean"] <= wide.high)).all() and (narrow.low == narrow.high).any()


def test_undefined_scores_are_named():
    f = plots.tickets(UNDEFINED)
    assert f.data.undefined.sum() == 6 and "6 undefined scores left out" in f.plotly.layout.title.text
    assert "good retrained undefined" in f.alt and "n/a" in words(f)
    some = TABLE.assign(score=TABLE.score.where((TABLE.stage != "retrained") | (TABLE.seed > 0)))
    data = plots.tickets(some).data
    assert (data[data.stage == "retrained"].n == 2).all() and data["mean"].notna().all()


def test_patterns_stand_on_each_other():
    drawn = plots.draw(plots.patterns(SHARES, by="task").plotly).axes[0]
    first = [p for p in drawn.patches if abs(p.get_x() + p.get_width() / 2) < .01]
    spans = sorted((round(p.get_y(), 6), round(p.get_y() + p.get_height(), 6)) for p in first)
    assert spans == [(0, .5), (.5, .8), (.8, 1)]
    assert {"0.50", "0.30", "0.20"} <= {t.get_text() for t in drawn.texts}
    side = plots.draw(plots.patterns(SHARES, by="task", stacked=False).plotly).axes[0]
    assert all(p.get_y() == 0 for p in side.patches) and len({round(p.get_x(), 6) for p in side.patches}) == 6


def test_colours_differ_in_greyscale():
    def grey(colour: str) -> float:
        rgb = plots.paper_color(colour)
        if isinstance(rgb, str): rgb = [int(rgb[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        return float(np.dot(rgb, (.299, .587, .114)))
    for colours in (plots.STAGES.values(), plots.shades(5)):
        light = sorted(map(grey, colours))
        assert min(np.diff(light)) > .1


def test_the_gathered_names_are_the_public_ones():
    before = (
        "PALETTE MARKERS DASHES ROLE_NAMES UNIT_NAMES STAGES UNPACKED STYLE POLICY Figure View CannotDraw "
        "style shades cells by_layer density densities jaccard survival overlap consensus importance placement "
        "bars tickets removal pareto scatter curves tradeoff predictions tsne patterns mask_attention "
        "attention attention_pair report draw"
    )
    assert set(before.split()) <= set(dir(plots)) and not any(n.startswith("_") for n in dir(plots))


# ── refused ──────────────────────────────────────────────────────────────────────────────────────────────────────────

LYING = go.Figure(go.Bar(x=[1], y=[2], orientation="h"))
RELATIVE = go.Figure(go.Bar(x=[1], y=[2]), layout_barmode="relative")
WORDED = go.Figure(go.Scatter(x=[1], y=[2], mode="markers+text", text=["a"]))
OTHER = Mask.full(unit_space(3, 5, mlps=True))


@pytest.mark.parametrize("wrong, error, says", [
    (lambda: plots.survival(MANY | MANY.sel(seed=0)), SubnetError, "equally many masks"),
    (lambda: plots.survival(MANY, over="sed"), UnknownName, "did you mean seed"),
    (lambda: plots.survival(TABLE), UnknownName, "unknown column"),
    (lambda: plots.overlap(compare.overlap(MANY, by="task"), "heads"), UnknownName, "did you mean head"),
    (lambda: plots.consensus(compare.agreement(MANY, by="task")), UnknownName, "unknown column 'seeds'"),
    (lambda: plots.importance(SCORES, remove=0), SubnetError, "remove must be a whole number of at least 1, got 0"),
    (lambda: plots.importance(SCORES, remove=12), SubnetError, "between 1 and 11"),
    (lambda: plots.importance(SCORES, alive=OTHER), SpaceMismatch, "different spaces"),
    (lambda: plots.importance(SCORES, kind="weight"), UnknownName, "Known: head, mlp"),
    (lambda: plots.tickets(pd.concat([TABLE, TABLE])), SubnetError, "several scores of"),
    (lambda: plots.tickets(TABLE[:0]), SubnetError, "no score"),
    (lambda: plots.tickets(TABLE, spread="sd"), UnknownName, "unknown spread"),
    (lambda: plots.tickets(TABLE.assign(stage="trained")), UnknownName, "did you mean retrained"),
    (lambda: plots.patterns(SHARES), SubnetError, "by="),
    (lambda: plots.patterns(SHARES.assign(share=SHARES.share * 100), "task"), SubnetError, r"are they in percent\?$"),
    (lambda: plots.patterns(SHARES.assign(share=SHARES.share * 1.5), "task"), SubnetError, "sums up to 1.5"),
    (lambda: plots.patterns(SHARES.assign(share=np.nan), "task"), SubnetError, "0…1"),
    (lambda: plots.scatter(LOSSES.assign(loss=0.), "loss", "score", "method", log=True), plots.CannotDraw, "log=False"),
    (lambda: plots.attention(MAP, WORDS[:-1]), BadMap, "for 2 tokens: give maps and tokens"),
    (lambda: plots.attention(-MAP, WORDS), BadMap, "negative values"),
    (lambda: plots.attention(MAP[0], WORDS), BadMap, "has shape"),
    (lambda: plots.attention_pair({}), SubnetError, "no attention to draw"),
    (lambda: plots.draw(LYING), plots.CannotDraw, "horizontal"),
    (lambda: plots.draw(RELATIVE), plots.CannotDraw, "relative"),
    (lambda: plots.draw(WORDED), plots.CannotDraw, "text alone"),
    (lambda: plots.report("r.html", "", [("", "", [3])]), SubnetError, "cannot put a int into a page"),
])
def test_refusals(wrong, error, says):
    with pytest.raises(error, match=says): wrong()


BROKEN = {      # figures of values, and the column or array that holds them
    "jaccard": lambda v: plots.jaccard(DISTANCES.assign(distance=v)),
    "survival": lambda v: plots.survival(compare.survival_table(MANY).assign(mean=v)),
    "placement": lambda v: plots.placement(WEIGHTS.assign(kept=v)),
    "predictions": lambda v: plots.predictions(ANSWERS.assign(probability=v)),
    "tsne": lambda v: plots.tsne(POINTS.assign(x=v)),
    "mask_attention": lambda v: plots.mask_attention({"full": (broken_map(v), WORDS)}),
    "attention": lambda v: plots.attention(broken_map(v), WORDS),
    "attention_pair": lambda v: plots.attention_pair({"a": (MAP, WORDS), "b": (broken_map(v), WORDS)}),
}
UNBOUNDED = {      # figures in which NaN says "undefined"
    "overlap": lambda v: plots.overlap(compare.overlap(MANY, by="task").assign(mean=v)),
    "consensus": lambda v: plots.consensus(compare.consensus(MANY, samples=50).assign(kappa=v)),
    "bars": lambda v: plots.bars(PRECISION.assign(value=v)),
    "bars, ends": lambda v: plots.bars(PRECISION.assign(high=v)),
    "removal": lambda v: plots.removal(RATIOS.assign(ratio=v)),
    "pareto": lambda v: plots.pareto(PROBES.assign(score=v)),
    "scatter": lambda v: plots.scatter(LOSSES.assign(score=v), "loss", "score", "method"),
}


def broken_map(value: float) -> np.ndarray:
    "Attention with one entry that is no number."
    out = MAP.copy()
    out[1, 2, 0, 1] = value
    return out


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [*BROKEN, *UNBOUNDED])
def test_what_is_not_finite_is_refused_by_name(name, value):
    make = (BROKEN | UNBOUNDED)[name]
    if name in UNBOUNDED and np.isnan(value): return
    with pytest.raises(SubnetError, match=r"not finite|infinite"): make(value)


def test_undefined_bars_are_said():
    f = plots.bars(PRECISION.assign(value=[.4, np.nan]))
    assert "undefined" in f.alt and "nan" not in f.alt


def test_curves_leave_out_what_is_infinite():
    log = pd.DataFrame(dict(step=[1, 2, 3], loss=[2., np.inf, 1.]))
    assert plots.curves(log).data.value.tolist() == [2, 1]
    assert np.isfinite(plots.tradeoff(COURSE.assign(target=[np.inf, *STEPS[1:]])).plotly.data[0].y.astype(float)).all()


def test_pairs_of_empty_masks_are_counted():
    "As the MLPs of a task of which some seeds keep none: near each other by distance, and no agreement by kappa."
    none = Mask.full(UNITS, False)
    some = [({"task": "WNLI", "seed": s}, none if s < 3 else mask(BITS[0, 0])) for s in range(5)]
    t = compare.consensus(Masks(some), samples=50)
    assert t.empty_pairs.item() == 3
    assert compare.said_of_empty_pairs(t) == [
        "WNLI: of 3 of 10 pairs both masks keep nothing; they count as equal (Jaccard distance 0)."
    ]
    assert "3 pairs of masks that keep nothing" in plots.consensus(t).alt
    pairs = compare.jaccard(Masks(some), by="seed")
    assert pairs[pairs["empty"] > 0][["a", "b"]].to_numpy().max() == 2
    assert "both masks keep nothing" in plots.jaccard(pairs).alt
    assert (compare.consensus(MANY, samples=50).empty_pairs == 0).all()


# ── letters of other scripts ─────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def chinese() -> go.Figure:
    "A figure with letters in its title, its ticks and its legend that matplotlib's own font lacks."
    fig = go.Figure(go.Scatter(x=["甲", "乙", "three"], y=[1, 2, 3], name="關係"))
    return fig.update_layout(title_text="網路", showlegend=True)


LETTERS = "甲乙關係網路"


def font_with(letters: str, path: Path) -> Path:
    "Write a font whose every letter is a square."
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 700), (800, 700), (800, 0)): pen.lineTo(corner)
    pen.closePath()
    names = [".notdef", *(f"sign{i}" for i in range(len(letters)))]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap(dict(zip(map(ord, letters), names[1:], strict=True)))
    font.setupGlyf(dict.fromkeys(names, pen.glyph()))
    font.setupHorizontalMetrics(dict.fromkeys(names, (900, 100)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Squares", "styleName": "Regular", "psName": "Squares-Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)
    return path


def test_letters_that_no_font_has(chinese, monkeypatch):
    from matplotlib.font_manager import fontManager
    known = [e for e in fontManager.ttflist if "DejaVu" in e.name or "Last Resort" in e.name]
    monkeypatch.setattr(fontManager, "ttflist", known)
    for kind in ("png", "pdf"):
        with pytest.raises(CannotDraw, match=r"no font of this machine has .*Noto Sans CJK"):
            print_plotly(chinese, "", kind)
    body = print_plotly(chinese, "", "svg").decode().partition("</metadata>")[2]
    words = "".join(re.findall(r"<text[^>]*>([^<]*)", body))
    assert set(LETTERS) <= set(words)      # which the reader's font spells


def test_letters_of_another_font(chinese, monkeypatch, tmp_path):
    from matplotlib import rcParams
    from matplotlib.font_manager import fontManager
    known = [e for e in fontManager.ttflist if "DejaVu" in e.name or "Last Resort" in e.name]
    monkeypatch.setattr(fontManager, "ttflist", known)
    fontManager.addfont(font_with(LETTERS, tmp_path / "squares.ttf"))
    before = rcParams["font.family"]
    with warnings.catch_warnings(action="error"):
        assert print_plotly(chinese, "", "png").startswith(b"\x89PNG")
        svg = print_plotly(chinese, "", "svg").decode()
    assert "Squares" in svg and "<text" not in svg and rcParams["font.family"] == before
