"Annotated sentences: treebanks and entities from every kind of file, and how they are scored."
from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from subnet_explorer.core.errors import SubnetError, UnknownName
from subnet_explorer.data.grammar import PARTS, entities, sentences, treebank
from subnet_explorer.data.sentences import (
    GAP,
    SCHEMES,
    BadSentences,
    Sentence,
    chunks,
    coded_words,
    fitting,
    gapped,
    iob2,
    read_conllu,
    read_ner,
)
from subnet_explorer.measure.metrics import attachment, entity_scores, tag_accuracy
from subnet_explorer.model.load import load


def row(i, head=0, form="a", upos="X", deprel="dep") -> str:
    return f"{i}\t{form}\t_\t{upos}\t_\t_\t{head}\t{deprel}\t_\t_\n"


# ── treebanks ────────────────────────────────────────────────────────────────────────────────────────────────────────

TEXT = (
    "\n\n# sent_id = 1\n# text = vámonos al mar\n1-2\tvámonos\t_\t_\t_\t_\t_\t_\t_\t_\n"
    + row(1, 0, "vamos", "VERB", "root")
    + row(2, 1, "nos", "PRON", "obj:x")
    + "2.1\tir\t_\tVERB\t_\t_\t_\t_\t1:conj\t_\n"
    + row(3, 1, "mar", "NOUN", "obl")
    + "\n \n\n# two\n"
    + row(1, 0, "_", "SYM", "root").strip("\n")
)
FOUND = [
    Sentence(("vamos", "nos", "mar"), ("VERB", "PRON", "NOUN"), (0, 1, 1), ("root", "obj:x", "obl")),
    Sentence(("_",), ("SYM",), (0,), ("root",)),
]


def test_ranges_empty_nodes_and_empty_lines():
    assert read_conllu(TEXT) == FOUND == read_conllu(TEXT + "\n\n\n") == read_conllu(TEXT.replace("\n", "\r\n"))
    assert FOUND[0].tagged == (["vamos", "nos", "mar"], ["VERB", "PRON", "NOUN"])
    assert FOUND[0].arcs == ([0, 1, 1], ["root", "obj:x", "obl"])
    assert len(FOUND[0]) == 3


@pytest.mark.parametrize("name", ["a.conllu", "a.conllu.gz", "a.txt"])
def test_files(tmp_path, name):
    file, data = tmp_path / name, "\ufeff".encode() + TEXT.lstrip("\n").encode()
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read_conllu(file) == read_conllu(str(file)) == FOUND


@pytest.mark.parametrize("form", ["10\u00a0000", "a b", "x\u2028y", "x\x85y", "x\x0cy", "#", "…"])
def test_words_keep_their_characters(form):
    assert read_conllu(row(1, 0, "a") + row(2, 1, form))[0].words == ("a", form)
    assert read_ner(f"{form}\tO\nb\tB-X\n") == [([form, "b"], ["O", "B-X"])]


@st.composite
def trees(draw) -> Sentence:
    "Any tree: words are hung below words that already hang, in any order."
    n = draw(st.integers(1, 8))
    order, head = draw(st.permutations(range(1, n + 1))), [0] * n
    for k, w in enumerate(order[1:], 1): head[w - 1] = draw(st.sampled_from(order[:k]))
    word = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=5)
    return Sentence(
        tuple(draw(st.lists(word, min_size=n, max_size=n))),
        tuple(draw(st.lists(st.sampled_from("XYZ"), min_size=n, max_size=n))),
        tuple(head),
        ("dep",) * n,
    )


def columns(s: Sentence): return list(zip(s.words, s.upos, s.head, s.deprel, strict=True))


@given(st.lists(trees(), min_size=1, max_size=4), st.data())
def test_every_tree_is_read_as_it_was_written(made, data):
    "Also one whose words begin with a number sign: only lines are comments."
    text = "\n".join(
        "".join(row(i, h, w, u, d) for i, (w, u, h, d) in enumerate(columns(s), 1))
        for s in made
    )
    assert read_conllu(text) == made
    s = data.draw(st.sampled_from(made))
    if len(s) > 1:      # a second root, or a circle
        other = data.draw(st.sampled_from([i for i, h in enumerate(s.head) if h]))
        with pytest.raises(BadSentences, match="2 roots"):
            Sentence(s.words, s.upos, tuple(0 if i == other else h for i, h in enumerate(s.head)), s.deprel)
        with pytest.raises(BadSentences, match="no root"):
            Sentence(s.words, s.upos, tuple(h or other + 1 for h in s.head), s.deprel)


def test_the_package_reads_the_same():
    import conllu
    text = treebank(60, seed=4)
    plain = [
        [(t["form"], t["upos"], t["head"], t["deprel"]) for t in s if isinstance(t["id"], int)]
        for s in conllu.parse(text)
    ]
    assert [columns(s) for s in read_conllu(text)] == plain


@pytest.mark.parametrize(
    "text, line, says",
    [
        ("# one\n\n1\tword\n", 3, "2 columns where 10 were expected"),
        (row(1).strip() + "\t_\n", 1, "11 columns where 10"),
        (row(1).replace("\t", " "), 1, "1 column where 10"),
        (row(1) + "\n" + row(1) + row(2, 3), 4, "head of 'a' is 3, but the sentence has 2 words"),
        (row(1, -1), 1, "head of 'a' is -1"),
        (row(1) + row(2, "x"), 2, "head 'x' is no number"),
        (row(1) + row(2, "_"), 2, "head '_' is no number"),
        (row(1, "1.5"), 1, "head '1.5' is no number"),
        (row("one"), 1, "id 'one' is no number"),
        (row(1) + row(3, 1), 2, "number 3 where 2 was expected"),
        (row(1) + row(1), 2, "Is the empty line between two sentences missing"),
        (row(1, 0, ""), 1, "has no form"),
        (row(1, 0, "b", "_"), 1, "the word 'b' has no upos"),
        (row(1, deprel="_"), 1, "has no deprel"),
    ],
    ids=lambda v: "" if isinstance(v, int) else re.sub(r"\W+", "-", v[-24:]).strip("-"),
)
def test_bad_lines_are_named(tmp_path, text, line, says):
    with pytest.raises(BadSentences, match=f"^the text, line {line}: .*{re.escape(says)}"): read_conllu(text)
    (tmp_path / "a.conllu").write_text(text)
    with pytest.raises(BadSentences, match=re.escape(f"a.conllu, line {line}: ")): read_conllu(tmp_path / "a.conllu")


@pytest.mark.parametrize(
    "text, line, says",
    [
        (row(1) + row(2), 1, "2 roots: 'a', 'a'"),
        (row(1, 2) + row(2, 1), 1, "no roots"),
        (row(1) + "\n# x\n" + row(1) + row(2, 3) + row(3, 2), 4, "word 2 ('a') go round"),
        (row(1) + row(2, 2), 1, "the word itself"),
    ],
    ids=["two-roots", "no-root", "circle", "itself"],
)
def test_what_is_no_tree_is_refused(text, line, says):
    with pytest.raises(BadSentences, match=rf"sentence from line {line} on: .*{re.escape(says)}"): read_conllu(text)


@pytest.mark.parametrize("read", [read_conllu, read_ner])
def test_bad_sources(tmp_path, read):
    for text in ("", "\n\n", "   "):
        with pytest.raises(BadSentences, match="no sentence in the text"): read(text)
    with pytest.raises(BadSentences, match=r"there is no file nowhere\.conllu: give"): read("nowhere.conllu")
    with pytest.raises(BadSentences, match="there is no file"): read(tmp_path)
    for name, data in (("a.gz", b"not compressed"), ("a.txt", b"\xff\xfe\xff"), ("b.txt", b"a\0b")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadSentences, match=name): read(tmp_path / name)
    with pytest.raises(UnknownName, match="did you mean test"): read("pocket", part="tests")
    with pytest.raises(BadSentences, match="cannot load the data set"): read(f"datasets:{tmp_path}")


def test_parts_of_the_pocket_world_share_no_sentence():
    parts = {p: read_conllu("pocket", p) for p in PARTS}
    assert {p: len(s) for p, s in parts.items()} == PARTS
    said = {p: {s.words for s in of} for p, of in parts.items()}
    assert not said["train"] & said["dev"] | said["train"] & said["test"] | said["dev"] & said["test"]
    # nothing is asked that was never said
    assert {u for s in parts["dev"] + parts["test"] for u in s.upos} <= {u for s in parts["train"] for u in s.upos}
    assert {u for s in parts["dev"] + parts["test"] for u in s.deprel} <= {u for s in parts["train"] for u in s.deprel}
    # the same sentences
    for p, of in parts.items(): assert [tuple(w) for w, _ in read_ner("pocket", part=p)] == [s.words for s in of]
    assert any(tuple(t["form"] for t in s) in said["dev"] for s in sentences(50, 3))       # all parts, as before


# ── data sets ────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_data_sets_with_numbered_labels(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Sequence as Of, Value
    upos, ner = ClassLabel(names=["NOUN", "_", "VERB", "PRON"]), ClassLabel(names=["O", "B-PER", "I-PER"])
    texts, features = Of(Value("string")), dict(tokens=Of(Value("string")))
    made = Dataset.from_dict(
        dict(
            tokens=[["vámonos", "vamos", "nos"]],
            upos=[[1, 2, 3]],
            head=[["None", "0", "1"]],
            deprel=[["_", "root", "obj"]],
            ner_tags=[[0, 1, 2]],
        ),
        features=Features(**features, upos=Of(upos), head=texts, deprel=texts, ner_tags=Of(ner)),
    )
    for name in ("train", "validation"): made.to_parquet(tmp_path / f"{name}.parquet")
    wanted = [Sentence(("vamos", "nos"), ("VERB", "PRON"), (0, 1), ("root", "obj"))]
    assert read_conllu(f"datasets:{tmp_path}") == wanted == read_conllu(f"datasets:{tmp_path}", "dev")
    assert read_ner(f"datasets:{tmp_path}", part="dev") == [(["vámonos", "vamos", "nos"], ["O", "B-PER", "I-PER"])]
    with pytest.raises(UnknownName, match="unknown part 'test'"): read_ner(f"datasets:{tmp_path}", part="test")


def test_data_sets_with_names_and_broken_ones(tmp_path):
    good = dict(tokens=["a", "b"], upos=["X", "Y"], head=[2, 0], deprel=["dep", "root"], ner_tags=["I-LOC", "O"])
    def source(n: int, **changes) -> str:
        (folder := tmp_path / str(n)).mkdir()
        (folder / "train.jsonl").write_text("".join(json.dumps(d) + "\n" for d in (good, {**good, **changes})))
        return f"datasets:{folder}"
    name = source(0)
    assert read_conllu(name) == [Sentence(("a", "b"), ("X", "Y"), (2, 0), ("dep", "root"))] * 2
    assert read_ner(name) == [(["a", "b"], ["B-LOC", "O"])] * 2
    with pytest.raises(BadSentences, match="line 2: 2 tokens, 1 upos"): read_conllu(source(1, upos=["X"]))
    with pytest.raises(BadSentences, match="line 2: the head of 'a' is 5"): read_conllu(source(2, head=[5, 0]))
    with pytest.raises(BadSentences, match="line 2: not as many labels"): read_ner(source(3, ner_tags=["O"]))
    with pytest.raises(BadSentences, match="line 2: 'LOC' is no entity label"):
        read_ner(source(4, ner_tags=["LOC", "O"]))
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "train.jsonl").write_text('{"text": "a"}\n')
    for read in (read_conllu, read_ner):
        with pytest.raises(BadSentences, match="has no column tokens, only text"): read(f"datasets:{tmp_path / '5'}")


# ── entities ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def written(spans: list[tuple[str, int, int]], n: int, scheme: str) -> list[str]:
    "Entity labels by the definition of each scheme."
    tags = ["O"] * n
    for kind, a, b in spans:
        prefixes = {
            "IOB2": "B" + "I" * (b - a - 1),
            "IOB1": ("B" if any(k == kind and e == a for k, _, e in spans) else "I") + "I" * (b - a - 1),
            "BIOES": "S" if b - a == 1 else "B" + "I" * (b - a - 2) + "E",
            "BILOU": "U" if b - a == 1 else "B" + "I" * (b - a - 2) + "L",
        }[scheme]
        tags[a:b] = [f"{p}-{kind}" for p in prefixes]
    return tags


@st.composite
def annotated(draw) -> tuple[list[tuple[str, int, int]], int]:
    "Entities of a sentence, and its length."
    spans, at = [], draw(st.integers(0, 2))
    for _ in range(draw(st.integers(0, 4))):
        size = draw(st.integers(1, 3))
        spans.append((draw(st.sampled_from(["PER", "LOC", "creative-work"])), at, at + size))
        at += size + draw(st.integers(0, 2))
    return spans, max(at, 1)


@given(
    st.lists(annotated(), min_size=1, max_size=4),
    st.sampled_from([*SCHEMES, "BILOU"]),
    st.sampled_from([" ", "\t", " NNP I-NP "]),
)
def test_entities_survive_every_scheme(made, scheme, between):
    rows = [written(spans, n, scheme) for spans, n in made]
    text = "\n".join("".join(f"w{i}{between}{t}\n" for i, t in enumerate(tags)) for tags in rows)
    read = read_ner(text)
    assert [chunks(t) for _, t in read] == [spans for spans, _ in made] == [chunks(t) for t in rows]
    assert [t for _, t in read] == [written(spans, n, "IOB2") for spans, n in made] == [iob2(t) for t in rows]
    assert read == read_ner(text, "BIOES" if scheme == "BILOU" else scheme) == read_ner(text, "conlleval")
    if scheme in ("IOB1", "IOB2") and any(spans for spans, _ in made):
        with pytest.raises(BadSentences, match="cannot stand there"):
            read_ner(text, {"IOB1": "IOB2", "IOB2": "IOB1"}[scheme])


def test_the_layout_of_conll_2003():
    text = (
        "-DOCSTART- -X- -X- O\n\nEU NNP B-NP I-ORG\nrejects VBZ B-VP O\n\n"
        "-DOCSTART- O\nPeter NNP I-NP I-PER\nBlackburn NNP I-NP I-PER"
    )
    assert read_ner(text) == [(["EU", "rejects"], ["B-ORG", "O"]), (["Peter", "Blackburn"], ["B-PER", "I-PER"])]
    assert read_ner(entities(20, 5)) == [([t["form"] for t in s], [t["entity"] for t in s]) for s in sentences(20, 5)]


@pytest.mark.parametrize(
    "text, says",
    [
        ("a O\nb\n", "line 2: 1 column where 2 were"),
        ("a\n", "line 1: 1 column where 2 or more were"),
        ("a X O\n\nb O\n", "line 3: 2 columns where 3 were"),
        ("a O\n\tO\n", "line 2: 2 columns"),
        ("a O\nb PER\n", "line 2: 'PER' is no entity label"),
        ("a O\nb B_PER\n", "line 2: 'B_PER'"),
        ("a\t\n", "line 1: '' is no entity label"),
        (
            "a O\n\nb I-X\nc O\nd B-X\n",
            "line 3: 'I-X' cannot stand there in IOB2 and line 5: 'B-X' cannot stand there in IOB1",
        ),
        ("a B-X\nb I-X\n\nc S-X\n", "line 2: 'I-X' cannot stand there in BIOES"),
        ("a O\nb E-X\n", "line 2: 'E-X' cannot stand there in BIOES"),
    ],
)
def test_bad_entity_labels_are_named(text, says):
    with pytest.raises(BadSentences, match=says): read_ner(text)


def test_unruly_labels_are_read_when_asked():
    assert read_ner("a I-X\nb O\nc B-X\nd I-Y\n", "conlleval") == [(list("abcd"), ["B-X", "O", "B-X", "B-Y"])]
    with pytest.raises(UnknownName, match="did you mean IOB2"): read_ner("a O\n", "IOB")


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def conlleval(gold: list[str], said: list[str]) -> tuple[int, int, int]:
    "Entities in the labels, in the predictions, and right ones: the loop of the shared task's script, word by word."
    def split(t): return (t, "") if t == "O" else tuple(t.split("-", 1))

    def ends(p, t, pk, k):
        return (p == "B" and t in "BSO") or (p == "I" and t in "BSO") or p in "ES" or (p != "O" and pk != k)

    def starts(p, t, pk, k): return t in "BS" or (p in "ESO" and t in "EI") or (t != "O" and pk != k)
    inside, true, found, right = False, 0, 0, 0
    (g0, gk0), (s0, sk0) = ("O", ""), ("O", "")
    for a, b in [*zip(gold, said, strict=True), ("O", "O")]:
        (g, gk), (s, sk) = split(a), split(b)
        ended = ends(g0, g, gk0, gk), ends(s0, s, sk0, sk)
        if inside:
            if all(ended) and gk0 == sk0: inside, right = False, right + 1
            elif ended[0] != ended[1] or gk != sk: inside = False
        began = starts(g0, g, gk0, gk), starts(s0, s, sk0, sk)
        if all(began) and gk == sk: inside = True
        true, found = true + began[0], found + began[1]
        (g0, gk0), (s0, sk0) = (g, gk), (s, sk)
    return true, found, right


labels = st.sampled_from(["O", *(f"{p}-{k}" for p in "BIES" for k in ("X", "Y"))])


@given(st.lists(st.lists(st.tuples(labels, labels), min_size=1, max_size=8), min_size=1, max_size=3))
def test_entity_scores_are_those_of_conlleval(rows):
    gold, said = [[g for g, _ in r] for r in rows], [[p for _, p in r] for r in rows]
    together = [[t for r in side for t in r] for side in (gold, said)]
    for across, counts in (
        (False, np.sum([conlleval(g, p) for g, p in zip(gold, said, strict=True)], 0)),
        (True, np.array(conlleval(*together))),
    ):
        out = entity_scores(gold, said, across)
        assert (
            [out[k] for k in ("gold", "found", "right")]
            == counts.tolist()
            == [sum(t[k] for t in out["types"].values()) for k in ("gold", "found", "right")]
        )
        true, found, right = counts
        assert out["score"] == out["f1"] == pytest.approx(2 * right / (true + found) if true + found else 0)
        assert out["accuracy"] == pytest.approx(np.mean([a == b for a, b in zip(*together, strict=True)]))


@pytest.mark.parametrize("gold, said, right, found", [
    ("I-PER I-PER O", "B-PER I-PER O", 1, 1),                         # an entity may begin with I-
    ("B-PER I-PER I-LOC", "B-PER I-PER B-LOC", 2, 2),                 # a change of type ends one
    ("B-PER B-PER", "B-PER I-PER", 0, 1), ("B-PER I-PER", "B-PER O", 0, 1),      # both ends must be right …
    ("B-PER O", "B-LOC O", 0, 1),                                     # … and the type
    ("S-PER B-LOC E-LOC", "I-PER I-LOC I-LOC", 2, 2), ("O O", "B-PER O", 0, 1), ("B-PER O", "O O", 0, 0),
])
def test_entity_scores_by_hand(gold, said, right, found):
    out = entity_scores([gold.split()], [said.split()])
    assert (out["right"], out["found"]) == (right, found) and out["gold"] == len(chunks(gold.split()))
    assert out["note"] == {0: "no entity in the predictions"}.get(found, "no entity in the labels" * (gold == "O O"))


def test_entities_at_the_end_of_a_sentence():
    gold, said = [["O", "I-PER"], ["I-PER", "O"]], [["O", "I-PER"], ["B-PER", "O"]]
    apart, joined = entity_scores(gold, said), entity_scores(gold, said, across=True)
    assert (apart["f1"], apart["gold"]) == (1, 2) and (joined["f1"], joined["gold"], joined["found"]) == (0, 1, 2)


@given(st.lists(trees(), min_size=1, max_size=4), st.integers(0, 2**16))
def test_attachment_and_tags_by_plain_loops(made, seed):
    rng = np.random.default_rng(seed)
    # also heads that do not exist
    gold, said = (
        [s.arcs for s in made],
        [(rng.integers(0, len(s) + 2, len(s)).tolist(), rng.choice(["dep", "x"], len(s)).tolist()) for s in made],
    )
    sides = list(zip(gold, said, strict=True))
    head = [[a == b for a, b in zip(g[0], p[0], strict=True)] for g, p in sides]
    label = [[a == b for a, b in zip(g[1], p[1], strict=True)] for g, p in sides]
    both = [[h and r for h, r in zip(*row, strict=True)] for row in zip(head, label, strict=True)]
    macro, micro = (
        (lambda rows: sum(sum(r) / len(r) for r in rows) / len(rows)),
        (lambda rows: sum(map(sum, rows)) / sum(map(len, rows))),
    )
    for average, of in (("macro", macro), ("micro", micro)):
        out = attachment(gold, [(np.array(h), np.array(r)) for h, r in said], average)
        assert (out["uas"], out["las"], out["score"]) == pytest.approx((of(head), of(both), of(both)))
        assert out["las"] <= out["uas"]
        assert out["words"] == sum(map(len, made))
        assert attachment(gold, gold, average)["las"] == 1
        assert tag_accuracy([g[1] for g in gold], [p[1] for p in said], average) == pytest.approx(
            of(label)
        )


def test_scores_refuse_what_does_not_match():
    one = ([0, 1], ["root", "punct"])
    assert attachment([one], [([0, 0], ["root", "punct"])], without={"punct"})["uas"] == 1
    # a sentence without words that count
    assert attachment([one, ([0], ["punct"])], [one, ([0], ["punct"])], without={"punct"})["sentences"] == 1
    for call, says in (
        (lambda: tag_accuracy([], []), "at least one"),
        (lambda: tag_accuracy(["DN"], ["DN"]), "as gold, and this is"),
        (lambda: tag_accuracy([["D"]], []), "predictions for 0 sentences, but 1"),
        (lambda: tag_accuracy([["D"]], [["D", "N"]]), "sentence 0 has 1 labels, but 2 predictions"),
        (lambda: tag_accuracy([[]], [[]]), "no word to score"),
        (lambda: attachment([one], [([0], ["root"])]), "has 2 heads, but 1 prediction"),
        (lambda: attachment([one], [one], "mean"), "unknown average 'mean'"),
        (lambda: attachment([([0, 1], ["root"])], [([0, 1], ["root"])]), "2 heads, but 1 relations"),
        (lambda: attachment([one], [one], without={"root", "punct"}), "no word to score"),
        (lambda: entity_scores([["O"]], [["PER"]]), "'PER' is no entity label"),
        (lambda: entity_scores([["O"]], [["O", "O"]]), "sentence 0"),
    ):
        with pytest.raises(SubnetError, match=says): call()


# ── with a model ─────────────────────────────────────────────────────────────────────────────────────────────────────

def test_what_fits_can_be_encoded_and_the_rest_cannot(pocket_bert):
    from subnet_explorer.tasks.heads import Tagger
    model, tok = pocket_bert
    made = [(["the"] * n, ["X"] * n) for n in (1, 2, tok.model_max_length - 2, tok.model_max_length - 1, 128, 129)] + [
        (["a", "\u200b"], ["X", "X"])
    ]
    head = Tagger(model, made)
    kept, left = fitting(made, tok)
    assert kept == made[:3]
    assert left == {
        f"more than {tok.model_max_length} tokens": 2,
        "more than 128 words": 1,
        "a word without token": 1,
    }
    for e in made:
        if e in kept: assert len(head.encode(tok, e)[1]) == len(e[0])
        else:
            with pytest.raises(SubnetError, match=r"too long|has no token"): head.encode(tok, e)
    assert fitting(made, tok, longest=2, shortest=2)[1] == {
        "fewer than 2 words": 1,
        "more than 2 words": 4,
        "a word without token": 1,
    }
    trees = read_conllu("pocket", "test")[:50]
    assert fitting(trees, tok) == (trees, {})
    for none in ([], made[4:]):
        with pytest.raises(BadSentences, match=f"none of {len(none)} sentences fits"): fitting(none, tok)


# ── gaps ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

@given(st.lists(trees(), min_size=1, max_size=6), st.floats(0, 1), st.floats(0, 1), st.integers(0, 5))
def test_gaps_take_words_and_nothing_else(made, share, other, seed):
    found = gapped(made, share, seed)
    for s, g in zip(made, found, strict=True):
        assert (g.upos, g.head, g.deprel, len(g)) == (s.upos, s.head, s.deprel, len(s))
        assert all(w in (GAP, v) for w, v in zip(g.words, s.words, strict=True)) and g.words.count(GAP) == round(
            share * len(s)
        )
    # whatever stands beside it, and again
    assert [gapped([s], share, seed)[0] for s in made] == found == gapped(made, share, seed)
    low, high = (gapped(made, x, seed) for x in sorted((share, other)))
    # a larger share has these and more
    pairs = [pair for one, other in zip(low, high, strict=True) for pair in zip(one.words, other.words, strict=True)]
    assert all(more == GAP for fewer, more in pairs if fewer == GAP)
    # pairs, too
    assert [(list(g.words), list(g.upos)) for g in found] == gapped([s.tagged for s in made], share, seed)


def test_gaps_differ_by_seed_and_are_spread_evenly():
    made = read_conllu("pocket", part="dev")
    first, second = gapped(made, .3, 0), gapped(made, .3, 1)
    assert sum(a != b for a, b in zip(first, second, strict=True)) > .9 * len(made)
    at = Counter((i, w == GAP) for s in first if len(s) == 7 for i, w in enumerate(s.words))
    # two of seven words
    shares = [at[i, True] / (at[i, True] + at[i, False]) for i in range(7)]
    assert len([s for s in first if len(s) == 7]) > 80 and all(abs(x - 2 / 7) < .2 for x in shares)
    assert read_conllu("pocket-gaps", part="dev") == first
    assert read_ner("pocket-gaps", part="dev") == gapped(read_ner("pocket", part="dev"))


def test_a_gap_is_one_mask_token(pocket_bert):
    _, tok = pocket_bert
    some = read_conllu("pocket-gaps", part="dev")[:40]
    for s in some:
        coded = coded_words(tok, s.words)
        assert [coded.input_ids[i] == tok.mask_token_id for i, w in enumerate(coded.word_ids()) if w is not None] == [
            w == GAP for w in s.words
        ]
    assert fitting(some, tok) == (some, {})


def test_gaps_refuse():
    _, tok = load("pocket-gpt2")
    some = read_conllu("pocket-gaps", part="dev")[:2]
    with pytest.raises(SubnetError, match="between 0 and 1, got 30"): gapped(some, 30)
    with pytest.raises(BadSentences, match="has gaps already"): gapped(some)
    with pytest.raises(BadSentences, match="no mask token"): fitting(some, tok)
    with pytest.raises(UnknownName): read_conllu("pocket-gaps", part="tests")



# ── published data ───────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.real
def test_english_ewt(real: Path):
    import conllu
    folder = real / "datasets" / "ud_english_ewt"
    train, dev = (read_conllu(folder / f"en_ewt-ud-{p}.conllu.gz") for p in ("train", "dev"))
    assert [(len(part), sum(map(len, part))) for part in (train, dev)] == [(12544, 204577), (2001, 25147)]
    assert len({u for s in train for u in s.upos}) == 17
    assert {u for s in dev for u in s.upos} <= {u for s in train for u in s.upos}
    # as published
    assert [sum(len(s) > 128 for s in part) for part in (train, dev)] == [2, 0]
    with gzip.open(folder / "en_ewt-ud-dev.conllu.gz", "rt", encoding="utf-8") as f: text = f.read()
    assert Counter(u for s in dev for u in s.upos) == Counter(
        line.split("\t")[3] for line in text.split("\n") if re.match(r"\d+\t", line)
    )
    assert [columns(s) for s in dev[:300]] == [
        [(t["form"], t["upos"], t["head"], t["deprel"]) for t in s if isinstance(t["id"], int)]
        for s in conllu.parse(text)[:300]
    ]


@pytest.mark.real
@pytest.mark.parametrize(
    "name, n, words, found",
    [
        ("wnut17train.conll", 3394, 62730, 1975),
        ("emerging.dev.conll", 1009, 15733, 836),
        ("emerging.test.annotated", 1287, 23394, None),
    ],
)
def test_emerging_entities(real: Path, name, n, words, found):
    file = real / "datasets" / "wnut17" / name
    data = read_ner(file)
    assert (len(data), sum(len(w) for w, _ in data)) == (n, words) and data == read_ner(file, "IOB2")
    begun = Counter(line.split("\t")[1][2:] for line in file.read_text(encoding="utf-8").split("\n") if "\tB-" in line)
    assert Counter(k for _, t in data for k, _, _ in chunks(t)) == begun
    assert found in (None, sum(begun.values()))
    assert len(begun) == 6


@pytest.mark.real
def test_three_columns(real: Path):
    train = read_ner(real / "datasets" / "conll2000" / "train.txt.gz")
    assert (len(train), sum(len(w) for w, _ in train), train[0][1][:6]) == (
        8936,
        211727,
        ["B-NP", "B-PP", "B-NP", "I-NP", "B-VP", "I-VP"],
    )


# ── tags without trees, and what is broken ───────────────────────────────────────────────────────────────────────────

BROKEN = {      # head and relation of two words
    "no heads": ("_", "_", "_", "_"), "two roots": ("0", "root", "0", "root"), "a circle": ("2", "dep", "1", "dep"),
    "outside": ("9", "dep", "0", "root"), "a word": ("x", "dep", "0", "root"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_tags_need_no_tree(how, tmp_path):
    a, b, c, d = BROKEN[how]
    broken = f"1\tbirds\t_\tNOUN\t_\t_\t{a}\t{b}\t_\t_\n2\tfly\t_\tVERB\t_\t_\t{c}\t{d}\t_\t_\n\n"
    good = "1\tbirds\t_\tNOUN\t_\t_\t2\tnsubj\t_\t_\n2\tfly\t_\tVERB\t_\t_\t0\troot\t_\t_\n\n"
    for source in (broken + good, tmp_path / "t.conllu"):
        (tmp_path / "t.conllu").write_text(broken + good)
        with pytest.raises(BadSentences): read_conllu(source)
        tagged = read_conllu(source, tree=False)
        assert [s.tagged for s in tagged] == [(["birds", "fly"], ["NOUN", "VERB"])] * 2 and not tagged.skipped
        assert tagged[1] == read_conllu(good)[0]                    # a tree is kept where there is one
        with pytest.raises(BadSentences, match="without a tree"): _ = tagged[0].arcs
        some = read_conllu(source, strict=False)
        assert some == read_conllu(good) and some.skipped == {"broken sentence": 1}
    without = broken.replace("NOUN", "_")
    with pytest.raises(BadSentences, match="has no upos"): read_conllu(without, tree=False)
    assert read_conllu(without + good, tree=False, strict=False).skipped == {"broken sentence": 1}
    with pytest.raises(BadSentences, match="no sentence in the text; left out"): read_conllu(broken, strict=False)


def test_what_reading_left_out_is_counted_with_what_does_not_fit():
    from subnet_explorer.data.files import Reading
    from subnet_explorer.data.sentences import fitting
    from subnet_explorer.model.load import load
    some = Reading([(["birds"], ["O"]), (["birds"] * 9, ["O"] * 9)], {"broken sentence": 2})
    assert fitting(some, load("pocket-bert")[1], longest=3)[1] == {"broken sentence": 2, "more than 3 words": 1}
