"What the engine should reach."
from __future__ import annotations

from typing import NamedTuple


class Target(NamedTuple):
    "`measure` is `speed` (at least) or `memory` (at most), as a ratio to `anchor`; `MB` (at most) as it is."
    workload: str
    variant: str
    measure: str
    anchor: str
    value: float
    device: str = "cpu"
    ours: str = ""              # in the masks part: the beginning of the name of our own row


def _rows(workload: str, variant: str, tune: float, user: float, memory: float | None) -> list[Target]:
    rows = [
        Target(workload, variant, "speed", "fine-tune", tune),
        Target(workload, variant, "speed", "parametrize", user),
    ]
    if memory: rows.append(Target(workload, variant, "memory", "fine-tune", memory))
    return rows


TARGETS: list[Target] = [
    *_rows("cloze", "engine", 2.2, 2.3, 0.8),
    *_rows("cloze", "engine, reachable", 2.4, 2.5, 0.45),
    *_rows("cloze", "engine, sampled", 3.0, 3.1, 0.45),
    *_rows("cloze", "engine, bf16", 3.5, 3.6, 0.8),
    Target("cloze", "engine", "speed", "fine-tune", 8.0, "cuda"),
    *_rows("text", "engine", 1.1, 1.1, 0.9),
    *_rows("text", "engine, bf16", 1.85, 1.9, 0.9),
    *_rows("probe-weights", "engine", 0.9, 2.0, 0.8),
    *_rows("probe-neurons", "engine", 1.45, 1.4, 0.25),
    Target("importance", "engine", "speed", "loop", 1.6),
    Target("importance", "engine", "speed", "forward", 0.455),              # at most 2.2 times a plain forward pass
    Target("importance-pocket", "engine", "speed", "forward", 0.455),
    Target("critical", "engine", "memory", "plain", 0.25),
    Target("critical", "engine, independent", "memory", "plain", 0.25),
    Target("compact", "compact", "speed", "masked", 1.5),
    Target("masks", "jaccard", "speed", "bool tensors", 200.0, ours="overlaps"),
    Target("masks", "jaccard", "MB", "one mask", 10.7, ours="overlaps"),
    Target("masks", "threshold", "speed", "torch.topk", 10.0, ours="kth"),
]
