"Questions about texts: files, official scores, windows, spans, fine-tuning under a mask."
from __future__ import annotations

import gzip
import json
import re
import string
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from transformers import RobertaConfig, RobertaForMaskedLM

from subnet_explorer.core.errors import SubnetError
from subnet_explorer.core.space import Space
from subnet_explorer.data.grammar import vocabulary
from subnet_explorer.data.parts import alone, read_task, task_data
from subnet_explorer.data.questions import (
    SQUAD,
    BadQuestions,
    MisplacedAnswers,
    Questions,
    answer_scores,
    is_squad,
    normalised_answer,
    read_squad,
    squad_files,
)
from subnet_explorer.measure.baselines import majority_label
from subnet_explorer.measure.metrics import task_metrics, task_scores
from subnet_explorer.model.apply import masked, parameter
from subnet_explorer.model.load import load
from subnet_explorer.search.objectives import Context, Task
from subnet_explorer.search.score import importance, magnitude
from subnet_explorer.tasks.fit import fit, head_for, preserved
from subnet_explorer.tasks.spans import SpanFinder, best_span


def nested(*rows: tuple, version: str = "1.1") -> dict:
    "A file of (context, question, answer, start) rows."
    return dict(
        version=version,
        data=[
            dict(
                title="t",
                paragraphs=[
                    dict(context=c, qas=[dict(id=f"q{i}", question=q, answers=[dict(text=a, answer_start=s)])])
                ],
            )
            for i, (c, q, a, s) in enumerate(rows)
        ],
    )


def asked(context: str, start: int, end: int, question: str = "what is it ?", name: str = "0") -> dict:
    return dict(id=name, question=question, context=context, answers=[dict(text=context[start:end], start=start)])


@pytest.fixture(scope="module")
def gpt2(): return load("pocket-gpt2")


@pytest.fixture(scope="module")
def roberta_tok():
    "A byte-level tokenizer with two separators in a pair, in which every byte is a token."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    t = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=False, add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=t,
        bos_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        cls_token="<s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=120,
    )


BYTES = RobertaForMaskedLM(RobertaConfig(
    vocab_size=260, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8,
    max_position_embeddings=122, type_vocab_size=1,
))


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("packed", [False, True])
def test_a_file_says_what_it_says(packed, tmp_path):
    text = json.dumps(
        nested(("Zürich is big", "Where ?", "Zürich", 0), ("a 💧 of rain", "What ?", "rain", 7)), ensure_ascii=False
    )
    file = tmp_path / ("dev-v1.1.json.gz" if packed else "dev-v1.1.json")
    file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    data = read_squad(file)
    assert list(data) == [
        asked("Zürich is big", 0, 6, "Where ?", "q0"),
        asked("a 💧 of rain", 7, 11, "What ?", "q1"),
    ]
    assert data.gold == [("Zürich",), ("rain",)]
    assert read_squad(file, "dev") == data == read_squad(f"squad:{file}")
    assert data.task is SQUAD
    assert not data.skipped
    assert not data.real
    with pytest.raises(BadQuestions, match="has no train part"): read_squad(tmp_path)


@pytest.mark.parametrize(
    "content, error",
    [
        ("question\tanswer", "is no JSON file"),
        ("[1, 2, 3]", "should be an object with a list 'data', as in SQuAD v1.1; found a list of 3"),
        ('{"version": "1.1", "rows": []}', "found an object with 'version', 'rows'"),
        ('{"data": [{"title": "t"}]}', "article 0 should be an object with a list 'paragraphs'"),
        (
            '{"data": [{"paragraphs": [{"context": "c"}]}]}',
            "article 0, paragraph 0 should be an object with a list 'qas'",
        ),
        (
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1", "question": "q"}]}]}]}',
            "a question of article 0, paragraph 0 should be an object with a list 'answers'",
        ),
        ('{"data": [{"paragraphs": [{"context": "c", "qas": ["q"]}]}]}', "should be an object with a list 'answers'"),
        (
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1", "question": "q", "answers": [], '
            '"is_impossible": true}]}]}]}',
            "as SQuAD v2.0 has; only v1.1",
        ),
        (
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1", "question": "q", "answers": []}]}]}]}',
            "no question with an answer .*question without answer",
        ),
        (json.dumps(nested(("c", " ", "c", 0))), "the question is ' ' where some text was expected"),
        (json.dumps(nested((None, "q", "c", 0))), "the context is None"),
        (json.dumps(nested(("c", "q", "", 0))), "a text and a whole number, answer_start, were expected"),
        (json.dumps(nested(("c", "q", "c", "0"))), "a text and a whole number"),
        ('{"data": []}', "no question with an answer"),
    ],
)
def test_broken_files_say_what_was_found(content, error, tmp_path):
    (file := tmp_path / "train.json").write_text(content)
    with pytest.raises(BadQuestions, match=error): read_squad(file)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a.json.gz").write_bytes(b"not compressed")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    for name, says in (("a.json.gz", "cannot read"), ("b.json", "save it as UTF-8")):
        with pytest.raises(BadQuestions, match=says): read_squad(tmp_path / name)
    with pytest.raises(BadQuestions, match="there is no file of questions"): read_squad("squad:nowhere.json")
    two = nested(("c", "q", "c", 0), ("c", "q", "c", 0))
    for p in two["data"]: p["paragraphs"][0]["qas"][0]["id"] = "same"
    (tmp_path / "c.json").write_text(json.dumps(two))
    with pytest.raises(BadQuestions, match=r"1 ids stand before several questions, e\.g\. 'same'"):
        read_squad(tmp_path / "c.json")


def test_misplaced_answers_are_named_moved_or_dropped(tmp_path):
    rows = (
        ("rain and rain and rain", "q", "rain", 10),
        ("no such thing", "q", "rain", 3),
        ("rain", "q", "rain", 0),
        ("rain", "q", "rain", -4),
    )
    (file := tmp_path / "train.json").write_text(json.dumps(nested(*rows)))
    first = "the first: question 'q0' has 'rain' at 10, where its context reads 'ain '"
    with pytest.raises(MisplacedAnswers, match=rf"3 answers in train\.json .* {first}.*in a shell: --lenient"):
        read_squad(file)
    moved, dropped = read_squad(file, misplaced="move"), read_squad(file, misplaced="drop")
    assert [(r["id"], r["answers"][0]["start"]) for r in moved] == [
        ("q0", 9),
        ("q2", 0),
        ("q3", 0),
    ]
    assert moved.skipped == {"answer moved": 2, "answer dropped": 1, "question without answer": 1}
    assert [r["id"] for r in dropped] == ["q2"]
    assert dropped.skipped == {
        "answer dropped": 3,
        "question without answer": 3,
    }
    assert read_task(f"squad:{file}", strict=False).items == moved.items
    with pytest.raises(SubnetError, match="rule for misplaced answers"): read_squad(file, misplaced="guess")


def test_where_the_parts_are(tmp_path):
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        (tmp_path / name).write_text(json.dumps(nested((f"the {name}", "q", name, 4))))
    folder, train, dev = tmp_path, tmp_path / "train-v1.1.json", tmp_path / "dev-v1.1.json"
    for source in (folder, train, f"squad:{train}", f"squad:{folder}", f"squad:{train},{dev}"):
        assert is_squad(source) and not alone(source) and squad_files(source) == {"train": train, "dev": dev}
        assert [read_squad(source, p).gold[0][0] for p in ("train", "dev")] == ["train-v1.1.json", "dev-v1.1.json"]
    assert alone(dev) and alone(f"squad:{dev}") and not is_squad("pocket:entails") and not is_squad(tmp_path / "RTE")
    (tmp_path / "dev-v1.1-more.json").write_text("{}")
    assert alone(train)  # which of two is not guessed
    with pytest.raises(BadQuestions, match=re.escape("2 files of the dev part: dev-v1.1-more.json, dev-v1.1.json")):
        squad_files(folder)


def test_the_layout_of_datasets(tmp_path, monkeypatch):
    import datasets

    rows = [
        dict(
            id="1",
            title="t",
            context="the Seine",
            question="What ?",
            answers=dict(text=["Seine", "the Seine"], answer_start=[4, 0]),
        )
    ]
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *args: {"train": rows, "validation": rows} if args == ("squad",) else {"train": [dict(text="x")]},
    )
    data = read_squad("datasets:squad", "dev")
    assert data.gold == [("Seine", "the Seine")]
    assert data[0]["answers"][1] == dict(text="the Seine", start=0)
    assert not alone("datasets:squad")
    with pytest.raises(BadQuestions, match="no column 'id'"): read_squad("datasets:other")
    with pytest.raises(BadQuestions, match="no part 'validation'"): read_squad("datasets:other", "dev")


def test_pocket_questions_do_not_leak():
    parts = {p: read_squad("pocket", p) for p in ("train", "dev", "test")}
    known = {p: {r["question"] for r in d} for p, d in parts.items()}
    assert {p: len(d) for p, d in parts.items()} == dict(train=1500, dev=400, test=400)
    assert not known["train"] & known["dev"] and not known["train"] & known["test"] and not known["dev"] & known["test"]
    said = {p: {s for r in d for s in re.split(r"(?<=[.!]) ", r["context"])} for p, d in parts.items()}
    assert not said["train"] & said["dev"] and not said["train"] & said["test"]
    words = set(vocabulary())
    assert all(set(f"{r['context']} {r['question']}".split()) <= words for d in parts.values() for r in d)


# ── official scores ──────────────────────────────────────────────────────────────────────────────────────────────────

def official(prediction: str, ground_truths: list[str]) -> tuple[float, float]:
    "Exact match and F1 as in the evaluation script of SQuAD v1.1 (Rajpurkar et al. 2016)."
    def normalize_answer(s):
        def remove_articles(text): return re.sub(r'\b(a|an|the)\b', ' ', text)
        def white_space_fix(text): return ' '.join(text.split())
        def remove_punc(text):
            exclude = set(string.punctuation)
            return ''.join(ch for ch in text if ch not in exclude)
        def lower(text): return text.lower()
        return white_space_fix(remove_articles(remove_punc(lower(s))))
    def f1_score(prediction, ground_truth):
        prediction_tokens = normalize_answer(prediction).split()
        ground_truth_tokens = normalize_answer(ground_truth).split()
        common = Counter(prediction_tokens) & Counter(ground_truth_tokens)
        num_same = sum(common.values())
        if num_same == 0: return 0
        precision = 1.0 * num_same / len(prediction_tokens)
        recall = 1.0 * num_same / len(ground_truth_tokens)
        return (2 * precision * recall) / (precision + recall)

    return max(float(normalize_answer(prediction) == normalize_answer(g)) for g in ground_truths), max(
        f1_score(prediction, g) for g in ground_truths
    )


answers = st.lists(
    st.sampled_from(
        [
            "the", "a", "An", "Théâtre", "U.S.", "rain", "rain", "1,000", "–", "-", " ", "\u00a0", "İstanbul", "ß",
            "東京", "a-b", "the'rain",
        ]
    ),
    max_size=6,
).map(" ".join)


@given(answers, st.lists(answers, min_size=1, max_size=3))
def test_scores_are_those_of_the_official_script(said, right):
    ours, (exact, f1) = answer_scores([right], [said]), official(said, right)
    assert ours["exact"][0] == exact and ours["f1"][0] == pytest.approx(f1)


def test_scores_by_hand():
    assert normalised_answer("The\u00a0Café, an  'A'!") == "café"
    got = answer_scores([("in the year 1900",), ("a",), ("a",), ("x", "red rose")], ["1900", "the", "b", "Red, rose."])
    # what is all articles has no word to share
    assert got["exact"].tolist() == [0, 1, 0, 1] and got["f1"] == pytest.approx([.5, 0, 0, 1])
    assert task_metrics(SQUAD, [("a b",), ("c",)], ["b", "c"]) == {"score": 1.0, "f1": 1.0, "exact": 1.0, "note": ""}
    for gold, said, why in (
        ([], [], "at least one"),
        ([("a",)], [], "0 predictions|0 answers"),
        (["a"], ["a"], "list of right answers"),
        ([()], ["a"], "list of right answers"),
    ):
        with pytest.raises(SubnetError, match=why): answer_scores(gold, said)


# ── windows ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def perfect(windows, width: int) -> np.ndarray:
    "Logits that point at the targets, surer where there is an answer."
    out = np.full((2 * len(windows), width), -50.0, np.float32)
    for w, (_ids, _, targets, *_) in enumerate(windows):
        found = windows.spans[w][targets[0], 0] >= 0
        for k in (0, 1): out[2 * w + k, targets[k]] = 10.0 if found else -20.0
    return out


def covered(head, tok, rows) -> None:
    "Every token of a text is in a window, in order, at its place; windows overlap and are not too long."
    windows = head.code(tok, rows)
    for n, r in enumerate(rows):
        whole = tok(r["context"], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        pieces = [
            (i, r["context"][a:b].strip(), b)
            for i, (a, b) in zip(whole.input_ids, whole["offset_mapping"], strict=True)
        ]
        end, last = 0, -1
        for w in np.flatnonzero(windows.owner == n):
            spans = windows.spans[w]
            coded = zip(windows.coded[w][0], spans, strict=True)
            mine = [(int(i), r["context"][a:b].strip(), int(b)) for i, (a, b) in coded if a >= 0]
            at = [k for k in range(len(pieces) - len(mine) + 1) if pieces[k:k + len(mine)] == mine]
            assert len(at) == 1 and last < at[0] <= end and len(spans) == len(windows.coded[w][0]) <= head.limit(tok)
            last, end = at[0], at[0] + len(mine)
        assert end == len(pieces)


words = st.sampled_from(["rain", "dog", "kitchen", "red", "a", "x7", "Paris", "été", "."])
texts = st.lists(words, min_size=1, max_size=60)


@settings(max_examples=25)
@given(st.lists(texts, min_size=1, max_size=3), st.integers(14, 64), st.integers(1, 40), st.data())
def test_windows_cover_texts_and_spans_are_recovered(pocket_bert, gpt2, contexts, length, stride, data):
    rows = []
    for n, ws in enumerate(contexts):
        i = data.draw(st.integers(0, len(ws) - 1))
        j = data.draw(st.integers(i, min(i + 3, len(ws) - 1)))
        context = "  ".join(ws)
        start = sum(len(w) + 2 for w in ws[:i])
        rows.append(asked(context, start, start + len("  ".join(ws[i:j + 1])), name=str(n)))
    for model, tok in (pocket_bert, gpt2):
        head = SpanFinder(model, length=length, stride=stride)
        covered(head, tok, rows)
        windows = head.code(tok, rows)
        said = windows.read(perfect(windows, length), longest=length)
        found = [
            any(windows.spans[w][windows.coded[w][2][0], 0] >= 0 for w in range(len(windows)) if windows.owner[w] == n)
            for n in range(len(rows))
        ]
        assert [s for s, f in zip(said, found, strict=True) if f] == [
            r["answers"][0]["text"] for r, f in zip(rows, found, strict=True) if f
        ]
        assert windows.lost == found.count(False)
        # the target is the answer, or the place for none
        for w, (ids, positions, targets, *_) in enumerate(windows):
            n, spans = windows.owner[w], windows.spans[w]
            place = len(ids) - 1 if head.causal else 0
            assert list(positions) == list(range(len(ids)))
            assert (
                targets == (place, place)
                or rows[n]["context"][spans[targets[0], 0] : spans[targets[1], 1]] == rows[n]["answers"][0]["text"]
            )


@settings(max_examples=25)
@given(st.text(st.sampled_from("ab çé東💧\u0301.\u00a0"), min_size=1, max_size=40).filter(str.strip), st.data())
def test_bytes_of_one_character_and_two_separators(roberta_tok, context, data):
    places = [i for i, c in enumerate(context) if not c.isspace()]
    i = data.draw(st.sampled_from(places))
    j = data.draw(st.sampled_from([p for p in places if p >= i]))
    head = SpanFinder(BYTES, stride=16)
    windows = head.code(roberta_tok, [asked(context, i, j + 1)])
    ids = np.asarray(windows.coded[0][0])
    # two separators within, one at the end; no token types
    assert ids[0] == 0 and (ids == 2).sum() == 3 and len(windows.coded[0]) == 3
    if not windows.lost: assert windows.read(perfect(windows, 120), longest=200) == [context[i:j + 1]]
    # only what is longer than an overlap can be cut by every window
    else: assert len(context[i:j + 1].encode()) > 16


def test_the_stride_is_a_step(pocket_bert):
    model, tok = pocket_bert
    row = asked("rain " * 99 + "rain", 0, 4, "dog ?")
    starts = [int(s[s[:, 0] >= 0][0, 0]) // 5 for s in SpanFinder(model, length=55, stride=7).code(tok, [row]).spans]
    assert starts[:-1] == list(range(0, 7 * (len(starts) - 1), 7))
    # 50 tokens of text in each: steps of 25
    wide = SpanFinder(model, length=55, stride=500).code(tok, [row]).spans
    assert [int(s[s[:, 0] >= 0][0, 0]) // 5 for s in wide] == [0, 25, 50]


def test_long_questions_are_cut_and_counted(pocket_bert):
    model, tok = pocket_bert
    rows = [asked("the dog is here", 4, 7, "dog " * 30), asked("the dog is here", 4, 7, "dog ?")]
    windows = SpanFinder(model, query=5).code(tok, rows)
    assert windows.shortened == 1 and [len(c[0]) for c in windows] == [5 + 4 + 3, 2 + 4 + 3]
    assert "1 of them beyond" in repr(
        SpanFinder(model, length=12, query=5).code(tok, [asked("the dog is here now", 4, 7, "dog " * 30)])
    )


def test_windows_are_made_once_for_a_tokenizer(pocket_bert):
    model, tok = pocket_bert
    data = read_squad("pocket", "dev").take(20)
    first = head_for(model, data).code(tok, data)
    assert head_for(model, data, seed=3).code(tok, data) is first
    assert SpanFinder(model, stride=9).code(tok, data) is not first
    # another tokenizer, even if an equal one
    assert SpanFinder(model).code(load("pocket-bert")[1], data) is not first
    assert data.take(20).coded == {} and SpanFinder(model).code(tok, list(data)) is not first


@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 12), st.integers(0, 10**6))
def test_the_best_span_is_the_best_of_all_pairs(n, longest, best, seed):
    rng = np.random.default_rng(seed)
    start, end, inside = rng.integers(-3, 4, n).astype(float), rng.integers(-3, 4, n).astype(float), rng.random(n) < .7
    inside[rng.integers(n)] = True
    i, j, score = best_span(start, end, inside, best, longest)
    pairs = [(a, b) for a in range(n) for b in range(a, min(n, a + longest)) if inside[a] and inside[b]]
    assert (i, j) in pairs and score == start[i] + end[j] <= max(start[a] + end[b] for a, b in pairs)
    if best >= n: assert (i, j) == max(pairs, key=lambda p: (start[p[0]] + end[p[1]], -p[0], -p[1]))


def test_bad_input(pocket_bert):
    model, tok = pocket_bert
    data = read_squad("pocket", "dev").take(4)
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(SubnetError, match="takes a tokenizer as tok, and this is a SimpleNamespace"):
        SpanFinder(model).code(slow, data)
    with pytest.raises(SubnetError, match="no room for a text behind the question"):
        SpanFinder(model, length=6).code(tok, data)
    with pytest.raises(SubnetError, match="stride must be a whole number of at least 1"): SpanFinder(model, stride=0)
    with pytest.raises(SubnetError, match="length must be a whole number"): SpanFinder(model, length=2.5)
    with pytest.raises(SubnetError, match="there is nothing to ask"): SpanFinder(model).code(tok, [])
    with pytest.raises(SubnetError, match="limit is a number of examples"): fit(model, tok, data, limit=1)
    with pytest.raises(SubnetError, match="limit goes with a table"):
        fit(model, tok, Task(data, head_for(model, data)), limit=2)
    with pytest.raises(SubnetError, match="no task of GLUE can be named"): task_data("pocket:answers", "RTE")


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_the_loss_is_the_mean_of_two_cross_entropies(pocket_bert):
    "Against the model's own forward pass on a padded batch."
    model, tok = pocket_bert
    data = read_squad("pocket", "dev").take(6)
    head = SpanFinder(model, seed=4, length=24, stride=6)
    windows = list(head.code(tok, data))
    with torch.no_grad():
        ours = Task(data, head).prepare(Context(model, tok, 1, len(windows), 0))(0)
        longest = max(len(c[0]) for c in windows)
        def pad(rows): return torch.tensor([[*map(int, r), *[0] * (longest - len(r))] for r in rows])
        real = torch.tensor([[i < len(c[0]) for i in range(longest)] for c in windows])
        states = model.base_model(
            input_ids=pad([c[0] for c in windows]),
            token_type_ids=pad([c[3] for c in windows]),
            attention_mask=real.long(),
        )[0]
        logits = head.out(states).masked_fill(~real[..., None], -1e9)
        start, end = (F.cross_entropy(logits[..., k], torch.tensor([c[2][k] for c in windows])) for k in (0, 1))
    assert ours.item() == pytest.approx(((start + end) / 2).item(), rel=1e-5) and len(windows) > len(data)


@pytest.mark.parametrize("name", ["pocket-bert", "pocket-gpt2"])
def test_fine_tuning_finds_answers_and_the_mask_holds(name, pocket_bert, gpt2):
    model, tok = pocket_bert if name == "pocket-bert" else gpt2
    data = task_data("pocket:answers", train=700, test=100)
    mask = magnitude(model, space := Space.of(model, "weight")).top(density=.8)
    with preserved(model), masked(model, mask, train=True):
        # in several windows
        tuned = fit(model, tok, data.train, epochs=2, lr=1e-3, length=24, dev=data.search.take(40), every=22)
        scores = task_scores(model, tok, tuned.head, data.test)
        for g in space.groups:
            assert not parameter(model, g).detach().numpy()[~mask[g.name].astype(bool).reshape(g.shape)].any()
    assert tuned.cut > 0
    assert scores["score"] == scores["f1"] >= scores["exact"]
    assert scores["f1"] > majority_label(data)["f1"] + 0.08
    assert tuned.log.score.between(0, 1).all()


def test_baseline_and_parts():
    data = task_data("pocket:answers", search=.3)
    contexts = [{r["context"] for r in part} for part in (data.train, data.search, data.test)]
    assert not contexts[0] & contexts[1]
    assert not contexts[0] & contexts[2]
    assert data.metric == "f1"
    assert isinstance(data.train, Questions)
    most = Counter(g[0] for g in data.train.gold).most_common(1)[0][0]
    assert majority_label(data)["exact"] == pytest.approx(np.mean([most == g[0] for g in data.test.gold]))


def test_a_file_alone_is_shared_out_by_texts(tmp_path):
    rows = [
        (
            f"text {i // 3} is good",
            f"q{i}",
            "good" if i % 2 else f"text {i // 3}",
            len(f"text {i // 3} is ") if i % 2 else 0,
        )
        for i in range(60)
    ]
    (file := tmp_path / "some.json").write_text(json.dumps(nested(*rows)))
    data = task_data(file)
    parts = [{r["context"] for r in p} for p in (data.train, data.search, data.test)]
    assert sum(map(len, parts)) == 20 == len(set.union(*parts)) and sum(map(len, data.parts.values())) == 60


def test_a_limit_draws_other_questions_for_every_seed(pocket_bert, tmp_path):
    model, tok = pocket_bert
    data = read_squad("pocket").take(100)
    logs = []
    for seed, limit, to in ((0, 20, "a"), (0, 20, "b"), (1, 20, "c"), (0, None, "d")):
        with preserved(model):
            logs.append(fit(model, tok, data, steps=2, batch=4, seed=seed, limit=limit, to=tmp_path / to))
    configs = [json.loads((tmp_path / d / "config.json").read_text())["config"] for d in "abcd"]
    assert configs[0] == configs[1] and configs[0]["limit"] == 20 and "limit" not in configs[3]
    kinds = [c["goal"]["examples"] for c in configs]
    assert len(set(kinds)) == 3 and [c["goal"]["n"] for c in configs] == [20, 20, 20, 100]
    assert kinds[0] == Task(data.take(20, 0), logs[0].head).identity()["examples"]
    assert kinds[2] == Task(data.take(20, 1), logs[2].head).identity()["examples"]


def test_importance_counts_windows(pocket_bert):
    model, tok = pocket_bert
    data = read_squad("pocket", "dev").take(5)
    head = SpanFinder(model, length=24, stride=6)
    found = importance(model, tok, Task(data, head), Space.of(model, "head"), batches=None, batch=4)
    assert found.meta["examples"] == len(head.code(tok, data)) > 5 and all((v > 0).any() for v in found.values.values())


def test_tickets_from_the_shell(tmp_path, capsys):
    from subnet_explorer.cli import main

    assert (
        main(
            [
                "tickets",
                "--model",
                "pocket-bert",
                "--tasks",
                "pocket:answers",
                "--seeds",
                "0",
                "--epochs",
                "1",
                "--limit-train",
                "160",
                "--limit-per-seed",
                "128",
                "--limit-test",
                "40",
                "--drop",
                ".25",
                "--floor",
                ".7",
                "--search",
                ".03",
                "--out",
                str(tmp_path),
                "--json",
                "--quiet",
                "--no-report",
            ]
        )
        == 0
    )
    out = json.loads(capsys.readouterr().out)
    task = out["tasks"]["answers"]
    assert task["metric"] == "f1"
    assert {"full", "good", "random", "bad"} <= set(task["scores"])
    assert out["config"]["training"]["limit"] == 128
    assert 0 <= task["scores"]["full"]["full"]["mean"] <= 1


# ── real data ────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.real
def test_all_answers_of_squad_are_in_windows(real):
    model, tok = load(real / "models" / "minilm-l6-mlm")
    source = f"squad:{real / 'datasets' / 'squad_v1.1' / 'train-v1.1-2000.json'}"
    for part, n in (("train", 2002), ("dev", 2891)):
        data = read_squad(source, part)
        windows = SpanFinder(model, length=192).code(tok, data)
        said = windows.read(perfect(windows, 192), longest=80)
        scores = answer_scores([[g[0]] for g in data.gold], said)
        assert len(data) == n and windows.extra > 0 and windows.lost == 0 and scores["f1"].mean() > .98
        # where a word holds more than the answer, as 1817 does of 7
        assert all(g[0] in a for g, a, f in zip(data.gold, said, scores["f1"], strict=True) if f < 1)
