"A method from a package beside the library: it is a command like any other, and two of one name are refused."
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

METHOD = '''
"A method in a package of its own."
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from subnet_explorer.core.masks import Masks
from subnet_explorer.core.space import Space
from subnet_explorer.data.facts import Facts, read_facts
from subnet_explorer.measure.ask import cloze
from subnet_explorer.recipes.study import Bench, Study, labelled_cells, recipe
from subnet_explorer.search.find import find
from subnet_explorer.search.gates import Threshold
from subnet_explorer.search.objectives import Cloze


class Guesses(Study):
    "What `guess` found."

    def summary(self) -> pd.DataFrame:
        "Share of right answers by condition."
        return self.tables["answers"].groupby("under", sort=False).right.mean().to_frame()


def read(model: nn.Module, tok: Any, *,
    facts: str,               # a file, or "pocket"
    relation: str = "MadeOf", # what is asked
) -> Mapping[str, Any]:
    "Read the facts."
    return {"facts": read_facts(facts, relation)}


@recipe("Hasty subnetworks", "nobody 2026", read=read, pocket={"lr": 0.05})
def guess(
    model: nn.Module,
    tok: Any,
    facts: Facts,
    *,
    steps: int = 3,                   # hardly any
    lr: float = 0.01,                 # of the logits
    seeds: Sequence[int] = (0, 1),    # of the gate
    to: str | Path | None = None,     # folder
    progress: bool = True,
) -> Guesses:
    "Search far too briefly."
    space, cache = Space.of(model, "head"), {}
    config = {"recipe": "guess", "model": str(space.model), "facts": facts.fingerprint, "steps": steps, "lr": lr}
    bench = Bench(config, to, progress)

    def search(labels: dict[str, Any]) -> Any:
        gate = Threshold(space, 0.5, seed=labels["seed"])
        return find(model, tok, gate, Cloze(facts), steps=steps, lr=lr, seed=labels["seed"], to=bench.store,
                    labels=labels, cache=cache, progress=bench.line)

    cells = labelled_cells(seed=seeds)
    masks = Masks([(run.labels, run.mask) for run in bench.work("guess", cells, search)])

    def ask() -> pd.DataFrame:
        under = {"full": None, **{f"seed {labels['seed']}": mask for labels, mask in masks}}
        answers = cloze(model, tok, facts, under)
        return answers.assign(right=answers["rank"] == 1)[["under", "uuid", "right"]]

    return bench.finished(Guesses(
        masks=masks, tables={"answers": bench.table("answers", ask)}, config=bench.config,
        model_name=space.model.name, seconds=bench.seconds, folder=bench.folder,
    ))
'''


def install(folder: Path, package: str) -> Path:
    "A package as pip leaves it: a module, and a folder with its metadata."
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{package}.py").write_text(METHOD)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[subnet_explorer.recipes]\n{package} = {package}\n")
    return folder


def shell(cwd: Path, *words: object) -> subprocess.CompletedProcess[str]:
    "The command, with the packages of a folder installed beside the library."
    here = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(cwd / "packages"), str(here), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "subnet_explorer", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=500, check=False)


def state(folder: Path) -> dict[str, int]:
    "When every file was written."
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


CALL = ("guess", "--model", "pocket-bert", "--facts", "pocket", "--device", "cpu", "--quiet", "--out", "out")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder with the package, and the answer to the command given there."
    folder = tmp_path_factory.mktemp("outside")
    install(folder / "packages", "guesses")
    return folder, shell(folder, *CALL, "--json")


def test_it_has_help_from_its_signature(made):
    process = shell(made[0], "guess", "--help")
    assert process.returncode == 0, process.stderr
    for said in ("Search far too briefly. nobody 2026", "--relation", "hardly any", "--seeds"):
        assert said in process.stdout


def test_it_writes_what_every_study_has(made):
    folder, process = made
    assert process.returncode == 0, process.stderr
    said, out = json.loads(process.stdout), folder / "out"
    written = json.loads((out / "results.json").read_text())
    assert {name: value for name, value in written.items() if name not in ("files", "checksum")} == said
    assert set(written["files"]) == {file.name for file in out.glob("*.csv")}
    assert said["config"]["recipe"] == "guess" and said["config"]["lr"] == 0.05
    assert [row["under"] for row in said["summary"]] == ["full", "seed 0", "seed 1"]
    assert set(pd.read_csv(out / "answers.csv").under) == {"full", "seed 0", "seed 1"}
    page = (out / "report.html").read_text()
    assert "Hasty subnetworks of pocket-bert" in page
    assert len(list(out.glob("runs/*/mask.safetensors"))) == 2


def test_given_again_it_does_nothing_anew(made):
    folder, _ = made
    before = state(folder / "out")
    process = shell(folder, *CALL, "--no-report")
    after = state(folder / "out")
    assert process.returncode == 0, process.stderr
    changed = {name for name in after if after[name] != before.get(name)}
    assert set(after) == set(before) and changed <= {"results.json", "answers.csv"}
    more = shell(folder, *CALL, "--no-report", "--seeds", "0,1,2")
    assert more.returncode == 0, more.stderr
    grown = {name for name in state(folder / "out") if name.endswith("mask.safetensors")}
    assert len(grown) == 3 and all(state(folder / "out")[name] == before[name] for name in grown & set(before))


@pytest.mark.parametrize("words", [CALL, ("guess", "--help")], ids=["the command", "its help"])
def test_two_packages_with_one_name_are_refused(tmp_path, words):
    for package in ("guesses", "more_guesses"): install(tmp_path / "packages", package)
    process = shell(tmp_path, *words)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("subnet-explorer: TwoRecipes: ") and process.stderr.count("\n") == 1
    assert "guesses.guess" in process.stderr and "more_guesses.guess" in process.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"packages"}
