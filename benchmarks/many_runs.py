"How long thousands of runs take: python benchmarks/many_runs.py (--quick: a tenth of them; --place: on which disk)."
from __future__ import annotations

import argparse
import shutil
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from subnet_explorer import Run, Store
from subnet_explorer.cli import show
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.space import unit_space
from subnet_explorer.look.site import publish
from subnet_explorer.recipes.start import already
from subnet_explorer.recipes.study import Bench, Study, labelled_cells, recipe

SPACE = unit_space(12, 12)
SETTINGS = {f"setting{i}": 1.5 * i for i in range(30)}      # as long as those of a search


def best(act: Callable[[], Any], times: int = 5) -> float:
    "Seconds of the quickest of several calls."
    found = []
    for _ in range(times):
        start = time.perf_counter()
        act()
        found.append(time.perf_counter() - start)
    return min(found)


@contextmanager
def folder(place: str | None) -> Iterator[Path]:
    "A folder on a disk, which is gone afterwards."
    made = Path(tempfile.mkdtemp(dir=place))
    try: yield made
    finally: shutil.rmtree(made)


def write_run(store: Store, labels: dict[str, Any]) -> None:
    "What a cell does that does nothing: one run with one line and one mask."
    config = {**SETTINGS, **labels}
    run = Run(store.path(labels, config), config, labels)
    if run.done: return
    run.log(step=1, loss=.5)
    run.finish(Mask.random(SPACE, .5, seed=labels["seed"]))


def cells_of(n: int) -> list[dict[str, Any]]:
    "Labels of n runs, of a hundred tasks."
    return labelled_cells(task=[f"t{i}" for i in range(100)], seed=range(n // 100))


class ToyStudy(Study):
    "A study of nothing."

    def summary(self) -> pd.DataFrame:
        "How many masks a task has."
        return self.tables["runs"].groupby("task", sort=False).count()


@recipe("Nothing", "Nobody, never")
def nothing(*, n: int, to: str | Path | None = None, progress: bool = False) -> ToyStudy:
    "Write n small runs."
    bench, cells = Bench({"recipe": "nothing", "n": n}, to, progress), cells_of(n)
    assert bench.store is not None
    store = bench.store
    bench.work("runs", cells, lambda labels: write_run(store, labels))
    masks = store.masks()
    found = ToyStudy(masks=masks, tables={"runs": pd.DataFrame(cells)}, config=bench.config, model_name="none",
                     seconds=bench.seconds, folder=bench.folder)
    return bench.finished(found)


def cells(n: int, place: Path) -> Iterator[str]:
    "What a study of n cells costs, the first time and when it is finished."
    start = time.perf_counter()
    study = nothing(n=n, to=place)
    yield f"a study of {n:,} cells: {1000 * (time.perf_counter() - start) / n:.2f} ms a cell"
    yield f"the same when it is finished: {best(lambda: nothing(n=n, to=place), 3):.1f} s with results.json"
    first = best(lambda: study.mask_files("task", "seed"), 1)
    yield f"its mask files by labels: {first:.2f} s, then {best(lambda: study.mask_files('task', 'seed')):.2f} s"
    yield f"its summary: {best(study.summary):.3f} s"
    yield f"what --dry-run says of it: {best(lambda: already(place), 3):.2f} s"


def store(place: Path) -> Iterator[str]:
    "What a store costs; its runs are those of the study."
    store = Store(place / "runs")
    (place / "runs" / ".index.json").unlink(missing_ok=True)
    yield f"all runs read, without an index: {best(lambda: store.runs(task='t5'), 1):.2f} s"
    asked: dict[str, Callable[[], Any]] = {
        "runs(task=…)": lambda: Store(place / "runs").runs(task="t5"),
        "masks(task=…)": lambda: Store(place / "runs").masks(task="t5"),
        "iterated": lambda: list(Store(place / "runs")),
        "repr": lambda: repr(Store(place / "runs")),
        "broken": lambda: Store(place / "runs").broken,
        "path of a run that is there": lambda: store.path({"task": "t5", "seed": 0}, {**SETTINGS, "task": "t5",
                                                                                       "seed": 0}),
        "path of a new run": lambda: store.path({"task": "new", "seed": 0}, {}),
    }
    yield "; ".join(f"{name} {best(act):.3f} s" for name, act in asked.items())
    tracemalloc.start()
    kept = store.runs(task="t5")
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    yield f"memory of runs(task=…): {peak / 2**20:.0f} MB at most, {now / 2**20:.1f} MB after ({len(kept)} runs)"
    yield f"subnet-explorer show: {best(lambda: show(str(place)), 1):.1f} s"


def site(n: int, place: Path) -> Iterator[str]:
    "What the site of n runs costs."
    nothing(n=n, to=place)
    yield f"the site of {n:,} runs: {best(lambda: publish(place), 1):.1f} s"
    yield f"the same once more: {best(lambda: publish(place), 3):.2f} s"


def main() -> None:
    "Measure and print what it takes."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of it")
    parser.add_argument("--place", help="a folder on the disk to be measured, e.g. /dev/shm for none")
    given = parser.parse_args()
    part = 10 if given.quick else 1
    warnings.simplefilter("error")
    with folder(given.place) as place:
        for line in cells(10_000 // part, place): print(line, flush=True)
        for line in store(place): print(line, flush=True)
    with folder(given.place) as place:
        for line in site(1_000 // part, place): print(line, flush=True)


if __name__ == "__main__": main()
