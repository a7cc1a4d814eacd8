"One rule for undefined scores, in tables and figures of every recipe: left out, and counted."
from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from subnet_explorer.core.intervals import defined_interval, left_out
from subnet_explorer.look import curves
from subnet_explorer.recipes.tasks import BASELINES

probe, tamt, tickets = (importlib.import_module(f"subnet_explorer.recipes.{n}") for n in ("probe", "tamt", "tickets"))

SCORES = [.6, .6, np.nan]
EXPECTED = {"mean": pytest.approx(.6), "n": 2, "undefined": 1}


def of(row: Any) -> dict[str, Any]:
    "Mean, number and undefined ones of a row or dict."
    return {key: row[key] for key in EXPECTED}


def by_seed(**labels: Any) -> pd.DataFrame: return pd.DataFrame({"seed": range(3), "score": SCORES, **labels})


def test_the_function():
    found = defined_interval(SCORES)
    assert of(found) == EXPECTED and (found["std"], found["low"]) == (pytest.approx(0), pytest.approx(.6))
    assert of(defined_interval([.6, .6, np.inf])) == EXPECTED
    assert left_out(found["undefined"]) == "1 undefined score left out" and not left_out(0)


def test_tickets_in_table_and_figure():
    scores = by_seed(task="t", kind="good", stage="pruned", epochs=3, note="", density=.5, density_weights=.5,
                     density_model=.6)
    bars = pd.DataFrame(columns=BASELINES)
    study: Any = SimpleNamespace(scores=scores, plan=SimpleNamespace(epochs=3), tables={"baselines": bars})
    found = tickets.summary(study)
    assert of(found.iloc[0]) == EXPECTED
    assert [tickets._mean_text(row) for row in found.itertuples()] == ["0.600 ± 0.000 (1 undefined)"]
    for spread in ("std", "interval"):
        figure = curves.tickets(scores, spread=spread)
        bar = figure.data.iloc[0]
        assert of(bar) == EXPECTED and "1 undefined score left out" in figure.alt
        assert (bar.low, bar.high) == (pytest.approx(.6), pytest.approx(.6))
        assert len(figure.plotly.data[-1].y) == 2                                    # a dot for each defined one


def test_tamt_over_masks_and_by_task():
    runs = by_seed(method="imp", density=.5, step=4, tuning_seed=0, task="t")
    assert of(tamt.over_masks(runs)) == EXPECTED
    one = tamt.over_masks(runs.assign(seed=0, tuning_seed=range(3)))
    assert of(one) == EXPECTED | {"n": 1} and one["tuning_seeds"] == 2
    found = pd.DataFrame({"method": "imp", "density": .5, "seed": range(3), "steps": 4})
    study: Any = SimpleNamespace(scores=found, transfer=runs)
    task = tamt.by_task(study, "t", "imp", .5)
    assert (task["mean"], task["undefined"], task["scores"]) == (pytest.approx(.6), 1, [.6, .6, None])
    assert tamt._undefined(runs) == ("1 undefined score left out of means and intervals.",)


def test_probes_in_summary_and_notes():
    cells = by_seed(probe="mlp", granularity="", lam=0.0, rank=8, density=np.nan, bits=9.0, layers=None, empty=None)
    study: Any = SimpleNamespace(scores=cells, config={})
    row = probe.summary(study).iloc[0]
    assert of(row.rename({"score": "mean"})) == EXPECTED
    assert (row.low, row.high) == (pytest.approx(.6), pytest.approx(.6))
    assert "1 undefined score left out of means and intervals." in probe.notes(study)
    some = SimpleNamespace(scores=cells.assign(score=.5), config={})
    assert "undefined" not in probe.summary(some) and not probe.notes(some)
