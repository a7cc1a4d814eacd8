"One loop for gates and weights: both together, what is borrowed, what is shown, what continues to the bit."
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from subnet_explorer.core.errors import SubnetError, UnknownName
from subnet_explorer.core.run import OtherRun, Run
from subnet_explorer.core.space import Space
from subnet_explorer.data.facts import Facts, read_facts
from subnet_explorer.model.load import load, tiny
from subnet_explorer.search.distil import MLM, Hidden, LanguageHead, Maintain
from subnet_explorer.search.find import BorrowedWeights, find, find_all
from subnet_explorer.search.gates import Threshold, TopK
from subnet_explorer.search.objectives import Cloze, Objective
from subnet_explorer.search.together import Weights, put_into
from subnet_explorer.tasks.fit import fit, preserved

FACTS = Facts(read_facts("pocket")["MadeOf"].items[:40])
TEXTS = ["a robin is a kind of bird .", "a bird can fly .", "a table is made of wood ."]
SHORT: dict[str, Any] = dict(steps=6, every=2, batch=8, lr=.05, progress=False)


class Stop(Exception): pass


class Fuse:
    "A monitor that stops the search once."
    def __init__(self, calls): self.left = calls
    def identity(self): return {"monitor": "fuse"}
    def prepare(self, context):
        def score():
            self.left -= 1
            if self.left == 0: raise Stop
            return -float(self.left > 0)
        return score


@pytest.fixture(scope="module")
def bert(): return load("pocket-bert")


@pytest.fixture(scope="module")
def space(bert): return Space.of(bert[0], "weight", layers="4")


def together(bert, space, to=None, calls=10**9, which="all", goal=None, **more):
    "A short search that trains scores and weights."
    weights = Weights(bert[0], which, lr=1e-3)
    gate = TopK(space, .3, init=0.0)
    monitor = Fuse(calls)
    run = find(*bert, gate, goal or Cloze(FACTS), along=weights, monitor=monitor, to=to, checkpoint=0, **SHORT | more)
    return run, weights, gate


# ── weights and gates together ───────────────────────────────────────────────────────────────────────────────────────

def test_mask_and_weights_change_and_the_model_does_not(bert, space):
    model = bert[0]
    before = {n: (p, p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    run, weights, gate = together(bert, space)
    for n, p in model.named_parameters(): assert p is before[n][0] and torch.equal(p, before[n][1]) and p.grad is None
    assert all(p.requires_grad == before[n][2] for n, p in model.named_parameters())
    own = dict(model.base_model.named_parameters())
    moved = [n for n, v in zip(weights.names, weights.values, strict=True) if not torch.equal(v, own[n])]
    assert len(moved) > .9 * len(weights.names)
    assert run.mask != TopK(space, .3, init=0.0).harden() and run.mask.density == pytest.approx(.3, abs=.01)
    assert all(s.grad is None for s in gate.logits)


def test_movement_written_out():
    "Five steps by hand: W ⊙ Top(S), the gradient straight through to S, and that of W."
    model = tiny("bert").eval()
    space = Space.of(model, "weight", layers=2)
    ids = torch.arange(5, 17).view(2, 6)

    class Logits(Objective):
        def prepare(self, context): return lambda step: loss_of(context.model)

    def loss_of(m): return F.cross_entropy(m(input_ids=ids).logits.flatten(0, 1), ids.flatten())

    names = [g.name for g in space.groups]
    weights = Weights(model, names, lr=.01)
    settings = dict(steps=5, every=1, lr=.1, schedule="constant", warmup=0, progress=False)
    run = find(model, None, TopK(space, .4, seed=3), Logits(), along=weights, **settings)
    scores = [torch.nn.Parameter(s.detach().clone()) for s in TopK(space, .4, seed=3).logits]
    values = [torch.nn.Parameter(model.base_model.get_parameter(n).detach().clone()) for n in names]
    opt = torch.optim.Adam([dict(params=scores, lr=.1), dict(params=values, lr=.01)])
    losses = []
    for _ in range(5):
        masks = []
        for s in scores:
            kept = torch.zeros(s.numel())
            kept[s.detach().flatten().sort(descending=True, stable=True).indices[:round(.4 * s.numel())]] = 1
            masks.append(kept.view(s.shape) + s - s.detach())
        inside = {f"bert.{n}": w * m for n, w, m in zip(names, values, masks, strict=True)}
        logits = torch.func.functional_call(model, inside, kwargs=dict(input_ids=ids)).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert run.metrics.loss.tolist() == pytest.approx(losses, abs=1e-5)
    for ours, theirs in zip(weights.values, values, strict=True): assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("which", ["all", ["encoder.layer.3.*"]], ids=["all", "some"])
def test_stopped_and_continued_together(bert, space, tmp_path, which):
    straight, weights, gate = together(bert, space, which=which)
    with pytest.raises(Stop): together(bert, space, tmp_path, calls=2, which=which)
    assert not Run.open(tmp_path).done
    resumed, again, twin = together(bert, space, tmp_path, which=which)
    assert resumed.mask == straight.mask and resumed.metrics.equals(straight.metrics)
    for a, b in ((weights.values, again.values), (gate.logits, twin.logits)):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    read, third, _ = together(bert, space, tmp_path, which=which)      # finished: the weights are read back
    assert read.mask == straight.mask
    assert all(torch.equal(x, y) for x, y in zip(weights.values, third.values, strict=True))


def test_weights_identify_a_run(bert, space, tmp_path):
    plain = find(*bert, TopK(space, .3, init=0.0), Cloze(FACTS), monitor=Fuse(10**9), **SHORT)
    assert "along" not in plain.config and together(bert, space, tmp_path)[0].id != plain.id
    with pytest.raises(OtherRun, match="along"): together(bert, space, tmp_path, which=["encoder.layer.3.*"])


def test_what_the_full_model_says_does_not_move(bert, space):
    "Objectives that compare with the full model compare with the model as it is, not with the weights that train."
    _, weights, _ = together(bert, space, goal=Cloze(FACTS) + Maintain(TEXTS) + Hidden(TEXTS))
    model = bert[0]
    with preserved(model):
        before = model.base_model.get_parameter(weights.names[0]).clone()
        put_into(model, weights)
        assert not torch.equal(model.base_model.get_parameter(weights.names[0]), before)


def test_a_search_begins_with_the_weights_of_the_model(bert, space):
    weights = Weights(bert[0], ["encoder.layer.3.*"], lr=1e-3)
    settings = SHORT | dict(steps=2)
    masks = [find(*bert, TopK(space, .3, init=0.0), Cloze(FACTS), along=weights, **settings).mask for _ in range(2)]
    assert masks[0] == masks[1]


@pytest.mark.parametrize("which,lr,error,message", [
    ("encoder.layer.9.*", 1e-3, UnknownName, "unknown weight"),
    ("all", 0.0, SubnetError, "lr must be a positive number"),
])
def test_weights_that_cannot_be(bert, which, lr, error, message):
    with pytest.raises(error, match=message): Weights(bert[0], which, lr=lr)


def test_only_the_plain_way_trains_weights(bert, space):
    along = Weights(bert[0], lr=1e-3)
    with pytest.raises(SubnetError, match="train along by autograd"):
        find(*bert, Threshold(space), Cloze(FACTS), along=along, engine="all", **SHORT)
    with pytest.raises(SubnetError, match="one batch a step"):
        find_all(*bert, [Threshold(space)], [Cloze(FACTS)], along=along, **SHORT)


# ── the model is borrowed ────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("part", ["model", "body", "layer", "head"])
def test_an_objective_that_trains_the_model_is_refused(bert, space, part):
    model = bert[0]
    parts = {"model": model, "body": model.bert, "layer": model.bert.encoder.layer[0].output, "head": model.cls}
    class Tuned(Cloze):
        def modules(self): return [parts[part]]
    for goal in (Tuned(FACTS), Cloze(FACTS) + .5 * Tuned(FACTS)):
        with pytest.raises(BorrowedWeights, match=r"only borrowed.*along=Weights\(model"):
            find(*bert, Threshold(space), goal, **SHORT)


def test_a_head_of_its_own_is_no_part_of_the_model(bert, space):
    assert find(*bert, Threshold(space), MLM(TEXTS, head=LanguageHead(bert[0])), **SHORT | dict(steps=1)).done


# ── one loop ─────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("verb", ["find", "fit"])
def test_progress_is_handed_through(bert, space, verb, monkeypatch):
    "What shows it may be anything that `progress_bar` knows; the loop moves it on and says loss and score."
    shown, said, moved = object(), [], []

    class Bar:
        def __enter__(self): return self
        def __exit__(self, *why): return None
        def update(self, n): moved.append(n)
        def set_postfix(self, **values): said.append(values)

    def bar(what, total, done=0, *, show):
        assert show is shown
        return Bar()

    monkeypatch.setattr("subnet_explorer.search.loop.progress_bar", bar)
    settings = dict(steps=4, every=2, batch=8, monitor=Fuse(10**9), progress=shown)
    if verb == "find": find(*bert, Threshold(space), Cloze(FACTS), **settings)
    else:
        with preserved(bert[0]): fit(*bert, Cloze(FACTS), **settings)
    assert moved == [1] * 4 and len(said) == 2
    assert all({"loss", "score"} <= set(values) for values in said)


def test_fine_tuning_compares_with_the_model_as_it_was_given(bert):
    "Nothing differs at the first step, also after another training; later the distance is from the start."
    model, tok = bert
    with preserved(model): first = fit(model, tok, Hidden(TEXTS), steps=1, every=1)
    assert abs(first.loss[0]) < 1e-5
    with preserved(model):
        log = fit(model, tok, Cloze(FACTS) + 0 * Hidden(TEXTS), steps=12, every=1, lr=1e-3)
        end = fit(model, tok, Hidden(TEXTS), steps=1, every=1)
        assert log.loss.iloc[-1] < log.loss[0] and abs(end.loss[0]) < 1e-5
    with preserved(model): held = fit(model, tok, Cloze(FACTS) + 100 * Hidden(TEXTS), steps=12, every=1, lr=1e-3)
    assert (held.loss[1:] > log.loss[1:]).all()      # moving away costs something


def test_a_diverged_fine_tuning_keeps_its_state(bert, tmp_path):
    model, tok = bert
    class Broken(Cloze):
        def prepare(self, context):
            loss = super().prepare(context)
            return lambda step: loss(step) * (float("nan") if step == 3 else 1)
    from subnet_explorer.search.loop import Diverged
    settings = dict(steps=6, every=1, to=tmp_path, checkpoint=1e9)
    with preserved(model), pytest.raises(Diverged, match=r"the loss became nan at step 4.*is kept in"):
        fit(model, tok, Broken(FACTS), **settings)
    assert (tmp_path / "state.safetensors").exists()
    with preserved(model): resumed = fit(model, tok, Cloze(FACTS), **settings)
    with preserved(model): straight = fit(model, tok, Cloze(FACTS), steps=6, every=1)
    assert resumed.equals(straight)
