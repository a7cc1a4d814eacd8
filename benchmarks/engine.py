"The engine's variants: workload -> name -> function `(workload) -> step`, as in baselines.py."
from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from baselines import Step, Variant
from torch.nn import functional as F
from transformers import PreTrainedModel
from workloads import Batch, Critical, Workload

from subnet_explorer.core.mask import Mask
from subnet_explorer.core.space import Space
from subnet_explorer.data.facts import Fact, Facts
from subnet_explorer.data.texts import Blocks
from subnet_explorer.model.apply import masked
from subnet_explorer.model.compact import compact
from subnet_explorer.model.sequences import Sequences
from subnet_explorer.search.distil import Maintain, Suppress
from subnet_explorer.search.engine import MaskOptimizer
from subnet_explorer.search.find import find, open_search, start, team_of
from subnet_explorer.search.gates import Concrete, HardConcrete, Threshold
from subnet_explorer.search.loop import lr_at, one_step
from subnet_explorer.search.objectives import Density
from subnet_explorer.search.score import example_gradients


def rates(w: Workload, steps: int | None = None) -> list[float]:
    "The learning rates of the workload's schedule."
    steps = steps or w.steps
    return [w.lr * lr_at(t, steps, "linear", w.warmup) for t in range(steps)]


Read = tuple[np.ndarray, list[int], list[int], torch.Tensor]      # sequences of a batch, rows, places in them, targets


def lengths(batch: Batch) -> list[int]:
    "Tokens of each row of a batch, without padding."
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum(1).tolist()


def unpadded(ids: torch.Tensor, real: list[int]) -> list[list[int]]:
    return [x[:n].tolist() for x, n in zip(ids, real, strict=True)]


def sequences(w: Workload, model: PreTrainedModel, first: int) -> tuple[Sequences, list[Read]]:
    "The tokens of all batches, and for each batch what is read of it."
    ids: list[list[int]] = []
    reads: list[Read] = []
    for b in w.batches:
        real = lengths(b)
        rows, places = torch.nonzero(b["labels"] != -100, as_tuple=True)
        here = np.arange(len(ids), len(ids) + len(real))
        reads.append((here, rows.tolist(), places.tolist(), b["labels"][rows, places]))
        ids += unpadded(b["input_ids"], real)
    return Sequences(model, ids, first), reads


def _stepping(
    opt: MaskOptimizer,
    batches: list[Any],
    loss: Callable[[Any], torch.Tensor],
    extra: torch.optim.Optimizer | None = None,         # of weights that train along
) -> Step:
    "One optimizer step on the next batch."
    it, bf16 = cycle(batches), opt.scratch.dtype == torch.bfloat16

    def step() -> torch.Tensor:
        with opt.applied():
            with torch.autocast(opt.anchor.device.type, torch.bfloat16, enabled=bf16): value = loss(next(it))
            opt.backward(value)
        opt.step()
        if extra:
            extra.step()
            extra.zero_grad(set_to_none=True)
        return value.detach()

    return step


def cloze(scores: str = "all", dtype: torch.dtype = torch.float32, plain: bool = False) -> Variant:
    "Answers at the masked position; frozen blocks computed once."

    def variant(w: Workload) -> Step:
        model = w.copy()
        seqs, reads = sequences(w, model, min(w.layers))
        gate = Threshold(w.space(model), seed=w.seed)
        opt = MaskOptimizer(model, gate, rates(w), scores=scores, dtype=dtype, fast=not plain)
        return _stepping(opt, reads, lambda r: F.cross_entropy(seqs.read(r[0], r[1], r[2]).float(), r[3]))

    return variant


def text(dtype: torch.dtype = torch.float32) -> Variant:
    "Masked tokens and the distance of every layer's states from the full model's, in one forward pass."

    def variant(w: Workload) -> Step:
        model = w.copy()
        seqs, reads = sequences(w, model, 0)
        goals: list[list[torch.Tensor]] = []
        for index, *_ in reads:
            goals.append([])
            with torch.no_grad(): seqs.hidden(index, [0], [0], every=goals[-1])
        gate = Threshold(w.space(model), init="uniform", seed=w.seed)
        opt = MaskOptimizer(model, gate, rates(w), dtype=dtype, fast=True)

        def loss(k: int) -> torch.Tensor:
            index, rows, places, gold = reads[k]
            every: list[torch.Tensor] = []
            states = seqs.hidden(index, rows, places, every=every)
            pairs = zip(every, goals[k], strict=True)
            far = torch.stack([1 - F.cosine_similarity(h.float(), g, dim=-1) for h, g in pairs]).mean()
            return F.cross_entropy(seqs.predict(states).float(), gold) + far

        return _stepping(opt, list(range(len(reads))), loss)

    return variant


def probe(w: Workload) -> Step:
    "A tagger on the packed tokens, trained along with hard-concrete gates and their expected density."
    model = w.copy(train=w.head)
    columns: dict[str, Any] = {"kind": "weight"}
    if w.granularity == "neuron": columns = {"kind": "block", "block": (10**6, 1)}
    space = Space.of(model, layers=[i + 1 for i in w.layers], **columns)
    settings = {k: w.settings[k] for k in ("value", "beta", "gamma", "zeta")}
    seqs, reads = sequences(w, model, min(w.layers))
    opt = MaskOptimizer(model, HardConcrete(space, **settings, seed=w.seed), rates(w), fast=True)
    head = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=w.lr)

    def loss(r: Read) -> torch.Tensor:
        logits = seqs.read(r[0], r[1], r[2], head=model.classifier)
        return F.cross_entropy(logits, r[3]) + w.penalty * opt.penalty()

    return _stepping(opt, reads, loss, head)


def importance(w: Workload, gates: bool = True) -> Step:
    """Gates of their own for every example; no weight gradient; the last block only where the classifier reads.

    Without gates: the forward pass of the same code.
    """
    model = w.copy()
    space = w.space(model)
    ids = [x for b in w.batches for x in unpadded(b["input_ids"], lengths(b))]
    types = None
    if "token_type_ids" in w.batches[0]:
        types = [x for b in w.batches for x in unpadded(b["token_type_ids"], lengths(b))]
    seqs, starts = Sequences(model, ids, types=types), np.cumsum([0, *(len(b["labels"]) for b in w.batches)])
    pairs = zip(starts, w.batches, strict=False)                             # one start more: the end
    batches = cycle([(np.arange(s, s + len(b["labels"])), b["labels"]) for s, b in pairs])

    def loss() -> torch.Tensor:
        index, gold = next(batches)
        return F.cross_entropy(seqs.read(index, range(len(index)), [0] * len(index)), gold)

    def gradients() -> torch.Tensor:
        total = torch.zeros(())
        for g in example_gradients(model, space, loss).values(): total = total.to(g.device) + g.abs().sum()
        return total

    return gradients if gates else torch.no_grad()(loss)


def forward_only(w: Workload) -> Step:
    "The forward pass of `importance`."
    return importance(w, gates=False)


class Numbers:
    "A tokenizer of texts that are token ids already."
    bos_token_id = eos_token_id = unk_token_id = mask_token = None
    model_max_length = 1024

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[int(i) for i in text.split()])


def facts(parts: list[Batch]) -> Facts:
    "Sequences of token ids as facts: the last token is the object."
    told = [ids for p in parts for ids in unpadded(p["input_ids"], lengths(p))]
    return Facts(tuple(_fact(k, ids) for k, ids in enumerate(told)))


def _fact(k: int, ids: list[int]) -> Fact:
    return Fact("any", str(k), str(ids[-1]), " ".join(map(str, ids[:-1])) + " [MASK]", str(k))


def critical(noise: str = "shared", precision: str = "float32") -> Variant:
    "A search as `find` makes it: the library's own objectives, step by step."

    def variant(w: Critical) -> Step:
        model, tok = w.copy(), Numbers()
        text = Blocks(np.concatenate([b["text"]["input_ids"].cpu().numpy() for b in w.batches]), 0)
        target, control = facts([w.batches[0]["target"]]), facts([b["control"] for b in w.batches])
        at_once = {k: len(p["input_ids"]) for k, p in w.batches[0].items()}
        forget = 1.5 * Suppress(target, at_once["target"])
        keep = Maintain(control, at_once["control"]), Maintain(text, at_once["text"])
        goal = forget + keep[0] + keep[1] + w.penalty * Density()
        gate = Concrete(w.space(model), 0.45, temperature=1.0, straight_through=True, seed=w.seed)
        own = dict(steps=w.steps, lr=w.lr, schedule="constant", complement=True, noise=noise, precision=precision,
                   every=w.steps, progress=False)
        settings = {**(find.__kwdefaults__ or {}), **own}
        team = team_of(model, settings)
        run = open_search(team, None, model, gate, goal, settings)
        search = start(run, team, model, tok, gate, goal, settings)
        return lambda: torch.tensor(one_step(search.loop))

    return variant


def parameters(model: PreTrainedModel) -> int: return sum(p.numel() for p in model.parameters())


def logits_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    with torch.no_grad(): return model(**batch).logits


def halved(removed: bool) -> Variant:
    "A forward pass without half the heads and half the neurons of every layer: masked, or removed."

    def build(w: Workload) -> Step:
        model, batches, inside = w.copy(), cycle(w.batches), ExitStack()
        mask = Mask.random(Space.of(model, "head+neuron"), 0.5, seed=w.seed)
        inside.enter_context(masked(model, mask, check=False))
        if removed:
            wanted = logits_of(model, w.batches[0])
            inside.close()
            model = compact(model, mask).model
            far = float((logits_of(model, w.batches[0]) - wanted).abs().max())
            sizes = f"{parameters(model):,} of {parameters(w.model):,} parameters"
            print(f"compact: {sizes}, largest difference of a logit to the masked model's {far:.1g}")
            if far > 1e-5: raise ArithmeticError(f"outputs differ by {far}")

        def step(inside: ExitStack = inside) -> torch.Tensor:      # holds what keeps the mask on
            with torch.no_grad(): return w.loss(model, next(batches))

        return step

    return build


BF16 = torch.bfloat16
ENGINE: dict[str, dict[str, Variant]] = {
    "cloze": {
        "engine": cloze(),
        "engine, no compiler": cloze(plain=True),
        "engine, reachable": cloze("reachable"),
        "engine, sampled": cloze("sampled"),
        "engine, bf16": cloze(dtype=BF16),
        "engine, sampled, bf16": cloze("sampled", BF16),
    },
    "text": {"engine": text(), "engine, bf16": text(BF16)},
    "critical": {
        "engine": critical(),
        "engine, independent": critical("independent"),
        "engine, bf16": critical(precision="bfloat16"),
    },
    "probe-weights": {"engine": probe},
    "probe-neurons": {"engine": probe},
    "compact": {"masked": halved(False), "compact": halved(True)},
    "importance": {"engine": importance, "engine, forward only": forward_only},
    "importance-pocket": {"engine": importance, "engine, forward only": forward_only},
}
