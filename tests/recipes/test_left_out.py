"What a study left out is said everywhere: in its tables, notes, results.json, report, shell and notebook."
from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest

from subnet_explorer.core.masks import Masks
from subnet_explorer.core.power import detectable
from subnet_explorer.data.facts import Facts, read_facts
from subnet_explorer.data.files import Reading
from subnet_explorer.data.parts import task_data
from subnet_explorer.recipes.start import order
from subnet_explorer.recipes.study import (
    FEW,
    LEFT_OUT,
    Bench,
    Study,
    few_note,
    find_recipe,
    left_out_of,
    notes_of,
    printed,
)

RELATIONS = {"P463": {"object is not one token": 212}, "P19": {"repeated fact": 3, "false triple": 0}}
FACTS = Facts(read_facts("pocket").items[:3], "mine", RELATIONS)


class Told(Study):
    def summary(self): return pd.DataFrame({"value": [1.0]})


def study(tmp_path, data, to=None):
    bench = Bench({"recipe": "lamp", "x": 1}, to, False, data)
    return bench.finished(Told(masks=Masks([]), tables={}, config=bench.config, model_name="m", seconds=0.0,
                               folder=bench.folder))


def table(folder, rows):
    folder.mkdir(exist_ok=True)
    for name in ("train", "dev"):
        lines = [f"{name} {i}\t{x}\n" for i, x in enumerate(rows)]
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(lines))
    return folder


def test_everything_that_was_read_says_what_it_left_out(tmp_path):
    tasks = task_data(table(tmp_path / "mine", ["a", "b"] * 9 + ["", "a\tb"]), strict=False)
    text = Reading(["one"], {"empty": 2}, ["one.txt was read as WikiText."])
    data = {"facts": FACTS, "RTE": tasks, "text": text, "train": {"too long": 4}}
    rows = [row for name, some in data.items() for row in left_out_of(name, some)]
    assert pd.DataFrame(rows)[LEFT_OUT].values.tolist() == [
        ["facts", "P463", "object is not one token", 212], ["facts", "P19", "repeated fact", 3],
        ["facts", "P19", "false triple", 0],
        ["RTE/train", "", "no gold label", 1], ["RTE/train", "", "broken line", 1],
        ["RTE/test", "", "no gold label", 1], ["RTE/test", "", "broken line", 1],
        ["text", "", "empty", 2], ["train", "", "too long", 4]]
    assert notes_of(data) == ["one.txt was read as WikiText."]


def test_it_is_said_everywhere(tmp_path):
    found = study(tmp_path, {"facts": FACTS, "text": Reading(["x"], notes=["Read as WikiText."])}, tmp_path / "out")
    said = "left out of facts: 212 object is not one token, 3 repeated fact."
    assert found.notes == ("Read as WikiText.", said)
    assert found.tables["left_out"].values.tolist() == [
        ["facts", "P463", "object is not one token", 212], ["facts", "P19", "repeated fact", 3]]
    assert said in repr(found) and said in found._repr_html_() and said in printed(found)
    assert "P463" in printed(found) and "212" in printed(found)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["notes"] == list(found.notes) and results["left_out"][0]["n"] == 212
    assert "P463,object is not one token,212" in (tmp_path / "out" / "left_out.csv").read_text()
    report = found.report(tmp_path / "report.html").read_text()
    assert said in report and "P463" in report and "Left out" in report


def test_nothing_is_said_of_nothing(tmp_path):
    found = study(tmp_path, {"facts": read_facts("pocket")}, tmp_path / "out")
    assert found.notes == () and not found.tables and "left_out" not in found.to_json()
    assert printed(found) == found.shown()


def test_small_parts_are_named():
    assert few_note("test facts", {"IsA": 21, "PartOf": 32}) == [
        "Small test part: IsA 21 test facts. With 21, shares of right answers that differ by less than 0.27 are not "
        "told apart, as a rule."]
    assert few_note("test facts", {"PartOf": 32}) == few_note("test facts", {"a": 17, "b": 17}, together=True) == []
    whole = few_note("test facts", {"IsA": 12, "PartOf": 9}, together=True)
    assert whole == ["Small test part: IsA 12, PartOf 9 test facts. With 21, shares of right answers that differ by "
                     "less than 0.27 are not told apart, as a rule."]
    assert "IsA 2 test" in few_note("test facts", {"IsA": 2, "PartOf": 60}, together=True)[0]


def test_a_small_test_part_is_the_first_thing_that_is_said(tmp_path):
    small = few_note("sentences", {"RTE": 9})
    found = replace(study(tmp_path, {"text": Reading(["x"], notes=["Read as WikiText."])}), notes=("first", *small))
    assert printed(found).startswith("Small test part: RTE 9") and printed(found).endswith("first")
    html = found._repr_html_()
    assert html.index("Small test part") < html.index("<table") < html.index("first")


def test_the_threshold_of_small_parts_is_what_shows_a_fifth():
    assert detectable(FEW) <= .2 < detectable(FEW - 1)


class Opened(Exception):
    pass


@pytest.mark.parametrize("command", [
    "lamp --model pocket-bert --facts pocket",
    "tickets --model pocket-bert --tasks pocket:entails",
    "critical --model pocket-gpt2 --target pocket --about bird --control pocket --text pocket",
    "tamt --model pocket-bert --text pocket",
])
def test_a_bench_of_every_recipe_knows_its_data(command, tmp_path, monkeypatch):
    name, *words = command.split()
    def opened(bench):
        raise Opened(bench.data)
    monkeypatch.setattr(Bench, "__post_init__", opened)
    with pytest.raises(Opened) as e:
        order(find_recipe(name), [*words, "--out", str(tmp_path / "out"), "--quiet"]).run()
    assert e.value.args[0], "nothing is said of the data"
