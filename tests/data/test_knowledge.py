"Graphs of facts: how they are read, worded, cut out, held apart; which wording is the most fluent."
from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from subnet_explorer.core.errors import SubnetError, UnknownName
from subnet_explorer.data.facts import TEMPLATES, Fact, Facts, answerable, encode, read_facts, split
from subnet_explorer.data.files import BadFacts
from subnet_explorer.data.graphs import (
    FORMATS,
    IN_TARGET,
    concept,
    disjoint,
    neighbourhood,
    read_graph,
    shared_triples,
    triple,
    wordings,
    wordnet,
)
from subnet_explorer.data.pocket import WORDINGS, pocket_rows
from subnet_explorer.measure.fluency import most_fluent
from subnet_explorer.model.load import load

POCKET = read_facts("pocket")
TRIPLE = {"relation": "IsA", "head": "robin", "tail": "bird"}


def line(**changes) -> str: return json.dumps({k: v for k, v in {**TRIPLE, **changes}.items() if v is not None}) + "\n"
def edge(head: str, tail: str, relation: str = "IsA") -> Fact:
    return Fact(relation, head, tail, f"{head} is a kind of [MASK] .", f"{relation}-{head}-{tail}")


# ── files of triples ─────────────────────────────────────────────────────────────────────────────────────────────────

def test_triples_are_the_same_in_every_spelling(tmp_path):
    def read(name: str, text: str):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return read_facts(tmp_path / name).items
    wanted = read("a.tsv", "IsA\trobin\tbird\n")
    assert wanted[0].prompt == "robin is a kind of [MASK] ."
    for name, text in (
        ("a.jsonl", line()),
        ("b.jsonl.gz", line(other=[1])),
        ("b.tsv", "tail\tn\trelation\thead\nbird\t3\tIsA\trobin\n"),
        ("c.tsv.gz", "Head\tRelation\tTail\nrobin\tIsA\tbird"),
        ("d.tsv", "\ufeffhead\trelation\ttail\tlabel\r\nrobin\tIsA\tbird\t1\r\nrobin\tIsA\tfish\t0\r\n"),
        ("e.jsonl", line(label=1) + line(tail="fish", label=0)),
    ):
        assert read(name, text) == wanted, name


@pytest.mark.parametrize(
    "text, prompt",
    [
        ("A robin is a [MASK].", "A robin is a [MASK]."),
        ("The bird I like is a bird", "The bird I like is a [MASK]"),
        ("a bird, of course!", "a [MASK], of course!"),
        (
            "a bird is no birdhouse, no seabird, no bird-cage and no sea-bird",
            "a [MASK] is no birdhouse, no seabird, no bird-cage and no sea-bird",
        ),
    ],
)
def test_the_last_occurrence_of_the_tail_is_masked(tmp_path, text, prompt):
    (tmp_path / "a.jsonl").write_text(line(text=text))
    assert [f.prompt for f in read_facts(tmp_path / "a.jsonl")] == [prompt]


def test_texts_are_wordings_and_templates_outrank_them(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(
        line(text="a robin is a bird")
        + line(text="robins are like any bird .")
        + line(text="a robin is a bird")
        + line()
        + line()
    )
    facts = read_facts(file)
    assert [f.prompt for f in facts] == [
        "a robin is a [MASK]",
        "robins are like any [MASK] .",
        "robin is a kind of [MASK] .",
    ]
    assert len({f.uuid for f in facts}) == 3
    assert len({f.uuid.split("/")[0] for f in facts}) == 1
    assert facts.skipped == {"IsA": {"repeated fact": 2}}
    facts = read_facts(file, templates={"IsA": "{head} = {tail}"})
    assert [f.prompt for f in facts] == ["robin = [MASK]"] and facts.left_out("repeated fact") == 4
    file.write_text(
        "".join(
            line(head=h, text=f"{h} {w} a bird .")
            for h in ("robin", "wren", "crow", "kite", "duck", "tern", "gull", "rook", "dove", "hawk")
            for w in ("is", "was")
        )
    )
    parts = split(read_facts(file))
    # wordings of a triple stay together
    assert [len(p) for p in (parts.train, parts.dev, parts.test)] == [14, 4, 2] and not parts.overlap()["subject"].any()


@pytest.mark.parametrize(
    "name, text, n, says",
    [
        ("a.jsonl", line() + line(text="a robin is an animal"), 2, "nor the tail 'bird' as whole words"),
        ("a.jsonl", line(text="a robin is a Bird"), 1, "nor the tail 'bird'"),
        ("a.jsonl", line(text="[MASK] is [MASK]"), 1, r"2 \[MASK\]"),
        ("a.jsonl", line(text=7), 1, "nor one with relation, head and tail"),
        ("a.jsonl", line(relation=None), 1, "nor one with relation, head and tail .*'relation'"),
        ("a.jsonl", line(tail=None), 1, "'tail'"),
        ("a.jsonl", line(head=["robin"]), 1, "where some text was expected"),
        ("a.jsonl", line(tail=" "), 1, "where some text was expected"),
        ("a.jsonl", line(label="maybe"), 1, "maybe"),
        ("a.tsv", "head\trelation\ttail\nrobin\tIsA\n", 2, "2 columns where the header names 3"),
        (
            "a.tsv",
            "head\ttail\tkind\nrobin\tbird\tIsA\n",
            1,
            "the header has no column relation: found head, tail, kind",
        ),
        ("a.tsv", "head\thead\ttail\trelation\nrobin\tx\tbird\tIsA\n", 1, "the header names head twice"),
        ("a.tsv", "head\trelation\ttail\trank\nrobin\tIsA\t\t1\n", 2, "where some text was expected"),
    ],
)
def test_bad_triples_are_named(tmp_path, name, text, n, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadFacts) as e: read_facts(tmp_path / name)
    assert str(e.value).startswith(f"{tmp_path / name}, line {n}: ") and re.search(says, str(e.value))


def test_triples_without_a_template_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text(line() + line(relation="Foo") + line(text="no such word"))
    facts = read_facts(tmp_path / "a.jsonl", strict=False)
    assert len(facts) == 1
    assert facts.skipped == {"Foo": {"no template for the relation": 1}, "IsA": {"not exactly one [MASK]": 1}}
    assert facts.left_out() == 2
    (tmp_path / "a.tsv").write_text("relation\thead\ttail\nFoo\ta\tb\n")
    with pytest.raises(BadFacts, match=r"no facts in .*left out: .*no template"): read_facts(tmp_path / "a.tsv")


def test_strict_targets_name_their_long_objects(pocket_bert):
    _, tok = pocket_bert
    assert answerable(POCKET, tok, strict=True).items == POCKET.items
    bad = Facts(
        (*POCKET.items[:2], edge("robin", "xylophonist"), edge("wren", "xylophonist"), edge("wren", "zygote")), "mine"
    )
    named = "objects of mine that are not one token of this tokenizer: 'xylophonist', 'zygote'. Replace"
    with pytest.raises(BadFacts, match=re.escape(named)):
        answerable(bad, tok, strict=True)
    long = replace(POCKET.items[0], prompt="a robin " * 60 + "is a [MASK] .")
    with pytest.raises(BadFacts, match="with more than 64 tokens"): answerable(Facts((long,)), tok, strict=True)


# ── wordings ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_every_relation_has_formats_that_end_with_the_tail():
    assert FORMATS.keys() == TEMPLATES.keys()
    for r, forms in FORMATS.items():
        assert 3 <= len(set(forms)) == len(forms) and all(
            f.endswith("{object}") and f.count("{subject}") == 1 for f in forms
        ), r
    # two heads times six predicates, without the hyponym of a head with article
    assert len(FORMATS["IsA"]) == 11


@pytest.mark.parametrize(
    "head, tail, wanted",
    [
        ("owl", "bird", {"An owl is a", "Owl is a", "Owl is a hyponym of"}),
        ("robin", "animal", {"A robin is an", "Robin is an", "A robin is a kind of"}),
        ("the sun", "star", {"The sun is a", "The sun is a type of"}),
        ("unicorn", "utensil", {"A unicorn is a", "Unicorn is a"}),
        ("uncle", "hour", {"An uncle is an", "Uncle is an"}),
        ("{tail}", "x", {"{tail} is a"}),
        ("{object}", "x", {"{object} is a"}),
    ],
)
def test_articles_fit(head, tail, wanted):
    prompts = [f.prompt for f in wordings(Facts((edge(head, tail),)))]
    assert {f"{w} [MASK]" for w in wanted} <= set(prompts) and len(set(prompts)) == len(prompts)


def test_pocket_facts_have_the_pocket_wordings():
    phrase = {r["uuid"]: r["sub_phrase"] for r in pocket_rows()}
    both = {causal: wordings(POCKET, causal=causal) for causal in (True, False)}
    assert [f.prompt for f in both[False]] == [
        w.format(s=phrase[f.uuid], o="[MASK]")
        for f in POCKET
        for w in (WORDINGS[f.relation][-1:] + WORDINGS[f.relation][:-1])
    ]
    last = [f for f in both[False] if re.fullmatch(r"[^\w]*", f.prompt.split("[MASK]")[1])]
    assert [f.prompt for f in both[True]] == [f.prompt for f in last]
    assert [f.uuid for f in both[True]] == [f.uuid for f in last]
    assert both[True].left_out("wording goes on after its object") == len(both[False]) - len(both[True]) > 0
    assert {f.uuid.split("/")[0] for f in both[True]} == {f.uuid for f in POCKET}
    assert len({f.uuid for f in both[False]}) == len(both[False])
    _, tok = load("pocket-gpt2")
    # a causal model can be asked all of them
    for f in both[True].items[::97]: assert encode(tok, f, causal=True)


def test_formats_may_say_head_and_tail():
    facts = Facts((edge("robin", "bird"),))
    assert wordings(facts, {"IsA": ["A {head} is a {tail}"]}) == wordings(facts, {"IsA": ["A {subject} is a {object}"]})


def test_bad_formats():
    facts = Facts((edge("robin", "bird"),))
    form = "{subject} is {object}"
    assert wordings(facts, {"IsA": form}) == wordings(facts, {"IsA": [form]})
    for bad, says in (
        ({"IsA": []}, "where a list of texts"),
        ({"IsA": ["{subject} is"]}, "must contain {subject} and {object} once each"),
        ({"IsA": ["{head} is"]}, "must contain {subject} and {object} once each"),
    ):
        with pytest.raises(BadFacts, match=re.escape(says)): wordings(facts, bad)
    with pytest.raises(UnknownName, match="unknown relation with formats 'P31'"):
        wordings(Facts((edge("robin", "bird", "P31"),)))
    with pytest.raises(BadFacts, match="no wording of IsA ends with its object"):
        wordings(facts, {"IsA": ["{object} is what {subject} is"]})
    assert [
        f.prompt for f in wordings(facts, {"IsA": ["{tail} is what {head} is", "so {head} is {tail}"]}, causal=False)
    ] == ["[MASK] is what robin is", "So robin is [MASK]."]


# ── neighbourhoods ───────────────────────────────────────────────────────────────────────────────────────────────────

GRAPHS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from(["IsA", "PartOf"])),
    min_size=1,
    max_size=25,
    unique=True,
)


@given(GRAPHS, st.integers(0, 5), st.data())
def test_neighbourhoods_are_connected(edges, seed, data):
    facts = Facts(tuple(edge(f"{('a ', 'the ', '')[(h + t) % 3]}n{h}", f"n{t}", r) for h, t, r in edges))
    start = data.draw(st.sampled_from(sorted({n for h, t, _ in edges for n in (h, t)})))
    reach, near = {start}, set()
    while (more := {e for e in edges if reach & {e[0], e[1]}}) != near:
        near, reach = more, reach | {n for h, t, _ in more for n in (h, t)}
    distance = {start: 0}
    while len(distance) < len(reach):
        distance |= {
            n: 1 + max(distance.values())
            for n in {n for h, t, _ in edges if {h, t} & distance.keys() for n in (h, t)} - distance.keys()
        }
    name, previous = f"The N{start}", set()
    for n in range(1, len(near) + 1):
        near_it = neighbourhood(facts, name, n, seed)
        got = {(int(concept(f.subject)[1:]), int(f.object[1:]), f.relation) for f in near_it}
        # exact size, and every neighbourhood contains the smaller ones
        assert len(got) == n and previous < got <= near
        # connected: everything is reached from the concept within the neighbourhood
        inside = {start}
        while (grown := inside | {m for h, t, _ in got if {h, t} & inside for m in (h, t)}) != inside: inside = grown
        assert all(h in inside for h, _, _ in got)
        def far(e): return min(distance[e[0]], distance[e[1]])
        # breadth first: nothing nearer was passed over
        assert all(far(e) <= min(map(far, near - got), default=99) for e in got)
        previous = got
    with pytest.raises(BadFacts, match=f"only {len(near)} triples .* where {len(near) + 1} were asked for"):
        neighbourhood(facts, name, len(near) + 1, seed)


def test_neighbourhoods_do_not_depend_on_order_or_wording():
    def some(facts, seed=0): return {triple(f) for f in neighbourhood(facts, "a bird", 40, seed)}
    assert some(POCKET) == some(Facts(POCKET.items[::-1])) == some(wordings(POCKET)) != some(POCKET, 1)
    with pytest.raises(UnknownName, match=r"unknown concept in pocket: 'birdd': did you mean .*bird"):
        neighbourhood(POCKET, "the birdd", 3)
    with pytest.raises(BadFacts, match="at least one"): neighbourhood(POCKET, "bird", 0)


# ── target and control ───────────────────────────────────────────────────────────────────────────────────────────────

def test_target_and_control_share_nothing():
    target = Facts((edge("A Robin", "Bird"), edge("owl", "bird", "isa")), "target")
    control = Facts(
        (
            edge("robin", "bird"),
            replace(edge("the  robin", "bird"), prompt="x [MASK]"),
            edge("owl", "bird"),
            edge("robin", "bird", "PartOf"),
            edge("robin", "the bird"),
            edge("bird", "robin"),
        ),
        "control",
        {"IsA": {"repeated fact": 2}},
    )
    rest = disjoint(target, control)
    assert rest.items == control.items[3:]
    assert rest.skipped == {"IsA": {"repeated fact": 2, IN_TARGET: 3}}
    assert rest.left_out(IN_TARGET) == 3
    assert shared_triples(target, control).items == control.items[:3]
    assert len(shared_triples(target, rest)) == 0
    assert control.left_out() == 2
    assert disjoint(target, rest) == rest  # nothing more to remove
    with pytest.raises(
        BadFacts, match="nothing is left of control/overlap to be kept: all of its 3 facts are also stated by target"
    ):
        disjoint(target, shared_triples(target, control))


@given(st.sets(st.integers(0, 30), min_size=1), st.sets(st.integers(0, 30), min_size=1))
def test_overlap_and_the_rest_are_a_partition(a, b):
    target, control = (Facts(tuple(edge(f"n{i}", "x") for i in sorted(s))) for s in (a, b))
    assert len(shared_triples(target, control)) == len(a & b)
    if b - a: assert [f.subject for f in disjoint(target, control)] == [f"n{i}" for i in sorted(b - a)]
    else:
        with pytest.raises(BadFacts, match="nothing is left"): disjoint(target, control)


# ── WordNet ──────────────────────────────────────────────────────────────────────────────────────────────────────────

ELEVEN = "bird 0 fowl 1 Aves 0 a 0 b1 0 c_d 0 ee 0 ff 0 gg 0 hh 0 ii 0"
NOUNS = f"""  1 This software and database is being provided to you, the LICENSEE, by
  2 nobody: offsets are made up.
00000011 03 n 02 animal 0 beast 0 000 | a living organism | with a bar
00000012 05 n 0b {ELEVEN} 003 @ 00000011 n 0000 ~ 00000013 n 0000 + 00000099 v 0101 | eleven words, in hexadecimal
00000013 05 n 02 robin 0 robin_redbreast 0 002 @ 00000012 n 0000 @ 00000014 n 0000 | two hypernyms
00000014 18 n 02 Singer 0 top_singer 0 000 | no usable word
00000015 18 n 01 tweety 0 001 @i 00000012 n 0000 | an instance
00000016 18 n 01 bird 1 001 @ 00000012 n 0000 | itself
00000017 18 n 01 robin 1 001 @ 00000011 n 0000 | another robin
"""
INDEX = "".join(
    f"{w} n {len(o)} 1 @ {len(o)} {tagged}{''.join(f' {x:08}' for x in o)}  \n"
    for w, tagged, o in (
        ("animal", 0, (8, 11)),
        ("beast", 1, (7, 11)),
        ("bird", 1, (9, 12, 16)),
        ("fowl", 1, (12,)),
        ("ee", 0, (12,)),
        ("robin", 1, (13, 17)),
    )
)


@pytest.fixture
def nouns(tmp_path, monkeypatch):
    for name in ("WNSEARCHDIR", "WNHOME"): monkeypatch.delenv(name, raising=False)
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "data.noun").write_text(NOUNS)
    return tmp_path / "dict"


def test_wordnet_is_read(nouns, monkeypatch):
    def pairs(facts): return [(f.subject, f.object) for f in facts]
    heads = ["bird", "fowl", "ee", "ff", "gg", "hh", "ii"]
    facts = wordnet(nouns)
    assert pairs(facts) == [(h, "animal") for h in heads] + [("robin", "bird"), ("robin", "animal")]
    assert {f.relation for f in facts} == {"IsA"}
    assert facts.skipped == {"IsA": {"not a single lower-case word": 7, "head and tail are the same": 1}}
    assert facts.items[0] == replace(facts.items[0], prompt="bird is a kind of [MASK] .")
    assert len({f.uuid for f in facts}) == len(facts)
    (nouns / "index.noun").write_text(INDEX)
    # tagged before untagged, then by rank
    assert pairs(wordnet(nouns)) == [(h, "animal") for h in heads] + [
        ("robin", "fowl"),
        ("bird", "fowl"),
        ("robin", "animal"),
    ]
    assert pairs(wordnet(nouns, senses=1)) == [(h, "animal") for h in heads[1:]] + [("robin", "fowl")]
    for name, value in (("WNSEARCHDIR", nouns), ("WNHOME", nouns.parent)):
        with monkeypatch.context() as m:
            m.setenv(name, str(value))
            assert wordnet() == wordnet(nouns) == wordnet(nouns.parent)


@pytest.mark.parametrize(
    "change, says",
    [
        (("n 02 robin", "n 03 robin"), "data.noun, line 5: not a synset"),
        (("n 02 robin", "n zz robin"), "data.noun, line 5: not a synset"),
        (("n 02 robin", "v 02 robin"), "data.noun, line 5"),
        (("0 002 @", "0 003 @"), "data.noun, line 5"),
        (("00000013 05", "13 05"), "data.noun, line 5"),
        (("@ 00000014", "@ 00000044"), "the hypernym 00000044 of 00000013 is not in the file"),
        ((NOUNS, NOUNS[: NOUNS.index("00000011 03")]), "no synset in"),
        ((NOUNS, "\n".join(NOUNS.splitlines()[:3])), "no hypernym of a single lower-case word"),
        (("a living", "a l\xefving"), "cannot read"),
    ],
    ids=lambda v: "" if isinstance(v, tuple) else re.sub(r"\W+", "-", v),
)
def test_broken_wordnets_are_named(nouns, change, says):
    (nouns / "data.noun").write_bytes(NOUNS.replace(*change).encode("latin-1"))
    with pytest.raises(BadFacts, match=says): wordnet(nouns)


def test_missing_wordnets_and_indices_are_named(nouns, tmp_path, monkeypatch):
    with pytest.raises(BadFacts, match=r"needs index\.noun"): wordnet(nouns, senses=1)
    (nouns / "index.noun").write_text(INDEX + "robin n 3 1 @ 1 1 00000013\n")
    with pytest.raises(BadFacts, match=r"index\.noun, line 7: not a lemma"): wordnet(nouns)
    (nouns / "index.noun").write_text(INDEX.replace("robin n 2 1 @ 2 1", "robin n 2 1 @ 2 x"))
    with pytest.raises(BadFacts, match=r"index\.noun, line 6: not a lemma"): wordnet(nouns)
    with pytest.raises(BadFacts) as e: wordnet(tmp_path / "nowhere")
    assert all(w in str(e.value) for w in (str(tmp_path / "nowhere"), "WNSEARCHDIR", "wordnet-base"))
    monkeypatch.setattr("subnet_explorer.data.graphs.Path.is_file", lambda self: False)
    monkeypatch.setenv("WNHOME", "told-by-home")
    with pytest.raises(BadFacts, match=r"no WordNet .* in told-by-home/dict, .*/usr/share/wordnet, .*nltk_data"):
        wordnet()


# ── fluency ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@torch.no_grad()
def plain_logprobs(model, tok, fact: Fact, by: str) -> float:
    "The mean log-probability of the object, or of every token of the sentence, one forward pass each."
    causal = "LMHead" in type(model).__name__
    def read(ids): return model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    start = [tok.bos_token_id] if causal else []
    sentence = start + tok(fact.prompt.replace("[MASK]", fact.object)).input_ids
    if by == "tail" and causal:
        before = start + tok(fact.prompt.split("[MASK]")[0].rstrip()).input_ids
        return float(read(before)[-1, sentence[len(before)]])
    if by == "tail":
        ids = tok(fact.prompt.replace("[MASK]", tok.mask_token)).input_ids
        at = ids.index(tok.mask_token_id)
        return float(read(ids)[at, sentence[at]])
    if causal: return float(np.mean([float(read(sentence)[i, sentence[i + 1]]) for i in range(len(sentence) - 1)]))
    return float(
        np.mean(
            [
                float(read([*sentence[:i], tok.mask_token_id, *sentence[i + 1:]])[i, t])
                for i, t in enumerate(sentence)
                if t not in tok.all_special_ids
            ]
        )
    )


@pytest.mark.parametrize("by", ["tail", "sentence"])
@pytest.mark.parametrize("name", ["pocket-bert", "pocket-gpt2"])
def test_the_most_fluent_wording_is_that_of_a_plain_computation(name, by):
    model, tok = load(name)
    told = wordings(neighbourhood(POCKET, "bird", 15, seed=2), causal=name == "pocket-gpt2")
    # wordings of a triple need not stand together
    told = replace(told, items=told.items[::2] + told.items[1::2])
    best, others = most_fluent(model, tok, told, by=by)
    plain, of = {f.uuid: plain_logprobs(model, tok, f, by) for f in told}, {}
    for f in told: of.setdefault(triple(f), []).append(plain[f.uuid])
    assert [triple(f) for f in best] == list(of) and all(plain[f.uuid] >= max(of[triple(f)]) - 1e-4 for f in best)
    # there was something to choose
    assert sum(max(ws) - min(ws) > 1e-2 for ws in of.values()) > len(of) / 2
    assert [f.uuid for f in others] == [f.uuid for f in told if f.uuid not in {b.uuid for b in best}]
    assert len(best) + len(others) == len(told)
    again, none = most_fluent(model, tok, best, by=by)
    assert again.items == best.items and not len(none)


def test_bad_requests_for_fluency():
    model, tok = load("pocket-gpt2")
    with pytest.raises(UnknownName, match="did you mean tail"): most_fluent(model, tok, POCKET, by="tails")
    with pytest.raises(SubnetError, match="no fact was given"): most_fluent(model, tok, Facts(()))
    with pytest.raises(BadFacts, match="cannot see what follows"):
        most_fluent(model, tok, wordings(Facts(POCKET.items[:1]), causal=False))
    with pytest.raises(BadFacts, match="'xylophonist' is not one token"):
        most_fluent(model, tok, Facts((edge("robin", "xylophonist"),)))
    with torch.no_grad(): next(model.parameters()).fill_(float("nan"))
    for by in ("tail", "sentence"):
        with pytest.raises(SubnetError, match="NaN or infinite logits"):
            most_fluent(model, tok, Facts(POCKET.items[:1]), by=by)


# ── real files ───────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.real
def test_graphs_of_real_size(real):
    isa = read_facts(real / "datasets" / "wordnet_isa" / "isa_common.tsv")
    assert (len(isa), isa.relations, isa.left_out()) == (7_674, ["IsA"], 0)
    target = neighbourhood(isa, "a building", 11)
    rest = disjoint(target, isa)
    assert (len(target), rest.left_out(IN_TARGET), len(rest)) == (11, 11, 7_663) and len(wordings(target)) == 11 * 11
    net = read_facts(real / "datasets" / "conceptnet100k" / "train.tsv.gz")
    # sizes of the published ConceptNet targets
    for about, n in (("fruit", 37), ("the sun", 36), ("swim", 40)):
        near = neighbourhood(net, about, n)
        assert len(near) == n and any(concept(about) in (concept(f.subject), concept(f.object)) for f in near)
        assert len(disjoint(near, net)) == len(net) - len(shared_triples(near, net))
        assert all(p.prompt.endswith("[MASK]") for p in wordings(near))


@pytest.mark.real
def test_the_most_fluent_wording_of_a_real_encoder(real):
    model, tok = load(real / "models" / "minilm-l6-mlm")
    told = wordings(
        answerable(
            neighbourhood(read_facts(real / "datasets" / "wordnet_isa" / "isa_common.tsv"), "building", 12), tok
        ),
        causal=False,
    )
    best, _ = most_fluent(model, tok, told)
    plain = {f.uuid: plain_logprobs(model, tok, f, "tail") for f in told}
    assert {triple(f) for f in best} == {triple(f) for f in told}
    for b in best: assert plain[b.uuid] >= max(plain[f.uuid] for f in told if triple(f) == triple(b)) - 1e-4


# ── the pocket world is asked for ────────────────────────────────────────────────────────────────────────────────────

def test_triples_that_the_pocket_world_states_too_are_worded_like_all_others(tmp_path):
    "Their content, and so their uuid, is the same; even the template may be one of that world's wordings."
    mine = tmp_path / "mine.tsv"
    mine.write_text("".join(f"{f.relation}\t{f.subject}\t{f.object}\n" for f in POCKET))
    facts = read_facts(mine)
    assert {f.uuid for f in facts} & {f.uuid for f in POCKET}
    of_pocket = {s for row in pocket_rows() for s in row["masked_sentences"]}
    for causal in (True, False):
        told = wordings(facts, causal=causal)
        assert told.items == read_graph(mine, causal).items == wordings(facts, FORMATS, causal).items
        assert not {f.prompt for f in told} & of_pocket
    assert {f.prompt for f in read_graph(mine, pocket=True)} <= of_pocket


def test_broken_prompts_of_a_graph_can_be_left_out(tmp_path):
    line = {"relation": "IsA", "head": "hound", "tail": "dog", "text": "no such word"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**line, "text": "a hound is a dog"}))
    with pytest.raises(BadFacts, match="strict=False"): read_graph(tmp_path / "a.jsonl")
    facts = read_graph(tmp_path / "a.jsonl", strict=False)
    assert len(facts) == 1 and facts.left_out() == 1
