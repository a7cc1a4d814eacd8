"What was saved before the library had folders: every later version opens it, and does none of it again."
from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pytest
import torch
from fixtures.make_earlier import EARLIER, described, searches

from subnet_explorer import Mask, Run, Store
from subnet_explorer.cli import main
from subnet_explorer.data import pocket_tasks
from subnet_explorer.data.grammar import WORDS
from subnet_explorer.recipes.study import SMALL, without_places

EXPECTED = json.loads((EARLIER / "expected.json").read_text(encoding="utf-8"))
EARLIER_COMMANDS, RESULTS, RUNS = EXPECTED["commands"], EXPECTED["results"], EXPECTED["runs"]
STEPS = [(torch.Tensor, "backward"), (torch.optim.Adam, "step"), (torch.optim.AdamW, "step")]


NEW_NAMES: dict[str, dict[str, list[str]]] = {
    "lamp": {},
    "tickets": {"--task": ["--tasks"], "--train": ["--limit-train"], "--test": ["--limit-test"]},
    "critical": {},
    "probe": {"--lambda": ["--lambdas"], "--limit": ["--limit-train"]},
    "tamt": {"--density": ["--densities"], "--limit": ["--limit-train"], "--test": ["--limit-test"],
             "--tune-epochs": ["--tuning.epochs"]},
}
"How options are called that had another name when the folder was made, by command."


def as_said_now(words: list[str]) -> list[str]:
    "A command of that time with the names that options have now."
    names = NEW_NAMES[words[0]]
    return [word for old in words for word in names.get(old, [old])]


COMMANDS = {name: as_said_now(words) for name, words in EARLIER_COMMANDS.items()}
NEW_TABLES = {
    "tickets/steps.csv", "critical/curves.csv", "critical/left_out.csv",
    "tamt/curves.csv", "tamt/transfer.csv", "tamt/distances.csv", "tamt/jaccard_by_step.csv",
    "tickets/baselines.csv", "tamt/baselines.csv",
    *(f"{name}/runs/.index.json" for name in COMMANDS),
}
"What is now written beside the tables of that time."
KEPT_TABLES = re.compile(r"(tickets|tamt)/(tables/baselines-.*|sessions/.*)\.json")
"Tables that are now kept in the folder of a study, and the time that they took."
NEW_RESULTS = {"baselines", "notes", "left_out", "kept", "files", "checksum", "departures", "stability",
               "chosen", "chosen_on", "reported_on", "target", "weights", "bag_of_words",
               "by_task", "jaccard_by_step"}
"What `results.json` now says besides."
OTHERWISE = {"gains", "low", "high", "p_at_1_interval", "chance"}
"What is now computed otherwise: intervals of the crossed design, corrected p-values, exact chance."
NEW_COLUMNS = {"density_weights", "density_model"}
"What tables now say besides."


SMALL_PARTS = {"lamp", "critical", "tamt", "probe"}
"Studies whose test part is now said to be small."


class Trained(Exception):
    "Something was trained."


@pytest.fixture
def earlier(tmp_path, monkeypatch) -> Path:
    "A copy of the folder, as the current one: paths inside are relative to it."
    shutil.copytree(EARLIER, tmp_path / "earlier")
    monkeypatch.chdir(tmp_path / "earlier")
    return tmp_path / "earlier"


@pytest.fixture
def untrained(monkeypatch) -> None:
    "No gradient, and no step of an optimizer."
    def refuse(*args: Any, **kw: Any) -> NoReturn: raise Trained
    for owner, name in STEPS: monkeypatch.setattr(owner, name, refuse)


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    "Content and time of every file."
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def check_alike(got: Any, wanted: Any, where: str = "results") -> None:
    "The same keys on all levels, but for those that are new, and the same values but for the last digits of numbers."
    if isinstance(wanted, dict):
        assert isinstance(got, dict) and set(got) - NEW_RESULTS <= set(wanted) <= set(got), where
        for key in set(wanted) - OTHERWISE: check_alike(got[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list):
        assert isinstance(got, list) and len(got) == len(wanted), where
        for i, pair in enumerate(zip(got, wanted, strict=True)): check_alike(*pair, f"{where}[{i}]")
    elif isinstance(wanted, float): assert got == pytest.approx(wanted, rel=1e-3, abs=1e-5), where
    else: assert type(got) is type(wanted) and got == wanted, where


def read(path: Path) -> pd.DataFrame:
    "A table, in which numbers of a list may be written as NumPy's or as Python's."
    text = path.read_text(encoding="utf-8")
    return pd.read_csv(StringIO(re.sub(r"np\.float64\((.*?)\)", r"\1", text)))


def check_table(name: str) -> None:
    "The same table as before. Words that are nearly tied may be ranked the other way round by another machine."
    got, wanted = read(Path(name)), read(EARLIER / name)
    wanted = wanted.map(lambda value: without_places(value, Path(name).parent))
    ranks = [c for c in wanted if c in ("rank", "filtered")]
    got = got.drop(columns=[c for c in got if c in NEW_COLUMNS and c not in wanted])
    assert list(got) == list(wanted) and len(got) == len(wanted)
    np.testing.assert_allclose(got[ranks], wanted[ranks], atol=1)
    pd.testing.assert_frame_equal(got.drop(columns=ranks), wanted.drop(columns=ranks), rtol=1e-3, atol=1e-4)


def ids(folder: str) -> set[str]:
    "Masks of the runs in a folder, as they were."
    return {told["mask"] for path, told in RUNS.items() if path.startswith(f"{folder}/")}


# ── opened ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_every_run_opens(earlier):
    before = state(earlier)
    assert {p.parent.relative_to(earlier).as_posix() for p in earlier.rglob("config.json")} == set(RUNS)
    for path, told in RUNS.items(): assert described(Run.open(path)) == told, path
    assert state(earlier) == before


def test_mask_files_open(earlier):
    for path, told in RUNS.items():
        assert Mask.load(f"{path}/mask.safetensors").id == told["mask"]
        for step, mask in told["snapshots"].items():
            assert Mask.load(f"{path}/snapshots/{int(step):08d}.mask.safetensors").id == mask


@pytest.mark.parametrize("folder", ["store", *(f"{name}/runs" for name in COMMANDS)])
def test_a_folder_of_runs_opens(earlier, folder):
    store, told = Store(folder), {path: t for path, t in RUNS.items() if path.startswith(f"{folder}/")}
    assert len(list(store)) == len(told) and all(run.done for run in store)
    assert set(store.masks().table().id) == ids(folder)
    for t in told.values(): assert t["mask"] in set(store.masks(**t["labels"]).table().id)


def test_what_stands_beside_a_mask(earlier):
    soft, plain = Store("store").runs(task="tags")[0], Store("store").runs(task="MadeOf")[0]
    assert soft.soft is not None and plain.soft is None and soft.subnetwork is soft.soft
    values = np.concatenate([v.ravel() for v in soft.soft.values.values()])
    assert values.size == soft.mask.space.size and 0 < values.min() < values.max() <= 1
    assert plain.metrics.step.tolist() == [2, 4, 6] and np.isfinite(plain.metrics.loss).all()
    assert (plain.snapshots.table().step.tolist(), plain.snapshots.table().task.tolist()) == ([0, 3], ["MadeOf"] * 2)


def test_the_command_shows_it(earlier, capsys):
    assert main(["show", "store", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {run["id"] for run in shown["runs"]} == {t["id"] for p, t in RUNS.items() if p.startswith("store/")}


# ── gone on with ─────────────────────────────────────────────────────────────────────────────────────────────────────

def test_the_same_searches_have_nothing_left_to_do(earlier, untrained):
    before = state(earlier)
    for run in searches(Store("store")).values(): assert described(run) == RUNS[run.folder.as_posix()]
    assert state(earlier) == before


def entails(rng: Any, rows: Any, filler: Any) -> Iterator[tuple[list[str], str]]:
    "The pairs of that time, whose second text said much about the label."
    for good in range(2): yield entails_pair(rng, good, rows, filler)


def entails_pair(rng: Any, good: int, rows: Any, filler: Any) -> tuple[list[str], str]:
    label = "entailment" if good else "not_entailment"
    while rng.random() < 0.5:
        words, kind = filler(), rng.choice(["CITY", "THING", "TIME"])
        if any(word.slot == kind for word in words) == bool(good):
            return [" ".join(word.form for word in words), f"there is a {kind.lower()} ."], label
    known = [r for r in rows if r["pred"] == "IsA" and r["obj_label"] in pocket_tasks._DISJOINT_KINDS]
    row = rng.choice(known)
    kind = row["obj_label"]
    if not good: kind = rng.choice([r["obj_label"] for r in known if r["obj_label"] != row["obj_label"]])
    name, verb = rng.choice(WORDS["NAME"]), rng.choice(WORDS["VT"])
    preposition, place = rng.choice(WORDS["PREP"]), rng.choice(WORDS["PLACE"])
    sentence = f"{name} {verb} {row['sub_phrase']} {preposition} the {place} ."
    return [sentence, f"there is a kind of {kind} ."], label


@pytest.mark.parametrize("study", COMMANDS)
def test_the_same_command_has_nothing_left_to_do(earlier, untrained, study, monkeypatch):
    monkeypatch.setitem(pocket_tasks._EXAMPLES, "entails", entails)
    before = state(earlier)
    assert main(COMMANDS[study]) == 0
    after = state(earlier)
    tables = {path for path in before if Path(path).parent == Path(study) and path.endswith(".csv")}
    written = {f"{study}/results.json", *tables}
    new = {path for path in set(after) - set(before) if not KEPT_TABLES.fullmatch(path)}
    assert new <= NEW_TABLES and set(before) <= set(after)
    assert {p for p in before if after[p] != before[p]} <= written
    results = json.loads(Path(study, "results.json").read_text())
    assert isinstance(results.pop("seconds"), float)
    small = [note for note in results.get("notes", []) if note.startswith(SMALL)]
    assert len(small) == (study in SMALL_PARTS)
    if small: results["notes"] = [note for note in results["notes"] if note not in small]
    check_alike(results, without_places(RESULTS[study], study))      # masks by where they lie in the study
    for table in tables: check_table(table)


def test_something_new_would_be_noticed(earlier, untrained):
    with pytest.raises(Trained): searches(Store("new"))
    for study in ("lamp", "tamt"):
        with pytest.raises(Trained): main([*COMMANDS[study], "--out", f"new-{study}"])
