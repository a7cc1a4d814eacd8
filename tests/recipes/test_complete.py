"Completing triples: what is asked, under what, and what the numbers are means of."
from __future__ import annotations

import importlib
import json
from collections import Counter

import numpy as np
import pytest
import torch

from subnet_explorer import recipes
from subnet_explorer.core.errors import SpaceMismatch, SubnetError, UnknownName
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.masks import Masks
from subnet_explorer.core.space import Space
from subnet_explorer.data.facts import Facts, answerable, read_facts, split
from subnet_explorer.data.files import BadFacts
from subnet_explorer.data.links import SEEN, joined, link
from subnet_explorer.model.load import load
from subnet_explorer.recipes.lamp import lamp
from subnet_explorer.recipes.relations import (
    BadRelations,
    DifferentStarts,
    check_one_start,
    relation_conditions,
    relation_masks,
    shifted,
)

chapter = importlib.import_module("subnet_explorer.recipes.complete")
complete = recipes.complete
FACTS = read_facts("pocket", "IsA,HasProperty,MadeOf")
QUICK = dict(random=0, mismatched=False, progress=False)


@pytest.fixture(scope="module")
def found(pocket_bert, tmp_path_factory):
    "A LAMP study of three relations and two seeds, in a folder."
    to = tmp_path_factory.mktemp("lamp") / "out"
    return lamp(*pocket_bert, FACTS, layers="4", steps=25, lr=0.1, seeds=(0, 1), to=to, **QUICK)


@pytest.fixture(scope="module")
def study(pocket_bert, found):
    before = {k: v.clone() for k, v in pocket_bert[0].state_dict().items()}
    made = complete(*pocket_bert, FACTS, found, random=2, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in pocket_bert[0].state_dict().items())
    return made


# ── what is asked ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_asked_that_was_told(found, study):
    told = {link(f) for f in (*found.data.train, *found.data.dev)}
    assert not told & {link(f) for f in (*study.triples, *study.hops)}
    assert {link(f) for f in study.triples} == {link(f) for f in found.data.test} - told
    counted = sum(reasons.get(SEEN, 0) for reasons in study.triples.skipped.values())
    assert counted == len(FACTS) - len(study.triples) and "left_out" in study.tables


def test_two_hops_are_known_to_nobody_and_follow(study):
    facts = {link(f) for f in FACTS}
    kinds = {(s, o) for r, s, o in facts if r == "isa"}
    for _, subject, object in map(link, study.hops):
        assert ("hasproperty", subject, object) not in facts
        assert any(s == subject and ("hasproperty", kind, object) in facts for s, kind in kinds)
    assert len(study.hops) <= len(joined(FACTS))


def test_every_condition_asks_every_triple(study):
    n = study.items.groupby(["test", "under"]).agg(draws=("draw", "nunique"), asked=("uuid", "nunique"))
    for test, facts in (("one hop", study.triples), ("two hops", study.hops)):
        assert (n.loc[test].asked == len(facts)).all()
    seeds = study.items[study.items.under == "mismatched"]
    assert set(seeds.seed) == {0, 1} and set(seeds["shift"]) == {1, 2}
    assert not (study.items.filtered > study.items["rank"]).any()


# ── what the numbers are ─────────────────────────────────────────────────────────────────────────────────────────────


def test_means_are_means_over_relations_and_over_triples(study):
    items = study.items[(study.items.test == "one hop") & (study.items.under == "subnetwork")]
    t = study.scores.set_index(["test", "relation", "under", "rank", "measure"]).value
    for rank in ("rank", "filtered", "among"):
        reciprocal = 1 / items[rank]
        by_relation = reciprocal.groupby(items.relation).mean()
        assert t["one hop", "macro", "subnetwork", rank, "MRR"] == pytest.approx(by_relation.mean())
        assert t["one hop", "micro", "subnetwork", rank, "MRR"] == pytest.approx(reciprocal.mean())
        hits = (items[rank] <= 2).groupby(items.relation).mean()
        assert t["one hop", "macro", "subnetwork", rank, "P@2"] == pytest.approx(hits.mean())
    assert t["one hop", "macro", "subnetwork", "published", "MRR"] == pytest.approx(
        items.published.groupby(items.relation).mean().mean())
    for relation, value in (1 / items.filtered).groupby(items.relation).mean().items():
        assert study.table().loc[("one hop", relation), "subnetwork"] == pytest.approx(value)


def test_gains_are_differences_of_means(study):
    gains = study.gains().set_index(["test", "against"])["mean"]
    t = study.scores.query("relation == 'macro' and measure == 'MRR' and rank == 'filtered'")
    value = t.set_index(["test", "under"]).value
    for test, against in gains.index:
        assert gains[test, against] == pytest.approx(value[test, "subnetwork"] - value[test, against])
    with pytest.raises(SubnetError, match="no measure 'P@0'"): study.pairs("P@0")
    with pytest.raises(UnknownName, match="did you mean filtered"): study.pairs(rank="filterd")


def test_it_is_plain_data_and_a_page(study, tmp_path):
    out = study.to_json()
    assert out == json.loads(json.dumps(out))
    assert sum(out["triples"]["one hop"].values()) == len(study.triples)
    page = study.report(tmp_path / "report.html").read_text()
    assert "As published: two hops" in page and "What it cost" in page
    table = chapter.published_table("one hop").set_index("published")
    assert table.loc["BERT, subnetwork", "MRR"] == pytest.approx(0.228)
    assert list(chapter.published_table("two hops").columns) == ["published", "P@1", "P@2", "P@3"]


# ── in a folder, from a shell, several tokens ────────────────────────────────────────────────────────────────────────


def test_it_goes_on_where_it_stopped(pocket_bert, found, tmp_path, monkeypatch):
    how = {**QUICK, "tuned": ("whole",), "two_hop": (), "to": tmp_path / "out"}
    real, asked = chapter.link_ranks, []
    lamp_chapter = importlib.import_module("subnet_explorer.recipes.lamp")
    fit = lamp_chapter.fit
    monkeypatch.setattr(lamp_chapter, "fit", lambda *a, **kw: fit(*a, **{**kw, "steps": 2, "every": 1}))

    def failing(model, tok, facts, *rest, **kw):
        asked.append(facts.relations[0])
        if len(asked) == 3: raise KeyboardInterrupt
        return real(model, tok, facts, *rest, **kw)
    monkeypatch.setattr(chapter, "link_ranks", failing)
    with pytest.raises(KeyboardInterrupt): complete(*pocket_bert, FACTS, found, **how)
    first = complete(*pocket_bert, FACTS, found, **how)
    assert len(asked) == 3 + 4 and "fine-tuned" in set(first.items.under)      # two of six tables were there
    again = complete(*pocket_bert, FACTS, found, **how)
    assert len(asked) == 7 and again.scores.round(9).equals(first.scores.round(9))
    with pytest.raises(SubnetError, match=r"it differs in .*one_word"):
        complete(*pocket_bert, FACTS, found, one_word=True, **how)


def test_from_a_shell(found, tmp_path, capsys):
    from subnet_explorer.cli import main
    words = ["--model", "pocket-bert", "--triples", "pocket", "--relations", "MadeOf", "--masks", str(found.folder)]
    asked = [*words, "--trained-on", "pocket", "--split-seed", "0", "--random", "0", "--no-mismatched"]
    other = [*asked, "--out", str(tmp_path / "a"), "--json", "--quiet", "--no-report"]
    other[other.index("--split-seed") + 1] = "1"
    assert main(["complete", *other]) == 2
    assert "trained on another split" in capsys.readouterr().err
    (tmp_path / "facts.jsonl").write_text("".join(
        json.dumps({"pred": f.relation, "sub": f.subject, "obj": f.object, "masked_sentences": [f.prompt],
                    "uuid": f.uuid}) + "\n" for f in FACTS))
    for name, told in (("a", "pocket"), ("b", str(tmp_path / "facts.jsonl"))):      # of sixteen relations, of three
        asked[asked.index("--trained-on") + 1] = told
        assert main(["complete", *asked, "--out", str(tmp_path / name), "--json", "--quiet", "--no-report"]) == 0
        out = json.loads(capsys.readouterr().out)
        assert list(out["triples"]["one hop"]) == ["MadeOf"]
        assert out["triples"]["one hop"]["MadeOf"] == len(found.data.test["MadeOf"])


def test_masks_of_other_relations_were_not_trained_on_these_facts(pocket_bert, found, tmp_path):
    (tmp_path / "facts.tsv").write_text("relation\thead\ttail\nDesires\tdog\tbone\n" * 2)
    with pytest.raises(BadRelations, match="were not trained on facts of Desires"):
        chapter.read_triples(*pocket_bert, triples="pocket", masks=str(found.folder),
                             trained_on=str(tmp_path / "facts.tsv"), split_seed=0)


def test_objects_of_several_tokens_count(pocket_bert, found):
    from subnet_explorer.data.facts import Fact
    pairs = (("soup", "hot water"), ("igloo", "ice"))
    facts = Facts(tuple(Fact("MadeOf", s, o, f"{s} is made of [MASK] .", s) for s, o in pairs), "mine")
    one = complete(*pocket_bert, facts, found, FACTS, two_hop=(), **QUICK)
    assert len(one.triples) == 1 and one.rank == "filtered"
    all_of = complete(*pocket_bert, facts, found, FACTS, two_hop=(), several="left-to-right", most=20, **QUICK)
    assert len(all_of.triples) == 2 and all_of.rank == "among_filtered"
    assert any("at most 20 candidates" in note for note in all_of.notes)
    assert all_of.scores["rank"].isin(chapter.RANKS).all()


def test_frequency_is_that_of_what_was_told(pocket_bert, found):
    "By hand: objects by how often training and development have them; equal ones share their places."
    study = complete(*pocket_bert, FACTS["MadeOf"], found, FACTS, **QUICK)
    data, tok = found.data, pocket_bert[1]
    told = Counter(f.object for part in (data.train, data.dev) for f in part["MadeOf"])
    rows = study.items[study.items.under == "frequency"].query("test == 'one hop'").set_index("uuid")
    assert len(rows) == len(study.triples) and rows.published.isna().all()
    for fact in study.triples:
        n = told[fact.object]
        above, alike = sum(k > n for k in told.values()), sum(k == n for k in told.values())
        alike = alike - 1 if n else len(tok) - len(told) - 1      # never told: so is the rest of the vocabulary
        assert rows["rank"][fact.uuid] == 1 + above + alike / 2
        others = {f.object for f in FACTS["MadeOf"] if f.subject == fact.subject} - {fact.object}
        before = sum(told[o] > n for o in others) + sum(told[o] == n for o in others) / 2
        assert rows.filtered[fact.uuid] == rows["rank"][fact.uuid] - before
    assert "frequency" in set(study.gains().against)


def test_nothing_told_nothing_frequent(pocket_bert, found):
    masks = found.masks
    study = complete(*pocket_bert, FACTS["MadeOf"], masks, FACTS, two_hop=(), **QUICK)
    assert "frequency" not in set(study.items.under) and any("Nobody said" in note for note in study.notes)


# ── rivals ───────────────────────────────────────────────────────────────────────────────────────────────────────────


RIVALS = dict(tuned=("whole", "lora"), tuned_steps=2, rivals=("TuckER",), rival_epochs=2, rival_dimension=8,
              rival_seeds=(3, 4), two_hop=())


@pytest.fixture(scope="module")
def beside(pocket_bert, found, tmp_path_factory):
    before = {k: v.clone() for k, v in pocket_bert[0].state_dict().items()}
    to = tmp_path_factory.mktemp("rivals") / "out"
    made = complete(*pocket_bert, FACTS["MadeOf"], found, FACTS, **RIVALS, **QUICK, to=to)
    assert all(torch.equal(v, before[k]) for k, v in pocket_bert[0].state_dict().items())
    return made


def test_rivals_answer_the_same_questions_among_the_same_candidates(beside):
    items, by = beside.items, beside.items.groupby("under")
    assert set(by.groups) == {"full", "subnetwork", "frequency", "fine-tuned", "low-rank", "TuckER"}
    assert (by.uuid.nunique() == len(beside.triples)).all()
    assert (items.groupby(["uuid", "sub", "obj"]).candidates.nunique() == 1).all()
    graph = items[items.under == "TuckER"]
    assert set(graph.draw) == {0, 1} and graph["rank"].isna().all() and graph.entities_filtered.notna().all()
    assert (graph.among_filtered <= graph.among).all() and (graph.among <= graph.candidates).all()
    assert beside.rank == "among_filtered" and set(beside.gains().against) == set(by.groups) - {"subnetwork"}


def test_budgets_are_told(beside, found):
    costs = beside.tables["costs"].set_index("under")
    assert costs.steps["fine-tuned"] == costs.steps["low-rank"] == 2
    assert 0 < costs.parameters["low-rank"] < costs.parameters["fine-tuned"]
    assert set(costs.steps["subnetwork"]) == {25} and (costs.dimension["TuckER"] == 8).all()
    assert (costs.drop("subnetwork").seconds > 0).all() and len(costs) == 6 + 2 + 2
    assert (beside.folder / "costs.csv").exists()
    assert chapter.budget_of(found.masks, "IsA") == 25      # with nothing asked: as many as the masks had


def test_what_a_graph_never_saw_is_said(beside, found):
    from subnet_explorer.data.links import link
    seen = {entity for f in found.data.train for entity in link(f)[1:]}
    graph = beside.items[beside.items.under == "TuckER"].drop_duplicates("uuid").set_index("uuid").unseen
    for fact in beside.triples:
        _, subject, object = link(fact)
        lacking = graph[fact.uuid]
        assert ("subject" in lacking, "object" in lacking) == (subject not in seen, object not in seen)
    n = sum(graph != "")
    assert any(f"{n} of {len(beside.triples)} (one hop)" in note for note in beside.notes) and n


def test_rivals_are_not_trained_twice(pocket_bert, found, beside, monkeypatch):
    rivals = importlib.import_module("subnet_explorer.recipes.rivals")
    for name in ("embed_graph", "fine_tuned"): monkeypatch.setattr(rivals, name, lambda *a, **k: pytest.fail("trained"))
    again = complete(*pocket_bert, FACTS["MadeOf"], found, FACTS, **RIVALS, **QUICK, to=beside.folder)
    assert again.scores.round(9).equals(beside.scores.round(9))


# ── what does not fit ────────────────────────────────────────────────────────────────────────────────────────────────


def test_bad_input_is_named(pocket_bert, found):
    ask = lambda *given, **how: complete(*pocket_bert, *given, **{**QUICK, **how})  # noqa: E731
    with pytest.raises(BadRelations, match="no relation has both"): ask(read_facts("pocket", "Desires"), found)
    with pytest.raises(BadFacts, match="nothing is left of"): ask(found.data.train, found)
    with pytest.raises(SubnetError, match="give a split"): ask(FACTS, found, None, FACTS["IsA"], tuned=["lora"])
    with pytest.raises(UnknownName, match="way of fine-tuning"): ask(FACTS, found, tuned=["head"])
    with pytest.raises(UnknownName, match="did you mean TuckER"): ask(FACTS, found, rivals=["tucker"])
    bare = Masks(found.masks.rows())
    with pytest.raises(SubnetError, match="graph embeddings need to know"): ask(FACTS, bare, rivals=["TuckER"])
    with pytest.raises(UnknownName, match="relation with a mask"): ask(FACTS, found, two_hop=("IsA", "Desires"))
    with pytest.raises(SubnetError, match="two hops join two relations"): ask(FACTS, found, two_hop=("IsA",))
    with pytest.raises(BadRelations, match="there is no relation mask"): ask(FACTS, Masks([]))
    with pytest.raises(SpaceMismatch): complete(*load("pocket-gpt2"), FACTS, found, **QUICK)


def test_what_was_told_is_asked_for(pocket_bert, found):
    bare = Masks(found.masks.rows())
    made = complete(*pocket_bert, found.data.test, bare, two_hop=(), **QUICK)
    assert any("Nobody said what the masks were trained on" in note for note in made.notes)
    told = complete(*pocket_bert, FACTS, bare, None, found.data, two_hop=(), **QUICK)
    assert told.triples.fingerprint == made.triples.fingerprint


# ── relation masks ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_gives_the_masks_of_the_study(found):
    from subnet_explorer.core.store import Store
    known = {(labels["task"], labels["seed"]): mask.id for labels, mask in found.masks}
    for source in (found, found.masks, found.folder, Store(found.folder / "runs")):
        masks = relation_masks(source)
        assert {(labels["task"], labels["seed"]): mask.id for labels, mask in masks} == known
        assert masks.seeds == [0, 1] and len(masks.starts) == 6
        check_one_start(masks.sel(seed=1))
        with pytest.raises(DifferentStarts, match="started from different masks"): check_one_start(masks)


def test_starts_are_told_from_masks_alone(pocket_bert, found):
    space = Space.of(pocket_bert[0], "weight", layers="4")
    start = Mask.random(space, 0.5, seed=0)
    near = start ^ Mask.random(space, 0.2, seed=1)
    rows = [({"task": task, "seed": 0}, mask) for task, mask in (("IsA", start), ("HasA", near))]
    check_one_start(Masks(rows))
    other = ({"task": "X"}, Mask.random(space, 0.5, seed=2))
    with pytest.raises(DifferentStarts): check_one_start(Masks([*rows, other]))


def test_conditions_are_those_of_lamp(found):
    masks = relation_masks(found)
    under = relation_conditions(masks, ["IsA"], random=3)
    own = masks.sel(task="IsA", seed=0)[0]
    assert [m.count for m in under["random"]["IsA"]] == [own.count] * 3
    assert [m.id for m in under["mismatched"]["IsA"]] == [
        m.id for other in shifted(masks.relations, "IsA") for _, m in masks.sel(task=other)]
    assert under["full"] is None and list(under) == ["full", "subnetwork", "random", "mismatched"]
    lacking = Masks([row for row in found.masks.rows() if row[0] != {"task": "IsA", "seed": 1}])
    with pytest.raises(BadRelations, match="IsA has no mask with seed 1"): relation_masks(lacking)
    with pytest.raises(BadRelations, match="lack the label seed"):
        relation_masks(Masks([({"task": "IsA"}, found.masks[0])]))


# ── targets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_subnetworks_of_the_pocket_model_complete_more(pocket_bert):
    "All sixteen relations, three seeds: MRR, and P@1 in two hops, above the full model's."
    facts = read_facts("pocket")
    masks = lamp(*pocket_bert, facts, seeds=(0, 1, 2), **QUICK, **recipes.pocket_settings("lamp"))
    study = complete(*pocket_bert, facts, masks, progress=False)
    for pairs, test in ((study.pairs("MRR"), "one hop"), (study.pairs("P@1"), "two hops")):
        gains = pairs.gains().set_index(["test", "against"]).loc[test]
        assert gains.low["full"] > 0 and gains.low["random"] > 0 and np.isfinite(gains.high).all()


@pytest.mark.real
@pytest.mark.slow
def test_conceptnet_100k(real):
    "Masks trained on one part of the file complete triples of another, in the published templates."
    model, tok = load(real / "models" / "minilm-l6-mlm")
    graph = real / "datasets" / "conceptnet100k"
    relations = ["IsA", "HasProperty", "UsedFor"]
    known = read_facts(graph / "train.tsv.gz", relations, "lamp-b1")
    told = split(answerable(Facts(known.items[:4000], "train"), tok))
    masks = lamp(model, tok, Facts(known.items[:4000]), layers="4-6", steps=60, lr=0.003, **QUICK)
    asked = read_facts(graph / "dev2.tsv", relations, "lamp-b1")
    study = complete(model, tok, asked, masks, known, told, one_word=True, random=1, progress=False)
    assert set(study.items.test) == {"one hop", "two hops"} and len(study.hops) > 100
    t = study.scores.query("relation == 'macro' and measure == 'MRR' and rank == 'filtered' and test == 'one hop'")
    value = t.set_index("under").value
    assert value["subnetwork"] > value["random"] and value["full"] > value["random"]
