"How many coordinates a search can change, before it begins."
from __future__ import annotations

import warnings

import pytest
import torch

from subnet_explorer.core.mask import Mask
from subnet_explorer.core.space import Space
from subnet_explorer.data.facts import read_facts
from subnet_explorer.model.load import tiny
from subnet_explorer.search.find import find
from subnet_explorer.search.gates import Threshold, TopK
from subnet_explorer.search.loop import lr_at
from subnet_explorer.search.objectives import Cloze
from subnet_explorer.search.reach import can_flip, farthest


def rates(lr: float, steps: int) -> list[float]:
    return [lr * lr_at(t, steps, warmup=0.0) for t in range(steps)]


@pytest.fixture(scope="module")
def space(pocket_bert):
    return Space.of(pocket_bert[0], "weight", layers=4)


@pytest.mark.parametrize("make", [
    lambda space, mask: TopK(space, .5, init=mask), lambda space, mask: TopK(space, .5, init=mask, scope="global"),
    lambda space, mask: Threshold(space, init=mask),
])
def test_a_search_that_can_change_nothing_warns_and_changes_nothing(pocket_bert, space, make):
    "Task-agnostic mask training with its default rate and 150 steps, in short."
    mask = Mask.random(space, .5, seed=0)
    gate, goal = make(space, mask), Cloze(read_facts("pocket", "MadeOf"))
    count, times = can_flip(gate, rates(5e-5, 4))
    assert count == 0 and times > 1
    with pytest.warns(UserWarning, match="no coordinate of this gate can flip: 4 steps"):
        run = find(*pocket_bert, gate, goal, steps=4, lr=5e-5, warmup=0.0, progress=False)
    assert run.mask == mask
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find(*pocket_bert, gate, goal, steps=4, lr=.5, warmup=0.0, progress=False).mask != mask


def test_what_can_flip_is_within_the_bound(space):
    gate, some = Threshold(space, seed=0), rates(1e-3, 50)
    flat = torch.cat([x.detach().reshape(-1) for x in gate.logits])
    assert can_flip(gate, some)[0] == int((flat.abs() <= farthest(some)[0]).sum())
    assert can_flip(gate, rates(5., 50))[0] == space.size


def test_of_ranked_scores_those_near_the_other_side():
    "By hand: .3 and .1 are kept; .1 and .0 can change places, and so can .3 with a larger bound."
    space = Space.of(tiny("bert"), "mlp", layers=1)
    gate = TopK(space, .5, seed=0)
    gate.logits = torch.nn.ParameterList([torch.nn.Parameter(torch.tensor([.3, .1, .0, -.5]))])
    for rate, wanted in ((.02, 0), (.06, 2), (.16, 3), (.4, 4)): assert can_flip(gate, [rate])[0] == wanted
