"The command line: what goes to which stream, what is refused at the door, commands killed and given again."

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from subnet_explorer import __version__
from subnet_explorer.cli import main
from subnet_explorer.core.files import read_json
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.run import Run
from subnet_explorer.core.space import unit_space
from subnet_explorer.core.store import Store
from subnet_explorer.data.facts import read_facts
from subnet_explorer.recipes.study import without_places

COMMAND = Path(sys.executable).with_name("subnet-explorer")
LAMP = [
    "lamp",
    "--model",
    "pocket-bert",
    "--facts",
    "pocket",
    "--relations",
    "MadeOf,Desires",
    "--no-report",
    "--quiet",
]
STEPS = 48


def shell(*args, **kw) -> subprocess.Popen:
    "The installed command as a process of its own, which reacts to Ctrl-C wherever the tests run."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a handler is the usual one in a new program
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    try:
        return subprocess.Popen(
            [COMMAND, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **kw
        )
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    "The same without the cost of a process: status, standard output, standard error."
    monkeypatch.chdir(tmp_path)

    def run(*args):
        capsys.readouterr()
        try:
            status = main([str(a) for a in args])
        except SystemExit as e:
            status = e.code  # argparse leaves this way
        return status, *capsys.readouterr()

    return run


def files(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def ids(folder: Path) -> dict[str, str]:
    return {r.labels["task"]: r.mask.id for r in Store(folder / "runs")}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "A study that nobody disturbed, made by the installed command; and what it said."
    out = tmp_path_factory.mktemp("straight") / "out"
    process = shell(*[a for a in LAMP if a != "--quiet"], "--steps", STEPS, "--out", out, "--json", cwd=out.parent)
    said = process.communicate(timeout=300)
    return out, process.returncode, *said


# ── the streams ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_json_is_one_object_and_nothing_else(straight):
    out, status, said, log = straight
    assert status == 0 and said.count("\n") == 1, log
    result = json.loads(said, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert set(result["relations"]) == {"MadeOf", "Desires"} and {
        "full",
        "subnetwork",
        "random",
        "mismatched",
        "majority",
    } == set(result["macro"]["p_at_1"])
    assert {r: Mask.load(d["masks"][0]).id for r, d in result["relations"].items()} == ids(out)
    assert "MadeOf" in log and "48/48" in log and "· done" in log and "Traceback" not in log
    written = read_json(out / "results.json")
    assert set(written.pop("files")) == {"items.csv"} and written == without_places(result, out)
    assert {p.name for p in out.iterdir()} == {"study.json", "runs", "sessions", "items.csv", "results.json"} and {
        p.name for p in out.parent.iterdir()
    } == {"out"}


def test_tables_go_to_the_standard_output(call, straight):
    status, out, err = call(*LAMP, "--steps", STEPS, "--out", straight[0])
    assert (
        status == 0
        and err == ""
        and all(w in out for w in ("MadeOf", "Desires", "macro", "sparsity", "flips", "majority", str(straight[0])))
    )


def test_version_and_help():
    process = shell("--version")
    assert process.communicate(timeout=120) == (f"subnet-explorer {__version__}\n", "") and process.returncode == 0


@pytest.mark.parametrize("name", ["subnet_explorer", "subnet_explorer.cli"])
def test_the_package_and_the_module_are_the_command(name):
    def said(*args):
        return subprocess.run([sys.executable, "-m", name, *args], capture_output=True, text=True, check=False)

    version, nothing = said("--version"), said()
    assert (version.returncode, version.stdout.strip(), version.stderr) == (0, f"subnet-explorer {__version__}", "")
    assert nothing.returncode == 2 and nothing.stdout == "" and nothing.stderr.startswith("usage: subnet-explorer ")


@pytest.mark.parametrize("command, told", [("probe", '"pocket-gaps"'), ("tamt", "squad:TRAIN.json")])
def test_help_names_the_sources(call, command, told, monkeypatch):
    monkeypatch.setenv("COLUMNS", "4000")
    status, out, err = call(command, "--help")
    assert (status, err) == (0, "") and told in out


def test_doctor(call):
    status, out, err = call("doctor", "--json")
    found = json.loads(out)
    assert (
        (status, err, found["problems"]) == (0, "", [])
        and found["subnet_explorer"] == __version__
        and found["packages"]["torch"]
        and out.count("\n") == 1
    )
    status, out, _ = call("doctor")
    assert status == 0 and "nothing is missing." in out and found["packages"]["torch"] in out


# ── refused at the door ──────────────────────────────────────────────────────────────────────────────────────────────

ROWS = [
    json.dumps(
        dict(pred="MadeOf", sub_label=f.subject, obj_label=f.object, masked_sentences=[f.prompt], uuid=f.uuid)
    )
    for f in read_facts("pocket", "MadeOf").items[:20]
]


def line(prompt):
    return json.dumps({"pred": "MadeOf", "sub_label": "a cup", "obj_label": "glass", "masked_sentences": [prompt]})


POCKET = ["--facts", "pocket", "--relations", "MadeOf"]


@pytest.mark.parametrize(
    "lines, args, says",
    [
        ([*ROWS, "{oops"], [], r"facts\.jsonl, line 21: not a JSON object"),
        ([*ROWS, line("a cup is made of glass .")], [], r"facts\.jsonl, line 21: no \[MASK\]"),
        ([line("[MASK] is made of [MASK] ."), *ROWS], [], r"facts\.jsonl, line 1: 2 \[MASK\]"),
        (ROWS[:3], [], "relation MadeOf has 3 facts, too few"),
        (None, ["--facts", "nowhere.jsonl"], r"there is no facts file nowhere\.jsonl"),
        (None, ["--facts", "pocket", "--relations", "Madeof,IsA"], "unknown relation 'Madeof': did you mean MadeOf"),
        (None, ["--facts", "pocket", "--relations", "UsedFro"], "did you mean UsedFor"),
        (None, [*POCKET, "--layers", "3-9"], "the model has 4 layers"),
        (None, [*POCKET, "--layers", "top"], "cannot read the layer specification 'top'"),
        (None, [*POCKET, "--seeds", "0;1"], "cannot read the seeds"),
        (None, [*POCKET, "--sparsity", "50"], "did you mean 0.5"),
        (None, [*POCKET, "--sparsity", "0"], "sparsity"),
        (None, [*POCKET, "--batch", "0"], "batch"),
        (None, [*POCKET, "--steps", "-1"], "steps"),
        (None, [*POCKET, "--device", "gpu0"], "device"),
        pytest.param(
            None,
            [*POCKET, "--device", "cuda"],
            "(?i)cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        (None, [*POCKET, "--templates", "nowhere.jsonl"], r"nowhere\.jsonl"),
    ],
    ids=[
        "broken line",
        "no mask",
        "two masks",
        "too few",
        "no file",
        "relation",
        "another relation",
        "layers",
        "layer word",
        "seeds",
        "sparsity in percent",
        "no sparsity",
        "no batch",
        "negative steps",
        "device",
        "no GPU",
        "templates",
    ],
)
def test_refused_in_one_line_and_nothing_is_written(call, tmp_path, lines, args, says):
    if lines is not None:
        (tmp_path / "facts.jsonl").write_text("\n".join(lines) + "\n")
        args = ["--facts", "facts.jsonl"]
    before = files(tmp_path)
    status, out, err = call(
        "lamp", "--model", "pocket-bert", "--steps", 3, *args, "--out", "out", "--no-report", "--quiet", "--json"
    )
    assert (status, out) == (2, "") and re.search(says, err)
    assert (err.count("\n") == 1 and err.startswith("subnet-explorer: ")) or err.startswith("usage: ")
    assert files(tmp_path) == before


def test_an_unknown_model_is_one_line(tmp_path):
    process = shell("lamp", "--model", "pocket-brt", "--facts", "pocket", "--out", "out", "--json", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (
        (process.returncode, out, err.count("\n")) == (2, "", 1)
        and err.startswith("subnet-explorer: UnknownModel: cannot load a model from 'pocket-brt'")
        and "pocket-bert" in err
    )
    assert not list(tmp_path.iterdir())


def test_folders_of_others_are_left_alone(call, tmp_path, straight):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    before = files(tmp_path), files(straight[0])
    for out, args, says in (
        ("thesis", [], "not empty and holds no study"),
        (straight[0], ["--lr", ".02"], "another study.*lr"),
        (straight[0], ["--relations", "IsA"], "another study.*split"),
        ("file", [], "file"),
    ):
        status, said, err = call(*LAMP, "--steps", STEPS, "--out", out, *args)
        assert (status, said, err.count("\n")) == (2, "", 1) and re.search(says, err)
        assert (files(tmp_path), files(straight[0])) == before


def test_a_corrected_command_runs_in_the_same_folder(call, tmp_path):
    "A slip must not occupy the folder."
    call(
        "lamp",
        "--model",
        "pocket-bert",
        *POCKET,
        "--steps",
        3,
        "--sparsity",
        "50",
        "--out",
        "out",
        "--no-report",
        "--quiet",
    )
    status, _, err = call(
        "lamp",
        "--model",
        "pocket-bert",
        *POCKET,
        "--steps",
        3,
        "--sparsity",
        "0.5",
        "--out",
        "out",
        "--no-report",
        "--quiet",
    )
    assert status == 0, err


def test_lenient_leaves_bad_prompts_out(call, tmp_path):
    (tmp_path / "facts.jsonl").write_text("\n".join([*ROWS, line("a cup .")]))
    status, out, _ = call(
        "lamp",
        "--model",
        "pocket-bert",
        "--facts",
        "facts.jsonl",
        "--lenient",
        "--steps",
        3,
        "--out",
        "out",
        "--no-report",
        "--quiet",
        "--json",
    )
    assert status == 0 and json.loads(out)["relations"]["MadeOf"]["skipped"] == {"not exactly one [MASK]": 1}


# ── killed and given again ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_the_same_command_goes_on(call, tmp_path, straight, sign):
    out = tmp_path / "out"
    args = [*LAMP, "--steps", STEPS, "--out", out]
    process = shell(*args, cwd=tmp_path)

    def logs():
        return [p.read_text().count("\n") for p in out.glob("runs/*/metrics.jsonl")]

    while process.poll() is None and not (len(logs()) == 2 and min(logs()) >= 2):
        time.sleep(0.005)  # in the middle of the second relation
    assert process.poll() is None, process.stderr.read()
    process.send_signal(sign)
    said, err = process.communicate(timeout=300)
    assert said == "" and [r.done for r in Store(out / "runs")].count(True) == 1
    if sign == signal.SIGINT:
        assert process.returncode == 130 and "The same command continues" in err and "Traceback" not in err
    else:
        assert process.returncode == -signal.SIGKILL
    assert not (out / "results.json").exists() and not (out / "items.csv").exists()
    finished = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/mask.safetensors")}
    status, said, err = call(*args, "--json")
    assert status == 0 and ids(out) == ids(straight[0]) and {p: p.stat().st_mtime_ns for p in finished} == finished, err
    ours, theirs = json.loads(said), json.loads(straight[2])
    assert ours["macro"] == theirs["macro"] and {r: d["flips"] for r, d in ours["relations"].items()} == {
        r: d["flips"] for r, d in theirs["relations"].items()
    }


# ── show ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_show(call, straight):
    run = Store(straight[0] / "runs").runs(task="MadeOf")[0]
    shown = {}
    for name, path in dict(
        mask=run.folder / "mask.safetensors", run=run.folder, store=straight[0] / "runs", study=straight[0]
    ).items():
        status, out, err = call("show", path, "--json")
        assert (status, err, out.count("\n")) == (0, "", 1)
        shown[name] = json.loads(out)
        status, text, err = call("show", path)
        assert status == 0 and err == "" and "MadeOf" in text
    mask, r = shown["mask"], shown["run"]
    assert (
        (mask["kind"], mask["id"], mask["density"]) == ("mask", run.mask.id, run.mask.density)
        and len(mask["layers"]) == 12
        and mask["meta"]["task"] == "MadeOf"
    )
    assert (r["kind"], r["id"], r["done"], r["labels"]) == ("run", run.id, True, {"task": "MadeOf", "seed": 0}) and r[
        "config"
    ]["steps"] == STEPS
    assert shown["store"] == shown["study"] and {(d["task"], d["done"]) for d in shown["store"]["runs"]} == {
        ("MadeOf", True),
        ("Desires", True),
    }


def test_show_refuses(call, tmp_path, straight):
    whole = Store(straight[0] / "runs").runs(task="MadeOf")[0].folder / "mask.safetensors"
    damaged = bytearray(whole.read_bytes())
    damaged[-100] ^= 1
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-1000])
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "damaged.safetensors").write_bytes(damaged)
    (tmp_path / "folder").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{")
    before = files(tmp_path)
    for path, says in (
        ("cut.safetensors", "truncated"),
        ("text.safetensors", "not a mask file"),
        ("damaged.safetensors", "damaged"),
        ("folder", "no mask in folder"),
        ("nowhere", "no folder nowhere"),
        ("run", "not a run"),
    ):
        status, out, err = call("show", path)
        assert (status, out, err.count("\n")) == (2, "", 1) and re.search(says, err) and path in err
    assert files(tmp_path) == before


def test_show_an_unfinished_run(call, tmp_path):
    Run(tmp_path / "run", {"steps": 3}, {"task": "MadeOf"}).log(step=1, loss=2.0)
    status, out, _err = call("show", "run", "--json")
    assert status == 0 and json.loads(out)["done"] is False and json.loads(out)["density"] is None
    assert call("show", "run")[0] == 0


def test_warnings_say_what_is_the_matter_and_not_where_in_the_source(tmp_path):
    space = unit_space(2, 2)
    for seed in range(2): Run(tmp_path / str(seed), {"seed": seed}).finish(Mask.random(space, .5, seed=seed))
    (tmp_path / "1" / "config.json").write_text("{")
    done = subprocess.run([COMMAND, "show", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1 runs" in done.stdout
    assert done.stderr.startswith("subnet-explorer: ") and "config.json" in done.stderr and ".py:" not in done.stderr
