"What is timed: BERT-base (for one kind of work GPT-2) with random weights and random token ids."
from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from subnet_explorer.core.space import Space

MASK, SPECIAL = 103, 1000                       # id of [MASK]; ids below are never drawn
Batch = dict[str, torch.Tensor]
MATRICES = (
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "intermediate.dense", "output.dense",
)
GPT2_MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
WORD_EMBEDDING = "bert.embeddings.word_embeddings.weight"


def _size(layers: int, width: int, heads: int, **more: int) -> dict[str, int]:
    "Settings of a BERT whose MLPs are four times as wide as it is."
    return dict(num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width,
                **more)


SIZES: dict[str, dict[str, int]] = {
    "tiny": _size(4, 256, 4, vocab_size=5000),
    "mini": _size(4, 256, 4),
    "small": _size(6, 384, 6),
    "medium": _size(8, 512, 8),
    "base": {},
}


@dataclass
class Workload:
    "One kind of work: a frozen model, batches to cycle through, what is masked, and the plain loss."
    name: str
    model: PreTrainedModel                            # frozen, evaluation mode; variants take `copy()`
    batches: list[Any]                          # of `Batch`; of `critical`: a `Batch` by part
    layers: list[int]                           # zero-based layers whose matrices are masked
    granularity: str = "weight"                 # "weight"; "neuron": one gate per input column; "head": heads and MLPs
    embeddings: bool = False                    # the word embedding (and the decoder tied to it) is masked too
    alone: bool = False                         # only variant in its process: training may change the model
    lr: float = 3e-4
    steps: int = 246                            # of the schedule that these batches belong to
    warmup: float = 0.1
    seed: int = 0
    penalty: float = 0.0                        # factor on the expected density
    settings: dict[str, Any] = field(default_factory=dict)
    weighed: int = 3                            # steps after which, and over which, memory is measured

    @property
    def masked(self) -> list[str]:
        "Paths of the masked matrices' modules."
        return [f"bert.encoder.layer.{i}.{m}" for i in self.layers for m in MATRICES]

    @property
    def trained(self) -> list[str]:
        "Names of the parameters that the masks cover."
        return [WORD_EMBEDDING] * self.embeddings + [f"{m}.weight" for m in self.masked]

    @property
    def head(self) -> list[str]:
        "Names of the task head's parameters, trained along with the masks."
        if not self.name.startswith("probe"): return []
        return [n for n, _ in self.model.named_parameters() if n.startswith("classifier.")]

    @property
    def size(self) -> int:
        "Number of masked weights."
        return sum(self.model.get_parameter(n).numel() for n in self.trained)

    def copy(self, train: Iterable[str] = (), clone: bool = True) -> PreTrainedModel:
        """A model of its own that shares the frozen parameters; those in `train` want gradients.

        They are cloned, unless nothing else needs them; the teacher of `text` does.
        """
        train = set(train)
        if self.alone and self.name != "text": clone = False
        memo = {id(b): b for b in self.model.buffers()}
        for n, p in self.model.named_parameters():
            own = p.detach().clone() if clone else p.detach()
            memo[id(p)] = nn.Parameter(own) if n in train else p
        return copy.deepcopy(self.model, memo)

    def space(self, model: PreTrainedModel | None = None) -> Space:
        "The library's `Space` of what is masked."
        kind = {"weight": "weight", "head": "head+mlp"}.get(self.granularity)
        if kind is None: raise ValueError("input columns of every matrix are no kind of `Space`")
        layers = [i + 1 for i in self.layers]
        return Space.of(model or self.model, kind, layers=layers, embeddings=self.embeddings)

    def loss(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        "Plain Hugging Face loss."
        return model(**batch).loss


class Text(Workload):
    "Masked language modelling and distillation of every layer's hidden states from the full model."

    def teacher(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        "Hidden states of the full model after each layer."
        with torch.no_grad(): out = self.model.bert(input_ids=batch["input_ids"], output_hidden_states=True)
        return out.hidden_states[1:]

    def loss(
        self,
        model: PreTrainedModel,
        batch: Batch,
        teacher: tuple[torch.Tensor, ...] | None = None,
    ) -> torch.Tensor:
        "Loss of the masked words, and how far every layer's states are from the teacher's."
        goals = self.teacher(batch) if teacher is None else teacher
        out = model(**batch, output_hidden_states=True)
        pairs = zip(out.hidden_states[1:], goals, strict=True)
        far = [(1 - F.cosine_similarity(s.float(), t.float(), dim=-1)).mean() for s, t in pairs]
        return out.loss + torch.stack(far).mean()


class Critical(Workload):
    "Suppress some facts, maintain others and blocks of text; a batch holds a `target`, a `control` and a `text`."

    @property
    def masked(self) -> list[str]: return [f"transformer.h.{i}.{m}" for i in self.layers for m in GPT2_MATRICES]

    @property
    def trained(self) -> list[str]: return [f"{m}.weight" for m in self.masked]


def _model(cls: type[PreTrainedModel], size: str, device: str, seed: int = 0, **config: Any) -> PreTrainedModel:
    "A frozen model with random weights."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(BertConfig(**SIZES[size], **config)).eval().requires_grad_(False).to(device)


def _lengths(rng: torch.Generator, n: int, longest: int, total: int) -> torch.Tensor:
    "Random lengths with a given sum, at least one of them `longest`."
    out = torch.randint(max(3, 2 * total // n - longest), longest + 1, (n,), generator=rng)
    out[0] = longest
    while gap := total - int(out.sum()):
        i = int(torch.randint(1, n, (), generator=rng))
        out[i] = min(longest, max(3, int(out[i]) + (1 if gap > 0 else -1)))
    return out


def _on(batch: Batch, device: str) -> Batch: return {k: v.to(device) for k, v in batch.items()}


def cloze(
    quick: bool = False,
    device: str = "cpu",
    size: str | None = None,            # of `SIZES`
    batch: int = 32,
    longest: int = 14,                  # tokens
    first: int | None = None,           # first masked layer; None: the upper half
    count: int = 8,                     # batches
) -> Workload:
    "Prompts with one [MASK] each; the upper half of the layers is masked. Default: 366 real tokens, 448 with padding."
    model = _model(BertForMaskedLM, size or ("tiny" if quick else "base"), device)
    vocab, n = model.config.vocab_size, model.config.num_hidden_layers
    rng, batches = torch.Generator().manual_seed(1), []
    for _ in range(count):
        lengths = _lengths(rng, batch, longest, round(batch * longest * 366 / 448))
        ids = torch.randint(SPECIAL, vocab, (batch, longest), generator=rng)
        real = torch.arange(longest) < lengths[:, None]
        at = (torch.rand(batch, generator=rng) * (lengths - 2)).long() + 1
        labels = torch.full_like(ids, -100)
        labels[torch.arange(batch), at] = ids[torch.arange(batch), at]
        ids[torch.arange(batch), at] = MASK
        made = {"input_ids": ids.where(real, 0), "attention_mask": real.long(), "labels": labels}
        batches.append(_on(made, device))
    return Workload("cloze", model, batches, list(range(n // 2 if first is None else first, n)))


def text(quick: bool = False, device: str = "cpu", batch: int = 4, length: int = 128, count: int = 8) -> Text:
    "Blocks of text with 15 % of the positions masked; every layer and the word embedding is masked."
    model = _model(BertForMaskedLM, "tiny" if quick else "base", device)
    rng, batches = torch.Generator().manual_seed(2), []
    for _ in range(count):
        ids = torch.randint(SPECIAL, model.config.vocab_size, (batch, length), generator=rng)
        chosen = torch.zeros(batch * length, dtype=torch.bool)
        chosen[torch.randperm(batch * length, generator=rng)[:round(0.15 * batch * length)]] = True
        chosen = chosen.view_as(ids)
        made = {"input_ids": ids.masked_fill(chosen, MASK), "labels": ids.where(chosen, -100)}
        batches.append(_on(made, device))
    return Text("text", model, batches, list(range(model.config.num_hidden_layers)), embeddings=True, lr=5e-5)


def _random_ids(model: PreTrainedModel, shape: tuple[int, int], rng: torch.Generator) -> torch.Tensor:
    return torch.randint(SPECIAL, model.config.vocab_size, shape, generator=rng)


def probe(
    granularity: str = "weight",
    quick: bool = False,
    device: str = "cpu",
    batch: int = 8,
    length: int = 32,
    count: int = 8,
) -> Workload:
    "Token classification under hard-concrete gates on every matrix: per weight, or per neuron (input column)."
    model = _model(BertForTokenClassification, "tiny" if quick else "base", device, num_labels=17)
    rng = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(count):
        ids = _random_ids(model, (batch, length), rng)
        batches.append(_on({"input_ids": ids, "labels": torch.randint(17, (batch, length), generator=rng)}, device))
    layers = list(range(model.config.num_hidden_layers))
    return Workload(f"probe-{granularity}s", model, batches, layers, granularity, penalty=1.0, lr=1e-3,
                    settings=dict(value=0.9, beta=2 / 3, gamma=-0.1, zeta=1.1, eps=1e-4))


def importance(
    quick: bool = False,
    device: str = "cpu",
    batch: int = 32,
    length: int = 64,
    count: int = 8,
) -> Workload:
    "Sequence classification; the gradient of the loss with respect to a gate on every head and every MLP."
    model = _model(BertForSequenceClassification, "tiny" if quick else "base", device, num_labels=2)
    rng = torch.Generator().manual_seed(4)
    batches = []
    for _ in range(count):
        ids = _random_ids(model, (batch, length), rng)
        batches.append(_on({"input_ids": ids, "labels": torch.randint(2, (batch,), generator=rng)}, device))
    return Workload("importance", model, batches, list(range(model.config.num_hidden_layers)), "head")


def compact(quick: bool = False, device: str = "cpu") -> Workload:
    "A forward pass, as for importance, after half the heads and half the neurons of every layer were removed."
    w = importance(quick, device)
    w.name = "compact"
    return w


def importance_pocket(quick: bool = False, device: str = "cpu", batch: int = 64) -> Workload:
    """The same on a real, small model and real lengths.

    pocket-bert and the 400 development pairs of a pocket task, in batches sorted by length.
    """
    from subnet_explorer.data.tables import read_glue
    from subnet_explorer.model.load import load
    bert, tok = load("pocket-bert")
    model = BertForSequenceClassification(bert.config)
    model.bert.load_state_dict(bert.bert.state_dict(), strict=False)
    rows = sorted(read_glue("pocket:entails", "dev"), key=lambda r: len(tok(r["sentence"], r["pair"]).input_ids))
    batches = []
    for part in (rows[i:i + batch] for i in range(0, len(rows), batch)):
        coded = tok([r["sentence"] for r in part], [r["pair"] for r in part], padding=True, return_tensors="pt")
        labels = torch.tensor([int(r["label"] == "entailment") for r in part])
        batches.append(_on({**coded, "labels": labels}, device))
    frozen = model.eval().requires_grad_(False).to(device)
    return Workload("importance-pocket", frozen, batches, list(range(4)), "head")


def critical(
    quick: bool = False,
    device: str = "cpu",
    facts: tuple[int, int] = (16, 250),         # to be suppressed, to be maintained
    texts: int = 10,
    length: int = 512,
    count: int = 2,
) -> Critical:
    "GPT-2 of the usual size with random weights; the upper half of the blocks is masked; facts of 4 to 10 tokens."
    size = dict(n_layer=4, n_embd=256, n_head=4, vocab_size=5000) if quick else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**size)).eval().requires_grad_(False).to(device)
    rng, n, vocab = torch.Generator().manual_seed(5), model.config.n_layer, model.config.vocab_size

    def told(n: int) -> Batch:
        lengths = torch.randint(4, 11, (n,), generator=rng)
        ids = torch.randint(vocab, (n, 10), generator=rng)
        return _on({"input_ids": ids, "attention_mask": (torch.arange(10) < lengths[:, None]).long()}, device)

    target, batches = told(facts[0]), []
    for _ in range(count):
        control = told(facts[1])
        text = _on({"input_ids": torch.randint(vocab, (texts, length), generator=rng)}, device)
        batches.append({"target": target, "control": control, "text": text})
    return Critical("critical", model, batches, list(range(n // 2, n)), lr=.2, steps=40_000, penalty=2.0, weighed=2)


WORKLOADS: dict[str, Callable[..., Workload]] = {
    "cloze": cloze,
    "text": text,
    "critical": critical,
    "importance": importance,
    "importance-pocket": importance_pocket,
    "compact": compact,
    "probe-weights": partial(probe, "weight"),
    "probe-neurons": partial(probe, "neuron"),
}
