"Run the benchmarks: see README.md."
from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")      # before torch: threads that wait must not take the core of others

import argparse                                         # noqa: E402
import gc                                               # noqa: E402
import json                                             # noqa: E402
from collections.abc import Sequence                    # noqa: E402
from functools import partial                           # noqa: E402
from pathlib import Path                                # noqa: E402
from typing import Any                                  # noqa: E402

import torch                                            # noqa: E402

import growth                                           # noqa: E402
import harness                                          # noqa: E402
import machine                                          # noqa: E402
from baselines import ANCHORS, BASELINES, Variant       # noqa: E402
from engine import ENGINE                               # noqa: E402
from targets import TARGETS                             # noqa: E402
from workloads import WORKLOADS                         # noqa: E402

PARTS = ("machine", "cloze", "text", "critical", "probe", "importance", "compact", "masks", "growth")


def variants_of(name: str) -> dict[str, Variant]:
    "Baselines and engine variants of a workload."
    return BASELINES[name] | ENGINE.get(name, {})


def timed(name: str, args: argparse.Namespace) -> dict[str, Any]:
    "Time and weigh the variants of one workload; print the table."
    wanted = {n: f for n, f in variants_of(name).items() if args.variants is None or n in {*args.variants, *ANCHORS[name]}}
    w = WORKLOADS[name](quick=args.quick, device=args.device)
    timings, loads, failed = harness.interleave({n: partial(f, w) for n, f in wanted.items()}, args.rounds, least=0.2 if args.quick else 0.5)
    rows = harness.report(timings, ANCHORS[name]) | {n: {"error": why} for n, why in failed.items()}
    del w, timings
    gc.collect()
    flags = ["--quick"] * args.quick + ["--device", args.device]
    weighed = [n for n in wanted if not args.quick or name == "cloze" and any(n in (t.variant, t.anchor) and t.measure == "memory" for t in TARGETS if t.workload == name)]
    memory = {n: harness.memory(f"{name}:{n}", flags) for n in weighed if n not in failed} if args.memory else {}
    for n, m in list(memory.items()):
        if "error" in m: print(f"memory of {name}:{n} could not be measured: {m['error']}"); del memory[n]
    missing = {t.variant: {"error": "not available"} for t in TARGETS if t.workload == name and t.variant not in wanted and args.variants is None}
    print(harness.table(name, rows | missing, ANCHORS[name], loads, memory), flush=True)
    return {"rows": rows, "others_cores": loads, "memory": memory}


def masks(quick: bool) -> dict[str, Any]:
    "Comparison of masks and exact thresholds, if that file is there."
    try: import masks as m
    except ModuleNotFoundError as e:
        if e.name != "masks": raise
        print("\n## masks: not available"); return {}
    out: dict[str, Any] = {}
    for name in ("jaccard", "threshold"):
        out[name] = getattr(m, name)(quick)
        print(f"\n## masks: {name}")
        for r in out[name]: print(f"{r['name']:56} {1e3 * r['seconds']:10.3f} ms  {r['ratio']:8.1f} x  {r['memory'] / 1e6:8.1f} MB")
    return out


def verdicts(results: dict[str, Any], quick: bool, device: str) -> list[dict[str, Any]]:
    "Target, measured, met or missed."
    out = []
    for t in TARGETS:
        part = results.get(t.workload)
        if t.device != device and t.workload != "masks" or part is None: continue
        got: float | None = None
        if t.workload == "masks":
            kept = [r for r in part.get(t.variant, []) if r["name"].startswith(f"{t.variant}: {t.ours}")]
            got = kept[0]["ratio"] if kept and t.measure == "speed" else kept[0]["memory"] / 1e6 if kept else None
        elif t.measure == "speed" and "speed" in part["rows"].get(t.variant, {}): got = part["rows"][t.variant]["speed"][t.anchor]["median"]
        elif t.measure == "memory" and {t.variant, t.anchor} <= set(part["memory"]): got = part["memory"][t.variant]["peak"] / part["memory"][t.anchor]["peak"]
        ok = None if got is None else got >= t.value if t.measure == "speed" else got <= t.value
        out.append({**t._asdict(), "measured": got, "met": ok})
    if out: print("\n## targets" + " (set for the full size: only indicative here)" * quick)
    for v in out:
        got = "not available" if v["measured"] is None else f"{v['measured']:.2f} {'met' if v['met'] else 'MISSED'}"
        print(f"{v['workload'] + ': ' + v['variant']:32} {v['measure']:6} against {v['anchor']:18} {'>=' if v['measure'] == 'speed' else '<='} {v['value']:<6g}  {got}")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    "Read the command line and run what it asks for."
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--quick", action="store_true", help="a small model, few rounds; runs under load too")
    p.add_argument("--only", default=None, help=f"comma-separated: {', '.join(PARTS)}")
    p.add_argument("--variants", default=None, type=lambda s: [v.strip() for v in s.split(";")], help="semicolon-separated names; the anchors always run")
    p.add_argument("--rounds", type=int, default=None)
    p.add_argument("--json", type=Path, default=None, metavar="FILE")
    p.add_argument("--figure", type=Path, default=None, metavar="FILE.svg", help="figure of growth")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="how long to wait for an idle machine before each part")
    p.add_argument("--anyway", action="store_true", help="measure although other processes use the machine")
    p.add_argument("--keep-pages", action="store_true", help="time with an allocator that keeps freed memory: fewer page faults, for all variants")
    p.add_argument("--no-memory", dest="memory", action="store_false", help="skip the memory measurements (a process each)")
    p.add_argument("--child", default=None, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.child:
        name, variant = args.child.split(":", 1)
        print(json.dumps(harness.child(partial(WORKLOADS[name], quick=args.quick, device=args.device), variants_of(name)[variant]))); return
    only = args.only.split(",") if args.only else PARTS[:-1] if args.quick else PARTS
    if bad := set(only) - set(PARTS): p.error(f"unknown part {', '.join(bad)}: choose from {', '.join(PARTS)}")
    args.rounds = args.rounds or (3 if args.quick else 5)
    results: dict[str, Any] = {"info": harness.machine_info(args.device) | {"keeps pages": args.keep_pages and harness.keep_pages()}}
    print("  ".join(f"{k} {v}" for k, v in results["info"].items()))
    for part in only:
        harness.check_idle(args.anyway or args.quick, args.wait)
        if part == "machine": results[part] = machine.show(args.device, args.quick)
        elif part == "masks": results[part] = masks(args.quick)
        elif part == "growth":
            print("\n## growth")
            named = {n: f for n, f in variants_of("cloze").items() if n in (args.variants or ("fine-tune", "parametrize", "engine", "engine, sampled", "engine, bf16"))}
            results[part] = growth.measure(named, rounds=3, device=args.device, quick=args.quick)
            if args.figure: growth.draw(results[part], args.figure)
        else:
            for name in [n for n in WORKLOADS if n.split("-")[0] == part]: results[name] = timed(name, args)
        if args.json: args.json.write_text(json.dumps(results, indent=1) + "\n")      # a long run that is interrupted leaves what it has
    results["targets"] = verdicts(results, args.quick, args.device)
    if args.json: args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__": main()
