"Training masks: killed and continued, diverged, refused, fast paths equal to plain ones, and nothing left behind."
from __future__ import annotations

import copy
import gc
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from subnet_explorer.core.errors import SpaceMismatch, SubnetError
from subnet_explorer.core.layout import FAMILIES
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.run import OtherRun, Run
from subnet_explorer.core.scores import Scores
from subnet_explorer.core.space import Space
from subnet_explorer.core.store import Store
from subnet_explorer.data.facts import answerable, read_facts
from subnet_explorer.model.apply import masked
from subnet_explorer.model.load import load, tiny
from subnet_explorer.model.sequences import Sequences
from subnet_explorer.search.distil import MLM
from subnet_explorer.search.find import find
from subnet_explorer.search.gates import Concrete, HardConcrete, Threshold, TopK
from subnet_explorer.search.loop import Diverged
from subnet_explorer.search.objectives import Cloze, Context, Density, Objective, Task, batch_at

STEPS = 30
RNG = np.random.default_rng(0)
IDS = [RNG.integers(5, 40, n).tolist() for n in RNG.integers(4, 10, 24)]      # token sequences of different lengths
ROWS = [int(RNG.integers(0, len(i))) for i in IDS]                            # where each is asked
GOLD = [int(g) for g in RNG.integers(5, 40, len(IDS))]                        # and what


class Tokens(Objective):
    "Predict GOLD at ROWS of IDS: an objective that needs no tokenizer."
    def prepare(self, context: Context):
        seqs, gold = Sequences(context.model, IDS, context.first), torch.tensor(GOLD)
        def loss(step):
            index = batch_at(step, seqs.lengths, 8, context.seed)
            return F.cross_entropy(seqs.read(index, range(len(index)), np.array(ROWS)[index]), gold[index])
        return loss


class Until(Objective):
    "Another objective that is cut short: at `step`, `act` is called. It looks the same in the record."
    def __init__(self, goal, step, act): self.goal, self.step, self.act = goal, step, act
    def identity(self): return self.goal.identity()
    def modules(self): return self.goal.modules()
    def prepare(self, context):
        loss = self.goal.prepare(context)
        return lambda step: self.act(step) if step == self.step and self.act else loss(step)


class Stop(Exception): pass

def stop(step): raise Stop


class Parity(nn.Module):
    "A little head: is the token at some rows even?"
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(16, 2)
    def forward(self, h): return self.linear(h)
    def encode(self, tok, example): return example, list(range(len(example))), [i % 2 for i in example]


GATES = {
    "threshold": lambda space: Threshold(space, seed=1),
    "topk": lambda space: TopK(space, .4, seed=1),
    "topk-every-7": lambda space: TopK(space, .4, every=7, seed=1),
    "concrete": lambda space: Concrete(space, seed=1),
    "concrete-hard": lambda space: Concrete(space, straight_through=True, seed=1),
    "hard-concrete": lambda space: HardConcrete(space, seed=1),
}


@pytest.fixture(scope="module")
def model(): return tiny("bert")

@pytest.fixture(scope="module")
def space(model): return Space.of(model, "weight", layers=2)


def search(model, space, to=None, goal=None, gate="threshold", **kw):
    gate = GATES[gate](space) if isinstance(gate, str) else gate
    usual = dict(steps=STEPS, lr=.05, every=4, checkpoint=0, progress=False, to=to)
    return find(model, None, gate, goal or Tokens(), **{**usual, **kw})


def assert_same(a: Run, b: Run):
    assert a.done and b.done and a.mask.id == b.mask.id
    assert a.metrics.to_dict("list") == b.metrics.to_dict("list")
    assert (a.soft is None) == (b.soft is None)


# ── killed and continued ─────────────────────────────────────────────────────────────────────────────────────────────

CHILD = """
import signal, sys, time
sys.path.insert(0, sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)      # a shell in the background ignores it
import test_search as t
model = t.tiny("bert")
space = t.Space.of(model, "weight", layers=2)
t.search(model, space, sys.argv[2], t.Until(t.Tokens(), 23, lambda step: time.sleep(600)), "concrete-hard")
"""

@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_killed_and_continued(tmp_path, model, space, sign):
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(folder)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **threads})
    log = folder / "metrics.jsonl"
    while child.poll() is None and not (log.exists() and log.read_text().count("\n") >= 5): time.sleep(.02)
    assert child.poll() is None, child.stderr.read()
    child.send_signal(sign)
    said = child.communicate(timeout=120)[1]
    assert child.returncode != 0 and (sign == signal.SIGKILL or "KeyboardInterrupt" in said)
    stopped = Run.open(folder)
    assert not stopped.done and len(stopped.metrics) == 5
    assert not [p for p in folder.iterdir() if p.name.startswith(".") and sign == signal.SIGINT]
    resumed = search(model, space, folder, gate="concrete-hard")
    assert resumed.id == stopped.id and resumed.metrics.step.tolist() == [4, 8, 12, 16, 20, 24, 28, 30]
    straight = search(model, space, tmp_path / "straight", gate="concrete-hard")
    assert_same(resumed, straight)
    assert_same(Run.open(folder), straight)
    assert not (folder / "state.safetensors").exists()


VARIANT = dict(optimizer="adamw", clip=.5, schedule="cosine", complement=True)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kw", [dict(), VARIANT], ids=["plain", "variant"])
def test_every_gate_continues_exactly(tmp_path, model, space, gate, kw):
    def goal(): return Tokens() + .1 * Density()
    straight = search(model, space, goal=goal(), gate=gate, **kw)
    for at in (3, 9, 21):                                              # before the first state; and twice in between
        with pytest.raises(Stop): search(model, space, tmp_path, Until(goal(), at, stop), gate, **kw)
    resumed = search(model, space, tmp_path, goal(), gate, **kw)
    assert_same(resumed, straight)
    if straight.soft is not None:
        assert all(np.allclose(resumed.soft[n], v, atol=1e-3) for n, v in straight.soft.values.items())


def test_heads_and_the_best_logits_continue_too(tmp_path, model, space):
    class Watch:                                                       # best in the middle
        def identity(self): return {}
        def prepare(self, context): return lambda: -abs(context.gate.harden().density - .5)
    def run(to, act=None, head=None):
        goal = Until(Task(IDS, head or Parity()) + Tokens(), 22, act)
        return search(model, space, to, goal, monitor=Watch())
    head, other = Parity(), Parity()
    straight = run(None, head=head)
    with pytest.raises(Stop): run(tmp_path, stop)
    assert_same(run(tmp_path, head=other), straight)
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), other.parameters(), strict=True))
    best = straight.metrics.loc[straight.metrics.score.idxmax()]
    assert straight.mask.density == pytest.approx(best.density)


def test_a_run_without_a_state_starts_over(tmp_path, model, space):
    with pytest.raises(Stop): search(model, space, tmp_path, Until(Tokens(), 21, stop), checkpoint=1e9)
    assert len(Run.open(tmp_path).metrics) == 5
    assert_same(search(model, space, tmp_path), search(model, space))


def test_the_same_gate_object_can_go_on(tmp_path, model, space):
    "What happens in a notebook: Ctrl-C before the first state was saved, and the cell is run again."
    gate = GATES["concrete-hard"](space)
    with pytest.raises(Stop): search(model, space, tmp_path, Until(Tokens(), 21, stop), gate, checkpoint=1e9)
    assert_same(search(model, space, tmp_path, gate=gate), search(model, space, gate="concrete-hard"))


def test_a_finished_run_is_returned_at_once(tmp_path, model, space):
    done = search(model, space, tmp_path)
    again = search(model, space, tmp_path, Until(Tokens(), 0, stop))
    assert_same(again, done)
    store = Store(tmp_path / "store")
    runs = [search(model, space, store, labels={"seed": s}, seed=s) for s in (0, 1, 0)]
    assert runs[0].id == runs[2].id != runs[1].id and len(store.masks()) == 2 and store.masks(seed=1)[0] == runs[1].mask


def test_other_runs_are_not_touched(tmp_path, model, space):
    with pytest.raises(Stop): search(model, space, tmp_path, Until(Tokens(), 21, stop))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for kw in (dict(lr=.06), dict(seed=1), dict(gate="topk"), dict(goal=Tokens() + Density()), dict(complement=True)):
        with pytest.raises(OtherRun, match="they differ in"): search(model, space, tmp_path, **kw)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(OtherRun, match="holds no run"): search(model, space, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_scores_to_start_from_are_part_of_the_identity(tmp_path, model, space):
    rng = np.random.default_rng(0)
    start = [Scores(space, {g.name: rng.normal(size=g.shape) for g in space.groups}) for _ in range(2)]
    search(model, space, tmp_path, gate=Threshold(space, init=start[0]))
    with pytest.raises(OtherRun): search(model, space, tmp_path, gate=Threshold(space, init=start[1]))


def test_a_schedule_is_identified_by_what_it_does():
    "A record with a memory address in it can be matched by no other process: refuse such schedules, or name them."
    try: text = json.dumps(((lambda p: 2 * p) * Density()).identity())
    except SubnetError: return
    assert " at 0x" not in text


# ── divergence ───────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("checkpoint", [0, 1e9], ids=["often", "seldom"])
def test_the_last_good_state_outlives_divergence(tmp_path, model, space, value, checkpoint):
    broken = Until(Tokens(), 21, lambda step: torch.tensor(value, requires_grad=True))
    with pytest.raises(Diverged, match=f"at step 22.*{tmp_path}"):
        search(model, space, tmp_path, broken, checkpoint=checkpoint)
    assert (tmp_path / "state.safetensors").exists() and not Run.open(tmp_path).done
    assert np.isfinite(Run.open(tmp_path).metrics.loss).all()
    resumed = search(model, space, tmp_path, Until(Tokens(), 0, stop))      # from the state, not from the start
    assert_same(resumed, search(model, space))


# ── the fast path is the plain path ──────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", [0, 1])
def test_losses_are_those_of_the_plain_forward_pass(family, first):
    model = tiny(family)
    mask = Mask.random(Space.of(model, "weight", layers=2), .5, seed=1)
    ready = Tokens().prepare(Context(model, None, 10, 8, seed=0, first=first))
    lengths = np.array([len(i) for i in IDS])
    with torch.no_grad(), masked(model, mask):
        for step in range(4):
            index = batch_at(step, lengths, 8, 0)
            one_by_one = torch.stack([model(input_ids=torch.tensor([IDS[i]])).logits[0, ROWS[i]] for i in index])
            width = lengths[index].max()
            ids = torch.tensor([IDS[i] + [0] * (width - len(IDS[i])) for i in index])
            real = torch.tensor([[1] * len(IDS[i]) + [0] * (width - len(IDS[i])) for i in index])
            padded = model(input_ids=ids, attention_mask=real).logits[range(len(index)), [ROWS[i] for i in index]]
            gold = torch.tensor(GOLD)[index]
            assert abs(ready(step) - F.cross_entropy(one_by_one, gold)) < 1e-5
            assert abs(ready(step) - F.cross_entropy(padded, gold)) < 1e-5


def straight_through(model, twin, space, logits, loss):
    "Gradients of the logits, as if the mask of the twin's weights had a slope of 1; gives the loss."
    loss.backward()
    for g, s in zip(space.groups, logits, strict=True):
        s.grad = twin.base_model.get_parameter(g.name).grad * model.base_model.get_parameter(g.name).detach()
    return loss.item()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_search_is_the_plain_search(family):
    "Five steps written out: a copy of the model whose weights are W · 1[g > 0], straight-through by hand."
    model = tiny(family)
    space = Space.of(model, "weight", layers=2)
    logits = [s.detach().clone() for s in GATES["threshold"](space).logits]
    opt, losses = torch.optim.Adam(logits, lr=.05), []
    for step in range(5):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for g, s in zip(space.groups, logits, strict=True): twin.base_model.get_parameter(g.name).mul_(s > 0)
        index = batch_at(step, np.array([len(i) for i in IDS]), 8, 0)
        said = torch.stack([twin(input_ids=torch.tensor([IDS[i]])).logits[0, ROWS[i]] for i in index])
        losses.append(straight_through(model, twin, space, logits, F.cross_entropy(said, torch.tensor(GOLD)[index])))
        opt.step()
    run = search(model, space, steps=5, every=1, schedule="constant", warmup=0)
    assert np.abs(run.metrics.loss - losses).max() < 1e-5
    for g, s in zip(space.groups, logits, strict=True):
        assert (run.mask[g.name] != (s > 0).numpy()).mean() < .002      # a logit within rounding of 0


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_search_with_dropout_is_the_plain_search_in_training_mode(family):
    "What is drawn follows from seed and step; the caller's random numbers are not touched, blocks below drop, too."
    model = tiny(family)
    space = Space.of(model, "weight", layers=[2])
    logits, losses = [s.detach().clone() for s in GATES["threshold"](space).logits], []
    opt, width, seed = torch.optim.Adam(logits, lr=.05), np.array([len(i) for i in IDS]), 3
    for step in range(4):
        twin = copy.deepcopy(model).train()
        with torch.no_grad():
            for g, s in zip(space.groups, logits, strict=True): twin.base_model.get_parameter(g.name).mul_(s > 0)
        index = batch_at(step, width, 8, seed)
        ids = torch.tensor([IDS[i] + [0] * (max(width[index]) - len(IDS[i])) for i in index])
        real = torch.tensor([[1] * len(IDS[i]) + [0] * (max(width[index]) - len(IDS[i])) for i in index])
        torch.manual_seed(seed * 1_000_003 + step)
        said = twin(input_ids=ids, attention_mask=real).logits[range(len(index)), [ROWS[i] for i in index]]
        losses.append(straight_through(model, twin, space, logits, F.cross_entropy(said, torch.tensor(GOLD)[index])))
        opt.step()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run = search(model, space, steps=4, every=1, schedule="constant", warmup=0, seed=seed, dropout=True)
    assert np.abs(run.metrics.loss - losses).max() < 1e-5 and torch.equal(torch.get_rng_state(), before)
    assert not model.training and run.config["dropout"] is True


def test_dropout_is_another_search_and_continues_exactly(tmp_path, model, space):
    straight, without = search(model, space, dropout=True), search(model, space)
    assert straight.id != without.id and "dropout" not in without.config
    assert (straight.metrics.loss - without.metrics.loss).abs().max() > .01
    with pytest.raises(Stop): search(model, space, tmp_path, Until(Tokens(), 21, stop), dropout=True)
    assert_same(search(model, space, tmp_path, dropout=True), straight)


def test_bfloat16_is_close(model, space):
    a, b = search(model, space), search(model, space, precision="bfloat16")
    assert np.abs(a.metrics.loss - b.metrics.loss).max() < .3 and a.id != b.id


# ── the model is borrowed ────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("end", ["done", "stopped"])
def test_the_model_comes_back(space, end):
    model = tiny("bert").train()
    model.bert.embeddings.eval()                                       # somebody froze the dropout here
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    before, params = {k: v.clone() for k, v in model.state_dict().items()}, dict(model.named_parameters())
    flags, modes = {n: p.requires_grad for n, p in params.items()}, {n: m.training for n, m in model.named_modules()}
    with suppress(Stop): search(model, space, goal=Until(Tokens(), 5, stop if end == "stopped" else None))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p is params[n] and p.requires_grad == flags[n] and p.grad is None for n, p in model.named_parameters())
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_another_model_is_refused(space):
    with pytest.raises(SpaceMismatch): search(tiny("bert", seed=1), space)


@pytest.mark.parametrize("gate", GATES)
def test_nothing_is_kept_in_memory(gate):
    model = tiny("bert")
    made = GATES[gate](Space.of(model, "weight", layers=2))
    run = search(model, made.space, gate=made)
    refs = [weakref.ref(x) for x in (model, made, run, made.logits[0], model.bert.encoder.layer[1].output.dense.weight)]
    del model, made, run
    gc.collect()
    assert [r() for r in refs] == [None] * len(refs)


# ── modes ────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("gate", GATES)
def test_complement_trains_what_is_left(model, space, gate):
    "The loss without the gate's coordinates; for a deterministic gate it is that of the inverted mask."
    run = search(model, space, gate=gate, complement=True, steps=1, every=1)
    made = GATES[gate](space)
    values = made.sample()
    with torch.no_grad(), masked(model, Scores(space, {n: 1 - v.detach().numpy() for n, v in values.items()})):
        wanted = Tokens().prepare(Context(model, None, 1, 8, 0))(0).item()
    assert run.metrics.loss[0] == pytest.approx(wanted, abs=1e-5)
    if gate in ("threshold", "topk"):
        with torch.no_grad(), masked(model, ~made.harden()):
            found = Tokens().prepare(Context(model, None, 1, 8, 0))(0).item()
        assert found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("complement", [False, True])
def test_monitors_see_the_subnetwork_that_would_be_returned(model, space, gate, complement):
    class Loss:
        def identity(self): return {}
        def prepare(self, context):
            loss = Tokens().prepare(Context(context.model, None, 1, 8, 0))
            return lambda: -float(loss(0))
    run = search(model, space, gate=gate, complement=complement, monitor=Loss(), steps=8)
    sub = run.subnetwork
    values = {g.name: 1 - sub[g.name] if complement else sub[g.name] * 1.0 for g in space.groups}
    soft = Scores(space, {n: np.asarray(v, np.float32) for n, v in values.items()})
    with torch.no_grad(), masked(model, soft): now = Loss().prepare(Context(model, None, 1, 8, 0))()
    assert run.metrics.score.max() == pytest.approx(now, abs=1e-5)


def test_heads_are_part_of_the_result(tmp_path, model, space):
    head, fresh = Parity(), Parity(seed=1)
    start = [p.detach().clone() for p in head.parameters()]
    search(model, space, tmp_path, Task(IDS, head))
    assert all(not torch.equal(a, b) for a, b in zip(start, head.parameters(), strict=True))
    search(model, space, tmp_path, Task(IDS, fresh))                   # returned at once, with its head
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), fresh.parameters(), strict=True))


def test_the_best_mask_comes_with_its_head(model, space):
    "A monitor keeps the best logits; the head that was trained along must be the one of that moment."
    head, seen = Parity(), []
    class Peak:
        def identity(self): return {}
        def prepare(self, context):
            loss = Task(IDS, head, batch=len(IDS)).prepare(Context(context.model, None, 1, 8, 0))
            def score():
                seen.append(float(loss(0)))
                return -abs(len(seen) - 3.0)                           # the third look is the best
            return score
    run = search(model, space, goal=Task(IDS, head), head_lr=.05, monitor=Peak())
    whole = Task(IDS, head, batch=len(IDS)).prepare(Context(model, None, 1, 8, 0))
    with torch.no_grad(), masked(model, run.mask): now = float(whole(0))
    assert now == pytest.approx(seen[2], abs=1e-5) != seen[-1]


@pytest.mark.parametrize("goal", [Cloze(read_facts("pocket", "MadeOf")), MLM(["a cup is made of glass ."])])
def test_a_goal_that_reads_text_asks_for_the_tokenizer(goal):
    model, _ = load("pocket-bert")
    gate = GATES["threshold"](Space.of(model, "head"))
    with pytest.raises(SubnetError, match="no tokenizer was given"): find(model, None, gate, goal, progress=False)


def test_head_lr_moves_heads_only(model, space):
    head = Parity()
    start = [p.detach().clone() for p in head.parameters()]
    still = search(model, space, goal=Task(IDS, head), head_lr=1e-30)
    assert all(torch.equal(a, b) for a, b in zip(start, head.parameters(), strict=True))
    assert still.mask != GATES["threshold"](space).harden()


def test_one_head_may_serve_two_tasks(model, space, recwarn):
    search(model, space, goal=Task(IDS[:8], head := Parity()) + Task(IDS[8:], head))
    assert not [w for w in recwarn if "duplicate" in str(w.message)]


def test_what_is_planted_is_found():
    "A subnetwork of the pocket model answers held-out facts better than a random one of its size."
    model, tok = load("pocket-bert")
    facts = answerable(read_facts("pocket", "MadeOf"), tok)
    space = Space.of(model, "weight", layers="top-half")
    run = find(model, tok, Threshold(space, seed=0), Cloze(facts), steps=60, lr=.03, progress=False)
    loss = Cloze(facts, batch=len(facts)).prepare(Context(model, tok, 1, 32, 0))
    def under(mask):
        with torch.no_grad(), masked(model, mask): return loss(0).item()
    assert under(run.mask) < under(run.mask.random_like(0)) - 1


@pytest.mark.gpu
@pytest.mark.parametrize("gate", GATES)
def test_continues_on_a_gpu(tmp_path, gate):
    model = tiny("bert").cuda()
    space = Space.of(model, "weight", layers=2)
    class OnDevice(Tokens):
        def prepare(self, context):
            seqs, gold = Sequences(context.model, IDS, context.first), torch.tensor(GOLD).cuda()
            return lambda step: F.cross_entropy(seqs.read(np.arange(8), range(8), ROWS[:8]), gold[:8])
    with pytest.raises(Stop): search(model, space, tmp_path, Until(OnDevice(), 21, stop), gate)
    assert search(model, space, tmp_path, OnDevice(), gate).mask == search(model, space, None, OnDevice(), gate).mask


# ── refused after the folder was taken ───────────────────────────────────────────────────────────────────────────────

def test_a_refused_search_gives_its_folder_back(tmp_path):
    model, tok = load("pocket-bert")
    gate, to = Threshold(Space.of(model, "weight", layers=1), seed=0), tmp_path / "run"
    def work(text: str) -> Run: return find(model, tok, gate, MLM([text]), steps=2, to=to, progress=False)
    with pytest.raises(SubnetError, match="no token to predict"): work("")
    assert not to.exists()
    assert work("a robin is a bird .").done
    with pytest.raises(OtherRun): work("a car has wheels .")      # what was found stays
    assert Run.open(to).done
