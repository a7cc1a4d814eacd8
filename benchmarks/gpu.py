"""Everything that only a GPU can show, in one go of at most eight minutes: see `make gpu` in CONTRIBUTING.md.

Tests marked `gpu`, the short benchmark, and a whole job run one after another, each in a process with a limit of its
own. After each, what is known so far is written into GPU.md and gpu.json, also if a part fails or is stopped.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "benchmarks" / "GPU.md"
WHEELS = ROOT / ".wheels"
NEEDED = ("zstandard", "conllu", "plotly")
"What is imported besides PyTorch, transformers, pytest, hypothesis and what these need; `make gpu-wheels` collects it."
LIMITS = {"tests": 210, "benchmark": 180, "job": 75}
"Seconds of each part; together less than eight minutes."
CLAIMS = {
    "tests": (
        "The update compiled for a GPU (Triton): here the same function is compiled for the CPU, captured as one graph "
        "without breaks, and run as it is written on a pretended card.",
        "Capture and replay of CUDA graphs: on a pretended card, captured steps hold nothing that a capture forbids, "
        "and replaying them finds what computing them finds. Allocation and streams are not pretended.",
        "Semi-structured 2:4 kernels: torch has them on CUDA only.",
        "The order of sums in CUDA's kernels, and with it how near a search on a GPU comes to one on a CPU.",
    ),
    "benchmark": (
        "Every ratio of speed and memory on a GPU; none is claimed.",
        "Autocast to bfloat16 on a GPU: CUDA's own list of operations, its kernels and their digits. On the CPU, "
        "autocast of the same steps is tested.",
    ),
    "job": ("That a whole study at the size of BERT-base runs through on a GPU, and in what time.",),
}
"What each part would show, and what stands for it as long as it has not."
NOBODY = "Several GPUs, other makers' cards, and models that fill a card's memory: no part of `make gpu` tries them."


@dataclass
class Findings:
    "What is known so far."
    machine: dict[str, Any] = field(default_factory=dict)
    tests: dict[str, str] = field(default_factory=dict)              # outcome by name
    benchmark: dict[str, Any] = field(default_factory=dict)          # what benchmarks/run.py writes
    job: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)                   # what went wrong


# ── what is run ──────────────────────────────────────────────────────────────────────────────────────────────────────

def environment() -> dict[str, str]:
    "Environment of the parts: this checkout first, wheels behind it where packages are missing."
    paths = [str(ROOT)]
    if not all(map(find_spec, NEEDED)) and (wheels := sorted(WHEELS.glob("*.whl"))):
        for wheel in wheels: zipfile.ZipFile(wheel).extractall(WHEELS / "site")
        paths.append(str(WHEELS / "site"))
    paths += [p for p in [os.environ.get("PYTHONPATH")] if p]
    more = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}
    return os.environ | more | {"PYTHONPATH": os.pathsep.join(paths)}


def ran(command: Sequence[str], seconds: float) -> tuple[str, str | None]:
    "What a command said, and why it did not end well, if it did not."
    with tempfile.TemporaryFile("w+") as said:      # a file and no pipe: what was said before a limit is kept
        try:
            code = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=environment(), timeout=seconds, check=False,
                stdout=said, stderr=subprocess.STDOUT,
            ).returncode      # fmt: skip
            why = f"ended with {code}" if code else None
        except subprocess.TimeoutExpired: why = f"was stopped after {seconds:g} s"
        said.seek(0)
        return said.read(), why


OUTCOME = re.compile(r"^(tests/\S+\.py::.+?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b", re.M)


def tested(which: Sequence[str], seconds: float, found: Findings) -> None:
    "Run tests; `which` are arguments of pytest."
    options = ["-v", "--color=no", "-p", "no:cacheprovider", "-p", "no:xdist", "--continue-on-collection-errors"]
    said, why = ran(["-m", "pytest", *options, *which], seconds)
    found.tests = {name: outcome.lower() for name, outcome in OUTCOME.findall(said)}
    if why: found.notes.append(f"tests: pytest {why}\n{last_lines(said)}")


def measured(options: Sequence[str], seconds: float, found: Findings) -> None:
    "Run the short benchmark."
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        said, why = ran(["benchmarks/run.py", *options, "--no-memory", "--anyway", "--json", str(file)], seconds)
        if file.exists(): found.benchmark = json.loads(file.read_text())
    if why: found.notes.append(f"benchmark: run.py {why}\n{last_lines(said)}")


def worked(device: str, small: bool, seconds: float, found: Findings) -> None:
    "Run the whole job."
    said, why = ran(["benchmarks/gpu.py", "--child", device, *["--small"] * small], seconds)
    rows = [line for line in said.splitlines() if line.startswith('{"')]
    if rows: found.job = json.loads(rows[-1])
    if why: found.notes.append(f"job: {why}\n{last_lines(said)}")


def last_lines(text: str, n: int = 12) -> str: return "\n".join(text.rstrip().splitlines()[-n:])


def job(device: str, small: bool) -> None:
    "LAMP on a model of random weights, as large as BERT-base; a line of JSON after every relation."
    import torch
    from transformers import BertConfig, BertForMaskedLM

    from subnet_explorer import Cloze, Space, Threshold, find, load, read_facts
    _, tok = load("pocket-bert")
    size = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128) if small else {}
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=len(tok), **size)).eval().to(device)
    facts, steps = read_facts("pocket"), 5 if small else 200
    space = Space.of(model, "weight", layers="top-half")
    seconds: list[float] = []
    for relation in facts.relations[:3 if small else None]:
        begin = time.perf_counter()
        goal, gate = Cloze(facts[relation]), Threshold(space, seed=0)
        run = find(model, tok, gate, goal, steps=steps, lr=3e-3, batch=32, progress=False, every=steps)
        if device == "cuda": torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        told = dict(relations=len(seconds), steps=steps, seconds=sum(seconds), first=seconds[0])
        told["parameters"], told["loss"] = sum(p.numel() for p in model.parameters()), float(run.metrics.loss.iloc[-1])
        print(json.dumps(told), flush=True)


def machine() -> dict[str, Any]:
    "Card, driver and versions."
    import torch
    import transformers
    out = {"python": platform.python_version(), "torch": torch.__version__, "CUDA": torch.version.cuda or "none"}
    out["transformers"] = transformers.__version__
    if not torch.cuda.is_available(): return {"card": "none: a rehearsal on the CPU", "driver": "none", **out}
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try: driver = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError): driver = "unknown"
    return {"card": torch.cuda.get_device_name(), "driver": driver, **out}


# ── what is written ──────────────────────────────────────────────────────────────────────────────────────────────────

def collected() -> list[str]:
    "Names of all tests that need a GPU."
    files = [f for f in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in f.read_text(encoding="utf-8")]
    names = [str(f.relative_to(ROOT)) for f in files]
    said, why = ran(["-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", *names], 120)
    if why: raise SystemExit(f"the tests that need a GPU cannot be listed: pytest {why}\n{last_lines(said)}")
    return [line for line in said.splitlines() if line.startswith("tests/") and "::" in line]


def unproven(found: Findings, every: Sequence[str]) -> list[str]:
    "What no GPU has shown yet."
    card = not found.machine.get("card", "none").startswith("none")
    open_tests = [name for name in every if not card or found.tests.get(name) != "passed"]
    measured = card and bool(ratios(found.benchmark))
    done = {"tests": not open_tests, "benchmark": measured, "job": card and bool(found.job)}
    claims = [claim for part, said in CLAIMS.items() if not done[part] for claim in said]
    return [*claims, NOBODY, *(f"`{name}`" for name in open_tests)]


def ratios(results: dict[str, Any]) -> list[tuple[str, str, str, float]]:      # workload, variant, anchor, ratio
    "How many times faster than its anchors each variant was."
    out = []
    for workload, part in results.items():
        rows = part.get("rows", {}) if isinstance(part, dict) else {}
        for variant, row in rows.items():
            out += [(workload, variant, anchor, s["median"]) for anchor, s in row.get("speed", {}).items()]
    return out


def page(found: Findings, every: Sequence[str]) -> str:
    "GPU.md."
    text = ["# What a GPU has shown", "", "Made by `make gpu`; do not edit.", ""]
    if found.machine: text += [f"- {name}: {value}" for name, value in found.machine.items()]
    else: text += ["No card has run this yet."]
    if found.tests:
        counts = [f"{list(found.tests.values()).count(o)} {o}" for o in sorted(set(found.tests.values()))]
        text += ["", "## Tests", "", ", ".join(counts), "", "| test | outcome |", "|---|---|"]
        text += [f"| `{name}` | {outcome} |" for name, outcome in found.tests.items()]
    if rows := ratios(found.benchmark):
        text += ["", "## Benchmark", "", "| workload | variant | against | times as fast |", "|---|---|---|---|"]
        text += [f"| {w} | {v} | {a} | {x:.2f} |" for w, v, a, x in rows]
    if found.job:
        j = found.job
        text += ["", "## Whole job", "", f"{j['relations']} relations, {j['steps']} steps each, a model of "
                 f"{j['parameters']:,} parameters: {j['seconds']:.1f} s ({j['first']:.1f} s the first)."]
    for note in found.notes: text += ["", "```", note, "```"]
    text += ["", "## What remains unproven", "", *(f"- {line}" for line in unproven(found, every))]
    return "\n".join(text) + "\n"


def write(found: Findings, every: Sequence[str], to: Path) -> None:
    "Write what is known so far."
    to.with_name("gpu.json" if to == PAGE else to.stem + ".json").write_text(json.dumps(asdict(found), indent=1) + "\n")
    to.write_text(page(found, every), encoding="utf-8")


def known() -> Findings:
    "What the last run on a card found."
    file = PAGE.with_name("gpu.json")
    return Findings(**json.loads(file.read_text())) if file.exists() else Findings()


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────

def command_line() -> argparse.ArgumentParser:
    "The options."
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--rehearse", action="store_true", help="the same steps on the CPU, at sizes of a toy")
    p.add_argument("--list", action="store_true", help="only write the page anew, with the tests that there are now")
    p.add_argument("--to", type=Path, default=None, metavar="PAGE.md", help="instead of GPU.md; needed to rehearse")
    p.add_argument("--tests", nargs="+", metavar="ARG", help="arguments of pytest instead of -m gpu tests")
    p.add_argument("--child", default=None, help=argparse.SUPPRESS)
    p.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    return p


NO_CARD = "make gpu needs a CUDA device, and PyTorch finds none here: {} was left as it is."


def main(argv: Sequence[str] | None = None) -> int:
    "Run what the command line asks for; 0 if every part ended well."
    p = command_line()
    args = p.parse_args(argv)
    if args.child:
        job(args.child, args.small)
        return 0
    to = args.to or PAGE
    if args.rehearse and to == PAGE: p.error("a rehearsal needs --to: what it writes is no finding")
    if args.list:
        to.write_text(page(known(), collected()), encoding="utf-8")
        return 0
    import torch
    if not (args.rehearse or torch.cuda.is_available()):
        print(NO_CARD.format(to.name), file=sys.stderr)
        return 2
    device = "cpu" if args.rehearse else "cuda"
    every, found = collected(), Findings(machine())
    small = ["--quick", "--variants", "engine", "--only", "cloze", "--rounds", "1"]
    short = ["--only", "cloze,text,probe", "--rounds", "3"]
    parts = {
        "tests": lambda s: tested(args.tests or ["-m", "gpu", "tests"], s, found),
        "benchmark": lambda s: measured(["--device", device, *(small if args.rehearse else short)], s, found),
        "job": lambda s: worked(device, args.rehearse, s, found),
    }
    for name, run in parts.items():
        print(f"{name} (at most {LIMITS[name]} s) …", flush=True)
        run(LIMITS[name])
        write(found, every, to)
    print(page(found, every))
    return int(bool(found.notes))


if __name__ == "__main__": sys.exit(main())
