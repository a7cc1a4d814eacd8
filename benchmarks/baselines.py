"""What a user would write without the engine: each a function `(workload) -> step`.

`step()` makes one optimizer step on the next batch and returns the loss.
"""
from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from workloads import Batch, Critical, Text, Workload

Step = Callable[[], torch.Tensor]
Variant = Callable[[Any], Step]                             # of the kind of workload that it is for
Loss = Callable[[PreTrainedModel, Any], torch.Tensor]       # of a model and a batch


def _training(
    w: Workload,
    model: PreTrainedModel,
    params: Iterable[nn.Parameter],
    loss: Loss | None = None,
    bf16: bool = False,
    **adam: Any,
) -> Step:
    "The usual loop: zero the gradients, loss, backward, Adam."
    opt, batches = torch.optim.Adam(list(params), lr=w.lr, **adam), itertools.cycle(w.batches)
    loss_of = loss or w.loss

    def step() -> torch.Tensor:
        opt.zero_grad()
        with torch.autocast(w.model.device.type, torch.bfloat16, enabled=bf16): value = loss_of(model, next(batches))
        value.backward()
        opt.step()
        return value.detach()

    return step


def fine_tune(w: Workload, loss: Loss | None = None, **options: Any) -> Step:
    "Train the weights that the masks would cover, on the Hugging Face model as it is."
    model = w.copy([*w.trained, *w.head])
    return _training(w, model, [p for p in model.parameters() if p.requires_grad], loss, **options)


def fine_tune_tuned(w: Workload) -> Step:
    "Fine-tune with logits at the masked positions only and the fused Adam."
    def loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        hidden = model.bert(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"))[0]
        at = batch["labels"] != -100
        return F.cross_entropy(model.cls(hidden[at]), batch["labels"][at])
    return fine_tune(w, loss, fused=True)


def fine_tune_cached(w: Text) -> Step:
    "Fine-tune with the teacher's hidden states computed once per batch."
    cache = {id(b): w.teacher(b) for b in w.batches}
    return fine_tune(w, lambda model, batch: w.loss(model, batch, cache[id(batch)]))


class _StraightThrough(torch.autograd.Function):
    "Score above 0 forward, identity backward."

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor) -> torch.Tensor: return (scores > 0).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor: return grad


class Threshold(nn.Module):
    "Weight times (score > 0)."

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, weight: torch.Tensor) -> torch.Tensor: return weight * _StraightThrough.apply(self.scores)


class HardConcrete(nn.Module):
    "Weight times a stretched and clipped concrete sample."

    def __init__(self, scores: torch.Tensor, beta: float, gamma: float, zeta: float, eps: float) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)
        self.beta, self.gamma, self.zeta, self.eps = beta, gamma, zeta, eps

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        u = torch.empty_like(self.scores).uniform_(self.eps, 1 - self.eps)
        s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + self.scores) / self.beta)
        return weight * (s * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)

    def keep_probability(self) -> torch.Tensor:
        return torch.sigmoid(self.scores - self.beta * math.log(-self.gamma / self.zeta))


class _Tied(nn.Module):
    "A decoder that reads the (masked) word embedding."

    def __init__(self, embedding: nn.Embedding, bias: nn.Parameter) -> None:
        super().__init__()
        self.bias, self._embedding = bias, [embedding]

    def forward(self, x: torch.Tensor) -> torch.Tensor: return F.linear(x, self._embedding[0].weight, self.bias)


def parametrized(w: Workload) -> Step:
    "Masks through `torch.nn.utils.parametrize`, scores trained by Adam."
    model, rng, s = w.copy(w.head), torch.Generator().manual_seed(w.seed), dict(w.settings)
    gates: list[Any] = []                                                             # `HardConcrete` or `Threshold`
    p = (s.pop("value") - s["gamma"]) / (s["zeta"] - s["gamma"]) if s else 0.0
    for path in dict.fromkeys(n.removesuffix(".weight") for n in w.trained):
        module = model.get_submodule(path)
        shape = (1, module.weight.shape[1]) if w.granularity == "neuron" else module.weight.shape
        if s: gates.append(HardConcrete(torch.full(shape, math.log(p / (1 - p))), **s))
        else: gates.append(Threshold(torch.randn(shape, generator=rng)))
        parametrize.register_parametrization(module, "weight", gates[-1].to(w.model.device))
    if w.embeddings:
        last = model.cls.predictions
        last.decoder = _Tied(model.bert.embeddings.word_embeddings, last.decoder.bias)
    size = sum(g.scores.numel() for g in gates)

    def loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        once = parametrize.cached() if w.embeddings else torch.enable_grad()          # a tied matrix is masked once
        with once: value = w.loss(model, batch)
        return value + w.penalty * sum(g.keep_probability().sum() for g in gates) / size if w.penalty else value

    return _training(w, model, [p for p in model.parameters() if p.requires_grad], loss)


def activations(w: Workload) -> Step:
    "Limit: everything frozen, gradients of the activations down to the first masked layer, no optimizer."
    model, batches = w.copy(), itertools.cycle(w.batches)
    leaf: list[torch.Tensor] = []

    def cut(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        leaf[:] = [args[0].detach().requires_grad_()]
        return (leaf[0], *args[1:])

    model.bert.encoder.layer[w.layers[0]].register_forward_pre_hook(cut)

    def step() -> torch.Tensor:
        value = w.loss(model, next(batches))
        value.backward()
        leaf.clear()
        return value.detach()

    return step


def _gated(model: PreTrainedModel, layers: list[int]) -> list[torch.Tensor]:
    """Multiply every head and every MLP by a gate of ones; return the gates.

    Heads at the input of the attention output, MLPs at the output of their second matrix.
    """
    heads, device = model.config.num_attention_heads, model.device
    gates: list[torch.Tensor] = []

    def at_input(gate: torch.Tensor, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * gate.repeat_interleave(args[0].shape[-1] // heads), *args[1:])

    for i in layers:
        head = torch.ones(heads, device=device, requires_grad=True)
        mlp = torch.ones(1, device=device, requires_grad=True)
        gates += [head, mlp]
        block = model.bert.encoder.layer[i]
        block.attention.output.dense.register_forward_pre_hook(lambda m, a, g=head: at_input(g, a))
        block.output.dense.register_forward_hook(lambda m, a, out, g=mlp: out * g)
    return gates


def _importance(w: Workload, weights: bool = False, eager: bool = False, single: bool = False) -> Step:
    "Sum absolute gate gradients over batches or, with `single`, over examples."
    wanted = [n for n, _ in w.model.named_parameters()] if weights else []
    model, batches = w.copy(wanted, clone=False), itertools.cycle(w.batches)
    if eager: model.set_attn_implementation("eager")
    gates = _gated(model, w.layers)
    total = [torch.zeros_like(g) for g in gates]

    def step() -> torch.Tensor:
        batch = next(batches)
        n, value = len(batch["input_ids"]), torch.zeros(())
        parts = [{k: v[i:i + 1] for k, v in batch.items()} for i in range(n)] if single else [batch]
        for part in parts:
            model.zero_grad()
            for g in gates: g.grad = None
            loss = w.loss(model, part)
            loss.backward()
            for t, g in zip(total, gates, strict=True):
                if g.grad is not None: t.add_(g.grad.abs())
            value = value.to(loss.device) + loss.detach()
        return value / (n if single else 1)

    return step


def forward(w: Workload) -> Step:
    "One plain forward pass of the same batches: the model's own, padded, no gradients."
    model, batches = w.copy(), itertools.cycle(w.batches)

    def step() -> torch.Tensor:
        with torch.no_grad(): return w.loss(model, next(batches))

    return step


class _Straight(nn.Module):
    "Weight without a sampled binary mask: logistic noise, hard forward, soft backward; another sample at every use."

    def __init__(self, shape: torch.Size, density: float) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.full(shape, math.log(density / (1 - density))))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        u = torch.empty_like(self.scores).uniform_(1e-6, 1 - 1e-6)
        s = torch.sigmoid(self.scores + torch.log(u) - torch.log1p(-u))
        return weight * (1 - ((s > 0.5).to(s.dtype) - s.detach() + s))


def critical(w: Critical) -> Step:
    """Three masked forward passes, one backward pass, Adam.

    A copy of the model is the reference in every step; logits are made everywhere, and rows picked from them.
    """
    model, full = w.copy(), copy.deepcopy(w.model)
    gates: list[_Straight] = []
    for path in w.masked:
        module = model.get_submodule(path)
        gates.append(_Straight(module.weight.shape, 0.45).to(w.model.device))
        parametrize.register_parametrization(module, "weight", gates[-1])
    size = sum(g.scores.numel() for g in gates)

    def rows(m: PreTrainedModel, part: Batch) -> torch.Tensor:
        logits = m(**part).logits
        if "attention_mask" not in part: return logits.flatten(0, 1)
        before_last = part["attention_mask"].sum(1) - 2                  # where the last token is predicted
        return logits[torch.arange(len(logits)), before_last]

    def far(part: Batch) -> torch.Tensor:
        with torch.no_grad(): goal = rows(full, part).log_softmax(-1)
        return F.kl_div(rows(model, part).log_softmax(-1), goal, log_target=True, reduction="batchmean")

    def loss(_: PreTrainedModel, batch: dict[str, Batch]) -> torch.Tensor:
        flat = rows(model, batch["target"]).log_softmax(-1)
        uniform = torch.full_like(flat, 1 / flat.shape[-1])
        forgotten = 1.5 * F.kl_div(flat, uniform, reduction="batchmean")
        density = w.penalty * sum(torch.sigmoid(g.scores).sum() for g in gates) / size
        return forgotten + far(batch["control"]) + far(batch["text"]) + density

    return _training(w, model, [g.scores for g in gates], loss)


def fine_tune_bf16(w: Workload) -> Step:
    "Fine-tune in bfloat16."
    return fine_tune(w, bf16=True)


def importance_loop(w: Workload) -> Step:
    "Importance per batch, with weights that want gradients and eager attention."
    return _importance(w, weights=True, eager=True)


def importance_single(w: Workload) -> Step:
    "Importance per example, one at a time, weights frozen."
    return _importance(w, single=True)


_MASKING: dict[str, Variant] = {"fine-tune": fine_tune, "parametrize": parametrized, "activations": activations}
_IMPORTANCE: dict[str, Variant] = {
    "loop": importance_loop,
    "loop, batch 1": importance_single,
    "activations": _importance,
    "forward": forward,
}
BASELINES: dict[str, dict[str, Variant]] = {
    "cloze": {**_MASKING, "fine-tune, tuned": fine_tune_tuned, "fine-tune, bf16": fine_tune_bf16},
    "text": {**_MASKING, "fine-tune, cached teacher": fine_tune_cached, "fine-tune, bf16": fine_tune_bf16},
    "critical": {"plain": critical},
    "probe-weights": _MASKING,
    "probe-neurons": _MASKING,
    "importance": _IMPORTANCE,
    "importance-pocket": _IMPORTANCE,
    "compact": {"dense": forward},
}
ANCHORS: dict[str, tuple[str, ...]] = {
    "cloze": ("fine-tune", "parametrize", "activations"),
    "text": ("fine-tune", "parametrize", "activations"),
    "critical": ("plain",),
    "probe-weights": ("fine-tune", "parametrize", "activations"),
    "probe-neurons": ("fine-tune", "parametrize", "activations"),
    "importance": ("loop", "activations", "forward"),
    "importance-pocket": ("loop", "activations", "forward"),
    "compact": ("masked", "dense"),
}
