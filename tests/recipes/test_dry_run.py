"Files for the published tables, and what a study would do before anything is loaded or written."
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from subnet_explorer.cli import main
from subnet_explorer.core.errors import SubnetError
from subnet_explorer.data import files, parts
from subnet_explorer.model import load as loading
from subnet_explorer.recipes.cost import Work
from subnet_explorer.recipes.papers import paper_file, paper_files, title_of
from subnet_explorer.recipes.start import order_from_file, recipe_options
from subnet_explorer.recipes.study import find_recipe

FILES = paper_files()
PAPERS = {"lamp": "Ren & Zhu 2022", "complete": "Ren & Zhu 2022", "answer": "Ren & Zhu 2022",
          "finetune": "Ren & Zhu 2022", "mine": "Ren & Zhu 2022", "tickets": "Prasanna et al. 2020",
          "critical": "Bayazit et al. 2024", "probe": "Cao et al. 2021", "tamt": "Liu et al. 2022"}
OF = {name: "lamp" if paper == PAPERS["lamp"] else name for name, paper in PAPERS.items()}
"By recipe: how the files of its paper begin."


@pytest.fixture
def nothing_is_read(tmp_path, monkeypatch) -> Path:
    "An empty current folder; a model or data set that is loaded is an error."
    def refuse(*given: Any, **named: Any) -> Any: raise AssertionError(f"read: {given}")
    for owner, name in ((loading, "load"), (files, "dataset_parts"), (parts, "read_task")):
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ── ready files ──────────────────────────────────────────────────────────────────────────────────────────────────────

def test_there_is_a_file_for_every_table():
    wanted = {"lamp-table2", "lamp-table10", "lamp-appendix-c", "critical-main", "tamt-main-bert", "tamt-main-roberta"}
    wanted |= {"lamp-table3", "lamp-table6", "lamp-table7"}
    wanted |= {"tickets-table3-structured", "tickets-table3-magnitude", "tickets-epochs"}
    wanted |= {f"probe-tables1-2-{t}{end}" for t in ("pos", "dep", "ner") for end in ("", "-lambdas")}
    assert wanted <= set(FILES)


def test_a_table_of_many_models_is_one_study(nothing_is_read):
    rows = {"lamp-table2": ("model", 4, 8), "critical-main": ("model", 4, 4), "lamp-table10": ("method", 2, 2),
            "probe-tables1-2-pos-lambdas": ("lambdas", 3, 3)}
    for name, (axis, n, combinations) in rows.items():
        plan = order_from_file(f"papers:{name}").plan()
        assert len(plan["sweep"][axis]) == n and plan["combinations"] == combinations
        counted = [work["axes"]["combination"] for work in plan["work"] if work["what"] != "fine-tuning"]
        assert sum(counted) == combinations
    table = order_from_file("papers:lamp-table2")
    each = {m: table.at({"model": "roberta-base", "method": m}) for m in ("deterministic", "stochastic")}
    assert [v["sparsity"] for v in each.values()] == [0.5, 0.3] and each["stochastic"]["epochs"] == 6


@pytest.mark.parametrize("name", FILES)
def test_a_ready_file_is_a_study_as_published(name, nothing_is_read):
    "Every key is an option, every value is taken; models and data by name, and a word on where the numbers stand."
    written = yaml.safe_load(FILES[name].read_text())
    recipe = find_recipe(written["recipe"])
    made = order_from_file(f"papers:{name}")
    assert set(written) - {"recipe"} <= {option.name for option in recipe_options(recipe)}
    assert made.values["published"] is True and made.values["out"] == f"runs/papers/{name}"
    lines = FILES[name].read_text().splitlines()
    assert lines[0] == f"# {title_of(FILES[name])}" and PAPERS[recipe.name] in lines[1]
    assert name.startswith(OF[recipe.name])
    models = written.get("sweep", {}).get("model") or [written["model"]]
    assert not any(Path(model).is_absolute() for model in models) and "pocket" not in str(written)
    for c in recipe.clauses:
        given = c.name in written or c.unless in written
        if c.by == "setting" and not given and not c.when and "." not in c.name:
            assert made.values[c.name] == c.published, c.name
    plan = made.plan()
    assert plan["published"] and plan["work"] and not list(nothing_is_read.iterdir())


def test_a_ready_file_is_found_by_name(capsys, nothing_is_read):
    assert main(["papers"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(FILES) and all(line.split()[0] in FILES for line in listed)
    assert main(["papers", "lamp-table2"]) == 0
    assert capsys.readouterr().out == FILES["lamp-table2"].read_text()
    assert main(["papers", "--json"]) == 0 and set(json.loads(capsys.readouterr().out)["papers"]) == set(FILES)
    for words in (["run", "papers:lamp-tabel2"], ["run", "papers:lamp-tabel2", "--dry-run"]):
        assert main(words) == 2
        assert "UnknownName: unknown ready file 'lamp-tabel2': did you mean lamp-table2" in (
            capsys.readouterr().err)
    with pytest.raises(SubnetError): paper_file("nothing")


def test_an_option_goes_over_a_ready_file(nothing_is_read):
    made = order_from_file("papers:lamp-table2", ["--epochs", "2", "--out", "mine"])
    assert made.values["epochs"] == 2 and made.values["out"] == "mine" and made.values["clip"] == 5
    row = ["--model", "bert-base-uncased", "--method", "stochastic"]
    made = order_from_file("papers:lamp-table2", row)
    assert "sweep" not in made.values and made.values["model"] == "bert-base-uncased" and made.values["sparsity"] == 0.3


# ── what would be done ───────────────────────────────────────────────────────────────────────────────────────────────

STUDIES: dict[str, dict[str, Any]] = {
    "lamp": dict(facts="pocket", relations=["MadeOf", "Desires"], seeds=[0, 1, 2], steps=40, batch=8, fine_tuned=True),
    "tickets": dict(tasks=["pocket:entails", "pocket:number"], seeds=[0, 1], epochs=2, batch=16, limit_train=100,
                    longer=[3], random_init=True),
    "critical": dict(target="pocket", control="pocket", text=["pocket"], seeds=[0, 1], steps=50, batches=[6, 4]),
    "probe": dict(task="pos", train="pocket", dev="pocket", granularity=["neuron", "matrix"], lambdas=[1.0, 5.0],
                  ranks=[4, 8], baselines=["mlp", "finetune", "reset"], seeds=[0, 1, 2], steps=30, batch=4),
    "tamt": dict(text="pocket", tasks=["pocket:entails"], densities=[0.5, 0.3], methods=["omp", "imp", "mlm", "kd"],
                 seeds=[0, 1], tuning_seeds=[0, 1, 2], steps=100, batch=8, limit_train=64,
                 tuning={"epochs": 2, "batch": 16}),
}
COSTS: dict[str, list[tuple[str, dict[str, int], int | None]]] = {      # what, axes, steps
    "lamp": [("mask search", {"relation": 2, "seed": 3}, 40), ("fine-tuning", {"relation": 2}, 100)],
    "tickets": [
        ("fine-tuning", {"task": 2, "seed": 2}, 14), ("pruning", {"task": 2, "seed": 2}, None),
        ("retraining", {"task": 2, "seed": 2, "kind": 4}, 14), ("retraining of bad masks", {"task": 2, "seed": 2}, 21),
        ("super-survivors", {"task": 2, "seed": 2, "kind": 3}, 14),
    ],
    "critical": [("mask search", {"seed": 2}, 50)],
    "probe": [("probe", {"probe": 10, "seed": 3}, 30)],
    "tamt": [
        ("mask training", {"method": 2, "density": 2, "seed": 2}, 100), ("iterative pruning", {"seed": 2}, 60),
        ("fine-tuning", {"task": 1, "mask": 1 + 2 + 4 + 4 + 4, "tuning seed": 3}, 8),
    ],
}
PASSES = {"lamp": 6 * 40, "tickets": 4 * 14, "critical": 100, "probe": 900, "tamt": 800}
"Of the first kind of cell."


def write(name: str, **more: Any) -> Path:
    values = {"recipe": name, "model": "some/model", "out": "out", "device": "cpu", **STUDIES[name], **more}
    Path("study.yaml").write_text(yaml.safe_dump(values))
    return Path("study.yaml")


@pytest.mark.parametrize("name", STUDIES)
def test_a_dry_run_says_what_would_be_done(name, nothing_is_read, capsys):
    write(name)
    assert main(["run", "study.yaml", "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [(w["what"], w["axes"], w["steps"]) for w in said["work"]] == COSTS[name]
    first = said["work"][0]
    assert first["passes"] == PASSES[name] and first["examples"] == PASSES[name] * first["batch"]
    assert (said["recipe"], said["model"], said["out"], said["published"]) == (name, "some/model", "out", False)
    assert said["there"] == {"study": False, "runs": 0, "finished": 0, "results": False, "report": False}
    assert main(["run", "study.yaml", "--dry-run"]) == 0
    text, err = capsys.readouterr()
    assert text.startswith(f"{name} of some/model\ndata: ") and f"{PASSES[name]:,} passes" in text and err == ""
    assert text.rstrip().endswith("out: out, where nothing is yet")
    assert [p.name for p in nothing_is_read.iterdir()] == ["study.yaml"]


@pytest.mark.parametrize("name", STUDIES)
def test_a_bad_file_is_refused_alike(name, nothing_is_read, capsys):
    wrong: list[dict[str, Any]] = [{"stesp": 3}, {"seeds": "first"}, {"batch": 0, "batches": [0, 1]}]
    wrong.append({"device": "abacus"})
    for odd in wrong:
        known = {option.name for option in recipe_options(find_recipe(name))}
        write(name, **{key: value for key, value in odd.items() if key == "stesp" or key in known})
        seen = []
        for words in ([], ["--dry-run"]):
            assert main(["run", "study.yaml", *words]) == 2
            seen.append(capsys.readouterr().err)
        assert seen[0] == seen[1] and seen[0].count("\n") == 1, seen


def test_new_facts_are_only_read(nothing_is_read, capsys):
    words = ["--model", "some/model", "--facts", "pocket", "--masks", "runs/lamp", "--relations", "MadeOf,IsA",
             "--random", "4", "--out", "out", "--dry-run"]
    assert main(["mine", *words]) == 0
    said = capsys.readouterr().out
    assert "asking without seeds: 5 conditions × 2 relations × ? questions = ? texts or more; only read" in said
    assert "asking for every seed: ? seeds × 2 relations × ? questions" in said and not list(nothing_is_read.iterdir())


def test_completing_says_what_rivals_cost(nothing_is_read, capsys):
    words = ["complete", "--model", "some/model", "--triples", "pocket", "--masks", "runs/lamp"]
    words += ["--relations", "MadeOf,IsA", "--random", "4", "--out", "out", "--dry-run"]
    rivals = ["--tuned", "whole,lora", "--tuned-steps", "9", "--rivals", "ConvE", "--rival-seeds", "0,1"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "asking without masks of relations: 5 conditions × 2 relations × ? triples = ? texts" in said
    assert "fine-tuning" not in said and "graph embedding" not in said
    assert main([*words, *rivals]) == 0
    said = capsys.readouterr().out
    assert "fine-tuning: 2 kinds × 2 relations = 4 cells; 9 steps of 32 in each" in said
    assert "graph embedding: 1 model × 2 seeds = 2 cells; 100 epochs of 128 in each" in said
    assert not list(nothing_is_read.iterdir())


def test_what_only_data_tell_stays_open(nothing_is_read, capsys):
    write("lamp", relations=None, epochs=6)
    assert main(["run", "study.yaml", "--dry-run"]) == 0
    assert "? relations × 3 seeds = ? cells; 6 epochs of 8 in each" in capsys.readouterr().out
    write("probe", granularity=["grid"])
    assert main(["run", "study.yaml", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["work"][0]["cells"] is None


def test_a_recipe_can_be_dry_run_without_a_file(nothing_is_read, capsys):
    words = ["--model", "some/model", "--facts", "pocket", "--out", "out", "--published"]
    assert main(["lamp", *words, "--dry-run"]) == 0
    assert "lamp of some/model, as published" in capsys.readouterr().out
    assert main(["run", "--help"]) == 0 and "--dry-run" in capsys.readouterr().out


def test_what_is_there_is_said_and_other_folders_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("lamp", model="pocket-bert", relations=["MadeOf"], seeds=[0], steps=2, random=1, fine_tuned=False, layers="4",
          quiet=True, report=False)
    assert main(["run", "study.yaml"]) == 0
    before = {p: p.stat().st_mtime_ns for p in Path("out").rglob("*")}
    capsys.readouterr()
    assert main(["run", "study.yaml", "--dry-run"]) == 0
    assert "out: out, where 1 of 1 runs are finished, results written" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in Path("out").rglob("*")} == before
    Path("thesis").mkdir()
    Path("thesis", "thesis.txt").write_text("x")
    for words in ([], ["--dry-run"]):
        assert main(["run", "study.yaml", "--out", "thesis", *words]) == 2
        assert "OtherRun" in capsys.readouterr().err


def test_work_counts():
    work = Work("search", {"density": 2, "seed": 3}, 10, 4)
    assert (work.cells, work.passes, work.examples) == (6, 60, 240)
    assert str(work) == "search: 2 densities × 3 seeds = 6 cells; 10 steps of 4 in each; 60 passes, 240 examples"
