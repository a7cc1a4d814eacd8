"""Every computation with a model on a GPU, on a pretended card: nothing is made on the wrong device, and numbers are
those of the CPU. What is captured as a CUDA graph is checked for what a capture forbids, and replayed as one would be.
"""
from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pretend import MixedDevices, NotCapturable, cuda

from subnet_explorer.core.mask import Mask
from subnet_explorer.core.space import Space
from subnet_explorer.data.facts import Facts, read_facts
from subnet_explorer.data.grammar import sentences, treebank
from subnet_explorer.data.questions import read_squad
from subnet_explorer.data.sentences import read_conllu
from subnet_explorer.data.tables import read_glue
from subnet_explorer.measure.ask import Precision, cloze, predictions
from subnet_explorer.measure.attention import attention
from subnet_explorer.measure.fluency import perplexity
from subnet_explorer.measure.links import link_ranks
from subnet_explorer.measure.metrics import TaskScore, task_scores
from subnet_explorer.measure.removal import removal
from subnet_explorer.measure.vectors import vectors
from subnet_explorer.model.apply import masked
from subnet_explorer.model.compact import compact
from subnet_explorer.model.interchange import baked
from subnet_explorer.model.load import load
from subnet_explorer.search import adam
from subnet_explorer.search.distil import MLM, Hidden, Maintain, Suppress
from subnet_explorer.search.engine import MaskOptimizer
from subnet_explorer.search.find import find, find_all
from subnet_explorer.search.gates import Concrete, Gate, HardConcrete, Threshold, TopK
from subnet_explorer.search.objectives import Cloze, Density, Objective, Task
from subnet_explorer.search.prune import iterate
from subnet_explorer.search.score import attribution, importance, magnitude
from subnet_explorer.search.team import Replay, SharedPass
from subnet_explorer.search.together import Weights
from subnet_explorer.tasks.fit import fit, preserved
from subnet_explorer.tasks.heads import Tagger
from subnet_explorer.tasks.parser import Parser

FACTS = Facts(read_facts("pocket")["MadeOf"].items[:24])
OTHERS = Facts(read_facts("pocket")["IsA"].items[:24])
TEXTS = ["a robin is a kind of bird .", "a bird can fly .", "a table is made of wood ."]
SHORT: dict[str, Any] = dict(steps=4, every=2, batch=8, lr=.05, progress=False)
GATES: dict[str, Callable[[Space], Gate]] = {
    "threshold": lambda s: Threshold(s, seed=0), "topk": lambda s: TopK(s, .6, seed=0),
    "concrete": lambda s: Concrete(s, seed=0), "hard": lambda s: HardConcrete(s, seed=0),
}


def on_both(work: Callable[[Any, Any], Any], name: str = "pocket-bert") -> tuple[Any, Any]:
    "What some work gives on the CPU, and with the model on a card."
    here = work(*load(name))
    model, tok = load(name)
    with cuda() as seen: there = work(model.cuda(), tok)
    assert len(seen) > 50, "nothing was computed on the card"
    return here, there


def numbers(x: Any) -> np.ndarray:
    "The numbers in a table, a tensor or an array."
    if isinstance(x, pd.DataFrame): return x.select_dtypes("number").to_numpy(float)
    if isinstance(x, dict): return np.array([v for v in x.values() if isinstance(v, (int, float))], float)
    if isinstance(x, Mask): return np.concatenate([bits.ravel() for _, bits in x.items()]).astype(float)
    return np.asarray(x.detach().cpu() if isinstance(x, torch.Tensor) else x, float)


def same(here: Any, there: Any) -> None:
    a, b = numbers(here), numbers(there)
    assert a.shape == b.shape and np.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)


# ── searches ─────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("kind", ["weight", "head+neuron"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("engine", ["plain", "all", "reachable", "sampled", "auto"])
def test_a_search_stays_on_its_device(engine, gate, kind):
    def work(model, tok):
        space = Space.of(model, kind, layers="top-half")
        return find(model, tok, GATES[gate](space), Cloze(FACTS), engine=engine, **SHORT).mask
    same(*on_both(work))


@pytest.mark.parametrize("engine", ["all", "reachable", "sampled"])
@pytest.mark.parametrize("gate", ["threshold", "hard"])
def test_the_update_that_is_compiled_stays_on_its_device(engine, gate, monkeypatch):
    "Here it runs as it is written, as `torch.compile` reads it."
    rule = MaskOptimizer.__init__
    monkeypatch.setattr(MaskOptimizer, "__init__", lambda self, *a, **kw: rule(self, *a, **{**kw, "fast": True}))
    def work(model, tok):
        space = Space.of(model, "weight", layers="top-half")
        goal = Cloze(FACTS) + .1 * Density()
        return find(model, tok, GATES[gate](space), goal if gate == "hard" else Cloze(FACTS), engine=engine, **SHORT)
    model, tok = load("pocket-bert")
    with cuda(): there = work(model.cuda(), tok)
    monkeypatch.undo()
    here = work(*load("pocket-bert"))
    assert (here.mask ^ there.mask).count <= 1e-4 * here.mask.space.size


GOALS: dict[str, Callable[[Any], Objective]] = {
    "mlm": lambda m: MLM(TEXTS), "hidden": lambda m: Hidden(TEXTS), "suppress": lambda m: Suppress(FACTS),
    "maintain": lambda m: Suppress(FACTS) + Maintain(OTHERS) + MLM(TEXTS) + .1 * Density(),
}
MORE: dict[str, dict[str, Any]] = {
    "clip": dict(clip=.1), "accumulate": dict(accumulate=2), "complement": dict(complement=True),
    "dropout": dict(dropout=True), "bfloat16": dict(precision="bfloat16"), "recompute": dict(recompute=True),
    "independent": dict(noise="independent"), "decay": dict(optimizer="adamw"),
}


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("engine", ["plain", "auto"])
def test_every_goal_stays_on_its_device(goal, engine):
    def work(model, tok):
        gate = HardConcrete(Space.of(model, "weight", layers=4), seed=0)
        return find(model, tok, gate, GOALS[goal](model), engine=engine, **SHORT).metrics[["loss"]]
    same(*on_both(work))


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("engine", ["plain", "auto"])
def test_every_setting_stays_on_its_device(more, engine):
    def work(model, tok):
        gate = Threshold(Space.of(model, "weight", layers=4), seed=0)
        goal = Cloze(FACTS) + Cloze(OTHERS) if more == "independent" else Cloze(FACTS)
        return find(model, tok, gate, goal, engine=engine, **SHORT | MORE[more]).metrics[["loss"]]
    same(*on_both(work))


def test_weights_that_train_along_and_a_monitor_stay_on_their_device():
    def work(model, tok):
        gate = TopK(Space.of(model, "weight", layers=4), .3, init=0.0)
        more = dict(along=Weights(model, lr=1e-3), monitor=Precision(FACTS))
        return find(model, tok, gate, Cloze(FACTS), **SHORT, **more).metrics[["loss"]]
    same(*on_both(work))


def test_a_search_continues_on_its_device(tmp_path):
    model, tok = load("pocket-bert")
    gate = HardConcrete(Space.of(model, "weight", layers=4), seed=0)
    whole = find(model, tok, gate, Cloze(FACTS), **SHORT)
    class Stop(Exception): pass
    class Once:
        def __init__(self, left): self.left = left
        def identity(self): return {"monitor": "once"}
        def prepare(self, context):
            def look():
                self.left -= 1
                if self.left == 0: raise Stop
                return 0.0
            return look
    model, tok = load("pocket-bert")
    with cuda():
        model.cuda()
        def go(left):
            gate = HardConcrete(Space.of(model, "weight", layers=4), seed=0)
            how = dict(to=tmp_path / "run", checkpoint=0.0, monitor=Once(left))
            return find(model, tok, gate, Cloze(FACTS), **SHORT, **how)
        with pytest.raises(Stop): go(1)
        there = go(100)
    assert np.allclose(whole.metrics.loss, there.metrics.loss, rtol=1e-3)


@pytest.mark.parametrize("gate, engine, complement", [
    *((gate, "all", complement) for gate in GATES for complement in (False, True)),
    ("threshold", "reachable", False), ("threshold", "sampled", False),
])
def test_what_is_compiled_is_one_graph_without_breaks(gate, engine, complement, monkeypatch):
    "Whatever the backend: here the captured graph runs as it is, and finds what the plain way finds."
    graphs: list[torch.fx.GraphModule] = []
    def keep(graph, example):
        graphs.append(graph)
        return graph.forward
    compile_it, rule = torch.compile, MaskOptimizer.__init__
    def compiling(f, **how): return compile_it(f, backend=keep, **{k: v for k, v in how.items() if k != "options"})
    def train(fast):
        with monkeypatch.context() as m:
            if fast: m.setattr(MaskOptimizer, "__init__", lambda self, *a, **kw: rule(self, *a, **{**kw, "fast": True}))
            m.setattr(torch, "compile", compiling)
            m.setattr(adam, "COMPILED", {})
            torch.compiler.reset()
            model, tok = load("pocket-bert")
            search = GATES[gate](Space.of(model, "weight", layers=4))
            how: dict[str, Any] = dict(complement=complement, engine=engine if fast else "plain")
            if engine != "all": how["lr"] = .005
            goal = Cloze(FACTS) + .1 * Density() if engine == "all" else Cloze(FACTS)
            run = find(model, tok, search, goal, **SHORT | how)
            assert not fast or (adam.COMPILED and all(adam.COMPILED.values()))
            kinds = {key[0] for key in adam.COMPILED}
            if fast: assert kinds == {"all": {"pass"}, "reachable": {"few"}, "sampled": {"few", "dots"}}[engine]
        return run.mask
    plain = train(False)
    assert not graphs
    assert (plain ^ train(True)).count <= 1e-4 * plain.space.size
    calls = [n for g in graphs for n in g.graph.nodes if n.op == "call_method"]
    read = [n.args[0] for n in calls if n.target in ("item", "tolist", "nonzero", "cpu")]
    # Python's numbers, such as a gate's settings, are handed over as float64 tensors of the CPU
    numbers_of_python = [n for n in read if n.op == "placeholder" and n.meta["example_value"].dtype == torch.float64]
    assert calls and read == numbers_of_python


# ── everything else ──────────────────────────────────────────────────────────────────────────────────────────────────

def half(model: Any, kind: str = "weight") -> Mask: return Mask.random(Space.of(model, kind), .8, seed=0)


def _tagged(model, tok):
    data = [s.tagged for s in read_conllu(treebank(30))]
    head = Tagger(model, data)
    fit(model, tok, Task(data, head), steps=3, head_lr=.05, train="head", every=1, dropout=False)
    return task_scores(model, tok, head, data)


def _parsed(model, tok):
    def tree(s):
        words, upos, heads, names = ([t[k] for t in s] for k in ("form", "upos", "head", "deprel"))
        return SimpleNamespace(words=words, upos=upos, head=heads, deprel=names)
    train = [tree(s) for s in sentences(24, seed=1)]
    parser = Parser(model, train, arc=32, label=16, std=.1)
    gate, watch = HardConcrete(Space.of(model, "head"), seed=0), TaskScore(train[:8], parser)
    goal = Task(train, parser) + .1 * Density()
    return find(model, tok, gate, goal, head_lr=.01, monitor=watch, **SHORT).metrics[["loss"]]


def _answered(model, tok):
    data = read_squad("pocket").take(24)
    with preserved(model), masked(model, half(model), train=True): tuned = fit(model, tok, data, epochs=1, lr=1e-3)
    return tuned.log[["loss"]]


def _tuned(model, tok):
    data = read_glue("pocket:entails").take(48)
    with preserved(model): return fit(model, tok, data, epochs=1, batch=8, dev=data, every=2).log[["loss"]]


def _flat(scores): return np.concatenate([np.ravel(v) for v in scores.values.values()])


def _scored(model, tok):
    return _flat(importance(model, tok, Cloze(FACTS), Space.of(model, "head+mlp"), batches=2, batch=8))


def _attributed(model, tok):
    return _flat(attribution(model, tok, Cloze(FACTS), Space.of(model, "weight", layers=4), batches=2, batch=8))


def _iterated(model, tok):
    space, watch = Space.of(model, "head"), Precision(FACTS)
    return iterate(model, tok, Cloze(FACTS), watch, space, drop=.4, least=0.0, progress=False).mask


def _baked(model, tok):
    ids = torch.tensor(tok(TEXTS[0]).input_ids, device=model.device)[None]
    with torch.no_grad(): return baked(model, half(model))(input_ids=ids).logits


def _compacted(model, tok):
    ids = torch.tensor(tok(TEXTS[0]).input_ids, device=model.device)[None]
    with torch.no_grad(): return compact(model, half(model, "head+neuron")).model(input_ids=ids).logits


WORK: dict[str, Callable[[Any, Any], Any]] = {
    "cloze": lambda m, t: cloze(m, t, FACTS, {"full": None, "half": half(m)}, candidates=OTHERS),
    "predictions": lambda m, t: predictions(m, t, "a robin is a kind of [MASK] .", {"half": half(m, "head")}),
    "links": lambda m, t: link_ranks(m, t, FACTS, {"full": None}, known=FACTS),
    "perplexity": lambda m, t: perplexity(m, t, TEXTS, half(m)),
    "vectors": lambda m, t: vectors(m, t, FACTS, {"half": half(m)}).array,
    "attention": lambda m, t: attention(m, t, TEXTS[0], half(m, "head"), normed="correct")[0],
    "removal": lambda m, t: removal(m, t, {"full": None, "half": half(m)}, {"facts": FACTS, "texts": TEXTS}),
    "magnitude": lambda m, t: magnitude(m, Space.of(m, "weight")).top(density=.3),
    "importance": _scored, "attribution": _attributed, "iterate": _iterated, "compact": _compacted, "baked": _baked,
    "tagger": _tagged, "parser": _parsed, "spans": _answered, "fit": _tuned,
}


@pytest.mark.parametrize("name", WORK)
def test_everything_else_stays_on_its_device(name): same(*on_both(WORK[name]))


@pytest.mark.parametrize("name", ["perplexity", "links", "vectors", "attention", "compact", "importance"])
def test_causal_models_stay_on_their_device(name): same(*on_both(WORK[name], "pocket-gpt2"))


# ── captured steps ───────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("gate", ["threshold", "concrete"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_captured_steps_hold_nothing_that_a_graph_forbids_and_replay_what_they_would_compute(
    gate, precision, monkeypatch,
):  # fmt: skip
    "Replays do the same operations on the same memory: what Python decided while they were captured is all they know."
    seen: list[SharedPass] = []
    first, rule = SharedPass.__init__, MaskOptimizer.__init__
    def spy(self, *args):
        first(self, *args)
        seen.append(self)
    monkeypatch.setattr(SharedPass, "__init__", spy)
    monkeypatch.setattr(MaskOptimizer, "__init__", lambda self, *a, **kw: rule(self, *a, **{**kw, "fast": True}))
    how: dict[str, Any] = dict(steps=12, lr=.01, every=4, batch=8, progress=False, precision=precision)
    goals = [Cloze(FACTS), Cloze(OTHERS)]
    def work(model, tok):
        space = Space.of(model, "weight", layers=4)
        return find_all(model, tok, [GATES[gate](space) for _ in goals], goals, engine="all", **how)
    model, tok = load("pocket-bert")
    with cuda(): captured = work(model.cuda(), tok)
    graphs = [g for p in seen for g, _, _ in p.replay.graphs.values()]
    assert graphs and all(len(g.ops) > 100 for g in graphs)
    monkeypatch.setattr(Replay, "__call__", lambda self, *tensors: self.f(*tensors))
    model, tok = load("pocket-bert")
    with cuda(): plain = work(model.cuda(), tok)
    for a, b in zip(captured, plain, strict=True):
        assert np.allclose(a.metrics.loss, b.metrics.loss, rtol=1e-5)
        assert (a.mask ^ b.mask).count <= 1e-5 * a.mask.space.size


def _waited(x: torch.Tensor) -> torch.Tensor:
    torch.cuda.synchronize()
    return x


FORBIDDEN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "item": lambda x: x * x.sum().item(),
    "list": lambda x: x * x.tolist()[0],
    "cpu": lambda x: x.cpu().cuda(),
    "nonzero": lambda x: x[x.nonzero().squeeze(1)],
    "mask": lambda x: x[x > 0],
    "if": lambda x: x if x.sum() > 0 else -x,
    "new numbers": lambda x: x + torch.tensor([1.0, 2.0], device="cuda"),
    "numbers of the CPU": lambda x: x[torch.tensor([1, 0])],
    "waiting": _waited,
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_the_check_of_captures_finds_what_is_forbidden(name):
    with cuda():
        call = Replay(FORBIDDEN[name], warm=1)
        x = torch.ones(2, device="cuda")
        call(x)
        with pytest.raises(NotCapturable): call(x)


def test_a_replay_knows_nothing_of_python():
    "What this library must not do is seen: a number that Python changes between calls stays as it was captured."
    with cuda():
        told = [1.0]
        call = Replay(lambda x: x * told[0], warm=1)
        x = torch.ones(2, device="cuda")
        for told[0] in (1.0, 2.0, 3.0): out = call(x)
        assert out.tolist() == [2.0, 2.0]
        assert call(2 * x).tolist() == [4.0, 4.0]


# ── the pretended card itself ────────────────────────────────────────────────────────────────────────────────────────

def test_the_pretended_card_refuses_what_a_card_refuses():
    with cuda():
        x, cpu = torch.ones(2, device="cuda"), torch.ones(2)
        for mixed in (
            lambda: x + cpu, lambda: cpu @ x, lambda: cpu.add_(x), lambda: torch.cat([x, cpu]),
            lambda: cpu[x.long()], lambda: torch.nn.functional.embedding(cpu.long(), x[:, None]),
            lambda: x.normal_(generator=torch.Generator()), lambda: torch.where(x > 0, x, cpu),
        ):
            with pytest.raises(MixedDevices): mixed()
        for away in (x.numpy, lambda: np.asarray(x)):
            with pytest.raises(TypeError): away()
        assert (x + torch.tensor(1.0)).tolist() == [2, 2] and x[torch.tensor([0])].is_cuda
        assert x.cpu().numpy().tolist() == [1, 1] and x.to("cpu").device.type == "cpu"
        torch.cuda.manual_seed(0)
        first = torch.rand(3, device="cuda").tolist()
        with torch.random.fork_rng(devices=[x.device]): torch.rand(3, device="cuda")
        second = torch.rand(3, device="cuda").tolist()
        torch.cuda.manual_seed(0)
        assert torch.rand(6, device="cuda").tolist() == first + second
    assert torch.ones(2).device.type == "cpu" and not torch.cuda.is_available()
