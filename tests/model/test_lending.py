"A model that is lent comes back as it was: in threads, out of order, trained and loaded inside a mask."
from __future__ import annotations

import copy
import threading
from contextlib import ExitStack

import pytest
import torch

from subnet_explorer.core.mask import Mask
from subnet_explorer.core.space import Space
from subnet_explorer.model.apply import ModelInUse, masked
from subnet_explorer.model.load import tiny
from subnet_explorer.tasks.fit import preserved

IDS = torch.arange(5, 15).reshape(2, 5)

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=.01, weight_decay=.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=.1, momentum=.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=.01, momentum=.5),
    "adadelta": lambda p: torch.optim.Adadelta(p, weight_decay=.1),
}


class ByHand:
    "Momentum by somebody who does not know torch.optim."
    def __init__(self, parameters) -> None:
        self.all = list(parameters)
        self.moments = [torch.zeros_like(p) for p in self.all]

    def zero_grad(self) -> None:
        for p in self.all: p.grad = None

    def step(self) -> None:
        for p, m in zip(self.all, self.moments, strict=True):
            if p.grad is not None: p.data.sub_(m.mul_(.9).add_(p.grad), alpha=.1)


@pytest.fixture
def model():
    return tiny("bert")


@pytest.fixture
def logits(model):
    def compute() -> torch.Tensor:
        with torch.no_grad(): return model(input_ids=IDS).logits
    return compute


def weights(model): return {n: p.detach().clone() for n, p in model.named_parameters()}


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def step(model, opt) -> None:
    opt.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    opt.step()


def zero(model, mask) -> bool:
    return all((model.base_model.get_parameter(g.name)[torch.tensor(~bits)] == 0).all()
               for g, bits in mask.to("weight").items())


@pytest.mark.parametrize("kind", ["weight", "head+mlp"])
@pytest.mark.parametrize("make", [*OPTIMIZERS.values(), ByHand], ids=[*OPTIMIZERS, "by hand"])
def test_an_optimizer_that_remembers_keeps_the_zeros(model, kind, make):
    opt = make(model.parameters())
    for _ in range(2): step(model, opt)
    mask, before = Mask.random(Space.of(model, kind), .4, seed=0), weights(model)
    with preserved(model):
        with masked(model, mask, train=True):
            for _ in range(3):
                step(model, opt)
                if make is not ByHand: assert zero(model, mask)
        assert zero(model, mask) and not equal(weights(model), before)
    assert equal(weights(model), before)


def test_another_models_optimizer_is_left_alone(model):
    other = tiny("gpt2")
    opt = torch.optim.SGD(other.parameters(), lr=.1)
    with masked(model, Mask.random(Space.of(model, "weight"), .4, seed=0)): step(other, opt)


def test_a_second_thread_is_refused(model, logits):
    before, refused = logits(), []
    mask = Mask.random(Space.of(model, "weight"), .5, seed=0)

    def enter(condition) -> None:
        try:
            with masked(model, condition, check=False): pass
        except ModelInUse as error: refused.append(str(error))
    with masked(model, mask):
        inside = logits()
        for condition in (mask, None):
            one = threading.Thread(target=enter, args=(condition,))
            one.start()
            one.join()
        assert torch.equal(logits(), inside)
    assert len(refused) == 2 and "another thread" in refused[0]
    assert torch.equal(logits(), before)


@pytest.mark.parametrize("kinds", [("weight", "weight"), ("weight", "head"), ("head", "weight"), ("mlp", "head")])
def test_the_outer_mask_taken_off_first(model, logits, kinds):
    before, was = logits(), weights(model)
    outer, inner = (masked(model, Mask.random(Space.of(model, k), .5, seed=i)) for i, k in enumerate(kinds))
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(ModelInUse, match="taken off before"): outer.__exit__(None, None, None)
    assert torch.equal(logits(), before) and equal(weights(model), was)
    inner.__exit__(None, None, None)
    assert torch.equal(logits(), before)
    assert all(isinstance(p, torch.nn.Parameter) for p in model.parameters())


@pytest.mark.parametrize("kind", ["weight", "head", "bias", "neuron"])
def test_training_inside_a_passing_mask(model, kind):
    opt, before = torch.optim.SGD(model.parameters(), lr=.1), weights(model)
    mask = Mask.random(Space.of(model, kind), .5, seed=0)
    with masked(model, mask), pytest.raises(ModelInUse, match="train=True"): step(model, opt)
    assert equal(weights(model), before)
    step(model, opt)
    assert not equal(weights(model), before)


@pytest.mark.parametrize("part", ["", "bert", "bert.encoder.layer.0.attention.self.query"])
def test_loading_inside_a_passing_mask(model, part):
    other, before = tiny("bert", seed=1), weights(model)
    module, new = model.get_submodule(part), other.get_submodule(part).state_dict()
    with masked(model, Mask.random(Space.of(model, "weight"), .5, seed=0)):
        with pytest.raises(ModelInUse, match="cannot be loaded"): module.load_state_dict(new)
        twin = copy.deepcopy(model)
    assert equal(weights(model), before)
    module.load_state_dict(new)
    twin.load_state_dict(other.state_dict())
    assert not equal(weights(model), before)


def test_a_mask_for_good_inside_a_passing_one(model):
    mask, before = Mask.random(Space.of(model, "weight"), .5, seed=0), weights(model)
    with masked(model, mask), pytest.raises(ModelInUse, match="train=True"), masked(model, mask, train=True): pass
    assert equal(weights(model), before)


@pytest.mark.parametrize("kind", ["head", "neuron", "mlp", "weight"])
def test_masks_nest_either_way(model, logits, kind):
    full = logits()
    fine, other = Mask.random(Space.of(model, "weight"), .5, seed=0), Mask.random(Space.of(model, kind), .5, seed=1)
    found = []
    for pair in ((fine, other), (other, fine)):
        with ExitStack() as stack:
            for mask in pair: stack.enter_context(masked(model, mask))
            assert Space.of(model, "weight").id == fine.space.id
            found.append(logits())
        assert torch.equal(logits(), full)
    assert torch.allclose(*found, atol=1e-6) and not torch.allclose(found[0], full)
