"""Masks and thresholds against plain torch: Jaccard distances, votes, and the k-th largest score.

`jaccard()` and `threshold()` return one row per way to do the same thing: `name`, median `seconds`, `ratio` (how many
times faster than the first row of its task) and `memory` in bytes. All ways of a task run in turn, round after round,
in one process, and must give the same result.
Alone: `python benchmarks/masks.py [--quick]`.
"""
from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import harness
import numpy as np
import torch

from subnet_explorer.core.layout import Layout
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.masks import Masks, overlaps, survival, votes
from subnet_explorer.core.scores import Scores, kth
from subnet_explorer.core.space import Group, ModelId, Space

ROWS = list[dict[str, Any]]


def bert_base(layers: int = 12) -> Space:
    "The encoder matrices of BERT-base (85 million weights), without the model."
    shapes = dict.fromkeys("qkvo", (768, 768)) | {"up": (3072, 768), "down": (768, 3072)}
    layout = Layout("bert", 12, 12, 12, 64, 3072, 768, False, (), "embeddings.word_embeddings.weight", 30522)
    groups = [Group(f"layer.{i}.{role}", "weight", i, role, s) for i in range(layers) for role, s in shapes.items()]
    return Space(tuple(groups), layout, ModelId("bert-base", None, "c", "w"))


def peak(work: Callable) -> float:
    "Most bytes that `work` holds on top of what is there."
    meter = harness.Peak()
    work()
    return max(0.0, meter.over()) * 2**20


def race(
    ways: dict[str, Callable],
    rounds: int,
    memory: dict[str, float] | None = None,     # bytes, where they need not be measured
    times: dict[str, int] | None = None,        # how often a way does the work in one call, where that is not once
) -> ROWS:
    "Run all ways in turn; seconds are medians over rounds."
    took: dict[str, list[float]] = {n: [] for n in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            start = time.perf_counter()
            work()
            took[name].append((time.perf_counter() - start) / (times or {}).get(name, 1))
    seconds = {n: float(np.median(t)) for n, t in took.items()}
    first = next(iter(seconds.values()))
    held = {n: (memory or {}).get(n) or peak(ways[n]) for n in ways}
    return [dict(name=n, seconds=s, ratio=first / s, memory=held[n]) for n, s in seconds.items()]


def unpacked(mask: Mask) -> torch.Tensor:
    "A mask as a tensor of booleans."
    bits = np.frombuffer(b"".join(mask.packed), np.uint8)
    return torch.from_numpy(np.unpackbits(bits)).bool()


SUM = "jaccard: torch bool, (a & b).sum() / (a | b).sum()"
COUNT = "jaccard: torch bool, count_nonzero"
OVERLAPS = "jaccard: overlaps, packed, all pairs"


def jaccard(quick: bool = False, rounds: int = 5) -> ROWS:
    """Seconds per pair for the Jaccard distance, and per collection for votes.

    Memory is that of one mask, or the peak of a call for votes.
    """
    n, space = (4, bert_base(1)) if quick else (16, bert_base())
    rng = np.random.default_rng(0)
    packed = [tuple(rng.bytes(g.size // 8) for g in space.groups) for _ in range(n)]
    masks = Masks([({"seed": s}, Mask(space, bits)) for s, bits in enumerate(packed)])
    a, b = unpacked(masks[0]), unpacked(masks[1])
    both = overlaps(masks).sum(2)
    found = both[0, 1] / (both[0, 0] + both[1, 1] - both[0, 1])
    assert abs(found - ((a & b).sum() / (a | b).sum()).item()) < 1e-6
    pairs = race({
        SUM: lambda: (a & b).sum() / (a | b).sum(),
        COUNT: lambda: (a & b).count_nonzero() / (a | b).count_nonzero(),
        OVERLAPS: partial(overlaps, masks),
    }, rounds, memory={SUM: a.numel(), COUNT: a.numel(), OVERLAPS: space.size / 8}, times={OVERLAPS: n * (n - 1) // 2})
    loose = [unpacked(m) for _, m in masks]

    def by_sum() -> torch.Tensor:
        total = torch.zeros(space.size, dtype=torch.uint8)
        for m in loose: total += m
        return total.bincount(minlength=n + 1)
    assert by_sum().tolist() == votes(masks).sum(0).tolist()
    counted = race({
        "votes: torch bool, sum and bincount": by_sum,
        "votes: bit-sliced counters": lambda: votes(masks),
    }, rounds)

    def share() -> torch.Tensor:
        total = torch.zeros(space.size, dtype=torch.uint8)
        for m in loose: total += m
        return total.double() / n

    kept = race({
        "survival: torch bool, sum": share,
        "survival: bit-sliced counters": lambda: survival(masks),
    }, rounds)
    return pairs + counted + kept


def threshold(quick: bool = False, rounds: int = 5) -> ROWS:
    "Seconds for the 30 % largest of the magnitudes of BERT-base; memory is the peak of a call."
    space = bert_base(1 if quick else 12)
    rng = np.random.default_rng(0)
    flat = np.abs(rng.standard_normal(space.size, dtype=np.float32) * np.float32(.04))
    ends = np.cumsum([0, *(g.size for g in space.groups)])
    parts = zip(space.groups, pairwise(ends), strict=True)
    scores = Scores(space, {g.name: flat[a:b].reshape(g.shape) for g, (a, b) in parts})
    k, tensor = round(.3 * space.size), torch.from_numpy(flat)

    def by_kthvalue() -> float: return torch.kthvalue(tensor, space.size - k + 1).values.item()

    ways: dict[str, Callable] = {
        "threshold: torch.topk": lambda: torch.topk(tensor, k, sorted=False).values.min().item(),
        "threshold: torch.kthvalue": by_kthvalue,
        "threshold: numpy.partition": lambda: np.partition(flat, space.size - k)[space.size - k],
        "threshold: kth": lambda: kth([flat], k),
        "threshold: Scores.top, mask included": lambda: scores.top(.3),
    }
    assert len({float(way()) for way in list(ways.values())[:4]}) == 1 and scores.top(.3).count == k
    return race(ways, rounds)


if __name__ == "__main__":
    quick = "--quick" in sys.argv
    for row in jaccard(quick) + threshold(quick):
        seconds, memory = 1e3 * row["seconds"], row["memory"] / 1e6
        print(f"{row['name']:<55} {seconds:10.3f} ms  {row['ratio']:8.1f} x  {memory:9.1f} MB")
