"Labels of tables: what is a class, what is a number, and one schema for all parts."
from __future__ import annotations

import json

import pytest
from hypothesis import given, settings, strategies as st

from subnet_explorer.core.errors import SubnetError
from subnet_explorer.data.choices import BadChoices, read_choices
from subnet_explorer.data.parts import TaskData, task_data
from subnet_explorer.data.tables import BadTable, Labelled, LabelTask, read_glue
from subnet_explorer.measure.metrics import task_metrics


def table(folder, labels, name="mine.tsv"):
    folder.mkdir(exist_ok=True)
    file = folder / name
    rows = (f"sentence {i}\t{label}\n" for i, label in enumerate(labels))
    file.write_text("sentence\tlabel\n" + "".join(rows), encoding="utf-8")
    return file


@pytest.mark.parametrize("labels, wanted", [
    (["-1", "0", "1"], ["-1", "0", "1"]),
    (["-", "+", "-"], ["-", "+", "-"]),
    (["-", "-1", "x"], ["-", "-1", "x"]),
    (["pos", " pos", "pos ", "neg"], ["pos", "pos", "pos", "neg"]),
    (["1", "1.0", "0", "0.", "00", "+1", "-0"], ["1", "1", "0", "0", "0", "1", "0"]),
    (["1e0", "2"], ["1", "2"]),
    (["0.5", "5.", ".5", "1"], [.5, 5., .5, 1.]),
    (["-1", "0.25"], [-1., .25]),
    (["1.0", "beta"], ["1.0", "beta"]),
    (["nan", "pos"], ["nan", "pos"]),
    (["１", "2"], ["1", "2"]),
])
def test_labels_of_a_table_of_ones_own(tmp_path, labels, wanted):
    data = read_glue(table(tmp_path, labels))
    assert data.gold == wanted and not data.skipped and data.real == isinstance(wanted[0], float)
    assert data.real or set(data.task.labels) == set(wanted)


@pytest.mark.parametrize("labels", [["0.5", "nan", "1"], ["0", "1", "NaN"], ["0.5", "inf"], ["1", "1e999"]])
def test_no_finite_number_among_numbers_is_refused(tmp_path, labels):
    file = table(tmp_path, labels)
    with pytest.raises(BadTable, match=r"mine\.tsv, line [34]: the label"): read_glue(file)
    assert read_glue(file, strict=False).skipped == {"broken line": 1}


def test_an_empty_cell_is_no_label(tmp_path):
    data = read_glue(table(tmp_path, ["a", "", " ", "b"]))
    assert data.gold == ["a", "b"] and data.skipped == {"no gold label": 2} and "2 left out" in repr(data)


@given(st.lists(st.sampled_from(["-1", "-", "0", "1", "2.5", "x", " x ", "7"]), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_every_label_of_ones_own_is_kept(tmp_path_factory, labels):
    data = read_glue(table(tmp_path_factory.getbasetemp() / "labels", labels))
    assert len(data) == len(labels) and not data.skipped


def test_files_of_glue_have_rows_without_label(tmp_path):
    for name, label in (("rte", "-1"), ("mnli", "-"), ("sts-b", "-1")):
        columns = {"rte": "sentence1\tsentence2\tlabel", "mnli": "sentence1\tsentence2\tgold_label",
                   "sts-b": "sentence1\tsentence2\tscore"}[name]
        right = {"rte": "entailment", "mnli": "neutral", "sts-b": "2.5"}[name]
        (file := tmp_path / f"{name}.tsv").write_text(f"{columns}\na\tb\t{label}\na\tb\t{right}\n")
        assert read_glue(file).skipped == {"no gold label": 1}, name
    signs = LabelTask("signs", pair=(), labels=("-", "+"))
    assert read_glue(table(tmp_path, ["-", "+"]), task=signs).gold == ["-", "+"]


def test_whole_numbers_of_datasets_may_be_no_label(tmp_path, monkeypatch):
    import datasets
    rows = [{"sentence": "a", "label": label} for label in (2, 1, -1)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: {"train": datasets.Dataset.from_list(rows)})
    data = read_glue("datasets:some/where")
    assert data.gold == ["2", "1"] and data.task.labels == ("1", "2") and data.skipped == {"no gold label": 1}


# ── one schema for all parts ─────────────────────────────────────────────────────────────────────────────────────────

def parts(folder, train, dev):
    table(folder, train, "train.tsv")
    table(folder, dev, "dev.tsv")
    return folder


def test_a_class_that_dev_lacks_can_be_predicted(tmp_path):
    folder = parts(tmp_path / "mine", ["a", "b", "c"] * 20, ["a", "b"] * 9)
    data = task_data(folder)
    assert data.test.task == data.train.task == data.search.task == read_glue(folder, "dev").task
    assert data.test.task.labels == ("a", "b", "c")
    found = task_metrics(data.test.task, data.test.gold, ["c"] * len(data.test))
    assert found["score"] == 0.


def test_a_class_that_train_lacks_is_named(tmp_path):
    folder = parts(tmp_path / "mine", ["a", "b"] * 20, ["a", "b", "c"])
    for read in (lambda: read_glue(folder, "dev"), lambda: task_data(folder)):
        with pytest.raises(BadTable, match=r"dev\.tsv, line 4: the label 'c' is none of a, b"): read()
    assert read_glue(folder, "dev", strict=False).skipped == {"broken line": 1}


@pytest.mark.parametrize("train, dev, wanted", [
    (["0.5", "1", "2"], ["1", "2"], [1., 2.]),         # numbers, though dev alone looks like classes
    (["1", "2", "3"], ["1.0", "2"], ["1", "2"]),
])
def test_the_kind_of_a_task_comes_from_train(tmp_path, train, dev, wanted):
    folder = parts(tmp_path / "mine", train * 10, dev)
    assert read_glue(folder, "dev").gold == wanted


def test_numbers_of_dev_that_are_no_class_of_train_are_named(tmp_path):
    folder = parts(tmp_path / "mine", ["0", "1"] * 10, ["0", "0.5"])
    with pytest.raises(BadTable, match=r"line 3: the label '0\.5' is none of 0, 1"): task_data(folder)


def test_parts_of_a_data_set_share_the_schema_of_train(tmp_path):
    (folder := tmp_path / "set").mkdir()
    for name, labels in (("train", ["a", "b", "c"]), ("validation", ["a", "b"])):
        rows = [json.dumps({"sentence": f"s {i}", "label": label}) for i, label in enumerate(labels * 9)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    assert read_glue(f"datasets:{folder}", "dev").task.labels == ("a", "b", "c")


def test_parts_that_were_read_apart_are_checked(tmp_path):
    task = LabelTask("table", labels=("a", "b"))
    def data(labels, of=task): return Labelled(tuple(dict(sentence=str(i), label=x) for i, x in enumerate(labels)), of)
    TaskData(data("abab"), data("ab"), data("ab"))
    with pytest.raises(SubnetError, match="the test part of table has labels that the training part lacks: c"):
        TaskData(data("abab"), data("ab"), data("ac", LabelTask("table", labels=("a", "c"))))


# ── more formats ─────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("text", [
    "gj04\t1\t\tThe sailors rode.\ncj99\t0\t*\tThe more.\n",
    "source\tlabel\tmark\tsentence\ngj04\t1\t\tThe sailors rode.\ncj99\t0\t*\tThe more.\n",
    "sentence\tlabel\tidx\nThe sailors rode.\t1\t0\nThe more.\t0\t1\n",
])
def test_cola_with_and_without_header(tmp_path, text):
    (file := tmp_path / "cola.tsv").write_text(text)
    wanted = [dict(sentence="The sailors rode.", label="1"), dict(sentence="The more.", label="0")]
    assert list(read_glue(file)) == wanted


ARCT = "#id\twarrant0\twarrant1\tcorrectLabelW0orW1\treason\tclaim\tdebateTitle\tdebateInfo\n"


def test_arct(tmp_path):
    (file := tmp_path / "arct.tsv").write_text(ARCT + "7\tit flies.\tit swims\t0\tIt has wings.\tIt is a bird\tt\ti\n")
    assert list(read_choices(file)) == [dict(question="It has wings so It is a bird since", label=0, id="7",
                                             choices=["it flies.", "it swims"], scored="It has wings so It is a bird")]
    file.write_text(ARCT + "7\tit flies\tit swims\t2\tIt has wings.\tIt is a bird\tt\ti\n")
    with pytest.raises(BadChoices, match="line 2: the answer '2' is none of the choices 0, 1"): read_choices(file)
    file.write_text(ARCT + "7\tit flies\n")
    with pytest.raises(BadChoices, match="line 2: 2 columns where 8 were expected"): read_choices(file)
    file.write_text(ARCT.replace("correctLabelW0orW1\t", "") + "7\ta\tb\tc\td\te\tf\n")
    with pytest.raises(BadChoices, match=r"'correctLabelW0orW1' is missing\. Is this a test"): read_choices(file)


@pytest.mark.real
def test_the_published_arct(real):
    for name, n in (("train", 1210), ("dev", 316)):
        rows = read_choices(real / "datasets" / "arct" / f"{name}.tsv")
        assert len(rows) == n and {r["label"] for r in rows} == {0, 1}
