"""Workers that are killed, stopped, doubled and cut off from their scheduler: nothing of what a study finds may change.

`python tests/cluster.py --trials 5` does five trials of every part and prints what was counted; the status is 1 if
anything differed. Callers are whole commands; workers are processes of loky, or of a Dask cluster of this machine.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from campaign import differences

from subnet_explorer.core.lease import holders

LAMP = ["lamp", "--model", "pocket-bert", "--device", "cpu", "--no-report", "--quiet", "--out", "study", "--facts",
        "pocket", "--relations", "MadeOf,Desires,CapableOf", "--layers", "4", "--steps", "25", "--batch", "8",
        "--random", "1", "--no-mismatched"]
LAMP += ["--seeds", "0,1,2,3"]
LIMIT = 240.0      # seconds after which a caller that was not disturbed is said to hang


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────

def started(words: list[str], folder: Path, **env: str) -> subprocess.Popen[str]:
    "A process in a folder, which writes what it says into a file there."
    said = (folder / f"said-{len(list(folder.glob('said-*')))}").open("w")
    more = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **env}
    return subprocess.Popen([sys.executable, *words], cwd=folder, env=more, stdout=said, stderr=said, text=True,
                            start_new_session=True)


def end(process: subprocess.Popen[str]) -> None:
    "End a process with all that it has started."
    with suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def children(process: int) -> list[int]:
    "All processes below one."
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):
            above = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            parents.setdefault(above, []).append(int(entry.name))
    found = list(parents.get(process, []))
    for child in found: found += parents.get(child, [])
    return found


def at_work(study: Path, caller: int | None = None) -> list[int]:
    "Processes that hold a cell of a study now; below a caller, if one is given."
    mine = None if caller is None else set(children(caller))
    found = [h.process for h in holders(study) if h.what.startswith("relation ")] if study.exists() else []
    return [process for process in dict.fromkeys(found) if mine is None or process in mine]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class Cluster:
    "A Dask scheduler and two workers of this machine, each with a folder of its own."
    folder: Path
    port: int = field(default_factory=free_port)
    workers: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def address(self) -> str: return f"tcp://127.0.0.1:{self.port}"

    def start(self, workers: int = 2) -> None:
        "Start the scheduler, and workers."
        words = ["-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(self.port),
                 "--no-dashboard"]
        env = {"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "3s", "DASK_DISTRIBUTED__ADMIN__LOG_LENGTH": "0"}
        self.scheduler = started(words, self.folder, **env)
        for _ in range(workers): self.add()

    def add(self) -> None:
        "Start one more worker."
        place = self.folder / f"worker-{len(self.workers)}"
        place.mkdir(exist_ok=True)
        words = ["-m", "distributed.cli.dask_worker", self.address, "--nthreads", "1", "--nworkers", "1",
                 "--local-directory", str(place), "--no-dashboard", "--death-timeout", "20"]
        self.workers.append(started(words, place))

    def stop(self) -> None:
        "End all."
        for process in [*self.workers, self.scheduler]: end(process)
        self.workers.clear()


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    made = Cluster(folder)
    made.start()
    try: yield made
    finally: made.stop()


# ── a trial ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclass
class Trial:
    "A folder for one study, the chance in it, and what came of it."
    part: str
    seed: int
    folder: Path
    reference: Path
    counts: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.part} {self.seed}")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    @property
    def study(self) -> Path: return self.folder / "study"

    def caller(self, *more: str) -> subprocess.Popen[str]:
        return started(["-m", "subnet_explorer", *LAMP, *more], self.folder)

    def said(self) -> str:
        "The last lines of what all processes said."
        files = sorted(self.folder.rglob("said-*"))
        return "\n".join(file.read_text(errors="replace")[-1500:] for file in files if file.stat().st_size)

    def wait_for_work(self, caller: subprocess.Popen[str], of: int | None = None) -> list[int]:
        "Wait until somebody works on a cell; who does. Nobody: the caller is at its end."
        until = time.monotonic() + LIMIT
        while time.monotonic() < until and caller.poll() is None:
            if found := at_work(self.study, of): return found
            time.sleep(0.02)
        return []

    def finish(self, caller: subprocess.Popen[str]) -> None:
        "Let the caller end, and compare with a study that nobody disturbed."
        try: status = caller.wait(LIMIT)
        except subprocess.TimeoutExpired:
            end(caller)
            return self.failed.append(f"it hangs: {self.said()}")
        if status: return self.failed.append(f"status {status}: {self.said()}")
        self.counts["studies"] += 1
        self.failed += differences(self.study, self.reference)
        return None


def faults(trial: Trial, caller: subprocess.Popen[str], do: Callable[[int], None], most: int = 6) -> None:
    "Disturb whoever is at work, some times, at random moments."
    for _ in range(trial.rng.randint(3, most)):
        reached = partial(more_than, finished(trial.study), trial.study)
        if not trial.wait_for_work(caller): return
        time.sleep(trial.rng.uniform(0.0, 0.6))
        if not (busy := at_work(trial.study)): continue
        do(trial.rng.choice(busy))
        if trial.rng.random() < 0.5: wait_for(reached, caller)


def finished(study: Path) -> int: return len(list(study.glob("runs/*/mask.safetensors")))


def more_than(number: int, study: Path) -> bool: return finished(study) > number


def wait_for(fact: Callable[[], bool], caller: subprocess.Popen[str]) -> None:
    "Wait until something is so, or the caller has ended."
    until = time.monotonic() + LIMIT
    while time.monotonic() < until and caller.poll() is None and not fact(): time.sleep(0.05)


def kill(trial: Trial, process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
        trial.counts["workers killed"] += 1
    time.sleep(0.3)


# ── parts ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def loky(trial: Trial) -> None:
    "Processes of this machine are killed."
    caller = trial.caller("--jobs", "2")

    def strike(process: int) -> None:
        if process in children(caller.pid): kill(trial, process)
    faults(trial, caller, strike)
    trial.finish(caller)
    end(caller)


def callers(trial: Trial) -> None:
    "Two callers with workers on one folder; workers of both are killed, and one of the callers."
    both = [trial.caller("--jobs", "2"), trial.caller("--jobs", "2")]
    faults(trial, both[0], lambda process: kill(trial, process), 4)
    end(both[1])
    trial.counts["callers killed"] += 1
    trial.finish(both[0])
    end(both[0])


def dask(trial: Trial) -> None:
    "Workers of a cluster are killed; their nannies start others."
    with cluster(trial.folder) as there:
        caller = trial.caller("--scheduler", there.address)
        faults(trial, caller, lambda process: kill(trial, process))
        trial.finish(caller)
        end(caller)


def lost(trial: Trial) -> None:
    "Whole workers of a cluster are lost, with their nannies, and others join."
    with cluster(trial.folder) as there:
        caller = trial.caller("--scheduler", there.address)

        def strike(_: int) -> None:
            there.add()
            end(there.workers.pop(0))
            trial.counts["workers lost"] += 1
        faults(trial, caller, strike, 4)
        trial.finish(caller)
        end(caller)


def slow(trial: Trial) -> None:
    "Workers stand still until the cluster gives their cells to others, and go on then."
    with cluster(trial.folder) as there:
        caller = trial.caller("--scheduler", there.address)

        def strike(process: int) -> None:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP)
                time.sleep(trial.rng.uniform(3.5, 6.0))
                os.kill(process, signal.SIGCONT)
                trial.counts["workers that stood still"] += 1
        faults(trial, caller, strike, 3)
        trial.finish(caller)
        end(caller)


def schedulers(trial: Trial) -> None:
    "The scheduler is killed, and started again at the same address, with new workers."
    with cluster(trial.folder) as there:
        caller = trial.caller("--scheduler", there.address)
        for _ in range(trial.rng.randint(1, 2)):
            if not trial.wait_for_work(caller): break
            time.sleep(trial.rng.uniform(0.0, 0.6))
            there.stop()
            trial.counts["schedulers killed"] += 1
            time.sleep(trial.rng.uniform(0.0, 2.0))
            there.start()
        trial.finish(caller)
        end(caller)


def full(trial: Trial) -> None:
    "A worker can no longer write: its cells go to the other one, and it is named."
    with cluster(trial.folder) as there:
        caller = trial.caller("--scheduler", there.address)
        if busy := trial.wait_for_work(caller):
            with suppress(ProcessLookupError, OSError):
                resource.prlimit(busy[0], resource.RLIMIT_FSIZE, (200, 200))
                trial.counts["disks full"] += 1
        trial.finish(caller)
        end(caller)
        said = trial.said()
        if "given to others" in said: trial.counts["workers named"] += 1
        if "cannot write" in said and f"(process {busy[0]})" not in said: trial.failed.append(f"no name: {said}")


PARTS: dict[str, Callable[[Trial], None]] = {
    "loky": loky, "callers": callers, "dask": dask, "lost": lost, "slow": slow, "schedulers": schedulers, "full": full,
}


# ── the program ──────────────────────────────────────────────────────────────────────────────────────────────────────

def reference(place: Path) -> Path:
    "The study that nobody disturbs, by one process."
    alone = Trial("alone", 0, place / "alone", place)
    caller = alone.caller()
    if caller.wait(LIMIT): raise SystemExit(alone.said())
    shutil.copytree(alone.study, place / "reference")
    return place / "reference"


def tried(part: str, seed: int, place: Path, against: Path) -> Trial:
    "One trial."
    trial = Trial(part, seed, place / f"{part}-{seed}", against)
    try: PARTS[part](trial)
    except Exception as error: trial.failed.append(f"the campaign itself: {type(error).__name__}: {error}")
    if not trial.failed: shutil.rmtree(trial.folder, ignore_errors=True)
    return trial


def main() -> int:
    "Run it as the command line says."
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--trials", type=int, default=1, help="trials of every part")
    given.add_argument("--seed", type=int, default=0, help="number of the first trial")
    given.add_argument("--only", choices=list(PARTS), action="append", help="a part; may be given several times")
    given.add_argument("--json", type=Path, help="file for the counts")
    asked = given.parse_args()
    place = Path(tempfile.mkdtemp(prefix="cluster-"))
    against, counts, bad = reference(place), dict[str, Counter[str]](), 0
    for part in asked.only or PARTS:
        counts[part] = Counter()
        for seed in range(asked.seed, asked.seed + asked.trials):
            began = time.monotonic()
            trial = tried(part, seed, place, against)
            counts[part].update({**trial.counts, "trials": 1, "failed": bool(trial.failed)})
            bad += bool(trial.failed)
            took = time.monotonic() - began
            print(f"{part} {seed}: {took:.0f} s, {dict(trial.counts)}", *trial.failed[:5], flush=True)
    for part, found in counts.items():
        for name, n in sorted(found.items()): print(f"{part:12} {name:28} {n:6}")
    if asked.json: asked.json.write_text(json.dumps(counts, indent=1) + "\n")
    if not bad: shutil.rmtree(place)
    return int(bad > 0)


if __name__ == "__main__": sys.exit(main())
