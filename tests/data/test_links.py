"Triples that are asked are those that nobody was told, whatever their case, article and wording."
from __future__ import annotations

import pytest

from subnet_explorer.core.errors import UnknownName
from subnet_explorer.data.facts import Fact, Facts, read_facts
from subnet_explorer.data.files import BadFacts
from subnet_explorer.data.links import ELSEWHERE, KNOWN, SEEN, SEVERAL_WORDS, apart, held_out, joined, link, one_word
from subnet_explorer.data.templates import NAMED, TEMPLATES, read_templates


def fact(subject, object, relation="IsA", prompt="{s} is a [MASK] ."):
    return Fact(relation, subject, object, prompt.format(s=subject), f"{relation}|{subject}|{object}")


@pytest.mark.parametrize("other", [
    fact("Sparrow", "bird"), fact("a sparrow", "a bird"), fact("sparrow", "Bird", "isa"),
    fact("the  sparrow", "bird", prompt="once {s} was called [MASK] !"),
])
def test_the_same_triple_in_other_words_is_held_out(other):
    facts = Facts((fact("sparrow", "bird"), fact("owl", "bird")))
    left = held_out(facts, Facts((other,)))
    assert [f.subject for f in left] == ["owl"] and left.skipped == {"IsA": {SEEN: 1}}


def test_another_triple_stays():
    facts = Facts((fact("sparrow", "bird"),))
    others = Facts((fact("sparrow", "birds"), fact("sparrow", "bird", "PartOf"), fact("sparrows", "bird")))
    assert held_out(facts, others) == facts
    with pytest.raises(BadFacts, match=r"nothing is left of facts: all of its 1 facts"): held_out(facts, facts)


def test_counts_add_up():
    facts = Facts((fact("sparrow", "bird"), fact("guinea pig", "pet"), fact("owl", "night bird")),
                  skipped={"IsA": {"false triple": 2}})
    left = one_word(held_out(facts, Facts((fact("Owl", "a night bird"),))))
    assert [f.subject for f in left] == ["sparrow"]
    assert left.skipped == {"IsA": {"false triple": 2, SEEN: 1, SEVERAL_WORDS: 1}}
    with pytest.raises(BadFacts, match="one word each"): one_word(Facts((fact("guinea pig", "pet"),)))


def test_parts_have_nothing_in_common():
    test, dev = Facts((fact("owl", "bird"),), "test"), Facts((fact("An owl", "Bird"), fact("cat", "pet")), "dev")
    found = apart({"test": test, "dev": dev})
    assert found["test"] == test and [f.subject for f in found["dev"]] == ["cat"]
    assert found["dev"].skipped == {"IsA": {ELSEWHERE: 1}}
    with pytest.raises(BadFacts, match="nothing is left of test"): apart({"dev": test, "test": test})


def test_two_hops_are_new_whatever_their_case():
    graph = Facts((fact("owl", "bird"), fact("bat", "bird"), fact("bird", "feathered", "HasProperty"),
                   fact("An Owl", "feathered", "HasProperty")))
    found = joined(graph)
    assert [link(f) for f in found] == [("hasproperty", "bat", "feathered")]
    assert found.skipped["HasProperty"][KNOWN] == 1
    with pytest.raises(UnknownName, match="did you mean IsA"): joined(graph, "Isa")
    with pytest.raises(BadFacts, match="do not meet"): joined(graph, "HasProperty", "IsA")


def test_the_published_templates():
    forms = read_templates("lamp-b1")
    assert set(forms) == set(TEMPLATES) and forms == NAMED["lamp-b1"]
    facts = read_facts("pocket", "Desires", templates="lamp-b1")
    assert facts.items[0].prompt == f"{facts.items[0].subject} wants to [MASK]."
    with pytest.raises(BadFacts, match="or one of lamp-b1"): read_facts("pocket", templates="lamp-b")
