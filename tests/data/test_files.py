"Files: every reader splits at line feeds only, reads a byte order mark, and names what it cannot read, with its place."
from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from subnet_explorer.core.errors import SubnetError
from subnet_explorer.data.choices import read_choices
from subnet_explorer.data.facts import read_facts
from subnet_explorer.data.files import BadFacts, BadTexts, file_text, numbered_lines, parse_json, text_lines
from subnet_explorer.data.questions import read_squad
from subnet_explorer.data.sentences import read_conllu, read_ner
from subnet_explorer.data.tables import read_glue
from subnet_explorer.data.texts import read_blocks, read_texts, unknown_id
from subnet_explorer.measure.maps import read_labels
from subnet_explorer.model.load import load
from subnet_explorer.recipes.options import read_yaml

INSIDE = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"
"What str.splitlines takes for the end of a line, and no reader does."

SQUAD = {"data": [{"paragraphs": [{"context": "A robin is a bird.", "qas": [
    {"id": "1", "question": "What is a robin?", "answers": [{"text": "bird", "answer_start": 13}]}]}]}]}
COPA = {"premise": "It rained.", "choice1": "It was wet.", "choice2": "It was dry.", "question": "effect", "label": 0,
        "idx": 1}
LAMA = {"pred": "IsA", "sub_label": "robin", "obj_label": "bird", "masked_sentences": ["a robin is a [MASK] ."]}
WORD = "1\tBirds\tbird\tNOUN\t_\t_\t0\troot\t_\t_\n\n"

READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "facts.tsv": ("IsA\trobin\tbird\n", lambda p: [f.subject for f in read_facts(p)]),
    "facts.jsonl": (json.dumps(LAMA) + "\n", lambda p: [f.subject for f in read_facts(p)]),
    "relations.jsonl": (json.dumps({"relation": "IsA", "template": "[X] is [Y] ."}) + "\n",
                        lambda p: [f.prompt for f in read_facts(p.parent / "lama.jsonl", templates=p)]),
    "table.tsv": ("sentence\tlabel\na bird\tyes\na dog\tno\n", lambda p: [dict(r) for r in read_glue(p)]),
    "squad.json": (json.dumps(SQUAD), lambda p: [r["question"] for r in read_squad(p)]),
    "copa.jsonl": (json.dumps(COPA) + "\n", read_choices),
    "tree.conllu": (WORD, read_conllu),
    "tags.txt": ("Ann\tB-PER\n", read_ner),
    "a.txt": ("A robin is a bird.\n", read_texts),
    "study.yaml": ("recipe: lamp\n", read_yaml),
    "labels.tsv": ("file\tlabel\n1\tBlock\n", read_labels),
}
readers = pytest.mark.parametrize("name", READERS)


def written(folder, name: str, data: bytes):
    (folder / "lama.jsonl").write_text(json.dumps(LAMA))
    file = folder / name
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return file


@readers
def test_a_byte_order_mark_changes_nothing(tmp_path, name):
    text, read = READERS[name]
    plain = read(written(tmp_path, name, text.encode()))
    assert read(written(tmp_path, name, text.encode("utf-8-sig"))) == plain
    assert read(written(tmp_path, name, text.replace("\n", "\r\n").encode("utf-8-sig"))) == plain


@readers
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_other_encodings_are_named(tmp_path, name, encoding):
    text, read = READERS[name]
    with pytest.raises(SubnetError, match="UTF-16"): read(written(tmp_path, name, text.encode(encoding)))
    with pytest.raises(SubnetError, match="zero byte in line 1"):
        read(written(tmp_path, name, text.encode(f"{encoding}-le")))


@readers
def test_a_broken_letter_is_named_with_its_place(tmp_path, name):
    text, read = READERS[name]
    data = text.encode() + b"ab\xe9\n"
    line = 1 + text.count("\n")
    place = len(text.rpartition("\n")[2]) + 3
    with pytest.raises(SubnetError, match=rf"line {line}: it is not UTF-8 text \(byte {place} of line {line} is 0xe9"):
        read(written(tmp_path, name, data))


@readers
def test_an_unnamed_archive_and_a_damaged_one_are_named(tmp_path, name):
    text, read = READERS[name]
    packed = gzip.compress(text.encode() * 50)
    with pytest.raises(SubnetError, match=r"has to end in \.gz"): read(written(tmp_path, name, packed))
    if name in ("study.yaml", "labels.tsv"): return
    for damaged in (packed[:-9], packed[:12] + b"\xff\xff\xff" + packed[15:]):
        file = tmp_path / f"{name}.gz"
        file.write_bytes(damaged)
        with pytest.raises(SubnetError, match="gzip-compressed"): read(file)


@pytest.mark.parametrize("sign", INSIDE, ids=[f"U+{ord(c):04X}" for c in INSIDE])
def test_lines_end_at_line_feeds_only(tmp_path, sign):
    two = [f"a robin{sign}is a bird .", "a dog is an animal ."]
    text = "\n".join(two) + "\n"
    assert read_texts(written(tmp_path, "a.txt", text.encode())) == two
    assert text_lines(text) == [*two, ""]
    assert read_texts(written(tmp_path, "b.txt.gz", text.encode())) == two
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps({"text": text}) + "\n")
    assert read_texts(f"datasets:{folder}") == two
    rows = f"sentence\tlabel\na{sign}bird\tyes\na dog\tno\n"
    assert [r["sentence"] for r in read_glue(written(tmp_path, "t.tsv", rows.encode()))] == [f"a{sign}bird", "a dog"]
    words = WORD.replace("Birds", f"B{sign}irds")
    assert read_conllu(written(tmp_path, "t.conllu", words.encode())) == read_conllu(words)
    assert read_conllu(words)[0].words == (f"B{sign}irds",)


def test_a_long_line_may_be_cut_inside_of_a_letter(tmp_path):
    file = written(tmp_path, "a.txt", "ä🦉".encode() * 200 + b"\n")
    assert file_text(file) == "ä🦉" * 200 + "\n"
    from subnet_explorer.data import files
    for size in range(1, 9):
        assert "".join(piece for _, piece in files.numbered_pieces(file, size=size)) == "ä🦉" * 200 + "\n"
    file.write_bytes(b"one\ntw\xc3")
    with pytest.raises(BadTexts, match="line 2: it is not UTF-8"): file_text(file)
    with pytest.raises(BadFacts, match="line 2: it is not UTF-8"): list(numbered_lines(file))


def test_json_that_cannot_be_written_again_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nested too deeply"): parse_json("[" * 100_000)
    bad = json.dumps({**LAMA, "uuid": "1"}).replace("bird", "\\ud800")
    with pytest.raises(BadFacts, match="line 1: not a JSON object"):
        read_facts(written(tmp_path, "a.jsonl", bad.encode()))


# ── WikiText ─────────────────────────────────────────────────────────────────────────────────────────────────────────

WIKI = (' = Robert <unk> = \n \n a guest @-@ starring role , 1 @,@ 000 of 2 @.@ 5 birds \n'
        ' He wasn \'t " quick " ( or <unk> ) ; it \'s $ 5 . \n = = Early life = = \n')
READ = ["Robert [UNK]", "a guest-starring role, 1,000 of 2.5 birds", 'He wasn\'t "quick" (or [UNK]); it\'s $5.',
        "Early life"]
NOTE = ("{} was read as WikiText: 2 <unk> {}; 3 @-@, @,@ and @.@ as the signs inside of words that they stand for; "
        "2 headings without their =; {} signs beside their words.")


@pytest.mark.parametrize("name", ["wiki.train.tokens", "wiki.valid.raw", "mine.tokens.gz", "wikitext.txt"])
def test_wikitext_is_read_as_what_was_meant(tmp_path, name):
    file = written(tmp_path, name, WIKI.encode())
    for tok in (None, load("pocket-bert")[1]):
        found = read_texts(file, tok=tok)
        assert found == READ
        assert found.notes == (NOTE.format(name, "as [UNK], never predicted", 9),)


def test_wikitext_is_told_by_its_name_or_by_yours(tmp_path):
    file = written(tmp_path, "plain.txt", WIKI.encode())
    assert read_texts(file)[0] == "= Robert <unk> =" and read_texts(file).notes == ()
    assert read_texts(f"wikitext:{file}") == READ
    named = written(tmp_path, "wiki.tokens", WIKI.encode())
    assert read_texts(f"plain:{named}") == read_texts(file) and read_texts(f"plain:{named}").notes == ()
    cache = tmp_path / "cache"
    _, tok = load("pocket-bert")
    one, other = (read_blocks(tok, f"{how}:{named}", 16, cache=cache) for how in ("plain", "wikitext"))
    assert one.fingerprint == read_blocks(tok, file, 16, cache=cache).fingerprint != other.fingerprint


def test_what_is_no_markup_stays(tmp_path):
    lines = ["= x is no heading", "a = b", "= = Two =", "the dogs ' ball", 'an odd " mark']
    assert read_texts(written(tmp_path, "wiki.tokens", "\n".join(lines).encode())) == lines


def test_a_tokenizer_without_an_unknown_token_leaves_the_word_out(tmp_path):
    _, tok = load("pocket-gpt2")
    file = written(tmp_path, "wiki.tokens", WIKI.encode())
    found = read_texts(file, tok=tok)
    assert found[0] == "Robert" and found.notes == (NOTE.format("wiki.tokens", "left out", 9),)


def byte_level(unknown: str = "<unk>"):
    "A byte-level tokenizer with tokens of its own, as RoBERTa's."
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    t = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token=unknown))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>", unk_token=unknown,
                                   mask_token="<mask>")


def test_no_space_is_left_before_an_unknown_token_that_does_not_take_it(tmp_path):
    file = written(tmp_path, "wiki.tokens", b"a <unk> b")
    tok = byte_level()
    assert read_texts(file, tok=tok) == ["a<unk> b"]
    assert tok.convert_ids_to_tokens(read_blocks(tok, file, 4, cache=tmp_path).ids[0]) == ["a", "<unk>", "\u0120", "b"]
    assert unknown_id(tok) == 3 and unknown_id(byte_level("</s>")) is None      # one that also ends texts


def test_blocks_of_wikitext_hold_the_unknown_token(tmp_path):
    _, tok = load("pocket-bert")
    file = written(tmp_path, "wiki.tokens", (WIKI * 30).encode())
    found = read_blocks(tok, file, 16, cache=tmp_path / "cache")
    again = read_blocks(tok, file, 16, cache=tmp_path / "cache")
    ids = tok(READ[0], add_special_tokens=False).input_ids
    assert ids.count(tok.unk_token_id) == 1 and found.ids[0, 1: 1 + len(ids)].tolist() == ids
    assert found.notes == again.notes == found[:2].notes and "60 <unk> as [UNK]" in found.notes[0]
    plain = written(tmp_path, "plain.txt", (WIKI * 30).encode())
    assert read_blocks(tok, plain, 16, cache=tmp_path / "cache").fingerprint != found.fingerprint


@pytest.mark.real
def test_the_published_wikitext_has_no_markup_left(real):
    _, tok = load("pocket-bert")
    found = read_texts(real / "datasets" / "wikitext-2" / "wiki.test.tokens.gz", tok=tok)
    assert len(found) == 2891
    assert not any(sign in line for line in found for sign in ("<unk>", "@-@", " , ", " . ", "= ="))
    assert sum(line.count("[UNK]") for line in found) > 10_000
