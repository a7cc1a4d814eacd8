"What is run on a GPU, rehearsed without one: parts, limits, what is written, and what the page says is unproven."
from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try: yield importlib.import_module("gpu")
    finally: sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def every(gpu): return gpu.collected()


def command(*options: object) -> subprocess.CompletedProcess:
    run = [sys.executable, "benchmarks/gpu.py", *map(str, options)]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_the_page_lists_every_test_that_no_gpu_has_passed(gpu, every):
    "Run python benchmarks/gpu.py --list after a test that needs a GPU has come or gone."
    assert len(every) > 20
    assert gpu.PAGE.read_text(encoding="utf-8") == gpu.page(gpu.known(), every)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(gpu):
    before = gpu.PAGE.read_bytes()
    done = command()
    assert done.returncode == 2 and "finds none here: GPU.md was left as it is" in done.stderr
    assert gpu.PAGE.read_bytes() == before
    assert "no finding" in command("--rehearse").stderr


def test_a_rehearsal_runs_every_part(tmp_path):
    page = tmp_path / "GPU.md"
    tests = "tests/core/test_size.py", "tests/model/test_interchange.py::test_sparse_tensors_compute_what_zeros_do"
    done = command("--rehearse", "--to", page, "--tests", *tests)
    assert done.returncode == 0, done.stdout + done.stderr
    text = page.read_text(encoding="utf-8")
    for part in ("## Tests", "## Benchmark", "## Whole job", "| cloze | engine | fine-tune |"): assert part in text
    assert "| `tests/core/test_size.py::" in text and "| passed |" in text
    assert "test_sparse_tensors_compute_what_zeros_do` | skipped |" in text or torch.cuda.is_available()
    assert "Every ratio of speed" in text.partition("What remains unproven")[2]      # a CPU proves nothing


def test_a_part_that_fails_or_takes_too_long_leaves_what_it_has(gpu, every, tmp_path, monkeypatch):
    slow = tmp_path / "test_slow.py"
    slow.write_text("import time\ndef test_a(): pass\ndef test_b(): assert False\ndef test_c(): time.sleep(60)\n")
    monkeypatch.setattr(gpu, "OUTCOME", gpu.re.compile(r"^(\S+\.py::.+?) (PASSED|FAILED)\b", gpu.re.M))
    found = gpu.Findings({"card": "a card"})
    gpu.tested([str(slow)], 15, found)
    assert sorted(found.tests.values()) == ["failed", "passed"] and "was stopped after 15 s" in found.notes[0]
    gpu.measured(["--only", "nothing"], 60, found)
    assert "ended with 2" in found.notes[1]
    text = gpu.page(found, every)
    assert "1 failed, 1 passed" in text and "was stopped" in text
    assert all(f"- `{name}`" in text for name in every)


def test_what_a_card_has_shown_is_unproven_no_more(gpu, every):
    found = gpu.Findings({"card": "a card"}, dict.fromkeys(every, "passed"))
    left = gpu.unproven(found, every)
    assert not any(name in line for line in left for name in every)
    assert not any(claim in left for claim in gpu.CLAIMS["tests"]) and all(c in left for c in gpu.CLAIMS["benchmark"])
    found.tests[every[0]] = "failed"
    assert f"`{every[0]}`" in gpu.unproven(found, every) and gpu.CLAIMS["tests"][0] in gpu.unproven(found, every)
    assert gpu.unproven(gpu.Findings(found.machine, dict.fromkeys(every, "passed"), job={"relations": 1}), every)


def test_wheels_stand_in_where_packages_are_missing(gpu, tmp_path, monkeypatch):
    import zipfile
    name = tmp_path / "spare-1-py3-none-any.whl"
    with zipfile.ZipFile(name, "w") as wheel: wheel.writestr("spare.py", "here = True\n")
    monkeypatch.setattr(gpu, "WHEELS", tmp_path)
    assert str(tmp_path) not in gpu.environment()["PYTHONPATH"]
    monkeypatch.setattr(gpu, "NEEDED", ("spare",))
    paths = gpu.environment()["PYTHONPATH"].split(os.pathsep)
    assert paths[:2] == [str(ROOT), str(tmp_path / "site")] and (tmp_path / "site" / "spare.py").exists()
