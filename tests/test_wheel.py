"What people install: the wheel has all it needs, and works by itself."
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser

from conftest import ROOT

USE = """
import sys
from pathlib import Path
import subnet_explorer
from subnet_explorer import Cloze, Space, Threshold, find, load, read_facts
from subnet_explorer.pocket import pocket_path
inside = Path(sys.argv[1]).resolve()
assert Path(subnet_explorer.__file__).is_relative_to(inside), subnet_explorer.__file__
assert pocket_path("bert").is_relative_to(inside) and pocket_path("facts.jsonl").is_relative_to(inside), pocket_path()
model, tok = load("pocket-bert")
run = find(model, tok, Threshold(Space.of(model, "weight", layers="top-half")), Cloze(read_facts("pocket", "MadeOf")), steps=5, progress=False)
assert run.done and .4 < run.mask.density < .6
load("pocket-gpt2")
from subnet_explorer.maps import generate
from subnet_explorer.patterns import classifier
assert pocket_path("patterns").is_relative_to(inside) and classifier()(generate(5, seed=0).maps)[2] == "diagonal"
print("fine")
"""


def test_the_wheel_is_complete_and_works_alone(tmp_path):
    source, inside = tmp_path / "source", tmp_path / "inside"
    for name in subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file(): (source / name).parent.mkdir(parents=True, exist_ok=True); shutil.copy(ROOT / name, source / name)
    built = subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)], capture_output=True, text=True, cwd=tmp_path)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as z: z.extractall(inside); names = set(z.namelist())

    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    lib = ini["DEFAULT"]["lib_path"]
    assert wheel.name.startswith(f"{lib}-{ini['DEFAULT']['version']}-py3-none-any")
    world = {f"{lib}/pocket_world/{p.relative_to(source / 'data/pocket')}" for p in (source / "data/pocket").rglob("*") if p.is_file()}
    own = {str(p.relative_to(source)) for p in (source / lib).rglob("*") if p.is_file()}
    assert {f"{lib}/pocket_world/{f}" for f in ("facts.jsonl", "bert/model.safetensors", "bert/tokenizer.json", "gpt2/model.safetensors", "gpt2/config.json", "patterns/model.safetensors")} <= world <= names
    assert {f"{lib}/py.typed", f"{lib}/__init__.py", f"{lib}/cli.py"} <= own <= names and any(n.startswith(f"{lib}/static/") for n in own)
    rest = {n for n in names - own - world if ".dist-info/" not in n}
    assert not rest, f"more than was asked for: {sorted(rest)[:10]}"
    assert not [n for n in names if n.endswith(".ipynb") or {"tests", "nbs", "benchmarks", "__pycache__"} & set(n.split("/"))]
    [meta] = inside.glob("*.dist-info")
    assert f"subnet-explorer = {lib}.cli:main" in (meta / "entry_points.txt").read_text() and list(meta.rglob("LICENSE*"))
    needs = (meta / "METADATA").read_text()
    assert all(f"Requires-Dist: {r.split('>')[0]}" in needs for r in ini["DEFAULT"]["requirements"].split())

    done = subprocess.run([sys.executable, "-c", USE, str(inside)], capture_output=True, text=True, cwd=tmp_path,
                          env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(inside), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0 and done.stdout.split()[-1] == "fine", done.stderr[-3000:]
