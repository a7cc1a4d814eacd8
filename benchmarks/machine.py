"What the machine can do: matrix products at the workloads' shapes, and memory bandwidth."
from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

SHAPES = {                                                     # rows, inner, columns
    "cloze forward 768 -> 768": (366, 768, 768),
    "cloze forward 768 -> 3072": (366, 768, 3072),
    "cloze forward 3072 -> 768": (366, 3072, 768),
    "cloze weight gradient 768 x 3072": (768, 366, 3072),
    "cloze logits": (32, 768, 30522),
    "text forward 768 -> 3072": (512, 768, 3072),
    "text logits": (77, 768, 30522),
    "4096 tokens 768 -> 3072": (4096, 768, 3072),
    "square 2048": (2048, 2048, 2048),
}


def _seconds(f: Callable[[], object], device: str, least: float = 0.3) -> tuple[float, float]:
    "Median and best seconds of a call."
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    out: list[float] = []
    for _ in range(3): f()
    wait()
    while sum(out) < least or len(out) < 5:
        start = time.perf_counter()
        f()
        wait()
        out.append(time.perf_counter() - start)
    return median(out), min(out)


def _product(name: str, dtype: torch.dtype, device: str) -> Callable[[], object]:
    "A matrix product of a shape."
    m, k, n = SHAPES[name]
    if "gradient" in name:                                     # transposed first factor, as in a backward pass
        a, b = torch.randn(k, m, device=device).to(dtype).t(), torch.randn(k, n, device=device).to(dtype)
        return lambda: a @ b
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
    return lambda: torch.nn.functional.linear(a, b)


def matmuls(device: str = "cpu", quick: bool = False) -> list[dict[str, Any]]:
    "GFLOP/s by shape, in f32 and bf16: median and best."
    rows: list[dict[str, Any]] = []
    for name, (m, k, n) in list(SHAPES.items())[:3 if quick else None]:
        row: dict[str, Any] = {"shape": name}
        for kind, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
            mid, best = _seconds(_product(name, dtype, device), device)
            row |= {kind: 2e-9 * m * k * n / mid, f"{kind} best": 2e-9 * m * k * n / best}
        rows.append(row)
    return rows


def bandwidth(device: str = "cpu", quick: bool = False) -> dict[str, float]:
    "GB/s of copy (read and write counted), triad `c = a + 3 b`, and scaling in place."
    n = 2**24 if quick else 2**28                              # floats: 64 MB or 1 GB, more than caches hold
    a, b, c = (torch.ones(n, device=device) for _ in range(3))
    calls: dict[str, tuple[Callable[[], object], int]] = {      # with the bytes a number costs
        "copy": (lambda: c.copy_(a), 8),
        "triad": (lambda: torch.add(a, b, alpha=3.0, out=c), 12),
        "scale in place": (lambda: c.mul_(1.0001), 8),
    }
    return {name: bytes_ * n / _seconds(f, device)[0] / 1e9 for name, (f, bytes_) in calls.items()}


def show(device: str = "cpu", quick: bool = False) -> dict[str, object]:
    "Measure, print and return."
    m, b = matmuls(device, quick), bandwidth(device, quick)
    print("\n## machine: matrix products, GFLOP/s median (best)")
    for r in m:
        print(f"{r['shape']:34}" + "".join(f"  {k} {r[k]:6.0f} ({r[k + ' best']:.0f})" for k in ("f32", "bf16")))
    print("memory, GB/s: " + ", ".join(f"{k} {v:.0f}" for k, v in b.items()))
    return {"matmul": m, "bandwidth": b}
