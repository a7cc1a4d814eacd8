"Multiple-choice questions: read, learned by heads, low-rank updates and whole models, with and without a subnetwork."
import builtins
import gzip
import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from subnet_explorer import fit, load, preserved
from subnet_explorer.core.errors import SpaceMismatch, SubnetError, UnknownName
from subnet_explorer.core.layout import FAMILIES, layout_of
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.run import OtherRun
from subnet_explorer.core.space import Space
from subnet_explorer.data.choices import BadChoices, Choices, as_choices, choice_task, read_choices
from subnet_explorer.data.grammar import PARTS
from subnet_explorer.data.pocket import pocket_rows
from subnet_explorer.data.pocket_tasks import choose
from subnet_explorer.measure.baselines import baselines
from subnet_explorer.measure.metrics import accuracy, predict
from subnet_explorer.model.apply import masked, parameter
from subnet_explorer.model.load import tiny
from subnet_explorer.search.objectives import Context, Task
from subnet_explorer.search.score import importance
from subnet_explorer.tasks import relearn as tr
from subnet_explorer.tasks.fit import Lora, adapted
from subnet_explorer.tasks.heads import Chooser

QUESTIONS = choose(24, part="dev")
PAIRS = [dict(q, question=q["question"].replace("[MASK]", "what")) for q in QUESTIONS]
UNEVEN = [dict(q, choices=q["choices"][:2 + i % 3], label=i % 2) for i, q in enumerate(PAIRS)]


@pytest.fixture(scope="module", params=["pocket-bert", "pocket-gpt2"])
def any_model(request): return load(request.param)


@pytest.fixture(scope="module")
def bert(): return load("pocket-bert")


def state(model): return {k: v.clone() for k, v in model.state_dict().items()}
def same(model, before):
    return list(model.state_dict()) == list(before) and all(
        torch.equal(v, before[k]) for k, v in model.state_dict().items()
    )


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────

FLAT = dict(
    id="q1",
    question="What do birds do?",
    question_concept="birds",
    choices=dict(label=["A", "B", "C"], text=["swim", "fly", "bark"]),
    answerKey="B",
)
COPA = dict(premise="The sun rose.", choice1="It was dark.", choice2="It was light.", question="effect", label=1, idx=7)


def nested(d):
    return dict(
        id=d["id"],
        answerKey=d["answerKey"],
        question=dict(
            stem=d["question"],
            question_concept=d["question_concept"],
            choices=[dict(label=name, text=text) for name, text in zip(*d["choices"].values(), strict=True)],
        ),
    )


@given(
    st.integers(2, 7).flatmap(
        lambda k: st.tuples(
            st.lists(
                st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1), min_size=k, max_size=k
            ),
            st.integers(0, k - 1),
        )
    )
)
def test_both_layouts_say_the_same(tmp_path_factory, asked):
    texts, answer = asked
    d = dict(FLAT, choices=dict(label=[chr(65 + i) for i in range(len(texts))], text=texts), answerKey=chr(65 + answer))
    path = tmp_path_factory.mktemp("q") / "q.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as f: f.write(json.dumps(d) + "\n\n" + json.dumps(nested(d)))
    one, two = read_choices(path)
    assert one == two == dict(question="What do birds do?", choices=texts, label=answer, id="q1", concept="birds")


def test_copa(tmp_path):
    path = tmp_path / "copa.jsonl"
    path.write_text("\n".join(map(json.dumps, [COPA, dict(COPA, question="cause", label=0)])))
    same = dict(choices=["It was dark.", "It was light."], id="7", scored="The sun rose")
    assert list(read_choices(path)) == [
        dict(same, question="The sun rose so", label=1, kind="effect"),
        dict(same, question="The sun rose because", label=0, kind="cause"),
    ]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{oops", "no question as a JSON object"),
        ("[1]", "not a JSON object"),
        ("7", "not a JSON object"),
        *[
            (json.dumps({k: v for k, v in FLAT.items() if k != gone}), f"key '{gone}' is missing")
            for gone in ("question", "choices", "answerKey", "id")
        ],
        *[
            (json.dumps({k: v for k, v in COPA.items() if k != gone}), f"key '{gone}' is missing")
            for gone in ("question", "choice1", "label", "idx")
        ],
        (json.dumps(nested(FLAT) | {"question": {"stem": "What?"}}), "key 'choices' is missing"),
        (json.dumps(dict(FLAT, answerKey="E")), "the answer 'E' is none of the choices A, B, C"),
        (json.dumps(dict(FLAT, answerKey=1)), "the answer 1 is none"),
        (json.dumps(dict(FLAT, answerKey="A", choices=dict(label=["A"], text=["swim"]))), "nothing to choose from"),
        (json.dumps(dict(FLAT, choices=dict(label=["A", "B"], text=["swim"]))), "2 labels for 1 choices"),
        (json.dumps(dict(FLAT, choices=dict(label=["B", "B"], text=["swim", "fly"]))), "same label"),
        (json.dumps(dict(FLAT, choices=dict(label=["A", "B"], text=["swim", " "]))), "a choice is ' '"),
        (json.dumps(dict(FLAT, choices=dict(label=["A", "B"], text=["swim", 5]))), "a choice is 5"),
        (json.dumps(dict(FLAT, question="")), "a question is ''"),
        (json.dumps(dict(FLAT, question=None)), "a question is None"),
        (json.dumps(dict(FLAT, choices=7)), "no question of commonsenseqa"),
        (json.dumps(dict(COPA, label=2)), "the answer 2 is none"),
        (json.dumps(dict(COPA, label=True)), "the answer True is none"),
        (json.dumps(dict(COPA, question="why")), "cause or effect"),
        (json.dumps(dict(COPA, premise=" . ")), "a question is ''"),
        (json.dumps(dict(COPA, premise=3)), "no question of copa"),
    ],
)
def test_broken_lines_are_named(tmp_path, line, message):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(FLAT) + "\n" + line + "\n")
    with pytest.raises(BadChoices, match=f"q.jsonl, line 2: .*({message})"): read_choices(path)


def test_broken_files_are_named(tmp_path):
    with pytest.raises(BadChoices, match="there is no file"): read_choices(tmp_path / "none.jsonl")
    (tmp_path / "q.json").write_text("a,b")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "q.jsonl.gz").write_bytes(b"not compressed")
    with pytest.raises(BadChoices, match="cannot tell the format"): read_choices(tmp_path / "q.json")
    with pytest.raises(BadChoices, match="no question in"): read_choices(tmp_path / "empty.jsonl")
    with pytest.raises(BadChoices, match="gzip-compressed"): read_choices(tmp_path / "q.jsonl.gz")


@pytest.mark.real
def test_real_questions(real):
    train, dev = (
        read_choices(real / "datasets" / "commonsenseqa" / f) for f in ("train.jsonl.gz", "dev_rand_split.jsonl")
    )
    assert (len(train), len(dev)) == (9741, 1221) and {len(q["choices"]) for q in [*train, *dev]} == {5}
    assert all("concept" in q for q in dev)
    assert dev[0]["choices"][dev[0]["label"]] == "bank"
    assert dev[0]["concept"] == "revolving door"
    assert np.bincount([q["label"] for q in dev]).min() > 200
    copa = [read_choices(real / "datasets" / "copa" / f"{p}.jsonl") for p in ("train", "val")]
    assert [len(c) for c in copa] == [400, 100]
    assert copa[0][0]["question"] == "My body cast a shadow over the grass because"


@pytest.mark.real
@pytest.mark.slow
def test_real_questions_are_learned_by_a_real_encoder(real):
    model, tok = load(real / "models" / "minilm-l6-mlm")
    train = read_choices(real / "datasets" / "commonsenseqa" / "train.jsonl.gz")[:48]
    head, before = Chooser(model, train, length=40), state(model)
    with preserved(model):
        log = fit(model, tok, Task(train, head), train="lora", steps=30, lr=2e-3, batch=8, every=10, keep="last")
        assert log.loss.iloc[0] > 1 and accuracy(model, tok, train, head) > .5      # chance .2
    assert same(model, before)


SWAG = {"video-id": "v1", "sent1": "A man sits.", "sent2": "He", **{f"ending{i}": f"does {i}." for i in range(4)}}
COSMOS = {"id": "c1", "context": "It rained.", "question": "Why?", **{f"answer{i}": f"since {i}" for i in range(4)}}
WSC = dict(text="The cup fell since it was full.", pronoun="it", pronoun_loc=19, options=["The cup", "The rain"])


@pytest.mark.parametrize(
    "format, line, question, choices, label",
    [
        ("swag", dict(SWAG, label=2), "A man sits. He", [f"does {i}." for i in range(4)], 2),
        ("hellaswag", dict(ind=4, ctx="A man", endings=["runs", "sits"], label="1"), "A man", ["runs", "sits"], 1),
        (
            "anli",
            dict(story_id="s", obs1="It rained.", obs2="I was wet.", hyp1="I ran.", hyp2="I fell.", label="2"),
            "It rained. [MASK] I was wet.",
            ["I ran.", "I fell."],
            1,
        ),
        (
            "anli",
            dict(observation_1="It rained.", observation_2="Wet.", hypothesis_1="a", hypothesis_2="b", label=1),
            "It rained. [MASK] Wet.",
            ["a", "b"],
            0,
        ),
        ("cosmosqa", dict(COSMOS, label=3), "It rained. Why?", [f"since {i}" for i in range(4)], 3),
        (
            "winogrande",
            dict(qID="w", sentence="Ann likes Eve as _ is kind.", option1="Ann", option2="Eve", answer="2"),
            "Ann likes Eve as [MASK] is kind.",
            ["Ann", "Eve"],
            1,
        ),
        ("winograd", dict(WSC, label=0), "The cup fell since [MASK] was full.", WSC["options"], 0),
        ("comve", dict(id=1, sent0="a cat", sent1="a flat cat", label="1"), "[MASK]", ["a cat", "a flat cat"], 0),
        ("plain", dict(question="a [MASK] .", choices=["x", "y", "z"], label=2), "a [MASK] .", ["x", "y", "z"], 2),
    ],
)
def test_formats_are_told_from_each_other(tmp_path, format, line, question, choices, label):
    (path := tmp_path / "dev.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line))
    for found in (read_choices(path), read_choices(f"{format}:{tmp_path}", "dev")):
        assert found.format == format and len(found) == 2
        assert {k: found[0][k] for k in ("question", "choices", "label")} == dict(
            question=question, choices=choices, label=label
        )
    answer = next(k for k in ("label", "answer") if k in line)
    for wrong in (9, "x", True, None):
        path.write_text(json.dumps({**line, answer: wrong}))
        with pytest.raises(BadChoices, match=r"line 1: the answer .* is none of the choices"): read_choices(path)
    path.write_text(json.dumps({**line, answer: -1}))
    with pytest.raises(BadChoices, match="a test part without answers"): read_choices(path)


def wsc(i, text, candidate, label, at=5, pronoun="it", **more):
    spans = dict(span1_index=0, span1_text=candidate, span2_index=at, span2_text=pronoun)
    return dict(text=text, target=spans, idx=i, label=label, **more)


def test_candidates_of_one_pronoun_are_one_question(tmp_path):
    "SuperGLUE asks of one candidate at a time; nested as published, or flat as from `datasets`."
    trophy = "The trophy would not fit, (it) was big."
    lines = [
        wsc(0, trophy, "the trophy", True), wsc(1, trophy, "the bag", False), wsc(2, trophy, "the bag", False),
        wsc(3, "A cup fell upon it", "A cup", True, at=3),                                  # one word too early
        wsc(4, "Ann met Eve and she ran", "Ann", False, at=4, pronoun="she"),
        wsc(5, "Ann met Eve and she ran", "Eve", False, at=4, pronoun="she"),
        wsc(6, "Bo met Al as he ran", "Bo", 1, at=4, pronoun="he"), wsc(7, "Bo met Al as he ran", "Al", 0, 4, "he"),
    ]
    (path := tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read_choices(path)
    assert list(found) == [
        dict(question="The trophy would not fit, ([MASK]) was big.", choices=["the trophy", "the bag"], label=0,
             id="0+1+2"),
        dict(question="Bo met Al as [MASK] ran", choices=["Bo", "Al"], label=0, id="6+7"),
    ]
    assert found.format == "wsc" and found.skipped == {
        "with one candidate only": 1, "without exactly one right candidate": 1}
    flat = [{**line["target"], **{k: v for k, v in line.items() if k != "target"}} for line in lines]
    path.write_text("\n".join(map(json.dumps, flat)))
    assert list(read_choices(path)) == list(found) and list(as_choices(lines)) == list(found)
    for change, match in (
        (dict(label="maybe"), "the answer 'maybe' is none"), (dict(label=-1), "a test part without answers"),
        (dict(target={**lines[0]["target"], "span2_index": 1}), "the pronoun 'it' is not word 1, where the text reads"),
        (dict(target={**lines[0]["target"], "span2_index": 99}), "is not word 99"),
        (dict(target={**lines[0]["target"], "span1_text": ""}), "a choice is ''"),
        (dict(target={}), "key 'span2_index' is missing"), (dict(target=7), "no question of wsc"),
    ):
        path.write_text(json.dumps(lines[0]) + "\n" + json.dumps({**lines[1], **change}))
        with pytest.raises(BadChoices, match=f"val.jsonl, line 2: .*{match}"): read_choices(path)
    path.write_text(json.dumps(lines[0]))
    with pytest.raises(BadChoices, match=r"no question in .*: 1 with one candidate only"): read_choices(path)


def test_choices_among_sentences_can_be_parted(tmp_path):
    "Their question is alike for all; what must not stand in two parts is the sentences."
    lines = [f"{i % 2}\x01{i // 2} is.\x01{i // 2} is not." for i in range(40)]
    (path := tmp_path / "ca.txt").write_text("\n".join(lines))
    task = choice_task(path)
    asked = [{q["choices"][0] for q in part} for part in task.parts.values()]
    assert sum(map(len, task.parts.values())) == 40 and len(set.union(*asked)) == sum(map(len, asked)) == 20


def test_what_may_be_missing_may_be_empty():
    row = dict(question="What do birds do?", choices=["swim", "fly"], label=1)
    assert as_choices([{**row, "concept": None, "scored": None, "kind": None}])[0] == {**row, "id": "0"}
    for key, value in (("concept", 7), ("concept", ""), ("scored", " ")):
        with pytest.raises(BadChoices, match=f"row 0: a {key} is"): as_choices([{**row, key: value}])


def test_a_task_about_facts_says_whether_they_were_known():
    assert "nobody said which of them" in choice_task("pocket:IsA", "mine").notes[0]
    assert not choice_task("pocket:IsA", known=()).notes


def test_tables_with_commas_and_sentences_of_cats(tmp_path):
    (path := tmp_path / "train.csv").write_text('id,sent0,sent1,label\n7,"one, two","he said\n ""no""",1\n')
    assert list(read_choices(path)) == [
        dict(question="[MASK]", choices=["one, two", 'he said\n "no"'], label=0, id="7")
    ]
    path.write_text('id,sent0,sent1,label\n7,a,b,1\n8,a,1\n')
    with pytest.raises(BadChoices, match="line 3: 3 columns where 4 were expected"): read_choices(path)
    (path := tmp_path / "ca.txt").write_text("1\x01It is, and is.\x01It is.\n0\x01a\x01b\x01c\n")
    found = read_choices(path)
    assert found.format == "cats" and found.gold == [1, 0] and found[1]["choices"] == ["a", "b", "c"]
    assert found.chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    path.write_text("0\x01alone\n")
    with pytest.raises(BadChoices, match="line 1: there is nothing to choose from"): read_choices(path)
    path.write_text("2\x01a\x01b\n")
    with pytest.raises(BadChoices, match="the answer '2' is none of the choices 0, 1"): read_choices(path)


def test_labels_in_a_file_of_their_own(tmp_path):
    line = dict(obs1="It rained.", obs2="I was wet.", hyp1="I ran.", hyp2="I fell.")
    (tmp_path / "dev.jsonl").write_text("\n".join([json.dumps(line)] * 3))
    with pytest.raises(BadChoices, match=r"'label' is missing\. Is this a test part"): read_choices(tmp_path, "dev")
    (tmp_path / "dev-labels.lst").write_text("1\n2\n2\n")
    assert read_choices(tmp_path, "dev").gold == [0, 1, 1]
    (tmp_path / "dev-labels.lst").write_text("1\n2\n")
    with pytest.raises(BadChoices, match=r"3 questions, and dev-labels\.lst beside it 2 labels"):
        read_choices(tmp_path, "dev")


def test_files_of_parts(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(FLAT))
    (tmp_path / "train_full.jsonl").write_text("no")
    (tmp_path / "val.jsonl").write_text(json.dumps(COPA) + "\n" + json.dumps(FLAT))
    assert read_choices(tmp_path).format == "commonsenseqa"
    with pytest.raises(BadChoices, match="lines in several formats: commonsenseqa, copa"):
        read_choices(tmp_path, "dev")
    with pytest.raises(BadChoices, match="no file of the test part"): read_choices(tmp_path, "test")
    (tmp_path / "dev_more.jsonl").write_text("")
    (tmp_path / "dev_less.jsonl").write_text("")
    (tmp_path / "val.jsonl").unlink()
    with pytest.raises(BadChoices, match=r"2 files of the dev part: found dev_less\.jsonl, dev_more\.jsonl"):
        read_choices(tmp_path, "dev")
    with pytest.raises(UnknownName, match="did you mean copa"): read_choices(tmp_path, format="coppa")


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 70), st.integers(0, 5))
def test_fewer_questions_have_the_same_shares(labels, n, seed):
    rows = tuple(dict(question=f"{i}?", choices=list("abcd"), label=label) for i, label in enumerate(labels))
    whole = Choices(rows)
    taken = whole.take(n, seed)
    assert len(taken) == min(n, len(rows)) and taken == whole.take(n, seed)
    assert [r["question"] for r in taken] == [r["question"] for r in whole if r in taken.items]
    for label in set(labels): assert abs(taken.gold.count(label) - labels.count(label) * len(taken) / len(rows)) < 4


def test_parts_share_no_question(tmp_path):
    rows = [dict(question=f"{i // 2}?", choices=["a", "b"], label=i % 2) for i in range(80)]
    (path := tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = choice_task(path, search=.4, seed=3)
    asked = [{r["question"] for r in part} for part in task.parts.values()]
    assert not asked[0] & asked[1] and not (asked[0] | asked[1]) & asked[2]
    assert list(map(len, task.parts.values())) == [38, 26, 16]
    assert choice_task(path, search=.4, seed=3).identity() == task.identity() != choice_task(path).identity()
    path.write_text(json.dumps(rows[0]))
    with pytest.raises(BadChoices, match="1 questions, too few to set some aside"): choice_task(path)


def test_questions_of_the_pocket_world():
    task = choice_task("pocket:IsA+AtLocation+UsedFor")
    asked = [{q["uuid"] for q in part} for part in task.parts.values()]
    assert not asked[0] & asked[1] and not (asked[0] | asked[1]) & asked[2]
    assert all(len(part) == len(found) for part, found in zip(task.parts.values(), asked, strict=True))
    true = {(r["pred"], r["sub_label"], r["obj_label"]) for r in pocket_rows()}
    for q in task.test:
        assert [(q["relation"], q["sub"], c) in true for c in q["choices"]] == [i == q["label"] for i in range(4)]
    found = baselines([*task.train, *task.search], task.test).set_index("baseline").score
    assert found["options"] <= task.test.chance + .03 and found["majority"] <= task.test.chance + .03
    gone = sorted(asked[2])[:10]
    fewer = choice_task("pocket:IsA+AtLocation+UsedFor", known=gone)
    assert {q["uuid"] for q in fewer.test} == asked[2] - set(gone) and fewer.skipped == {"about a known fact": 10}


@pytest.mark.real
def test_the_published_sets(real):
    folder = real / "datasets"
    for name, n, k in (("copa", 100, 2), ("commonsenseqa", 1221, 5), ("arct", 316, 2)):
        task = choice_task(folder / name)
        assert len(task.test) == n and {len(q["choices"]) for q in task.test} == {k} and task.test.format == name


# ── pocket questions ─────────────────────────────────────────────────────────────────────────────────────────────────

@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(2, 6), st.lists(st.integers(0, 2000), max_size=12, unique=True))
def test_questions_share_no_facts(seed, k, gone):
    rows = pocket_rows()
    removed = [rows[i]["uuid"] for i in gone if i < len(rows)]
    asked = {p: choose(40, seed, p, removed, k=k) for p in PARTS}
    facts = {p: {q["uuid"] for q in qs} for p, qs in asked.items()}
    assert not facts["train"] & facts["dev"] and not facts["train"] & facts["test"] and not facts["dev"] & facts["test"]
    assert not (facts["train"] | facts["dev"]) & set(removed)
    assert set(removed) <= facts["test"]
    assert asked["test"] == choose(40, seed, "test", removed, k=k)
    true = {(r["pred"], r["sub_phrase"], r["obj_label"]) for r in rows}
    by = {r["uuid"]: r for r in rows}
    for q in (q for qs in asked.values() for q in qs):
        r = by[q["uuid"]]
        assert len(set(q["choices"])) == k
        assert q["choices"][q["label"]] == r["obj_label"] == q["obj"]
        assert q["question"] in r["masked_sentences"][1:]
        assert q["related"] == (q["uuid"] in removed)
        assert sum((r["pred"], r["sub_phrase"], c) in true for c in q["choices"]) == 1
    if removed:
        assert sum(q["related"] for q in asked["test"]) == 20
        assert all(a["relation"] == b["relation"] for a, b in zip(asked["test"][::2], asked["test"][1::2], strict=True))


def test_the_place_of_the_answer_and_its_frequency_say_little():
    asked = choose(2000)
    assert np.bincount([q["label"] for q in asked]).min() > 430
    often = pd.Series([(r["pred"], r["obj_label"]) for r in pocket_rows()]).value_counts()
    guess = np.mean([np.argmax([often[q["relation"], c] for c in q["choices"]]) == q["label"] for q in asked])
    assert guess < .4


def test_pocket_questions_refuse():
    for change, match in (
        (dict(removed=["nowhere"]), "e.g. 'nowhere'"),
        (dict(k=1), "choices 2 or more"),
        (dict(n=-1), "n must be a whole number of at least 0, got -1"),
        (dict(k=500), "too few for 500 choices"),
        (
            dict(removed=[next(r["uuid"] for r in pocket_rows() if r["pred"] == "IsA")], relations=["MadeOf"]),
            "not facts of MadeOf",
        ),
    ):
        with pytest.raises(SubnetError, match=match): choose(**change)
    with pytest.raises(UnknownName, match="did you mean IsA"): choose(relations=["Isa"])
    everything = [r["uuid"] for r in pocket_rows() if r["pred"] == "MadeOf"]
    with pytest.raises(SubnetError, match="all MadeOf facts of the test part are removed"):
        choose(4, part="test", removed=everything)


# ── a chooser is what transformers calls multiple choice ─────────────────────────────────────────────────────────────

def plainly(model, tok, head, q):      # (choice,)
    "Scores of a question's choices, one at a time, written out."
    out = []
    for c in q["choices"]:
        if "[MASK]" in q["question"]: coded = tok(q["question"].replace("[MASK]", c), return_tensors="pt")
        elif tok.mask_token: coded = tok(q["question"], c, return_tensors="pt")
        else:
            coded = {"input_ids": torch.tensor([[*tok(q["question"]).input_ids, tok.eos_token_id, *tok(c).input_ids]])}
        if not tok.mask_token: coded = {"input_ids": coded["input_ids"]}
        h = model.base_model(**coded).last_hidden_state[0]
        out.append((head.out.weight @ h[0 if tok.mask_token else -1] + head.out.bias)[0])
    return torch.stack(out)


@pytest.mark.parametrize(
    "asked", [QUESTIONS, PAIRS, UNEVEN, [*QUESTIONS[:5], *UNEVEN[:6]]], ids=["blanks", "pairs", "uneven", "mixed"]
)
@pytest.mark.parametrize("path", ["auto", "plain"])
def test_loss_and_gradient_written_out(any_model, asked, path):
    model, tok = any_model
    head = Chooser(model, asked, seed=3)
    with torch.no_grad(): head.out.weight.mul_(20)
    wanted = torch.stack(
        [F.cross_entropy(plainly(model, tok, head, q)[None], torch.tensor([q["label"]])) for q in asked]
    ).mean()
    loss = Task(asked, head).prepare(Context(model, tok, 1, len(asked), 0, path=path))(0)
    body = parameter(model, Space.of(model, "weight").groups[3])
    for value in (wanted, loss): assert value.isfinite()
    assert torch.allclose(loss, wanted, rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad(value, [head.out.weight, body]) for value in (loss, wanted))
    for one, two in zip(ours, theirs, strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-5) and one.any()
    with torch.no_grad():
        scores = predict(model, head, [head.encode(tok, q) for q in asked], path, batch=5)
        for q, row in zip(asked, scores, strict=True):
            k = len(q["choices"])
            assert np.allclose(row[:k], plainly(model, tok, head, q), rtol=1e-4, atol=1e-4) and (row[k:] < -1e30).all()
    right = [head.read(s[None])[0] == q["label"] for q, s in zip(asked, scores, strict=True)]
    assert accuracy(model, tok, asked, head) == np.mean(right)


def test_as_bert_for_multiple_choice(bert):
    from transformers import BertForMultipleChoice
    model, tok = bert
    theirs, head = BertForMultipleChoice(model.config).eval(), Chooser(model, PAIRS, seed=1)
    theirs.bert.load_state_dict(model.bert.state_dict(), strict=False)
    theirs.classifier.load_state_dict(head.out.state_dict())
    class First(torch.nn.Module):
        def forward(self, h): return h[:, 0]
    # their pooler is not of the language model: it would be random
    theirs.bert.pooler = First()
    coded = tok(
        [q["question"] for q in PAIRS for _ in range(4)],
        [c for q in PAIRS for c in q["choices"]],
        padding=True,
        return_tensors="pt",
    )
    labels = torch.tensor([q["label"] for q in PAIRS])
    with torch.no_grad(): out = theirs(**{k: v.view(len(PAIRS), 4, -1) for k, v in coded.items()}, labels=labels)
    loss = Task(PAIRS, head).prepare(Context(model, tok, 1, len(PAIRS), 0))(0)
    assert torch.allclose(loss, out.loss, rtol=1e-5)
    assert np.allclose(predict(model, head, [head.encode(tok, q) for q in PAIRS]), out.logits, atol=1e-5)


def test_as_gpt2_double_heads():
    from transformers import GPT2DoubleHeadsModel
    model, tok = load("pocket-gpt2")
    theirs, head = GPT2DoubleHeadsModel(model.config).eval(), Chooser(model, PAIRS, seed=1)
    theirs.transformer.load_state_dict(model.transformer.state_dict())
    theirs.multiple_choice_head.summary.load_state_dict(head.out.state_dict())
    rows = [head.encode(tok, q)[0] for q in PAIRS]
    width = max(len(i) for r in rows for i in r)
    ids = torch.tensor([[i + [0] * (width - len(i)) for i in r] for r in rows])
    last = torch.tensor([[len(i) - 1 for i in r] for r in rows])
    with torch.no_grad():
        out = theirs(input_ids=ids, mc_token_ids=last, mc_labels=torch.tensor([q["label"] for q in PAIRS]))
    assert torch.allclose(Task(PAIRS, head).prepare(Context(model, tok, 1, len(PAIRS), 0))(0), out.mc_loss, rtol=1e-4)


def test_what_is_too_long_is_cut_and_counted(any_model):
    model, tok = any_model
    long = [dict(q, question=" ".join([q["question"].replace(" .", "")] * 12)) for q in PAIRS[:3]] + PAIRS[3:6]
    head = Chooser(model, long)
    assert head.cut(tok, long) == 3 and all(len(i) <= 64 for q in long for i in head.encode(tok, q)[0])
    # the longer text is cut, the choice stays
    for q in long:
        assert [tok.decode(i).split()[-2 if tok.mask_token else -1] for i in head.encode(tok, q)[0]] == [
            c.split()[-1] for c in q["choices"]
        ]
    assert Chooser(model, long, length=8).cut(tok, PAIRS[:4]) == 4


def test_choosers_refuse(bert):
    model, tok = bert
    head, q = Chooser(model, []), QUESTIONS[0]
    for change, match in (
        (dict(label=4), "0 … 3, got 4"),
        (dict(label=-1), "got -1"),
        (dict(label="bird"), "got 'bird'"),
        (dict(label=True), "got True"),
        (dict(choices=["a"], label=0), "has 1 choice, at least two"),
        (dict(choices=[], label=0), "has 0 choices"),
        (dict(question="[MASK] is [MASK] ."), "found 2 .MASK."),
    ):
        with pytest.raises(SubnetError, match=match): head.encode(tok, {**q, **change})
    with pytest.raises(SubnetError, match="several sequences"):
        importance(model, tok, Task(QUESTIONS, head), Space.of(model, "head"), 1)


# ── ways to train ────────────────────────────────────────────────────────────────────────────────────────────────────

def test_head_only_leaves_the_body(any_model):
    model, tok = any_model
    before, head = state(model), Chooser(model, QUESTIONS)
    start = head.out.weight.clone()
    log = fit(model, tok, Task(QUESTIONS, head), train="head", steps=8, head_lr=.01, every=1, dropout=True)
    assert same(model, before)
    assert not torch.equal(head.out.weight, start)
    assert len(log) == 8
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_updates_are_added_to_every_family(family):
    "At the start nothing changes; at the end a plain model computes what the one with updates did."
    model = tiny(family)
    before, modules, ids = state(model), dict(model.named_modules()), torch.arange(1, 9)[None]
    model.train()
    with torch.no_grad():
        full = model.eval()(input_ids=ids).logits
        with adapted(model, Lora(rank=3, alpha=6), seed=4) as updates:
            assert torch.equal(model(input_ids=ids).logits, full) and layout_of(model).transposed == (family == "gpt2")
            assert (
                sum(p.requires_grad for p in model.parameters()) == len(updates) == 2 * 2 * len(layout_of(model).roles)
            )
            for i, p in enumerate(updates):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
            changed = model(input_ids=ids).logits
        assert torch.allclose(model(input_ids=ids).logits, changed, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(changed, full, atol=1e-2)
    assert list(dict(model.named_modules()).values()) == list(modules.values()) and not hasattr(model, "peft_config")
    touched = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    layout, prefix = layout_of(model), next(n for n, m in model.named_modules() if m is model.base_model)
    assert touched == {f"{prefix}.{layout.module(i, r)}.weight" for i in range(2) for r in layout.roles}
    a, b = updates[0].double(), updates[1].double()                        # equation 3 of the paper
    name = next(f"{prefix}.{layout.module(0, r)}.weight" for r in layout.roles[:1])
    delta = (model.state_dict()[name] - before[name]).double()
    assert torch.allclose(delta.T if layout.transposed else delta, 6 / 3 * b @ a, atol=1e-5)


def test_updates_are_gone_after_an_exception(bert):
    model, _ = bert
    before, modules = state(model), dict(model.named_modules())
    with pytest.raises(KeyboardInterrupt), adapted(model, Lora()) as updates:
        for p in updates: p.data.fill_(1.)
        raise KeyboardInterrupt
    assert same(model, before)
    assert dict(model.named_modules()) == modules
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training


def test_updates_learn_and_the_model_comes_back(any_model):
    model, tok = any_model
    asked = choose(48, part="train", relations=["MadeOf", "IsA"])
    before, head = state(model), Chooser(model, asked)
    with preserved(model):
        log = fit(
            model,
            tok,
            Task(asked, head),
            train=Lora(rank=4),
            lr=5e-3,
            head_lr=5e-3,
            steps=60,
            batch=16,
            every=20,
            keep="last",
            seed=2,
        )
        assert log.loss.iloc[-1] < .7 * np.log(4) and accuracy(model, tok, asked, head) > .6
    assert same(model, before)


def test_updates_follow_from_the_seed_only(bert):
    model, tok = bert
    def run(seed):
        head = Chooser(model, QUESTIONS)
        with preserved(model):
            torch.manual_seed(9)
            fit(model, tok, Task(QUESTIONS, head), train=Lora(dropout=.3), steps=3, dropout=True, seed=seed)
            assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(9)))
            return parameter(model, Space.of(model, "weight").groups[0]).clone()
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


def test_interrupted_updates_continue_to_the_bit(bert, tmp_path):
    model, tok = bert
    class Stop(Exception): pass
    class Looking:
        def __init__(self, stop): self.stop = stop
        def identity(self): return {}
        def prepare(self, context):
            looks = []
            def score():
                looks.append(0)
                if len(looks) == self.stop: raise Stop
                return accuracy(context.model, context.tok, QUESTIONS, head)
            return score
    def run(folder, stop=None):
        nonlocal head
        head = Chooser(model, QUESTIONS, seed=1)
        with preserved(model):
            fit(
                model,
                tok,
                Task(QUESTIONS, head),
                train="lora",
                steps=8,
                batch=8,
                every=2,
                lr=1e-3,
                monitor=Looking(stop),
                keep="last",
                to=folder,
                checkpoint=0,
                seed=1,
            )
            return torch.cat([p.detach().flatten() for p in [*model.parameters(), *head.parameters()]])
    head, before = None, state(model)
    whole = run(tmp_path / "whole")
    with pytest.raises(Stop): run(tmp_path / "parts", stop=3)
    assert same(model, before)
    for _ in range(2): assert torch.equal(run(tmp_path / "parts"), whole)
    goal = Task(QUESTIONS, Chooser(model, QUESTIONS, seed=1))
    same_run = dict(steps=8, batch=8, every=2, lr=1e-3, keep="last", to=tmp_path / "parts", seed=1)
    with pytest.raises(OtherRun, match="train"), preserved(model):
        fit(model, tok, goal, train=Lora(rank=2), monitor=Looking(None), **same_run)


@pytest.mark.parametrize("kind", ["weight", "head"])
def test_masks_hold_but_not_under_updates(bert, kind):
    model, tok = bert
    mask = Mask.random(Space.of(model, kind), .5, 0)
    before = state(model)
    def gone(): return [parameter(model, g)[torch.as_tensor(~b)] for g, b in mask.to("weight").items() if not b.all()]
    for way in ("all", "head", "lora"):
        with preserved(model), masked(model, mask, train=True):
            held, head = state(model), Chooser(model, QUESTIONS)
            fit(model, tok, Task(QUESTIONS, head), train=way, steps=4, lr=1e-3, weight_decay=.1)
            assert all((w == 0).all() for w in gone()) == (way != "lora")
            assert same(model, held) == (way == "head")
            # equation of the docstring: masked weight plus an update of low rank
            if way == "lora":
                g = next(g for g, _ in mask.to("weight").items() if g.name.endswith("weight"))
                name = next(n for n in held if n.endswith(g.name))
                assert torch.linalg.matrix_rank(parameter(model, g).detach() - held[name], atol=1e-5) <= 8
        assert same(model, before)


def test_without_peft_the_command_is_named(bert, monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *a, **k: (
            (_ for _ in ()).throw(ImportError(name)) if name.split(".")[0] == "peft" else real(name, *a, **k)
        ),
    )
    with pytest.raises(SubnetError, match=r"pip install 'subnet_explorer\[lora\]'"):
        fit(*bert, Task(QUESTIONS, Chooser(bert[0], QUESTIONS)), train="lora", steps=1)


def test_ways_to_train_are_checked(bert):
    model, tok = bert
    goal = Task(QUESTIONS, Chooser(model, QUESTIONS))
    with pytest.raises(UnknownName, match="did you mean lora"): fit(model, tok, goal, train="lore")
    with pytest.raises(UnknownName, match="role of a matrix"): fit(model, tok, goal, train=Lora(roles=("qkv",)))
    with pytest.raises(SubnetError, match="rank must be a whole number"): fit(model, tok, goal, train=Lora(rank=0))


# ── transfer ─────────────────────────────────────────────────────────────────────────────────────────────────────────

GONE = [r["uuid"] for r in pocket_rows() if r["pred"] == "IsA"][:6]
TRAIN, TEST = choose(40, removed=GONE), choose(24, part="test", removed=GONE)
QUICK = dict(
    tuning=("head", "lora", "all"), seeds=(0, 1), epochs=1, lr=dict(head=1e-2, lora=3e-3, all=1e-3), progress=False
)


@pytest.fixture(scope="module")
def study(bert, tmp_path_factory):
    space, folder = Space.of(bert[0], "head"), tmp_path_factory.mktemp("t") / "study"
    under = {"full": None, "without": Mask.random(space, .7, 0), "random": [Mask.random(space, .7, s) for s in (1, 2)]}
    before = state(bert[0])
    items = tr.answers(*bert, under, TRAIN, TEST, **QUICK, to=folder)
    assert same(bert[0], before)
    return under, items, folder


def test_every_question_is_asked_once_in_every_cell(study):
    _, items, folder = study
    assert len(items) == 4 * 3 * 2 * 24 and not items.duplicated(["under", "draw", "tuning", "seed", "id"]).any()
    assert not [p for p in (folder / "cells").iterdir() if p.is_dir()]
    assert len(list((folder / "cells").glob("*.json"))) == 24
    table = tr.accuracies(items)
    assert list(table) == ["under", "draw", "tuning", "seed", "related", "n", "accuracy", "chance"]
    assert set(table.n) == {12}
    assert set(table.chance) == {0.25}
    row = table.query("under == 'random' and draw == 1 and tuning == 'all' and seed == 1 and related").accuracy.item()
    part = items.query("under == 'random' and draw == 1 and tuning == 'all' and seed == 1").set_index("id")
    assert row == np.mean([part.choice[q["id"]] == q["label"] for q in TEST if q["related"]])


@pytest.mark.parametrize("way", ["head", "lora", "all"])
def test_a_cell_is_a_fine_tuning_from_the_pretrained_weights(bert, study, way):
    model, tok = bert
    under, items, _ = study
    head = Chooser(model, TRAIN, 1)
    with preserved(model), masked(model, under["without"], train=True):
        fit(
            model,
            tok,
            Task(TRAIN, head),
            train=way,
            steps=3,
            lr=QUICK["lr"][way],
            head_lr=QUICK["lr"][way],
            batch=16,
            clip=1.0,
            keep="last",
            seed=1,
        )
        with torch.no_grad(): said = [int(plainly(model, tok, head, q).argmax()) for q in TEST]
    assert said == items.query("under == 'without' and tuning == @way and seed == 1").choice.tolist()


def test_cells_are_read_and_the_study_grows(bert, study, monkeypatch):
    under, items, folder = study
    real, trained = tr.fit, []
    monkeypatch.setattr(tr, "fit", lambda *a, **k: (trained.append(k["seed"]), real(*a, **k))[1])
    assert tr.answers(*bert, under, TRAIN, TEST, **QUICK, to=folder).equals(items) and not trained
    more = tr.answers(
        *bert,
        {"full": None, "same": under["without"]},
        TRAIN,
        TEST,
        "related",
        **{**QUICK, "seeds": (0, 1, 2), "tuning": ("head",)},
        to=folder,
    )
    assert trained == [2, 2]
    assert (
        more.query("seed < 2 and under == 'same'").choice.tolist()
        == items.query("tuning == 'head' and under == 'without'").choice.tolist()
    )
    with pytest.raises(OtherRun, match="differs in steps"):
        tr.answers(*bert, under, TRAIN, TEST, **{**QUICK, "epochs": 2}, to=folder)


def test_an_interrupted_study_goes_on(bert, study, tmp_path, monkeypatch):
    under, items, _ = study
    before, real, calls = state(bert[0]), tr.predict, []
    def stopping(*a):
        calls.append(0)
        if len(calls) == 3: raise KeyboardInterrupt
        return real(*a)
    monkeypatch.setattr(tr, "predict", stopping)
    with pytest.raises(KeyboardInterrupt):
        tr.answers(*bert, {"full": None, "without": under["without"]}, TRAIN, TEST, **QUICK, to=tmp_path / "s")
    assert same(bert[0], before)
    again = tr.answers(*bert, {"full": None, "without": under["without"]}, TRAIN, TEST, **QUICK, to=tmp_path / "s")
    assert len(calls) == 3 + 12 - 2
    key = ["under", "tuning", "seed", "id"]
    assert (
        again.set_index(key)
        .choice.sort_index()
        .equals(items[items.under != "random"].set_index(key).choice.sort_index())
    )


def test_gaps_written_out(study):
    _, items, _ = study
    table = tr.gaps(items).set_index(["tuning", "under", "against"])
    share = items.groupby(["tuning", "under", "related", "draw", "seed", "item"]).right.mean()
    for (tuning, name, other), row in table.iterrows():
        def gap(n, tuning=tuning):
            related, others = (share[tuning, n, r].groupby("item").mean().mean() for r in (True, False))
            return related - others
        assert row.gap == pytest.approx(gap(name) - (gap(other) if other else 0), abs=1e-9)
        assert row.low <= row.gap <= row.high
        assert row.gap == pytest.approx(row.related - row.others)
        assert row["items"] == 6
        assert row.other_items == len({q["uuid"] for q in TEST if not q["related"]})
        assert row.repetitions == (4 if name == "random" else 2)
    assert len(table) == 3 * 3 * 3
    assert table.loc["head", "full", "random"].gap == pytest.approx(-table.loc["head", "random", "full"].gap)


def planted(effect, rng, seeds=3, n=80):
    rows = [
        dict(
            under=u,
            draw=0,
            tuning="all",
            seed=s,
            id=f"{r}{i}",
            item=f"{r}{i}",
            related=r,
            choices=4,
            right=bool(rng.random() < 0.7 - effect * (r and u == "without")),
        )
        for u in ("full", "without")
        for s in range(seeds)
        for r in (True, False)
        for i in range(n)
    ]
    return pd.DataFrame(rows)


def test_intervals_cover_what_was_planted():
    "In nine of ten tables at least (95 % intervals), and an effect is told from none."
    for effect in (0., .3):
        found = [
            tr.gaps(planted(effect, np.random.default_rng(s), seeds=5), ["full"])
            .query("under == 'without' and against == 'full'")
            .iloc[0]
            for s in range(20)
        ]
        assert sum(f.low <= -effect <= f.high for f in found) >= 18
        if effect: assert sum(f.high < 0 for f in found) >= 18


def test_transfer_refuses(bert, tmp_path):
    model, tok = bert
    none = {"full": None}
    for change, match in (
        (dict(under={}), "nothing to learn: 0 conditions"),
        (dict(under={"soft": 0.5}), "as under, and this is .'soft': 0.5"),
        (dict(under={"x": []}), "'x' has no mask"),
        (dict(train=[]), "0 questions"),
        (dict(related=lambda q: True), "all of the 24 test questions"),
        (dict(related=lambda q: False), "none of the 24"),
        (dict(related="relate"), "did you mean related"),
        (dict(seeds=(1, 1)), "seeds must be different numbers"),
        (dict(tuning=("body",)), "unknown tuning|unknown way"),
        (dict(epochs=0), "epochs must be"),
        (dict(lr=-1), "lr must be"),
        (dict(batch=0), "batch must be"),
        (dict(lr=dict(head=1.0)), "tuning with a learning rate"),
        (dict(test=[dict(q, label=9) for q in TEST]), "got 9"),
    ):
        o = dict(under=none, train=TRAIN, test=TEST, related="related", **QUICK) | change
        with pytest.raises(SubnetError, match=match): tr.answers(model, tok, **o, to=tmp_path / "never")
    with pytest.raises(SpaceMismatch):
        tr.answers(
            model,
            tok,
            {"other": Mask.full(Space.of(tiny("bert"), "head"))},
            TRAIN,
            TEST,
            **QUICK,
            to=tmp_path / "never",
        )
    assert not (tmp_path / "never").exists()
