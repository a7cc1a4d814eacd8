"New facts: what is proposed, what never is, who judges, and that a stopped study goes on."

from __future__ import annotations

import importlib
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from subnet_explorer.core.errors import SubnetError, UnknownName
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.masks import Masks
from subnet_explorer.core.space import Space
from subnet_explorer.data.annotations import BadAnnotations
from subnet_explorer.data.facts import Fact, Facts, read_facts, split
from subnet_explorer.data.files import BadFacts
from subnet_explorer.data.stated import FOLLOWS, IN_GRAPH, INVERSE, ITSELF, TURNED, Stated, spelling, statement
from subnet_explorer.measure.ask import predictions
from subnet_explorer.measure.judged import precision_at, truth_of
from subnet_explorer.recipes.mine import BEYOND, mine, read_mining
from subnet_explorer.recipes.relations import BadRelations

chapter = importlib.import_module("subnet_explorer.recipes.mine")
RELATIONS = ["PartOf", "HasA"]
FACTS = read_facts("pocket", RELATIONS)
PARTS = split(FACTS)
GRAPH = Facts((*PARTS.train.items[::4], *PARTS.dev.items[::4]), "part of the pocket world")
ABOUT = Facts((*GRAPH.items, *PARTS.test.items), "asked")
QUIET = dict(progress=False, random=1, k=(5, 10))


@pytest.fixture(scope="module")
def masks(pocket_bert):
    "Two seeds of random masks that remove little, so that the model still says something."
    space = Space.of(pocket_bert[0], "weight", layers="top-half")
    rows = [({"task": r, "seed": s}, Mask.random(space, .95, seed=7 * s + i)) for i, r in enumerate(RELATIONS)
            for s in (3, 5)]
    return Masks(rows)


@pytest.fixture(scope="module")
def study(pocket_bert, masks):
    return mine(*pocket_bert, GRAPH, masks, ABOUT, FACTS, each=2, **QUIET)


def keys(table: pd.DataFrame) -> list[tuple[str, str, str]]:
    return [statement(*triple) for triple in zip(table.relation, table["sub"], table.obj, strict=True)]


# ── what is proposed ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_that_the_graph_states_and_nothing_twice(study):
    known = {statement(f.relation, f.subject, f.object) for f in GRAPH}
    for _, part in study.tables["lists"].groupby(["under", "seed", "draw"], dropna=False):
        found = keys(part)
        assert not known & set(found) and len(set(found)) == len(found)
        assert part.place.tolist() == list(range(1, len(part) + 1)) and part.logprob.is_monotonic_decreasing


def test_at_most_so_many_per_question_and_in_all(pocket_bert, masks, study):
    each = study.tables["lists"].groupby(["under", "seed", "draw", "relation", "sub"], dropna=False).size()
    assert each.max() == 2
    few = mine(*pocket_bert, GRAPH, masks, ABOUT, each=2, most=9, **QUIET)
    assert (few.tables["lists"].groupby(["under", "seed", "draw"], dropna=False).size() == 9).all()
    assert few.proposals.obj.tolist() == study.proposals.obj.tolist()[:9]
    gone = few.tables["removed"]
    assert gone[gone.why == BEYOND].n.sum() == len(study.proposals) - 9


def test_ranks_and_probabilities_are_those_of_predictions(pocket_bert, masks, study):
    size, provenance = len(pocket_bert[1]), study.tables["provenance"]
    for row in study.proposals.iloc[[0, 7, -1]].itertuples():
        own = provenance[provenance.place == row.place]
        under = {"full": None} | {s: masks.sel(task=row.relation, seed=s)[0] for s in (3, 5)}
        said = predictions(*pocket_bert, row.prompt, under, k=size).set_index(["under", "token"])
        assert said.loc[("full", row.obj), "rank"] == row.full_rank
        for seed in own.itertuples():
            assert said.loc[(seed.seed, row.obj), "rank"] == seed.rank
            assert math.log(said.loc[(seed.seed, row.obj), "probability"]) == pytest.approx(seed.logprob, abs=1e-3)
            assert seed.mask == masks.sel(task=row.relation, seed=seed.seed)[0].id
        assert row.logprob == pytest.approx(own.logprob.mean(), abs=1e-4)
        assert row.gain == pytest.approx(row.logprob - math.log(said.loc[("full", row.obj), "probability"]), abs=1e-3)
        assert (row.agree, row.of) == (own.proposes.sum(), 2)


def test_the_plain_model_says_the_same(pocket_bert, study):
    "Ranks of the full model, read from its own logits, one prompt at a time."
    model, tok = pocket_bert
    for row in study.tables["lists"].query("under == 'full'").iloc[[0, 11, 40]].itertuples():
        coded = tok(row.prompt.replace("[MASK]", tok.mask_token), return_tensors="pt")
        with torch.no_grad(): logits = model(**coded).logits[0]
        logits = logits[coded.input_ids[0].tolist().index(tok.mask_token_id)]
        token = tok.convert_tokens_to_ids(row.obj)
        assert 1 + int((logits > logits[token]).sum()) == row.rank == row.full_rank
        assert float(logits.log_softmax(-1)[token]) == pytest.approx(row.logprob, abs=1e-3)


def test_only_objects_of_the_graph_if_asked(pocket_bert, masks):
    found = mine(*pocket_bert, GRAPH, masks, objects="seen", **QUIET).tables["lists"]
    for relation, part in found.groupby("relation"): assert set(part.obj) <= {f.object for f in GRAPH[relation]}


# ── when two facts are one ───────────────────────────────────────────────────────────────────────────────────────────

NOUNS = st.sampled_from(["car", "wheel", "berry", "box", "bird", "church", "knife", "child", "house", "bus"])
VERBS = st.sampled_from(["swim", "walk", "bake", "study", "fall", "stop", "cry", "move", "watch", "jump"])
PLURALS = {"berry": "berries", "box": "boxes", "church": "churches", "knife": "knives", "child": "children",
           "bus": "buses"}
FORMS = {"swim": "swimming", "bake": "baking", "stop": "stopping", "move": "moving"}


def spelled(word: str) -> list[str]:
    "Ways in which people write a noun."
    plural = PLURALS.get(word, word + "s")
    return [word, plural, word.upper(), f"the {word}", f"a  {word}", f"The {plural}"]


@given(NOUNS, NOUNS, st.integers(0, 5), st.integers(0, 5))
def test_nouns_have_one_spelling_and_stay_apart(one, other, i, j):
    assert (spelling(spelled(one)[i]) == spelling(spelled(other)[j])) == (one == other)


@given(VERBS, VERBS)
def test_verbs_have_one_spelling_and_stay_apart(one, other):
    assert (spelling(FORMS.get(one, one + "ing")) == spelling(other)) == (one == other)


NAMES = ["IsA", "PartOf", "HasA", "UsedFor"]
TRIPLES = st.lists(st.tuples(st.sampled_from(NAMES), NOUNS, NOUNS), max_size=12)


@given(TRIPLES, st.sampled_from(NAMES), NOUNS, NOUNS, st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=150)
def test_a_graph_knows_what_it_states_whatever_the_spelling(triples, relation, one, other, i, j):
    graph = Facts(tuple(Fact(*triple, "[MASK]", str(n)) for n, triple in enumerate(triples)))
    why = Stated.by(graph).why(relation, spelled(one)[i], spelled(other)[j])
    turned = {"PartOf": "HasA", "HasA": "PartOf"}.get(relation)
    above, below = reached(triples, one), one in reached(triples, other)
    if one == other: wanted = ITSELF
    elif (relation, one, other) in triples: wanted = IN_GRAPH
    elif (turned, other, one) in triples: wanted = INVERSE
    elif relation == "IsA" and other in above: wanted = FOLLOWS
    else: wanted = TURNED if relation == "IsA" and below else ""
    assert why == wanted


def reached(triples: list[tuple[str, str, str]], start: str) -> set[str]:
    "Hypernyms of all levels, one step after another."
    found = {start}
    for _ in triples: found |= {o for r, s, o in triples if r == "IsA" and s in found}
    return found - {start}


# ── who judges ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_precision_is_the_share_of_true_ones(study):
    true, p = set(keys(FACTS.table())), study.precision([5, 10]).set_index(["under", "k"])
    lists = study.tables["lists"]
    for (under, k), row in p.iterrows():
        part = lists[(lists.under == under) & (lists.place <= k)]
        assert row.value == pytest.approx(np.mean([key in true for key in keys(part)]))
        assert row.low <= row.value <= row.high
    told = study.tables["precision"].set_index(["under", "k"]).chance
    assert 0 <= told["together", 10] < .2 and told.drop("together", level=0).isna().all()


def test_gains_are_differences_of_precision(study):
    p, gains = precision_at(study.tables["lists"], [50]).set_index("under").value, study.gains().set_index("against")
    assert set(gains.index) == {"full", "random", "subnetwork"} and (gains.of == "together").all()
    for other in gains.index: assert gains["mean"][other] == pytest.approx(p["together"] - p[other])


def test_a_function_may_not_know(study):
    by = study.judged(lambda relation, subject, object: None if relation == "HasA" else True)
    assert by.proposals.true.isna().sum() == (by.proposals.relation == "HasA").sum() > 0
    assert by.precision([10]).value.tolist() == pytest.approx([1] * 4)


def annotated(study, said, n=12):
    "Annotations of the first proposals: a function of place and name says each label, or None."
    rows = [{**row[["relation", "sub", "obj"]], "annotator": name, "label": label}
            for i, row in study.proposals.head(n).iterrows() for name in ("Ada", "Ben", "Cleo")
            if (label := said(i, name))]
    return pd.DataFrame(rows)


def test_people_judge_by_majority_and_agree_so_far(study):
    by = study.judged(annotated(study, lambda i, name: ["plausible", "not"][i % 3 == 0 or (name, i) == ("Ben", 1)]))
    assert by.proposals.true[:12].tolist() == [i % 3 != 0 for i in range(12)] and by.proposals.true[12:].isna().all()
    row = by.tables["agreement"].iloc[0]
    assert (row.annotators, row["items"]) == (3, 12) and row.low < row.kappa < 1
    first = by.precision([12]).set_index("under").loc["together"]
    assert (first.value, first.judged) == (pytest.approx(8 / 12), 12)
    assert any(note.startswith("Small test part: proposals 12 judged") for note in by.notes)


def test_one_annotator_has_precision_and_no_kappa(study):
    by = study.judged(annotated(study, lambda i, name: "plausible" if name == "Ada" else None))
    assert np.isnan(by.tables["agreement"].kappa[0]) and by.tables["agreement"].note[0] == "undefined: one annotator"
    assert by.precision([5]).set_index("under").value["together"] == 1
    assert any("one annotator" in note for note in by.notes) and by.to_json()["agreement"][0]["kappa"] is None


def test_who_judged_before_is_forgotten(study):
    people = study.judged(annotated(study, lambda i, name: "plausible" if i % 2 or name == "Ada" else "not"))
    again = people.judged(FACTS)
    assert "agreement" in people.tables and "agreement" not in again.tables
    assert any("kappa" in note for note in people.notes) and not any("kappa" in note for note in again.notes)
    pd.testing.assert_frame_equal(again.tables["precision"], study.tables["precision"])


@pytest.mark.parametrize("change, message", [
    (dict(label="maybe"), "row 0: the label 'maybe' is not one of plausible, not, unclear"),
    (dict(annotator="Ada"), "row 1: Ada has a label for"),
], ids=["another category", "twice"])
def test_a_table_of_annotations_is_checked_like_a_file(study, change, message):
    said = annotated(study, lambda i, name: "not", n=2)
    with pytest.raises(BadAnnotations, match=message): study.judged(said.assign(**change))
    with pytest.raises(BadAnnotations, match="no column label"): study.judged(said.drop(columns="label"))


def test_a_fact_that_was_judged_in_both_directions_has_one_verdict(study):
    turned = [("PartOf", "wheel", "car", "Ada", "not"), ("HasA", "cars", "wheel", "Ben", "plausible")]
    truth = truth_of(pd.DataFrame(turned, columns=["relation", "sub", "obj", "annotator", "label"]))
    assert truth.judge("HasA", "car", "wheel") is False      # one of two is no majority


def test_what_cannot_judge_is_refused(study, tmp_path):
    with pytest.raises(BadAnnotations, match=r"Ada has a label for HasA \(moon, cheese\)"):
        study.judged(pd.DataFrame([dict(relation="HasA", sub="moon", obj="cheese", annotator="Ada", label="not")]))
    file, row = tmp_path / "a.csv", study.proposals.iloc[0]
    text = f"relation,sub,obj,annotator,label\n{row.relation},{row['sub']},{row.obj},Ada,maybe\n"
    file.write_text(text)
    with pytest.raises(BadAnnotations, match="line 2: the label 'maybe' is not one of plausible, not, unclear"):
        study.judged(file)
    assert file.read_text() == text
    with pytest.raises(BadAnnotations, match="nowhere"): truth_of(tmp_path / "nowhere.csv")


# ── the study ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stopped_study_goes_on(pocket_bert, masks, tmp_path, monkeypatch):
    asked, propose = [], chapter.propose

    def counted(model, tok, questions, *args, **kw):
        if len(asked) == 1: raise KeyboardInterrupt
        asked.append(questions.relations)
        return propose(model, tok, questions, *args, **kw)

    monkeypatch.setattr(chapter, "propose", counted)
    with pytest.raises(KeyboardInterrupt): mine(*pocket_bert, GRAPH, masks, to=tmp_path / "s", **QUIET)
    again: list[list[str]] = []
    monkeypatch.setattr(chapter, "propose",
                        lambda m, t, q, *a, **kw: again.append(q.relations) or propose(m, t, q, *a, **kw))
    found = mine(*pocket_bert, GRAPH, masks, to=tmp_path / "s", **QUIET)
    assert len(asked) == len(again) == 1 and asked != again
    pd.testing.assert_frame_equal(found.proposals, mine(*pocket_bert, GRAPH, masks, **QUIET).proposals)
    told = json.loads((tmp_path / "s" / "results.json").read_text())
    assert set(told["relations"]) == set(RELATIONS) and "proposals.csv" in told["files"]


def test_a_graph_that_knows_everything_leaves_nothing(pocket_bert, masks, tmp_path):
    graph = Facts((Fact("HasA", "car", "wheel", "a car has a [MASK] .", "1"),), "one fact")
    for _ in range(2):      # the second time from what is in the folder
        found = mine(*pocket_bert, graph, masks, objects="seen", to=tmp_path / "s", **QUIET)
        assert found.proposals.empty and found.tables["removed"][["why", "n"]].to_numpy().tolist() == [[IN_GRAPH, 1]]
        assert found.summary().empty and "relation" in found.shown() and found.sheet().empty
        assert found.report(tmp_path / "r.html").exists() and found.judged(graph).precision().empty


def test_a_seed_agrees_in_another_spelling(masks):
    columns = ["under", "draw", "relation", "sub", "obj", "prompt", "logprob", "rank", "full_logprob", "full_rank",
               "logprobs", "ranks"]
    said = [("together", 0, "wheel"), ("subnetwork", 0, "wheel"), ("subnetwork", 1, "wheels")]
    kept = pd.DataFrame([(under, draw, "HasA", "car", obj, "a car has a [MASK] .", -1., 1, -2., 3, [-1., -1.], [1, 1])
                         for under, draw, obj in said], columns=columns)
    lists, fallen = chapter.listed(kept, None, 9)
    proposals, each = chapter.proposals_of(lists, fallen, kept, chapter.relation_masks(masks), None)
    assert (proposals.agree[0], proposals.seeds[0]) == (2, "3, 5") and each.proposes.tolist() == [True, True]


def test_what_was_left_out_is_counted(pocket_bert, masks):
    more = Facts((*ABOUT.items, Fact("IsA", "robin", "bird", "a robin is a kind of [MASK] .", "r")), "with another")
    found = mine(*pocket_bert, GRAPH, masks, more, **QUIET)
    rows = found.tables["left_out"]
    assert rows[["of", "why", "n"]].to_numpy().tolist() == [["IsA", "relation without a mask", 1]]
    assert "IsA" not in set(found.tables["lists"].relation)


def test_bad_input_is_named(pocket_bert, masks, tmp_path):
    birds = Facts((Fact("IsA", "robin", "bird", "a robin is a kind of [MASK] .", "r"),), "birds")
    with pytest.raises(BadFacts, match=r"no relation of birds \(IsA\) has both a mask and facts"):
        mine(*pocket_bert, birds, masks, **QUIET)
    with pytest.raises(BadRelations, match="lack the label task"):
        mine(*pocket_bert, GRAPH, Masks([({"name": "a"}, masks[0])]), **QUIET)
    with pytest.raises(UnknownName, match="did you mean seen"): mine(*pocket_bert, GRAPH, masks, objects="sen", **QUIET)
    with pytest.raises(SubnetError, match="nobody has judged"):
        mine(*pocket_bert, GRAPH, masks, to=tmp_path / "a", **QUIET).precision()


def test_a_shell_reads_what_it_names(pocket_bert, masks, tmp_path, monkeypatch):
    monkeypatch.setattr(chapter, "relation_masks", lambda folder, model: masks)
    whole = read_mining(*pocket_bert, facts="pocket", masks="x", split_seed=0, relations=RELATIONS)
    assert len(whole["facts"]) == len(PARTS.train) + len(PARTS.dev) and len(whole["about"]) == len(FACTS)
    plain = read_mining(*pocket_bert, facts="pocket", masks="x", relations=RELATIONS, against=["a.csv", "b.csv"])
    assert plain["about"] is None and plain["against"] == ["a.csv", "b.csv"]
    with pytest.raises(BadFacts, match="not both"):
        read_mining(*pocket_bert, facts="pocket", masks="x", relations=RELATIONS, against=["a.csv", "pocket"])
