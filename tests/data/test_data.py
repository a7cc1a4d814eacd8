"Facts: what files may hold, how they are split, and which tokens answer them."
from __future__ import annotations

import gzip
import json
import re
from collections import Counter

import pytest
from hypothesis import given, strategies as st

from subnet_explorer.core.errors import SubnetError, UnknownName
from subnet_explorer.data.facts import (
    Fact,
    Facts,
    answerable,
    at_least,
    encode,
    object_id,
    read_facts,
    split,
    two_hop,
)
from subnet_explorer.data.files import BadFacts
from subnet_explorer.data.sentences import read_conllu
from subnet_explorer.data.tables import BadTable, read_glue

LAMA = {"pred": "IsA", "sub_label": "robin", "obj_label": "bird", "masked_sentences": ["a robin is a [MASK] ."]}
GOOD = json.dumps(LAMA) + "\n"


def with_(**changes) -> str: return json.dumps({k: v for k, v in {**LAMA, **changes}.items() if v is not None}) + "\n"


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name, text, line, says", [
    ("a.jsonl", GOOD + "{oops\n", 2, "not a JSON object in LAMA format"),
    ("a.jsonl", GOOD + "\n\n" + "nonsense\n", 4, "not a JSON object in LAMA format"),
    ("a.jsonl", "[1, 2]\n", 1, "not a JSON object in LAMA format"),
    ("a.jsonl", '"bird"\n', 1, "not a JSON object in LAMA format"),
    ("a.jsonl", "null\n", 1, "not a JSON object in LAMA format"),
    ("a.jsonl", with_(pred=None), 1, "predicate_id"),
    ("a.jsonl", with_(obj_label=None), 1, "obj"),
    ("a.jsonl", with_(obj_label=7), 1, "obj"),
    ("a.jsonl", with_(sub_label=["robin"]), 1, "sub"),
    ("a.jsonl", with_(masked_sentences=None), 1, "masked_sentence"),
    ("a.jsonl", with_(masked_sentences=[]), 1, "LAMA format|masked_sentences"),
    ("a.jsonl", with_(masked_sentences="a [MASK] ."), 1, r"no \[MASK\]|masked_sentences"),
    ("a.jsonl", with_(masked_sentences=[None]), 1, "LAMA format|masked_sentences"),
    ("a.jsonl", with_(masked_sentences=["a robin is a bird ."]), 1, r"no \[MASK\]"),
    ("a.jsonl", GOOD + with_(masked_sentences=["[MASK] is [MASK] ."]), 2, r"2 \[MASK\]"),
    ("a.tsv", "IsA\tcat\tanimal\nIsA\tcat\n", 2, "2 columns"),
    ("a.tsv", "IsA\tcat\tanimal\t1\tx\n", 1, "5 columns"),
    ("a.tsv", "IsA\tcat\tanimal\tyes\n", 1, "tab-separated triple"),
    ("a.tsv", "IsA cat animal\n", 1, "1 columns"),
], ids=lambda v: "" if isinstance(v, int) else "".join(c if c.isalnum() else "-" for c in v[-40:]).strip("-"))
def test_bad_lines_are_named(tmp_path, name, text, line, says):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(BadFacts) as e: read_facts(file)
    assert str(e.value).startswith(f"{file}, line {line}: ") and re.search(says, str(e.value))


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("none.jsonl", None, 'give "pocket"'),
        ("a.csv", b"x", "cannot tell the format"),
        ("a.jsonl", b"", "no facts in"),
        ("a.tsv", b"IsA\ta\tb\t0\n", "no facts in"),
        ("a.jsonl", GOOD.encode() + b'\xff\xfe{"pred"\n', "a.jsonl"),
        ("a.jsonl.gz", b"not compressed", "a.jsonl.gz"),
        ("a.jsonl.gz", gzip.compress(GOOD.encode() * 99)[:-20], "a.jsonl.gz"),
    ],
    ids=["missing", "csv", "empty", "nothing-left", "not-utf8", "not-gzip", "cut-gzip"],
)
def test_bad_files_are_named(tmp_path, name, content, says):
    if content is not None: (tmp_path / name).write_bytes(content)
    with pytest.raises(BadFacts, match=re.escape(says)): read_facts(tmp_path / name)


def test_bad_folders_relations_and_templates(tmp_path):
    with pytest.raises(BadFacts, match=r"holds no \.jsonl"): read_facts(tmp_path)
    file = tmp_path / "a.jsonl"
    file.write_text(GOOD)
    with pytest.raises(UnknownName, match="did you mean IsA"): read_facts(file, "Isa")
    with pytest.raises(BadFacts, match=r"must contain \{subject\} and \{object\}"):
        read_facts(file, templates={"IsA": "{subject} is"})
    with pytest.raises(SubnetError, match="IsA"): read_facts(file, templates={"PartOf": "{head} of {tail}"})
    for text in ("{oops\n", '{"relation": "IsA"}\n'):
        (tmp_path / "relations.jsonl").write_text(text)
        with pytest.raises(BadFacts, match=r"relations\.jsonl, line 1"):
            read_facts(file, templates=tmp_path / "relations.jsonl")
    with pytest.raises(BadFacts, match=r"nowhere\.jsonl"): read_facts(file, templates=tmp_path / "nowhere.jsonl")


def test_bad_treebank():
    with pytest.raises(SubnetError, match="line 3: 2 columns where 10 were expected"): read_conllu("# one\n\n1\tword\n")


# ── good input ───────────────────────────────────────────────────────────────────────────────────────────────────────

def test_the_same_facts_in_every_spelling(tmp_path):
    trex = {
        "predicate_id": "IsA",
        "sub_label": "robin",
        "obj_label": "bird",
        "uuid": "u1",
        "evidences": [
            {"masked_sentence": "[MASK] and [MASK] ."},
            {"masked_sentence": "a robin is a [MASK] ."},
            {"masked_sentence": "another [MASK] ."},
        ],
    }
    old = {"pred": "IsA", "sub": "robin", "obj": "bird", "masked_sentence": "a robin is a [MASK] ."}
    (tmp_path / "relations.jsonl").write_text(json.dumps({"relation": "IsA", "template": "a [X] is a [Y] ."}) + "\n")
    def read(name: str, text: str, **kw):
        data = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return read_facts(tmp_path / name, **kw).items
    (wanted,) = read("a.jsonl", GOOD)
    for name, text, kw in (
        ("b.jsonl.gz", GOOD, {}),
        ("c.jsonl", json.dumps(trex), {}),
        ("d.jsonl", json.dumps(old) + "\r\n", {}),
        ("e.tsv", "IsA\trobin\tbird\t1\n", {"templates": {"IsA": "a {subject} is a {object} ."}}),
        ("e2.tsv", "IsA\trobin\tbird\t1\n", {"templates": {"IsA": "a {head} is a {tail} ."}}),
        ("f.tsv.gz", " IsA \trobin\t bird", {"templates": tmp_path / "relations.jsonl"}),
        ("g.jsonl", with_(masked_sentences=["nothing"]), {"templates": tmp_path / "relations.jsonl"}),
    ):
        (found,) = read(name, text, **kw)
        assert (found.relation, found.subject, found.object, found.prompt) == (
            wanted.relation,
            wanted.subject,
            wanted.object,
            wanted.prompt,
        ), name
    assert read("c.jsonl", json.dumps(trex))[0].uuid == "u1"
    # made from the fact, hence stable
    assert wanted.uuid == read("d.jsonl", json.dumps(old))[0].uuid
    with pytest.raises(BadFacts, match="no facts"):
        read("h.jsonl", json.dumps({**trex, "evidences": trex["evidences"][:1]}))


def test_folders_and_counts_of_what_was_left_out(tmp_path):
    (tmp_path / "b.jsonl").write_text(with_(obj_label="animal") + GOOD)
    (tmp_path / "a.jsonl").write_text(GOOD)
    (tmp_path / "relations.jsonl").write_text("not facts")
    (tmp_path / "x.tsv").write_text("IsA\tcat\tanimal\nIsA\tcat\tfish\t0\nFoo\ta\tb\nFoo\tc\td\n")
    facts = read_facts(tmp_path)
    assert [f.object for f in facts] == ["bird", "animal"] and facts.skipped == {"IsA": {"repeated fact": 1}}
    facts = read_facts(tmp_path / "x.tsv")
    assert len(facts) == 1 and facts.skipped == {"IsA": {"false triple": 1}, "Foo": {"no template for the relation": 2}}


def test_pocket_facts_are_as_promised():
    facts = read_facts("pocket")
    assert len(facts) >= 2500 and len(facts.relations) == 16 and not facts.skipped
    assert len({(f.relation, f.subject, f.object) for f in facts}) == len({f.uuid for f in facts}) == len(facts)
    assert (
        read_facts("pocket", "IsA, PartOf").relations
        == ["IsA", "PartOf"]
        == read_facts("pocket", ["IsA", "PartOf"]).relations
    )


def test_a_fact_answers_to_its_earlier_names():
    with pytest.warns(DeprecationWarning, match=r"Fact\.sub is called Fact\.subject now"): assert ROBIN.sub == "robin"
    with pytest.warns(DeprecationWarning, match=r"Fact\.obj is called Fact\.object now"): assert ROBIN.obj == "bird"
    assert list(Facts((ROBIN,)).table()) == ["relation", "sub", "obj", "prompt", "uuid"]


def test_a_data_set_that_fails_without_a_word_is_named(monkeypatch):
    import datasets
    def fail(*args): raise ValueError
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(BadFacts, match="cannot load the data set 'some/where'"): read_facts("datasets:some/where")
    with pytest.raises(BadTable, match="cannot load the data set 'some/where'"): read_glue("datasets:some/where")


def test_a_table_that_cannot_be_read_is_a_bad_table(tmp_path):
    (tmp_path / "a.tsv.gz").write_bytes(b"not compressed")
    with pytest.raises(BadTable, match="gzip-compressed"): read_glue(tmp_path / "a.tsv.gz")


# ── splits ───────────────────────────────────────────────────────────────────────────────────────────────────────────

@st.composite
def some_facts(draw):
    sizes = draw(st.dictionaries(st.sampled_from("ABCD"), st.integers(10, 60), min_size=1))
    rows = [Fact(r, f"s{i}", f"o{i % 3}", f"s{i} is [MASK] .", f"{r}{i}") for r, n in sizes.items() for i in range(n)]
    return Facts(tuple(draw(st.permutations(rows))))


@given(some_facts(), st.integers(0, 1000))
def test_splits(facts, seed):
    s = split(facts, seed)
    parts = [list(p) for p in (s.train, s.dev, s.test)]
    uuids = [f.uuid for p in parts for f in p]
    # disjoint and exhaustive
    assert len(uuids) == len(set(uuids)) == len(facts) and set(uuids) == {f.uuid for f in facts}
    # shares, relation by relation
    for r in facts.relations:
        n = len(facts[r])
        for part, share in zip(parts, (.7, .2, .1), strict=True):
            assert abs(Counter(f.relation for f in part)[r] - share * n) < 1
    for part in parts: assert part == [f for f in facts if f in part]                                 # file order stays
    again = split(facts, seed)
    assert again.hash == s.hash and again.test.items == s.test.items
    assert s.overlap()["pair"].max() == 0
    r = facts.relations[0]
    # a relation alone is split the same way
    assert split(facts[r], seed).test.items == s.test[r].items


def test_the_seed_matters_and_too_few_are_refused():
    facts = read_facts("pocket", "IsA")
    assert len({split(facts, seed).hash for seed in range(5)}) == 5
    with pytest.raises(BadFacts, match="relation IsA has 3 facts, too few"): split(Facts(facts.items[:3]))


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────

WORDS = ["Ġa", "Ġrobin", "robin", "Ġis", "Ġkind", "Ġof", "Ġbird", "bird", "Ġ.", ".", "Ġanimal", "a"]

@pytest.fixture(scope="module")
def byte_level():
    "Byte-level BPE in the manner of RoBERTa (specials around, a mask that swallows the space before it) and of GPT-2."
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    def make(special: list[str], **names):
        pieces, merges = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())], []
        for word in WORDS:
            for i in range(2, len(word) + 1):
                if word[:i] not in pieces:
                    pieces.append(word[:i])
                    merges.append((word[:i - 1], word[i - 1]))
        t = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges))
        t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        if "<mask>" in special:
            t.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
            t.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
            names["mask_token"] = AddedToken("<mask>", lstrip=True, special=True)
        return PreTrainedTokenizerFast(tokenizer_object=t, **names)

    return {
        "roberta": make(
            ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
            bos_token="<s>",
            eos_token="</s>",
            cls_token="<s>",
            sep_token="</s>",
            pad_token="<pad>",
            unk_token="<unk>",
        ),
        "gpt2": make(
            ["<|endoftext|>"], bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"
        ),
    }


ROBIN = Fact("IsA", "robin", "bird", "a robin is a kind of [MASK] .", "0")

def fact(prompt: str, obj: str = "bird") -> Fact: return Fact("IsA", "robin", obj, prompt, "0")


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_the_answer_carries_its_space(byte_level, name):
    tok = byte_level[name]
    def token(f): return tok.convert_ids_to_tokens(object_id(tok, f))
    assert token(ROBIN) == "Ġbird"
    assert token(fact("[MASK] .")) == "bird"                           # nothing before it
    assert token(fact("a kind of-[MASK] .")) == "bird"                 # no space before it
    assert token(fact("a robin is ( [MASK] )")) == "Ġbird"
    assert object_id(tok, fact(ROBIN.prompt, "xylophone")) is None     # several tokens
    some = answerable(Facts((ROBIN, fact(ROBIN.prompt, "xylophone"))), tok)
    assert list(some) == [ROBIN] and some.skipped == {"IsA": {"object is not one token": 1}}
    with pytest.raises(BadFacts, match="none of the 1 objects"):
        answerable(Facts((fact(ROBIN.prompt, "xylophone"),)), tok)
    with pytest.raises(BadFacts, match="'xylophone' is not one token"):
        encode(tok, fact(ROBIN.prompt, "xylophone"), name == "gpt2")


def test_where_a_masked_model_answers(byte_level):
    tok = byte_level["roberta"]
    ids, position, gold = encode(tok, ROBIN, causal=False)
    assert ids[position] == tok.mask_token_id and (ids[0], ids[-1]) == (tok.bos_token_id, tok.eos_token_id)
    filled = [*ids[:position], gold, *ids[position + 1:]]
    assert filled == tok("a robin is a kind of bird .").input_ids      # what a model saw in training


def test_where_a_causal_model_answers(byte_level):
    tok = byte_level["gpt2"]
    ids, position, gold = encode(tok, ROBIN, causal=True)
    assert ids[0] == tok.bos_token_id and position == len(ids) - 1
    assert [*ids[1:], gold] == tok("a robin is a kind of bird").input_ids
    with pytest.raises(BadFacts, match="cannot see what follows"):
        encode(tok, fact("a [MASK] is a robin ."), causal=True)
    with pytest.raises(BadFacts, match="no mask token"): encode(tok, ROBIN, causal=False)


@pytest.mark.parametrize("name", ["pocket-bert", "pocket-gpt2"])
def test_pocket_models_can_answer_their_world(name):
    from subnet_explorer.model.load import load
    _, tok = load(name)
    assert len(answerable(read_facts("pocket"), tok)) == len(read_facts("pocket"))


# ── real files ───────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.real
def test_published_files_can_be_read(real):
    lama, triples = real / "datasets" / "lama", real / "datasets" / "conceptnet100k"
    trex = read_facts(lama / "TREx", templates=lama / "relations.jsonl")
    assert len(trex) > 10_000 and all(f.prompt.count("[MASK]") == 1 for f in trex)
    # evidence sentences: some tell two subjects' facts in the same words
    told = read_facts(lama / "TREx")
    assert len(told) < len(trex)
    assert {len(f) + sum(n for of in f.skipped.values() for n in of.values()) for f in (trex, told)} == {11_682}
    assert len(read_facts(lama / "ConceptNet_negated_misprimed" / "random.jsonl")) > 100
    assert len(read_facts(triples / "train.tsv.gz").relations) == 16


@pytest.mark.real
@pytest.mark.parametrize(
    "name", ["date_of_birth_test.jsonl.gz", "place_of_birth_test.jsonl.gz", "place_of_death_test.jsonl"]
)
def test_google_re_can_be_read(real, name):
    "Some of its lines have no or several masks: they are left out and counted, like evidences of T-REx."
    facts = read_facts(real / "datasets" / "lama" / "Google_RE" / name, strict=False)
    assert len(facts) > 100 and sum(n for of in facts.skipped.values() for n in of.values()) > 0


def test_prompts_that_are_too_long_are_set_aside():
    from subnet_explorer.model.load import load
    _, tok = load("pocket-bert")
    good = Fact("IsA", "robin", "bird", "a robin is a kind of [MASK] .", "0")
    long = Fact("IsA", "robin", "bird", "a robin " * 60 + "is a [MASK] .", "1")
    kept = answerable(Facts((good, long)), tok)
    assert [f.uuid for f in kept] == ["0"] and kept.skipped == {"IsA": {"prompt too long": 1}}
    with pytest.raises(BadFacts, match="longer than the 64 tokens"): encode(tok, long, causal=False)


def test_one_sentence_is_one_fact(tmp_path):
    def line(subject):
        row = dict(pred="IsA", sub_label=subject, obj_label="bird", masked_sentences=["it is a [MASK] ."])
        return json.dumps(row) + "\n"
    (tmp_path / "a.jsonl").write_text(line("robin") + line("the robin"))
    facts = read_facts(tmp_path / "a.jsonl")
    assert len(facts) == 1 and facts.skipped == {"IsA": {"repeated fact": 1}}


# ── templates, orders, labels ────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("form", [
    "{subject} is", "{subject} {x} {object}", "{subject} {0} {object}", "{{subject}} {object}",
    "{subject} [MASK] {object}", "{subject} {object} }",
])
def test_a_wrong_template_is_not_blamed_on_the_facts(tmp_path, form):
    (tmp_path / "a.jsonl").write_text(GOOD)
    with pytest.raises(BadFacts, match=r"^the template of IsA") as e:
        read_facts(tmp_path / "a.jsonl", templates={"IsA": form})
    assert "a.jsonl" not in str(e.value)
    (tmp_path / "t.jsonl").write_text(json.dumps({"relation": "IsA", "template": form}) + "\n")
    with pytest.raises(BadFacts, match=r"t\.jsonl, line 1: the template of IsA"):
        read_facts(tmp_path / "a.jsonl", templates=tmp_path / "t.jsonl")


@pytest.mark.parametrize("form", [None, 3])
def test_a_template_is_a_text(tmp_path, form):
    (tmp_path / "a.jsonl").write_text(GOOD)
    with pytest.raises(SubnetError, match="a text or a path or a dictionary, each value of it a text as templates"):
        read_facts(tmp_path / "a.jsonl", templates={"IsA": form})


def test_a_sentence_that_is_not_there_is_not_blamed_on_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(GOOD)
    with pytest.raises(BadFacts, match="1 masked_sentences, counted from 0, and prompt=3 was asked for"):
        read_facts(tmp_path / "a.jsonl", prompt=3)


BIRDS = ("robin", "owl", "wren", "duck", "swan", "crow")


@pytest.mark.parametrize("relation, line, order", [
    ("IsA", "{s}\t{r}\tbird", "subject, relation, object"),
    ("IsA", "{s}\tbird\t{r}", "subject, object, relation"),
    ("capital_of", "{s}\t{r}\tland of {s}\t1", "subject, relation, object"),
])
def test_another_order_is_said(tmp_path, relation, line, order):
    text = "".join(line.format(s=s, r=relation) + "\n" for s in BIRDS)
    (tmp_path / "a.tsv").write_text(text)
    for strict in (True, False):
        with pytest.raises(BadFacts, match=f"the order is {order} where.*Swap the columns") as e:
            read_facts(tmp_path / "a.tsv", strict=strict)
        assert relation in str(e.value)
    header = {
        "subject, relation, object": "subject\trelation\tobject",
        "subject, object, relation": "head\ttail\trelation",
    }
    (tmp_path / "a.tsv").write_text(header[order] + "\tlabel" * text.startswith("robin\tcap") + "\n" + text)
    templates = {relation: "{subject} {object}"}
    assert [f.subject for f in read_facts(tmp_path / "a.tsv", templates=templates)] == list(BIRDS)


def test_unknown_relations_are_listed_in_the_order_expected(tmp_path):
    (tmp_path / "a.tsv").write_text("P1\ta\tb\nP1\tc\td\nP2\te\tf\n")
    with pytest.raises(BadFacts, match=r"no facts in .*3 no template for the relation \('P1', 'P2'\)"):
        read_facts(tmp_path / "a.tsv")


@pytest.mark.parametrize("label", ["nan", "NaN", "-1", "inf", "yes", ""])
def test_a_label_of_a_triple_that_says_nothing_is_refused(tmp_path, label):
    (tmp_path / "a.tsv").write_text(f"IsA\tcat\tanimal\t1\nIsA\tdog\tanimal\t{label}\n")
    with pytest.raises(BadFacts, match=f"line 2: the label '{label}'"): read_facts(tmp_path / "a.tsv")
    row = {"relation": "IsA", "head": "cat", "tail": "animal", "label": label}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(BadFacts, match=f"line 1: the label '{label}'"): read_facts(tmp_path / "a.jsonl")


def test_the_squad_part_of_lama(tmp_path):
    rows = [{"masked_sentences": [f"question {i} has the [MASK] color ."], "obj_label": "gold", "id": f"56be_{i}",
             "sub_label": "Squad"} for i in range(20)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    facts = read_facts(tmp_path / "test.jsonl")
    assert len(facts) == 20 and facts.relations == ["Squad"] and not facts.skipped
    assert facts.items[3] == Fact("Squad", "56be_3", "gold", "question 3 has the [MASK] color .", "56be_3")
    assert len(split(facts).train) == 14


# ── what was left out, and articles ──────────────────────────────────────────────────────────────────────────────────

def some(relation: str, n: int) -> list[Fact]:
    return [Fact(relation, f"s{i}", "o", f"s{i} is [MASK] .", f"{relation}{i}") for i in range(n)]


def test_a_relation_that_was_left_out_says_so():
    skipped = {"P463": {"object is not one token": 212}, "P9": {"x": 4}}
    facts = Facts(tuple(some("A", 20) + some("P463", 3)), "mine", skipped)
    assert repr(facts) == "Facts(mine: 23 in 2 relations; 216 left out)" and "left out" in facts._repr_html_()
    with pytest.raises(BadFacts, match=r"P463 has 3 facts \(212 of 215 were left out: 212 object is not one token\)"):
        split(facts)
    with pytest.raises(BadFacts, match=r"no fact of P9 is left; left out: 4 x \('P9'\)"): facts["P9"]
    kept = at_least(facts, 10)
    assert kept.relations == ["A"] and kept.skipped["P463"] == {
        "object is not one token": 212, "relation with fewer than 10 facts": 3}
    assert len(kept) + kept.left_out() == len(facts) + facts.left_out() and split(kept).test.relations == ["A"]
    with pytest.raises(BadFacts, match="no relation of mine has 30 facts: 20 at most"): at_least(facts, 30)


@pytest.mark.parametrize("shares", [(.7, .2, .1), (7, 2), (7, 2, 0), ("7", "2", "1")])
def test_shares_are_whole_numbers(shares):
    facts = Facts(tuple(some("A", 20)))
    with pytest.raises(SubnetError, match="shares must be a whole number of at least 1"): split(facts, shares=shares)


@pytest.mark.parametrize("own, other, wanted", [
    ("an owl is a kind of [MASK] .", "a bird is very [MASK] .", "an owl is very [MASK] ."),
    ("owl is a kind of [MASK] .", "A bird is very [MASK] .", "An owl is very [MASK] ."),
    ("owl is a kind of [MASK] .", "bird is very [MASK] .", "owl is very [MASK] ."),
    ("an owl is a kind of [MASK] .", "she met bird and was [MASK] .", "she met an owl and was [MASK] ."),
    ("an owl is a kind of [MASK] .", "every bird is very [MASK] .", "every owl is very [MASK] ."),
    ("an owl is a kind of [MASK] .", "a big bird is very [MASK] .", "a big owl is very [MASK] ."),
])
def test_two_hops_have_the_right_article(own, other, wanted):
    hops = two_hop(Facts((Fact("IsA", "owl", "bird", own, "1"), Fact("HasProperty", "bird", "feathered", other, "2"))))
    assert [f.prompt for f in hops] == [wanted]


def test_two_hops_of_the_pocket_world_are_spelled_as_that_world_spells():
    from subnet_explorer.data.pocket import pocket_rows
    phrases: dict[str, set[str]] = {}
    for row in pocket_rows(): phrases.setdefault(row["sub_label"], set()).add(row["sub_phrase"])
    hops = two_hop(read_facts("pocket"))
    assert len(hops) > 100 and all(any(f" {p} " in f" {f.prompt}" for p in phrases[f.subject]) for f in hops)
