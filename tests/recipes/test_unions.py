"Joined masks, combinations of relations, and relations mined in a graph: against plain loops, and what is refused."
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from subnet_explorer.core.errors import SpaceMismatch, SubnetError, UnknownName
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.masks import Masks
from subnet_explorer.core.space import Space
from subnet_explorer.data.choices import as_choices, choice_task
from subnet_explorer.data.facts import Fact, Facts
from subnet_explorer.data.files import BadFacts
from subnet_explorer.measure.options import plausibility
from subnet_explorer.model.load import load, tiny
from subnet_explorer.recipes.relations import DifferentStarts, relation_masks
from subnet_explorer.recipes.unions import (
    Asker,
    Joiner,
    all_combinations,
    check_joining,
    joined,
    joined_table,
    mined_relations,
    most_mined,
    search_combinations,
)

SPACE = Space.of(tiny("bert"), "head+neuron")
NAMES = "abcdef"


def alike(n=6, flips=.1, seed=0, space=SPACE):
    "Masks that started alike: one, with some coordinates turned."
    start = Mask.random(space, .5, seed)
    return Masks([({"task": NAMES[i], "seed": 0}, start ^ Mask.random(space, flips, 10 + i)) for i in range(n)])


def bits(mask): return np.concatenate([mask[g.name].ravel() for g in mask.space.groups])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True), min_size=1, max_size=8),
    st.sampled_from(["union", "intersection", "vote"]),
    st.lists(st.integers(0, 3), min_size=6, max_size=6),
    st.floats(.1, 1),
)
def test_joined_as_written_out(combinations, how, numbers, share):
    "One joiner for all of them: what it keeps of the combination before is no matter."
    masks, weights = alike().by("task"), dict(zip(NAMES, map(float, numbers), strict=True))
    joiner = Joiner(masks, how, weights if how == "vote" else None, share)
    for some in combinations:
        each = np.stack([bits(masks[r]) for r in some])
        w = np.array([weights[r] for r in some])
        if how == "vote" and not w.sum():
            with pytest.raises(SubnetError, match="there is no vote"): joiner.of(some)
            continue
        wanted = {"union": each.any(0), "intersection": each.all(0)}.get(how)
        if wanted is None: wanted = w @ each >= share * w.sum() - 1e-6
        found = joiner.of(some)
        assert (bits(found) == wanted).all() and found.meta["relations"] == list(some)
        assert Mask.of(SPACE, {g.name: found[g.name] for g in SPACE.groups}) == found      # nothing behind the end


def test_masks_of_different_starts_are_joined_only_if_allowed():
    own = Masks([({"task": r, "seed": 0}, Mask.random(SPACE, .5, i)) for i, r in enumerate("abc")])
    with pytest.raises(DifferentStarts): joined(own)
    assert joined(own, different_starts=True) == own.union() != joined(own, "vote", different_starts=True)
    assert joined(alike()) == alike().union()
    other = Space.of(tiny("bert", seed=1), "head+neuron")
    mixed = Masks([({"task": "a"}, Mask.random(SPACE, .5, 0)), ({"task": "b"}, Mask.random(other, .5, 0))])
    with pytest.raises(SpaceMismatch, match="cannot join masks of different models"): joined(mixed, different_starts=True)
    with pytest.raises(SubnetError, match='weights go with join="vote"'): joined(alike(), weights={"a": 1.})
    table = joined_table(own, [tuple("ab"), tuple("abc")])
    assert table.relations.tolist() == ["a+b", "a+b+c"]
    assert table.expected.tolist() == pytest.approx([.25, .125], abs=.01)
    assert (abs(table.sparsity - table.expected) < .12).all()
    together = joined_table(alike(), [tuple("abc")]).iloc[0]
    assert together.sparsity > together.expected + .1 and together.masks == pytest.approx(.5, abs=.05)
    with pytest.raises(UnknownName): joined(alike(), "onion")
    with pytest.raises(UnknownName, match="way to join"): joined_table(alike(), [("a", "b")], "onion")
    with pytest.raises(UnknownName, match="relation with a mask"): joined_table(alike(), [("a", "z")])
    with pytest.raises(UnknownName): Joiner(alike().by("task")).of(("z",))
    with pytest.raises(SubnetError, match="name at least one"): Joiner(alike().by("task")).of(())


@pytest.mark.parametrize("scale", [1e-12, 1., 1e12])
def test_a_vote_does_not_depend_on_the_scale_of_its_weights(scale):
    "Only shares of the weight count, however small or uneven the numbers are."
    masks, uneven = alike(3).by("task"), {"a": scale, "b": scale * 1e-4, "c": scale * 1e-4}
    found = Joiner(masks, "vote", uneven, 1.).of(tuple("abc"))
    assert found == masks["a"] & masks["b"] & masks["c"] and found.count
    assert Joiner(masks, "vote", uneven).of(tuple("abc")) == masks["a"]
    assert Joiner(masks, "vote", dict.fromkeys("abc", scale), 2 / 3).of(tuple("abc")) == alike(3).majority(2 / 3)


def test_what_cannot_be_joined_is_said_at_once():
    masks = relation_masks(alike())
    check_joining(masks, (2, 6), "vote", dict.fromkeys(NAMES, 2.))
    for asked, match in (
        (((),), "at least one; got"), (((2, 2),), "different numbers"), (((7,),), "combinations of 7 relations cannot"),
        (((2,), "vote", dict.fromkeys("abcde", 1.)), "f has none"), (((2,), "union", {"a": 1.}), 'join="vote"'),
        (((2,), "vote", {"z": 1.}), "relation with a mask 'z'"),
    ):
        with pytest.raises(SubnetError, match=match): check_joining(masks, *asked)


def planted(*some):
    "c and e are worth most together; b misleads those who go step by step."
    worth = dict(a=.1, b=.32, c=.2, d=.12, e=.15, f=.05)
    return sum(worth[r] for r in some) + .5 * ({"c", "e"} <= set(some)) - .3 * ({"b", "c"} <= set(some))


@pytest.mark.parametrize("sizes", [(1,), (2, 3), (3,), (6,)])
def test_combinations_are_all_tried(sizes):
    found = search_combinations(planted, list(NAMES), sizes, "exhaustive")
    every = [some for n in sizes for some in itertools.combinations(NAMES, n)]
    assert sorted(found.relations) == sorted(map("+".join, every)) and (found.searched == len(every)).all()
    best = max(every, key=lambda some: (planted(*some), -len(some)))
    assert found.relations[0] == "+".join(best) and found.accuracy[0] == pytest.approx(planted(*best))
    greedy = search_combinations(planted, list(NAMES), sizes)
    assert greedy.accuracy[0] <= found.accuracy[0] and set(greedy.relations) <= set(found.relations)


def test_greedy_goes_step_by_step():
    found = search_combinations(planted, list(NAMES), (2,))
    assert len(found) == 5 and found.relations[0] == "b+e"      # exhaustively: c+e
    assert search_combinations(planted, list(NAMES), (2,), "exhaustive").relations[0] == "c+e"
    even = search_combinations(lambda *some: .5, list(NAMES), (2, 3), "exhaustive")
    assert even.relations[0] == "a+b"      # of equally good ones the smaller, then the earlier
    assert len(list(all_combinations(range(16), (3,)))) == 560
    for sizes in ((), (0,), (7,)):
        with pytest.raises(SubnetError): search_combinations(planted, list(NAMES), sizes)


def test_an_asker_says_what_plausibility_says():
    model, tok = load("pocket-bert")
    space = Space.of(model, "weight", layers="top-half")
    masks = {seed: alike(3, .05, seed, space).by("task") for seed in (0, 1)}
    task = choice_task("pocket:IsA+MadeOf", test=12)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ask = Asker.of(model, tok, task.test, {s: Joiner(m) for s, m in masks.items()}, "pll")
    for some in (("a", "b"), ("a", "b", "c"), ("c",), ("a", "b")):
        wanted = [plausibility(model, tok, task.test, Masks([({"task": r}, masks[s][r]) for r in some]).union(),
                               "pll").choice for s in (0, 1)]
        assert (ask(*some) == np.stack(wanted)).all()
        assert ask.accuracy(*some) == pytest.approx(np.mean([w == task.test.gold for w in wanted]))
    assert (ask()[0] == plausibility(model, tok, task.test, None, "pll").choice).all()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def graph(*triples): return Facts(tuple(Fact(r, s, o, f"{s} [MASK]", str(i)) for i, (r, s, o) in enumerate(triples)))


def test_mined_as_counted_by_hand():
    known = graph(("Causes", "heavy rain", "flood"), ("Causes", "rain", "flood"), ("AtLocation", "a river", "town"),
                  ("IsA", "rain", "weather"), ("Causes", "river", "fog"))
    asked = as_choices([
        dict(question="The heavy Rain fell, so", choices=["There was a flood.", "Weather."], label=0),
        dict(question="The town was wet, so", choices=["fog", "the river was near"], label=1),
        dict(question="rain [MASK] rain", choices=["flood", "fog"], label=1),
    ])
    found = mined_relations(known, asked).set_index("relation")
    assert found.questions.to_dict() == {"Causes": 1, "AtLocation": 1, "IsA": 0}
    assert found.loc["Causes", "share"] == pytest.approx(1 / 3)
    assert found.loc["Causes", "shuffled"] == 1      # rain … rain with the flood of the first one
    assert mined_relations(known, asked, ["AtLocation", "HasA"]).relation.tolist() == ["AtLocation"]
    with pytest.raises(BadFacts, match="none is in both"): mined_relations(known, asked, ["HasA"])
    assert most_mined(found.reset_index(), ["IsA", "AtLocation", "Causes"]) == ("AtLocation", "Causes")
    assert most_mined(found.reset_index(), ["AtLocation", "Causes"], 1) == ("Causes",)      # and none that is not met
    with pytest.raises(BadFacts, match="none of the 1 triples"): mined_relations(graph(("IsA", "x", "y")), asked)


def test_twins_are_not_shuffled_with_each_other():
    "Neighbours often share their answer: with it they would seem to meet by chance as often as they do."
    nouns = ["rain", "frost", "fire", "wind"]
    known = graph(*(("Causes", noun, f"{noun}fall") for noun in nouns))
    asked = as_choices([dict(question=f"{word} the {noun} , so", choices=[f"a {noun}fall", "fog"], label=0)
                        for noun in nouns for word in ("now", "then")])
    assert mined_relations(known, asked)[["questions", "shuffled"]].iloc[0].tolist() == [8, 0]
