"Questions under unions of relation masks: conditions, what is compared, resume, what is refused, and the real sets."
import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from subnet_explorer.core.errors import SubnetError, UnknownName
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.masks import Masks
from subnet_explorer.core.run import OtherRun
from subnet_explorer.core.space import Space
from subnet_explorer.data.choices import BadChoices, as_choices, choice_task
from subnet_explorer.data.facts import read_facts, split
from subnet_explorer.data.files import BadFacts
from subnet_explorer.measure.options import plausibility
from subnet_explorer.model.load import load
from subnet_explorer.recipes.answer import (
    AnswerStudy,
    answer,
    published_accuracy,
    published_combinations,
    read_reasoning,
    told_facts,
)
from subnet_explorer.recipes.clauses import SETTING, alike
from subnet_explorer.recipes.relations import DifferentStarts, relation_masks
from subnet_explorer.recipes.start import order
from subnet_explorer.recipes.study import find_recipe

RELATIONS = ("IsA", "AtLocation", "MadeOf", "Desires")
QUICK = dict(score="pll", sizes=(2, 3), random=2, mismatched=2, progress=False)


def related(model, seeds=(0, 1), flips=.1):
    space, rows = Space.of(model, "weight", layers="top-half"), []
    for seed in seeds:
        start = Mask.random(space, .7, seed)
        masks = [start ^ Mask.random(space, flips, 10 + i) for i in range(len(RELATIONS))]
        rows += [({"task": r, "seed": seed}, mask) for r, mask in zip(RELATIONS, masks, strict=True)]
    return Masks(rows)


@pytest.fixture(scope="module")
def made():
    model, tok = load("pocket-bert")
    tasks = {name: choice_task(f"pocket:{name}", name, limit_search=16, test=20) for name in ("IsA", "MadeOf")}
    masks, graph = related(model), read_facts("pocket", "IsA,MadeOf")
    study = answer(model, tok, tasks, masks, graph, **QUICK, oracle=True, top=2, search="exhaustive")
    return model, tok, tasks, masks, study


def test_every_question_once_under_every_condition(made):
    _, _, tasks, _, study = made
    t = study.items
    assert not t.duplicated(["task", "under", "seed", "draw", "item"]).any()
    counts = {under: part.groupby(["seed", "draw"], dropna=False).ngroups for under, part in t.groupby("under")}
    assert counts == {"full": 1, "union": 2, "mined": 2, "random": 2, "mismatched": 2, "oracle": 2}
    assert t.query("under == 'mismatched'").draw.unique() == [0]      # of two relations that are left there is one union
    assert len(t) == 2 * 20 * sum(counts.values())
    for name, task in tasks.items():
        full = t.query("task == @name and under == 'full'")
        assert full.label.tolist() == task.test.gold and full.id.tolist() == [q["id"] for q in task.test]
        assert set(t.query("task == @name and under == 'union'").relations) == {"+".join(study.relations[name])}
        others = t.query("task == @name and under == 'mismatched'").relations.str.split("+")
        assert not set(others.sum()) & set(study.relations[name])


def test_answers_are_those_under_the_joined_masks(made):
    model, tok, tasks, masks, study = made
    kept = relation_masks(masks)
    for name, task in tasks.items():
        part = study.items.query("task == @name")
        for under in ("union", "oracle", "mined"):
            rows = part[part.under == under]
            some = rows.relations.iloc[0].split("+")
            for seed in (0, 1):
                wanted = plausibility(model, tok, task.test, kept.sel(task=some, seed=seed).union(), "pll")
                assert rows.query("seed == @seed").choice.tolist() == wanted.choice.tolist()
        wanted = plausibility(model, tok, task.test, None, "pll")
        assert part.query("under == 'full'").right.tolist() == wanted.right.tolist()
        best = study.tables["searched"].query("task == @name")
        assert tuple(best.relations.iloc[0].split("+")) == study.relations[name] and len(best) == 6 + 4
        assert best.accuracy.iloc[0] == best.accuracy.max()


def test_gains_are_differences_on_the_same_questions(made):
    *_, study = made
    mean = study.items.groupby(["task", "under"]).right.mean()
    for row in study.gains().itertuples():
        assert row.mean == pytest.approx(mean[row.task, row.of] - mean[row.task, row.against])
    assert (study.optimism()["mean"] >= -1e-9).all()      # the best on the reported questions is the best there
    found = study.overall().set_index(["of", "against"])
    assert found.loc[("union", "full"), "mean"] == pytest.approx(
        (mean.unstack("under")["union"] - mean.unstack("under")["full"]).mean())
    single = study.tables["singles"].query("under == 'single'").groupby(["task", "relations"]).right.mean()
    for row in study.matrix().itertuples():
        assert row.mean == pytest.approx(single[row.task, row.relations] - mean[row.task, "full"])
    assert len(study.matrix()) == 2 * 4
    without = study.tables["singles"].query("under == 'without'").groupby(["task", "relations"]).right.mean()
    for row in study.ablation().itertuples():
        assert row.mean == pytest.approx(mean[row.task, "union"] - without[row.task, row.relations])
    who = study.who("IsA")
    assert list(who) == ["question", "full", *RELATIONS] and len(who) == 20
    assert who[list(RELATIONS)].mean().to_dict() == pytest.approx(single["IsA"].to_dict())


def test_what_is_told(made, tmp_path):
    *_, study = made
    table = study.summary()
    assert set(table.under) >= {"chance", "options (no model)", "full", "union", "oracle"}
    assert any("as published" in note for note in study.notes)
    said = json.loads(study.save(tmp_path).read_text())
    assert said["relations"]["IsA"] == list(study.relations["IsA"]) and said["n_test"] == {"IsA": 20, "MadeOf": 20}
    page = study.report(tmp_path / "report.html").read_text()
    assert "These numbers are the paper" in page and "Gain over the full model" in page
    assert published_accuracy().query("model == 'MPNet' and under == 'oracle'")["ARCT2"].item() == 57.7
    assert published_combinations().set_index("model").loc["BERT", "COPA dev"] == "AtLocation+HasA+HasProperty"
    mean = published_accuracy().iloc[:, 2:-1].mean(axis=1)
    assert (abs(mean - published_accuracy().average) < .1).all()      # as printed, mostly rounded down


def test_a_study_goes_on(made, tmp_path, monkeypatch):
    model, tok, tasks, masks, _ = made
    few = {name: replace(task, test=task.test.take(8), search=task.search.take(8)) for name, task in tasks.items()}
    whole, calls = answer(model, tok, few, masks, **QUICK), []
    module = sys.modules[answer.__module__]
    real = module._answers
    def stopping(*a):
        calls.append(0)
        if len(calls) == 2: raise KeyboardInterrupt
        return real(*a)
    monkeypatch.setattr(module, "_answers", stopping)
    with pytest.raises(KeyboardInterrupt): answer(model, tok, few, masks, **QUICK, to=tmp_path)
    again = answer(model, tok, few, masks, **QUICK, to=tmp_path)
    assert len(calls) == 3 and again.items.equals(whole.items) and again.summary().equals(whole.summary())
    assert isinstance(again, AnswerStudy) and "mined" not in again.tables
    with pytest.raises(OtherRun, match="score"):
        answer(model, tok, few, masks, **{**QUICK, "score": "logprob"}, to=tmp_path)


def test_what_cannot_be_answered(made, tmp_path):
    model, tok, tasks, masks, _ = made
    own = Masks([(labels, Mask.random(m.space, .5, i)) for i, (labels, m) in enumerate(masks)])
    for change, error, match in (
        (dict(masks=own), DifferentStarts, "started from different masks"),
        (dict(sizes=(5,)), SubnetError, "combinations of 5 relations cannot be made of 4"),
        (dict(score="logits"), UnknownName, "score of options"),
        (dict(join="onion"), UnknownName, "did you mean union"),
        (dict(search="all"), UnknownName, "search over combinations"),
        (dict(tasks={}), SubnetError, "no task"), (dict(sizes=()), SubnetError, "at least one; got"),
        (dict(weights={"IsA": 1.}), SubnetError, 'weights go with join="vote"'),
        (dict(join="vote", weights={"IsA": 1.}), SubnetError, "AtLocation has none"),
        (dict(join="vote", weights=dict.fromkeys(RELATIONS, 0.)), SubnetError, "weights"),
        (dict(join="vote", share=0.), SubnetError, "share"),
        (dict(graph=read_facts("pocket", "Causes")), BadFacts, "none is in both"),
    ):
        given = dict(tasks=tasks, masks=masks, graph=None, **QUICK) | change
        with pytest.raises(error, match=match): answer(model, tok, **given, to=tmp_path / "never")
    long = as_choices([*tasks["IsA"].test[:3], dict(question="a robin " * 60, choices=["y", "z"], label=0)])
    for part in ("search", "test"):
        with pytest.raises(BadChoices, match="the model reads at most"):
            answer(model, tok, {"long": replace(tasks["IsA"], **{part: long})}, masks, **QUICK, to=tmp_path / "never")
    assert not (tmp_path / "never").exists()
    with pytest.raises(SubnetError, match="two tasks have the same name"):
        read_reasoning(model, tok, tasks=["pocket:IsA", "IsA=pocket:MadeOf"], masks=str(tmp_path))


def test_without_a_choice_nothing_is_too_good(made):
    "Where there is one combination, the best is the only one."
    model, tok, tasks, masks, _ = made
    few = {"IsA": replace(tasks["IsA"], test=tasks["IsA"].test.take(8), search=tasks["IsA"].search.take(8))}
    study = answer(model, tok, few, masks, **{**QUICK, "sizes": (4,), "mismatched": 0}, oracle=True, singles=False)
    assert np.allclose(study.optimism()["mean"], 0) and set(study.items.under) == {"full", "union", "random", "oracle"}
    with pytest.raises(SubnetError, match="singles=True"): study.matrix()


def test_masks_vote(made):
    "With the weights and the share that were given; equal votes of all are what an intersection keeps."
    model, tok, tasks, masks, _ = made
    few = {"IsA": replace(tasks["IsA"], test=tasks["IsA"].test.take(8), search=tasks["IsA"].search.take(8))}
    quick = {**QUICK, "sizes": (4,), "random": 0, "mismatched": 0, "singles": False}
    weights = {"IsA": 5., "AtLocation": 1., "MadeOf": 1., "Desires": 1.}
    study = answer(model, tok, few, masks, **quick, join="vote", weights=weights, share=.6)
    alone = plausibility(model, tok, few["IsA"].test, masks.sel(task="IsA", seed=1)[0], "pll")
    assert study.items.query("under == 'union' and seed == 1").choice.tolist() == alone.choice.tolist()
    kept = masks.sel(task="IsA", seed=1)[0]
    assert study.tables["unions"].query("seed == 1").sparsity.item() == kept.sparsity
    assert study.config["weights"] == weights and study.config["share"] == .6
    everyone = answer(model, tok, few, masks, **quick, join="vote", share=1.)
    both = answer(model, tok, few, masks, **quick, join="intersection")
    assert everyone.items.choice.tolist() == both.items.choice.tolist()
    assert everyone.tables["unions"].sparsity.tolist() == both.tables["unions"].sparsity.tolist()


def test_seeds_may_have_any_name_and_ids_may_repeat(made, tmp_path):
    model, tok, tasks, masks, _ = made
    named = Masks([({**labels, "seed": f"run {labels['seed']}"}, mask) for labels, mask in masks])
    rows = [{**row, "id": "one"} for row in tasks["IsA"].test[:6]]
    few = {"IsA": replace(tasks["IsA"], test=as_choices(rows), search=tasks["IsA"].search.take(8))}
    quick = {**QUICK, "sizes": (2,), "mismatched": 0}
    study = answer(model, tok, few, named, **quick, to=tmp_path)
    assert answer(model, tok, few, named, **quick, to=tmp_path).items.equals(study.items)
    assert list(study.items.seed.dropna().unique()) == ["run 0", "run 1"]
    assert study.who("IsA").question.tolist() == [row["question"] for row in rows]
    assert len(study.gains())


def test_many_options_and_relations_that_nobody_mentions(made):
    model, tok, tasks, masks, _ = made
    words = [w for w in tok.get_vocab() if w.isalpha()][:40]
    many = as_choices([dict(question="a robin is a [MASK] .", choices=words, label=39)] * 2)
    graph = read_facts("pocket", "IsA,MadeOf,Desires")
    few = {"IsA": replace(tasks["IsA"], test=many, search=tasks["IsA"].search.take(8))}
    study = answer(model, tok, few, masks, graph, **{**QUICK, "sizes": (2,), "singles": False})
    assert study.items.choice.between(0, 39).all()
    mined = study.tables["mined"].set_index("relation").questions
    asked = study.items.query("under == 'mined'").relations.iloc[0].split("+")
    assert set(asked) == set(mined[mined > 0].index)


def test_a_study_about_facts_says_whether_they_were_known(made):
    _, _, tasks, _, study = made
    assert sum("nobody said which of them" in note for note in study.notes) == len(tasks)


# ── the paper's settings, and the shell ──────────────────────────────────────────────────────────────────────────────

PAPER = dict(score="published", search="exhaustive", oracle=True, different_starts=True, sizes=[3, 4, 5], top=5)


def ordered(*words):
    given = ["--model", "some/bert", "--out", "out", "--tasks", "copa:x", "--masks", "y"]
    return order(find_recipe("answer"), [*given, *words])


@pytest.mark.parametrize("clause", [c for c in find_recipe("answer").clauses if c.by == SETTING], ids=lambda c: c.name)
def test_a_clause_is_our_default_sets_the_paper_s_and_gives_way(clause):
    "The share of questions to search by is no search over combinations."
    assert alike(ordered().values[clause.name], clause.ours)
    values = ordered("--published").values
    assert all(alike(values[name], value) for name, value in PAPER.items()) and values["search_share"] == .5
    own = {"score": "pll", "search": "greedy"}.get(clause.name)
    said = [f"--no-{clause.name.replace('_', '-')}"] if own is None else [f"--{clause.name}", own]
    assert not alike(ordered("--published", *said).values[clause.name], clause.published)


def test_weights_from_a_shell_and_what_it_would_cost():
    asked = ordered("--join", "vote", "--weights.IsA", "2", "--share", "0.7", "--limit-test", "40", "--random", "3")
    assert asked.values["weights"] == {"IsA": 2.} and asked.values["share"] == .7
    first, *others = asked.work()
    assert first.axes == {"task": 1, "condition": 4, "question": 40} and first.examples == 160
    assert str(first).endswith("= 160 texts or more; only read") and all(work.cells is None for work in others)
    model = ["--model", "pocket-bert"]
    assert ordered(*model).values["trained_on"] == "pocket" and ordered().values["trained_on"] is None


def test_told_facts_are_those_learned_from_and_chosen_by():
    parts = split(read_facts("pocket", "MadeOf,IsA"))
    told = set(told_facts(parts))
    assert told == {f.uuid for f in (*parts.train, *parts.dev)} and not told & {f.uuid for f in parts.test}


@pytest.mark.real
def test_real_sets_from_end_to_end(real):
    model, tok = load(str(real / "models" / "minilm-l6-mlm"))
    masks = related(model, seeds=(0,), flips=.05)
    for name, score in (("copa", "logprob"), ("commonsenseqa", "published"), ("arct", "published")):
        task = choice_task(real / "datasets" / name, limit_search=6, test=8)
        task = replace(task, search=task.test) if name == "commonsenseqa" else task      # of these concepts are known
        study = answer(model, tok, {name: task}, masks, **{**QUICK, "score": score, "sizes": (2,), "singles": False})
        assert 0 < study.items.query("under == 'full'").right.size <= 8
        assert study.tables["baselines"].score.between(0, 1).all()
