"What needs no model: majority labels and bags of words over parts of the input, and pocket tasks without shortcuts."
from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from subnet_explorer.core.errors import SubnetError
from subnet_explorer.data.choices import read_choices
from subnet_explorer.data.parts import task_data
from subnet_explorer.data.pocket_tasks import POCKET_TASKS, choices, choose, plausible
from subnet_explorer.data.questions import read_squad
from subnet_explorer.data.tables import GLUE, Labelled, LabelTask, read_glue
from subnet_explorer.measure.baselines import PARTIAL, WHOLE, baselines, trivial_scores


def labelled(rows, task=GLUE["RTE"]):
    return Labelled(tuple(rows), task)


def by_name(*parts, **how):
    return baselines(*parts, **how).set_index("baseline")


def give_away(n, seed=0):
    "Pairs whose second text alone gives away the label: of those that do not follow, all have a not."
    rng = np.random.default_rng(seed)
    for i in range(n):
        label = GLUE["RTE"].labels[i % 2]
        word = f"w{rng.integers(30)}"
        yield {"sentence": f"there is {word} .", "pair": f"it is {'not ' * (i % 2)}{word} .", "label": label}


# ── the pocket tasks ─────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("task", POCKET_TASKS)
def test_no_part_of_a_pocket_task_says_anything(task):
    train, dev = read_glue(f"pocket:{task}"), read_glue(f"pocket:{task}", "dev")
    found, chance = by_name(train, dev), .5 if train.task.metrics[0] == "accuracy" else 0.
    assert set(found.index) >= {"majority", WHOLE}
    assert ({"first text", "second text"} <= set(found.index)) == (task != "acceptable")
    partial = found[found.index != WHOLE].score
    assert not (partial > chance + .03).any(), found


@pytest.mark.parametrize("task", ["paraphrase", "entails"])
@pytest.mark.parametrize("part", ["train", "dev"])
def test_every_text_occurs_as_often_with_each_label(task, part):
    table = read_glue(f"pocket:{task}", part).table()
    for text in ("sentence", "pair"):
        counts = table.groupby([text, "label"]).size().unstack(fill_value=0)
        assert (counts.iloc[:, 0] == counts.iloc[:, 1]).all()


def test_every_text_of_similar_occurs_with_the_same_labels():
    table = read_glue("pocket:similar", "dev").table()
    for text in ("sentence", "pair"):
        times = table.groupby(text).label.agg(lambda labels: sorted(labels)[:: max(1, len(labels) // 4)])
        assert all(labels == [0., 1.667, 1.667, 5.] for labels in times)


def test_options_of_pocket_questions_say_nothing(tmp_path):
    found = by_name(choose(), choose(part="dev"))
    assert found.score["options"] < .25 + .03 and found.n["options"] == 400
    parts = []
    for seed in (0, 1):
        file = tmp_path / f"{seed}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in choices(500, seed)))
        parts.append(read_choices(file))
    assert by_name(*parts).score["options"] < .5 + .03
    statements = [{**row, "label": str(row["label"])} for row in plausible(600)]
    single = LabelTask("table", labels=("0", "1"))
    assert list(by_name(labelled(statements[:400], single), labelled(statements[400:], single)).index) == [
        "majority", WHOLE]


# ── what the function sees ───────────────────────────────────────────────────────────────────────────────────────────

def test_a_shortcut_is_found_where_it_is():
    found = by_name(labelled(give_away(200)), labelled(give_away(100, 1)))
    assert found.score["second text"] == 1 and found.score["first text"] < .7 and found.score["majority"] == .5
    assert (found.metric == "accuracy").all() and (found.n == 100).all()
    assert max(trivial_scores(found.reset_index()).values()) == 1
    again = by_name(labelled(give_away(200)), labelled(give_away(100, 1)))
    assert found.equals(again)


def test_numbers_are_predicted_and_scored_by_correlation():
    rng = np.random.default_rng(0)
    rows = [{"sentence": f"a {w}", "pair": "b", "label": float(len(w))} for w in rng.choice(["x", "xxxx", "xx"], 60)]
    found = by_name(labelled(rows, GLUE["STS-B"]), labelled(rows[:30], GLUE["STS-B"]))
    assert found.score["first text"] > .99 and math.isnan(found.score["second text"])
    assert found.note["majority"] == found.note["second text"] == "all predictions are equal"
    assert math.isnan(found.score["majority"]) and set(trivial_scores(found.reset_index())) == {"first text"}


def test_options_are_chosen_without_the_question():
    def ask(n, seed):
        rng = np.random.default_rng(seed)
        for _ in range(n):
            options = [f"never {rng.integers(9)}", f"often {rng.integers(9)}", f"often {rng.integers(9)}"]
            rng.shuffle(options)
            yield {"question": "when ?", "choices": options, "label": options.index(min(options)), "id": "x"}
    found = by_name(list(ask(90, 0)), list(ask(60, 1)))
    assert found.score["options"] == 1 and found.score["majority"] < .6
    with pytest.raises(SubnetError, match="two parts of one task"): baselines(list(ask(2, 0)), labelled(give_away(2)))


def test_training_rows_are_limited_and_said():
    found = by_name(labelled(give_away(200)), labelled(give_away(20, 1)), limit=50)
    assert found.note["second text"] == "learned from 50 of 200 rows" and found.score["second text"] == 1
    many = [{"question": "q", "choices": ["a", "b"], "label": i % 2} for i in range(30)]
    assert by_name(many, many, limit=10).note["options"] == "learned from 10 of 30 rows"


def test_what_cannot_be_asked_has_a_name():
    answers = read_squad("pocket", "dev").take(20)
    assert (by_name(answers, answers).note.drop("majority") == "not applicable: an answer is a piece of the text").all()
    one = labelled([*give_away(1)])
    found = by_name(one, one)
    assert found.score["majority"] == 1 and set(found.index) == {"majority", *PARTIAL[:2], WHOLE}
    assert found.note["first text"] == "not applicable: all 1 training rows have the label 'entailment'"
    number = labelled([{"sentence": "a", "pair": "b", "label": 2.}], GLUE["STS-B"])
    assert by_name(number, number).score.isna().all()
    silent = labelled([{**row, "pair": " "} for row in give_away(4)])
    assert by_name(silent, silent).note["second text"] == "not applicable: there is no word to learn from"
    with pytest.raises(SubnetError, match="0 rows to learn from and 1 to ask"): baselines(labelled([]), one)


def test_majority_is_that_of_training(tmp_path):
    data = task_data("pocket:entails", train=9, test=30)
    most = max(data.train.task.labels, key=data.train.gold.count)
    assert by_name(data.train, data.test).score["majority"] == np.mean([g == most for g in data.test.gold])
    other = replace(data.test, items=data.test.items[:3])
    assert (by_name(data.train, other).n == 3).all()
