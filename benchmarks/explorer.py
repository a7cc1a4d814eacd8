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
        labels = dict(method="ab"[i % 2], task=f"task {i // 2 % 10}", seed=i // 20)
        mask = Mask.random(space, .6, seed=i)
        rows.append((labels, mask if folder is None else mask.save(folder / f"{i}.mask.safetensors")))
    return Masks(rows)


def timed(act: Callable[[], Any], rounds: int = 1) -> float:      # milliseconds, median
    "Time of one call."
    out = []
    for _ in range(rounds):
        start = time.perf_counter()
        act()
        out.append(1000 * (time.perf_counter() - start))
    return statistics.median(out)


def state_size(widget: Any) -> int:      # bytes
    "What the front end is sent for a widget and all that is in it."
    from ipywidgets.embed import embed_data
    return len(json.dumps(embed_data(views=[widget], drop_defaults=False)))


def masks_alone(n: int, on_disk: bool) -> dict[str, Any]:
    "First paint and answers without a model."
    with tempfile.TemporaryDirectory() as d:
        masks = many(n, Path(d) if on_disk else None)
        opened = []

        def build() -> None:
            ui = explore(masks)
            opened.append((ui, ui.widget))

        def another() -> None: p["list"].value = (p["list"].value + 7) % n

        row: dict[str, Any] = {"masks": f"{n:,} {'in files' if on_disk else 'in memory'}", "build": timed(build)}
        ui = opened[0][0]
        p = ui.widget.parts
        row["KB to the front end"] = state_size(ui.widget) / 1000
        row["toggle"] = timed(lambda: ui.toggle(3, 5), 9)
        row["another mask"] = timed(another, 9)
        filters = {f.description: f for f in p["filters"].children}
        task = filters["task"]

        def filtered() -> None: task.value = "task 3" if task.value != "task 3" else "task 4"

        row["filter"] = timed(filtered, 5)
        task.value = None
        row["survival of all"] = timed(lambda: ui.colour("survival"))
        return row


def with_a_model() -> dict[str, Any]:
    "A toggle with a score on 64 facts and predictions, on the pocket model."
    from subnet_explorer import Space, load, read_facts, split
    model, tok = load("pocket-bert")
    space = Space.of(model, "head+mlp")
    masks = Masks([(dict(seed=s), Mask.random(space, .75, seed=s)) for s in range(5)])
    ui = explore(masks, (model, tok), split(read_facts("pocket")).test)
    _ = ui.widget                                                    # made when it is asked for
    ui.toggle(1, 1)
    units = iter([(layer, head) for layer in range(1, 5) for head in range(1, 5)])
    return {"masks": "5, with pocket-bert", "toggle": timed(lambda: ui.toggle(*next(units)), 15)}


def shown(row: dict[str, Any], column: str) -> str:
    if column not in row: return ""
    return row[column] if column == "masks" else f"{row[column]:,.0f}"


def main() -> None:
    "Measure and print a table."
    argparse.ArgumentParser(description=__doc__).parse_args()
    masks_alone(20, False)                                           # imports
    rows = [masks_alone(200, False), masks_alone(1000, False), masks_alone(1000, True), with_a_model()]
    columns = list(rows[0])
    print("Milliseconds; the open tab is drawn anew by every action.\n")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows: print(f"| {' | '.join(shown(row, c) for c in columns)} |")


if __name__ == "__main__": main()
