"The annotator by key, by button, and by code."
from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from subnet_explorer.core.errors import SubnetError
from subnet_explorer.look.annotator import Annotator
from subnet_explorer.measure.maps import ATTENTION_PATTERNS, BadLabels, BadMap

MAPS = [np.eye(9) + .1 * i for i in range(5)]


def lines(path): return path.read_text().splitlines()[1:] if path.exists() else []


@given(st.text("12345us", max_size=25))
@settings(max_examples=30)
def test_keys_and_file_agree_whatever_is_pressed(keys):
    with tempfile.TemporaryDirectory() as d:
        a, path = Annotator(MAPS, f"{d}/l.tsv"), Path(d, "l.tsv")
        stack = []                                                     # what the file must say, after every key
        for k in keys:
            a.press(k)
            if k == "u": stack = stack[:-1]
            elif len(stack) < len(MAPS): stack.append(k)
            labels = {i: ATTENTION_PATTERNS[int(s) - 1] for i, s in enumerate(stack) if s != "s"}
            assert lines(path) == [f"{i + 1:04d}\t{label}" for i, label in labels.items()]
            assert a.place == len(stack)
        assert not [p for p in Path(d).iterdir() if p.name != "l.tsv"]
        b = Annotator(MAPS, path)                                      # another day: the skipped ones come again
        assert b.labels == a.labels
        assert b.current == next((i for i in range(5) if i >= len(stack) or stack[i] == "s"), None)


@pytest.fixture
def marked(tmp_path):
    "An annotator whose names, tokens and texts are full of markup."
    tokens = [f"<i>{k}</i>$x$" for k in range(9)]
    texts = ["<script>alert(1)</script>"] * 5
    return Annotator(MAPS, tmp_path / "l.tsv", ids=list("abcde"), tokens=[tokens] * 5, texts=texts, seed=3)


def test_the_widget_by_key_button_and_code(marked, tmp_path):
    a, parts = marked, marked.widget.parts
    assert "<script" not in parts["text"].value and parts["image"].value == a.image
    assert sorted(a.order) == [0, 1, 2, 3, 4] and a.order != [0, 1, 2, 3, 4]
    first = a.ids[a.current]
    parts["field"].value = "3"
    assert a.labels == {first: "diagonal"} and parts["field"].value == "" and parts["image"].value == a.image
    parts["buttons"][5].click()
    assert a.labels == {}
    parts["field"].value = "45s"
    parts["field"].value = "x"
    assert len(a.labels) == 2 and "unknown key" in parts["message"].value
    figure = a.figure
    assert "<i>" not in figure.plotly.data[0].x[0] and len(figure.data) == 81
    assert a.ids[a.current] in figure.alt
    for kind in ("html", "svg", "png"): assert a.save(tmp_path / f"m.{kind}").stat().st_size > 1000
    for _ in range(2): a.press("1")
    assert a.current is None and "1 skipped" in a.status
    with pytest.raises(SubnetError, match="no map to show"): a.save(tmp_path / "end.svg")


@pytest.mark.parametrize("given, message", [
    (dict(ids=["a"]), "give one for each map"), (dict(ids=["a"] * 5), "must differ"),
    (dict(ids=["a\tb", *"cdef"]), "must differ"), (dict(tokens=[["x"]] * 5), "another number of tokens"),
], ids=["too few names", "one name", "a tab", "tokens"])
def test_the_widget_refuses_what_does_not_fit(tmp_path, given, message):
    with pytest.raises(BadLabels, match=message): Annotator(MAPS, tmp_path / "n.tsv", **given)


def test_the_widget_refuses_other_files_and_maps(tmp_path):
    (tmp_path / "l.tsv").write_text("file\tlabel\nq\tblock\n")
    with pytest.raises(BadLabels, match="not among these maps"): Annotator(MAPS, tmp_path / "l.tsv")
    assert (tmp_path / "l.tsv").read_text() == "file\tlabel\nq\tblock\n"
    with pytest.raises(BadMap, match="not finite"): Annotator([np.full((9, 9), np.nan)], tmp_path / "n.tsv")
