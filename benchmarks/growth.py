"How cost grows: prompts per second against batch, length, masked layers and model size."
from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from baselines import Variant
from harness import Load, interleave
from workloads import cloze

# by axis: label, and points as (value, settings of `cloze`)
AXES: dict[str, tuple[str, list[tuple[Any, dict[str, Any]]]]] = {
    "batch": ("prompts per step", [(n, {"batch": n}) for n in (8, 32, 128)]),
    "length": ("longest prompt, tokens", [(n, {"longest": n}) for n in (8, 14, 32)]),
    "layers": ("masked layers (the top ones)", [(n, {"first": 12 - n}) for n in (2, 6, 12)]),
    "size": ("model, million weights in the masked half", [(s, {"size": s}) for s in ("small", "base")]),
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


def measure(
    variants: Mapping[str, Variant],
    axes: Sequence[str] = tuple(AXES),
    rounds: int = 3,
    device: str = "cpu",
    quick: bool = False,
) -> list[dict[str, Any]]:
    "Time every variant at every point of every axis."
    rows: list[dict[str, Any]] = []
    load = Load()
    for axis in axes:
        if quick and axis == "size": continue
        for value, usual in AXES[axis][1][:2 if quick else None]:
            settings = {**usual, "size": "tiny"} if quick else usual
            if quick and axis == "layers": settings["first"] = 4 - value
            w = cloze(device=device, count=3, **settings)
            timings = interleave({n: partial(f, w) for n, f in variants.items()}, rounds, warmup=2, least=0.3)[0]
            used, prompts = load.others(), len(w.batches[0]["input_ids"])
            for name, t in timings.items():
                s = median(t.seconds)
                point = {"axis": axis, "value": w.size / 1e6 if axis == "size" else value, "variant": name}
                speed = {"seconds": s, "steps_per_second": 1 / s, "prompts_per_second": prompts / s}
                rows.append({**point, **speed, "others_cores": used})
            times = "  ".join(f"{n} {median(t.seconds):.3f} s" for n, t in timings.items())
            print(f"{axis:7} {value!s:>7}  {times}", flush=True)
            del w, timings
            gc.collect()
    return rows


def draw(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    "Draw one panel per axis as SVG."
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker
    plt.rcParams["svg.hashsalt"] = "growth"
    axes = list(dict.fromkeys(r["axis"] for r in rows))
    variants = list(dict.fromkeys(r["variant"] for r in rows))
    size = (3.3 * len(axes), 3.4)
    fig, panels = plt.subplots(1, len(axes), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for panel, axis in zip(panels[0], axes, strict=True):
        for i, name in enumerate(variants):
            points = [r for r in rows if r["axis"] == axis and r["variant"] == name]
            x, y = [r["value"] for r in points], [r["prompts_per_second"] for r in points]
            panel.plot(x, y, marker="osD^vP"[i % 6], color=COLOURS[i % 6], label=name, lw=1.5, ms=4)
        ticks = sorted({r["value"] for r in rows if r["axis"] == axis})
        panel.set(xscale="log", yscale="log", xlabel=AXES[axis][0])
        panel.set_xticks(ticks, [f"{t:g}" if t == int(t) else f"{t:.1f}" for t in ticks])
        panel.xaxis.set_minor_locator(ticker.NullLocator())
        for which in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            which(ticker.LogFormatter(minor_thresholds=(2, 1)))
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("prompts per second")
    lines, names = panels[0][0].get_legend_handles_labels()
    fig.legend(lines, names, loc="outside lower center", ncols=len(variants), frameon=False)
    fig.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)
    plt.close(fig)
