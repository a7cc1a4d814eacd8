"""Studies of a second or two, by all recipes, each in a child of one process that has read models and data already.

Model and data are those of the pocket, but two layers and a few dozen sentences; states are written after every step.
"""
from __future__ import annotations

import functools
import importlib
import inspect
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from floors import any_floor

from subnet_explorer.cli import main, ordered
from subnet_explorer.core import cells, folders
from subnet_explorer.core.errors import SubnetError
from subnet_explorer.data.facts import read_facts
from subnet_explorer.data.texts import read_texts
from subnet_explorer.model import load as loading
from subnet_explorer.recipes.study import all_recipes
from subnet_explorer.search import loop
from subnet_explorer.search.find import find
from subnet_explorer.tasks.fit import fit

PLACE = ["--device", "cpu", "--no-report", "--quiet", "--out", "study"]
BERT = ["--model", "pocket-bert", *PLACE]
GPT2 = ["--model", "pocket-gpt2", *PLACE]
COMMANDS: dict[str, list[str]] = {
    "lamp": ["lamp", *BERT, "--facts", "pocket", "--relations", "MadeOf,Desires", "--layers", "2", "--seeds", "0,1",
             "--steps", "8", "--batch", "4", "--random", "1"],
    "tickets": ["tickets", *BERT, "--tasks", "pocket:entails", "--seeds", "0,1", "--epochs", "1", "--batch", "16",
                "--limit-train", "48", "--limit-test", "16", "--search", "0.02", "--drop", "0.4"],
    "critical": ["critical", *GPT2, "--target", "target.tsv", "--control", "control.tsv", "--text", "text.txt",
                 "--layers", "2", "--seeds", "0,1", "--steps", "6", "--checks", "2", "--random", "1"],
    "probe": ["probe", *BERT, "--task", "pos", "--train", "pocket", "--dev", "pocket", "--limit-train", "16",
              "--limit-dev", "8", "--granularity", "neuron", "--lambdas", "1", "--ranks", "4", "--steps", "5",
              "--lr", "0.5", "--batch", "4", "--baselines", "mlp,reset,control"],
    "tamt": ["tamt", *BERT, "--text", "text.txt", "--densities", "0.995", "--methods", "omp,imp,kd",
             "--no-embeddings", "--steps", "4", "--interval", "2", "--lr", "0.005", "--batch", "4",
             "--snapshots", "1", "--tasks", "pocket:entails", "--limit-train", "16", "--limit-test", "8",
             "--tuning.epochs", "1", "--tuning-seeds", "0"],
}
"The command of every study; what it writes is in the folder `study` of the current one."


# ── the parent ───────────────────────────────────────────────────────────────────────────────────────────────────────

def make_smaller(names: list[str]) -> None:
    "Let studies have one seed."
    for name in names: COMMANDS[name] = ["0" if word == "0,1" else word for word in COMMANDS[name]]


def get_ready(names: list[str], place: Path) -> None:
    "Load models and read data, once and for all children."
    torch.set_num_threads(1)
    place.mkdir(parents=True, exist_ok=True)
    os.chdir(place)
    _write_inputs()
    needed = {COMMANDS[name][COMMANDS[name].index("--model") + 1] for name in names}
    models = {name: cut(*loading.load(name)) for name in sorted(needed)}
    loading.load = lambda name, **how: models[str(name)]
    for door in (find, fit): _defaults(door)["checkpoint"] = 0.0
    any_floor(pytest.MonkeyPatch())
    _keep_data(names)
    _observe()


def _defaults(door: Callable[..., Any]) -> dict[str, Any]:
    found = inspect.unwrap(door).__kwdefaults__
    assert found is not None
    return found


def cut(model: Any, tok: Any, layers: int = 2) -> tuple[Any, Any]:
    "A model with fewer layers."
    if hasattr(model, "bert"):
        model.bert.encoder.layer = model.bert.encoder.layer[:layers]
        model.config.num_hidden_layers = layers
    else:
        model.transformer.h = model.transformer.h[:layers]
        model.config.n_layer = layers
    return model, tok


def _write_inputs() -> None:
    "The small files that the commands read."
    facts = list(read_facts("pocket"))
    birds = [f for f in facts if f.obj == "bird"][:3]
    rest = [*birds[:1], *[f for f in facts if f.obj != "bird"][::200]]
    for name, some in (("target.tsv", birds), ("control.tsv", rest)):
        Path(name).write_text("".join(f"{f.relation}\t{f.sub}\t{f.obj}\n" for f in some), encoding="utf-8")
    Path("text.txt").write_text("\n".join(read_texts("pocket")[:60]) + "\n", encoding="utf-8")


def _keep_data(names: list[str]) -> None:
    "Let every recipe read its data now, and never again."
    recipes = all_recipes()
    for name in names:
        read = recipes[name].read
        assert read is not None
        recipes[name] = replace(recipes[name], read=_once(read))
        order = ordered(name, COMMANDS[name][1:])
        kept, values = order.recipe.read, order.values
        assert kept is not None
        asked = {k: values[k] for k in inspect.signature(read).parameters if k in values and k != "model"}
        kept(*loading.load(values["model"]), **asked)


def _once(read: Callable[..., Any]) -> Callable[..., Any]:
    "A function that gives its first answer ever after."
    known: list[Any] = []

    @functools.wraps(read)
    def call(*given: Any, **named: Any) -> Any:
        if not known: known.append(read(*given, **named))
        return dict(known[0])
    return call


# ── what children tell ───────────────────────────────────────────────────────────────────────────────────────────────

_TOLD: list[int] = []      # the file to which this child tells


def tell(**event: Any) -> None:
    "Add a line to the events of a trial."
    if _TOLD: os.write(_TOLD[0], (json.dumps({"process": os.getpid(), **event}) + "\n").encode())


def events(folder: Path) -> list[dict[str, Any]]:
    "What children of a trial told."
    file = folder / "events"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _observe() -> None:
    "Let trainings, cells and tables tell when they begin and end."
    go, work, make = loop.Loop.go, cells.AtCell.__call__, folders.cached_table

    def told_go(self: Any) -> None:
        run = None if self.run.folder is None else str(self.run.folder)
        first = self.step
        tell(what="training", run=run, at=first)
        try: go(self)
        except BaseException:
            tell(what="stopped", run=run, at=self.step)
            raise
        tell(what="trained", run=run, first=first, at=self.step)

    def told_work(self: Any, labels: Any) -> Any:
        outcome = work(self, labels)
        if outcome.wrote: tell(what="cell", name=cells.name_of(self.what, labels))
        return outcome

    def told_table(to: Any, name: str, made: Any) -> Any:
        def told() -> Any:
            table = made()
            tell(what="table", name=name)
            return table
        return make(to, name, told)

    loop.Loop.go = told_go                         # type: ignore[method-assign]
    cells.AtCell.__call__ = told_work              # type: ignore[method-assign]
    for module in list(sys.modules.values()):
        if getattr(module, "cached_table", None) is make: module.cached_table = told_table      # type: ignore


# ── children ─────────────────────────────────────────────────────────────────────────────────────────────────────────

FINE, REFUSED, RAW = 0, 3, 70
"How a child ends: well, with a named error, with any other."


class Child:
    "A process that works in a folder."

    def __init__(self, folder: Path, do: Callable[[], Any], at: float = 0.0) -> None:      # at: when, by the clock
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.status: int | None = None
        sys.stdout.flush()
        self.process = os.fork()
        if not self.process: _live(folder, do, at)

    def wait(self, seconds: float) -> int | None:
        "The status, negative for a signal; None if it is not over after so many seconds."
        until = time.monotonic() + seconds
        while self.status is None:
            done, status = os.waitpid(self.process, os.WNOHANG)
            if done: self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= until: return None
            else: time.sleep(0.002)
        return self.status

    def signal(self, number: int) -> None:
        "Send a signal."
        if self.status is None: os.kill(self.process, number)

    def kill(self) -> bool:
        "Kill it; whether it was still there."
        self.signal(signal.SIGKILL)
        return self.wait(60) == -signal.SIGKILL

    @property
    def said(self) -> str: return (self.folder / f"said-{self.process}").read_text(errors="replace")


def _live(folder: Path, do: Callable[[], Any], at: float) -> None:
    "Work, and end."
    status = RAW
    try:
        os.chdir(folder)
        out = os.open(f"said-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for number in (1, 2): os.dup2(out, number)
        for name in (signal.SIGTERM, signal.SIGHUP): signal.signal(name, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _TOLD[:] = [os.open("events", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)]
        if at: time.sleep(max(0.0, at - time.monotonic()))
        status = _status(do)
    except BaseException: os.write(2, traceback.format_exc().encode())
    finally: os._exit(status)


def _status(do: Callable[[], Any]) -> int:
    try: found = do()
    except SubnetError as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        return REFUSED
    return found if isinstance(found, int) else FINE


def study(name: str) -> None:
    "Make a study as the command does, but for what it prints."
    ordered(name, COMMANDS[name][1:]).run()
    tell(what="modules", names=sorted(sys.modules))


def take_over(folder: Path) -> None:
    "Import what a child had to import, so that later ones need not."
    for event in events(folder):
        for name in event.get("names", ()):
            with suppress(Exception): importlib.import_module(name)


def command(name: str) -> int:
    "The whole command, with what it prints."
    with redirect_stdout(io.StringIO()): return main(COMMANDS[name])
