"Whatever a file holds, a reader gives the right value or a named error, never another exception."
from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from subnet_explorer.core.errors import SubnetError
from subnet_explorer.core.formats import BadMasks, read_mask_state, read_masks
from subnet_explorer.core.space import unit_space
from subnet_explorer.data.choices import read_choices
from subnet_explorer.data.facts import read_facts
from subnet_explorer.data.graphs import read_graph, wordnet
from subnet_explorer.data.parts import task_data
from subnet_explorer.data.questions import read_squad
from subnet_explorer.data.sentences import read_conllu, read_ner
from subnet_explorer.data.tables import read_glue
from subnet_explorer.data.templates import read_templates
from subnet_explorer.data.texts import read_texts
from subnet_explorer.measure.maps import read_labels
from subnet_explorer.recipes.options import read_yaml

LAMA = {"pred": "IsA", "sub_label": "robin", "obj_label": "bird", "masked_sentences": ["a robin is a [MASK] ."]}
TREX = {"predicate_id": "P1", "sub_label": "a", "obj_label": "b", "evidences": [{"masked_sentence": "a is [MASK] ."}]}
TRIPLE = {"relation": "IsA", "head": "robin", "tail": "bird", "text": "a robin is a bird", "label": 1, "uuid": "u"}
SQUAD = {"data": [{"paragraphs": [{"context": "A robin is a bird.", "qas": [
    {"id": "1", "question": "What?", "answers": [{"text": "bird", "answer_start": 13}]}]}]}]}
COPA = {"premise": "It rained.", "choice1": "Wet.", "choice2": "Dry.", "question": "effect", "label": 0, "idx": 1}
CSQA = {"id": "1", "answerKey": "A", "question": {"stem": "What?", "question_concept": "x", "choices": [
    {"label": "A", "text": "yes"}, {"label": "B", "text": "no"}]}}

READERS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a.jsonl": (read_facts, [json.dumps(LAMA), json.dumps(TREX), json.dumps(TRIPLE)]),
    "a.tsv": (read_facts, ["IsA\trobin\tbird\t1", "relation\thead\ttail\tlabel"]),
    "g.tsv": (read_graph, ["IsA\trobin\tbird", "PartOf\ta\tb"]),
    "relations.jsonl": (read_templates, [json.dumps({"relation": "P1", "template": "[X] is [Y] ."})]),
    "t.tsv": (read_glue, ["sentence\tlabel", "a bird\t1", "a dog\t0.5", "x\t-"]),
    "u.tsv": (lambda p: task_data(p, strict=False), ["sentence\tlabel", "a bird\tyes", "a dog\tno"]),
    "cola.tsv": (read_glue, ["gj04\t1\t\tA bird.", "gj04\t0\t*\tBird a."]),
    "c.jsonl": (read_choices, [json.dumps(COPA)]),
    "d.jsonl": (read_choices, [json.dumps(CSQA)]),
    "c.csv": (read_choices, ["id,sent0,sent1,label", '1,"a cat",a dog,0']),
    "c.txt": (read_choices, ["0\x01a cat\x01a dog"]),
    "c.tsv": (read_choices, ["#id\twarrant0\twarrant1\tcorrectLabelW0orW1\treason\tclaim", "1\ta\tb\t0\tr\tc"]),
    "q.json": (read_squad, [json.dumps(SQUAD)]),
    "m.json": (lambda p: read_squad(p, misplaced="move"), [json.dumps(SQUAD)]),
    "a.conllu": (read_conllu, ["1\tBirds\t_\tNOUN\t_\t_\t2\tnsubj\t_\t_", "2\tfly\t_\tVERB\t_\t_\t0\troot\t_\t_", ""]),
    "b.conllu": (lambda p: read_conllu(p, tree=False, strict=False),
                 ["1\tBirds\t_\tNOUN\t_\t_\t_\t_\t_\t_", "1-2\tx\t_\t_\t_\t_\t_\t_\t_\t_", ""]),
    "n.txt": (read_ner, ["Ann\tB-PER", "runs\tO", ""]),
    "p.txt": (lambda p: read_texts(p, by="paragraph"), ["A bird.", "", "<unk> @-@"]),
    "w.tokens": (read_texts, ["A bird.", "", "<unk> @-@"]),
    "s.yaml": (read_yaml, ["recipe: lamp", "seeds: [0, 1]"]),
    "l.tsv": (read_labels, ["file\tlabel", "1\tBlock", "diagonal = 1, 2"]),
}
LETTERS = st.characters(codec="utf-8")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | st.text(LETTERS, max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        [*LAMA, *TREX, *TRIPLE, *COPA, *CSQA, "data", "paragraphs", "context", "qas", "answers", "text", "choices"]),
        inner, max_size=3), max_leaves=8)
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
readers = pytest.mark.parametrize("name", READERS)


def read(folder, name: str, data: bytes) -> None:
    file = folder / name
    file.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: READERS[name][0](file)
        except SubnetError as e: assert str(e)


@readers
@many
@given(data=st.binary(max_size=200))
def test_random_bytes(tmp_path, name, data):
    read(tmp_path, name, data)
    file = tmp_path / f"{name}.gz"
    for packed in (data, gzip.compress(data)[:len(data)]):
        file.write_bytes(packed)
        try: READERS[name][0](file)
        except SubnetError as e: assert str(e)


@readers
@many
@given(data=st.data())
def test_truncated_and_damaged_files(tmp_path, name, data):
    whole = ("\n".join(READERS[name][1]) + "\n").encode()
    cut = data.draw(st.integers(0, len(whole)))
    at, byte = data.draw(st.integers(0, len(whole))), data.draw(st.binary(max_size=3))
    read(tmp_path, name, whole[:cut])
    read(tmp_path, name, whole[:at] + byte + whole[at + len(byte):])


@readers
@many
@given(data=st.data())
def test_lines_in_disorder(tmp_path, name, data):
    parts = READERS[name][1]
    cell = st.sampled_from([c for part in parts for c in part.split("\t")]) | st.text(LETTERS, max_size=5)
    cells = st.lists(cell, max_size=6).map("\t".join)
    lines = data.draw(st.lists(st.sampled_from(parts) | cells, max_size=6))
    read(tmp_path, name, "\n".join(lines).encode())


@pytest.mark.parametrize("name", [name for name in READERS if "json" in name])
@many
@given(data=st.data())
def test_wrong_types_in_json(tmp_path, name, data):
    said = json.loads(data.draw(st.sampled_from(READERS[name][1])))
    key = data.draw(st.sampled_from(list(said)))
    changed = data.draw(st.sampled_from([
        {**said, key: data.draw(VALUES)}, {k: v for k, v in said.items() if k != key}, data.draw(VALUES)]))
    read(tmp_path, name, json.dumps(changed).encode())


@pytest.mark.parametrize("wrong", [None, 7, 1.5, b"x", ["a"], {"a": 1}, object(), "", "\0", "a\0b", "x" * 5000,
                                   "~nobody/x", "nowhere", "datasets:", "."])
def test_wrong_sources(wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    one = (read_facts, read_graph, read_glue, task_data, read_choices)
    for reader in (*one, read_squad, read_conllu, read_ner, read_texts):
        try: reader(wrong)
        except SubnetError as e: assert str(e)
    if wrong is None: return      # the usual folder
    with pytest.raises(SubnetError): wordnet(wrong)


@many
@given(data=st.binary(max_size=120))
def test_masks_of_others(tmp_path, data):
    place = tmp_path / "RTE" / "seed_1"
    place.mkdir(parents=True, exist_ok=True)
    (place / "head_mask.npy").write_bytes(data)
    (tmp_path / "mask.pt").write_bytes(data)
    with pytest.raises(BadMasks): read_masks(tmp_path)
    with pytest.raises(BadMasks): read_mask_state(tmp_path / "mask.pt", unit_space(1, 2))
    np.save(place / "head_mask.npy", np.ones((2, 3)))
    assert read_masks(tmp_path)[0].density == 1
