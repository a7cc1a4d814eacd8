"Ranks of objects: as a loop over prompts with the plain model gives them, for objects of one token and of several."
from __future__ import annotations

import numpy as np
import pytest
import torch

from subnet_explorer.core.errors import SubnetError, UnknownName
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.space import Space
from subnet_explorer.data.facts import Fact, Facts, object_ids, read_facts
from subnet_explorer.data.files import BadFacts
from subnet_explorer.measure.ask import cloze
from subnet_explorer.measure.links import LONG, NOT_ONE, SEVERAL, TOP, link_ranks, link_reads, rankable
from subnet_explorer.model.apply import masked

POCKET = read_facts("pocket")
MADE = Facts(POCKET["MadeOf"].items[:12] + POCKET["Desires"].items[:9])
SENTENCES = (("bread", "flour"), ("toast", "fresh bread"), ("soup", "hot water"), ("milk", "big cold fish"))
LONGER = Facts(tuple(Fact("MadeOf", s, o, f"{s} is made of [MASK] .", s) for s, o in SENTENCES))


@pytest.fixture(scope="module")
def mask(pocket_bert):
    return Mask.random(Space.of(pocket_bert[0], "weight", layers="3-4"), 0.8, seed=0)


def logits(world, ids, mask):
    "Of one sequence, by the plain model: (token, vocabulary)."
    with torch.no_grad(), masked(world[0], mask):
        return world[0](input_ids=torch.tensor([ids])).logits[0]


def prompt_ids(tok, fact, n):
    "Token ids with n masks for the object, and where these begin."
    ids = tok(fact.prompt.replace("[MASK]", tok.mask_token)).input_ids
    at = ids.index(tok.mask_token_id)
    return [*ids[:at], *[tok.mask_token_id] * n, *ids[at + 1:]], at


def plain_score(world, fact, tokens, how, mask):
    "Mean log-probability of an object's tokens, one pass of the model after another."
    ids, at = prompt_ids(world[1], fact, len(tokens))
    total = 0.0
    for k, token in enumerate(tokens):
        filled = list(ids)
        for j, other in enumerate(tokens):
            shown = {"independent": False, "left-to-right": j < k, "pll": j != k}[how]
            if shown: filled[at + j] = other
        total += float(logits(world, filled, mask)[at + k].log_softmax(-1)[token])
    return total / len(tokens)


def test_one_token_is_as_cloze_says(pocket_bert, mask):
    under = {"full": None, "subnetwork": [mask, ~mask]}
    ours = link_ranks(*pocket_bert, MADE, under, known=POCKET, candidates=MADE)
    plain = cloze(*pocket_bert, MADE, under, known=POCKET, candidates=MADE)
    ours = ours.set_index(["under", "draw", "uuid"]).loc[plain.set_index(["under", "draw", "uuid"]).index]
    for column in ("relation", "sub", "obj", "rank", "filtered", "among", "answer"):
        assert ours[column].tolist() == plain[column].tolist()
    np.testing.assert_allclose(ours.logprob, plain.logprob, atol=1e-4)
    assert set(ours.tokens) == {1} and (ours.filtered <= ours["rank"]).all()
    assert (ours.among_filtered <= ours.among).all() and (ours.among <= ours["rank"]).all()


def test_ranks_are_those_of_a_plain_loop(pocket_bert, mask):
    model, tok = pocket_bert
    ours = link_ranks(model, tok, MADE, {"subnetwork": mask}, known=POCKET, candidates=MADE).set_index("uuid")
    objects = {f.object: object_ids(tok, f)[0] for f in MADE}
    for fact in MADE:
        ids, at = prompt_ids(tok, fact, 1)
        of, gold = logits(pocket_bert, ids, mask)[at], objects[fact.object]
        right = {object_ids(tok, f)[0] for f in POCKET if (f.relation, f.subject) == (fact.relation, fact.subject)}
        rank = 1 + sum(bool(x > of[gold]) for x in of)
        assert ours["rank"][fact.uuid] == rank
        assert ours.filtered[fact.uuid] == rank - sum(bool(of[t] > of[gold]) for t in right)
        assert ours.among[fact.uuid] == 1 + sum(bool(of[t] > of[gold]) for t in objects.values())
        left = [t for t in of.topk(TOP).indices.tolist() if t in objects.values()]
        assert ours.published[fact.uuid] == (1 / (1 + left.index(gold)) if gold in left else 0)


def test_published_ranks_drop_what_is_no_candidate(pocket_bert):
    "A rank of 4 becomes 1 if none of the best three is a candidate; a rank of 6 is nothing."
    t = link_ranks(*pocket_bert, POCKET["MadeOf"], {"full": None}, candidates=POCKET["MadeOf"])
    there = t[t.published > 0]
    assert (t.published[t["rank"] > TOP] == 0).all() and (1 / there.published <= there["rank"]).all()
    better = t[(t["rank"] > 1) & (t["rank"] <= TOP) & (t.published == 1)]
    assert len(better)


@pytest.mark.parametrize("how", SEVERAL)
def test_scores_of_several_tokens_are_those_of_a_plain_loop(pocket_bert, mask, how):
    t = link_ranks(*pocket_bert, LONGER, {"subnetwork": mask}, several=how)
    assert t.tokens.tolist() == [1, 2, 2, 3] and t["rank"].isna().tolist() == [False, True, True, True]
    candidates = [tuple(object_ids(pocket_bert[1], f)) for f in LONGER]
    for row, fact in zip(t.itertuples(), LONGER, strict=True):
        scores = [plain_score(pocket_bert, fact, tokens, how, mask) for tokens in candidates]
        own = scores[LONGER.items.index(fact)]
        assert row.logprob == pytest.approx(own, abs=1e-4)
        assert row.among == 1 + sum(score > own for score in scores)


def test_the_three_ways_agree_on_one_token_and_differ_on_more(pocket_bert):
    tables = [link_ranks(*pocket_bert, LONGER, {"full": None}, several=how) for how in SEVERAL]
    one, more = ([t.logprob[(t.tokens > 1) == several].tolist() for t in tables] for several in (False, True))
    assert one[0] == pytest.approx(one[1]) and one[1] == pytest.approx(one[2])
    assert more[0] != pytest.approx(more[1]) and more[1] != pytest.approx(more[2])


def test_candidates_are_bounded_and_hold_what_is_right(pocket_bert):
    t = link_ranks(*pocket_bert, LONGER, {"full": None}, candidates=POCKET, several="pll", most=30)
    assert set(t.candidates) == {30} and t.among.between(1, 30).all()
    again = link_ranks(*pocket_bert, LONGER, {"full": None}, candidates=POCKET, several="pll", most=30)
    other = link_ranks(*pocket_bert, LONGER, {"full": None}, candidates=POCKET, several="pll", most=30, seed=1)
    assert t.equals(again) and t.among.tolist() != other.among.tolist()
    few = link_ranks(*pocket_bert, LONGER, {"full": None}, candidates=POCKET, several="pll", most=2)
    assert set(few.candidates) == {4}      # all four that are right


def test_the_cost_is_what_is_read(pocket_bert, monkeypatch):
    from subnet_explorer.model.sequences import Sequences
    read, n = Sequences.read, []
    monkeypatch.setattr(Sequences, "read", lambda s, index, *a, **kw: n.append(len(index)) or read(s, index, *a, **kw))
    for how in SEVERAL:
        n.clear()
        link_ranks(*pocket_bert, LONGER, {"full": None}, candidates=POCKET, several=how, most=30)
        assert link_reads(pocket_bert[1], LONGER, POCKET, how, 30).reads.sum() == sum(n)


def test_what_cannot_be_ranked_is_counted_or_named(pocket_bert):
    model, tok = pocket_bert
    long = Fact("MadeOf", "x", "wood", "wood " * 200 + "[MASK] .", "long")
    facts = Facts((*LONGER.items, long))
    assert rankable(facts, model, tok).skipped == {"MadeOf": {NOT_ONE: 3, LONG: 1}}
    assert rankable(facts, model, tok, "pll").skipped == {"MadeOf": {LONG: 1}}
    with pytest.raises(BadFacts, match="several='independent'"): rankable(Facts(LONGER.items[1:]), model, tok)
    with pytest.raises(BadFacts, match="cannot be ranked: it has 2 known tokens"):
        link_ranks(model, tok, LONGER, {"full": None})
    with pytest.raises(UnknownName, match="did you mean pll"):
        link_ranks(model, tok, LONGER, {"full": None}, several="pl")
    with pytest.raises(SubnetError, match="nothing to ask"): link_ranks(model, tok, LONGER, {})


def test_a_causal_model_ranks_one_token_only():
    from subnet_explorer.model.load import load
    model, tok = load("pocket-gpt2")
    facts = Facts(tuple(Fact("IsA", s, "bird", f"{s} is a kind of [MASK]", s) for s in ("robin", "owl")))
    known = read_facts("pocket")
    ours, plain = (ask(model, tok, facts, {"full": None}, known=known) for ask in (link_ranks, cloze))
    assert ours["rank"].tolist() == plain["rank"].tolist() and ours.filtered.tolist() == plain.filtered.tolist()
    with pytest.raises(SubnetError, match="needs a masked model"):
        link_ranks(model, tok, facts, {"full": None}, several="pll")
