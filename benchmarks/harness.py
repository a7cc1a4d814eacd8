"""Timing and memory: interleaved rounds in one process, ratios to anchors, a check for other load.

Peak memory is measured in a process of its own.
"""
from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

BUSY = 0.10                     # cores that others may use before a run is refused or marked
Step = Callable[[], Any]


class Load:
    "How many cores other processes use: the machine's busy time less our own."

    def __init__(self) -> None: self.then = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float | None]:
        "Wall clock, our processor time (with finished children), the machine's busy time; in seconds."
        try:
            f = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
            ticks = f[0] + f[1] + f[2] + f[5] + f[6] + sum(f[7:8])                  # without idle and iowait
            busy: float | None = ticks / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError): busy = None
        return time.perf_counter(), sum(os.times()[:4]), busy

    def others(self) -> float:
        "Cores used by others since the last call."
        before, now = self.then, self._now()
        self.then = now
        wall, own = now[0] - before[0], now[1] - before[1]
        if wall <= 0: return 0.0
        if before[2] is not None and now[2] is not None: return max(0.0, now[2] - before[2] - own) / wall
        return max(0.0, os.getloadavg()[0] - own / wall) if hasattr(os, "getloadavg") else 0.0


TOO_BUSY = (
    "other processes use {:.2f} cores: timings would mean little. Wait until the machine is idle (--wait SECONDS "
    "does), or add --anyway (the results are then marked)."
)


def check_idle(anyway: bool, patience: float = 0.0) -> None:
    "Stop with a message when other processes still use the machine after `patience` seconds."
    end, load = time.monotonic() + patience, Load()
    while not anyway:
        time.sleep(1.0)
        used = load.others()
        if used <= BUSY: return
        if time.monotonic() >= end: sys.exit(TOO_BUSY.format(used))


@dataclass
class Timing:
    "Seconds per step of one variant, one figure a round."
    build: float                                                # preparation, compilation, caches, the first step
    seconds: list[float] = field(default_factory=list)

    def against(self, other: Timing) -> list[float]:
        "Speed relative to another variant, round by round."
        return [o / s for s, o in zip(self.seconds, other.seconds, strict=True)]


def _wait() -> None:
    if torch.cuda.is_available(): torch.cuda.synchronize()


def _timed(step: Step, n: int) -> float:
    "Seconds per step over `n` steps; stop at a loss that is not finite."
    _wait()
    start = time.perf_counter()
    for _ in range(n): loss = step()
    _wait()
    seconds = (time.perf_counter() - start) / n
    value = float(loss)
    if not math.isfinite(value): raise ArithmeticError(f"the loss became {value}")
    return seconds


def interleave(
    variants: Mapping[str, Callable[[], Step]],
    rounds: int = 7,
    warmup: int = 3,
    least: float = 0.5,                 # seconds to a figure
) -> tuple[dict[str, Timing], list[float], dict[str, str]]:
    """Build all variants, warm them up, then time A, B, C, A, B, C …

    Return the timings, the load by others in each round, and what failed.
    """
    steps: dict[str, Step] = {}
    out: dict[str, Timing] = {}
    times: dict[str, int] = {}
    failed: dict[str, str] = {}
    for name, build in variants.items():
        start = time.perf_counter()
        try:
            steps[name] = build()
            _timed(steps[name], 1)
            out[name] = Timing(time.perf_counter() - start)
            seconds = min(_timed(steps[name], 1) for _ in range(max(1, warmup - 1)))
            times[name] = min(100, max(1, math.ceil(least / seconds)))         # short steps: several to a figure
        except Exception as e:                                                 # the others are measured all the same
            traceback.print_exc()
            failed[name] = f"failed: {type(e).__name__}"
            steps.pop(name, None)
            out.pop(name, None)
    gc.collect()
    load, loads, names = Load(), [], list(out)
    for r in range(rounds):
        for name in names[r % len(names):] + names[:r % len(names)]:
            out[name].seconds.append(_timed(steps[name], times[name]))
        loads.append(load.others())
    return out, loads, failed


def _spread(values: Sequence[float]) -> dict[str, float]:
    "Median and quartiles."
    q = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median(values), "low": q[0], "high": q[2]}


def report(timings: Mapping[str, Timing], anchors: Sequence[str]) -> dict[str, dict[str, Any]]:
    "One row a variant: seconds per step and speed against each anchor (ratios are taken within a round)."
    return {name: _row(t, {a: timings[a] for a in anchors if a in timings}) for name, t in timings.items()}


def _row(timing: Timing, anchors: Mapping[str, Timing]) -> dict[str, Any]:
    best = min(timing.seconds)
    speed = {a: {**_spread(timing.against(t)), "best": min(t.seconds) / best} for a, t in anchors.items()}
    return {"seconds": _spread(timing.seconds), "best": best, "build": timing.build, "speed": speed}


def _ratio(speed: Mapping[str, float] | None) -> str:
    return f"{speed['median']:.2f} [{speed['low']:.2f}-{speed['high']:.2f}]" if speed else ""


def table(
    title: str,
    rows: Mapping[str, dict[str, Any]],
    anchors: Sequence[str],
    loads: Sequence[float] = (),                                # cores used by others, one figure a round
    memory: Mapping[str, dict[str, float]] | None = None,
) -> str:
    "Lay out rows as text."
    memory = memory or {}
    weighed = ["MB over model"] if memory else []
    head = ["variant", "s/step", "best", *(f"x {a} [quartiles]" for a in anchors), *weighed, "build s"]
    body = []
    for name, row in rows.items():
        if "error" in row:
            body.append([name, row["error"]] + [""] * (len(head) - 2))
            continue
        speed = [_ratio(row["speed"].get(a)) for a in anchors]
        mb = [f"{memory[name]['peak']:.0f}" if name in memory else ""] if memory else []
        body.append([name, f"{row['seconds']['median']:.4f}", f"{row['best']:.4f}", *speed, *mb, f"{row['build']:.1f}"])
    wide = [max(len(r[i]) for r in [head, *body]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        name, *figures = row
        right = [figure.rjust(n) for figure, n in zip(figures, wide[1:], strict=True)]
        return "  ".join([name.ljust(wide[0]), *right]).rstrip()

    note = f"  (UNDER LOAD: others used {median(loads):.2f} cores)" if loads and median(loads) > BUSY else ""
    return "\n".join([f"\n## {title}{note}", line(head), *map(line, body)])


def _line_of(path: str, key: str) -> str:
    "What stands behind the colon of a line in a file of /proc."
    lines = Path(path).read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(key))


def _status(key: str) -> float:
    "A memory figure of this process in MB (`VmRSS`, `VmHWM`)."
    return int(_line_of("/proc/self/status", f"{key}:").split()[0]) / 1024


def _settle() -> None:
    "Give freed memory back to the system, so that it is not counted."
    gc.collect()
    with contextlib.suppress(OSError, AttributeError): ctypes.CDLL("libc.so.6").malloc_trim(0)


class Peak:
    """Peak memory from now on, in MB over what is used now.

    CUDA: allocated memory; Linux: VmHWM, reset; elsewhere: ru_maxrss, which cannot be reset.
    """
    how: str = "ru_maxrss"

    def __init__(self) -> None:
        _settle()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.how, self.base = "cuda max_memory_allocated", torch.cuda.memory_allocated() / 2**20
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.how, self.base = "VmHWM", _status("VmRSS")
        except OSError: self.how, self.base = "ru_maxrss", self._top()

    def _top(self) -> float:
        if torch.cuda.is_available(): return torch.cuda.max_memory_allocated() / 2**20
        if self.how == "VmHWM": return _status("VmHWM")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)

    def over(self) -> float: return self._top() - self.base


def child(workload: Callable[[], Any], variant: Callable[[Any], Step]) -> dict[str, Any]:
    "Measure a variant here: `peak` from its preparation on, `running` in later steps; both over the loaded model."
    import_module("torch._inductor.compile_fx")            # its code is no cost of a variant
    w = workload()
    w.alone, steps = True, w.weighed
    first = Peak()
    step = variant(w)
    for _ in range(steps): step()
    peak, later = first.over(), Peak()
    for _ in range(steps): step()
    kept = later.base - first.base
    return {"peak": peak, "running": later.over() + kept, "kept": kept, "how": first.how}


def memory(spec: str, flags: Sequence[str] = ()) -> dict[str, Any]:
    "Measure a variant, `workload:name`, in a child process; `error` holds the last line of what went wrong."
    command = [sys.executable, str(Path(__file__).with_name("run.py")), "--child", spec, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode: return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def keep_pages() -> bool:
    "Let glibc keep freed memory instead of giving it back; whether that worked."
    try: libc = ctypes.CDLL("libc.so.6")
    except OSError: return False
    mapped, trimmed = libc.mallopt(-3, 2**30), libc.mallopt(-1, 2**31 - 1)      # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    return bool(mapped & trimmed)


def machine_info(device: str) -> dict[str, Any]:
    "Where and with what the figures were measured."
    import transformers
    try: cpu = _line_of("/proc/cpuinfo", "model name")
    except (OSError, StopIteration): cpu = platform.processor() or platform.machine()
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "amx": bool(has_tiles()) if has_tiles else False,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
