"A card belongs to one cell at a time, whoever asks, and is free again when its holder is gone."
from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from subnet_explorer.core import devices
from subnet_explorer.core.devices import (
    cards_in,
    devices_folder,
    local_device,
    own_device,
    visible_cards,
    worker_environment,
)
from subnet_explorer.core.errors import SubnetError
from subnet_explorer.core.files import CannotWrite, inside

THREE = ("GPU-aa", "GPU-bb", "GPU-cc")


def three() -> list[str]: return list(THREE)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    "A temporary directory of this test, for it and its processes."
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    for name in ("CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "LOCAL_RANK"): monkeypatch.delenv(name, raising=False)
    return tmp_path


WORKER = """
import fcntl, json, os, random, sys, time, warnings
warnings.simplefilter("ignore")
from subnet_explorer.core.devices import own_device
order, cells = json.loads(sys.argv[1]), int(sys.argv[2])
random.seed(os.getpid())
for cell in range(cells):
    with own_device("cuda", lambda: order) as device:
        card = order[int(device.partition(":")[2])]
        with open(f"{os.environ['TMPDIR']}/{card}.in-use", "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)      # fails if anybody else is here
            time.sleep(random.random() * .004)
            print(card, flush=True)
"""


def worker(*words: str, program: str = WORKER) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


def test_six_processes_never_meet_on_three_cards():
    "Every process sees the cards in an order of its own, as with CUDA_VISIBLE_DEVICES."
    orders = [[THREE[(k + i) % 3] for k in range(3)] for i in range(6)]
    started = [worker(json.dumps(order), "40") for order in orders]
    said = [p.communicate(timeout=240) for p in started]
    assert [p.returncode for p in started] == [0] * 6, said
    cards = [card for out, _ in said for card in out.split()]
    assert len(cards) == 240 and set(cards) == set(THREE)


def test_processes_that_do_not_borrow_do_meet():
    "The check of the test above notices two on one card."
    program = WORKER.replace('with own_device("cuda", lambda: order) as device:', 'if device := "cuda:0":')
    started = [worker(json.dumps(THREE), "200", program=program) for _ in range(3)]
    said = [p.communicate(timeout=240)[1] for p in started]
    assert any("BlockingIOError" in text for text in said)


HOLDER = """
import sys, time
from subnet_explorer.core.devices import own_device
with own_device(sys.argv[1], lambda: ["GPU-aa"]) as device:
    print(device, flush=True)
    time.sleep(600)
"""


def test_a_killed_holder_frees_its_card_and_a_living_one_is_waited_for():
    holder = worker("cuda", program=HOLDER)
    assert holder.stdout is not None and holder.stdout.readline().strip() == "cuda:0"
    waiting = worker("cuda:0", program=HOLDER)
    time.sleep(1.5)
    assert waiting.poll() is None and len(list(devices_folder().rglob("GPU-aa.json"))) == 1
    os.kill(holder.pid, signal.SIGKILL)
    began = time.monotonic()
    holder.wait()
    assert waiting.stdout is not None and waiting.stdout.readline().strip() == "cuda:0"
    assert time.monotonic() - began < 5
    waiting.terminate()
    errors = waiting.communicate(timeout=30)[1]
    assert errors.count("waiting for cuda:0") == 1 and "taken over" in errors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with own_device("cuda", lambda: ["GPU-aa"]) as device: assert device == "cuda:0"


def test_a_cell_within_a_cell_has_the_same_card():
    with own_device("cuda:1", three) as outer, own_device("cuda", three) as inner:
        assert outer == inner == "cuda:1"
        with own_device("cuda:2", three) as other: assert other == "cuda:2"
        assert len(list(devices_folder().rglob("*.json"))) == 1
    assert not list(devices_folder().rglob("*.json"))


def test_a_card_is_given_back_after_an_error():
    with pytest.raises(ZeroDivisionError), own_device("cuda", three): 1 / 0      # noqa: B018
    assert not list(devices_folder().rglob("*.json"))


def test_a_cell_that_may_write_in_its_study_only_has_a_card(tmp_path):
    with inside(tmp_path / "study"), own_device("cuda", three) as device: assert device == "cuda:0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_does_not_have_the_card_of_the_first():
    with own_device("cuda", three) as mine:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:      # never leaves this block
            with contextlib.suppress(BaseException), own_device("cuda", three) as device:
                os.write(write, device.encode())
            os._exit(0)
        os.waitpid(child, 0)
        assert (mine, os.read(read, 20)) == ("cuda:0", b"cuda:1")
        assert len(list(devices_folder().rglob("*.json"))) == 1


def test_cpu_costs_nothing():
    with own_device("cpu") as device: assert device == "cpu"
    assert not list(Path(os.environ["TMPDIR"]).iterdir())


def test_other_devices_are_one_each():
    with own_device("mps") as device:
        assert device == "mps" and len(list(devices_folder().rglob("mps.json"))) == 1


def test_what_cannot_be_had_is_said():
    refused = pytest.raises(SubnetError, match=r"cuda:3.*of 3 visible cards the last is cuda:2")
    with refused, own_device("cuda:3", three):
        pass
    with pytest.raises(SubnetError, match="no card is visible"), own_device("cuda", lambda: []): pass


def test_a_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
    folder = devices_folder()
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CannotWrite, match="belongs to somebody else"), own_device("cuda", three): pass


def test_a_process_of_a_launcher_has_the_card_of_its_number(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device("cuda", three) == "cuda:1"
    assert local_device("cuda", lambda: ["GPU-aa"]) == "cuda:0"      # it sees its own alone
    assert local_device("cuda:2", three) == "cuda:2" and local_device("cpu", three) == "cpu"
    with own_device("cuda", three) as device: assert device == "cuda:1"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert local_device("cuda", three) == "cuda"


def test_a_part_of_a_card_is_known_by_its_name(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-21")
    assert visible_cards() == ["MIG-21"]
    with own_device() as device:
        assert device == "cuda:0" and list(devices_folder().rglob("MIG-21.json"))


def test_cards_are_known_by_what_is_printed_into_them(monkeypatch):
    import torch
    class Card:
        uuid = "0a1b"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Card() if i == 0 else object())
    assert visible_cards() == ["0a1b", "number 1"]


def test_workers_see_cards_of_their_own(monkeypatch):
    assert [worker_environment(i, 3, three)["CUDA_VISIBLE_DEVICES"] for i in range(3)] == list(THREE)
    assert worker_environment(1, 2, lambda: ["4", "6", "7"]) == {"CUDA_VISIBLE_DEVICES": "6"}
    shared = [worker_environment(i, 5, three)["CUDA_VISIBLE_DEVICES"] for i in range(5)]
    assert shared == [*THREE, *THREE[:2]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 3")
    assert worker_environment(1, 2) == {"CUDA_VISIBLE_DEVICES": "3"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert worker_environment(0, 1) == {}
    with pytest.raises(SubnetError, match="from 0 to 1, got 2"): worker_environment(2, 2, three)


def test_without_the_drivers_program_there_are_no_cards(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert devices.listed_cards() == []
    assert cards_in("GPU 0: A (UUID: GPU-1)\nGPU 1: B (UUID: GPU-2)") == ["GPU-1", "GPU-2"]
