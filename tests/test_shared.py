"What is handed on (masks, cards, studies, reports, sites, compact models) names no folder, user or host."
from __future__ import annotations

import getpass
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from subnet_explorer import Mask, Run, Space, compact, find, load, load_compact, plots, read_facts, recipes
from subnet_explorer.cli import main
from subnet_explorer.core.mask import card
from subnet_explorer.data.pocket import pocket_path
from subnet_explorer.look.site import publish
from subnet_explorer.recipes.study import without_places
from subnet_explorer.search.gates import Concrete
from subnet_explorer.search.objectives import Cloze


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    "A home folder with a model and facts, and a public folder beside it."
    top = tmp_path_factory.mktemp("machine")
    private = top / "home" / "alice" / "secret-host"
    shutil.copytree(pocket_path("bert"), private / "models" / "mini")
    (private / "facts").mkdir()
    lines = pocket_path("facts.jsonl").read_text(encoding="utf-8").splitlines()
    few = [line for line in lines if '"MadeOf"' in line][:24]
    (private / "facts" / "materials.jsonl").write_text("\n".join(few), encoding="utf-8")
    return private


@pytest.fixture(scope="module")
def model(home): return load(home / "models" / "mini")


def secrets(home: Path) -> list[bytes]:
    "What must not be found: folders, user, host."
    host, user, here = os.uname().nodename, getpass.getuser(), os.getcwd()
    words = [str(home), str(home.parents[2]), "alice", "secret-host", here, host, f"/{user}/", f"{user}@"]
    return [word.encode() for word in words if len(word) > 3]


def shared(folder: Path) -> Iterator[tuple[str, bytes]]:
    "Every file below a folder, and every file inside an archive, with what it holds."
    for file in sorted(folder.rglob("*")):
        if not file.is_file(): continue
        name = file.relative_to(folder).as_posix()
        yield name, name.encode() + b"\n" + file.read_bytes()
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as z: yield from ((f"{name}/{n}", z.read(n)) for n in z.namelist())


def check_private(folder: Path, home: Path) -> None:
    files = list(shared(folder))
    assert files
    found = [(name, word) for name, data in files for word in secrets(home) if word in data.replace(b"aliceblue", b"")]
    assert not found


def test_masks_cards_and_figures(home, model, tmp_path):
    mask = Mask.random(Space.of(model[0], "head"), .5, seed=0)
    assert mask.space.model.name == "mini" and str(mask.space.model).startswith("mini (weights ")
    mask.save(tmp_path / "a.mask.safetensors")
    (tmp_path / "README.md").write_text(card(mask), encoding="utf-8")
    for kind in ("html", "svg", "png", "pdf"): plots.density(mask).save(tmp_path / f"f.{kind}")
    (tmp_path / "repr.txt").write_text(f"{mask!r}{mask._repr_html_()}", encoding="utf-8")
    check_private(tmp_path, home)


def test_earlier_masks_lose_their_place(home, model, tmp_path):
    "A mask whose file still holds a path says the folder's name alone once it is read."
    mask = Mask.random(Space.of(model[0], "head"), .5, seed=0)
    said = mask.space.to_json()
    said["model"]["name"] = str(home / "models" / "mini")
    again = Mask(Space.from_json(said), mask.packed, mask.meta)
    again.save(tmp_path / "a.mask.safetensors")
    assert again == mask and again.space.model == mask.space.model
    check_private(tmp_path, home)


def test_a_model_in_the_folder_at_hand(home, monkeypatch):
    monkeypatch.chdir(home)
    for name in ("models/mini", "./models/mini/", "../secret-host/models/mini"):
        assert Space.of(load(name)[0], "head").model.name == "mini"
    monkeypatch.chdir(home / "models" / "mini")
    assert Space.of(load(".")[0], "head").model.name == "mini"


def test_studies_reports_and_sites(home, model, tmp_path, capsys):
    out = tmp_path / "runs" / "lamp"
    words = ["lamp", "--model", str(home / "models" / "mini"), "--facts", str(home / "facts" / "materials.jsonl"),
             "--steps", "4", "--out", str(out), "--quiet", "--report"]
    assert main(words) == 0
    publish(tmp_path / "runs", tmp_path / "site")
    check_private(tmp_path, home)
    told = json.loads((out / "results.json").read_text())
    [relation] = told["relations"].values()
    assert Mask.load(out / relation["masks"][0]).space.model.name == "mini"
    capsys.readouterr()


def test_tables_name_masks_by_their_place_in_the_study(home, model, tmp_path):
    from subnet_explorer.data.sentences import read_conllu
    train = read_conllu("pocket", part="train", tree=False)[:24]
    settings = dict(steps=4, batch=8, baselines=("linear",), progress=False)
    study = recipes.probe(*model, "pos", train, train[:8], **settings, to=tmp_path / "probe")
    again = recipes.probe(*model, "pos", train, train[:8], **settings, to=tmp_path / "probe")
    study.report(tmp_path / "probe" / "report.html")
    check_private(tmp_path, home)
    [name] = pd.read_csv(tmp_path / "probe" / "scores.csv")["mask"].dropna()
    assert Mask.load(tmp_path / "probe" / name).id == study.masks[0].id == again.masks[0].id
    assert Path(study.scores["mask"].dropna().iloc[0]).is_absolute()      # what is at hand opens from anywhere


def test_searches(home, model, tmp_path):
    facts = read_facts(home / "facts" / "materials.jsonl")
    gate = Concrete(Space.of(model[0], "head"))
    find(*model, gate, Cloze(facts), steps=3, to=tmp_path / "run", progress=False)
    assert Run.open(tmp_path / "run").config["model"].startswith("mini (weights ")
    check_private(tmp_path, home)


def test_compact_models(home, model, tmp_path):
    small = compact(model[0], Mask.random(Space.of(model[0], "head+mlp"), .6, seed=0))
    small.save(tmp_path / "small")
    small.save(tmp_path / "mask only", weights=False)
    small.export(tmp_path / "plain", zero_filled=True, tok=model[1])
    check_private(tmp_path, home)
    assert load_compact(tmp_path / "small").mask == small.mask
    assert load_compact(tmp_path / "mask only", model[0]).mask == small.mask


def test_files_are_said_by_their_names(tmp_path):
    (tmp_path / "x.jsonl").touch()
    out, here = tmp_path / "out", Path("out")
    told = {"facts": str(tmp_path / "x.jsonl"), "mask": str(out / "runs" / "a"), "text": "/no/such", "n": 1}
    assert without_places(told, out) == {"facts": "x.jsonl", "mask": "runs/a", "text": "/no/such", "n": 1}
    assert without_places([Path("out/runs/a")], here) == ["runs/a"] and without_places("outer/a", here) == "outer/a"


def test_sites_about_earlier_runs(home, model, tmp_path):
    "Configurations of earlier runs hold the path of the model; their pages do not."
    mask = Mask.random(Space.of(model[0], "head"), .5, seed=0)
    earlier = str(mask.space.model).replace("mini", str(home / "models" / "mini"))
    for i in range(2):
        run = Run(tmp_path / "runs" / f"{i}", {"model": earlier, "goal": {"teacher": earlier}, "n": i}, {"seed": i})
        run.log(step=1, loss=1.)
        run.finish(mask)
    (tmp_path / "runs" / "study.json").write_text(json.dumps({"config": {"model": earlier}}), encoding="utf-8")
    (tmp_path / "runs" / "1" / "mask.safetensors").write_bytes(b"torn")
    publish(tmp_path / "runs", tmp_path / "site")
    check_private(tmp_path / "site", home)
    text = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "mini (weights" in text and str(tmp_path) not in text
