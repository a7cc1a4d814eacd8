"The campaign in short, and whether what it is made of does what it says."
from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import disk
import pytest
from campaign import PARTS, SHORT, differences

from subnet_explorer.core.files import add_line, atomic_write

CAMPAIGN = Path(__file__).with_name("campaign.py")


def run(folder: Path, *words: str) -> dict[str, dict[str, int]]:
    "What a campaign counted, in which nothing may fail."
    file, env = folder / "counts.json", {**os.environ, "OMP_NUM_THREADS": "1"}
    said = subprocess.run([sys.executable, CAMPAIGN, *words, "--json", file, "--keep", folder / "kept"], env=env,
                          capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    return json.loads(file.read_text())["counts"]


def test_nothing_changes_in_short(tmp_path):
    counts = run(tmp_path, "--short", "--seed", "3")
    assert set(counts) == {"reference", *SHORT} and all(c["failed"] == 0 and c["trials"] == 1 for c in counts.values())


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_nothing_changes(tmp_path, part):
    assert run(tmp_path, "--only", part, "--trials", "10")[part]["trials"] == 10


# ── what it is made of ───────────────────────────────────────────────────────────────────────────────────────────────

def child(do) -> int:
    "The status of a child that does something."
    process = os.fork()
    if not process:
        try: do()
        finally: os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def under(watch: disk.Watch, folder: Path, do) -> int:
    def watched() -> None:
        with disk.watched(folder, watch): do()
    return child(watched)


@pytest.mark.parametrize("when, left", [("before", b""), ("half", b"01234"), ("after", b"0123456789")])
def test_a_process_ends_within_a_write(tmp_path, when, left):
    status = under(disk.Moment("write", 1, when), tmp_path, partial((tmp_path / "file").write_bytes, b"0123456789"))
    assert status == -signal.SIGKILL and (tmp_path / "file").read_bytes() == left


@pytest.mark.parametrize("what", ["write", "fsync", "replace", "fsync-folder"])
def test_a_file_is_there_as_a_whole_or_not(tmp_path, what):
    file = tmp_path / "file"
    file.write_text("old")
    assert under(disk.Moment(what, 1, "half"), tmp_path, partial(atomic_write, file, "new text")) == -signal.SIGKILL
    assert file.read_text() == ("new text" if what == "fsync-folder" else "old")


def left_after_cuts(folder: Path, number: int, times: int, do) -> Counter[bytes | None]:
    "What is in a file after the power failed at a change, by how often."
    found: Counter[bytes | None] = Counter()
    for chance in range(times):
        (folder / "disk" / "file").write_bytes(b"old\n")
        built = folder / f"built-{number}-{chance}"
        cut = disk.PowerCut(folder / "disk", number, random.Random(chance), built)
        if under(cut, folder / "disk", do) != -signal.SIGKILL: continue
        file = built / "disk" / "file"
        found[file.read_bytes() if file.exists() else None] += 1
    return found


def disk_with_file(folder: Path) -> Path:
    (folder / "disk").mkdir()
    (folder / "disk" / "file").write_bytes(b"old\n")
    return folder / "disk" / "file"


def test_what_is_not_synced_is_lost(tmp_path):
    file = disk_with_file(tmp_path)

    def careless() -> None:
        (tmp_path / "disk" / "new").write_bytes(b"new")
        os.replace(tmp_path / "disk" / "new", file)
        (tmp_path / "disk" / "more").mkdir()
    found = left_after_cuts(tmp_path, 4, 20, careless)
    assert {b"old\n", b"new", b"", b"\0\0\0"} <= set(found) and None not in found


def test_what_is_synced_stays(tmp_path):
    file = disk_with_file(tmp_path)
    for number in range(1, 7):
        assert set(left_after_cuts(tmp_path, number, 6, partial(atomic_write, file, "new"))) <= {b"old\n", b"new"}
        found = left_after_cuts(tmp_path, number, 6, partial(add_line, file, "new"))
        assert all(data is not None and data.startswith(b"old\n") for data in found)


def test_differences_are_seen(tmp_path):
    for name in ("a", "b"): (tmp_path / name / "runs").mkdir(parents=True)
    assert differences(tmp_path / "a", tmp_path / "b") == []
    (tmp_path / "a" / ".leases").mkdir()
    (tmp_path / "a" / "t.json").write_text('{"seconds": 1, "x": 2}')
    (tmp_path / "b" / "t.json").write_text('{"seconds": 2, "x": 3}')
    (tmp_path / "b" / "u.csv").write_text("x\n")
    assert differences(tmp_path / "a", tmp_path / "b") == ["left over: .leases", "missing: u.csv", "differs: t.json"]
