"The papers' settings: what `published=True` sets, what it leaves alone, and that the rest is said."
from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from floors import any_floor

from subnet_explorer.cli import main
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.masks import Masks
from subnet_explorer.core.space import Space
from subnet_explorer.data.facts import read_facts
from subnet_explorer.data.parts import task_data
from subnet_explorer.data.sentences import read_conllu
from subnet_explorer.data.texts import read_texts
from subnet_explorer.model.load import load
from subnet_explorer.recipes import lamp, tickets
from subnet_explorer.recipes.clauses import NOTHING, SETTING, SWITCH, Clause, alike, departures
from subnet_explorer.recipes.lamp import Start, mean_logit, steps_of
from subnet_explorer.recipes.probes import steps_of as probe_steps
from subnet_explorer.recipes.start import Order, order, recipe_options
from subnet_explorer.recipes.study import find_recipe
from subnet_explorer.recipes.tuning import training_of

RECIPES = ("lamp", "complete", "mine", "tickets", "critical", "probe", "tamt")
DATA: dict[str, list[str]] = {
    "lamp": ["--facts", "pocket"],
    "complete": ["--triples", "pocket", "--masks", "runs/lamp"],
    "mine": ["--facts", "pocket", "--masks", "runs/lamp"],
    "tickets": ["--tasks", "pocket:entails"],
    "critical": ["--target", "pocket", "--control", "pocket", "--text", "pocket"],
    "probe": ["--task", "pos", "--train", "pocket", "--dev", "pocket"],
    "tamt": ["--text", "pocket"],
}
"What every recipe must be told."

PAPERS: dict[str, dict[str, Any]] = {
    "lamp": dict(
        epochs=6, lr=3e-4, batch=32, clip=5, seeds=[0, 1, 2], shared_init=False, layers="top-half", sparsity=0.5,
        method="deterministic", random=5, mismatched=True,
    ),
    "mine": {},
    "complete": dict(one_word=True, two_hop=["IsA", "HasProperty"], several=None),
    "tickets": dict(
        on_dev=True, mode="cumulative", normalise="published", seeds=[1337, 42, 86, 71, 166], epochs=3, lr=2e-5,
        batch=32, drop=0.1, floor=0.9, kind="head+mlp", supers=True,
    ),
    "critical": dict(
        steps=40_000, lr=0.2, noise="independent", filtered=False, checks=200, seeds=[735, 1318, 84], weights=None,
        density_weights=[2, 3], batches=[250, 10], layers="top-half", granularity="weight", position="predict_tail",
    ),
    "probe": dict(
        epochs=30, lr=0.2, head_lr=5e-5, tune_lr=5e-5, batch=32, init="framework", lambdas=[1], ranks=[768],
        dropout=True, longest=128, granularity=["neuron"], baselines=["mlp", "linear", "finetune", "reset"],
    ),
    "tamt": dict(
        steps=27_920, lr=5e-5, batch=16, clip=1, densities=[0.5, 0.4, 0.3, 0.2, 0.1], matched=True, padding=True,
        seeds=[1, 2, 3], tuning_seeds=[1, 2, 3], tuning={"dropout": True, "head_dropout": 0.1}, init="magnitude",
        scope="tensor", embeddings=True, head=True, interval=None, drop=0.1, rewind=True, every=1,
    ),
}
"Every setting that decides about the published numbers, as papers and released code have it."

ALL = [(name, c) for name in RECIPES for c in find_recipe(name).clauses]
CLAUSES = [pytest.param(name, c, id=f"{name}-{c.name}") for name, c in ALL]
SET = [pytest.param(name, c, id=f"{name}-{c.name}") for name, c in ALL if c.by == SETTING]


def ordered(name: str, *words: str, **written: Any) -> Order:
    return order(find_recipe(name), ["--model", "some/bert", "--out", "out", *DATA[name], *words], written)


def effective(values: Mapping[str, Any], name: str) -> Any:
    setting, _, inner = name.partition(".")
    return values[setting][inner] if inner else values[setting]


# ── by the shell and by files ────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_is_the_paper_s(name):
    "Against numbers that were typed from the papers, not against the clauses."
    values = ordered(name, "--published").values
    wrong = {key: values[key] for key, value in PAPERS[name].items() if not alike(values[key], value)}
    assert not wrong and values["published"] is True
    assert alike(ordered(name, published=True).values, values)


@pytest.mark.parametrize("name, clause", SET)
def test_a_clause_sets_what_was_not_given(name, clause):
    given = [f"--{key}={value}" for key, value in clause.when.items()]
    assert alike(effective(ordered(name, "--published", *given).values, clause.name), clause.published)
    typed = PAPERS[name]
    if clause.setting in typed and not clause.when: assert alike(effective(typed, clause.name), clause.published)
    own = {"seeds": "7", "tuning_seeds": "7", "tuning.dropout": "false", "tuning.head_dropout": "0.5", "mode": "batch",
           "on_dev": "", "shared_init": "", "filtered": "", "matched": "", "padding": "", "normalise": "layer",
           "noise": "shared", "init": "architecture", "densities": "0.7", "epochs": "2", "clip": "2", "steps": "3",
           "checks": "3", "lr": "0.5", "sparsity": "0.25", "dropout": "", "one_word": ""}[clause.name]
    setting, dot, inner = clause.name.partition(".")
    flag = setting.replace("_", "-") + dot + inner
    no = "no-" if own == "" and clause.published else ""
    said = [f"--{no}{flag}", *([own] if own else [])]
    values = ordered(name, *said, "--published", *given).values
    assert not alike(effective(values, clause.name), clause.published)
    only = [c.name for c in find_recipe(name).clauses if c.by == SETTING and c.name != clause.name and not c.when]
    assert all(alike(effective(values, other), effective(typed, other)) for other in only)


@pytest.mark.parametrize("name, clause", SET)
def test_our_side_is_the_default(name, clause):
    "So that no table grows stale."
    defaults = {option.name: option.default for option in recipe_options(find_recipe(name))}
    if clause.unless:
        assert defaults[clause.name] is None
        assert clause.ours.replace(",", "") == f"{defaults[clause.unless]} {clause.unless}"
    elif clause.name == "init" or "." in clause.name: assert defaults[clause.setting] is None
    else: assert alike(defaults[clause.name], clause.ours)


@pytest.mark.parametrize("name, clause", CLAUSES)
def test_a_clause_says_where_and_its_setting_says_published(name, clause):
    assert clause.where and (clause.by == SETTING or not alike(clause.ours, clause.published))
    helps = {option.name: option.help for option in recipe_options(find_recipe(name))}
    if clause.by == SETTING: assert "published" in helps[clause.setting], clause.name
    if clause.by == NOTHING: assert clause.name in find_recipe(name).departures
    assert "published" in helps and all(c in repr(find_recipe(name)) for c in find_recipe(name).departures)


def test_steps_stand_in_for_epochs():
    for name, steps in (("lamp", 9), ("probe", 9)):
        values = ordered(name, "--published", "--steps", str(steps)).values
        assert values["steps"] == steps and values["epochs"] is None
    again = order(find_recipe("lamp"), [], dict(ordered("lamp", "--published", "--steps", "9").values)).values
    assert again["epochs"] is None and again["steps"] == 9
    assert ordered("lamp", "--steps", "9", "--epochs", "2", "--published").values["epochs"] == 2


def test_a_soft_search_starts_with_thirty_per_cent():
    values = ordered("lamp", "--published", "--method", "stochastic").values
    assert values["sparsity"] == 0.3
    assert ordered("lamp", "--method", "stochastic").values["sparsity"] == 0.5


def test_pocket_settings_give_way():
    words = ["--model", "pocket-gpt2", "--out", "out", *DATA["critical"]]
    assert order(find_recipe("critical"), words).values["steps"] == 600
    assert order(find_recipe("critical"), [*words, "--published"]).values["steps"] == 40_000


@pytest.mark.parametrize("name", RECIPES)
def test_the_shell_knows_it(name, capsys):
    assert main([name, "--help"]) == 0
    assert "--published" in capsys.readouterr().out


# ── by a call ────────────────────────────────────────────────────────────────────────────────────────────────────────

class Asked(Exception):
    "Ends a recipe where its bench is opened, with what it was asked for."


def called(name: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    "Settings and data with which a recipe opens its bench."
    def bench(config: Any, to: Any, progress: Any, data: Any, asked: Any) -> None: raise Asked(asked, data)
    monkeypatch.setattr(sys.modules[f"subnet_explorer.recipes.{name}"], "Bench", bench)
    model, tok = load("pocket-bert")
    facts, lines = read_facts("pocket", "MadeOf"), read_texts("pocket")[:40]
    sentences, target = read_conllu("pocket", part="train")[:40], read_facts("pocket", "IsA")
    made = Mask.random(Space.of(model, "weight", layers="top-half"), .5, seed=0)
    data: dict[str, tuple[Any, ...]] = {
        "mine": (facts, Masks([({"task": "MadeOf", "seed": 0}, made)])),
        "lamp": (facts,), "tickets": ({"entails": task_data("pocket:entails", on_dev=settings.pop("on_dev", False))},),
        "critical": (replace(target, items=target.items[:3]), facts, lines), "probe": ("pos", sentences, sentences),
        "tamt": (lines, lines), "complete": (facts, Masks([({"task": "MadeOf", "seed": 0}, made)])),
    }
    with pytest.raises(Asked) as stopped: find_recipe(name).run(model, tok, *data[name], **settings)
    return stopped.value.args


@pytest.mark.parametrize("name", RECIPES)
def test_a_call_is_the_same_as_the_shell(name, monkeypatch):
    asked, data = called(name, monkeypatch, published=True)
    clauses = find_recipe(name).clauses
    assert set(inspect.signature(find_recipe(name).run).parameters) >= {c for c in asked if c != "task"}
    for key, value in PAPERS[name].items():
        if key in ("interval", "weights") or key not in asked: continue
        assert alike(asked[key], value), key
    left = {d.name for d in departures(clauses, asked, data)}
    always = {c.name for c in clauses if c.by == NOTHING and c.applies(asked)}
    assert left == always | ({"on_dev"} if name == "tickets" else set())


def test_searching_on_the_reported_sentences_is_seen(monkeypatch):
    asked, data = called("tickets", monkeypatch, published=True, on_dev=True)
    assert "on_dev" not in {d.name for d in departures(find_recipe("tickets").clauses, asked, data)}
    asked, data = called("tickets", monkeypatch, on_dev=True)
    names = {d.name for d in departures(find_recipe("tickets").clauses, asked, data)}
    switched = {c.name for c in find_recipe("tickets").clauses if c.by == SWITCH}
    assert "on_dev" not in names and {"mode", "seeds", *switched} <= names and "biases" not in names
    asked, data = called("tickets", monkeypatch, kind="weight")
    assert "biases" in {d.name for d in departures(find_recipe("tickets").clauses, asked, data)}


# ── what the settings do ─────────────────────────────────────────────────────────────────────────────────────────────

def test_soft_gates_remove_their_share_in_expectation(pocket_bert):
    draws = np.random.default_rng(0).normal(size=400_000)
    for kept in (0.5, 0.7, 0.9, 0.05): assert (1 / (1 + np.exp(-(draws + mean_logit(kept))))).mean() == pytest.approx(
        kept, abs=2e-3)
    assert str(mean_logit(0.5)) == "-0.0"      # what earlier runs have on record
    space = Space.of(pocket_bert[0], "weight", layers="top-half")
    gate = Start(space, "stochastic", 0.3, True, ["MadeOf"]).gate("MadeOf", 0)
    values = np.concatenate([v.ravel() for v in gate.soft().values.values()])
    assert 1 - values.mean() == pytest.approx(0.3, abs=5e-3)


def test_epochs_are_passes_over_the_training_facts():
    assert steps_of({"epochs": 6, "batch": 32, "steps": 400}, 65) == (18, 3)
    assert steps_of({"epochs": None, "batch": 32, "steps": 400}, 65) == (400, 50)
    assert probe_steps(2000, 30, 32, 12_541) == 30 * 391 and probe_steps(2000, None, 32, 12_541) == 2000
    assert probe_steps(2000, 1, 32, 5) == 1


def test_heads_have_dropout_as_published():
    assert training_of(3, 2e-5, 32, 128, None, True)["head_dropout"] == 0.1
    assert "head_dropout" not in training_of(3, 2e-5, 32, 128, None)


# ── what a study says ────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def study(tmp_path_factory, pocket_bert):
    to = tmp_path_factory.mktemp("published") / "study"
    facts = read_facts("pocket", "MadeOf,Desires")
    return lamp(*pocket_bert, facts, published=True, steps=3, lr=0.01, seeds=(0,), random=1, to=to, progress=False)


def test_a_study_says_that_it_is_as_published_and_what_is_not(study, tmp_path):
    assert study.config["published"] is True and study.config["clip"] == 5 and study.config["shared_init"] is False
    names = [d.name for d in study.departures]
    assert names == ["epochs", "lr", "seeds", "batches", "split", "ranks", "answers", "fine-tuned models"]
    written = json.loads((study.folder / "results.json").read_text())
    assert written["config"]["published"] is True
    assert written["departures"] == study.to_json()["departures"]
    rows = {row["what"]: row for row in written["departures"]}
    assert rows["epochs"]["here"] == "steps 3" and rows["lr"]["published"] == "0.0003" and list(rows) == names
    assert "departures=(epochs, lr," in repr(study)
    page = study.report(tmp_path / "report.html").read_text()
    assert "Beside the paper" in page and "mixed facts" in page and "As published, but for epochs" in page
    assert "As published, but for epochs, lr, seeds, batches" in study._repr_html_()


def test_the_usual_study_says_so_too(pocket_bert):
    found = lamp(*pocket_bert, read_facts("pocket", "MadeOf"), steps=2, random=1, mismatched=False, progress=False)
    assert "published" not in found.config and {"epochs", "clip", "shared_init"} < {d.name for d in found.departures}
    assert found.to_json()["departures"] and "As published" not in found._repr_html_()


def test_a_recipe_without_clauses_is_as_it_was():
    assert departures((), {"steps": 3}) == () and Clause("a", 1, 2, "x").value({}) is None


def test_published_tickets_train_with_dropout(pocket_bert, monkeypatch, tmp_path):
    "Of the model and of the head, in fine-tuning and when trained again."
    any_floor(monkeypatch)
    module, seen = sys.modules["subnet_explorer.recipes.ticket_cells"], []
    fit = module.fit
    monkeypatch.setattr(module, "fit", lambda *a, **k: seen.append((k["dropout"], k["head_dropout"])) or fit(*a, **k))
    data = task_data("pocket:entails", on_dev=True, train=48, test=24)
    found = tickets(*pocket_bert, {"entails": data}, published=True, seeds=(0,), epochs=1, lr=1e-3, drop=0.4,
                    kind="mlp", supers=False, progress=False)
    assert set(seen) == {(True, 0.1)} and len(seen) >= 4
    assert found.config["published"] is True and found.config["pruning"]["mode"] == "cumulative"
    assert "on_dev" not in {d.name for d in found.departures}
