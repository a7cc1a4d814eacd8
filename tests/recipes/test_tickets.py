"The study of lottery tickets: sizes, scores against the plain model, resume, several processes, bad input."

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from floors import any_floor
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score, matthews_corrcoef

from subnet_explorer.core.errors import SubnetError, UnknownName
from subnet_explorer.core.intervals import interval
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.masks import Masks
from subnet_explorer.core.run import OtherRun
from subnet_explorer.core.space import Space
from subnet_explorer.data.parts import TaskData, task_data
from subnet_explorer.data.questions import read_squad
from subnet_explorer.data.tables import GLUE, Labelled, read_glue
from subnet_explorer.look import curves
from subnet_explorer.measure.baselines import majority_label
from subnet_explorer.measure.decisions import decide, shares
from subnet_explorer.model.load import load
from subnet_explorer.recipes.study import Bench
from subnet_explorer.recipes.tasks import BASELINES, baseline_table, trivial_on, trivial_text
from subnet_explorer.recipes.ticket_cells import SUPER
from subnet_explorer.recipes.tickets import summary, table, tickets
from subnet_explorer.search.prune import NoFloor

chapter = importlib.import_module("subnet_explorer.recipes.tickets")
cells = importlib.import_module("subnet_explorer.recipes.ticket_cells")
QUICK = dict(epochs=3, lr=1e-3, length=32, progress=False)


@pytest.fixture(scope="module", autouse=True)
def floors():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small are slower with more
    with pytest.MonkeyPatch.context() as patch:
        any_floor(patch)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bert():
    "The pocket model with two of its layers."
    model, tok = load("pocket-bert")
    model.bert.encoder.layer = model.bert.encoder.layer[:2]
    model.config.num_hidden_layers = 2
    return model, tok


@pytest.fixture(scope="module")
def tasks():
    return {t: task_data(f"pocket:{t}", search=0.03, train=64, test=40) for t in ("paraphrase", "entails")}


@pytest.fixture(scope="module")
def study(bert, tasks, tmp_path_factory):
    return tickets(
        *bert,
        tasks,
        seeds=(0, 1),
        floor=1.0,
        random_init=True,
        longer=(4,),
        to=tmp_path_factory.mktemp("study") / "s",
        **QUICK,
    )


def untrained():
    "A tiny encoder of two layers that was never trained, for what does not need a good one."
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    tok = load("pocket-bert")[1]
    return BertForMaskedLM(
        BertConfig(
            vocab_size=len(tok),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    ).eval(), tok


def one_task():
    return {"entails": task_data("pocket:entails", search=0.03, train=32, test=40)}


@pytest.fixture(scope="module")
def small():
    return untrained()


@pytest.fixture(scope="module")
def entails():
    return one_task()


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_text_on_both_sides():
    d = task_data("pocket:entails", search=0.3)

    def texts(part):
        return {(r["sentence"], r["pair"]) for r in part}

    whole = read_glue("pocket:entails")
    assert (
        not texts(d.train) & texts(d.search)
        and texts(d.train) | texts(d.search) == texts(whole)
        and len(d.train) + len(d.search) == len(whole)
    )
    assert (
        0.27 < len(texts(d.search)) / len(texts(whole)) < 0.33
        and d.test.items == read_glue("pocket:entails", "dev").items
    )
    assert (
        task_data("pocket:entails", search=0.3).identity()
        == d.identity()
        != task_data("pocket:entails", search=0.3, seed=1).identity()
    )


def test_as_published_the_search_sees_the_report():
    d = task_data("pocket:entails", on_dev=True, test=50)
    assert d.search is d.test and len(d.test) == 50 and len(d.train) == len(read_glue("pocket:entails"))


def test_one_class_is_refused(tasks):
    d = tasks["entails"]
    one = replace(d.test, items=tuple(r for r in d.test if r["label"] == "entailment"))
    with pytest.raises(SubnetError, match=r"all test sentences of .* have the label 'entailment'"):
        TaskData(d.train, d.search, one)
    with pytest.raises(SubnetError, match="there is no search sentence"):
        TaskData(d.train, replace(d.test, items=()), d.test)
    with pytest.raises(SubnetError, match=r"search must be a number above 0 and below 0\.5"):
        task_data("pocket:entails", search=2)


def test_majority_is_the_dummy_of_scikit_learn(tasks):
    for d in tasks.values():
        y, gold = [r["label"] for r in d.train], [r["label"] for r in d.test]
        answer = (
            DummyClassifier(strategy="most_frequent").fit(np.zeros((len(y), 1)), y).predict(np.zeros((len(gold), 1)))
        )
        assert majority_label(d)["score"] == (matthews_corrcoef if d.metric == "matthews" else accuracy_score)(
            gold, answer
        )


# ── what is found ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_masks_are_matched_in_size_by_kind(study, tasks):
    def kept(m):
        return m.table().groupby("kind").kept.sum().to_dict()

    for task in tasks:
        for seed in range(2):
            by = study.masks.sel(task=task, seed=seed).by("kind")
            assert set(by) == {"full", "good", "random", "bad", "random-init", *SUPER} and by["full"].density == 1
            assert kept(by["good"]) == kept(by["random"]) == kept(by["bad"]) == kept(by["random-init"])
            assert (
                kept(by["super-good"]) == kept(by["super-random"]) == kept(by["super-bad"])
                and by["super-good"] <= by["good"]
            )
            if kept(by["good"])["head"] <= 4 and kept(by["good"])["mlp"] <= 1:
                assert (by["good"] & by["bad"]).count == 0
        assert study.masks.sel(task=task, seed=0, kind="super-good")[0] == study.good.sel(task=task).intersection()
    assert len({m.space for _, m in study.masks}) == 1


def test_the_search_stays_above_the_floor(study):
    for (task, seed), t in study.steps.groupby(["task", "seed"]):
        good = study.masks.sel(task=task, seed=seed, kind="good")[0]
        assert t[t.passed].score.min() >= 1.0 * t.score.iloc[0] and np.isclose(
            t[t.passed].density.iloc[-1], good.density
        )
        assert all(~(t[~t.passed].score >= 1.0 * t.score.iloc[0]))


def test_scores_are_those_of_the_model(study, bert, tasks):
    "Predictions of the fine-tuned model, gates as plain hooks, one sentence at a time."
    model, tok = bert
    data, mask = tasks["entails"], study.masks.sel(task="entails", seed=1, kind="bad")[0]

    def score(head):
        right = 0
        for r in data.test:
            with torch.no_grad():
                h = model.base_model(**tok(r["sentence"], r["pair"], return_tensors="pt")).last_hidden_state[0, 0]
            right += head.labels[int(head.out(h).argmax())] == r["label"]
        return right / len(data.test)

    with study.fine_tuned("entails", 1) as head:
        assert score(head) == study.scores.query("task == 'entails' and seed == 1 and kind == 'full'").score.item()
        hooks = []
        for i, layer in enumerate(model.base_model.encoder.layer):
            heads, mlp = (
                torch.tensor(mask[f"layer.{i}.head"]).float().repeat_interleave(32),
                float(mask[f"layer.{i}.mlp"][0]),
            )
            hooks += [
                layer.attention.output.dense.register_forward_pre_hook(lambda m, a, g=heads: (a[0] * g,)),
                layer.output.dense.register_forward_hook(lambda m, a, out, g=mlp: out * g),
            ]
        assert (
            score(head)
            == study.scores.query(
                "task == 'entails' and seed == 1 and kind == 'bad' and stage == 'pruned'"
            ).score.item()
        )
        for h in hooks:
            h.remove()


def test_every_measurement_is_there_once(study):
    base = study.scores[study.scores.epochs == 3]
    assert not study.scores.duplicated(["task", "seed", "kind", "stage", "epochs"]).any()
    want = {
        ("full", "full"),
        ("random-init", "retrained"),
        *((k, s) for k in ("good", "random", "bad", *SUPER) for s in ("pruned", "retrained")),
    }
    for _, t in base.groupby(["task", "seed"]):
        assert set(zip(t.kind, t.stage, strict=False)) == want
    longer = study.scores[study.scores.epochs == 4]
    assert set(longer.kind) == {"bad"} and set(longer.stage) == {"retrained"} and len(longer) == 4


def test_importance_is_of_the_fine_tuned_model(study, bert, tasks):
    from subnet_explorer.search.objectives import Task
    from subnet_explorer.search.score import importance

    with study.fine_tuned("paraphrase", 1) as head:
        again = importance(
            *bert, Task(tasks["paraphrase"].search, head), Space.of(bert[0], "head+mlp"), None, 64, 1, normalise="layer"
        )
    for g, v in study.importance["paraphrase", 1].values.items():
        assert np.allclose(v, again[g], rtol=1e-3, atol=1e-7)


def test_tables(study):
    t = summary(study).set_index(["task", "kind", "stage", "epochs"])
    x = study.scores.query(
        "task == 'entails' and kind == 'bad' and stage == 'retrained' and epochs == 3"
    ).score.to_numpy()
    row = t.loc["entails", "bad", "retrained", 3]
    assert np.isclose(row["mean"], x.mean()) and np.isclose(row["std"], np.std(x, ddof=1)) and row["n"] == 2
    hits = study.scores.query("task == 'entails' and kind == 'bad' and stage == 'retrained' and epochs == 3")["items"]
    by_seed = np.array([[float(v) for v in text.split(",")] for text in hits])
    assert by_seed.shape == (2, 40) and np.allclose(by_seed.mean(1), x)
    assert row["items"] == 40 and np.allclose([row.low, row.high], interval([by_seed], bounds=(0, 1))[1:])
    wide = study.scores.query("task == 'entails' and stage == 'retrained' and epochs == 3").pivot(
        index="seed", columns="kind", values="score"
    )
    g = study.gains().set_index(["task", "stage", "of", "against"])
    assert np.isclose(g.loc["entails", "retrained", "good", "random"]["mean"], (wide.good - wide.random).mean())
    assert ("entails", "retrained", "good", "random-init") in g.index and (
        "entails",
        "pruned",
        "super-good",
        "super-bad",
    ) in g.index
    shown = table(study)
    assert (
        list(shown.columns) == ["paraphrase", "entails"]
        and [*shown.index[:4]] == [(name, "") for name in ("majority", "first text", "second text", "whole input")]
        and ("bad", "retrained (4 epochs)") in shown.index
    )
    assert shown.loc[("bad", "retrained"), "entails"] == f"{x.mean():.3f} ± {x.std(ddof=1):.3f}"


def test_the_model_comes_back(small, entails, monkeypatch):
    model, before = small[0], weights(small[0])
    tickets(*small, entails, seeds=(0,), floor=1.0, **QUICK)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    monkeypatch.setattr(cells, "matched_controls", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tickets(*small, entails, seeds=(0,), floor=1.0, **QUICK)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.fixture(scope="module")
def weighty(bert, entails, tmp_path_factory):
    "A study of weights, pruned by magnitude."
    to = tmp_path_factory.mktemp("weights") / "w"
    return tickets(*bert, entails, kind="weight", seeds=(0,), floor=0.95, to=to, **QUICK)


def test_weights_by_magnitude(weighty, bert):
    model, found = bert[0], weighty
    by = found.masks.by("kind")
    n = len(found.steps[found.steps.passed]) - 1
    assert (
        0 < n <= 9
        and abs(by["good"].density - 0.9**n) < 1e-4
        and by["good"].count == by["random"].count == by["bad"].count
        and not found.importance
    )
    with found.fine_tuned("entails", 0):
        name = "encoder.layer.1.output.dense.weight"
        w = model.base_model.get_parameter(name).detach().abs().numpy()
        kept, bad = by["good"][name], by["bad"][name]
        assert w[kept].min() >= w[~kept].max() - 1e-9 and w[bad].max() <= w[~bad].min() + 1e-9
    chance = by["good"].density ** 2 * by["good"].space.size
    assert abs((by["good"] & by["random"]).count - chance) < 5 * np.sqrt(chance)


def test_as_published(bert, tasks):
    "Sizes of random masks are drawn; so they differ from the good ones in some seed."
    found = tickets(
        *bert,
        {"paraphrase": tasks["paraphrase"]},
        seeds=range(2),
        floor=1.0,
        published=True,
        mode="cumulative",
        normalise="published",
        supers=False,
        **QUICK,
    )
    assert (
        [m.count for _, m in found.masks.sel(kind="random")]
        != [m.count for _, m in found.good]
        == [m.count for _, m in found.masks.sel(kind="bad")]
    )


@pytest.mark.parametrize("kind", ["head", "mlp"])
def test_one_kind_of_unit(small, entails, kind):
    found = tickets(*small, entails, kind=kind, seeds=(0,), floor=1.0, supers=False, **QUICK)
    assert {m.space.kind for _, m in found.masks} == {kind} and found.good[0].density < 1


def test_other_families(entails):
    model, tok = load("pocket-gpt2")
    model.transformer.h = model.transformer.h[:2]
    model.config.n_layer = 2
    found = tickets(model, tok, entails, seeds=(0,), floor=1.0, random_init=True, **QUICK)
    assert {"full", "good", "random", "bad", "random-init"} == set(found.scores.kind) and found.good[0].density < 1


# ── stopped, continued, grown, shared among processes ────────────────────────────────────────────────────────────────

PROGRAM = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, "..")
import torch
from pytest import MonkeyPatch
from floors import any_floor
from test_tickets import QUICK, one_task, tickets, untrained
torch.set_num_threads(1)
any_floor(MonkeyPatch())
model, tasks, folder = untrained(), one_task(), Path(sys.argv[1])
for wanted in (1, 6):      # killed after so many masks were finished
    child = os.fork()
    if not child:
        tickets(*model, tasks, seeds=(0, 1), floor=1.0, to=folder, **QUICK)
        os._exit(0)
    while len(list(folder.glob("runs/*/mask.safetensors"))) < wanted:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it was killed"
        time.sleep(0.005)
    os.kill(child, 9)
    assert os.waitpid(child, 0)[1] == 9
"""


@pytest.fixture(scope="module")
def whole(small, entails):
    "The study of two seeds, made at once."
    return tickets(*small, entails, seeds=(0, 1), floor=1.0, **QUICK)


def test_killed_and_continued(small, entails, whole, tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "cut")]
    subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True)
    assert len(list(tmp_path.glob("cut/runs/*/mask.safetensors"))) < len(whole.masks)
    cut = tickets(*small, entails, seeds=(0, 1), floor=1.0, to=tmp_path / "cut", **QUICK)
    pd.testing.assert_frame_equal(whole.scores, cut.scores)
    assert [m for _, m in whole.masks] == [m for _, m in cut.masks]
    assert (
        not list(tmp_path.glob("cut/**/state.safetensors")) and len(list((tmp_path / "cut" / "models").iterdir())) == 2
    )


def test_from_the_folder_nothing_is_done_again(study, bert, tasks, monkeypatch):
    monkeypatch.setattr(cells, "fit", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr(cells, "iterate", lambda *a, **k: pytest.fail("pruned again"))
    again = tickets(*bert, tasks, seeds=(0, 1), floor=1.0, random_init=True, longer=(4,), to=study.plan.folder, **QUICK)
    pd.testing.assert_frame_equal(again.scores, study.scores)
    pd.testing.assert_frame_equal(again.steps, study.steps)
    assert all(
        np.array_equal(v, again.importance[c].values[g])
        for c, s in study.importance.items()
        for g, v in s.values.items()
    )


def test_a_study_grows(small, entails, tmp_path):
    tickets(*small, entails, seeds=(0,), floor=1.0, to=tmp_path / "s", **QUICK)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("s/runs/*/metrics.jsonl")}
    grown = tickets(*small, entails, seeds=(0, 1), floor=1.0, to=tmp_path / "s", **QUICK)
    assert len(before) == 4 and all(p.stat().st_mtime_ns == t for p, t in before.items())
    assert set(grown.scores.seed) == {0, 1} and set(SUPER) <= set(grown.scores.kind)
    more = tickets(
        *small, entails, seeds=(0, 1), floor=1.0, longer=(4, 5), random_init=True, to=tmp_path / "s", **QUICK
    )
    assert all(p.stat().st_mtime_ns == t for p, t in before.items()) and len(more.scores) == len(grown.scores) + 2 * 3
    assert (
        set(more.scores[more.scores.epochs == 5].kind) == {"bad"}
        and not more.masks.index.duplicated(["task", "seed", "kind"]).any()
    )
    with pytest.raises(SubnetError, match="3 epochs anyway"):
        tickets(*small, entails, seeds=(0,), longer=(3,), to=tmp_path / "s", **QUICK)
    with pytest.raises(OtherRun, match="differs in pruning"):
        tickets(*small, entails, seeds=(0,), floor=0.7, to=tmp_path / "s", **QUICK)


@pytest.mark.slow  # two more interpreters; how processes share cells in general is tested with the campaign
def test_processes_share_the_cells(small, entails, whole, tmp_path):
    two = tickets(*small, entails, seeds=(0, 1), floor=1.0, processes=2, to=tmp_path / "two", **QUICK)
    pd.testing.assert_frame_equal(whole.scores, two.scores)
    assert [m for _, m in whole.masks] == [m for _, m in two.masks]


# ── refused, by name ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_model_that_has_learned_nothing(small):
    data = task_data("pocket:acceptable", search=0.03, train=64, test=40)
    with pytest.raises(
        SubnetError,
        match=r"no cell could be pruned: acceptable, seed 0: the full model scores .*: a share of that is no floor",
    ):
        tickets(*small, {"acceptable": data}, seeds=(0,), **{**QUICK, "lr": 1e-9})


def test_a_cell_without_floor_does_not_stop_the_others(small, entails, tmp_path, monkeypatch):
    "It stays in the table with its reason; also when read from the folder."
    real = cells.iterate

    def pruned(*a, labels, **k):
        if labels == {"task": "entails", "seed": 1}:
            raise NoFloor("the full model scores -0.1")
        return real(*a, labels=labels, **k)

    monkeypatch.setattr(cells, "iterate", pruned)
    for _ in range(2):
        found = tickets(*small, entails, seeds=(0, 1, 2), floor=1.0, to=tmp_path / "s", **QUICK)
        assert found.skipped == {("entails", 1): "the full model scores -0.1"} and set(found.good.index.seed) == {0, 2}
        one = found.scores.query("seed == 1")
        assert list(one.kind) == ["full"] and one.note.item() == "not pruned: the full model scores -0.1"
        assert set(found.masks.sel(kind="super-good").index.seed) == {0, 2}
        monkeypatch.setattr(cells, "iterate", lambda *a, **k: pytest.fail("pruned again"))


def test_constant_predictions_are_named(small, tmp_path):
    "Not a silent NaN, neither in the table nor in the file."
    task = task_data("pocket:similar", search=0.05, train=64, test=40)
    tasks = {"similar": task, "entails": task_data("pocket:entails", search=0.03, train=64, test=20)}
    found = tickets(*small, tasks, seeds=(0,), floor=0.99, to=tmp_path / "s", **QUICK)
    assert np.isfinite(summary(found)["mean"]).all()
    assert "undefined" in table(found).loc[("majority", ""), "similar"]
    for f in tmp_path.glob("s/runs/*/metrics.jsonl"):
        for line in f.read_text().splitlines():
            json.loads(line, parse_constant=pytest.fail)


def test_undefined_scores_are_left_out_and_counted_everywhere(study):
    "One rule for summary, table, gains and figure: the mean of what is defined, and how many are not."
    gone = (study.scores.kind == "bad") & (study.scores.stage == "pruned") & (study.scores.seed == 1)
    scores = study.scores.assign(score=study.scores.score.where(~gone))
    some = replace(study, tables={**study.tables, "scores": scores})
    row = summary(some).query("task == 'entails' and kind == 'bad' and stage == 'pruned'").iloc[0]
    left = scores.query("task == 'entails' and kind == 'bad' and stage == 'pruned' and seed == 0").score.item()
    assert (row["mean"], row["n"], row["undefined"]) == (left, 1, 1)
    assert table(some).loc[("bad", "pruned"), "entails"] == f"{left:.3f} (1 undefined)"
    drawn = curves.tickets(scores[scores.epochs == 3])
    bar = drawn.data.query("task == 'entails' and kind == 'bad' and stage == 'pruned'").iloc[0]
    assert (bar["mean"], bar["n"]) == (row["mean"], row["n"]) and "2 undefined scores left out" in drawn.alt
    assert some.to_json()["tasks"]["entails"]["scores"]["bad"]["pruned"]["undefined"] == 1


def matrices(model):
    "Sizes of the matrices in the blocks, and of the word embeddings."
    sizes = {name: p.numel() for name, p in model.base_model.named_parameters() if p.ndim == 2}
    blocks = {name: n for name, n in sizes.items() if name.startswith("encoder.layer")}
    return blocks, sizes["embeddings.word_embeddings.weight"]


@pytest.mark.parametrize("kind", ["head+mlp", "head", "mlp", "weight"])
def test_shares_of_weights_are_those_of_the_exact_map(bert, kind):
    "Of the weights of the units, and of all weights of the model, whatever the kind of unit."
    model, space = bert[0], Space.of(bert[0], kind)
    blocks, embeddings = matrices(model)
    mask = Mask.random(space, 0.6, seed=1)
    fine = mask.to("weight", how="full").table().query("kind == 'weight'") if kind != "weight" else mask.table()
    kept, size = fine.kept.sum(), fine["size"].sum()
    found = chapter.densities(mask, Space.of(model, "weight", embeddings=True))
    assert found["density"] == mask.density and found["density_weights"] == pytest.approx(kept / size)
    everything = sum(blocks.values()) + embeddings
    assert found["density_model"] == pytest.approx(1 - (size - kept) / everything)


def test_shares_of_weights_stand_beside_those_of_units(study, bert):
    blocks, embeddings = matrices(bert[0])
    good = study.masks.sel(task="entails", seed=0, kind="good")[0]
    weights = good.to("weight", how="full").table().query("kind == 'weight'")
    removed = (weights["size"] - weights.kept).sum()
    row = study.scores.query("task == 'entails' and seed == 0 and kind == 'good'").iloc[0]
    assert row.density == good.density
    assert row.density_weights == pytest.approx(1 - removed / sum(blocks.values()))
    assert row.density_model == pytest.approx(1 - removed / (sum(blocks.values()) + embeddings))
    of = study.scores.query("task == 'entails' and kind == 'good'")
    mean = summary(study).query("task == 'entails' and kind == 'good'").iloc[0]
    shown, said = table(study), study.to_json()
    names = {"density": "units", "density_weights": "weights", "density_model": "weights with embeddings"}
    for column, name in names.items():
        value = of.drop_duplicates("seed")[column].mean()
        assert mean[column] == pytest.approx(value)
        assert shown.loc[("good", f"{name} kept"), "entails"] == f"{value:.3f}"
        assert said["tasks"]["entails"]["kept"]["good"][name.replace(" ", "_")] == pytest.approx(value, abs=1e-6)
    assert said["weights"] == {"blocks": sum(blocks.values()), "embeddings": embeddings}
    first = said["tasks"]["entails"]["survivors"][0]["kept"]
    assert list(first.values()) == pytest.approx([row[name] for name in names], abs=1e-6)
    alt = curves.tickets(chapter.drawn(study)).alt
    assert f"weights with embeddings {of.density_model.mean():.2f})" in alt and "nan" not in alt


def test_the_report_says_what_survives_in_weights_too(study):
    sections = {title: (text, parts) for title, text, parts in study.sections()}
    text, parts = sections["What survives"]
    kept = next(part for part in parts if isinstance(part, pd.DataFrame) and "weights with embeddings" in part)
    of = study.scores.query("task == 'paraphrase' and kind == 'bad'").drop_duplicates("seed").density_weights
    row = kept.query("task == 'paraphrase' and kind == 'bad'").iloc[0]
    assert row.weights == f"{of.mean():.3f} ± {of.std():.3f}" and "figures 2 and 17" in text
    maps = [part for part in parts if not isinstance(part, pd.DataFrame)]
    assert len(maps) == 2 and all("of weights kept" in part.alt for part in maps)


def test_survival_of_weights_by_layer_and_matrix(weighty):
    "The share of every matrix, over all masks, and by task over seeds; heads and MLPs have their own maps."
    good, bad = (weighty.masks.sel(kind=kind)[0] for kind in ("good", "bad"))
    labels = [{"task": task, "seed": seed, "kind": "good"} for task in ("a", "b") for seed in (0, 1)]
    some = replace(weighty, masks=Masks(list(zip(labels, [good, bad, good, good], strict=True))))
    kept = {"density": 0.5, "density_weights": 0.5, "density_model": 0.6}
    scores = pd.DataFrame([label | kept for label in labels])
    some = replace(some, tables={**some.tables, "scores": scores})
    first, *tasks = chapter.survival_maps(some, {task: some.good.sel(task=task) for task in ("a", "b")})
    name = "encoder.layer.1.intermediate.dense.weight"
    share = {mask: mask[name].mean() for mask in (good, bad)}
    row = first.data.query("layer == 2 and matrix == 'up'")
    assert row.kept.sum() / row["size"].sum() == pytest.approx((3 * share[good] + share[bad]) / 4)
    one = tasks[0].data.query("layer == 2 and role == 'up'").iloc[0]
    pair = [share[good], share[bad]]
    assert one["mean"] == pytest.approx(np.mean(pair)) and one["std"] == pytest.approx(np.std(pair, ddof=1))
    assert "over seeds and tasks" in first.alt and tasks[0].alt.startswith("a: 0.50 of weights kept over seeds")
    shown = {title: parts for title, _, parts in weighty.sections()}
    assert any("Share of weights that survive" in getattr(part, "alt", "") for part in shown["What survives"])


# ── attention patterns ───────────────────────────────────────────────────────────────────────────────────────────────


def test_patterns_before_and_after_in_raw_and_normed_maps_of_all_heads_and_survivors(study, bert, tasks):
    "In one call, what `decide` says of each of the eight conditions."
    space = Space.of(bert[0], "head+mlp")
    good = [({"task": "entails", "seed": seed, "kind": "good"}, Mask.random(space, 0.7, seed=seed)) for seed in (0, 1)]
    study = replace(study, masks=Masks(good))
    found = study.patterns(texts=6)
    keys = ["model", "maps", "heads"]
    assert len(found.data) == 8 * 5 and np.allclose(found.data.groupby(keys).share.sum(), 1)
    texts = [(r["sentence"], r["pair"]) for r in tasks["entails"].test.take(6)]
    alive = study.good.sel(task="entails").intersection()
    assert 0 < sum(alive[g.name].sum() for g in alive.space.groups if g.kind == "head") < 8

    def share(**conditions):
        rows = found.data[(found.data[list(conditions)] == pd.Series(conditions)).all(axis=1)]
        return rows.share.tolist(), rows["std"].tolist(), rows.n.iloc[0]

    before = shares(decide(*bert, texts, drop_short=True))
    assert share(model="pre-trained", maps="raw", heads="all heads")[0] == pytest.approx(before.share.tolist())
    by_seed = []
    for seed in (0, 1):
        with study.fine_tuned("entails", seed):
            now = alive.rebase(Space.of(bert[0], "head+mlp"))
            by_seed.append(shares(decide(*bert, texts, now, "correct", drop_short=True)))
    got, std, n = share(model="fine-tuned", maps="weight-normed", heads="super-survivors")
    both = np.array([part.share for part in by_seed])
    assert got == pytest.approx(both.mean(0)) and std == pytest.approx(both.std(0, ddof=1))
    assert n == sum(part.n.iloc[0] for part in by_seed)
    assert "weight-normed, fine-tuned, entails, super-survivors: heterogeneous" in found.alt


def test_patterns_need_heads_and_seeds(study, weighty):
    with pytest.raises(SubnetError, match="patterns are of heads, and this study pruned 'weight'"):
        weighty.patterns()
    with pytest.raises(UnknownName, match="task that was pruned"):
        study.patterns(tasks=["RTE"])
    with pytest.raises(UnknownName, match="seed that was pruned"):
        study.patterns(tasks=["entails"], seeds=[7])


# ── floors and baselines ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_floor_of_an_earlier_version_that_a_baseline_passes_is_said(study, tasks):
    "What passes such a floor need not know anything."
    table = baseline_table(Bench({}), tasks, ("search",))
    plan, nothing = replace(study.plan, baselines=table), pd.DataFrame({"score": [0.5]})
    least = max(trivial_on(table, "entails", "search").values())
    assert least >= majority_label(tasks["entails"], "search")["score"]
    for floor, said in ((least, 1), (least + 0.01, 0)):
        notes = list(chapter._notes(plan, {("entails", 0): {"floor": floor}}, study.masks, nothing))
        assert sum("is not above" in note for note in notes) == said


def give_away(n, seed):
    "Pairs whose second text alone gives away the label."
    rng = np.random.default_rng(seed)
    for i in range(n):
        pair = f"it is {'not ' * (i % 2)}a {rng.choice(['bird', 'tree', 'town'])} ."
        yield {"sentence": f"anna drew {rng.integers(9)} pictures .", "pair": pair, "label": GLUE["RTE"].labels[i % 2]}


def test_a_task_whose_floor_a_part_of_the_input_passes_is_named(small, entails, tmp_path, monkeypatch):
    "It stays in the table with its reason, and the others go on."
    monkeypatch.setattr(chapter, "baseline_table", baseline_table)
    parts = [Labelled(tuple(give_away(n, seed)), GLUE["RTE"], "given") for seed, n in enumerate((64, 40, 40))]
    with pytest.raises(SubnetError, match=r"no cell .*is not above the 1\.0000 of the baseline 'second text'"):
        tickets(*small, {"given": TaskData(*parts)}, seeds=(0,), **QUICK)

    def pruned(*a, labels, **k):
        assert set(k["baselines"]) == {"majority", "first text", "second text"}
        return real(*a, labels=labels, **{**k, "baselines": k["baselines"] if labels["task"] == "given" else {}})

    real = cells.iterate
    monkeypatch.setattr(cells, "iterate", pruned)
    found = tickets(*small, {"given": TaskData(*parts), **entails}, seeds=(0,), floor=1.0, to=tmp_path / "s", **QUICK)
    assert list(found.skipped) == [("given", 0)] and "baseline 'second text'" in found.skipped["given", 0]
    assert set(found.good.index.task) == {"entails"} and any("baseline 'second text'" in note for note in found.notes)
    assert "second text" in found.scores.query("task == 'given'").note.item()


def test_baselines_stand_beside_the_scores(study, tasks):
    said = study.tables["baselines"].set_index(["task", "part", "baseline"]).score
    assert study.to_json()["baselines"][0].keys() == set(BASELINES)
    assert said["entails", "test", "majority"] == majority_label(tasks["entails"])["score"]
    assert table(study).loc[("second text", ""), "entails"] == f"{said['entails', 'test', 'second text']:.3f}"
    bars = curves.tickets(chapter.drawn(study)).data.set_index(["kind", "task"])["mean"]
    rows, told = summary(study).set_index("task"), study.to_json()["tasks"]
    for task in tasks:
        known = [said[task, "test", name] for name in ("majority", "first text", "second text")]
        whole = said[task, "test", "whole input"]
        assert bars["baseline", task] == max(known) and bars["bag of words", task] == whole
        assert set(rows.majority[task]) == {known[0]} and set(rows.bag_of_words[task]) == {whole}
        assert (told[task]["majority"], told[task]["bag_of_words"]) == pytest.approx((known[0], whole), abs=1e-6)
    assert (study.plan.folder / "baselines.csv").exists()


def test_baselines_of_every_kind_of_task(bert):
    "Classes of a text, of a pair, numbers and spans: the majority label and a bag of words, or why there is none."
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    names = ("acceptable", "entails", "similar")
    tasks = {name: task_data(f"pocket:{name}", search=0.05, train=200, test=100) for name in names}
    spans = read_squad("pocket", "train").take(60)
    tasks["spans"] = TaskData(spans, spans, read_squad("pocket", "dev").take(40))
    found = baseline_table(Bench({}), tasks, ("test",))
    shown = trivial_text(found)
    assert shown.loc["majority", "similar"] == "undefined" and shown.loc["whole input", "spans"] == "n/a"
    for name in ("acceptable", "entails"):
        words, d = CountVectorizer(binary=True, token_pattern=r"\w+|[^\w\s]"), tasks[name]
        texts = {part: [" ".join([r["sentence"], *([r["pair"]] if "pair" in r else [])]) for r in d.parts[part]]
                 for part in ("train", "test")}
        bag = LogisticRegression(max_iter=300).fit(words.fit_transform(texts["train"]), d.train.gold)
        answers = bag.predict(words.transform(texts["test"]))
        metric = matthews_corrcoef if d.metric == "matthews" else accuracy_score
        assert shown.loc["whole input", name] == f"{metric(d.test.gold, answers):.3f}"
    known = found.set_index(["task", "baseline"]).score
    assert np.isfinite(known["similar", "whole input"]) and known["spans", "majority"] >= 0
    study = SimpleNamespace(tables={"baselines": found})
    assert chapter.trivial_of(study, "entails") == {
        "majority": known["entails", "majority"], "bag_of_words": known["entails", "whole input"]}


def test_settings_are_checked_at_the_door(small, entails, tmp_path):
    for change, error, message in (
        (dict(kind="neuron"), UnknownName, "kind of unit"),
        (dict(seeds=(1, 1)), SubnetError, "different numbers"),
        (dict(seeds=()), SubnetError, "at least one"),
        (dict(processes=0), SubnetError, "processes must be a whole number of at least 1"),
        (dict(lr=-1), SubnetError, "lr"),
    ):
        with pytest.raises(error, match=message):
            tickets(*small, entails, to=tmp_path / "never", **{**QUICK, **change})
    with pytest.raises(SubnetError, match="there is no task"):
        tickets(*small, {}, to=tmp_path / "never", **QUICK)
    assert not (tmp_path / "never").exists()


def test_without_a_folder_the_models_are_gone(small, entails):
    found = tickets(*small, entails, seeds=(0,), floor=1.0, **QUICK)
    with pytest.raises(SubnetError, match="made without a folder"), found.fine_tuned("entails", 0):
        pass
    with pytest.raises(UnknownName), found.fine_tuned("RTE", 0):
        pass
