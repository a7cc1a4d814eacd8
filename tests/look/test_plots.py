"Figures of masks over tasks and seeds: what they show is what was computed, in every format, with any label."
from __future__ import annotations

import html
import json
import warnings

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from subnet_explorer import compare, plots
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.scores import Scores
from subnet_explorer.core.masks import Masks
from subnet_explorer.core.errors import SpaceMismatch, SubnetError, UnknownName
from subnet_explorer.core.space import unit_space

UNITS = unit_space(3, 4, mlps=True)
NASTY = "<b>Co$L$A</b> & </script><script>alert(1)</script>"
BITS = np.random.default_rng(0).integers(0, 2, (2, 3, 15))                      # (task, seed, unit)


def mask(row: np.ndarray) -> Mask: return Mask.of(UNITS, {g.name: row[5 * g.layer + (4 if g.kind == "mlp" else 0):][:g.size].astype(bool) for g in UNITS.groups})
MANY = Masks([({"task": t, "seed": s}, mask(BITS[i, s])) for i, t in enumerate((NASTY, "RTE")) for s in range(3)])
SCORES = Scores(UNITS, {g.name: np.arange(g.size) + 10. * g.layer for g in UNITS.groups})
TABLE = pd.DataFrame([dict(task=t, seed=s, kind=k, stage=g, score=(k == "good") * .5 + .1 * s + .01 * len(t)) for t in (NASTY, "RTE") for k, g in (("full", "full"), ("good", "pruned"), ("good", "retrained"), ("super-<i>", "pruned")) for s in range(3)])
SHARES = pd.DataFrame([dict(task=t, pattern=p, share=v) for t in (NASTY, "RTE") for p, v in (("block", .5), ("diagonal", .3), ("<u>other", .2))])

FIGURES = {
    "survival": lambda: plots.survival(MANY.sel(task="RTE")), "survival of tasks": lambda: plots.survival(MANY), "survival, one seed": lambda: plots.survival(MANY.sel(task="RTE", seed=0)),
    "overlap": lambda: plots.overlap(compare.overlap(MANY, by="task")), "overlap, one seed": lambda: plots.overlap(compare.overlap(MANY.sel(seed=0), by="task"), "mlp"),
    "consensus": lambda: plots.consensus(compare.consensus(MANY, samples=50)), "consensus, one seed": lambda: plots.consensus(compare.consensus(MANY.sel(seed=0)), units="heads"),
    "consensus, constant": lambda: plots.consensus(compare.consensus(Masks([(l, Mask.full(UNITS)) for l, _ in MANY]), "mlp")),
    "importance": lambda: plots.importance(SCORES), "importance of MLPs": lambda: plots.importance(SCORES, 1, kind="mlp"),
    "tickets": lambda: plots.tickets(TABLE, label=NASTY), "tickets, interval": lambda: plots.tickets(TABLE, spread="interval", dots=False), "tickets, one seed": lambda: plots.tickets(TABLE[TABLE.seed == 0]),
    "tickets, undefined": lambda: plots.tickets(TABLE.assign(score=TABLE.score.where(TABLE.stage != "retrained"))),
    "patterns": lambda: plots.patterns(SHARES, by="task"), "patterns side by side": lambda: plots.patterns(SHARES, by="task", stacked=False), "patterns of one": lambda: plots.patterns(SHARES[SHARES.task == "RTE"]),
}
figures = pytest.mark.parametrize("name", FIGURES)


@figures
def test_every_format(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f = FIGURES[name]()
        svg, page = f.save(tmp_path / "x.svg").read_text(), f.save(tmp_path / "x.html").read_text()
        assert f.save(tmp_path / "x.png").read_bytes().startswith(b"\x89PNG") and f.save(tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")
    assert "<script>alert" not in page and "<script>alert" not in svg and html.escape(f.alt, quote=True) in page and html.escape(f.alt, quote=True) in svg
    assert isinstance(f.data, pd.DataFrame) and len(f.data) and "nan" not in f.alt and len(json.dumps(f._repr_mimebundle_())) < 300_000
    size = f.plotly.layout
    assert size.width < 2000 and size.height < 2000


@figures
def test_heat_maps_have_a_labelled_scale_and_axes_a_name(name):
    f = FIGURES[name]()
    for t in f.plotly.data:
        if t.type == "heatmap": assert f.plotly.layout[t.coloraxis].colorbar.title.text
    if not any(t.type == "heatmap" for t in f.plotly.data): assert f.plotly.layout.yaxis.title.text


def words(fig: plots.Figure) -> set[str]: return {t.get_text() for ax in plots.draw(fig.plotly).axes for t in ax.texts}
def mode(trace) -> str | None: return getattr(trace, "mode", None)


# ── what they show ───────────────────────────────────────────────────────────────────────────────────────────────────

def test_survival_by_hand():
    f = plots.survival(MANY.sel(task="RTE"))
    heads, mlps = f.plotly.data
    bits = BITS[1].reshape(3, 3, 5)                                                # (seed, layer, unit)
    assert np.allclose(np.array(heads.z, float), bits.mean(0)[:, :4].T) and np.allclose(np.array(mlps.z, float), bits.mean(0)[:, 4:].T)
    mean, std = bits.mean(0)[2, 0], bits.std(0, ddof=1)[2, 0]
    assert heads.text[0][2] == f'{mean:.2f}<br><span style="font-size:75%">± {std:.2f}</span>' and {f"{mean:.2f}", f"± {std:.2f}"} <= words(f)
    every = plots.survival(MANY)
    assert np.allclose(np.array(every.plotly.data[0].z, float), BITS.sum(0).reshape(3, 3, 5).mean(0)[:, :4].T) and every.plotly.layout.coloraxis.cmax == 2
    assert f"Stable (kept in more than half of 2): {(BITS.sum(0).mean(0) > 1).sum()} of 15." in every.alt
    assert plots.survival(compare.survival_table(MANY)).alt == every.alt


def test_overlap_by_hand():
    f = plots.overlap(compare.overlap(MANY, by="task"))
    heads = BITS.reshape(2, 3, 3, 5)[..., :4].reshape(2, 3, 12)
    shared = np.einsum("asu,bsu->abs", heads, heads)
    assert np.allclose(np.array(f.plotly.data[0].z, float), shared.mean(-1))
    chance = np.mean(heads[0].sum(1) * heads[1].sum(1) / 12)
    assert {f"{shared[0, 1].mean():.1f}", f"± {shared[0, 1].std(ddof=1):.1f}", f"({chance:.1f})"} <= words(f)
    assert not any("(" in f.plotly.data[0].text[i][i] for i in range(2))           # a task and itself: chance says nothing


def test_consensus_names_what_is_undefined():
    t = compare.consensus(Masks([*((l, m) for l, m in MANY.sel(task="RTE")), *(({"task": "full", "seed": s}, Mask.full(UNITS)) for s in range(3)), ({"task": "alone", "seed": 0}, MANY[0])]))
    f = plots.consensus(t, units="heads")
    assert sum(mode(x) == "text" for x in f.plotly.data) == 3 and "undefined" in words(f)               # κ twice; raw agreement, distance
    assert [len(x.x) for x in f.plotly.data if mode(x) == "text"] == [2, 1, 1]
    assert "full κ undefined, raw agreement 1.00, prevalence 1.00" in f.alt and "alone κ undefined, raw agreement undefined" in f.alt
    votes = np.array(f.plotly.data[-1].z, float)
    assert votes[1].tolist() == [0, 0, 0, 12] and np.isnan(votes[2]).tolist() == [False, False, True, True]
    kappa = next(x for x in f.plotly.data if x.error_x.array is not None)
    assert np.allclose([kappa.x[0] - kappa.error_x.arrayminus[0], kappa.x[0] + kappa.error_x.array[0]], [t.low[0], t.high[0]])


def test_importance_by_hand():
    f = plots.importance(SCORES, remove=3)
    assert (f.data.removed_next.sum(), f.data.kept.sum()) == (3, 9) and f.plotly.data[-1].x == (2, 2)   # scores 0, 1, 2 go
    gone = Mask.full(UNITS) - Mask.of(UNITS, {g.name: np.arange(g.size) < (g.name == "layer.0.head") for g in UNITS.groups})
    assert plots.importance(SCORES, remove=3, alive=gone).plotly.data[-1].x == (3, 3)
    ties = Scores(UNITS, {g.name: np.ones(g.size) for g in UNITS.groups})
    assert plots.importance(ties, remove=2).data.removed_next.sum() == 2


def test_tickets_by_hand():
    f = plots.tickets(TABLE)
    row = f.data[(f.data.task == "RTE") & (f.data.stage == "retrained")].iloc[0]
    s = TABLE[(TABLE.task == "RTE") & (TABLE.stage == "retrained")].score
    assert (row["mean"], row["std"], row.low, row.high, row.n) == pytest.approx((s.mean(), s.std(), s.mean() - s.std(), s.mean() + s.std(), 3))
    drawn = plots.draw(f.plotly).axes[1]
    bars = {round(p.get_x() + p.get_width() / 2, 6): p.get_height() for p in drawn.patches}
    assert bars == pytest.approx({0: .13, 1 - .2: .63, 1 + .2: .63, 2: .13})                            # two stages side by side, alone in the middle
    assert sum(mode(t) == "markers" for t in f.plotly.data) == 2 and [len(t.x) for t in f.plotly.data if mode(t) == "markers"] == [12, 12]
    once = plots.tickets(TABLE[TABLE.seed == 0]).data
    assert once["std"].isna().all() and (once.n == 1).all()
    wide, narrow = (plots.tickets(t, spread="interval").data for t in (TABLE, TABLE.assign(score=TABLE.score.round(0))))
    assert ((wide.low <= wide["mean"]) & (wide["mean"] <= wide.high)).all() and (narrow.low == narrow.high).any()


def test_undefined_scores_are_named():
    f = FIGURES["tickets, undefined"]()
    assert f.data.undefined.sum() == 6 and "6 undefined scores left out" in f.plotly.layout.title.text and "good retrained undefined" in f.alt and "n/a" in words(f)
    some = plots.tickets(TABLE.assign(score=TABLE.score.where((TABLE.stage != "retrained") | (TABLE.seed > 0))))
    assert (some.data[some.data.stage == "retrained"].n == 2).all() and some.data["mean"].notna().all()


def test_patterns_stand_on_each_other():
    drawn = plots.draw(plots.patterns(SHARES, by="task").plotly).axes[0]
    spans = sorted((round(p.get_y(), 6), round(p.get_y() + p.get_height(), 6)) for p in drawn.patches if abs(p.get_x() + p.get_width() / 2) < .01)
    assert spans == [(0, .5), (.5, .8), (.8, 1)] and {"0.50", "0.30", "0.20"} <= {t.get_text() for t in drawn.texts}
    side = plots.draw(plots.patterns(SHARES, by="task", stacked=False).plotly).axes[0]
    assert all(p.get_y() == 0 for p in side.patches) and len({round(p.get_x(), 6) for p in side.patches}) == 6


def test_colours_differ_in_greyscale():
    grey = lambda c: float(np.dot(plots.paper_color(c) if not c.startswith("#") else [int(c[i:i + 2], 16) / 255 for i in (1, 3, 5)], (.299, .587, .114)))
    for colours in (plots.STAGES.values(), plots.shades(5)):
        light = sorted(map(grey, colours))
        assert min(np.diff(light)) > .1


# ── refused ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("wrong, error, says", [
    (lambda: plots.survival(MANY | MANY.sel(seed=0)), SubnetError, "equally many masks"),
    (lambda: plots.survival(MANY, over="sed"), UnknownName, "did you mean seed"),
    (lambda: plots.survival(TABLE), UnknownName, "unknown column"),
    (lambda: plots.overlap(compare.overlap(MANY, by="task"), "heads"), UnknownName, "did you mean head"),
    (lambda: plots.consensus(compare.agreement(MANY, by="task")), UnknownName, "unknown column 'seeds'"),
    (lambda: plots.importance(SCORES, remove=0), SubnetError, "cannot mark 0 of 12 heads"),
    (lambda: plots.importance(SCORES, remove=12), SubnetError, "between 1 and 11"),
    (lambda: plots.importance(SCORES, alive=Mask.full(unit_space(3, 5, mlps=True))), SpaceMismatch, "different spaces"),
    (lambda: plots.importance(SCORES, kind="weight"), UnknownName, "Known: head, mlp"),
    (lambda: plots.tickets(pd.concat([TABLE, TABLE])), SubnetError, "several scores of"),
    (lambda: plots.tickets(TABLE[:0]), SubnetError, "no score"),
    (lambda: plots.tickets(TABLE, spread="sd"), UnknownName, "unknown spread"),
    (lambda: plots.tickets(TABLE.assign(stage="trained")), UnknownName, "did you mean retrained"),
    (lambda: plots.patterns(SHARES), SubnetError, "by="),
    (lambda: plots.patterns(SHARES.assign(share=SHARES.share * 100), "task"), SubnetError, "percent"),
    (lambda: plots.patterns(SHARES.assign(share=SHARES.share * 1.5), "task"), SubnetError, "sums up to 1.5"),
    (lambda: plots.patterns(SHARES.assign(share=np.nan), "task"), SubnetError, "0…1"),
    (lambda: plots.draw(go.Figure(go.Bar(x=[1], y=[2], orientation="h"))), plots.CannotDraw, "horizontal"),
    (lambda: plots.draw(go.Figure(go.Bar(x=[1], y=[2]), layout_barmode="relative")), plots.CannotDraw, "relative"),
    (lambda: plots.draw(go.Figure(go.Scatter(x=[1], y=[2], mode="markers+text", text=["a"]))), plots.CannotDraw, "text alone"),
])
def test_refusals(wrong, error, says):
    with pytest.raises(error, match=says): wrong()
