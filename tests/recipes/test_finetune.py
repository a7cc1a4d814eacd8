"Fine-tuning from unions: what is compared, what is chosen by what, resume, what is refused, and the three lines."
from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from subnet_explorer.core.errors import SubnetError, UnknownName
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.masks import Masks
from subnet_explorer.core.run import OtherRun
from subnet_explorer.core.space import Space
from subnet_explorer.data.choices import Choices, choice_task
from subnet_explorer.data.facts import read_facts
from subnet_explorer.measure.metrics import accuracy, predict
from subnet_explorer.model.apply import evaluating, masked, parameter
from subnet_explorer.model.load import load
from subnet_explorer.recipes.clauses import SETTING, alike
from subnet_explorer.recipes.finetune import (
    CONTRASTS,
    FinetuneStudy,
    chosen_settings,
    finetune,
    published_finetuning,
    published_unions,
)
from subnet_explorer.recipes.relations import DifferentStarts, relation_masks
from subnet_explorer.recipes.start import Order, order
from subnet_explorer.recipes.starts import Learned, learned, started
from subnet_explorer.recipes.study import find_recipe
from subnet_explorer.recipes.unions import Asker, joined, joiners, mined_relations, search_combinations
from subnet_explorer.tasks.fit import preserved
from subnet_explorer.tasks.heads import Chooser

RELATIONS = ("IsA", "AtLocation", "MadeOf", "Desires")
QUICK = dict(batches=(4,), rates=(1e-3,), epochs=1, tuning_seeds=(0, 1), random=1, progress=False)
MODULE = sys.modules[finetune.__module__]


def related(model, seeds=(0, 1)):
    "Masks of four relations that started alike."
    space, rows = Space.of(model, "weight", layers="top-half"), []
    for seed in seeds:
        start = Mask.random(space, .7, seed)
        rows += [({"task": r, "seed": seed}, start ^ Mask.random(space, .1, 10 + i)) for i, r in enumerate(RELATIONS)]
    return Masks(rows)


def kept(model): return {name: value.clone() for name, value in model.state_dict().items()}
def same(model, before): return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def made():
    model, tok = load("pocket-bert")
    tasks = {name: choice_task(f"pocket:{name}", name, limit_search=10, test=12) for name in ("IsA", "MadeOf")}
    return SimpleNamespace(model=model, tok=tok, tasks=tasks, masks=related(model))


@pytest.fixture
def trained(made, monkeypatch):
    "Nothing is really trained: what was asked for is noted, and a development accuracy made up of it."
    asked: list[dict[str, Any]] = []

    def quickly(model: Any, tok: Any, train: Choices, dev: Choices, **how: Any) -> Learned:
        off = round(float((parameter(model, Space.of(model, "weight", layers="top-half").groups[0]) == 0).float().mean()), 3)
        asked.append({"n": len(train), "ids": [row["id"] for row in train], "off": off, **how})
        score = how["lr"] - how["batch"] / 1e6 + off / 1e3
        return Learned(Chooser(model, train, how["seed"]), score, len(asked))
    monkeypatch.setattr(MODULE, "learned", quickly)
    return asked


def study_of(made, relations=("IsA", "MadeOf"), tasks=("IsA",), **settings):
    own = {name: made.tasks[name] for name in tasks}
    return finetune(made.model, made.tok, own, made.masks, relations, **QUICK | settings)


# ── one fine-tuning ──────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_cell_is_what_three_lines_and_a_head_give(made):
    "As a start and held, against the same written out; the model comes back bit for bit."
    before, task = kept(made.model), made.tasks["IsA"]
    study = study_of(made, train_sizes=(8,), tuning_seeds=(1,))
    assert same(made.model, before)
    mask = joined(made.masks.sel(task=["IsA", "MadeOf"], seed=1))
    train, how = task.train.take(8, 1), dict(batch=4, lr=1e-3, epochs=1, seed=1)
    for under in ("union start", "union held", "full"):
        with preserved(made.model):
            if under == "union start":
                with masked(made.model, mask, train=True): pass
            with masked(made.model, mask if under == "union held" else None, train=True):
                head, dev, steps = learned(made.model, made.tok, train, task.search, **how)
                with evaluating(made.model):
                    out = predict(made.model, head, [head.encode(made.tok, row) for row in task.test])
                assert dev == accuracy(made.model, made.tok, task.search, head)      # of the state that was kept
        run = study.runs.query("under == @under and (under == 'full' or seed == 1)").iloc[0]
        found = study.items.query("under == @under and (under == 'full' or seed == 1)")
        assert (run.dev, run.steps) == (dev, steps) and found.choice.tolist() == out.argmax(-1).tolist()
    assert study.items.right.tolist() == (study.items.choice == study.items.label).tolist()


@pytest.mark.parametrize("held", [False, True])
def test_in_a_plain_loop(made, held):
    "Three lines, no recipe: as a start all weights move, held they stay zero; both begin with the union."
    model, batch = made.model, made.tok("a robin is a bird .", return_tensors="pt")
    space = made.masks[0].space

    def zeros(): return [bool((parameter(model, g)[~torch.as_tensor(mask[g.name])] == 0).all()) for g in space.groups]

    def train():
        assert all(zeros())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=.1)
        for _ in range(2):
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
    before = kept(model)
    with preserved(model):
        mask = joined(made.masks.sel(task=["IsA", "AtLocation"], seed=0))
        if held:
            with masked(model, mask, train=True): train()
        else:
            with masked(model, mask, train=True): pass
            train()
        assert all(zeros()) == held and any(zeros()) == held
    assert same(model, before)


def test_a_start_comes_back_after_an_exception(made):
    before = kept(made.model)
    for held in (False, True):
        with pytest.raises(KeyboardInterrupt), started(made.model, made.masks[0], held): raise KeyboardInterrupt
        assert same(made.model, before)


def test_training_ends_early(made):
    "A rate at which nothing changes: the first look is the best, and the third after it the last."
    task = made.tasks["IsA"]
    with preserved(made.model):
        found = learned(made.model, made.tok, task.train.take(8), task.search, batch=4, lr=1e-12, epochs=50, patience=3)
    assert found.steps == 2 * (1 + 3)


# ── the study ────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_every_test_question_once_under_every_condition(made, trained):
    study = study_of(made, tasks=("IsA", "MadeOf"), train_sizes=(.5, 8, 1), random=2)
    t = study.items
    assert not t.duplicated(["task", "size", "under", "seed", "draw", "tuning_seed", "item"]).any()
    one = t.query("task == 'IsA' and size == 8").groupby("under")[["seed", "draw", "tuning_seed"]].apply(
        lambda part: len(part.drop_duplicates()))
    assert one.to_dict() == {"full": 2, "union start": 4, "union held": 4, "random start": 4, "random held": 4}
    for name, task in study.tasks.items():
        n = len(task.train)
        sizes = t[t.task == name].drop_duplicates("size").set_index("size").n.to_dict()
        assert sizes == {.5: round(n / 2), 8: 8, 1: n}
        part = t[(t.task == name) & (t.under == "full") & (t["size"] == 1) & (t.tuning_seed == 0)]
        assert part.label.tolist() == task.test.gold and part.id.tolist() == [q["id"] for q in task.test]
    assert set(study.curve().n) == set(t.n) and len(study.curve()) == 2 * 3 * 5
    assert {(r.of, r.against) for r in study.gains().itertuples()} == set(CONTRASTS)
    assert len(study.overall()) == 3 * len(CONTRASTS)


def test_conditions_differ_by_their_mask_alone(made, trained):
    "The same questions, seeds and settings; a smaller set lies in a larger one, and another seed draws another."
    study_of(made, train_sizes=(6, 12))
    by = {}
    for one in trained: by.setdefault((one["n"], one["seed"]), []).append(one)
    assert set(by) == {(6, 0), (6, 1), (12, 0), (12, 1)} and {len(some) for some in by.values()} == {1 + 4 + 2}
    for some in by.values():
        for name in ("ids", "batch", "lr", "epochs", "dropout"): assert all(one[name] == some[0][name] for one in some)
    ids = {key: some[0]["ids"] for key, some in by.items()}
    assert set(ids[6, 0]) < set(ids[12, 0]) and set(ids[6, 0]) != set(ids[6, 1])
    unions = [joined(made.masks.sel(task=["IsA", "MadeOf"], seed=s)) for s in (0, 1)]
    name = unions[0].space.groups[0].name
    off = [round(float((~mask[name]).mean()), 3) for mask in (*unions, unions[0].random_like(0))]
    assert {one["off"] for one in trained} == {0., *off}


def test_gains_are_differences_on_the_same_questions(made, trained):
    study = study_of(made, train_sizes=(6, 12))
    mean = study.items.groupby(["size", "under"]).right.mean()
    for row in study.gains().itertuples():
        assert row.mean == pytest.approx(mean[row.size, row.of] - mean[row.size, row.against]) and not row.left_out


def test_batch_and_rate_are_chosen_on_the_development_part(made, trained):
    "By the mean over seeds, for each condition among as many; the made-up score likes high rates and small batches."
    study = study_of(made, batches=(8, 4), rates=(1e-4, 3e-4, 2e-4), train_sizes=(8,))
    best = chosen_settings(study.runs)
    assert set(zip(best.batch, best.rate, strict=True)) == {(4, 3e-4)} and len(best) == 5
    assert study.runs.groupby("under").apply(len, include_groups=False).div(6).to_dict() == {
        "full": 2, "union start": 4, "union held": 4, "random start": 2, "random held": 2}
    assert study.runs.chosen.sum() * 6 == len(study.runs)
    assert len(study.items) == study.runs.chosen.sum() * 12
    flat = study.runs.assign(dev=.5)
    assert set(zip(*chosen_settings(flat)[["batch", "rate"]].to_numpy().T, strict=True)) == {(8, 1e-4)}      # the first


def test_what_is_told(made, trained, tmp_path):
    study = study_of(made, train_sizes=(6, 12))
    table = study.summary()
    assert set(table.under) >= {"chance", "majority (no model)", "options (no model)", "full", "union start"}
    assert set(table[table.under == "full"].questions) == {6, 12}
    assert any("nobody said which of them" in note for note in study.notes)
    said = json.loads(study.save(tmp_path).read_text())
    assert said["relations"] == {"IsA": ["IsA", "MadeOf"]} and len(said["chosen"]) == 2 * 5
    page = study.report(tmp_path / "report.html").read_text()
    for text in ("These numbers are the paper", "With less data", "Accuracy after fine-tuning"): assert text in page
    shared = replace(made.tasks["IsA"], search=made.tasks["IsA"].test)
    study = finetune(made.model, made.tok, {"IsA": shared}, made.masks, ["IsA"], **QUICK, length=5)
    assert any("12 test questions are development questions, too" in note for note in study.notes)
    assert any("12 of 12 test questions are longer than what is read" in note for note in study.notes)
    rows = published_finetuning().set_index(["task", "model"])
    assert rows.loc[("COPA", "BERT")].tolist() == [62.4, 5., 63.1, 4.7] and len(rows) == 12
    assert published_unions().set_index("task").relations["COPA"] == "CausesDesire+Desires+Causes"


def test_a_study_goes_on_and_grows(made, trained, tmp_path, monkeypatch):
    "Stopped anywhere, it ends as the whole; more seeds and sizes find what is there."
    whole, real = study_of(made, train_sizes=(6,)), MODULE.learned
    del trained[:]

    def stopping(*a: Any, **k: Any) -> Any:
        if len(trained) == 5: raise KeyboardInterrupt
        return real(*a, **k)
    monkeypatch.setattr(MODULE, "learned", stopping)
    with pytest.raises(KeyboardInterrupt): study_of(made, train_sizes=(6,), to=tmp_path)
    monkeypatch.setattr(MODULE, "learned", real)
    again = study_of(made, train_sizes=(6,), to=tmp_path)
    assert len(trained) == 14 and isinstance(again, FinetuneStudy)
    assert again.items.equals(whole.items) and again.gains().equals(whole.gains())
    study_of(made, train_sizes=(6, 12), tuning_seeds=(0, 1, 2), to=tmp_path)
    assert len(trained) == 2 * 3 * 7
    with pytest.raises(OtherRun): study_of(made, tasks=("MadeOf",), to=tmp_path)


# ── which relations ──────────────────────────────────────────────────────────────────────────────────────────────────

def test_relations_are_chosen_on_the_development_part(made, trained):
    task, quick = made.tasks["IsA"], dict(relations=None, sizes=(2,), tuning_seeds=(0,), random=0, held=False)
    study = study_of(made, **quick, score="pll")
    ask = Asker.of(made.model, made.tok, task.search, joiners(relation_masks(made.masks)), "pll")
    wanted = search_combinations(ask.accuracy, RELATIONS, (2,))
    assert study.tables["relations"].relations.tolist() == wanted.relations.tolist()
    assert "+".join(study.relations["IsA"]) == wanted.relations[0]
    graph = read_facts("pocket", "IsA,MadeOf")
    mined = finetune(made.model, made.tok, {"IsA": task}, made.masks, None, graph, **QUICK, choose="mined", top=1)
    assert mined.relations["IsA"] == (mined_relations(graph, task.search).relation[0],)
    tuned = study_of(made, **quick, choose="fine-tuned", search="exhaustive")
    shares = {}      # the made-up score likes what removes most
    for some in tuned.tables["relations"].relations:
        unions = [joined(made.masks.sel(task=some.split("+"), seed=s)) for s in (0, 1)]
        shares[some] = np.mean([round(float((~mask[mask.space.groups[0].name]).mean()), 3) for mask in unions])
    assert "+".join(tuned.relations["IsA"]) == max(shares, key=shares.get) and len(shares) == 6
    again = study_of(made, dict(tuned.relations))
    assert again.relations == tuned.relations and "relations" not in again.tables


def test_what_cannot_be_tuned(made, tmp_path):
    own = Masks([(labels, Mask.random(m.space, .5, i)) for i, (labels, m) in enumerate(made.masks)])
    n = len(made.tasks["IsA"].train)
    asked = partial(dict, masks=made.masks, relations=["IsA", "MadeOf"], graph=None, tasks=made.tasks)
    for change, error, match in (
        (dict(masks=own), DifferentStarts, "started from different masks"),
        (dict(train_sizes=(10**6,)), SubnetError, "1,000,000 cannot be drawn of them"),
        (dict(train_sizes=(1, .5, n)), SubnetError, "two sizes are"),
        (dict(train_sizes=(2.5,)), SubnetError, "neither a share nor a number"),
        (dict(train_sizes=(1e-9,)), SubnetError, "too few"),
        (dict(train_sizes=()), SubnetError, "train_sizes"),
        (dict(batches=()), SubnetError, "batches must be different numbers, at least one"),
        (dict(rates=(1e-4, 1e-4)), SubnetError, "rates must be different numbers"),
        (dict(tuning_seeds=()), SubnetError, "tuning_seeds"),
        (dict(tasks={}), SubnetError, "no task to learn"),
        (dict(relations=["IsA", "Isa"]), UnknownName, "did you mean IsA"),
        (dict(relations={"IsA": ["IsA"]}), UnknownName, "task with relations 'MadeOf'"),
        (dict(relations=[]), SubnetError, "no relation was given for IsA"),
        (dict(relations="IsA+IsA"), SubnetError, "given twice"),
        (dict(relations=None, choose="best"), UnknownName, "way to choose relations"),
        (dict(relations=None, choose="mined"), SubnetError, "give one, in a shell --graph"),
        (dict(relations=None, sizes=(9,)), SubnetError, "combinations of 9 relations"),
        (dict(join="vote", weights={"IsA": 1.}), SubnetError, "MadeOf has none"),
    ):
        given = asked() | {k: v for k, v in change.items() if k in asked()}
        rest = {k: v for k, v in change.items() if k not in asked()}
        with pytest.raises(error, match=match):
            finetune(made.model, made.tok, **given, **QUICK | rest, to=tmp_path / "never")
    assert not (tmp_path / "never").exists()
    none = Choices(())
    with pytest.raises(SubnetError, match="no search question"): replace(made.tasks["IsA"], search=none)
    allowed = finetune(made.model, made.tok, {"IsA": made.tasks["IsA"]}, own.sel(seed=0), ["IsA", "MadeOf"],
                       different_starts=True, **QUICK | dict(train_sizes=(4,), tuning_seeds=(0,), random=0, held=False))
    assert set(allowed.items.under) == {"full", "union start"}


# ── the paper's settings, and the shell ──────────────────────────────────────────────────────────────────────────────

PAPER = dict(batches=[8, 16, 32], rates=[3e-5, 4e-5, 5e-5], dropout=True, choose="fine-tuned", search="exhaustive",
             different_starts=True, tuning_seeds=[0, 1, 2], sizes=[3, 4, 5])
GIVEN = ["--model", "some/bert", "--out", "out", "--tasks", "copa:x", "--masks", "y"]


def ordered(*words: str) -> Order: return order(find_recipe("finetune"), [*GIVEN, *words])


def test_as_published():
    values = ordered("--published").values
    assert all(alike(values[name], value) for name, value in PAPER.items())


@pytest.mark.parametrize("clause", [c for c in find_recipe("finetune").clauses if c.by == SETTING], ids=lambda c: c.name)
def test_a_clause_is_our_default_sets_the_paper_s_and_gives_way(clause):
    assert alike(ordered().values[clause.name], clause.ours) and alike(PAPER[clause.name], clause.published)
    own = {"batches": "4", "rates": "0.1", "choose": "zero-shot", "search": "greedy"}.get(clause.name)
    said = [f"--no-{clause.name.replace('_', '-')}"] if own is None else [f"--{clause.name}", own]
    values = ordered("--published", *said).values
    assert not alike(values[clause.name], clause.published)
    others = {c.name for c in find_recipe("finetune").clauses if c.by == SETTING and not c.when} - {clause.name}
    assert all(alike(values[name], PAPER[name]) for name in others)


def test_published_trains_with_dropout(made, trained):
    found = study_of(made, tasks=("IsA",), train_sizes=(4,), random=0, held=False, published=True)
    assert {(one["dropout"], one["batch"]) for one in trained} == {(True, 4)}
    names = {d.name for d in found.departures}
    assert {"batches", "rates", "choose"} < names and not {"dropout", "different_starts", "search"} & names


def test_the_head_drops_a_tenth(made, monkeypatch):
    seen = []
    class Stop(Exception): "Ends it."

    def fit(*a: Any, **k: Any) -> Any:
        seen.append((a[2].head.dropout, k["dropout"]))
        raise Stop
    monkeypatch.setattr(sys.modules[learned.__module__], "fit", fit)
    for dropout in (False, True):
        with pytest.raises(Stop):
            learned(made.model, made.tok, made.tasks["IsA"].train, made.tasks["IsA"].search, dropout=dropout)
    assert seen == [(0., False), (.1, True)]


def test_a_shell_names_relations_by_task():
    of = partial(MODULE._by_task, tasks=["copa", "csqa"])
    assert of([]) is None
    assert of(["IsA+HasA"]) == {"copa": "IsA+HasA", "csqa": "IsA+HasA"}
    assert of(["IsA+HasA", "csqa=Causes"]) == {"copa": "IsA+HasA", "csqa": "Causes"}
    with pytest.raises(UnknownName, match="did you mean copa"): of(["cop=IsA"])


def test_what_it_would_cost():
    words = ["--train-sizes", "100,0.5", "--batches", "8,16", "--rates", "1e-4", "--epochs", "4", "--random", "2"]
    work = ordered(*words, "--relations", "IsA+HasA").work()
    full, union, random = work[:3]
    assert (full.axes, full.steps, full.batch) == ({"task": 1, "rate": 1, "tuning seed": 3}, 4 * 13, 8)
    assert union.cells is None and random.cells == 1 * 1 * 2 * 2 * 3 and len(work) == 2 * 2 * 3
    assert work[-1].steps is None and work[-1].epochs == 4
    assert "search of combinations" in {w.what for w in ordered("--choose", "fine-tuned").work()}


@pytest.mark.real
def test_a_real_set(real):
    model, tok = load(str(real / "models" / "minilm-l6-mlm"))
    task = choice_task(real / "datasets" / "copa", limit_search=8, test=8)
    study = finetune(model, tok, {"copa": task}, related(model, (0,)), ["IsA", "Desires"],
                     **QUICK | dict(train_sizes=(8,), tuning_seeds=(0,), rates=(5e-5,)))
    assert len(study.items) == 5 * 8 and study.runs.dev.between(0, 1).all()
