"The annotator of facts: several people, one file, keys, and that nothing is lost."
from __future__ import annotations

import tempfile
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from subnet_explorer.core.errors import SubnetError
from subnet_explorer.core.files import CannotWrite
from subnet_explorer.data.annotations import PLAUSIBILITY, BadAnnotations, read_annotations, verdicts
from subnet_explorer.look import facts_annotator
from subnet_explorer.look.facts_annotator import FactsAnnotator

FACTS = pd.DataFrame([("IsA", "oak", "tree"), ("IsA", "elm", "bird"), ("HasA", "car", "wheels"),
                      ("CapableOf", "=2+2", "<b>swim</b>")], columns=["relation", "sub", "obj"])


@given(st.lists(st.tuples(st.sampled_from(["Ada", "Ben"]), st.sampled_from("123us")), max_size=25))
@settings(max_examples=25)
def test_two_people_in_one_file_each_as_if_alone(pressed):
    with tempfile.TemporaryDirectory() as d:
        people = {name: FactsAnnotator(FACTS, f"{d}/both.csv", name, seed=None) for name in ("Ada", "Ben")}
        alone = {name: FactsAnnotator(FACTS, f"{d}/{name}.csv", name, seed=None) for name in people}
        for name, key in pressed:
            people[name].press(key)
            alone[name].press(key)
            assert people[name].labels == alone[name].labels
        both = read_annotations(f"{d}/both.csv", proposals=FACTS) if Path(f"{d}/both.csv").exists() else FACTS[:0]
        for name, person in people.items():
            own = read_annotations(f"{d}/{name}.csv") if Path(f"{d}/{name}.csv").exists() else FACTS[:0]
            mine = both[both.annotator == name] if len(both) else both
            assert mine.to_numpy().tolist() == own.to_numpy().tolist()
            assert FactsAnnotator(FACTS, f"{d}/both.csv", name).labels == person.labels
        assert all(p.suffix == ".csv" for p in Path(d).iterdir())


def test_the_widget_by_key_button_and_code(tmp_path):
    a = FactsAnnotator(FACTS.assign(prompt="the [MASK] of it ."), tmp_path / "a.csv", "Ada", seed=None)
    parts = a.widget.parts
    assert parts["text"].value == "the tree of it .   (oak – IsA – tree)" and parts["image"].layout.display == "none"
    parts["field"].value = "1"
    parts["buttons"][1].click()
    assert list(a.labels.values()) == ["plausible", "not"] and "2 of 4 labelled" in parts["status"].value
    parts["field"].value = "x"
    assert "unknown key" in parts["message"].value
    a.press("s")
    assert "<b>" not in parts["text"].value and "&lt;b&gt;swim" in parts["text"].value
    figure = a.figure
    assert figure.data.facts.tolist() == [1, 1, 0] and "&lt;b&gt;" in figure.plotly.layout.title.text
    for kind in ("html", "svg", "png"): assert a.save(tmp_path / f"m.{kind}").stat().st_size > 1000
    a.press("3")
    with pytest.raises(SubnetError, match="no fact to show: 3 of 4 labelled, 1 skipped"): a.save(tmp_path / "end.svg")
    cells = (tmp_path / "a.csv").read_text().splitlines()
    assert "'=2+2" in cells[-1] and read_annotations(tmp_path / "a.csv")["sub"].tolist()[-1] == "=2+2"


def test_everybody_has_an_order_of_their_own(tmp_path):
    many = pd.DataFrame({"relation": "IsA", "sub": [f"x{i}y" for i in range(30)], "obj": "z"})
    orders = [FactsAnnotator(many, tmp_path / "a.csv", name).order for name in ("Ada", "Ben", "Ada")]
    assert orders[0] == orders[2] != orders[1] and sorted(orders[1]) == list(range(30))


def test_columns_and_rows_of_others_stay(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("relation,sub,obj,annotator,label,remark\nIsA,oak,tree,Ben,unclear,which oak?\n"
                    "HasA,moon,crater,Ben,plausible,\nIsA,elm,bird,Ada,not,never\n")
    a = FactsAnnotator(FACTS, file, "Ada", seed=None)
    assert list(a.labels.values()) == ["not"]
    a.press("1")
    rows = file.read_text().splitlines()
    assert rows[1:3] == ["IsA,oak,tree,Ben,unclear,which oak?", "HasA,moon,crater,Ben,plausible,"]
    assert rows[3:] == ["IsA,oak,tree,Ada,plausible,", "IsA,elm,bird,Ada,not,never"]


def test_a_file_that_changed_in_between_is_kept_or_refused(tmp_path, monkeypatch):
    file = tmp_path / "a.csv"
    a = FactsAnnotator(FACTS, file, "Ada", seed=None)
    a.press("1")
    file.write_text(file.read_text() + "IsA,oak,tree,Ben,perhaps\n")
    before = file.read_text()
    with pytest.raises(BadAnnotations, match="line 3: the label 'perhaps'"): a.press("2")
    assert file.read_text() == before and list(a.labels.values()) == ["plausible"] and a.place == 1
    file.write_text(before.replace("perhaps", "not"))

    def full(*_): raise CannotWrite("the disk is full.")
    monkeypatch.setattr(facts_annotator, "atomic_write", full)
    with pytest.raises(CannotWrite): a.press("2")
    assert list(a.labels.values()) == ["plausible"] and a.place == 1
    monkeypatch.undo()
    a.press("2")
    assert len(read_annotations(file)) == 3


@pytest.mark.parametrize("given, message", [
    (dict(proposals=FACTS[["relation", "sub"]]), "no column obj"), (dict(proposals=FACTS[:0]), "proposals are empty"),
    (dict(annotator=" "), "has no name"), (dict(labels=["yes"]), "from two to nine"),
    (dict(labels=["yes", "yes"]), "from two to nine"),
], ids=["a column", "none", "no name", "one label", "a label twice"])
def test_what_does_not_fit_is_refused(tmp_path, given, message):
    with pytest.raises(BadAnnotations, match=message):
        FactsAnnotator(**{"proposals": FACTS, "to": tmp_path / "n.csv", "annotator": "Ada", **given})


@pytest.mark.parametrize("text, message", [
    ("relation,sub,obj,annotator\n", "no column label"), ("relation,sub,obj,label\nIsA,oak\n", "line 2: 2 columns"),
    ("relation,sub,obj,annotator,label\nIsA,oak,tree,Ada,not\nIsA,Oaks,tree,Ada,not\n", "line 3: Ada has a label"),
    ("relation,sub,obj,annotator,label\nIsA,oak,tree,Ada,7\n", "the label '7' is not one of"),
], ids=["a column", "a short line", "two labels", "out of range"])
def test_files_that_cannot_be_used_are_named_with_their_line(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(BadAnnotations, match=message): read_annotations(tmp_path / "a.csv")
    with pytest.raises(BadAnnotations, match=r"a\.csv"): FactsAnnotator(FACTS, tmp_path / "a.csv", "Ben")
    assert (tmp_path / "a.csv").read_text() == text


@given(st.lists(st.sampled_from(PLAUSIBILITY), min_size=1, max_size=7))
def test_a_verdict_needs_more_than_half(labels):
    oak = dict(relation="IsA", sub="oak", obj="tree")
    rows = [{**oak, "annotator": str(i), "label": label} for i, label in enumerate(labels)]
    most = [label for label in PLAUSIBILITY if labels.count(label) > len(labels) / 2]
    assert verdicts(pd.DataFrame(rows)).verdict[0] == (most[0] if most else "unclear")


def test_two_windows_of_one_person_lose_nothing(tmp_path):
    one, two = (FactsAnnotator(FACTS, tmp_path / "a.csv", "Ada", seed=None) for _ in range(2))
    one.press("1")
    two.press("s")
    two.press("2")
    assert read_annotations(tmp_path / "a.csv").label.tolist() == ["plausible", "not"]
    one.press("u")
    assert read_annotations(tmp_path / "a.csv")[["sub", "label"]].to_numpy().tolist() == [["elm", "not"]]


def test_the_same_words_are_not_the_same_fact(tmp_path):
    sea = pd.DataFrame([("HasA", "sea lion", "fish"), ("HasA", "sea", "lion fish")], columns=["relation", "sub", "obj"])
    a = FactsAnnotator(sea, tmp_path / "a.csv", "Ada", seed=None)
    for key in "12": a.press(key)
    assert read_annotations(tmp_path / "a.csv").label.tolist() == ["plausible", "not"]
