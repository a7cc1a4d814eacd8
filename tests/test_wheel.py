"What people install: the wheel has all it needs, and works by itself."
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

from conftest import ROOT

USE = """
import sys
from pathlib import Path
import subnet_explorer
from subnet_explorer import Cloze, Space, Threshold, find, load, read_facts
from subnet_explorer.data.pocket import pocket_path
inside = Path(sys.argv[1]).resolve()
assert Path(subnet_explorer.__file__).is_relative_to(inside), subnet_explorer.__file__
for part in ("bert", "facts.jsonl", "patterns"): assert pocket_path(part).is_relative_to(inside), pocket_path()
model, tok = load("pocket-bert")
gate = Threshold(Space.of(model, "weight", layers="top-half"))
run = find(model, tok, gate, Cloze(read_facts("pocket", "MadeOf")), steps=5, progress=False)
assert run.done and .4 < run.mask.density < .6
load("pocket-gpt2")
from subnet_explorer.core.atlas import bundled_atlas, read_atlas
assert bundled_atlas().is_relative_to(inside) and read_atlas("pocket", recipe="lamp")[0].count
from subnet_explorer.recipes.papers import paper_file, paper_files
assert len(paper_files()) > 10 and paper_file("papers:lamp-table2").is_relative_to(inside)
from subnet_explorer.measure.maps import generate
from subnet_explorer.measure.patterns import classifier
assert classifier()(generate(5, seed=0).maps)[2] == "diagonal"
print("fine")
"""
FOLDERS = ("core", "data", "model", "search", "measure", "tasks", "look", "recipes")
WORLD = (
    "facts.jsonl", "bert/model.safetensors", "bert/tokenizer.json", "gpt2/model.safetensors", "gpt2/config.json",
    "patterns/model.safetensors",
)


def copied(to: Path) -> Path:
    "A copy of what is committed."
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if not (ROOT / name).is_file(): continue
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, to / name)
    return to


def test_the_wheel_is_complete_and_works_alone(tmp_path):
    source, inside = copied(tmp_path / "source"), tmp_path / "inside"
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    built = subprocess.run(build, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        z.extractall(inside)
        names = set(z.namelist())

    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    lib = ini["DEFAULT"]["lib_path"]
    assert wheel.name.startswith(f"{lib}-{ini['DEFAULT']['version']}-py3-none-any")
    pocket = source / "data/pocket"
    world = {f"{lib}/pocket_world/{p.relative_to(pocket)}" for p in pocket.rglob("*") if p.is_file()}
    papers = {f"{lib}/paper_files/{p.name}" for p in (source / "data/papers").glob("*.yaml")}
    assert papers and papers <= names
    own = {str(p.relative_to(source)) for p in (source / lib).rglob("*") if p.is_file()}
    assert {f"{lib}/pocket_world/{file}" for file in WORLD} <= world <= names
    assert {f"{lib}/py.typed", f"{lib}/__init__.py", f"{lib}/cli.py"} <= own <= names
    assert {f"{lib}/{folder}/__init__.py" for folder in FOLDERS} <= own
    assert any(n.startswith(f"{lib}/static/") for n in own)
    bundled = source / "data/atlas"
    atlas = {f"{lib}/atlas_files/{p.relative_to(bundled)}" for p in bundled.rglob("*") if p.is_file()}
    assert f"{lib}/atlas_files/index.parquet" in atlas <= names
    rest = {n for n in names - own - world - papers - atlas if ".dist-info/" not in n}
    assert not rest, f"more than was asked for: {sorted(rest)[:10]}"
    foreign = {"tests", "nbs", "benchmarks", "__pycache__"}
    assert not [n for n in names if n.endswith(".ipynb") or foreign & set(n.split("/"))]

    [meta] = inside.glob("*.dist-info")
    assert f"subnet-explorer = {lib}.cli:main" in (meta / "entry_points.txt").read_text()
    assert list(meta.rglob("LICENSE*"))
    needs = (meta / "METADATA").read_text()
    assert all(f"Requires-Dist: {r.split('>')[0]}" in needs for r in ini["DEFAULT"]["requirements"].split())

    alone = {"PYTHONPATH": str(inside), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    use = [sys.executable, "-c", USE, str(inside)]
    done = subprocess.run(use, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **alone}, check=False)
    assert done.returncode == 0 and done.stdout.split()[-1] == "fine", done.stderr[-3000:]
