"Learnable masks: gradients against a plain backward pass, distributions against simulation, determinism."
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from toys import LAYOUT

from subnet_explorer.core.errors import SpaceMismatch, SubnetError
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.scores import Scores
from subnet_explorer.core.space import Group, ModelId, Space
from subnet_explorer.model.apply import applied, parameter, swapped
from subnet_explorer.search.gates import Concrete, HardConcrete, Threshold, TopK

GROUPS = (Group("a", "weight", 0, "q", (7, 3)), Group("b", "weight", 1, "q", (10,)))
SPACE = Space(GROUPS, LAYOUT, ModelId("toy", None, "c", "w"))
RAMP = Scores(SPACE, {"a": np.linspace(-3, 3, 21).reshape(7, 3), "b": np.linspace(-2, 4, 10)})

GATES = {
    "threshold": Threshold,
    "topk": lambda space, **kw: TopK(space, .3, **kw),
    "topk-global": lambda space, **kw: TopK(space, .3, scope="global", **kw),
    "concrete": Concrete,
    "concrete-hard": lambda space, **kw: Concrete(space, straight_through=True, **kw),
    "hard-concrete": lambda space, **kw: HardConcrete(space, **{"init": "normal", **kw}),
}
gates = pytest.mark.parametrize("make", GATES.values(), ids=GATES)


def flat(values) -> torch.Tensor:
    return torch.cat([v.detach().reshape(-1) for v in values.values()])


def logits(gate) -> torch.Tensor:
    return flat(dict(enumerate(gate.logits)))


def array(arrays) -> np.ndarray:
    return np.concatenate([v.reshape(-1) for v in arrays])


# ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("kind", ["weight", "block"])
@pytest.mark.parametrize("make", [GATES["threshold"], GATES["topk"]], ids=["threshold", "topk"])
def test_straight_through_is_the_weight_gradient_times_the_weight(pocket_bert, kind, make):
    model, tok = pocket_bert
    space = Space.of(model, kind, layers="3-4", block=(8, 16) if kind == "block" else None)
    gate = make(space)
    inputs = tok(["a robin is a kind of bird .", "anna slept ."], return_tensors="pt", padding=True)

    def loss(): return model(**inputs, labels=inputs.input_ids).loss

    with applied(model, space, gate.sample()): loss().backward()
    model.zero_grad(set_to_none=True)

    fine = gate.harden().to("weight")                                    # the same masked model, its weights as leaves
    weights = {}
    for g in fine.space.groups:
        weights[g.name] = (parameter(model, g).detach() * torch.tensor(fine[g.name])).requires_grad_()
    with swapped(model, weights): loss().backward()
    for g, logit in zip(space.groups, gate.logits, strict=True):
        wanted = weights[g.name].grad * parameter(model, g).detach()
        if g.block is not None:
            wanted = wanted.unfold(0, *[g.block[0]] * 2).unfold(1, *[g.block[1]] * 2).sum((-1, -2))
        assert wanted.abs().max() > 0
        assert torch.allclose(logit.grad, wanted, rtol=1e-4, atol=1e-8)
    model.zero_grad(set_to_none=True)


def test_rounded_concrete_has_the_gradient_of_the_soft_one():
    hard, soft = (Concrete(SPACE, init=RAMP, temperature=.5, straight_through=s, seed=3) for s in (True, False))
    h, s = hard.sample(), soft.sample()
    assert all(torch.equal(h[n], (s[n] > .5).float()) for n in h)
    for values in (h, s):
        sum((v * torch.arange(v.numel()).reshape(v.shape)).sum() for v in values.values()).backward()
    for a, b, v in zip(hard.logits, soft.logits, s.values(), strict=True):
        assert torch.allclose(a.grad, b.grad)
        weight = torch.arange(v.numel()).reshape(v.shape)
        assert torch.allclose(b.grad, weight * v.detach() * (1 - v.detach()) / .5, atol=1e-5)


# ── distributions ────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("temperature", [.1, 1.0])
def test_a_rounded_coin_has_probability_sigmoid(temperature):
    gate, n = Concrete(SPACE, init=RAMP, temperature=temperature, straight_through=True, seed=1), 4000
    with torch.no_grad(): share = sum(flat(gate.sample()) for _ in range(n)) / n
    p = torch.sigmoid(logits(gate))
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()
    assert gate.penalty().item() == pytest.approx(p.mean().item(), abs=1e-6)
    assert np.allclose(array(gate.soft().values.values()), p, atol=1e-6)


def sigmoid(x): return 1 / (1 + np.exp(-x))


def test_hard_concrete_closed_forms():
    "P(z > 0), P(z = 1) and E[z] of the gate against a simulation written from the definition, with its own noise."
    gate, n, (beta, gamma, zeta) = HardConcrete(SPACE, init=RAMP, seed=2), 4000, (2 / 3, -.1, 1.1)
    g = logits(gate).double().numpy()
    u = np.random.default_rng(0).uniform(size=(20 * n, len(g)))
    z = np.clip(sigmoid((g + np.log(u) - np.log1p(-u)) / beta) * (zeta - gamma) + gamma, 0, 1)
    with torch.no_grad(): ours = torch.stack([flat(gate.sample()) for _ in range(n)]).numpy()
    kept = torch.cat([gate.keep_probability(logit).reshape(-1) for logit in gate.logits]).detach().numpy()

    def error(p): return 5 * np.sqrt(p * (1 - p) / n) + 1e-3

    whole = sigmoid(g - beta * math.log((1 - gamma) / (zeta - 1)))
    for event, closed in ((lambda z: z > 0, kept), (lambda z: z == 1, whole)):
        assert (np.abs(event(z).mean(0) - closed) < error(closed) / 4).all()
        assert (np.abs(event(ours).mean(0) - closed) < error(closed)).all()
    assert np.abs(ours.mean(0) - z.mean(0)).max() < 5 * .5 / math.sqrt(n)
    assert gate.penalty().item() == pytest.approx(kept.mean(), abs=1e-6)
    soft = array(gate.soft().values.values())
    assert np.allclose(soft, np.clip(sigmoid(g) * 1.2 - .1, 0, 1), atol=1e-6)
    hard = array(b for _, b in gate.harden().items())
    assert np.array_equal(hard[np.abs(g) > 1e-6], (soft > .5)[np.abs(g) > 1e-6])


@given(st.floats(0, 1), st.sampled_from(["tensor", "global"]), st.integers(0, 5), st.booleans())
def test_topk_has_exactly_its_density(density, scope, seed, ties):
    gate = TopK(SPACE, density, scope=scope, seed=seed, init=0.0 if ties else "normal")
    sizes = [21, 10] if scope == "tensor" else [31]
    for bits in (flat(gate.sample()), torch.tensor(array(b for _, b in gate.harden().items()))):
        assert [int(part.sum()) for part in bits.float().split(sizes)] == [round(density * n) for n in sizes]
    for part, v in zip(flat(gate.sample()).bool().split(sizes), logits(gate).split(sizes), strict=True):
        if part.any() and not part.all(): assert v[part].min() >= v[~part].max()


@pytest.mark.parametrize("sparsity", [.1, .5, .9])
def test_threshold_starts_at_its_sparsity(pocket_bert, sparsity):
    space = Space.of(pocket_bert[0], "weight", layers=4)
    p, n = sparsity, space.size
    assert abs(Threshold(space, sparsity).harden().sparsity - p) < 5 * math.sqrt(p * (1 - p) / n)


# ── determinism ──────────────────────────────────────────────────────────────────────────────────────────────────────

@gates
def test_a_seed_is_a_gate(make):
    a, b, c = make(SPACE, seed=1), make(SPACE, seed=1), make(SPACE, seed=2)
    assert a.harden() == b.harden()
    for _ in range(2): assert torch.equal(flat(a.sample()), flat(b.sample()))
    assert not torch.equal(logits(a), logits(c))
    assert a.identity() == b.identity() != c.identity()
    torch.manual_seed(0)
    torch.rand(3)                                                      # somebody else's noise is not ours
    before = torch.get_rng_state()
    make(SPACE, seed=1).sample()
    assert torch.equal(torch.get_rng_state(), before)


@gates
def test_noise_continues_from_its_state(make):
    gate = make(SPACE, seed=1)
    gate.sample()
    state = gate.state()
    wanted = [flat(gate.sample()) for _ in range(2)]
    other = make(SPACE, seed=1)
    other.restore(state)
    assert all(torch.equal(flat(other.sample()), w) for w in wanted)


@gates
def test_what_a_gate_gave_away_does_not_change(make):
    gate = make(SPACE)
    given_away = [gate.scores(), gate.soft()]
    copies = [{n: v.copy() for n, v in s.values.items()} for s in given_away]
    with torch.no_grad():
        for logit in gate.logits: logit.mul_(-1).add_(.5)
    for scores, before in zip(given_away, copies, strict=True):
        assert all(np.array_equal(scores[n], before[n]) for n in before)


@gates
def test_other_starts_are_other_gates(make):
    "The identity decides whether a stored run is returned, so it must tell starts apart."
    def start(x): return Scores(SPACE, {"a": np.full((7, 3), x), "b": np.full(10, -x)})

    assert make(SPACE, init=start(1.0)).identity() != make(SPACE, init=start(2.0)).identity()
    assert make(SPACE, init=start(1.0)).identity() == make(SPACE, init=start(1.0)).identity()


START = Mask.random(SPACE, .3, seed=8)
STARTED = {
    "threshold": lambda: Threshold(SPACE, init=START),
    "topk": lambda: TopK(SPACE, .3, init=START),
    "concrete": lambda: Concrete(SPACE, init=START),
    "hard-concrete": lambda: HardConcrete(SPACE, init=START),
}


@pytest.mark.parametrize("make", STARTED.values(), ids=STARTED)
def test_a_gate_started_from_a_mask_is_that_mask(make):
    assert make().harden() == START


def test_a_start_leaves_no_room_for_a_sparsity():
    for init in (START, "uniform", .85):
        with pytest.raises(SubnetError, match="sparsity belongs to the normal initialisation"):
            Threshold(SPACE, .9, init=init)


def test_starts_of_other_spaces_are_refused():
    other = Space(SPACE.groups, LAYOUT, ModelId("toy", None, "c", "v"))
    with pytest.raises(SpaceMismatch, match="start a gate from"): Threshold(other, init=START)


IMPOSSIBLE = [
    lambda: Threshold(SPACE, 50),
    lambda: TopK(SPACE, 30),
    lambda: Concrete(SPACE, 1.0),
    lambda: Threshold(SPACE, 1.0),
    lambda: HardConcrete(SPACE, 9),
    lambda: TopK(SPACE, .3, scope="layer"),
    lambda: Threshold(SPACE, init="gauss"),
]


@pytest.mark.parametrize("make", IMPOSSIBLE)
def test_impossible_settings(make):
    with pytest.raises(SubnetError): make()
