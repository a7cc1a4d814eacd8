"""Studies that are killed, refused, cut short, told to stop, shared and damaged: nothing of what they find may change.

`python tests/campaign.py --minutes 30` does as much as fits into half an hour; with `--only kills --seed 17 --trials 1`
it does trial 17 of one part again. A table of counts stands at the end, and the status is 1 if anything differed; the
folders of such trials are kept. See benchmarks/RELIABILITY.md.
"""
from __future__ import annotations

import argparse
import csv
import errno
import json
import math
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import disk
import fuzzing
import tiny

from subnet_explorer.core.errors import SubnetError
from subnet_explorer.core.log import read_log
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.store import Store

LONG = 300.0      # seconds after which a child that was not disturbed is said to hang
PATIENCE = 5.0    # seconds in which a signal must be obeyed


# ── what a study is compared by ──────────────────────────────────────────────────────────────────────────────────────

UNLIKE = re.compile(r"(^|/)(env\.json|\.index\.json)$|^sessions/")
"Files that say when and where something was made."
LEFT = re.compile(r"(^|/)(\.(writing|removing)-.*|\.leases|cycle-\d+)(/|$)")
"What is there only while somebody works."


def paths(study: Path) -> dict[str, Path]:
    "All that is in a study, by its path from there; folders that are empty, too."
    return {path.relative_to(study).as_posix(): path for path in sorted(study.rglob("*"))}


TIMES = ("seconds", "seal", "checksum", "environment", "files")
"Parts of files that say how long something took, or follow from that."


def without_times(value: Any) -> Any:
    "Plain data without how long anything took."
    if isinstance(value, list): return [without_times(v) for v in value]
    if not isinstance(value, dict): return value
    return {k: without_times(v) for k, v in value.items() if k not in TIMES}


def content(path: Path) -> Any:
    "What a file says, but for times."
    if path.is_dir(): return "a folder"
    if path.suffix == ".json": return without_times(json.loads(path.read_text()))
    if path.suffix == ".jsonl": return without_times(read_log(path).rows)
    if path.suffix != ".csv": return path.read_bytes()
    with path.open(newline="") as file: return without_times(list(csv.DictReader(file)))


def differences(study: Path, wanted: Path) -> list[str]:
    "What is not as in an undisturbed study: files that are there or not, what they say, logs, stores."
    ours, theirs = ({k: p for k, p in paths(s).items() if not UNLIKE.search(k)} for s in (study, wanted))
    said = [f"left over: {name}" for name in paths(study) if LEFT.search(name)]
    said += [f"missing: {name}" for name in theirs if name not in ours]
    said += [f"too much: {name}" for name in ours if name not in theirs and not LEFT.search(name)]
    said += [f"differs: {name}" for name in ours if name in theirs and content(ours[name]) != content(theirs[name])]
    return said + unreadable(study)


def unreadable(study: Path) -> list[str]:
    "Runs that cannot be read, and logs that are not whole."
    said = []
    for config in sorted(study.rglob("config.json")):
        log = read_log(config.parent / "metrics.jsonl")
        whole = not log.damage and not log.torn and log.lines == len(log.rows)
        finished = (config.parent / "mask.safetensors").exists()
        if whole and (log.ended or not finished): continue
        said.append(f"log: {config.parent.relative_to(study)}: {log}"[:300])
    if (study / "runs").is_dir():
        said += [f"broken: {folder.name}: {why}" for folder, why in Store(study / "runs").broken.items()]
        said += [f"not finished: {run.folder}" for run in Store(study / "runs") if not run.done]
    return said


# ── a trial ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclass
class Trial:
    "A folder for one study, the chance in it, and what came of it."
    part: str
    seed: int
    recipe: str
    folder: Path
    reference: Path
    seconds: float                                             # that the study takes if nobody disturbs it
    short: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.part} {self.seed}")
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def study(self) -> Path: return self.folder / "study"

    def times(self, least: int, most: int) -> range:
        "How often something is done to the study."
        return range(1 if self.short else self.rng.randint(least, most))

    def start(self, do: Callable[[], Any] | None = None, at: float = 0.0) -> tiny.Child:
        "A child that makes the study, or does something else."
        return tiny.Child(self.folder, do or partial(tiny.study, self.recipe), at)

    def fail(self, why: str) -> None: self.failed.append(why)

    def ended(self, child: tiny.Child, wanted: int = tiny.FINE) -> bool:
        "Whether a child ends as it should."
        status = child.wait(LONG)
        if status == wanted: return True
        if status is None: child.kill()
        self.fail(f"status {'none: it hangs' if status is None else status}, not {wanted}: {child.said[-1500:]}")
        return False

    def finish(self) -> None:
        "Let an undisturbed child do the rest, and compare."
        if self.ended(self.start()): self.compare()

    def compare(self) -> None:
        "Compare with the undisturbed study."
        self.counts["studies"] += 1
        self.failed += differences(self.study, self.reference)

    def check_done_once(self, kills: int) -> None:
        "Whether no cell, table or training was done again, but for those in flight at kills."
        told = tiny.events(self.folder)
        done = Counter((e["what"], e["name"]) for e in told if e["what"] in ("cell", "table"))
        trained = [e for e in told if e["what"] == "trained" and e["run"] and e["first"] < e["at"]]
        done += Counter(("trained", e["run"]) for e in trained)
        again = {what: n - 1 for what, n in done.items() if n > 1}
        self.counts["cells done"] += sum(n for (what, _), n in done.items() if what == "cell")
        self.counts["done twice"] += sum(again.values())
        if sum(again.values()) > kills: self.fail(f"done again, with {kills} kills: {again}")


# ── 1 and 2: kills ───────────────────────────────────────────────────────────────────────────────────────────────────

def kills(trial: Trial) -> None:
    "Kills at random times."
    for _ in trial.times(5, 14):
        child = trial.start()
        if child.wait(trial.rng.uniform(0.02, 0.3 * trial.seconds)) is None and child.kill(): trial.counts["kills"] += 1
        elif not trial.ended(child): return
        else: break
    trial.finish()
    trial.check_done_once(trial.counts["kills"])


PLACES = [(what, when) for what in disk.CHANGES for when in ("before", "after")] + [("write", "half")] * 2
"Where a process may be killed in what it does to the disk."


def operations(trial: Trial) -> None:
    "Kills before, after and in the middle of what is done to the disk."
    links = trial.rng.random() < 0.8
    if not links: trial.counts["without hard links"] += 1
    for _ in trial.times(8, 14):
        what, when = trial.rng.choice(PLACES)
        number = max(1, round(_MOST[what] * trial.rng.uniform(0, 0.4) ** 1.5))
        moment: disk.Watch = disk.Moment(what, number, when)
        child = trial.start(partial(under, moment if links else disk.NoLinks(moment), trial.recipe))
        if child.wait(LONG) == -signal.SIGKILL:
            trial.counts["kills"] += 1
            trial.counts[f"kills {when} {what}"] += 1
        elif not trial.ended(child): return trial.fail(f"{what} {number} {when}, links {links}")
        elif trial.rng.random() < 0.5: break      # it is finished; if not, something of a finished one is killed
    trial.finish()
    return trial.check_done_once(trial.counts["kills"])


_MOST = {"write": 80, "fsync": 80, "fsync-folder": 80, "replace": 60, "open": 80, "link": 12, "rename": 2, "unlink": 20,
         "mkdir": 8, "rmdir": 8}
"How often a small study does something, about."


def under(watch: disk.Watch, recipe: str) -> None:
    "Make a study while something watches its folder."
    with disk.watched(Path("study"), watch): tiny.study(recipe)


# ── 3: several processes ─────────────────────────────────────────────────────────────────────────────────────────────

def crowd(trial: Trial, size: int) -> None:
    "Processes that begin at the same moment in one folder; in half of the trials some are killed."
    at = time.monotonic() + 0.3
    children = [trial.start(at=at) for _ in range(size)]
    dying = trial.rng.sample(children, trial.rng.randint(1, size)) if trial.rng.random() < 0.5 else []
    for child in dying:
        if child.wait(trial.rng.uniform(0.3, trial.seconds)) is None and child.kill():
            trial.counts["kills"] += 1
            if trial.rng.random() < 0.5: children.append(trial.start())
    trial.counts["processes"] += len(children)
    for child in children:
        if child.status != -signal.SIGKILL: trial.ended(child)
    if trial.failed: return
    if trial.counts["kills"]: trial.finish()
    else: trial.compare()
    trial.check_done_once(trial.counts["kills"])


# ── 4: what the system refuses ───────────────────────────────────────────────────────────────────────────────────────

_FULL, _FORBIDDEN = [errno.ENOSPC, errno.EDQUOT], [errno.EACCES, errno.EROFS]
ERRORS = {"write": [*_FULL, errno.EIO], "fsync": [*_FULL, errno.EIO], "fsync-folder": [errno.EIO],
          "open": [*_FULL, *_FORBIDDEN], "replace": [*_FULL, *_FORBIDDEN], "link": [*_FULL, *_FORBIDDEN],
          "mkdir": [*_FULL, *_FORBIDDEN], "unlink": _FORBIDDEN, "rename": _FORBIDDEN}
"What a system may say."
_PAIRS = [(what, error) for what in ERRORS for error in ERRORS[what]]


def refusals(trial: Trial) -> None:
    "A full disk, or no permission, at some change: a named error, nothing half-written, and the next start goes on."
    for i in trial.times(4, 4):
        what, error = _PAIRS[(4 * trial.seed + i) % len(_PAIRS)]
        number, lasting = max(1, round(_MOST[what] * trial.rng.uniform(0, 0.7) ** 2)), trial.rng.random() < 0.5
        when = "half" if what == "write" and trial.rng.random() < 0.7 else "before"
        told = f"{errno.errorcode[error]} at {what} {number}, {when}, lasting {lasting}"
        child = trial.start(partial(refused, trial.recipe, disk.Refuse(what, number, when, 0, error, lasting)))
        status = child.wait(LONG)
        happened = [e["times"] for e in tiny.events(trial.folder) if e["what"] == "refused"][-1:]
        if happened and happened[0]: trial.counts[f"{errno.errorcode[error]} at {what}"] += 1
        check_refused(trial, child, status, what, told)
        if trial.failed or (trial.study / "results.json").exists(): break
    if not trial.failed: trial.finish()


def refused(recipe: str, watch: disk.Refuse) -> None:
    "Make a study on a disk that refuses something."
    try: under(watch, recipe)
    finally: tiny.tell(what="refused", times=len(watch.happened))


def check_refused(trial: Trial, child: tiny.Child, status: int | None, what: str, told: str) -> None:
    "Whether a process ended well, or said what it could not write."
    if status is None: child.kill()
    if status == tiny.FINE: trial.counts["went on"] += 1
    elif status == tiny.REFUSED and "study" in child.said: trial.counts["named errors"] += 1
    else: return trial.fail(f"{told}: status {status}: {child.said[-1500:]}")
    left = [name for name in paths(trial.study) if "/.writing-" in f"/{name}"] if trial.study.exists() else []
    if left and what != "unlink": trial.fail(f"{told}: half-written: {left}")
    return None


# ── 5: power cuts ────────────────────────────────────────────────────────────────────────────────────────────────────

def power(trial: Trial) -> None:
    "The power fails: what was not sent to the disk is lost, in part or as a whole."
    built = trial.folder / "after the cut"
    for _ in trial.times(2, 4):
        number, chance = math.ceil(math.exp(trial.rng.uniform(0, math.log(400)))), trial.rng.randrange(1 << 30)
        child = trial.start(partial(until_cut, trial.recipe, number, chance, built))
        if child.wait(LONG) != -signal.SIGKILL:
            if not trial.ended(child): return trial.fail(f"at change {number}")
            break
        shutil.rmtree(trial.study, ignore_errors=True)
        if (built / "study").exists(): (built / "study").rename(trial.study)
        shutil.rmtree(built)
        trial.counts["power cuts"] += 1
    trial.finish()
    return None


def until_cut(recipe: str, number: int, chance: int, built: Path) -> None:
    "Make a study until the power fails."
    under(disk.PowerCut(Path("study").absolute(), number, random.Random(chance), built), recipe)


# ── 6: signals ───────────────────────────────────────────────────────────────────────────────────────────────────────

def signals(trial: Trial) -> None:
    "A command that is told to stop saves, leaves in time, and goes on at the same step."
    for _ in trial.times(2, 5):
        child = trial.start(partial(tiny.command, trial.recipe))
        if not wait_for(trial.study / "study.json", child): break
        if child.wait(trial.rng.uniform(0.0, 0.6 * trial.seconds)) is not None: break
        number = trial.rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
        if not check_signal(trial, child, number): return
    if child.status is None or child.status >= 128: trial.finish()
    elif trial.ended(child): trial.compare()
    check_steps(trial)


def wait_for(file: Path, child: tiny.Child) -> bool:
    "Wait until there is a file; whether the child is still there then."
    while not file.exists():
        if child.wait(0.005) is not None: return False
    return True


def check_signal(trial: Trial, child: tiny.Child, number: signal.Signals) -> bool:
    "Send a signal; whether the child leaves as it should."
    child.signal(number)
    sent = time.monotonic()
    status = child.wait(LONG)
    took = time.monotonic() - sent
    trial.counts[f"signals {number.name}"] += 1
    trial.counts["longest, milliseconds"] = max(trial.counts["longest, milliseconds"], round(1000 * took))
    late = status in (0, -number) and (trial.study / "results.json").exists()      # it was over already
    if late: trial.counts["after the end"] += 1
    elif status != 128 + number: trial.fail(f"{number.name}: status {status}: {child.said[-1500:]}")
    if took > PATIENCE: trial.fail(f"{number.name}: left after {took:.1f} s")
    return not trial.failed and not late


def check_steps(trial: Trial) -> None:
    "Whether every training that was stopped goes on at the same step."
    told = tiny.events(trial.folder)
    for i, stop in enumerate(told):
        if stop["what"] != "stopped" or stop["run"] is None: continue
        later = next((e for e in told[i + 1:] if e["what"] == "training" and e["run"] == stop["run"]), None)
        if later is None: continue
        trial.counts["stopped in a training"] += 1
        if later["at"] != stop["at"]: trial.fail(f"{stop['run']}: stopped at {stop['at']}, goes on at {later['at']}")


# ── 7: damage ────────────────────────────────────────────────────────────────────────────────────────────────────────

_WAYS = [way for way in fuzzing.WAYS if way.__name__ != "_edit"]
"Ways to damage bytes; checksums that are computed anew are a lie and no damage."


def damaged(trial: Trial) -> None:
    "Files of a study that are damaged: a named error, or the right results; and other runs are served all the same."
    if trial.rng.random() < 0.5: shutil.copytree(trial.reference, trial.study)
    else:
        child = trial.start()
        if child.wait(trial.rng.uniform(0.2, 0.9) * trial.seconds) is None: child.kill()
    files = [path for path in paths(trial.study).values() if path.is_file() and path.stat().st_size]
    before = {path: path.read_bytes() for path in trial.rng.sample(files, min(len(files), trial.rng.choice((1, 1, 2))))}
    for path, data in before.items(): path.write_bytes(trial.rng.choice(_WAYS)(data, trial.rng))
    told = ", ".join(path.relative_to(trial.study).as_posix() for path in before)
    check_store(trial, told)
    child = trial.start()
    status = child.wait(LONG)
    trial.counts["files damaged"] += len(before)
    if status == tiny.FINE: trial.failed += [f"{told}: {why}" for why in other_results(trial)]
    elif status != tiny.REFUSED or "study" not in child.said: trial.fail(f"{told}: {status}: {child.said[-1500:]}")
    if not trial.failed: trial.counts["right results" if status == tiny.FINE else "named errors"] += 1
    if status != tiny.REFUSED: return
    for path, data in before.items():
        if path.parent.exists(): path.write_bytes(data)
    trial.finish()


def other_results(trial: Trial) -> list[str]:
    "Results and tables that are not as they should be."
    names = [path.name for path in trial.reference.iterdir() if path.suffix == ".csv"]
    return [f"other {name}" for name in ["results.json", *names]
            if content(trial.study / name) != content(trial.reference / name)]


def check_store(trial: Trial, told: str) -> None:
    "Whether a store serves what is not damaged, says what is, and never serves anything else."
    folder = trial.study / "runs"
    if not folder.is_dir(): return
    store = Store(folder)
    runs, there = store.runs(), len(list(folder.glob("*/config.json")))
    trial.counts["runs served"] += len(runs)
    trial.counts["runs named as broken"] += len(store.broken)
    if len(runs) + len(store.broken) != there: trial.fail(f"{told}: {len(runs)} runs of {there}, {store.broken}")
    for run in runs:
        assert run.folder is not None
        if not run.done: continue
        wanted = Mask.load(trial.reference / "runs" / run.folder.name / "mask.safetensors").id
        try: found = run.mask.id
        except SubnetError: continue
        if found != wanted: trial.fail(f"{told}: another mask in {run.folder.name}")


# ── damaged files by the thousand ────────────────────────────────────────────────────────────────────────────────────

KINDS = ("mask", "json", "log", "tensors", "sealed", "earlier")
ROUND = 2000      # files of a trial


def files(trial: Trial) -> None:
    "Damaged files of one kind: see tests/fuzzing.py."
    kind = KINDS[trial.seed % len(KINDS)]
    child = trial.start(partial(fuzzed, kind, trial.seed, trial.reference.parent))
    trial.ended(child)
    for told in tiny.events(trial.folder):
        for outcome, n in told["counts"].items(): trial.counts[f"{kind}: {outcome}"] += n


def fuzzed(kind: str, seed: int, references: Path) -> int:
    "Damage and read; the status is 1 if anything bad came of it."
    own = kind in fuzzing.OWN
    found, reader = fuzzing.of_studies(kind, references, Path()) if own else fuzzing.of_kind(kind)
    counts = fuzzing.fuzz(kind, found, reader, ROUND, seed, Path("bad"))
    tiny.tell(what="fuzzed", counts=counts)
    return int(any(counts[bad] for bad in fuzzing.BAD))


# ── the program ──────────────────────────────────────────────────────────────────────────────────────────────────────

PARTS: dict[str, tuple[Callable[[Trial], None], float]] = {
    "kills": (kills, 3.0), "operations": (operations, 3.0), "pairs": (partial(crowd, size=2), 2.0),
    "quadruples": (partial(crowd, size=4), 1.0), "refusals": (refusals, 2.0), "power": (power, 2.0),
    "signals": (signals, 1.0), "damaged": (damaged, 1.0), "files": (files, 1.0),
}
"What is done, and what share of the time it gets."


SHORT = [part for part in PARTS if part not in ("quadruples", "damaged", "files")]
"What is done in short."


@dataclass
class Campaign:
    "Trials in a folder, and what came of them."
    place: Path
    keep: Path
    recipes: list[str]
    short: bool = False
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    failed: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def get_ready(self) -> None:
        "Make the studies that all others are compared with, twice, so that nothing in them is left to chance."
        if self.short: tiny.make_smaller(self.recipes)
        tiny.get_ready(self.recipes, self.place / "inputs")
        for recipe in self.recipes:
            for first in (True,) if self.short else (True, False):
                trial, began = self.trial("reference", int(first), recipe), time.monotonic()
                if not trial.ended(trial.start()): raise SystemExit(f"{recipe}: {trial.failed}")
                self.seconds[recipe] = time.monotonic() - began
                if first: shutil.copytree(trial.study, trial.reference)
                tiny.take_over(trial.folder)
            trial.compare()
            self.note(trial)

    def trial(self, part: str, seed: int, recipe: str) -> Trial:
        "A new one."
        folder, reference = self.place / f"{part}-{seed}", self.place / "references" / recipe
        return Trial(part, seed, recipe, folder, reference, self.seconds.get(recipe, 5.0), self.short)

    def do(self, part: str, seed: int) -> None:
        "One trial."
        trial = self.trial(part, seed, self.recipes[seed % len(self.recipes)])
        try: PARTS[part][0](trial)
        except Exception as error: trial.fail(f"the campaign itself: {type(error).__name__}: {error}")
        self.note(trial)

    def note(self, trial: Trial) -> None:
        "Add what came of a trial, and keep its folder if anything was wrong."
        counts = self.counts.setdefault(trial.part, Counter())
        most = {name: max(n, counts[name]) for name, n in trial.counts.items() if name.startswith("longest")}
        counts.update({**trial.counts, "trials": 1, "failed": bool(trial.failed), f"trials {trial.recipe}": 1})
        for name, n in most.items(): counts[name] = n
        if trial.failed:
            kept = self.keep / trial.folder.name
            shutil.rmtree(kept, ignore_errors=True)
            if trial.folder.exists(): shutil.copytree(trial.folder, kept)
            self.failed.append({"part": trial.part, "seed": trial.seed, "recipe": trial.recipe, "why": trial.failed})
            told = f"FAILED {trial.part} --seed {trial.seed} ({trial.recipe}), kept in {kept}:"
            print(told, *trial.failed, sep="\n  ", flush=True)
        shutil.rmtree(trial.folder, ignore_errors=True)

    def go(self, parts: list[str], minutes: float, seed: int, trials: int | None) -> None:
        "As many trials as fit into the time, or as were asked for."
        whole = sum(PARTS[part][1] for part in parts)
        for part in parts:
            until = time.monotonic() + 60 * minutes * PARTS[part][1] / whole
            for number in seeds(seed, trials):
                if trials is None and time.monotonic() >= until: break
                self.do(part, number)
            print(part, dict(self.counts.get(part, {})), flush=True)

    def table(self) -> str:
        "Everything that was counted."
        rows = [(part, name, n) for part, counts in self.counts.items() for name, n in sorted(counts.items())]
        return "\n".join(f"{part:12} {name:36} {n:10,}" for part, name, n in rows)


def seeds(first: int, trials: int | None) -> Iterator[int]:
    "The numbers of trials."
    number = first
    while trials is None or number < first + trials:
        yield number
        number += 1


def arguments() -> argparse.Namespace:
    "What the command line says."
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--minutes", type=float, default=10.0, help="how long all of it takes, about")
    given.add_argument("--seed", type=int, default=0, help="number of the first trial")
    given.add_argument("--trials", type=int, help="trials of every part, however long they take")
    given.add_argument("--only", choices=list(PARTS), action="append", help="a part; may be given several times")
    given.add_argument("--recipes", help="separated by commas; all if nothing is said")
    given.add_argument("--json", type=Path, help="file for counts and failures")
    given.add_argument("--keep", type=Path, default=Path("build/campaign"), help="folder for trials that failed")
    given.add_argument("--place", type=Path, help="folder for trials; in memory if nothing is said")
    given.add_argument("--short", action="store_true", help="one small trial of most parts, with one recipe")
    asked = given.parse_args()
    if asked.short:
        asked.recipes, asked.trials, asked.only = asked.recipes or "critical", 1, asked.only or list(SHORT)
    return asked


def main() -> int:
    "Run it as the command line says; the status is 1 if anything differed."
    asked = arguments()
    warnings.simplefilter("ignore")
    memory = Path("/dev/shm")
    above = asked.place or (memory if memory.is_dir() else None)
    place = Path(tempfile.mkdtemp(prefix="campaign-", dir=above))
    recipes = asked.recipes.split(",") if asked.recipes else list(tiny.COMMANDS)
    campaign = Campaign(place, asked.keep.absolute(), recipes, asked.short)
    given = asked.json and asked.json.absolute()
    try:
        campaign.get_ready()
        campaign.go(asked.only or list(PARTS), asked.minutes, asked.seed, asked.trials)
    finally: shutil.rmtree(place, ignore_errors=True)
    print(campaign.table())
    if given: given.write_text(json.dumps({"counts": campaign.counts, "failed": campaign.failed}, indent=1) + "\n")
    return int(bool(campaign.failed))


if __name__ == "__main__": sys.exit(main())
