"The engine's variants: workload -> name -> function `(workload) -> step`, as in baselines.py."
from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import torch
from baselines import Step, Variant
from torch import nn
from torch.nn import functional as F
from workloads import Workload

from subnet_explorer.engine import MaskOptimizer
from subnet_explorer.gates import HardConcrete, Threshold
from subnet_explorer.objectives import Sequences
from subnet_explorer.score import example_gradients
from subnet_explorer.search import lr_at
from subnet_explorer.space import Space


def rates(w: Workload, steps: int | None = None) -> list[float]:
    "The learning rates of the workload's schedule."
    steps = steps or w.steps
    return [w.lr * lr_at(t, steps, "linear", w.warmup) for t in range(steps)]


def sequences(w: Workload, model: nn.Module, first: int) -> tuple[Sequences, list[tuple[np.ndarray, list[int], list[int], torch.Tensor]]]:
    "The tokens of all batches, and for each batch: its sequences, the rows that are read, and the targets."
    ids, reads = [], []
    for b in w.batches:
        real = b.get("attention_mask", torch.ones_like(b["input_ids"])).sum(1).tolist()
        rows, places = torch.nonzero(b["labels"] != -100, as_tuple=True)
        reads.append((np.arange(len(ids), len(ids) + len(real)), rows.tolist(), places.tolist(), b["labels"][rows, places]))
        ids += [x[:n].tolist() for x, n in zip(b["input_ids"], real)]
    return Sequences(model, ids, first), reads


def _stepping(opt: MaskOptimizer, batches: list[Any], loss: Callable[[Any], torch.Tensor], extra: torch.optim.Optimizer | None = None) -> Step:
    "One optimizer step on the next batch."
    it, bf16 = cycle(batches), opt.scratch.dtype == torch.bfloat16
    def step() -> torch.Tensor:
        with opt.applied():
            with torch.autocast(opt.anchor.device.type, torch.bfloat16, enabled=bf16): value = loss(next(it))
            opt.backward(value)
        opt.step()
        if extra: extra.step(); extra.zero_grad(set_to_none=True)
        return value.detach()
    return step


def cloze(scores: str = "all", dtype: torch.dtype = torch.float32, plain: bool = False) -> Variant:
    "Answers at the masked position; frozen blocks computed once."
    def variant(w: Workload) -> Step:
        model = w.copy()
        seqs, reads = sequences(w, model, min(w.layers))
        opt = MaskOptimizer(model, Threshold(w.space(model), seed=w.seed), rates(w), scores=scores, dtype=dtype, fast=not plain)
        return _stepping(opt, reads, lambda r: F.cross_entropy(seqs.read(r[0], r[1], r[2]).float(), r[3]))
    return variant


def text(dtype: torch.dtype = torch.float32, teacher: str = "cached") -> Variant:
    "Masked tokens and the distance of every layer's states from the full model's, in one forward pass."
    def variant(w: Workload) -> Step:
        model = w.copy()
        seqs, reads = sequences(w, model, 0)
        goals: list[list[torch.Tensor]] = []
        for index, *_ in reads:
            goals.append([])
            with torch.no_grad(): seqs.hidden(index, [0], [0], every=goals[-1])
        opt = MaskOptimizer(model, Threshold(w.space(model), init="uniform", seed=w.seed), rates(w), dtype=dtype, fast=True)
        def loss(k: int) -> torch.Tensor:
            (index, rows, places, gold), every = reads[k], []
            states = seqs.hidden(index, rows, places, every=every)
            far = torch.stack([1 - F.cosine_similarity(h.float(), g, dim=-1) for h, g in zip(every, goals[k])]).mean()
            return F.cross_entropy(seqs.predict(states).float(), gold) + far
        return _stepping(opt, list(range(len(reads))), loss)
    return variant


def probe(w: Workload) -> Step:
    "A tagger on the packed tokens, trained along with hard-concrete gates and their expected density."
    model = w.copy(train=w.head)
    columns = dict(kind="block", block=(10**6, 1)) if w.granularity == "neuron" else dict(kind="weight")
    space = Space.of(model, layers=[i + 1 for i in w.layers], **columns)
    settings = {k: w.settings[k] for k in ("value", "beta", "gamma", "zeta")}
    seqs, reads = sequences(w, model, min(w.layers))
    opt = MaskOptimizer(model, HardConcrete(space, **settings, seed=w.seed), rates(w), fast=True)
    head = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=w.lr)
    return _stepping(opt, reads, lambda r: F.cross_entropy(seqs.read(r[0], r[1], r[2], head=model.classifier), r[3]) + w.penalty * opt.penalty(), head)


def importance(w: Workload, gates: bool = True) -> Step:
    "Gates of their own for every example; no weight gradient; the last block only where the classifier reads. Without gates: the forward pass of the same code."
    model = w.copy()
    space = w.space(model)
    part = lambda key, b: [x[:n].tolist() for x, n in zip(b[key], b.get("attention_mask", torch.ones_like(b["input_ids"])).sum(1).tolist())]
    types = [t for b in w.batches for t in part("token_type_ids", b)] if "token_type_ids" in w.batches[0] else None
    seqs, starts = Sequences(model, [x for b in w.batches for x in part("input_ids", b)], types=types), np.cumsum([0] + [len(b["labels"]) for b in w.batches])
    batches = cycle([(np.arange(s, s + len(b["labels"])), b["labels"]) for s, b in zip(starts, w.batches)])
    def loss() -> torch.Tensor:
        index, gold = next(batches)
        return F.cross_entropy(seqs.read(index, range(len(index)), [0] * len(index)), gold)
    return (lambda: sum(g.abs().sum() for g in example_gradients(model, space, loss).values())) if gates else torch.no_grad()(loss)


BF16 = torch.bfloat16
ENGINE: dict[str, dict[str, Variant]] = {
    "cloze": {"engine": cloze(), "engine, no compiler": cloze(plain=True), "engine, reachable": cloze("reachable"), "engine, sampled": cloze("sampled"),
              "engine, bf16": cloze(dtype=BF16), "engine, sampled, bf16": cloze("sampled", BF16)},
    "text": {"engine": text(), "engine, bf16": text(BF16)},
    "probe-weights": {"engine": probe},
    "probe-neurons": {"engine": probe},
    **dict.fromkeys(("importance", "importance-pocket"), {"engine": importance, "engine, forward only": lambda w: importance(w, gates=False)}),
}
