"Widgets by key, by button, and by code."
from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subnet_explorer.measure.maps import ATTENTION_PATTERNS, BadLabels, BadMap
from subnet_explorer.core.errors import SubnetError
from subnet_explorer.look.annotator import Annotator

MAPS = [np.eye(9) + .1 * i for i in range(5)]

def lines(path): return path.read_text().splitlines()[1:]


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
            want = [f"{i + 1:04d}\t{ATTENTION_PATTERNS[int(s) - 1]}" for i, s in enumerate(stack) if s != "s"]
            assert (lines(path) if path.exists() else []) == want and a.place == len(stack)
        assert not [p for p in Path(d).iterdir() if p.name != "l.tsv"]
        b = Annotator(MAPS, path)                                      # another day: the skipped ones come again
        assert b.labels == a.labels and b.current == next((i for i in range(5) if i >= len(stack) or stack[i] == "s"), None)


def test_the_widget_by_key_button_and_code(tmp_path):
    a = Annotator(MAPS, tmp_path / "l.tsv", ids=list("abcde"), tokens=[[f"<i>{k}</i>$x$" for k in range(9)]] * 5, texts=["<script>alert(1)</script>"] * 5, seed=3)
    parts = a.widget.parts
    assert "<script" not in parts["text"].value and parts["image"].value == a.image and sorted(a.order) == [0, 1, 2, 3, 4] and a.order != [0, 1, 2, 3, 4]
    first = a.ids[a.current]
    parts["field"].value = "3"
    assert a.labels == {first: "diagonal"} and parts["field"].value == "" and parts["image"].value == a.image
    parts["buttons"][5].click(); assert a.labels == {}
    parts["field"].value = "45s"; parts["field"].value = "x"
    assert len(a.labels) == 2 and "unknown key" in parts["message"].value
    figure = a.figure
    assert "<i>" not in figure.plotly.data[0].x[0] and len(figure.data) == 81 and a.ids[a.current] in figure.alt
    for kind in ("html", "svg", "png"): assert a.save(tmp_path / f"m.{kind}").stat().st_size > 1000
    for _ in range(2): a.press("1")
    assert a.current is None and "1 skipped" in a.status
    with pytest.raises(SubnetError, match="no map to show"): a.figure


def test_the_widget_refuses_what_does_not_fit(tmp_path):
    for given, message in ((dict(ids=["a"]), "give one for each map"), (dict(ids=["a"] * 5), "must differ"), (dict(ids=["a\tb", *"cdef"]), "must differ"), (dict(tokens=[["x"]] * 5), "another number of tokens")):
        with pytest.raises(BadLabels, match=message): Annotator(MAPS, tmp_path / "n.tsv", **given)
    (tmp_path / "l.tsv").write_text("file\tlabel\nq\tblock\n")
    with pytest.raises(BadLabels, match="not among these maps"): Annotator(MAPS, tmp_path / "l.tsv")
    assert (tmp_path / "l.tsv").read_text() == "file\tlabel\nq\tblock\n"
    with pytest.raises(BadMap, match="not finite"): Annotator([np.full((9, 9), np.nan)], tmp_path / "n.tsv")
