"How quickly the explorer answers: python benchmarks/explorer.py"
from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from subnet_explorer.core.mask import Mask
from subnet_explorer.core.masks import Masks
from subnet_explorer.core.space import unit_space
from subnet_explorer.look.app import explore


def many(n: int, folder: Path | None = None) -> Masks:
    "Masks of 12 x 12 heads and 12 MLPs, in memory or in files."
    space, rows = unit_space(12, 12, mlps=True), []
    for i in range(n):
        labels, mask = dict(method="ab"[i % 2], task=f"task {i // 2 % 10}", seed=i // 20), Mask.random(space, .6, seed=i)
        rows.append((labels, mask if folder is None else mask.save(folder / f"{i}.mask.safetensors")))
    return Masks(rows)


def timed(act: Callable[[], Any], rounds: int = 1) -> float:      # milliseconds, median
    "Time of one call."
    out = []
    for _ in range(rounds):
        start = time.perf_counter(); act(); out.append(1000 * (time.perf_counter() - start))
    return statistics.median(out)


def state_size(widget: Any) -> int:      # bytes
    "What the front end is sent for a widget and all that is in it."
    from ipywidgets.embed import embed_data
    return len(json.dumps(embed_data(views=[widget], drop_defaults=False)))


def masks_alone(n: int, on_disk: bool) -> dict[str, Any]:
    "First paint and answers without a model."
    with tempfile.TemporaryDirectory() as d:
        masks = many(n, Path(d) if on_disk else None)
        keep = []
        build = timed(lambda: keep.append((ui := explore(masks), ui.widget)))
        ui = keep[0][0]
        p = ui.widget.parts
        row = {"masks": f"{n:,} {'in files' if on_disk else 'in memory'}", "build": build, "KB to the front end": state_size(ui.widget) / 1000,
               "toggle": timed(lambda: ui.toggle(3, 5), 9), "another mask": timed(lambda: setattr(p["list"], "value", (p["list"].value + 7) % n), 9)}
        filters = {f.description: f for f in p["filters"].children}
        row["filter"] = timed(lambda: setattr(filters["task"], "value", "task 3" if filters["task"].value != "task 3" else "task 4"), 5)
        filters["task"].value = None
        row["survival of all"] = timed(lambda: ui.colour("survival"))
        return row


def with_a_model() -> dict[str, Any]:
    "A toggle with a score on 64 facts and predictions, on the pocket model."
    from subnet_explorer import Space, load, read_facts, split
    model, tok = load("pocket-bert")
    space = Space.of(model, "head+mlp")
    ui = explore(Masks([(dict(seed=s), Mask.random(space, .75, seed=s)) for s in range(5)]), (model, tok), split(read_facts("pocket")).test)
    ui.widget
    ui.toggle(1, 1)
    units = iter([(layer, head) for layer in range(1, 5) for head in range(1, 5)])
    return {"masks": "5, with pocket-bert", "toggle": timed(lambda: ui.toggle(*next(units)), 15)}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    masks_alone(20, False)                                           # imports
    rows = [masks_alone(200, False), masks_alone(1000, False), masks_alone(1000, True), with_a_model()]
    columns = list(rows[0])
    print("Milliseconds; the open tab is drawn anew by every action.\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for r in rows: print("| " + " | ".join("" if c not in r else r[c] if c == "masks" else f"{r[c]:,.0f}" for c in columns) + " |")


if __name__ == "__main__": main()
