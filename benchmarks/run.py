"Run the benchmarks: see README.md."
from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")      # before torch: threads that wait take no core

import argparse
import gc
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import growth
import harness
import machine
from baselines import ANCHORS, BASELINES, Variant
from engine import ENGINE
from targets import TARGETS, Target
from workloads import WORKLOADS

PARTS = ("machine", "cloze", "text", "critical", "probe", "importance", "compact", "masks", "growth")


def variants_of(name: str) -> dict[str, Variant]:
    "Baselines and engine variants of a workload."
    return BASELINES[name] | ENGINE.get(name, {})


def chosen(name: str, names: Sequence[str] | None) -> dict[str, Variant]:
    "The variants of a workload that were asked for, with the anchors; all if none was."
    variants = variants_of(name)
    if names is None: return variants
    return {n: f for n, f in variants.items() if n in {*names, *ANCHORS[name]}}


def weighed(name: str, names: Sequence[str], quick: bool) -> list[str]:
    "Variants whose memory is measured: all; of a quick run those that have a target for it, of `cloze`."
    if not quick: return list(names)
    if name != "cloze": return []
    targets = [t for t in TARGETS if t.workload == name and t.measure == "memory"]
    return [n for n in names if any(n in (t.variant, t.anchor) for t in targets)]


def weigh(name: str, variants: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    "Memory of variants, each in a process of its own; say which could not be measured."
    flags = ["--quick"] * args.quick + ["--device", args.device]
    memory: dict[str, Any] = {}
    for n in variants:
        found = harness.memory(f"{name}:{n}", flags)
        if "error" in found: print(f"memory of {name}:{n} could not be measured: {found['error']}")
        else: memory[n] = found
    return memory


def timed(name: str, args: argparse.Namespace) -> dict[str, Any]:
    "Time and weigh the variants of one workload; print the table."
    wanted = chosen(name, args.variants)
    w = WORKLOADS[name](quick=args.quick, device=args.device)
    builds = {n: partial(f, w) for n, f in wanted.items()}
    timings, loads, failed = harness.interleave(builds, args.rounds, least=0.2 if args.quick else 0.5)
    rows = harness.report(timings, ANCHORS[name]) | {n: {"error": why} for n, why in failed.items()}
    del w, timings, builds
    gc.collect()
    whole = [n for n in weighed(name, list(wanted), args.quick) if n not in failed]
    memory = weigh(name, whole, args) if args.memory else {}
    aims = [t.variant for t in TARGETS if t.workload == name] if args.variants is None else []
    missing = {n: {"error": "not available"} for n in aims if n not in wanted}
    print(harness.table(name, rows | missing, ANCHORS[name], loads, memory), flush=True)
    return {"rows": rows, "others_cores": loads, "memory": memory}


def masks(quick: bool) -> dict[str, Any]:
    "Comparison of masks and exact thresholds, if that file is there."
    try:
        import masks as m
    except ModuleNotFoundError as e:
        if e.name != "masks": raise
        print("\n## masks: not available")
        return {}
    out: dict[str, Any] = {}
    for name in ("jaccard", "threshold"):
        out[name] = getattr(m, name)(quick)
        print(f"\n## masks: {name}")
        for r in out[name]:
            seconds, memory = 1e3 * r["seconds"], r["memory"] / 1e6
            print(f"{r['name']:56} {seconds:10.3f} ms  {r['ratio']:8.1f} x  {memory:8.1f} MB")
    return out


def measured(target: Target, part: dict[str, Any]) -> float | None:
    "What was measured for a target, if it was."
    if target.workload == "masks":
        start = f"{target.variant}: {target.ours}"
        ours = [r for r in part.get(target.variant, []) if r["name"].startswith(start)]
        if not ours: return None
        return ours[0]["ratio"] if target.measure == "speed" else ours[0]["memory"] / 1e6
    if target.measure == "speed":
        speed = part["rows"].get(target.variant, {}).get("speed")
        return None if speed is None else speed[target.anchor]["median"]
    if not {target.variant, target.anchor} <= set(part["memory"]): return None
    return part["memory"][target.variant]["peak"] / part["memory"][target.anchor]["peak"]


def is_met(target: Target, value: float) -> bool:
    return value >= target.value if target.measure == "speed" else value <= target.value


def verdict_line(v: dict[str, Any]) -> str:
    "A target, and what was measured."
    got = "not available"
    if v["measured"] is not None: got = f"{v['measured']:.2f} {'met' if v['met'] else 'MISSED'}"
    what, sign = f"{v['workload']}: {v['variant']}", ">=" if v["measure"] == "speed" else "<="
    return f"{what:32} {v['measure']:6} against {v['anchor']:18} {sign} {v['value']:<6g}  {got}"


def verdicts(results: dict[str, Any], quick: bool, device: str) -> list[dict[str, Any]]:
    "Target, measured, met or missed."
    out = []
    for t in TARGETS:
        part = results.get(t.workload)
        if part is None or (t.device != device and t.workload != "masks"): continue
        got = measured(t, part)
        out.append({**t._asdict(), "measured": got, "met": None if got is None else is_met(t, got)})
    if out: print("\n## targets" + " (set for the full size: only indicative here)" * quick)
    for v in out: print(verdict_line(v))
    return out


def names_of(text: str) -> list[str]: return [name.strip() for name in text.split(";")]


def command_line() -> argparse.ArgumentParser:
    "The options."
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--quick", action="store_true", help="a small model, few rounds; runs under load too")
    p.add_argument("--only", default=None, help=f"comma-separated: {', '.join(PARTS)}")
    p.add_argument("--variants", default=None, type=names_of,
                   help="semicolon-separated names; the anchors always run")
    p.add_argument("--rounds", type=int, default=None)
    p.add_argument("--json", type=Path, default=None, metavar="FILE")
    p.add_argument("--figure", type=Path, default=None, metavar="FILE.svg", help="figure of growth")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--wait", type=float, default=0.0, metavar="SECONDS",
                   help="how long to wait for an idle machine before each part")
    p.add_argument("--anyway", action="store_true", help="measure although other processes use the machine")
    p.add_argument("--keep-pages", action="store_true",
                   help="time with an allocator that keeps freed memory: fewer page faults, for all variants")
    p.add_argument("--no-memory", dest="memory", action="store_false",
                   help="skip the memory measurements (a process each)")
    p.add_argument("--child", default=None, help=argparse.SUPPRESS)
    return p


GROWING = ("fine-tune", "parametrize", "engine", "engine, sampled", "engine, bf16")


def grown(args: argparse.Namespace) -> list[dict[str, Any]]:
    "How cost grows; draw it, if asked."
    print("\n## growth")
    named = {n: f for n, f in variants_of("cloze").items() if n in (args.variants or GROWING)}
    rows = growth.measure(named, rounds=3, device=args.device, quick=args.quick)
    if args.figure: growth.draw(rows, args.figure)
    return rows


def weigh_here(args: argparse.Namespace) -> None:
    "Measure the memory of one variant in this process."
    name, variant = args.child.split(":", 1)
    work = partial(WORKLOADS[name], quick=args.quick, device=args.device)
    print(json.dumps(harness.child(work, variants_of(name)[variant])))


def parts_of(args: argparse.Namespace, p: argparse.ArgumentParser) -> Sequence[str]:
    "What to measure; stop at a part that does not exist."
    only = args.only.split(",") if args.only else PARTS
    if args.quick and not args.only: only = PARTS[:-1]
    bad = set(only) - set(PARTS)
    if bad: p.error(f"unknown part {', '.join(bad)}: choose from {', '.join(PARTS)}")
    return only


def write(results: dict[str, Any], path: Path | None) -> None:
    if path: path.write_text(json.dumps(results, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    "Read the command line and run what it asks for."
    p = command_line()
    args = p.parse_args(argv)
    if args.child:
        weigh_here(args)
        return
    only = parts_of(args, p)
    args.rounds = args.rounds or (3 if args.quick else 5)
    keeps = args.keep_pages and harness.keep_pages()
    results: dict[str, Any] = {"info": harness.machine_info(args.device) | {"keeps pages": keeps}}
    print("  ".join(f"{k} {v}" for k, v in results["info"].items()))
    for part in only:
        harness.check_idle(args.anyway or args.quick, args.wait)
        if part == "machine": results[part] = machine.show(args.device, args.quick)
        elif part == "masks": results[part] = masks(args.quick)
        elif part == "growth": results[part] = grown(args)
        else:
            for name in [n for n in WORKLOADS if n.split("-")[0] == part]: results[name] = timed(name, args)
        write(results, args.json)                       # a long run that is interrupted leaves what it has
    results["targets"] = verdicts(results, args.quick, args.device)
    write(results, args.json)


if __name__ == "__main__": main()
