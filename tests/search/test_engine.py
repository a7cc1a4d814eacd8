"The engine against plain autograd: same losses, same scores, same bits; in every mode also after an interruption."
from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import subnet_explorer.search.adam as adam_module
import subnet_explorer.search.engine as engine_module
import subnet_explorer.search.sites as sites_module
import subnet_explorer.search.team as team_module
from subnet_explorer.core.errors import SubnetError
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.run import read_state
from subnet_explorer.core.space import Space
from subnet_explorer.core.store import Store
from subnet_explorer.data.facts import Facts, encode, read_facts
from subnet_explorer.data.grammar import sentences
from subnet_explorer.model.load import load, tiny
from subnet_explorer.search.adam import PlainOptimizer
from subnet_explorer.search.distil import MLM, Hidden, Maintain, Suppress
from subnet_explorer.search.engine import MaskOptimizer, engine_state
from subnet_explorer.search.find import find, find_all
from subnet_explorer.search.gates import Concrete, HardConcrete, Threshold, TopK, noise_key, uniform
from subnet_explorer.search.loop import Diverged, frozen, lr_at
from subnet_explorer.search.objectives import Cloze, Density, Kept, batch_at, passes
from subnet_explorer.search.processes import WrongProcesses
from subnet_explorer.search.reach import farthest
from subnet_explorer.search.team import SharedPass

FACTS = Facts(read_facts("pocket")["MadeOf"].items[:60])
TEXTS = [" ".join(t["form"] for t in s) for s in sentences(24)]
GATES = {
    "threshold": Threshold,
    "topk": lambda s, **k: TopK(s, .6, every=2, **k),
    "concrete": lambda s, **k: Concrete(s, .6, temperature=.5, **k),
    "straight-through": lambda s, **k: Concrete(s, straight_through=True, **k),
    "hard-concrete": HardConcrete,
}


@pytest.fixture(scope="module", params=["pocket-bert", "pocket-gpt2"])
def world(request):
    return load(request.param)


def search(world, engine, gate=Threshold, kind="weight", layers="top-half", goal=None, embeddings=False, **options):
    model, tok = world
    made = gate(Space.of(model, kind, layers=layers, embeddings=embeddings), seed=1)
    settings = dict(steps=12, lr=.01, every=1, batch=16, progress=False) | options
    return find(model, tok, made, goal or Cloze(FACTS), engine=engine, **settings), made


def said(value) -> str:
    "A parameter as text, the same in every process."
    return re.sub(r" at 0x\w+", "", str(value))


def agree(a, b, eps=1e-5):
    """Same losses, logits and bits. Adam divides by the size of the gradient: where that is rounding noise, as for a
    weight on which nothing depends, packed and padded sums differ in it, and the score wanders (by at most the
    learning rate a step); so a thousandth of the scores may."""
    (run, gate), (other, twin) = a, b
    assert np.abs(run.metrics.loss - other.metrics.loss).max() < eps
    apart = torch.cat([(x - y).abs().flatten() for x, y in zip(gate.logits, twin.logits, strict=True)])
    assert (apart > eps).float().mean() < 1e-3 and apart.max() < run.config["lr"] * run.config["steps"]
    assert run.mask == other.mask


# ── parity with the plain way ────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", GATES)
def test_every_gate_trains_as_by_autograd(world, name):
    agree(search(world, "plain", GATES[name]), search(world, "all", GATES[name]))


@pytest.mark.parametrize("options", [
    dict(clip=.5),
    dict(optimizer="adamw"),
    dict(complement=True),
    dict(accumulate=3),
    dict(accumulate=2, clip=.1, complement=True),
], ids=said)
def test_every_setting_trains_as_by_autograd(world, options):
    agree(search(world, "plain", HardConcrete, **options), search(world, "all", HardConcrete, **options))


@pytest.mark.parametrize("goal", [
    Cloze(FACTS) + .5 * Density(),
    Cloze(FACTS) + 2 * Density(.3),
    1.5 * Suppress(FACTS) + Maintain(TEXTS),
    MLM(TEXTS),
    MLM(TEXTS, distil=1.0),
    MLM(TEXTS, static=True, distil=.5),
    Hidden(TEXTS),
    Cloze(FACTS) + MLM(TEXTS) + Hidden(TEXTS),
], ids=lambda g: str(g.identity())[:40])
def test_every_objective_trains_as_by_autograd(world, goal):
    "Sums use a matrix several times in one step; its gradient is used once, when all of it is there."
    agree(*(search(world, engine, HardConcrete, goal=goal, steps=6) for engine in ("plain", "all")))


@pytest.mark.parametrize("kind", ["weight", "head+mlp", "weight+neuron", "layer+weight"])
def test_every_kind_trains_as_by_autograd(world, kind):
    agree(search(world, "plain", Threshold, kind), search(world, "all", Threshold, kind))


@pytest.mark.parametrize("scope,every", [("tensor", 1), ("global", 3)])
def test_the_best_are_chosen_anew_whatever_comes_first(world, scope, every):
    "Also where the first group is no matrix."
    def make(s, **k): return TopK(s, .6, scope=scope, every=every, **k)
    agree(search(world, "plain", make, "layer+weight"), search(world, "all", make, "layer+weight"))


def test_biases_train_as_by_autograd(world):
    "But for those of the keys, on which nothing depends: softmax does not see them."
    (run, gate), (other, twin) = search(world, "plain", Threshold, "bias"), search(world, "all", Threshold, "bias")
    assert np.abs(run.metrics.loss - other.metrics.loss).max() < 1e-5
    for g, a, b in zip(gate.space.groups, gate.logits, twin.logits, strict=True):
        if g.role not in ("k", "qkv"): assert torch.allclose(a, b, atol=1e-5), g.name


def test_the_model_still_tells_all_its_states(world):
    "transformers decides at the first call which blocks report their states; one with fewer must not be first."
    model, _ = world
    search(world, "plain", goal=MLM(TEXTS, static=True, distil=1.0), steps=1)
    with torch.no_grad(): out = model(input_ids=torch.tensor([[5, 6]]), output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1


def test_tied_embeddings_are_one_coordinate(world):
    "The embedding is looked up, and multiplied by in the head; both gradients arrive before its scores move."
    options = dict(layers=None, embeddings=True, goal=MLM(TEXTS, distil=1.0), steps=5)
    agree(search(world, "plain", **options), search(world, "all", **options))


@pytest.mark.parametrize("block", [(10**6, 1), (1, 10**6), (5, 3)])
def test_blocks_train_as_by_autograd(block):
    model = tiny("gpt2").requires_grad_(False)
    traces = []
    for kind in (PlainOptimizer, MaskOptimizer):
        gate = HardConcrete(Space.of(model, "block", block=block))
        opt = kind(model, gate, [.05] * 4)
        for step in range(4):
            with opt.applied():
                loss = model(input_ids=torch.arange(7)[None] + step).logits.logsumexp(-1).mean() + opt.penalty()
                opt.backward(loss)
            opt.step()
        traces.append(torch.cat([s.detach().flatten() for s in gate.logits]))
    assert torch.allclose(*traces, atol=1e-5)


# ── several passes a step ────────────────────────────────────────────────────────────────────────────────────────────

CRITICAL = 1.5 * Suppress(FACTS) + Maintain(TEXTS) + 2 * Density()
def straight(s, **k): return Concrete(s, .45, temperature=1.0, straight_through=True, **k)


SEVERAL = {
    "independent": (CRITICAL, dict(noise="independent")),
    "kept": (CRITICAL + Kept(Cloze(FACTS)), {}),
    "kept, independent": (CRITICAL + .5 * Kept(Cloze(FACTS) + MLM(TEXTS)), dict(noise="independent")),
    "only kept": (Kept(Cloze(FACTS)) + Density(), {}),
}


@pytest.mark.parametrize("name,gate,options", [
    *((name, straight, {}) for name in SEVERAL),
    ("kept, independent", HardConcrete, dict(clip=.1)),
    ("kept, independent", straight, dict(accumulate=2, optimizer="adamw")),
    ("kept, independent", Threshold, {}),
    ("kept, independent", GATES["topk"], {}),
], ids=said)
def test_several_passes_train_as_by_autograd(world, name, gate, options):
    goal, more = SEVERAL[name]
    settings = dict(goal=goal, complement=True, steps=4, **options, **more)
    agree(*(search(world, engine, gate, **settings) for engine in ("plain", "all")))


def test_several_passes_cover_every_kind(world):
    settings = dict(goal=SEVERAL["kept, independent"][0], noise="independent", complement=True, steps=3)
    agree(*(search(world, engine, straight, "weight+neuron+head", **settings) for engine in ("plain", "all")))


def sampled(i, logit, step, draw):
    "The mask of one tensor, by hand, with the slope of the soft one."
    places, key = torch.arange(logit.numel(), dtype=torch.int32), noise_key(5, step, i, draw)
    u = 1e-6 + (1 - 2e-6) * uniform(places, torch.tensor(key, dtype=torch.int32)).view(logit.shape)
    soft = torch.sigmoid(logit + torch.log(u / (1 - u)))
    return (soft > .5).float().detach() + soft - soft.detach()


def test_three_terms_see_three_masks():
    "A step written out: a draw for every pass, all gradients and that of the density added up, one step of Adam."
    model, tok = load("pocket-gpt2")
    space = Space.of(model, "weight", layers="top-half")
    facts = Facts(FACTS.items[:16])
    goal, steps, lr = 1.5 * Suppress(facts) + Maintain(facts) + 2 * Density() + .5 * Kept(Cloze(facts)), 4, .05
    made = straight(space, seed=5)
    settings = dict(steps=steps, lr=lr, schedule="constant", warmup=0, every=1, batch=8, progress=False)
    run = find(model, tok, made, goal, complement=True, noise="independent", **settings)
    logits = [torch.nn.Parameter(torch.full(g.shape, float(np.log(.45 / .55)))) for g in space.groups]
    losses, adam = [], torch.optim.Adam(logits, lr=lr)
    coded = [encode(tok, f, True) for f in facts]
    lengths = np.array([len(c[0]) for c in coded])

    def said_by(weights, index):
        "Log-probabilities at the answers."
        out = []
        for i in index:
            inputs = dict(input_ids=torch.tensor([coded[i][0]]))
            out.append(torch.func.functional_call(model, weights, kwargs=inputs).logits[0, coded[i][1]])
        return torch.stack(out).log_softmax(-1)

    def predict(step, draw, inverse, index):
        weights = {}
        for i, (g, logit) in enumerate(zip(space.groups, logits, strict=True)):
            m = sampled(i, logit, step, draw)
            w = model.base_model.get_parameter(g.name).detach()
            weights[f"transformer.{g.name}"] = w * (1 - m if inverse else m)
        return said_by(weights, index)

    for step in range(steps):
        index = batch_at(step, lengths, 8, 0)
        with torch.no_grad(): full = said_by({}, index)
        v, gold = full.shape[-1], torch.tensor([coded[i][2] for i in index])
        a, b, c = predict(step, 0, True, index), predict(step, 1, True, index), predict(step, 2, False, index)
        density = sum(torch.sigmoid(x).sum() for x in logits) / space.size
        suppressed, maintained = (-a.mean(-1) - np.log(v)).mean(), (full.exp() * (full - b)).sum(-1).mean()
        loss = 1.5 * suppressed + maintained + 2 * density + .5 * -c.gather(1, gold[:, None]).mean()
        losses.append(loss.item())
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert np.abs(run.metrics.loss - losses).max() < 1e-4
    apart = torch.cat([(x - y).abs().flatten() for x, y in zip(made.logits, logits, strict=True)])
    assert (apart > 1e-3).float().mean() < 1e-3


def test_shared_noise_is_one_pass_to_the_bit(world):
    "Unless a term is kept nothing changes, neither numbers nor what identifies a run; one term alone is the same."
    kept = CRITICAL + Kept(Cloze(FACTS))
    asked = [(CRITICAL, "shared", True), (CRITICAL, "independent", True), (kept, "shared", False)]
    assert [len(passes(*a)) for a in asked] == [1, 2, 1]
    def run(goal, **options): return search(world, "all", straight, goal=goal, steps=4, **options)[0]
    shared, default = run(CRITICAL, complement=True, noise="shared"), run(CRITICAL, complement=True)
    assert "noise" not in shared.config and shared.id == default.id
    assert list(shared.metrics.loss) == list(default.metrics.loss)
    one, other = (run(Cloze(FACTS) + Density(), noise=n) for n in ("shared", "independent"))
    assert one.mask == other.mask and list(one.metrics.loss) == list(other.metrics.loss)
    assert other.config["noise"] == "independent" and one.id != other.id
    with pytest.raises(SubnetError, match="did you mean independent"): search(world, "all", noise="independant")


def assert_same(run, gate, other, twin):
    "Same mask, losses and logits, to the bit."
    assert run.mask == other.mask and list(run.metrics.loss) == list(other.metrics.loss)
    assert all(torch.equal(a, b) for a, b in zip(gate.logits, twin.logits, strict=True))


@pytest.mark.parametrize("engine", ["plain", "all"])
@pytest.mark.parametrize("options", [dict(), dict(clip=.5), dict(accumulate=2)], ids=said)
def test_several_passes_stopped_and_continued_are_the_same(world, engine, options, tmp_path):
    goal, more = SEVERAL["kept, independent"]
    options = dict(goal=goal, complement=True, every=2, steps=6, checkpoint=0, **more, **options)
    whole, gate = search(world, engine, straight, monitor=Fuse(100), **options)
    fuse = Fuse(3)
    with pytest.raises(Stop): search(world, engine, straight, monitor=fuse, to=tmp_path / "run", **options)
    resumed, again = search(world, engine, straight, monitor=fuse, to=tmp_path / "run", **options)
    assert_same(resumed, again, whole, gate)


@pytest.mark.parametrize("goal", [
    Maintain(TEXTS),
    Maintain(FACTS),
    Hidden(TEXTS),
    MLM(TEXTS, static=True, distil=1.0),
], ids=lambda g: type(g).__name__)
def test_what_the_full_model_says_does_not_depend_on_what_was_met_before(world, goal, tmp_path):
    "A continued search meets sentences in other company: its scores are the same to the last bit all the same."
    options = dict(goal=goal, every=1, steps=5, batch=7, checkpoint=0)
    whole, gate = search(world, "all", HardConcrete, monitor=Fuse(100), **options)
    fuse = Fuse(2)
    with pytest.raises(Stop): search(world, "all", HardConcrete, monitor=fuse, to=tmp_path / "run", **options)
    resumed, again = search(world, "all", HardConcrete, monitor=fuse, to=tmp_path / "run", **options)
    assert_same(resumed, again, whole, gate)


@pytest.mark.parametrize("kind", [PlainOptimizer, MaskOptimizer])
@pytest.mark.parametrize("several", [False, True], ids=["shared", "independent"])
def test_a_coordinate_is_sampled_with_the_probability_of_its_logit(kind, several):
    "P(m = 1) = sigmoid(l) in every pass, and passes of one step know nothing of each other."
    model = tiny("gpt2").requires_grad_(False)
    gate = Concrete(Space.of(model, "weight"), init="normal", temperature=1.0, straight_through=True, seed=2)
    opt, steps = kind(model, gate, [1e-12] * 60, several=several), 60      # a rate at which nothing moves
    name, seen = gate.space.groups[0].name, []
    def masked_weight():
        if kind is MaskOptimizer: return opt.sites[0].masked.clone()
        return reach_parameter(model, name)
    weight = model.base_model.get_parameter(name).detach().clone()
    for _ in range(steps):
        draws = []
        for draw in range(3 if several else 1):
            with opt.applied(draw):
                draws.append((masked_weight() != 0).float())
                opt.backward(model(input_ids=torch.tensor([[5, 6, 7]])).logits.logsumexp(-1).mean())
        opt.step()
        seen.append(torch.stack(draws))
    seen = torch.stack(seen)[:, :, weight != 0]                              # (step, pass, coordinate)
    p = torch.sigmoid(gate.logits[0].detach())[weight != 0]
    for k in range(seen.shape[1]):
        z = (seen[:, k].mean(0) - p) / (p * (1 - p) / steps).sqrt()
        assert abs(z.mean()) < 4 / len(z)**.5 and abs(z.square().mean() - 1) < .2
        for j in range(k):
            both = ((seen[:, k] - p) * (seen[:, j] - p) / (p * (1 - p))).mean()
            assert abs(both) < 5 / seen[:, k].numel()**.5


def reach_parameter(model, name):
    "What stands in the place of a parameter now."
    path, _, attr = name.rpartition(".")
    return model.base_model.get_submodule(path)._parameters[attr].detach()


@pytest.mark.parametrize("gate", [Threshold, HardConcrete])
def test_long_texts_are_folded_into_gradients(gate):
    "What a long text hands over for a matrix that is used again is added up at once, and the sum is the same."
    traces, folds, original = [], [], sites_module.fold
    def spy(site):
        folds.append(site.index)
        original(site)
    try:
        sites_module.fold = spy
        for kind in (PlainOptimizer, MaskOptimizer):
            model = tiny("gpt2").requires_grad_(False)
            made = gate(Space.of(model, "weight", embeddings=True))
            opt = kind(model, made, [.05] * 4)
            for step in range(4):
                ids = torch.randint(0, 40, (12, 20), generator=torch.Generator().manual_seed(step))
                with opt.applied():
                    one, all_of, some = (model(input_ids=x, labels=x).loss for x in (ids[:1], ids, ids[:, :5]))
                    opt.backward(one + 2 * all_of + some)
                opt.step()
            traces.append(torch.cat([s.detach().flatten() for s in made.logits]))
    finally: sites_module.fold = original
    apart = (traces[0] - traces[1]).abs()      # as in `agree`: Adam makes a step of rounding noise
    assert folds and (apart > 1e-5).float().mean() < 1e-3 and apart.max() < .2


# ── scores that can still flip ───────────────────────────────────────────────────────────────────────────────────────

SHORT = dict(steps=30, lr=.002)      # a score can move by about .04: few are in reach

def test_reachable_gives_the_same_bits(world):
    everything, _ = search(world, "all", **SHORT)
    some, gate = search(world, "reachable", **SHORT)
    start = Threshold(gate.space, seed=1).harden()
    assert everything.mask == some.mask and (everything.mask ^ start).count > 20
    assert np.abs(everything.metrics.loss - some.metrics.loss).max() < 1e-6
    assert list(everything.metrics.density) == list(some.metrics.density)        # at every step, not only at the end


def test_only_reachable_scores_have_moments(world):
    model, _ = world
    gate = Threshold(Space.of(model, "weight", layers="top-half"), seed=1)
    rates = [.002] * 20
    opt = MaskOptimizer(model, gate, rates, scores="reachable")
    held = sum(len(a.m) for a in opt.reach.active.values())
    near = sum(int((s.abs() <= farthest(rates)[0]).sum()) for s in gate.logits)
    assert held == near < .15 * gate.space.size and not opt.moments


def test_the_set_narrows_along_the_way(world):
    "A search that begins with everything in reach ends with little of it, and with the same mask."
    long = dict(steps=60, lr=.01)
    everything, _ = search(world, "all", **long)
    sizes = []
    original = engine_module.narrow
    def spy(reach, *args):
        original(reach, *args)
        sizes.append(sum(len(a.index) for a in reach.active.values()))
    engine_module.narrow = spy
    try: some, _ = search(world, "reachable", **long)
    finally: engine_module.narrow = original
    assert sizes[0] == 0 and sizes[-1] > 0 and sorted(s for s in sizes if s) == [s for s in sizes if s][::-1]
    assert everything.mask == some.mask


@pytest.mark.parametrize("options", [
    dict(clip=1.0),
    dict(optimizer="adamw"),
    dict(complement=True),
    dict(gate=HardConcrete),
    dict(gate=GATES["topk"]),
], ids=said)
def test_reachable_falls_back_where_the_bound_does_not_hold(world, options):
    agree(search(world, "all", **SHORT, **options), search(world, "reachable", **SHORT, **options), eps=1e-9)


def test_the_default_is_exact(world):
    assert search(world, "auto", **SHORT)[0].mask == search(world, "plain", **SHORT)[0].mask


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("growth", [1.0, 1.05, 3.0])
def test_no_gradients_move_a_score_farther_than_the_bound(schedule, growth):
    rates = [.01 * lr_at(t, 80, schedule) for t in range(80)]
    p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([p])
    bound = farthest(rates)
    for t, rate in enumerate(rates):
        adam.param_groups[0]["lr"], p.grad = rate, torch.tensor([growth**t], dtype=torch.float64)
        adam.step()
        assert abs(p.item()) <= bound[0] - (bound[t + 1] if t + 1 < len(bound) else 0) + 1e-9
    assert abs(p.item()) > .3 * sum(rates)


# ── interruption ─────────────────────────────────────────────────────────────────────────────────────────────────────

class Stop(Exception): pass

class Fuse:
    "A monitor that stops the search once."
    def __init__(self, calls: int) -> None: self.left = calls
    def identity(self): return {"monitor": "fuse"}
    def prepare(self, context):
        def score():
            self.left -= 1
            if self.left == 0: raise Stop
            return 0.0
        return score


@pytest.mark.parametrize("mode", ["plain", "all", "reachable", "auto"])
@pytest.mark.parametrize("name", GATES)
def test_stopped_and_continued_is_the_same(world, mode, name, tmp_path):
    options = dict(gate=GATES[name], every=5, checkpoint=0, **{**SHORT, "lr": .002 if name == "threshold" else .02})
    straight, _ = search(world, mode, monitor=Fuse(100), **options)
    fuse = Fuse(4)
    with pytest.raises(Stop): search(world, mode, monitor=fuse, to=tmp_path / "run", **options)
    resumed, _ = search(world, mode, monitor=fuse, to=tmp_path / "run", **options)
    assert resumed.mask == straight.mask and list(resumed.metrics.loss) == list(straight.metrics.loss)


@pytest.mark.parametrize("before,after", [
    ("plain", "all"), ("all", "plain"), ("plain", "reachable"), ("all", "reachable"), ("reachable", "all"),
])
def test_a_search_may_change_its_engine(world, before, after, tmp_path):
    straight, _ = search(world, "all", monitor=Fuse(100), every=5, **SHORT)
    fuse = Fuse(4)
    settings = dict(monitor=fuse, every=5, checkpoint=0, to=tmp_path / "run", **SHORT)
    with pytest.raises(Stop): search(world, before, **settings)
    assert search(world, after, **settings)[0].mask == straight.mask


def test_dropped_moments_cannot_be_had_back(world, tmp_path):
    fuse = Fuse(4)
    settings = dict(monitor=fuse, every=5, checkpoint=0, to=tmp_path / "run", **SHORT)
    with pytest.raises(Stop): search(world, "reachable", **settings)
    with pytest.raises(SubnetError, match="dropped the moments"): search(world, "plain", **settings)


@pytest.mark.parametrize("mode", ["plain", "all", "reachable"])
def test_a_gradient_that_is_not_finite_stops_the_search(world, mode):
    from subnet_explorer.search.objectives import Objective
    class Root(Objective):
        "The square root of zero has an infinite slope."
        def prepare(self, context):
            model = context.model
            return lambda step: (model(input_ids=torch.tensor([[5, 6, 7]])).logits.mean() * (step == 2)).abs().sqrt()
    with pytest.raises(Diverged, match=r"gradient is not finite at step|loss became nan"):
        search(world, mode, goal=Root(), **SHORT)


# ── compiled or not ──────────────────────────────────────────────────────────────────────────────────────────────────

def _optimizer_trace(fast, gate=HardConcrete, scores="all", dtype=torch.float32, steps=5, rate=.02):
    model = tiny("bert").requires_grad_(False)
    made = gate(Space.of(model, "weight"))
    opt = MaskOptimizer(model, made, [rate] * steps, fast=fast, scores=scores, dtype=dtype)
    for step in range(steps):
        with opt.applied():
            loss = model(input_ids=torch.arange(7)[None] + step).logits.logsumexp(-1).mean()
            opt.backward(loss + (opt.penalty() if gate is not Threshold else 0))
        opt.step()
    engine_state(opt)      # brings logits up to date
    return torch.cat([s.detach().flatten() for s in made.logits]), made.harden(), opt


def test_compiled_and_plain_updates_agree():
    "Where there is no compiler both are plain, and a warning says so."
    for gate in (Threshold, HardConcrete, lambda s: Concrete(s, straight_through=True)):
        (a, m, _), (b, n, _) = (_optimizer_trace(fast, gate) for fast in (False, True))
        assert torch.allclose(a, b, atol=1e-5) and m == n


def test_a_sampled_gradient_is_the_gradient():
    modes = ("reachable", "sampled", "all")
    (a, m, opt), (b, n, _), (_, o, _) = (_optimizer_trace(True, Threshold, scores, rate=.004) for scores in modes)
    assert opt.reach.active and torch.allclose(a, b, atol=1e-4) and m == o and (m ^ n).count <= 2


def test_without_a_compiler_it_is_slower_and_the_same(monkeypatch):
    monkeypatch.setattr(adam_module, "COMPILED", {})
    def broken(*args, **kwargs): raise RuntimeError("no compiler here")
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="could not be compiled"): a, m, _ = _optimizer_trace(True, Threshold)
    b, n, _ = _optimizer_trace(False, Threshold)
    assert torch.equal(a, b) and m == n


def test_small_searches_do_not_wait_for_a_compiler(world):
    model, _ = world
    gate = Threshold(Space.of(model, "weight"), seed=1)
    assert not MaskOptimizer(model, gate, [.01] * 400).fast and MaskOptimizer(model, gate, [.01] * 400_000).fast


def test_lower_precision_trains_nearly_the_same(world):
    exact, _ = search(world, "all", steps=30)
    rough, gate = search(world, "all", steps=30, precision="bfloat16")
    start = Threshold(gate.space, seed=1).harden()
    assert 0 < (exact.mask ^ rough.mask).count < .25 * (exact.mask ^ start).count
    assert all(s.dtype == torch.float32 for s in gate.logits)


# ── noise ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def draw(n, *key, start=0):
    places = torch.arange(start, n, dtype=torch.int32)
    return uniform(places, torch.tensor(noise_key(*key), dtype=torch.int32)).numpy()


def test_noise_is_uniform_and_independent():
    u = draw(1 << 20, 0, 0, 0)
    assert u.min() > 0 and u.max() < 1 and stats.kstest(u, "uniform").pvalue > 1e-3
    assert stats.chisquare(np.bincount((u * 4096).astype(int), minlength=4096)).pvalue > 1e-3
    keys = ((0, 1, 0), (0, 0, 1), (1, 0, 0))
    for other in (*(draw(1 << 20, *key) for key in keys), np.roll(u, 1), np.roll(u, 768)):
        pairs = np.histogram2d(u, other, bins=32)[0]
        assert stats.chisquare(pairs.ravel()).pvalue > 1e-4


def test_noise_depends_on_place_only():
    assert np.array_equal(draw(1000, 3, 5, 7)[400:], draw(1000, 3, 5, 7, start=400))
    model = tiny("bert")
    gate = HardConcrete(Space.of(model, "weight+head"), seed=2)
    alone = {g.name: gate.multiplier(i)[0] for i, g in enumerate(gate.space.groups)}
    assert all(torch.equal(v, alone[n]) for n, v in gate.sample().items())      # groups drawn together or one by one


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_no_gradient_is_stored(world):
    model, _ = world
    gate = Threshold(Space.of(model, "weight", layers="top-half"), seed=1)
    opt = MaskOptimizer(model, gate, [.01] * 3)
    with frozen(model), opt.applied():
        opt.backward(model(input_ids=torch.tensor([[5, 6, 7]])).logits.logsumexp(-1).mean())
    opt.step()
    assert all(s.grad is None for s in gate.logits) and all(p.grad is None for p in model.parameters())
    assert opt.scratch.numel() == max(s.w.numel() for s in opt.sites.values())


def test_the_model_is_given_back(world):
    model, _ = world
    before = {n: (p, p.clone()) for n, p in model.named_parameters()}
    with pytest.raises(Stop): search(world, "all", HardConcrete, monitor=Fuse(2), embeddings=True, layers=None)
    assert all(p is before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())
    assert not any("forward" in m.__dict__ for m in model.modules())


# ── several searches in one pass ─────────────────────────────────────────────────────────────────────────────────────

RELATIONS = ("MadeOf", "IsA", "PartOf")
GOALS = [Cloze(Facts(read_facts("pocket")[r].items[:n])) for r, n in zip(RELATIONS, (40, 23, 60), strict=True)]
USUAL = dict(steps=10, lr=.01, every=2, batch=16, progress=False)


def together(world, gates=None, to=None, engine="auto", **options):
    model, tok = world
    space = Space.of(model, "weight", layers="top-half")
    gates = gates or [Threshold(space, seed=s) for s in range(3)]
    labels = [{"task": r} for r in RELATIONS]
    return find_all(model, tok, gates, GOALS, labels=labels, to=to, engine=engine, **USUAL | options)


@pytest.mark.parametrize("fillers", [1, 64])
@pytest.mark.parametrize("options", [
    dict(), dict(engine="all"), dict(lr=.002), dict(clip=.5), dict(optimizer="adamw"),
], ids=said)
def test_side_by_side_is_one_by_one(world, options, fillers, monkeypatch):
    "Also when tokens are filled up to sizes that can be captured."
    monkeypatch.setitem(team_module.ROUND, "cpu", fillers)
    model, tok = world
    space = Space.of(model, "weight", layers="top-half")
    for s, (run, goal) in enumerate(zip(together(world, **options), GOALS, strict=True)):
        alone = find(model, tok, Threshold(space, seed=s), goal, **USUAL | options)
        assert run.mask == alone.mask and run.id == alone.id
        assert np.abs(run.metrics.loss - alone.metrics.loss).max() < 1e-5


def test_token_counts_are_few(world, monkeypatch):
    monkeypatch.setitem(team_module.ROUND, "cpu", 64)
    shapes = set()
    original = SharedPass.compute
    def spy(self, states, gold, *packing):
        shapes.add((len(states), len(gold), self.batch.tokens.width, self.batch.tokens.n))
        return original(self, states, gold, *packing)
    monkeypatch.setattr(SharedPass, "compute", spy)
    together(world, steps=30)
    assert len(shapes) <= 8 and all(n % 64 == 0 and w % 8 == 0 for n, _, w, _ in shapes)


def test_side_by_side_continues(world, tmp_path):
    "One of three stops with a state older than the others', is caught up, and all end as if nothing had happened."
    straight = together(world, monitor=Fuse(10_000))
    fuse = Fuse(11)
    with pytest.raises(Stop): together(world, to=Store(tmp_path), monitor=fuse, checkpoint=0)
    assert len({safe_step(r) for r in Store(tmp_path)}) > 1
    resumed = together(world, to=Store(tmp_path), monitor=fuse, checkpoint=0)
    def told(runs): return [(r.mask, list(r.metrics.loss)) for r in runs]
    assert told(resumed) == told(straight)
    read = together(world, to=Store(tmp_path), monitor=fuse, checkpoint=0)
    assert told(read) == told(straight)      # done: read back


def safe_step(run): return read_state(run.folder)[1]["step"]


def test_an_unknown_block_cannot_share_a_pass(world, monkeypatch):
    model, tok = world
    monkeypatch.setattr("subnet_explorer.model.sequences.packing_agrees", lambda *a: False)
    gates = [Threshold(Space.of(model, "weight", layers="top-half"))]
    with pytest.raises(SubnetError, match="use find"):
        find_all(model, tok, gates, GOALS[:1], steps=2, progress=False)


@pytest.mark.parametrize("change,message", [
    (dict(goals=[MLM(TEXTS)] * 3), "only cloze"),
    (dict(goals=GOALS[:2]), "one goal"),
    (dict(kind="head"), "one space of weights"),
    (dict(accumulate=2), "one batch a step"),
    (dict(engine="plain"), "one batch a step"),
    (dict(dropout=True), "without dropout"),
    (dict(stepps=3), "did you mean steps"),
], ids=said)
def test_what_cannot_share_a_pass_says_so(world, change, message):
    model, tok = world
    change = dict(change)
    space, goals = Space.of(model, change.pop("kind", "weight"), layers="top-half"), change.pop("goals", GOALS)
    gates = [Threshold(space, seed=s) for s in range(3)]
    with pytest.raises(SubnetError, match=message): find_all(model, tok, gates, goals, progress=False, **change)


# ── several processes ────────────────────────────────────────────────────────────────────────────────────────────────

PROGRAM = """
import json, os, sys
from subnet_explorer import Cloze, Concrete, Density, Facts, HardConcrete, Kept, MLM, Maintain, Space, Suppress
from subnet_explorer import Threshold, find, load, read_facts
from subnet_explorer.data.grammar import sentences

model, tok = load("pocket-bert")
facts = Facts(read_facts("pocket")["MadeOf"].items[:37])
texts = [" ".join(t["form"] for t in s) for s in sentences(30)]
space = Space.of(model, "weight+head", layers="top-half")
critical = Suppress(facts) + Maintain(texts) + Kept(Cloze(facts)) + Density()
reachable = dict(lr=.0005, engine="reachable")
separate = dict(noise="independent", complement=True)
searches = {
    "hard": (Threshold(space), Cloze(facts), dict(lr=.002)),
    "soft": (HardConcrete(space), Cloze(facts) + .1 * Density(), dict(clip=.5)),
    "few": (Threshold(Space.of(model, "weight")), Cloze(facts), reachable),
    "text": (Threshold(space), MLM(texts), {}),
    "passes": (Concrete(space, .5, straight_through=True), critical, separate),
}
for name, (gate, goal, options) in searches.items():
    settings = dict(steps=8, batch=8, every=2, progress=False, to=f"{sys.argv[1]}/{name}", processes=int(sys.argv[2]))
    run = find(model, tok, gate, goal, **settings | options)
    line = json.dumps([name, run.mask.id, list(run.metrics.loss)]) + "\\n"
    with open(f"{sys.argv[1]}-rank{os.environ.get('RANK', 0)}.jsonl", "a") as out: out.write(line)
"""


def launch(folder: Path, n: int, asked: int) -> subprocess.CompletedProcess:
    (folder / "program.py").write_text(PROGRAM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable]
    if n > 1:
        start += ["-m", "torch.distributed.run", "--nproc_per_node", str(n)]
        start += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    command = [*start, str(folder / "program.py"), str(folder / f"runs-{n}"), str(asked)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=one_thread, timeout=600, check=False)


def test_two_processes_find_the_mask_of_one(tmp_path):
    "The same global batch, in two parts, of which some are uneven and some are empty."
    pytest.importorskip("accelerate")
    one, two = launch(tmp_path, 1, 1), launch(tmp_path, 2, 2)
    assert one.returncode == 0 and two.returncode == 0, one.stderr[-2000:] + two.stderr[-4000:]
    def read(n, rank):
        lines = (tmp_path / f"runs-{n}-rank{rank}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]
    alone, first, second = read(1, 0), read(2, 0), read(2, 1)
    names = ["hard", "soft", "few", "text", "passes"]
    assert first == second and [name for name, *_ in first] == names == [name for name, *_ in alone]
    for (name, _, losses), (_, _, halves) in zip(alone, first, strict=True):
        a, b = (Mask.load(tmp_path / f"runs-{n}" / name / "mask.safetensors") for n in (1, 2))
        assert np.allclose(losses, halves, rtol=1e-4), name
        # sums in another order: a score that is rounding noise may change its side
        assert (a ^ b).count <= 1e-4 * a.space.size, name


def test_the_number_of_processes_is_checked(world):
    with pytest.raises(WrongProcesses, match=r"2 processes were asked for, but 1 runs.*torchrun"):
        search(world, "auto", processes=2)


# ── GPU ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.gpu
@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("mode", ["plain", "all", "reachable", "sampled"])
def test_gpu_trains_as_cpu(name, mode):
    "Noise is a function, so the same seed gives the same search on every device, up to the order of sums."
    model, tok = load("pocket-bert")
    here, _ = search((model, tok), "plain", GATES[name], **SHORT)
    there, gate = search((model.cuda(), tok), mode, GATES[name], **SHORT)
    assert (here.mask ^ there.mask).count <= .001 * gate.space.size
    assert np.abs(here.metrics.loss - there.metrics.loss).max() < 1e-2


@pytest.mark.gpu
def test_gpu_compiled_update_agrees():
    model = tiny("bert").cuda().requires_grad_(False)
    traces = []
    for fast in (False, True):
        gate = HardConcrete(Space.of(model, "weight")).cuda()
        opt = MaskOptimizer(model, gate, [.02] * 4, fast=fast)
        for step in range(4):
            ids = torch.arange(7, device="cuda")[None] + step
            with opt.applied(): opt.backward(model(input_ids=ids).logits.logsumexp(-1).mean() + opt.penalty())
            opt.step()
        traces.append(torch.cat([s.detach().flatten() for s in gate.logits]))
    assert torch.allclose(*traces, atol=1e-4)


@pytest.mark.gpu
def test_gpu_steps_are_captured_and_the_same(tmp_path):
    "Captured steps of one and of several searches find what steps that run as they are find."
    model, tok = load("pocket-bert")
    model = model.cuda()
    space = Space.of(model, "weight", layers="top-half")
    options = dict(steps=60, lr=.01, every=10, batch=16, progress=False, engine="all")
    seen = []
    original = SharedPass.__init__
    def spy(self, *args):
        original(self, *args)
        seen.append(self)
    rule = MaskOptimizer.__init__
    def compiling(self, *args, **kw): rule(self, *args, **{**kw, "fast": True})
    try:
        SharedPass.__init__ = spy
        MaskOptimizer.__init__ = compiling
        captured = find_all(model, tok, [Threshold(space, seed=s) for s in range(3)], GOALS, **options)
    finally: SharedPass.__init__, MaskOptimizer.__init__ = original, rule
    assert seen and any(p.replay.graphs for p in seen)
    for s, (run, goal) in enumerate(zip(captured, GOALS, strict=True)):
        plain = find(model, tok, Threshold(space, seed=s), goal, **{**options, "engine": "plain"})
        assert (run.mask ^ plain.mask).count <= .002 * space.size
