"What a user would write without the engine: each a function `(workload) -> step`; `step()` makes one optimizer step on the next batch and returns the loss."
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

from workloads import Batch, Critical, Text, Workload

Step = Callable[[], torch.Tensor]
Variant = Callable[[Workload], Step]
Loss = Callable[[nn.Module, Batch], torch.Tensor]


def _training(w: Workload, model: nn.Module, params: Iterable[nn.Parameter], loss: Loss | None = None, bf16: bool = False, **adam: Any) -> Step:
    "The usual loop: zero the gradients, loss, backward, Adam."
    opt, batches, loss = torch.optim.Adam(list(params), lr=w.lr, **adam), itertools.cycle(w.batches), loss or w.loss
    def step() -> torch.Tensor:
        opt.zero_grad()
        with torch.autocast(w.model.device.type, torch.bfloat16, enabled=bf16): value = loss(model, next(batches))
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
    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        hidden, at = model.bert(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"))[0], batch["labels"] != -100
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
        self.scores, self.beta, self.gamma, self.zeta, self.eps = nn.Parameter(scores), beta, gamma, zeta, eps
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        u = torch.empty_like(self.scores).uniform_(self.eps, 1 - self.eps)
        s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + self.scores) / self.beta)
        return weight * (s * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)
    def kept(self) -> torch.Tensor: return torch.sigmoid(self.scores - self.beta * math.log(-self.gamma / self.zeta))


class _Tied(nn.Module):
    "A decoder that reads the (masked) word embedding."
    def __init__(self, embedding: nn.Module, bias: nn.Parameter) -> None:
        super().__init__()
        self.bias, self._embedding = bias, [embedding]
    def forward(self, x: torch.Tensor) -> torch.Tensor: return F.linear(x, self._embedding[0].weight, self.bias)


def parametrized(w: Workload) -> Step:
    "Masks through `torch.nn.utils.parametrize`, scores trained by Adam."
    model, rng, gates, s = w.copy(w.head), torch.Generator().manual_seed(w.seed), [], dict(w.settings)
    p = (s.pop("value") - s["gamma"]) / (s["zeta"] - s["gamma"]) if s else 0.0
    for path in dict.fromkeys(n.removesuffix(".weight") for n in w.trained):
        module = model.get_submodule(path)
        shape = (1, module.weight.shape[1]) if w.granularity == "neuron" else module.weight.shape
        gates.append(HardConcrete(torch.full(shape, math.log(p / (1 - p))), **s) if s else Threshold(torch.randn(shape, generator=rng)))
        parametrize.register_parametrization(module, "weight", gates[-1].to(w.model.device))
    if w.embeddings: model.cls.predictions.decoder = _Tied(model.bert.embeddings.word_embeddings, model.cls.predictions.decoder.bias)
    size = sum(g.scores.numel() for g in gates)
    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        with parametrize.cached() if w.embeddings else torch.enable_grad(): value = w.loss(model, batch)      # a tied matrix is masked once
        return value + w.penalty * sum(g.keep_probability().sum() for g in gates) / size if w.penalty else value
    return _training(w, model, [p for p in model.parameters() if p.requires_grad], loss)


def activations(w: Workload) -> Step:
    "Limit: everything frozen, gradients of the activations down to the first masked layer, no weight gradient, no optimizer."
    model, batches, leaf = w.copy(), itertools.cycle(w.batches), []
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


def _gated(model: nn.Module, layers: list[int]) -> list[torch.Tensor]:
    "Multiply every head (input of the attention output) and every MLP (output of its second matrix) by a gate of ones; return the gates."
    heads, device, gates = model.config.num_attention_heads, model.device, []
    for i in layers:
        head, mlp = torch.ones(heads, device=device, requires_grad=True), torch.ones(1, device=device, requires_grad=True)
        block, gates = model.bert.encoder.layer[i], [*gates, head, mlp]
        block.attention.output.dense.register_forward_pre_hook(lambda m, a, g=head: (a[0] * g.repeat_interleave(a[0].shape[-1] // heads), *a[1:]))
        block.output.dense.register_forward_hook(lambda m, a, out, g=mlp: out * g)
    return gates


def _importance(w: Workload, weights: bool = False, eager: bool = False, single: bool = False) -> Step:
    "Sum absolute gate gradients over batches or, with `single`, over examples."
    model, batches = w.copy([n for n, _ in w.model.named_parameters()] if weights else [], clone=False), itertools.cycle(w.batches)
    if eager: model.set_attn_implementation("eager")
    gates = _gated(model, w.layers)
    total = [torch.zeros_like(g) for g in gates]
    def step() -> torch.Tensor:
        batch = next(batches)
        n, value = len(batch["input_ids"]), 0.0
        for part in ([{k: v[i:i + 1] for k, v in batch.items()} for i in range(n)] if single else [batch]):
            model.zero_grad()
            for g in gates: g.grad = None
            loss = w.loss(model, part)
            loss.backward()
            for t, g in zip(total, gates): t += g.grad.abs()
            value = value + loss.detach()
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
    "Three masked forward passes, a copy of the model as reference in every step, logits everywhere, rows picked from them; one backward pass, Adam."
    model, full, gates = w.copy(), copy.deepcopy(w.model), []
    for path in w.masked:
        module = model.get_submodule(path)
        gates.append(_Straight(module.weight.shape, 0.45).to(w.model.device))
        parametrize.register_parametrization(module, "weight", gates[-1])
    size = sum(g.scores.numel() for g in gates)
    def rows(m: nn.Module, part: Batch) -> torch.Tensor:
        logits = m(**part).logits
        if "attention_mask" not in part: return logits.flatten(0, 1)
        return logits[torch.arange(len(logits)), part["attention_mask"].sum(1) - 2]      # where the last token is predicted
    def far(part: Batch) -> torch.Tensor:
        with torch.no_grad(): goal = rows(full, part).log_softmax(-1)
        return F.kl_div(rows(model, part).log_softmax(-1), goal, log_target=True, reduction="batchmean")
    def loss(_: nn.Module, batch: dict[str, Batch]) -> torch.Tensor:
        flat = rows(model, batch["target"]).log_softmax(-1)
        uniform = torch.full_like(flat, 1 / flat.shape[-1])
        return 1.5 * F.kl_div(flat, uniform, reduction="batchmean") + far(batch["control"]) + far(batch["text"]) + w.penalty * sum(torch.sigmoid(g.scores).sum() for g in gates) / size
    return _training(w, model, [g.scores for g in gates], loss)


_MASKING: dict[str, Variant] = {"fine-tune": fine_tune, "parametrize": parametrized, "activations": activations}
BASELINES: dict[str, dict[str, Variant]] = {
    "cloze": {**_MASKING, "fine-tune, tuned": fine_tune_tuned, "fine-tune, bf16": lambda w: fine_tune(w, bf16=True)},
    "text": {**_MASKING, "fine-tune, cached teacher": fine_tune_cached, "fine-tune, bf16": lambda w: fine_tune(w, bf16=True)},
    "critical": {"plain": critical},
    "probe-weights": _MASKING,
    "probe-neurons": _MASKING,
    **dict.fromkeys(("importance", "importance-pocket"), {"loop": lambda w: _importance(w, weights=True, eager=True), "loop, batch 1": lambda w: _importance(w, single=True), "activations": _importance, "forward": forward}),
    "compact": {"dense": forward},
}
ANCHORS = {"critical": ("plain",), "compact": ("masked", "dense")} | dict.fromkeys(("importance", "importance-pocket"), ("loop", "activations", "forward")) | dict.fromkeys(("cloze", "text", "probe-weights", "probe-neurons"), ("fine-tune", "parametrize", "activations"))
