"What crashes, full disks, several processes, damage and hostile names did to studies, and must not do again."
from __future__ import annotations

import json
import os
import signal
import stat
import threading
import time
import warnings
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import example, given, strategies as st

from subnet_explorer.cli import main
from subnet_explorer.core import files
from subnet_explorer.core.cells import AtCell
from subnet_explorer.core.doctor import examine
from subnet_explorer.core.files import (
    MOST_BYTES,
    CannotWrite,
    DamagedFile,
    OutsideFolder,
    add_line,
    atomic_write,
    file_name,
    inside,
    machine,
    read_json,
    remove,
    sweep,
    text_of,
    write_json,
)
from subnet_explorer.core.folders import cached_table, kept_masks, open_study, tidy
from subnet_explorer.core.formats import read_masks, write_masks
from subnet_explorer.core.lease import Held, held, holders, lease_path, waiting
from subnet_explorer.core.log import read_log
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.masks import Masks
from subnet_explorer.core.run import Run, load_state, read_state, save_state
from subnet_explorer.core.space import unit_space
from subnet_explorer.core.store import Store
from subnet_explorer.core.tensors import sealed_torch
from subnet_explorer.data.facts import answerable, read_facts
from subnet_explorer.recipes.study import Bench, Findings
from subnet_explorer.search.find import find
from subnet_explorer.search.gates import Threshold
from subnet_explorer.search.objectives import Cloze


@pytest.fixture(scope="module")
def facts(pocket_bert):
    return answerable(read_facts("pocket", "IsA"), pocket_bert[1])


SPACE = unit_space(12, 12, mlps=True)
HOSTILE = ["..", ".", "/../../../../escaped", "a/b", "a b", "a_b", "é" * 300, "x" * 300, "nul", "a\0b", "", "~", "-rf",
           ".hidden", "a\nb", "c:\\x", "%2F", "end."]


def finished(folder: Path, n: int = 3) -> Store:
    "A study with finished runs."
    store = open_study(folder, {"recipe": "mine"})
    assert store is not None
    for seed in range(n):
        run = Run(store.path({"seed": seed}, {"seed": seed}), {"seed": seed}, {"seed": seed})
        for step in (10, 20): run.log(step=step, loss=1 / step)
        run.finish(Mask.random(SPACE, .5, seed=seed))
    return store


# ── several processes ────────────────────────────────────────────────────────────────────────────────────────────────

def test_rows_that_two_processes_wrote_count_once(tmp_path):
    "A log of an earlier version, in which every line is there twice."
    rows = [{"stage": "pruned", "epochs": 3.0, "score": .4375}, {"stage": "retrained", "epochs": 3.0, "score": .5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    assert read_log(tmp_path / "metrics.jsonl").rows == rows


def test_processes_share_a_study_cell_by_cell(tmp_path):
    "Threads stand for processes: each cell is done once, and both get everything."
    done, got = [], {}

    def work(name: str) -> None:
        bench = Bench({"recipe": "mine"}, tmp_path, progress=False)
        store = Store(tmp_path / "runs")

        def cell(labels: dict) -> str:
            run = Run(store.path(labels, labels), labels, labels)
            if not run.done:
                done.append(labels["seed"])
                time.sleep(.05)
                run.finish(Mask.random(SPACE, .5, seed=labels["seed"]))
            return run.mask.id

        got[name] = bench.work("mask", [{"seed": seed} for seed in range(6)], cell)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=work, args=[name]) for name in ("one", "two")]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    assert sorted(done) == list(range(6)) and got["one"] == got["two"]
    assert len(set(got["one"])) == 6


def test_who_does_not_want_to_wait_is_told_who_works(tmp_path):
    said = []

    def second() -> None:
        try:
            with waiting("leave"), held(tmp_path): said.append("worked")
        except Held as why: said.append(str(why))

    with held(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert f"process {os.getpid()} on {os.uname().nodename}" in said[0] and "since" in said[0]
    assert holders(tmp_path) == []


def test_a_lease_of_a_process_that_is_gone_is_taken_over_and_said(tmp_path):
    with held(tmp_path): text = lease_path(tmp_path, "run").read_text()
    gone = json.loads(text) | {"process": 2 ** 22 + 1, "host": "node7"}
    atomic_write(lease_path(tmp_path, "run"), json.dumps(gone))
    with pytest.warns(UserWarning, match="taken over from process 4194305 on node7"), held(tmp_path): pass


def test_a_lease_of_another_machine_is_over_after_its_silence(tmp_path):
    path = lease_path(tmp_path, "run")
    with held(tmp_path): text = path.read_text()
    atomic_write(path, json.dumps(json.loads(text) | {"machine": "elsewhere", "host": "node7"}))
    assert [holder.host for holder in holders(tmp_path)] == ["node7"]
    os.utime(path, (time.time() - 121, time.time() - 121))
    assert holders(tmp_path) == []
    with pytest.warns(UserWarning, match="node7"), held(tmp_path): pass


def test_a_number_of_a_process_that_was_given_again_is_another_process(tmp_path):
    with held(tmp_path): text = lease_path(tmp_path, "run").read_text()
    atomic_write(lease_path(tmp_path, "run"), json.dumps(json.loads(text) | {"started": "1", "process": os.getppid()}))
    assert holders(tmp_path) == []


# ── logs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_torn_line_hides_no_later_lines(tmp_path):
    "As two processes of an earlier version could leave it."
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text(f'{lines[0]}\n{{"step": 2, "lo{lines[1]}\n{lines[2]}\n')
    log = read_log(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in log.rows] == [1, 3] and log.damage == ("line 2 is not what was written",)


@pytest.mark.parametrize("damage", [
    lambda text: "", lambda text: text.splitlines(keepends=True)[0], lambda text: text.replace("0.05", "0.06"),
    lambda text: "".join(reversed(text.splitlines(keepends=True))), lambda text: text[:-5],
])
def test_a_damaged_log_of_a_finished_run_is_named(tmp_path, damage):
    store = finished(tmp_path)
    run = next(iter(store))
    file = run.folder / "metrics.jsonl"
    file.write_text(damage(file.read_text()))
    with pytest.raises(DamagedFile, match=r"metrics\.jsonl is damaged: .*doctor"): len(Run.open(run.folder).metrics)
    with pytest.warns(UserWarning, match="1 run is damaged"): assert len(store.masks()) == 2
    assert "metrics.jsonl" in store.broken[run.folder]
    assert next(iter(examine(tmp_path))).path == file and not examine(tmp_path)
    assert not Run.open(run.folder).done and len(store.masks()) == 2


def test_the_log_is_what_the_state_says(tmp_path):
    "Whatever has become of the file since."
    import torch
    run = Run(tmp_path / "a", {"seed": 0})
    for step in (10, 20): run.log(step=step, loss=1.0)
    save_state(run, {"x": torch.ones(1)}, 20)
    (tmp_path / "a" / "metrics.jsonl").unlink()
    again = Run(tmp_path / "a", {"seed": 0})
    assert load_state(again)[1] == {"step": 20} and again.metrics.step.tolist() == [10, 20]
    assert read_log(tmp_path / "a" / "metrics.jsonl").rows == again.rows


def test_a_line_is_added_below_what_was_cut_short(tmp_path):
    (tmp_path / "log").write_text("whole\nhal")
    add_line(tmp_path / "log", "next")
    assert (tmp_path / "log").read_text() == "whole\nhal\nnext\n"


# ── removing, leftovers, permissions ─────────────────────────────────────────────────────────────────────────────────

def test_what_is_half_removed_is_never_read(tmp_path, monkeypatch):
    (tmp_path / "models" / "full").mkdir(parents=True)
    (tmp_path / "models" / "full" / "config.json").write_text("{}")
    def killed(*args, **kw): raise KeyboardInterrupt
    monkeypatch.setattr(files.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt): remove(tmp_path / "models" / "full")
    monkeypatch.undo()
    assert not (tmp_path / "models" / "full").exists() and sweep(tmp_path) == []      # this process still lives
    left = next((tmp_path / "models").iterdir())
    left.rename(left.with_name(f".removing-{machine()}-{2 ** 22 + 1}-01234567"))
    assert len(sweep(tmp_path)) == 1 and not list((tmp_path / "models").iterdir())


def test_leftovers_are_swept_when_a_study_is_opened(tmp_path):
    store = finished(tmp_path, 1)
    run = next(iter(store))
    (run.folder / "state.safetensors").write_bytes(b"x")
    (run.folder / "cycle-3").mkdir()
    (run.folder / f".writing-{machine()}-{2 ** 22 + 1}-01234567").write_bytes(b"half")
    (run.folder / "env.json").unlink()
    open_study(tmp_path, {"recipe": "mine"})
    assert {file.name for file in run.folder.iterdir()} == {"config.json", "metrics.jsonl", "mask.safetensors"}
    assert tidy(tmp_path) == []


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, "[]", "{}", '{"step": true}', '{"step": "3"}'])
def test_a_state_that_says_no_step_is_damaged(tmp_path, text):
    "Even if its checksum fits."
    (tmp_path / "state.safetensors").write_bytes(sealed_torch({}, {"state": text}))
    with pytest.raises(DamagedFile, match="state"): read_state(tmp_path)


def test_what_is_logged_after_the_end_is_part_of_the_log(tmp_path):
    run = next(iter(finished(tmp_path, 1)))
    run.log(step=30, loss=.5)
    Run.open(run.folder).log(step=40, loss=.4)
    log = read_log(run.folder / "metrics.jsonl")
    assert [row["step"] for row in log.rows] == [10, 20, 30, 40] and log.ended and not log.damage
    assert len(Run.open(run.folder).metrics) == 4


def test_a_missing_environment_is_written_again(tmp_path):
    Run(tmp_path / "a", {"seed": 0})
    (tmp_path / "a" / "env.json").unlink()
    Run(tmp_path / "a", {"seed": 0})
    assert read_json(tmp_path / "a" / "env.json")["python"]


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_is_honoured(tmp_path, mask, mode):
    before = os.umask(mask)
    try: atomic_write(tmp_path / "file", "text")
    finally: os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_a_finished_study_opens_where_nothing_can_be_written(tmp_path, monkeypatch):
    "Also for root, who may write everywhere: whatever would change the folder is refused."
    def study() -> pd.DataFrame:
        bench = Bench({"recipe": "mine"}, tmp_path, progress=False)
        store = Store(tmp_path / "runs")
        cells = [{"seed": seed} for seed in range(2)]

        def cell(labels: dict) -> Run:
            run = Run(store.path(labels, labels), labels, labels)
            return run if run.done else run.finish(Mask.random(SPACE, .5, seed=labels["seed"]))

        runs = bench.work("mask", cells, cell)
        return bench.table("t", lambda: pd.DataFrame([{"id": run.mask.id} for run in runs]))

    first = study()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    def refuse(*args, **kw): raise OSError(30, "Read-only file system")
    changes = ("replace", "rename", "link", "unlink", "mkdir", "rmdir", "utime")
    for name in changes: monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(files, "_write_new", refuse)
    again = study()
    monkeypatch.undo()
    assert first.equals(again) and {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────

@given(st.text(st.characters(), max_size=200))
@example("a" * 100)
@example("a" * 101)
def test_names_of_files_are_safe_and_come_back(text):
    name = file_name(text)
    assert 0 < len(name.encode()) <= MOST_BYTES < 120 and name not in (".", "..")
    assert not set(name) & set('/\\\0:*?"<>| \n') and not name.startswith((".", "-")) and not name.endswith(".")
    assert text_of(name) in (text, None) and (text_of(name) == text or len(name) == MOST_BYTES or "~" in name)


@given(st.lists(st.text(max_size=120), unique=True, max_size=20))
def test_no_two_texts_share_a_name(texts): assert len({file_name(text) for text in texts}) == len(texts)


@pytest.mark.parametrize("text", HOSTILE)
def test_names_from_data_stay_in_their_folder(tmp_path, text):
    folder = tmp_path / "a" / "b" / "study"
    cached_table(folder, f"fine-tuned-{text}", lambda: pd.DataFrame([{"x": 1}]))
    store = open_study(folder / "s", {"recipe": "mine"})
    assert store is not None
    Run(store.path({"task": text}, {}), {}, {"task": text}).finish(Mask.random(SPACE, .5, seed=0))
    masks = Masks([({"task": text, "seed": 0}, Mask.random(SPACE, .5, seed=0))])
    write_masks(masks, folder / "published")
    assert {path.relative_to(tmp_path).parts[:3] for path in tmp_path.rglob("*") if path.is_file()} == {
        ("a", "b", "study")}
    assert store.runs()[0].labels == {"task": text}
    back = read_masks(folder / "published").index.task[0]
    assert back == text or len(text) > 80
    assert cached_table(folder, f"fine-tuned-{text}", lambda: pytest.fail("made twice")).x.tolist() == [1]


def test_a_table_may_be_called_by_half_a_character(tmp_path):
    cached_table(tmp_path, "\ud800/x", lambda: pd.DataFrame([{"x": 1}]))
    assert [file.name for file in (tmp_path / "tables").iterdir()] == ["%ED%A0%80%2Fx.json"]


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    finished(tmp_path / "study", 1)
    (tmp_path / "study" / "tables").symlink_to(tmp_path / "elsewhere")
    with inside(tmp_path / "study"), pytest.raises(OutsideFolder, match="remove the link"):
        cached_table(tmp_path / "study", "t", lambda: pd.DataFrame([{"x": 1}]))
    assert list((tmp_path / "elsewhere").iterdir()) == []


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_one_broken_run_hides_no_other(tmp_path):
    store = finished(tmp_path, 4)
    places = [run.folder for run in store]
    (places[0] / "config.json").write_text("{")
    flipped = bytearray((places[1] / "mask.safetensors").read_bytes())
    flipped[-1] ^= 1
    (places[1] / "mask.safetensors").write_bytes(flipped)
    with pytest.warns(UserWarning, match="2 runs are damaged"): assert len(store.masks()) == 2
    assert set(store.broken) == set(places[:2])
    with pytest.warns(UserWarning, match="left out"): assert len(kept_masks(tmp_path)) == 2


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
                    max_leaves=8).map(lambda value: {"value": value}), st.integers(0, 10_000), st.integers(1, 255))
def test_one_damaged_byte_of_json_is_noticed_or_changes_nothing(tmp_path_factory, value, place, flip):
    file = write_json(tmp_path_factory.mktemp("json") / "a.json", value)
    data = bytearray(file.read_bytes())
    data[place % len(data)] ^= flip
    file.write_bytes(data)
    try: found = read_json(file, DamagedFile, keys=["value"])
    except DamagedFile: return
    assert json.dumps(found) == json.dumps(value)


def test_the_index_believes_nothing_that_has_changed(tmp_path):
    store = finished(tmp_path, 3)
    time.sleep(2.1)
    assert len(store.runs()) == 3 and len(json.loads((store.folder / ".index.json").read_text())["runs"]) == 3
    file = store.runs()[0].folder / "mask.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="1 run is damaged"): assert len(store.runs()) == 2
    (store.folder / ".index.json").write_text('{"lies": {}}')
    with pytest.warns(UserWarning, match="1 run is damaged"): assert len(store.runs()) == 2


def test_the_doctor_of_the_shell(tmp_path, capsys):
    store = finished(tmp_path)
    file = next(iter(store)).folder / "mask.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert main(["doctor", str(tmp_path), "--look-only"]) == 1 and "mask.safetensors" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["found"]
    assert len(found) == 1 and "put aside" in found[0]["done"] and list((tmp_path / ".damaged").rglob("mask*"))
    assert main(["doctor", str(tmp_path)]) == 0 and "nothing is wrong" in capsys.readouterr().out


def test_the_advice_of_a_damaged_file_is_a_command_that_helps(tmp_path, capsys):
    file = next(iter(finished(tmp_path))).folder / "metrics.jsonl"
    file.write_text("")
    with pytest.raises(DamagedFile) as refused: len(Run.open(file.parent).metrics)
    words = str(refused.value).rpartition("subnet-explorer ")[2].split()
    assert main(words) == 0 and "put aside" in capsys.readouterr().out and examine(tmp_path) == []


def test_looking_blames_no_file_for_another(tmp_path):
    file = next(iter(finished(tmp_path))).folder / "mask.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert [found.path for found in examine(tmp_path, repair=False)] == [file]


def test_a_run_is_not_done_again_for_what_decides_nothing(tmp_path):
    store = finished(tmp_path, 1)
    (next(iter(store)).folder / "env.json").write_text("{")
    assert "nothing depends on it" in examine(tmp_path)[0].done and len(store.masks()) == 1


def test_a_label_called_checksum_is_no_checksum(tmp_path):
    "A finished run of an earlier version, whose log has no end line."
    config = {"goal": "checksum"}
    run = Run(tmp_path / "a", config, {"task": "checksum"})
    run.log(step=1, loss=1.0)
    run.finish(Mask.random(SPACE, .5, seed=0))
    told = {"id": run.id, "labels": run.labels, "config": config}
    (tmp_path / "a" / "config.json").write_text(json.dumps(told))
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert Run.open(tmp_path / "a").metrics.step.tolist() == [1]


def test_results_name_masks_beside_a_broken_run_of_others(tmp_path):
    "A run that is none of this study hides no mask of it; one of its own is named."
    store = finished(tmp_path, 3)
    masks = store.masks()
    study = Findings(masks=masks.sel(seed=[0, 1]), tables={}, config={}, model_name="m", seconds=0.0, folder=tmp_path)
    places = {run.labels["seed"]: run.folder for run in store}
    (places[2] / "config.json").write_text("{")
    with pytest.warns(UserWarning, match="1 run is damaged"): files = study.mask_files("seed")
    assert files == {(seed,): str(places[seed] / "mask.safetensors") for seed in (0, 1)}
    (places[1] / "config.json").write_text("{")
    with pytest.warns(UserWarning), pytest.raises(DamagedFile): study.mask_files("seed")


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    def full(path, content):
        Path(path).write_bytes(content[:3])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(files, "_write_new", full)
    with pytest.raises(CannotWrite, match="no space left"): atomic_write(tmp_path / "a", "text")
    assert list(tmp_path.iterdir()) == []


def test_of_several_claims_one_succeeds_also_without_hard_links(tmp_path, monkeypatch):
    def refuse(*args, **kw): raise OSError(1, "Operation not permitted")
    monkeypatch.setattr(os, "link", refuse)
    made = []
    def claim() -> None: made.append(files.create(tmp_path / "claim", "text"))
    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert sorted(made) == [False] * 7 + [True] and [file.name for file in tmp_path.iterdir()] == ["claim"]


# ── stopping ─────────────────────────────────────────────────────────────────────────────────────────────────────────

class Interrupted(Cloze):
    "Sends a signal in the middle of a step."
    at, number = 7, signal.SIGINT

    def prepare(self, context):
        loss = super().prepare(context)

        def counted(part):
            if part + 1 == self.at: signal.raise_signal(self.number)
            return loss(part)

        return counted


@pytest.fixture
def heard():
    "Signals do what they usually do, also where whoever started the tests has had them ignored."
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, action) for number, action in usual.items()}
    yield
    for number, action in before.items(): signal.signal(number, action)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_first(pocket_bert, facts, tmp_path, heard, number):
    "The step is done and saved, and the search goes on from there; between log entries, too."
    from subnet_explorer.core.signals import Stopped, stopping
    from subnet_explorer.core.space import Space
    model, tok = pocket_bert
    def search(goal: Cloze, to: Path) -> Run:
        gate = Threshold(Space.of(model, "weight", layers="top-half"), .5, seed=0)
        return find(model, tok, gate, goal, steps=12, every=1000, batch=8, to=to, engine="plain", progress=False)

    straight = search(Cloze(facts), tmp_path / "straight")
    goal = Interrupted(facts)
    goal.number = number
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Stopped), stopping():
        search(goal, tmp_path / "stopped")
    assert load_state(Run.open(tmp_path / "stopped"))[1]["step"] == 7
    assert not holders(tmp_path / "stopped")
    assert search(Cloze(facts), tmp_path / "stopped").mask == straight.mask


def test_states_are_saved_by_the_clock(pocket_bert, facts, tmp_path, monkeypatch):
    "Also between log entries."
    from subnet_explorer.core.space import Space
    from subnet_explorer.search import loop
    saved = []
    monkeypatch.setattr(loop, "save_state", lambda run, tensors, step, **info: saved.append(step))
    model, tok = pocket_bert
    gate = Threshold(Space.of(model, "weight", layers="top-half"), .5, seed=0)
    find(model, tok, gate, Cloze(facts), steps=5, every=1000, batch=8, checkpoint=0, to=tmp_path / "a", engine="plain",
         progress=False)
    assert saved == [1, 2, 3, 4, 5]


def test_the_time_of_all_sessions_counts(tmp_path):
    one = Bench({"recipe": "mine"}, tmp_path, progress=False)
    one.session.began -= 60
    one.session.note()
    assert 60 <= Bench({"recipe": "mine"}, tmp_path, progress=False).seconds < 62


def test_cells_in_memory_need_no_lease(): assert AtCell(None, "mask", len)({"a": 1}).value == 1
