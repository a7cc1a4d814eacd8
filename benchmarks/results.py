"Write the figures of result files as the tables of RESULTS.md: `python benchmarks/results.py a.json b.json`."
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def table(head: list[str], rows: list[list[str]]) -> str:
    "A Markdown table."
    return "\n".join(f"| {' | '.join(r)} |" for r in [head, ["---"] * len(head), *rows]) + "\n"


def verdict(target: dict[str, Any]) -> list[str]:
    "What was measured, and whether that is enough."
    measured = "not measured" if target["measured"] is None else f"{target['measured']:.2f}"
    words = {None: "", True: "met", False: "**missed**"}
    return [measured, words[target["met"]]]


def target_row(t: dict[str, Any]) -> list[str]:
    sign = "≥" if t["measure"] == "speed" else "≤"
    return [t["workload"], t["variant"], t["measure"], t["anchor"], f"{sign} {t['value']:g}", *verdict(t)]


def mask_row(r: dict[str, Any]) -> list[str]:
    return [r["name"], f"{1e3 * r['seconds']:.2f}", f"{r['ratio']:.1f}", f"{r['memory'] / 1e6:.1f}"]


def spread(s: dict[str, float]) -> str: return f"{s['median']:.2f} [{s['low']:.2f}, {s['high']:.2f}]"


def workload(name: str, part: dict[str, Any]) -> str:
    "Seconds, speed against each anchor (median and quartiles over rounds), memory."
    anchors = list(next(r["speed"] for r in part["rows"].values() if "speed" in r))
    rows = []
    for variant, r in part["rows"].items():
        if "error" in r:
            rows.append([variant, r["error"], *[""] * (len(anchors) + 1)])
            continue
        speed = [spread(r["speed"][a]) for a in anchors]
        mb = part["memory"].get(variant)
        rows.append([variant, f"{r['seconds']['median']:.3f}", *speed, f"{mb['peak']:.0f}" if mb else ""])
    load = max(part["others_cores"], default=0.0)
    head = ["variant", "s per step", *(f"times faster than {a}" for a in anchors), "MB over the model"]
    return f"## {name}\n\n{table(head, rows)}\nCores used by other programs meanwhile: at most {load:.2f}.\n"


def main(files: list[str]) -> None:
    "Merge and print."
    results: dict[str, Any] = {"targets": []}
    for f in files:
        part = json.loads(Path(f).read_text())
        results |= {k: v for k, v in part.items() if k != "targets"}
        results["targets"] += part.get("targets", [])
    print(", ".join(f"{k} {v}" for k, v in results["info"].items()) + "\n")
    head = ["workload", "variant", "measure", "against", "target", "measured", ""]
    print("## Targets\n\n" + table(head, [target_row(t) for t in results["targets"]]))
    for name, part in results.items():
        if isinstance(part, dict) and "rows" in part: print(workload(name, part))
        elif name == "masks":
            for what, rows in part.items():
                print(f"## masks: {what}\n\n" + table(["", "ms", "times faster", "MB"], [mask_row(r) for r in rows]))


if __name__ == "__main__": main(sys.argv[1:])
