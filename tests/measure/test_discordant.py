"Questions that only one side answers: counted both ways, majority of draws, margins, bad input."

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from subnet_explorer.core.errors import SubnetError, UnknownName
from subnet_explorer.core.pairs import Unpaired, sign_test
from subnet_explorer.data.facts import Fact, Facts
from subnet_explorer.measure.discordant import discordant

RANKS = {      # by condition: a rank for every draw and question
    "full": [[1, 9, 1, 9, 9, 1]],
    "subnetwork": [[1, 1, 2, 1, 9, 9], [1, 1, 1, 1, 1, 9], [1, 9, 9, 1, 9, 9]],
    "random": [[9, 9, 9, 1, 9, 1], [9, 9, 9, 1, 9, 9], [9, 9, 9, 9, 9, 1], [9, 9, 9, 1, 9, 1]],
}
LOGPROB = {"full": [-0.1, -3.0, -0.1, -2.0, -4.0, -0.2], "subnetwork": [-0.1, -0.5, -2.0, -0.2, -3.0, -5.0],
           "random": [-6.0, -2.5, -6.0, -0.7, -6.0, -1.0]}
RELATION = ["A", "A", "A", "B", "B", "B"]
ITEMS = pd.DataFrame([
    {"under": under, "draw": d, "relation": RELATION[i], "uuid": "u", "sub": f"s{i}", "obj": f"o{i}", "rank": rank,
     "logprob": LOGPROB[under][i], "answer": f"o{i}" if rank == 1 else f"{under}{d}"}
    for under, draws in RANKS.items() for d, ranks in enumerate(draws) for i, rank in enumerate(ranks)
])


def test_both_directions_are_counted():
    "The third question is right in one of three draws, which is no answer."
    found = discordant(ITEMS, "subnetwork", "full")
    assert (found.both, found.wins, found.losses, found.neither) == (1, 2, 2, 1)
    assert found.p == sign_test(2, 2) == 1 and found.draws == {"subnetwork": 3, "full": 1}
    assert found.table["only"].tolist() == ["subnetwork"] * 2 + ["full"] * 2
    assert found.table["sub"].tolist() == ["s1", "s3", "s5", "s2"]      # the greatest margins first, of either side
    assert found.table.margin.tolist() == pytest.approx([2.5, 1.8, -4.8, -1.9])
    assert found.table["subnetwork right"].tolist() == [2, 3, 0, 1]
    assert "2 questions are answered only by subnetwork, 2 only by full" in found.heading
    back = discordant(ITEMS, "full", "subnetwork")
    assert (back.wins, back.losses) == (2, 2) and back.table["sub"].tolist() == ["s5", "s2", "s1", "s3"]


def test_half_of_the_draws_are_no_answer():
    t = ITEMS[(ITEMS.under != "random") | (ITEMS.draw < 2)]      # of two draws, one has the last question
    assert discordant(t, "random", "subnetwork").wins == 0
    assert discordant(ITEMS, "random", "subnetwork").wins == 1


def test_several_others_together():
    "A question is ours if none of them answers it, and theirs if one does; the margin is to the best of them."
    found = discordant(ITEMS, "subnetwork", ["full", "random"])
    assert (found.wins, found.losses) == (1, 2) and found.sides == ("subnetwork", "full or random")
    assert found.table.margin.tolist() == pytest.approx([2.0, -4.8, -1.9])
    assert {"full answer", "random answer", "random rank"} <= set(found.table)


def test_relations_numbers_and_prompts():
    facts = Facts(tuple(Fact(RELATION[i], f"s{i}", f"o{i}", f"ask {i} [MASK]", "u") for i in range(6)), "asked")
    one = discordant(ITEMS, "subnetwork", "full", relations="A", questions=facts)
    assert (one.wins, one.losses) == (1, 1) and one.table.prompt.tolist() == ["ask 1 [MASK]", "ask 2 [MASK]"]
    assert [f.subject for f in one.facts] == ["s1", "s2"]
    few = discordant(ITEMS, "subnetwork", "full", n=1)
    assert few.table["sub"].tolist() == ["s1", "s5"] and (few.wins, few.losses) == (2, 2)
    assert few.counts.questions.tolist() == [1, 1, 1, 1] and few.facts is None
    wider = discordant(ITEMS, "subnetwork", "full", k=2)
    assert wider.both == 2      # the third question is now right in two of three draws


def test_only_what_all_were_asked():
    less = ITEMS[(ITEMS.under != "full") | (ITEMS["sub"] != "s1")]
    assert discordant(less, "subnetwork", "full").wins == 1
    none = ITEMS.assign(sub=ITEMS["sub"].where(ITEMS.under != "full", "elsewhere"))
    with pytest.raises(Unpaired, match="no question was asked under all of subnetwork, full"):
        discordant(none, "subnetwork", "full")


def test_without_probabilities_or_answers():
    "Of a frequent object there is no probability; removals have no answers."
    plain = ITEMS.drop(columns=["answer"]).assign(logprob=ITEMS.logprob.where(ITEMS.under != "full"))
    found = discordant(plain, "subnetwork", "full")
    assert (found.wins, found.losses) == (2, 2) and found.table.margin.isna().all()
    assert "full logprob" not in found.table and "subnetwork answer" not in found.table


def test_bad_input():
    with pytest.raises(UnknownName, match="did you mean full"): discordant(ITEMS, "subnetwork", "ful")
    with pytest.raises(SubnetError, match="other conditions than itself"): discordant(ITEMS, "full", ["full"])
    with pytest.raises(SubnetError, match="name some of full, random"): discordant(ITEMS, "subnetwork", [])
    with pytest.raises(UnknownName): discordant(ITEMS, "subnetwork", "full", relations="C")
    with pytest.raises(SubnetError, match="at least 1"): discordant(ITEMS, "subnetwork", "full", n=0)


def test_nothing_of_it_acts():
    evil = ITEMS.assign(answer="<script>alert(1)</script>")
    assert "<script>" not in discordant(evil, "subnetwork", "full")._repr_html_()
    assert np.isnan(discordant(ITEMS[ITEMS["sub"] == "s0"], "subnetwork", "full").p)
