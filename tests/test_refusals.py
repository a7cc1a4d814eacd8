"What a shell can say and where it can stand: every answer is a result or a named error, never a traceback."

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import subnet_explorer
from subnet_explorer import Mask, Run, Store, explore
from subnet_explorer.cli import main
from subnet_explorer.core import files
from subnet_explorer.core.errors import SubnetError, UnknownName, check_names
from subnet_explorer.core.files import CannotWrite, atomic_write
from subnet_explorer.core.folders import kept_masks, open_study
from subnet_explorer.core.maskfile import MaskFileError
from subnet_explorer.core.numbers import bounded, check_number
from subnet_explorer.core.space import unit_space
from subnet_explorer.look.state import collected
from subnet_explorer.recipes.start import recipe_options, recipe_parser
from subnet_explorer.recipes.study import all_recipes, recipe

NUMBERS = ["0", "-1", "-3", "1", "2", "7", "0.5", "1.5", "50", "nan", "inf", "-inf", "1e-3", "1" + 20 * "0", "abc", ""]
LISTS = ["0,0", "0,1", "-1", "[]", "1,abc", "0.5,0.3", "2,3", "250,0", "a=1", "a=-1", "suppress=nan", "arc=0", "[1"]
WORDS = ["pocket", "weight", "example", "nowhere", "", "-", "a,b", "naïve", "7-12", "true", "no", "{}", "[", "a: b"]


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        capsys.readouterr()
        return main(list(words)), *capsys.readouterr()

    return run


def combinations(n: int) -> list[list[str]]:
    "Command lines of all recipes: what must be said, and a few more options with good and bad values."
    rng, made = random.Random(0), []
    recipes = [(name, recipe_options(one)) for name, one in all_recipes().items()]
    for k in range(n):
        name, options = recipes[k % len(recipes)]
        words = [name, "--print-config", "--model", "pocket-bert", "--out", "out"]
        for option in rng.sample(options, rng.randint(1, 4)):
            if option.flag in ("--model", "--out"): continue
            if option.type is bool: words.append(rng.choice([option.flag, f"--no-{option.flag[2:]}"]))
            else: words += [f"{option.flag}={rng.choice(NUMBERS + LISTS + WORDS)}"]
        made.append(words)
    return made


def test_five_hundred_command_lines_are_answered_or_refused(call, monkeypatch):
    parsers = {name: recipe_parser(one) for name, one in all_recipes().items()}
    monkeypatch.setattr("subnet_explorer.recipes.start.recipe_parser", lambda one: parsers[one.name])
    said = []
    for words in combinations(500):
        status, out, err = call(*words)
        said.append(status)
        assert status in (0, 2) and "Traceback" not in err and (bool(out) != bool(err)), (words, err)
        if status: assert err.startswith("subnet-explorer: ") and err.count("\n") == 1, (words, err)
    assert {0, 2} == set(said) and not list(Path().iterdir())


@pytest.mark.parametrize("words, says", [
    (["lamp", "--random=-1"], "--random must be a whole number of at least 0, got -1"),
    (["lamp", "--sparsity", "1.5"], "--sparsity must be a number above 0 and below 1, got 1.5."),
    (["lamp", "--sparsity", "50"], "did you mean 0.5?"),
    (["lamp", "--seeds", "0,0"], "different numbers, at least one"),
    (["lamp", "--seeds", "1" + 20 * "0"], "--seeds must be"),
    (["lamp", "--seeds", "[]"], "at least one"),
    (["tickets", "--drop", "0"], "--drop must be a number above 0"),
    (["tickets", "--longer", "abc"], "cannot read the longer 'abc'"),
    (["tickets", "--limit-train=-3"], "--limit-train must be a whole number of at least 1, got -3"),
    (["critical", "--checks", "0"], "--checks must be a whole number of at least 1, got 0"),
    (["critical", "--weights", "suppress=-1"], "each a number of at least 0"),
    (["probe", "--lambdas=-1"], "each a number of at least 0"),
    (["probe", "--head-lr", "0"], "--head-lr must be a positive number, got 0.0"),
    (["tamt", "--clip", "0"], "--clip must be a positive number"),
])  # fmt: skip
def test_numbers_are_refused_before_anything_is_read(call, words, says):
    status, out, err = call(*words, "--model", "nowhere", "--out", "out")
    assert (status, out) == (2, "") and says in err and not Path("out").exists()


def public_functions():
    "Functions and classes that people call, by name, with the numbers that they say bounds of."
    for name in subnet_explorer.__all__:
        found = getattr(subnet_explorer, name)
        inside = {name: found} if callable(found) else {n: getattr(found, n) for n in dir(found)}
        for each, function in inside.items():
            door = vars(function).get("__init__") if isinstance(function, type) else function
            if callable(door) and hasattr(door, "__wrapped__"): yield each, door


CHECKED = dict(public_functions())


@pytest.mark.parametrize("name", CHECKED)
def test_public_functions_refuse_numbers_out_of_bounds(name):
    function = CHECKED[name]
    for parameter, kind in bounded(function).items():
        for bad in (-1, float("nan"), [-1], [float("nan")]):
            try: check_number(kind, bad, parameter)
            except SubnetError: pass
            else: continue
            with pytest.raises(SubnetError, match=f"^{parameter} must be"): function(**{parameter: bad})


def test_there_are_many_such_functions():
    assert {"find", "fit", "tsne", "lamp", "tickets", "importance", "iterate", "task_data"} <= set(CHECKED)


# ── folders ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_refused_call_takes_no_folder(tmp_path):
    @recipe("A method", "A. Author, 2026")
    def refusing(model, tok, *, drop: float = 0.1, to=None, progress: bool = True):
        "Refuse late."
        open_study(to, {"drop": drop})
        Run(Path(to, "runs", "a"), {"drop": drop})
        if drop > 1: raise SubnetError("too much")

    try:
        with pytest.raises(SubnetError, match="too much"): refusing(None, None, drop=2.0, to=tmp_path / "out")
        refusing(None, None, drop=0.5, to=tmp_path / "out")
        with pytest.raises(SubnetError, match="another study"): refusing(None, None, drop=2.0, to=tmp_path / "out")
    finally:
        all_recipes().pop("refusing")


@pytest.fixture
def kept(tmp_path):
    "A study with two runs, and the folder above it."
    space = unit_space(2, 2)
    open_study(tmp_path / "runs" / "demo", {"recipe": "lamp"})
    store = Store(tmp_path / "runs" / "demo" / "runs")
    for seed in (0, 1):
        Run(store.path({"seed": seed}, {"seed": seed}), {"seed": seed}, {"seed": seed}).finish(
            Mask.random(space, 0.5, seed=seed))
    return tmp_path


@pytest.mark.parametrize("place, masks", [("runs", 2), ("runs/demo", 2), ("runs/demo/runs", 2), ("", 2)])
def test_a_folder_is_read_in_one_way(kept, call, place, masks):
    folder = kept / place
    assert len(kept_masks(folder)) == masks
    assert len(collected(str(folder))) == masks
    status, out, _ = call("show", str(folder), "--json")
    assert status == 0 and len(json.loads(out)["runs"]) == masks
    status, out, _ = call("report", str(folder), "--out", str(kept.parent / f"site-{len(place)}"))
    assert status == 0 and f"{masks} runs" in out


def test_a_folder_that_is_not_there_has_near_names(kept, call):
    for command in ("show", "report", "agreement"):
        status, _, err = call(command, str(kept / "runs" / "demi"))
        assert status == 2 and "there is no folder" in err and "Did you mean" in err and "demo?" in err
    with pytest.raises(SubnetError, match="there is no folder"): explore(str(kept / "runs" / "demi"))


def test_files_that_are_no_masks_say_what_they_are(tmp_path):
    np.save(tmp_path / "a.npy", np.ones(3))
    (tmp_path / "mask.pt").write_bytes(b"PK\3\4" + bytes(100))
    (tmp_path / "half.mask.safetensors").write_bytes(bytes(20))
    for name, says in (("a.npy", "Store.read"), ("mask.pt", "read_mask_state"), ("a.npz", "there is no file"),
                       ("half.mask.safetensors", "truncated"), ("", "it is a folder")):
        with pytest.raises(MaskFileError, match=says): Mask.load(tmp_path / name)


def test_a_suggestion_is_never_the_name_itself():
    with pytest.raises(UnknownName) as refused: check_names(["0"], [0, 1], "label")
    assert "did you mean" not in str(refused.value)


# ── broken places ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number, says", [(28, "no space left"), (13, "permission denied"), (30, "read-only"),
                                          (36, "name too long"), (5, "input/output error"), (122, "quota")])
def test_what_the_disk_refuses_has_a_name(tmp_path, monkeypatch, number, says):
    def refuse(*_, **__): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(CannotWrite, match=f"(?i)cannot write .*a.txt: .*{says}"): atomic_write(tmp_path / "a.txt", "")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(files.os, "fsync", lambda f: None)
    monkeypatch.setattr(files, "_write_new", refuse)
    mask = Mask.full(unit_space(2, 2))
    for write in (lambda: mask.save(tmp_path / "m"), lambda: Run(tmp_path / "run", {}),
                  lambda: open_study(tmp_path / "study", {})):
        with pytest.raises(CannotWrite): write()


@pytest.mark.parametrize("place", ["taken", "taken/deeper", "taken/deeper/still"])
def test_a_file_in_the_way_is_named(tmp_path, place):
    (tmp_path / "taken").write_text("")
    with pytest.raises(CannotWrite, match="taken"): atomic_write(tmp_path / place / "study.json", "{}")
    with pytest.raises(SubnetError, match="taken"): Run(tmp_path / place, {})


class Broken(io.StringIO):
    "A stream that takes nothing."

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text): raise self.error
    def flush(self): raise self.error


@pytest.mark.parametrize("error, status", [(BrokenPipeError(), 141), (OSError(28, "No space left on device"), 2)])
@pytest.mark.parametrize("words", [
    ["--help"], ["--version"], ["doctor"], ["completion", "bash"],
    ["lamp", "--model", "pocket-bert", "--facts", "pocket", "--out", "x", "--print-config"],
])  # fmt: skip
def test_an_output_that_ends_early_stops_nothing(monkeypatch, capsys, error, status, words):
    monkeypatch.setattr(sys, "stdout", Broken(error))
    assert main(words) == status
    assert "Traceback" not in capsys.readouterr().err


def test_an_ascii_terminal_gets_what_it_can_spell(monkeypatch, kept):
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", plain)
    assert main(["show", str(next(kept.rglob("mask.safetensors")))]) == 0
    assert b"Mask(" in plain.buffer.getvalue()


ENVIRONMENTS = {
    "closed pipe": ("{python} -m subnet_explorer doctor | head -1", {}),
    "closed pipe, unbuffered": ("{python} -m subnet_explorer doctor | head -1", {"PYTHONUNBUFFERED": "1"}),
    "no home, ASCII, full output": ("{python} -m subnet_explorer doctor > /dev/full", {"HOME": "", "LC_ALL": "C"}),
    "folder gone": ("mkdir gone; cd gone; rmdir ../gone; {python} -m subnet_explorer show .", {}),
    "closed streams": ("{python} -m subnet_explorer show nowhere >&- 2>&-", {}),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_process_in_a_broken_place_leaves_no_traceback(tmp_path, name):
    command, more = ENVIRONMENTS[name]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(subnet_explorer.__file__).parent.parent), **more}
    words = ["bash", "-o", "pipefail", "-c", command.format(python=sys.executable)]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in (0, 2, 141) and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
