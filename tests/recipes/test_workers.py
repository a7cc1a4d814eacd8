"Studies whose cells are done by workers: processes of this machine, a Dask cluster, Ray; and what may be wrong there."
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import joblib
import pytest
import tiny
import torch
from campaign import differences
from floors import any_floor
from torch import nn

from subnet_explorer import load, read_facts
from subnet_explorer.cli import main
from subnet_explorer.core import lease as leases, workers
from subnet_explorer.core.cells import Outcome
from subnet_explorer.core.errors import SubnetError
from subnet_explorer.core.workers import Job, NoBackend, OtherWeights, UnseenFolder, by_workers, engine
from subnet_explorer.model.travel import arrived, packed, parcel_of, place_of, unpacked, weights_code
from subnet_explorer.recipes.lamp import lamp
from subnet_explorer.recipes.study import Bench, Study, find_recipe, recipe

CODEC = packed, unpacked


def small(to: Path | None, model: nn.Module | None = None, **more: object) -> Study:
    "A study of four cells."
    own, tok = load("pocket-bert")
    facts = read_facts("pocket", "MadeOf,Desires")
    few = {"steps": 8, "batch": 4, "layers": "4", "seeds": (0, 1), "random": 1, "mismatched": False}
    return lamp(model or own, tok, facts, **{**few, **more}, to=to, progress=False)      # type: ignore[arg-type]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    "The study as one process makes it."
    folder = tmp_path_factory.mktemp("alone") / "study"
    small(folder)
    return folder


@contextmanager
def clients(name: str) -> Iterator[None]:
    "A backend as joblib has it, made by its own means."
    if name == "dask":
        distributed = pytest.importorskip("distributed")
        made = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
        with made as there, distributed.Client(there), joblib.parallel_config("dask"): yield
    elif name == "ray":
        ray = pytest.importorskip("ray")
        from ray.util.joblib import register_ray
        register_ray()
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        try:
            with joblib.parallel_config("ray", n_jobs=2): yield
        finally: ray.shutdown()
    else:
        with joblib.parallel_config(name, n_jobs=2): yield


# ── the same, whoever does it ────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", ["loky", "dask", "ray", "threading"])
def test_any_backend_finds_the_same(name, alone, tmp_path):
    with clients(name):
        shared = small(tmp_path / "study")
        returned = small(None)
    assert not differences(tmp_path / "study", alone)
    assert [m.id for _, m in returned.masks] == [m.id for _, m in shared.masks]
    assert returned.tables["items"].equals(shared.tables["items"])


@pytest.mark.parametrize("name", list(tiny.COMMANDS))
def test_every_recipe_finds_the_same_by_two_processes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    any_floor(monkeypatch)
    tiny._write_inputs()
    words = tiny.COMMANDS[name]
    assert main(words) == 0
    Path("study").rename("alone")
    assert main([*words, "--jobs", "2"]) == 0
    assert not differences(Path("study"), Path("alone"))


def test_a_recipe_of_a_user(tmp_path):
    @recipe("Sizes", "nobody")
    def sizes(model: nn.Module, tok: object, *, to: Path | None = None, progress: bool = True) -> Study:
        "Count, by relation."
        bench = Bench({"recipe": "sizes", "model": "any"}, to, progress)
        size = sum(p.numel() for p in model.parameters())
        n = bench.work("size", [{"n": n} for n in range(5)], lambda c: c["n"] * size)
        raise SubnetError(f"found {n}")
    model, tok = load("pocket-bert")
    wanted = str([n * model.num_parameters() for n in range(5)])
    with engine(jobs=2), pytest.raises(SubnetError, match="found") as error: sizes(model, tok, to=tmp_path / "study")
    assert wanted in str(error.value) and find_recipe("sizes")


def test_a_sweep_by_two_processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*tiny.COMMANDS["lamp"][:-2], "--random", "1", "--sweep", "lr=0.01,0.02"]
    place = words.index("study")
    assert main(words) == 0
    Path("study").rename("alone")
    assert main([*words[:place], "study", *words[place + 1:], "--jobs", "2"]) == 0
    assert [said for said in differences(Path("study"), Path("alone")) if "sessions" not in said] == []


def test_a_relative_folder_is_the_same_for_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with engine(jobs=2): found = small(Path("study"))
    assert found.folder == Path("study") and len(list(Path("study").glob("runs/*/config.json"))) == 4


def test_a_finished_study_needs_no_worker(alone):
    with engine(jobs=2):
        before = time.monotonic()
        small(alone)
    assert time.monotonic() - before < 60


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def changed() -> nn.Module:
    "A model that is not what its name says."
    model, _ = load("pocket-bert")
    with torch.no_grad(): model.bert.encoder.layer[3].output.dense.weight.mul_(0.5)
    return model


def test_no_weights_go_through_the_scheduler(tmp_path):
    model, tok = load("pocket-bert")
    assert len(packed({"model": model, "tok": tok})) < 200_000 < 4 * model.num_parameters()
    model = changed()
    assert len(packed({"model": model}, tmp_path)) < 1000
    assert [p.parent.name for p in tmp_path.rglob("model.safetensors")] == [weights_code(model)]


def test_a_changed_model_is_used_as_it_is(tmp_path):
    plain = small(tmp_path / "alone", changed())
    with engine(jobs=2): found = small(tmp_path / "study", changed())
    assert [m.id for _, m in found.masks] == [m.id for _, m in plain.masks]
    assert not differences(tmp_path / "study", tmp_path / "alone")      # the saved model is gone, too


class Own(nn.Module):
    "A model of a class of one's own."
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = load("pocket-bert")[0], nn.Parameter(torch.ones(3))


def test_what_stands_around_a_model_goes_along(tmp_path):
    found = unpacked(packed(Own(), tmp_path))
    assert torch.equal(found.scale, torch.ones(3)) and weights_code(found.inner) == weights_code(Own().inner)


@pytest.mark.parametrize("change", ["train", "freeze", "eager", "half"])
def test_a_model_arrives_as_it_was(change, tmp_path):
    model, _ = load("pocket-bert", dtype=torch.bfloat16 if change == "half" else None)
    if change == "train": model.train()
    if change == "freeze": model.bert.embeddings.requires_grad_(False)
    if change == "eager": model.set_attn_implementation("eager")
    place = place_of(model, tmp_path)
    assert place is not None and place.source == "pocket-bert"
    there = arrived(place, ("another machine", 1))
    assert there.training == model.training and there.dtype == model.dtype
    assert [p.requires_grad for p in there.parameters()] == [p.requires_grad for p in model.parameters()]
    assert there.config._attn_implementation == model.config._attn_implementation


def test_other_weights_at_a_worker_are_refused(tmp_path):
    folder, (model, tok) = tmp_path / "model", load("pocket-bert")
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    model, _ = load(folder)
    parcel = packed(lambda labels: Outcome(model.num_parameters()))
    changed().save_pretrained(folder)
    named = pytest.raises(OtherWeights, match=r"the worker on .* has other weights here")
    with named, pytest.warns(match="given to others"):
        list(by_workers(Job(parcel), CODEC, {0: {}, 1: {}}, 2))


def test_a_cell_has_a_card_of_its_own(monkeypatch):
    from subnet_explorer.core import devices
    used: list[str] = []
    monkeypatch.setattr(workers, "own_device", partial(devices.own_device, cards=lambda: ["GPU-a", "GPU-b"]))
    job = Job(packed(0), device="cuda")
    codec = packed, lambda parcel, card: lambda labels: used.append(card) or Outcome(card)
    answer = workers.done_by_worker(job, codec, 0, {})
    assert unpacked(answer.packed).value == used[0] == "cuda:0"


def test_a_parcel_says_what_its_models_are_on(tmp_path):
    model, _ = load("pocket-bert")
    assert parcel_of(model, tmp_path)[1] == "cpu" == parcel_of(3)[1]


# ── what may be wrong ────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_folder_that_workers_do_not_see(tmp_path, monkeypatch):
    monkeypatch.setattr("subnet_explorer.recipes.study.claim_of", lambda folder: "another")
    named = pytest.raises(UnseenFolder, match=r"the worker on \S+ \(process \d+\): the folder .* is not there")
    with engine(jobs=2), pytest.warns(match="given to others"), named: small(tmp_path / "study")
    monkeypatch.undo()
    assert len(small(tmp_path / "study").masks) == 4      # it goes on


def test_backends_that_are_not_there(monkeypatch):
    for name, package in (("dask", "distributed"), ("ray", "ray")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(NoBackend, match=rf"pip install 'subnet_explorer\[{name}\]'"), engine(name): pass


def test_no_scheduler_answers(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(workers, "_ANSWER", 1)
    named = pytest.raises(NoBackend, match=r"no scheduler answers at tcp://127\.0\.0\.1:9")
    with named, engine("dask", scheduler="tcp://127.0.0.1:9"): pass


def test_the_shell_says_what_is_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["lamp", "--model", "pocket-bert", "--facts", "pocket", "--out", "study"]
    assert main([*words, "--backend", "dusk"]) == 2 and "did you mean dask" in capsys.readouterr().err
    assert main([*words, "--jobs", "0"]) == 2 and "jobs" in capsys.readouterr().err
    assert not Path("study").exists()


def test_an_error_of_a_cell_is_that_of_the_cell(tmp_path):
    def fail(labels: dict[str, int]) -> Outcome[int]: return Outcome(1 // labels["n"])
    with pytest.raises(ZeroDivisionError) as error:
        list(by_workers(Job(packed(fail)), CODEC, {0: {"n": 1}, 1: {"n": 0}}, 2))
    assert any("the worker on" in note and "in fail" in note for note in error.value.__notes__)


def test_workers_that_die_every_time_end_the_study(monkeypatch):
    monkeypatch.setattr(workers.time, "sleep", lambda seconds: None)

    def die(labels: dict[str, int]) -> None: os.kill(os.getpid(), signal.SIGKILL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(workers.WorkersLost, match=r"6 times in a row .* 2 cells are left"):
            list(by_workers(Job(packed(die)), CODEC, {0: {"n": 0}, 1: {"n": 1}}, 2))


def test_a_worker_that_dies_once_is_replaced(tmp_path):
    def die_once(labels: dict[str, int]) -> Outcome[int]:
        mark = tmp_path / f"died-{labels['n']}"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Outcome(labels["n"])
    with pytest.warns(match="cells are sent again"):
        found = dict(by_workers(Job(packed(die_once)), CODEC, {n: {"n": n} for n in range(3)}, 2))
    assert {n: outcome.value for n, outcome in found.items()} == {0: 0, 1: 1, 2: 2}


def test_one_cell_at_a_time_in_a_process():
    at_once: list[int] = []
    most: list[int] = []

    def look(labels: dict[str, int]) -> Outcome[int]:
        at_once.append(1)
        most.append(len(at_once))
        time.sleep(0.02)
        at_once.pop()
        return Outcome(0)
    job = Job(packed(0))
    workers._AT_HAND[job.code, "cpu"] = look
    calls = [threading.Thread(target=workers.done_by_worker, args=(job, CODEC, n, {"n": n})) for n in range(6)]
    for call in calls: call.start()
    for call in calls: call.join()
    assert most == [1] * 6


def test_processes_save_before_they_leave(tmp_path):
    words = [sys.executable, "-m", "subnet_explorer", *tiny.COMMANDS["lamp"], "--steps", "4000", "--jobs", "2"]
    caller = subprocess.Popen(words, cwd=tmp_path, start_new_session=True)
    until = time.monotonic() + 120
    while len(list(tmp_path.glob("study/runs/*/metrics.jsonl"))) < 2 and time.monotonic() < until: time.sleep(0.1)
    caller.send_signal(signal.SIGTERM)
    assert caller.wait(30) == 128 + signal.SIGTERM
    assert len(list(tmp_path.glob("study/runs/*/state.safetensors"))) == 2


def test_a_study_in_a_study_does_not_wait_for_itself(tmp_path):
    def outer(labels: dict[str, int]) -> Outcome[int]: return Outcome(workers.workers_of(4, 10))
    with engine(jobs=2):
        found = dict(by_workers(Job(packed(outer)), CODEC, {0: {}, 1: {}}, 2))
    assert [outcome.value for outcome in found.values()] == [1, 1]


# ── another machine ──────────────────────────────────────────────────────────────────────────────────────────────────

OTHER = """
import sys, time
from pathlib import Path
from subnet_explorer.core import files, lease
lease.machine = lambda: "0ther000"
lease.BEAT = 0.2
held = lease.acquire(lease.lease_path(Path(sys.argv[1]), "relation MadeOf 0"), "relation MadeOf 0")
print("held", flush=True)
time.sleep(60)
"""


def test_a_worker_of_another_machine_that_falls_silent_is_taken_over(alone, tmp_path, monkeypatch):
    "Its process cannot be seen from here: its lease is over when its signs of life end, and that is said."
    monkeypatch.setattr(leases, "SILENCE", 2.0)
    study = tmp_path / "study"
    study.mkdir()
    other = subprocess.Popen([sys.executable, "-c", OTHER, str(study)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    (study / "study.json").write_bytes((alone / "study.json").read_bytes())
    found = threading.Thread(target=small, args=(study,))
    with pytest.warns(match="taken over from process") as said:
        found.start()
        time.sleep(8)
        assert not (study / "results.json").exists()      # it beats: the others wait
        other.kill()
        found.join(60)
    assert not differences(study, alone) and any("which is gone" in str(w.message) for w in said)


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def campaign(tmp_path: Path, *words: str) -> dict[str, dict[str, int]]:
    "What a campaign of faults of workers counted, in which nothing may fail."
    file, script = tmp_path / "counts.json", Path(__file__).parent.parent / "cluster.py"
    said = subprocess.run([sys.executable, script, *words, "--json", file], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout[-5000:] + said.stderr[-2000:]
    return json.loads(file.read_text())


def test_killed_workers_change_nothing(tmp_path):
    counts = campaign(tmp_path, "--only", "loky")["loky"]
    assert counts["studies"] == 1 and not counts["failed"]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["callers", "dask", "lost", "slow", "schedulers", "full"])
def test_faults_of_workers_change_nothing(tmp_path, part):
    counts = campaign(tmp_path, "--only", part, "--trials", "3")[part]
    assert counts["studies"] == 3 and not counts["failed"]
