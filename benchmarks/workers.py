"Two processes against one, and both against the forecast: python benchmarks/workers.py (--quick: a few steps)."
from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")      # before torch: a core for each process

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

from subnet_explorer import load, read_facts, recipes
from subnet_explorer.core.cells import AtCell
from subnet_explorer.core.workers import engine
from subnet_explorer.recipes.forecast import forecast
from subnet_explorer.recipes.study import Bench

SEEDS = (0, 1, 2)


def study(folder: Path, steps: int) -> tuple[Any, float]:
    "LAMP on sixteen relations and three seeds, and how long it took; what is measured of the masks is left small."
    model, tok = load("pocket-bert")
    facts = read_facts("pocket")
    began = time.perf_counter()
    made = recipes.lamp(model, tok, facts, steps=steps, seeds=SEEDS, random=1, mismatched=False, to=folder,
                        progress=False)
    return made, time.perf_counter() - began


def timed_cells(folder: Path, steps: int) -> tuple[Any, float, list[float]]:
    "The same by one process, and how long each cell took."
    times: list[float] = []
    usual = AtCell.__call__

    def timed(self: Any, labels: Any) -> Any:
        began = time.perf_counter()
        outcome = usual(self, labels)
        times.append(time.perf_counter() - began)
        return outcome

    AtCell.__call__ = timed      # type: ignore[method-assign]
    try: made, seconds = study(folder, steps)
    finally: AtCell.__call__ = usual      # type: ignore[method-assign]
    return made, seconds, times


def overhead(folder: Path | None, n: int = 2000) -> float:      # milliseconds
    "What the list of work takes for a cell that does nothing."
    bench, cells = Bench({"recipe": "lamp"}, folder, False), [{"n": i} for i in range(n)]
    began = time.perf_counter()
    bench.work("cell", cells, lambda labels: labels["n"])
    return 1000 * (time.perf_counter() - began) / n


def main() -> None:
    "Measure and print."
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--quick", action="store_true")
    steps = 20 if given.parse_args().quick else 400
    with tempfile.TemporaryDirectory() as place:
        one, alone, times = timed_cells(Path(place, "one"), steps)
        with engine(jobs=2):
            study(Path(place, "warm"), 1)      # the processes start, import and load
            two, both = study(Path(place, "two"), steps)
        assert [m.id for _, m in one.masks] == [m.id for _, m in two.masks]
        cells = pd.DataFrame({"seconds": [sum(times), both - (alone - sum(times))]}, index=["one", "two"])
        rest = alone - sum(times)
        said = forecast(len(times), sum(times) / len(times), (1, 2), start=0.0, load=0.0, finish=rest)
        print(pd.DataFrame({"processes": [1, 2], "measured, s": [alone, both], "forecast, s": said.seconds.tolist(),
                            "times as fast": [1.0, alone / both]}).round(2).to_string(index=False))
        print(f"searches alone: {cells.seconds.one:.1f} s by one, {cells.seconds.two:.1f} s by two, "
              f"{cells.seconds.one / cells.seconds.two:.2f} times as fast; measured by the caller after: {rest:.1f} s")
        print(f"work list: {overhead(None):.3f} ms a cell in memory, {overhead(Path(place, 'list')):.2f} in a folder")


if __name__ == "__main__": main()
