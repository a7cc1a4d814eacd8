"Studies from YAML files: the same study as from a shell, and one named sentence for whatever is wrong with a file."
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from subnet_explorer.cli import main
from subnet_explorer.core.pairs import Pairs
from subnet_explorer.data.facts import read_facts
from subnet_explorer.recipes.options import comments_of, options_of
from subnet_explorer.recipes.study import Bench

GOOD = {"recipe": "lamp", "model": "pocket-bert", "facts": "pocket", "relations": ["MadeOf"], "layers": "4",
        "steps": 2, "batch": 8, "random": 1, "device": "cpu", "report": False, "quiet": True, "out": "out"}


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    "Run a file: status, standard output, standard error."
    monkeypatch.chdir(tmp_path)

    def run(values, *words):
        text = values if isinstance(values, str) else yaml.safe_dump(values)
        Path("study.yaml").write_text(text)
        status = main(["run", "study.yaml", *words])
        return status, *capsys.readouterr()
    return run


def refused(call, values, *says, name="BadSetting"):
    "One named line on the standard error, and nothing written."
    status, out, err = call(values)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"subnet-explorer: {name}: "), err
    for said in says: assert said in err
    assert [p.name for p in Path().iterdir()] == ["study.yaml"]


def test_a_file_is_a_study(call):
    status, out, err = call(GOOD)
    assert status == 0 and "MadeOf" in out and Path("out/results.json").exists(), err
    before = {p: p.stat().st_mtime_ns for p in Path("out/runs").rglob("*.*") if not p.name.startswith(".")}
    status, _, _ = call(GOOD)
    assert status == 0 and {p: p.stat().st_mtime_ns for p in before} == before


def test_a_printed_order_is_that_file(call, capsys):
    assert main(["lamp", "--model", "pocket-bert", "--facts", "pocket", "--out", "out", "--print-config"]) == 0
    printed = capsys.readouterr().out
    status, again, _ = call(printed, "--print-config")
    assert status == 0 and yaml.safe_load(again) == yaml.safe_load(printed)
    assert not Path("out").exists()


@pytest.mark.parametrize("key, near", [("stesp", "steps"), ("relation", "relations"), ("device-", "device")])
def test_an_unknown_key_is_named_with_its_nearest(call, key, near):
    refused(call, {**GOOD, key: 3}, f"did you mean {near}", name="UnknownName")


@pytest.mark.parametrize("values, says", [
    ({"steps": "many"}, ("steps", "many", "give a whole number")),
    ({"seeds": "first"}, ("seeds", "first", "whole numbers")),
    ({"lr": [1, 2]}, ("lr", "give a number")),
    ({"quiet": "perhaps"}, ("quiet", "perhaps", "true or false")),
    ({"recipe": 3}, ("does not say which recipe",)),
    ({"facts": None}, ("facts",)),
], ids=str)
def test_a_wrong_type_is_named(call, values, says):
    refused(call, {**GOOD, **values}, *says)


def test_an_unknown_recipe_is_named_with_its_nearest(call):
    refused(call, {**GOOD, "recipe": "lmap"}, "unknown recipe 'lmap'", "did you mean lamp", name="UnknownName")


@pytest.mark.parametrize("text, says", [
    ("- lamp\n- pocket-bert\n", "no keys and values"),
    ("recipe: [lamp\n", "no YAML file"),
    ("", "no keys and values"),
    ("model: pocket-bert\n", "does not say which recipe"),
], ids=["a list", "broken", "empty", "no recipe"])
def test_a_file_that_is_no_order(call, text, says): refused(call, text, says)


def test_there_is_no_such_file(call, capsys):
    Path("study.yaml").unlink(missing_ok=True)
    assert main(["run", "nowhere.yaml"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("subnet-explorer: BadSetting: there is no file nowhere.yaml") and err.count("\n") == 1
    assert not list(Path().iterdir())


def test_a_missing_option_is_named(call):
    refused(call, {key: value for key, value in GOOD.items() if key != "facts"}, "--facts is missing")


def test_the_folder_of_another_study_is_left_alone(call):
    call(GOOD)
    before = {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    for change, says in (({"steps": 3}, "steps"), ({"relations": ["Desires"]}, "split")):
        status, out, err = call({**GOOD, **change})
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("subnet-explorer: OtherRun: ") and "another study" in err and says in err
    Path("thesis").mkdir()
    Path("thesis", "thesis.txt").write_text("x")
    status, _, err = call({**GOOD, "out": "thesis"})
    assert status == 2 and "holds no study" in err
    assert {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()} == before
    assert [p.name for p in Path("thesis").iterdir()] == ["thesis.txt"]


def test_a_study_with_nothing_left_to_do_closes_its_line():
    assert Bench({}).work("ticket", [], lambda labels: labels) == []


def test_a_unit_whose_score_is_undefined_is_left_out_of_both_sides():
    rows = [("a", 0, 0.5), ("b", 0, 0.25), ("a", 1, float("nan")), ("b", 1, -3.0), ("a", 2, 0.5), ("b", 2, 0.0)]
    scores = pd.DataFrame(rows, columns=["under", "seed", "score"])
    gains = Pairs(scores, ["seed"]).gains("a", "b").iloc[0]
    assert gains.seeds == 2 and gains.undefined == 1 and gains["mean"] == pytest.approx(0.375)


def free(
    # settings of the search
    steps: int = 3,
    # how long
    lr: float = 0.01,    # of the logits,
                         # not of the weights
    watchers: Sequence[object] = (),
    **more: Any,         # for the loop
) -> None:
    "Comments of their own lines, and what no shell can say."


def test_options_of_a_freely_written_signature():
    options = options_of(free, "settings")
    assert [(o.name, o.help) for o in options] == [("steps", "steps"), ("lr", "of the logits, not of the weights")]
    assert comments_of(print) == {}


def test_names_are_escaped_in_notebooks():
    odd = replace(read_facts("pocket", "MadeOf"), name="<i>mine</i>")
    assert "<i>" not in odd._repr_html_() and "&lt;i&gt;mine" in odd._repr_html_()
    assert "<i>" not in replace(odd, items=())._repr_html_()
