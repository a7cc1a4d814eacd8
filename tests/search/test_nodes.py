"Two launchers on this machine stand for two nodes: folders of their own, and none in common."
from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cluster import children

from subnet_explorer import Mask
from subnet_explorer.core.errors import SubnetError
from subnet_explorer.search import processes
from subnet_explorer.search.find import config_of
from subnet_explorer.search.processes import Processes, WrongProcesses, lost_text

pytest.importorskip("accelerate")

PROGRAM = """
import json, os, signal, sys, time
from subnet_explorer import Cloze, HardConcrete, Space, Threshold, find, load, read_facts, split
from subnet_explorer.core.errors import SubnetError
import torch
rank, about = int(os.environ["RANK"]), json.loads(sys.argv[1])
model, tok = load("pocket-bert")
facts = split(read_facts("pocket", "IsA"), 0).train
space = Space.of(model, "weight", layers="top-half")
sent = {"float32": 0, "bfloat16": 0}
names = {"all_reduce": lambda a: 2 * (W - 1) / W * size(a[0]), "all_to_all_single": lambda a: (W - 1) / W * size(a[0]),
         "all_gather": lambda a: (W - 1) * size(a[1])}
W = int(os.environ["WORLD_SIZE"])
def size(t): return t.numel() * t.element_size()
def counted(name, real):
    def call(*a, **k):
        key = str((a[1] if name == "all_gather" else a[0]).dtype).removeprefix("torch.")
        if key in sent: sent[key] += names[name](a)
        return real(*a, **k)
    return call
for name in names: setattr(torch.distributed, name, counted(name, getattr(torch.distributed, name)))

class Watch:
    "At a step, one process does something."
    def prepare(self, context):
        self.steps = 0
        def score():
            self.steps += about["every"]
            if self.steps == about.get("at") and rank == about.get("who"):
                what = about["what"]
                if what == "raise": raise ValueError("the disk of this node is gone")
                if what == "say":
                    open("here", "w").write("now")
                    time.sleep(600)
            return 0.0
        return score
    def identity(self): return {"watch": 1}

settings = dict(steps=about["steps"], batch=8, every=about["every"], lr=about.get("lr", .01), progress=False,
                checkpoint=0.0, snapshots=[2], processes=W, monitor=Watch(), reduce=about.get("reduce", "float32"))
if rank == about.get("odd"): settings["lr"] = .5
gate = Threshold(space) if about.get("gate") != "soft" else HardConcrete(space)
try:
    run = find(model, tok, gate, Cloze(facts), to=about["to"], **settings)
except SubnetError as error:
    print(f"rank{rank}|{type(error).__name__}|{error}", flush=True)
    sys.exit(3)
from safetensors.torch import save_file
scores = {str(i): p.detach() for i, p in enumerate(gate.logits)}
losses = [round(float(x), 9) for x in run.metrics.loss]
line = dict(id=run.mask.id, losses=losses, steps=list(map(int, run.metrics.step)), sent=sent,
            folder=run.folder is not None, snap=[m.id for _, m in run.snapshots],
            soft=run.soft is not None, sum=sum(float(t.double().sum()) for t in scores.values()))
save_file(scores, f"scores-{rank}.safetensors")
with open(f"rank{rank}.jsonl", "a") as out: out.write(json.dumps(line) + "\\n")
"""


@dataclass
class Node:
    "A launcher in a folder of its own."
    place: Path
    process: subprocess.Popen[str]

    def end(self, timeout: float = 200) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, out

    def kill(self) -> None:
        "End the launcher and all that it has started, at once."
        for process in [self.process.pid, *children(self.process.pid)]: os.kill(process, signal.SIGKILL)


def two_nodes(folder: Path, each: int = 1, **about: object) -> list[Node]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    said = json.dumps({"steps": 8, "every": 2, "to": "run", **about})
    nodes = []
    for rank in range(2):
        place = folder / f"node{rank}"
        place.mkdir(parents=True, exist_ok=True)
        (place / "program.py").write_text(PROGRAM)
        start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(rank),
                 "--nproc_per_node", str(each), "--master_addr", "127.0.0.1", "--master_port", port]
        process = subprocess.Popen([*start, "program.py", said], cwd=place, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                                   start_new_session=True)
        nodes.append(Node(place, process))
    return nodes


def ended(nodes: Sequence[Node]) -> list[str]:
    "What they said, after all went well."
    said = [node.end() for node in nodes]
    assert [code for code, _ in said] == [0, 0], "\n".join(text[-3000:] for _, text in said)
    return [text for _, text in said]


def results(folder: Path, ranks: int = 2, each: int = 1, at: int = -1) -> list[dict]:      # at: 0 for the first one
    "The last result of every process."
    files = [folder / f"node{rank // each}" / f"rank{rank}.jsonl" for rank in range(ranks)]
    return [json.loads(file.read_text().splitlines()[at]) for file in files]


def alike(found: Sequence[dict]) -> bool:
    return all({**one, "folder": 0, "sent": 0} == {**found[0], "folder": 0, "sent": 0} for one in found)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A search that nothing interrupts, and the folder of its two nodes."
    folder = tmp_path_factory.mktemp("whole")
    ended(two_nodes(folder))
    return folder


def test_two_nodes_without_a_common_folder_find_one_mask(whole):
    first, second = results(whole)
    assert alike([first, second]) and (first["folder"], second["folder"]) == (True, False)
    assert Mask.load(whole / "node0" / "run" / "mask.safetensors").id == first["id"]
    assert not (whole / "node1" / "run").exists()


def test_what_is_finished_is_given_to_all(whole):
    before = results(whole)[0]
    ended(two_nodes(whole))
    first, second = results(whole)
    assert first["id"] == second["id"] == before["id"] and first["losses"] == second["losses"] == before["losses"]
    assert first["snap"] == second["snap"] == before["snap"] and not (whole / "node1" / "run").exists()


def test_after_a_node_was_killed_both_go_on_to_the_same_mask(whole, tmp_path):
    "The node without the folder dies in the middle; the other names it; together they go on."
    nodes = two_nodes(tmp_path, who=1, at=4, what="say")
    until = time.monotonic() + 120
    while not (tmp_path / "node1" / "here").exists() and time.monotonic() < until: time.sleep(.1)
    nodes[1].kill()
    began = time.monotonic()
    code, said = nodes[0].end()
    assert code != 0 and "rank0|LostProcess|process 1 of 2" in said and "gone" in said, said[-3000:]
    assert time.monotonic() - began < 60
    assert (tmp_path / "node0" / "run" / "state.safetensors").exists()
    ended(two_nodes(tmp_path))
    assert results(tmp_path)[0]["id"] == results(whole)[0]["id"] == results(tmp_path)[1]["id"]
    assert results(tmp_path)[0]["losses"] == results(whole)[0]["losses"] == results(tmp_path)[1]["losses"]


def test_an_error_in_one_process_ends_all_of_them_by_name(tmp_path):
    nodes = two_nodes(tmp_path, each=2, who=3, at=4, what="raise")
    said = "".join(node.end(timeout=100)[1] for node in nodes)
    named = [line for line in said.splitlines() if "|LostProcess|" in line]
    assert "ValueError: the disk of this node is gone" in said, said[-3000:]
    assert {line[:5] for line in named} >= {"rank0", "rank1"}      # its own launcher may end rank 2 before it speaks
    assert all("process 3 of 4" in line and "the disk of this node is gone" in line for line in named)


def test_what_one_process_refuses_all_refuse(tmp_path):
    "The folder holds something else: only the first process sees it."
    (tmp_path / "node0" / "run").mkdir(parents=True)
    (tmp_path / "node0" / "run" / "thesis.txt").write_text("chapter 1")
    said = "".join(node.end(timeout=100)[1] for node in two_nodes(tmp_path))
    assert "rank0|OtherRun|" in said, said[-3000:]
    assert "rank1|LostProcess|process 0 of 2" in said and "refused: OtherRun: run is not empty" in said


def test_processes_that_were_asked_for_different_runs_refuse(tmp_path):
    said = "".join(node.end(timeout=100)[1] for node in two_nodes(tmp_path, odd=1))
    assert "rank1|WrongProcesses|" in said and "they differ in lr" in said, said[-3000:]
    assert "rank0|LostProcess|process 1 of 2" in said


def test_sums_in_bfloat16_halve_the_bytes_and_all_agree(whole, tmp_path):
    "All processes have the same bits; scores stay near those of exact sums."
    import numpy as np
    from safetensors.numpy import load_file
    ended(two_nodes(tmp_path, reduce="bfloat16"))
    exact, halves = results(whole, at=0), results(tmp_path)
    assert alike(halves) and halves[0]["sum"] != exact[0]["sum"]
    full, half = exact[0]["sent"]["float32"], halves[0]["sent"]["bfloat16"]
    assert full > 1e5 and .49 < half / full < .51
    assert halves[0]["sent"]["float32"] < .001 * full      # the losses
    a, b = (load_file(folder / "node0" / "scores-0.safetensors") for folder in (whole, tmp_path))
    c = load_file(tmp_path / "node1" / "scores-1.safetensors")
    assert all(np.array_equal(b[k], c[k]) for k in b)
    masks = [Mask.load(folder / "node0" / "run" / "mask.safetensors") for folder in (whole, tmp_path)]
    moved = np.abs(np.concatenate([(a[k] - b[k]).ravel() for k in a]))
    assert moved.max() <= 2 * 8 * .01 and np.quantile(moved, .99) < .05      # of at most .16
    assert (masks[0] ^ masks[1]).count < .01 * masks[0].space.size
    config = json.loads((tmp_path / "node0" / "run" / "config.json").read_text())["config"]
    assert config["reduce"] == "bfloat16"
    assert "reduce" not in json.loads((whole / "node0" / "run" / "config.json").read_text())["config"]


def test_the_mean_in_halves_is_as_near_as_documented(monkeypatch):
    "Three processes, played in one."
    torch.manual_seed(0)
    given = [torch.randn(5, 7) * 10.0 ** torch.randint(-6, 3, (5, 7)) for _ in range(3)]
    world, part = 3, 12
    rows = [torch.zeros(world * part) for _ in given]
    for row, g in zip(rows, given, strict=True): row[:35] = g.reshape(-1)
    sent = torch.stack([row.bfloat16() for row in rows])      # (process, place)
    means = sent.float().sum(0).div(world).bfloat16()
    def to_all(out: torch.Tensor, mine: torch.Tensor) -> None:
        out.copy_(sent.view(world, world, part)[:, 0].reshape(-1))      # what the first one receives
    def gather(out: list[torch.Tensor], mine: torch.Tensor) -> None:
        assert torch.equal(mine, means[:part])
        for row, mean in zip(out, means.view(world, part), strict=True): row.copy_(mean)
    monkeypatch.setattr(torch.distributed, "all_to_all_single", to_all)
    monkeypatch.setattr(torch.distributed, "all_gather", gather)
    found, exact = given[0].clone(), torch.stack(given).double().mean(0)
    processes.mean_in_halves(found, world)
    bound = 2 ** -8 * (torch.stack(given).double().abs().mean(0) + exact.abs()) * (1 + 2 ** -8)
    assert ((found - exact).abs() <= bound).all() and (found - exact).abs().max() > 0
    nothing = torch.empty(0)
    processes.mean_in_halves(nothing, world)


def test_a_model_on_the_card_of_another_process_is_refused(monkeypatch):
    monkeypatch.setattr("subnet_explorer.search.processes.local_device", lambda device: "cuda:1")
    with pytest.raises(WrongProcesses, match=r"model on cuda:0, but its card is cuda:1.*device=\"cuda\""):
        processes._check_card(torch.device("cuda:0"))
    processes._check_card(torch.device("cuda:1"))
    monkeypatch.setattr("subnet_explorer.search.processes.local_device", lambda device: "cpu")
    processes._check_card(torch.device("cpu"))


def test_messages_name_who_is_lost():
    assert lost_text(["", "", None, None], "abcd") == (
        "process 2 of 4 (on c) and process 3 of 4 (on d) are gone, killed or out of reach")
    assert "cannot reach each other" in lost_text(["", ""], "ab")
    alone = Processes(None, torch.device("cpu"))
    with alone.together(), pytest.raises(SubnetError), alone.together(): raise SubnetError("as it was")
    assert config_of is not None
