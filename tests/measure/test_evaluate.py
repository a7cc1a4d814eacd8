"What is measured: ranks, averages, intervals, perplexity and accuracy against plain implementations written here."
from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st
from scipy import stats

from subnet_explorer.core.errors import SpaceMismatch, SubnetError, UnknownName
from subnet_explorer.core.intervals import estimate, interval
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.scores import Scores
from subnet_explorer.core.space import Space
from subnet_explorer.data.facts import Fact, Facts, read_facts, split
from subnet_explorer.data.grammar import sentences, treebank
from subnet_explorer.data.pocket_tasks import choices, plausible
from subnet_explorer.data.sentences import read_conllu
from subnet_explorer.measure.ask import Precision, cloze, majority, precision
from subnet_explorer.measure.fluency import perplexity
from subnet_explorer.measure.metrics import accuracy
from subnet_explorer.measure.options import plausibility
from subnet_explorer.model.apply import masked
from subnet_explorer.model.load import load
from subnet_explorer.search.objectives import Context, Task
from subnet_explorer.tasks.fit import fit
from subnet_explorer.tasks.heads import Classifier, Tagger

TEXTS = [" ".join(t["form"] for t in s) for s in sentences(6, seed=3)]


@pytest.fixture(scope="module")
def pocket_gpt2(): return load("pocket-gpt2")

@pytest.fixture(scope="module")
def space(pocket_bert): return Space.of(pocket_bert[0], "weight", layers="top-half")

@pytest.fixture(scope="module")
def facts():
    "Five facts of two relations, and three subjects that have two right objects each."
    few = [f for r in ("MadeOf", "IsA") for f in read_facts("pocket", r).items[3:8]]
    pairs = zip(few[::4], ("glass", "metal", "tool"), strict=True)
    second = [Fact(f.relation, f.subject, other, f.prompt, f.uuid + "+") for f, other in pairs if f.object != other]
    return Facts((*few, *second))


def multiplied(model, values):
    "A copy of the model whose weights are multiplied by a mask's bits or by soft scores."
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for g in values.space.groups if values is not None else ():
            twin.base_model.get_parameter(g.name).mul_(torch.as_tensor(values[g.name]).float())
    return twin


@torch.no_grad()
def by_hand(model, tok, facts, values=None):
    "One whole forward pass per fact, everything sorted in plain Python: rank, filtered rank, log-probability, answer."
    twin, causal = multiplied(model, values), tok.mask_token is None
    def word(o): return tok(" " + o, add_special_tokens=False).input_ids[0]
    out = {}
    for f in facts:
        text = f.prompt.split("[MASK]")[0].rstrip() if causal else f.prompt.replace("[MASK]", tok.mask_token)
        ids = ([tok.bos_token_id] if causal else []) + tok(text).input_ids
        at = len(ids) - 1 if causal else ids.index(tok.mask_token_id)
        scores = twin(input_ids=torch.tensor([ids])).logits[0, at].double().tolist()
        same = [g for g in facts if (g.relation, g.subject) == (f.relation, f.subject)]
        others = {word(g.object) for g in same} - {word(f.object)}
        gold = scores[word(f.object)]
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        logsum = max(scores) + math.log(sum(math.exp(s - max(scores)) for s in scores))
        rank = 1 + sum(s > gold for s in scores)
        filtered = 1 + sum(s > gold for i, s in enumerate(scores) if i not in others)
        out[f.uuid] = (rank, filtered, gold - logsum, tok.decode([order[0]]).strip())
    return out


def assert_like(table: pd.DataFrame, wanted: dict):
    assert set(table.uuid) == set(wanted) and len(table) == len(wanted)
    for r in table.itertuples():
        rank, filtered, logprob, answer = wanted[r.uuid]
        assert (r.rank, r.filtered, r.answer) == (rank, filtered, answer)
        assert r.logprob == pytest.approx(logprob, abs=1e-4)


# ── ranks ────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("kind", ["full", "mask", "scores", "heads"])
def test_ranks_of_a_masked_model(pocket_bert, facts, space, kind):
    model, tok = pocket_bert
    under = {
        "full": None,
        "mask": Mask.random(space, 0.6, seed=1),
        "scores": Scores(space, {g.name: np.random.default_rng(0).random(g.shape) for g in space.groups}),
        "heads": Mask.random(Space.of(model, "head", layers="3-4"), 0.5, seed=0),
    }[kind]
    table = cloze(model, tok, facts, {"x": under})
    assert_like(table, by_hand(model, tok, facts, under.to("weight") if kind == "heads" else under))
    assert (table.filtered < table["rank"]).any(), "no subject with two objects tests the filter"


@pytest.mark.parametrize("masked", [False, True])
def test_ranks_of_a_causal_model(pocket_gpt2, masked):
    model, tok = pocket_gpt2
    facts = Facts(read_facts("pocket", "IsA", prompt=1).items[:6])
    mask = Mask.random(Space.of(model, "weight", layers=[2, 4]), .7, seed=1) if masked else None
    assert_like(cloze(model, tok, facts, {"x": mask}), by_hand(model, tok, facts, mask))


def test_filtering_uses_all_known_facts(pocket_bert, facts):
    model, tok = pocket_bert
    plain = by_hand(model, tok, facts)
    # one that its subject's other object precedes
    asked = next(f for f in facts if plain[f.uuid][1] < plain[f.uuid][0])
    alone, known = (cloze(model, tok, Facts((asked,)), {"x": None}, known=k) for k in (None, facts))
    assert alone.filtered[0] == alone["rank"][0] == plain[asked.uuid][0] and known.filtered[0] == plain[asked.uuid][1]


def test_equal_scores_do_not_count_against_the_answer(pocket_bert, facts):
    "With the embeddings at zero the logits are the output bias: three tokens at one, all others at zero."
    model, tok = copy.deepcopy(pocket_bert[0]), pocket_bert[1]
    def word(o): return tok(o, add_special_tokens=False).input_ids[0]
    objects = sorted({f.object for f in facts})
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.zero_()
        model.cls.predictions.bias.zero_()
        for o in objects[:3]: model.cls.predictions.bias[word(o)] = 1.0
    table = cloze(model, tok, facts, {"x": None})
    assert [r.rank for r in table.itertuples()] == [1 if r.obj in objects[:3] else 4 for r in table.itertuples()]
    assert set(table["rank"]) == {1, 4}


# ── conditions ───────────────────────────────────────────────────────────────────────────────────────────────────────

def test_every_shape_of_condition(pocket_bert, facts, space):
    model, tok = pocket_bert
    m = [Mask.random(space, .7, seed=s) for s in range(4)]
    single = {i: cloze(model, tok, facts, {"x": mask}) for i, mask in enumerate([*m, None])}
    table = cloze(model, tok, facts, {
        "one": m[0],
        "list": [m[0], m[1]],
        "dict": {"MadeOf": m[2], "IsA": m[3]},
        "lists": {"MadeOf": [m[0], m[1]], "IsA": [m[2]]},
        "nested": [m[0], {"MadeOf": m[2], "IsA": None}],
    })
    of_fact, of_answer = ["relation", "uuid", "sub", "obj"], ["rank", "filtered", "logprob", "answer"]
    assert list(table.columns) == ["under", "draw", *of_fact, *of_answer]
    wanted = {
        ("one", 0): (0, 0),
        ("list", 0): (0, 0), ("list", 1): (1, 1),
        ("dict", 0): (2, 3),
        ("lists", 0): (0, 2), ("lists", 1): (1, None),
        ("nested", 0): (0, 0), ("nested", 1): (2, 4),
    }
    assert set(zip(table.under, table.draw, strict=True)) == set(wanted)
    for (name, draw), which in wanted.items():
        for relation, i in zip(("MadeOf", "IsA"), which, strict=True):
            part = table[(table.under == name) & (table.draw == draw) & (table.relation == relation)]
            if i is None:
                assert part.empty
                continue
            plain = single[i][single[i].relation == relation]
            assert part["rank"].tolist() == plain["rank"].tolist()
            assert np.allclose(part.logprob, plain.logprob, atol=1e-4)


def test_bad_conditions(pocket_bert, pocket_gpt2, facts, space):
    model, tok = pocket_bert
    with pytest.raises(UnknownName, match="MadeOf"): cloze(model, tok, facts, {"x": {"IsA": None}})
    other = Mask.full(Space.of(pocket_gpt2[0], "weight"))
    for under in (other, [None, other], {"MadeOf": None, "IsA": [other]}):
        with pytest.raises(SpaceMismatch): cloze(model, tok, facts, {"fine": None, "x": under})


# ── averages ─────────────────────────────────────────────────────────────────────────────────────────────────────────

ITEMS = pd.DataFrame(
    [
        ("x", d, r, u, f"subject {u}", "object", k, f)
        for r, rows in {
            "A": [
                (0, "a1", 1, 1),
                (0, "a2", 3, 2),
                (0, "a3", 9, 9),
                (0, "a4", 2, 1),
                (1, "a1", 1, 1),
                (1, "a2", 1, 1),
                (1, "a3", 2, 2),
                (1, "a4", 8, 1),
            ],
            "B": [(0, "b1", 2, 1)],
        }.items()
        for d, u, k, f in rows
    ],
    columns=["under", "draw", "relation", "uuid", "sub", "obj", "rank", "filtered"],
)

@pytest.mark.parametrize("rank, k, a, b", [
    ("rank", 1, 3 / 8, 0),
    ("rank", 2, 5 / 8, 1),
    ("rank", 3, 6 / 8, 1),
    ("filtered", 1, 5 / 8, 1),
    ("filtered", 10, 1, 1),
])
def test_macro_is_the_mean_over_relations_and_micro_over_facts(rank, k, a, b):
    p = precision(ITEMS, (k,), rank).set_index("relation")
    assert p.value.to_dict() == pytest.approx({"A": a, "B": b, "macro": (a + b) / 2, "micro": (4 * a + b) / 5})
    assert p.n.to_dict() == {"A": 4, "B": 1, "macro": 5, "micro": 5} and set(p.k) == {k}
    assert (p.low <= p.value).all() and (p.value <= p.high).all()


def test_the_order_of_rows_does_not_matter():
    both = pd.concat([ITEMS, ITEMS.assign(under="y", **{"rank": 1})])
    key = ["under", "relation", "k"]
    shuffled = both.sample(frac=1, random_state=0)
    a, b = (precision(t).set_index(key).value.sort_index() for t in (both, shuffled))
    assert np.allclose(a, b) and (a["y"] == 1).all()
    with pytest.raises(UnknownName): precision(ITEMS, rank="ranks")


def test_repetitions_that_differ_in_two_ways_are_crossed():
    "Masks of four shifts from three seeds: twelve draws, but three seeds."
    rng = np.random.default_rng(0)
    seed_effect = rng.normal(0, 2, (3, 1, 1))
    hits = (seed_effect + rng.normal(0, 1, (3, 4, 20)) > 0).astype(float)
    rows = [{"under": "x", "relation": "A", "seed": s, "shift": d, "draw": 3 * d + s, "uuid": str(i), "sub": "s",
             "obj": "o", "rank": 2 - int(hits[s, d, i])} for s in range(3) for d in range(4) for i in range(20)]
    t = pd.DataFrame(rows).sample(frac=1, random_state=0)
    found = precision(t, (1,), drawn=("seed", "shift")).iloc[0]
    want = estimate([hits], ("seed", "shift", "fact"), bounds=(0, 1))
    assert found[["value", "low", "high"]].tolist() == pytest.approx([want.mean, want.low, want.high])
    alone = precision(t, (1,)).iloc[0]
    assert alone.value == found.value and found.high - found.low > 1.5 * (alone.high - alone.low)
    with pytest.raises(SubnetError, match=r"20 answers of A under 'x' are missing.*seed, shift"):
        precision(t[(t.seed != 1) | (t["shift"] != 2)], drawn=("seed", "shift"))
    with pytest.raises(UnknownName, match="column"): precision(t, drawn=("sed",))


def test_precision_of_the_model(pocket_bert, facts, space):
    model, tok = pocket_bert
    mask = Mask.random(space, .9, seed=2)
    plain = by_hand(model, tok, facts, mask)
    p = precision(cloze(model, tok, facts, {"x": mask}), (1, 2, 3, 50))
    for k in (1, 2, 3, 50):
        hits = {r: [plain[f.uuid][0] <= k for f in facts[r]] for r in facts.relations}
        value = p[p.k == k].set_index("relation").value
        assert value["macro"] == pytest.approx(np.mean([np.mean(h) for h in hits.values()]))
        assert value["micro"] == pytest.approx(np.mean([hit for of in hits.values() for hit in of]))


def test_facts_may_share_an_identifier(pocket_bert, facts):
    "Identifiers come from files; nothing promises that they are different."
    model, tok = pocket_bert
    same = Facts(tuple(Fact(f.relation, f.subject, f.object, f.prompt, "same") for f in facts))
    def value(of): return precision(cloze(model, tok, of, {"x": None}), (50,)).value.tolist()
    assert value(same) == value(facts)


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("first", [0, 2])
def test_the_monitor_is_the_table(pocket_bert, space, k, first):
    model, tok = pocket_bert
    facts = read_facts("pocket", "MadeOf")
    mask = Mask.random(space, .9, seed=0)
    score = Precision(facts, k).prepare(Context(model, tok, 1, 1, 0, first))
    for under in (None, mask):
        with torch.no_grad(), masked(model, under): now = score()
        table = precision(cloze(model, tok, facts, {"x": under}), (k,))
        assert now == pytest.approx(table[table.relation == "MadeOf"].value.item())
    assert 0 < now < 1


# ── majority ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def fact(relation, obj, n): return Fact(relation, f"s{n}", obj, "a [MASK] .", f"{relation}{n}")

def test_majority_by_hand():
    often, once = ["cup", "cup", "dog", "dog", "ant", "bee"], ["cup", "dog", "ant", "bee", "new"]
    train = Facts((*(fact("R", o, i) for i, o in enumerate(often)), fact("S", "zoo", 0)))
    test = Facts((*(fact("R", o, 10 + i) for i, o in enumerate(once)), fact("S", "cup", 1)))
    m = majority(train, test).set_index("uuid")
    # ties go by the alphabet; unseen objects are never found
    assert m["rank"].to_dict() == {"R10": 1, "R11": 2, "R12": 3, "R13": 4, "R14": 10**9, "S1": 10**9}
    assert m.answer.to_dict() == dict.fromkeys(["R10", "R11", "R12", "R13", "R14"], "cup") | {"S1": "zoo"}
    assert (m.filtered == m["rank"]).all()
    # a subject with two right objects
    two = Facts((fact("R", "dog", 20), dataclasses.replace(fact("R", "cup", 21), subject=fact("R", "dog", 20).subject)))
    assert majority(train, two).set_index("obj").filtered.to_dict() == {"dog": 1, "cup": 1}


def test_majority_of_the_pocket_facts():
    data = split(read_facts("pocket"))
    value = precision(majority(data.train, data.test), (1,)).set_index("relation").value
    shares = {}
    for r in data.test.relations:
        counts = Counter(f.object for f in data.train[r])
        best = min(o for o in counts if counts[o] == max(counts.values()))
        shares[r] = np.mean([f.object == best for f in data.test[r]])
    assert value.drop(["macro", "micro"]).to_dict() == pytest.approx(shares)
    assert value["macro"] == pytest.approx(np.mean(list(shares.values())))


# ── intervals ────────────────────────────────────────────────────────────────────────────────────────────────────────

RNG = np.random.default_rng(0)
A, B = (RNG.random((1, 80)) < .3).astype(float), (RNG.random((1, 25)) < .8).astype(float)


@pytest.mark.parametrize("level", [.95, .8])
@pytest.mark.parametrize("n, k", [(21, 0), (80, 24), (10, 10)])
def test_intervals_of_hits_are_those_of_agresti_and_coull(n, k, level):
    "With two hits and two misses more, and Student's quantile for that of the normal distribution."
    found = interval([(np.arange(n) < k).astype(float)[None]], level, bounds=(0, 1))
    p, m = (k + 2) / (n + 4), n + 4
    half = stats.t.ppf((1 + level) / 2, m - 1) * (p * (1 - p) / (m - 1)) ** .5
    assert found == pytest.approx((k / n, max(0, min(k / n, p - half)), min(1, max(k / n, p + half))))


@given(st.integers(0, 1000), st.integers(2, 4), st.integers(2, 5), st.integers(3, 6))
def test_variances_are_those_of_the_table(seed, a, b, n):
    "The analysis of variance, written out: three crossed factors, the fewest values first."
    y = np.random.default_rng(seed).normal(0, 1, (a, b, n)) + np.arange(a)[:, None, None]
    ms = anova(y)
    first, second = (0, 1) if a <= b else (1, 0)
    parts = [ms[first,], ms[second,] - ms[0, 1], ms[2,] - ms[0, 2] - ms[1, 2] + ms[0, 1, 2]]
    dfs = [y.shape[k] - 1 for k in (first, second, 2)]
    half = sum(stats.t.ppf(.975, df) ** 2 * max(v, 0) / y.size for v, df in zip(parts, dfs, strict=True)) ** .5
    found = estimate([y], ("mask", "tuning", "item"))
    assert [found.low, found.high] == pytest.approx([y.mean() - half, y.mean() + half])
    assert sum(found.shares.values()) == pytest.approx(1) and found.n == {"mask": a, "tuning": b, "item": n}


def anova(y: np.ndarray) -> dict[tuple[int, ...], float]:
    "Mean squares of all effects of a table without repetitions."
    effects: dict[tuple[int, ...], np.ndarray] = {(): np.full(y.shape, y.mean())}
    out = {}
    for k in range(1, y.ndim + 1):
        for axes in itertools.combinations(range(y.ndim), k):
            means = y.mean(tuple(i for i in range(y.ndim) if i not in axes), keepdims=True) + np.zeros(y.shape)
            effects[axes] = means - sum(effects[some] for some in effects if set(some) < set(axes))
            out[axes] = (effects[axes] ** 2).sum() / np.prod([y.shape[i] - 1 for i in axes])
    return out


def test_groups_that_share_seeds_and_groups_that_do_not():
    "A seed that moves both groups alike is not averaged out; of unlike numbers of seeds, each group has its own."
    y, z = RNG.normal(0, 1, (2, 3, 40))
    moved = np.array([-1, 0, 1.])[:, None]
    together, apart = estimate([y + moved, z + moved]), estimate([y + moved, z - moved])
    assert together.high - together.low > 3 * (apart.high - apart.low) and together.shares["seed"] > .9
    own = estimate([y + moved, (z + moved)[:2]])
    assert own.mean == pytest.approx(((y + moved).mean() + (z + moved)[:2].mean()) / 2)
    assert own.low < own.mean < own.high


@given(st.integers(0, 1000), st.floats(-.5, .5))
def test_p_values_are_those_of_the_interval(seed, shift):
    "The interval at the level 1 - p ends at 0."
    y = np.random.default_rng(seed).normal(shift, 1, (3, 20))
    p = estimate([y]).p
    found = estimate([y], level=1 - p)
    assert min(abs(found.low), abs(found.high)) < 1e-6


def test_copies_say_nothing_new():
    "Ten copies of one draw leave the interval as it is; ten copies of one item leave the spread of the draws."
    values = RNG.normal(0, 1, (1, 30))
    assert interval([np.tile(values, (10, 1))]) == pytest.approx(interval([values]))
    draws = RNG.random((8, 1))
    assert interval([np.tile(draws, (1, 40))]) == pytest.approx(interval([draws]))


def test_intervals_at_the_edges():
    assert interval([np.zeros((1, 4)), np.ones((3, 2))])[0] == .5
    assert interval([np.zeros((1, 4)), np.ones((3, 2))], pooled=True)[0] == pytest.approx(1 / 3)
    same = estimate([np.full((2, 3), .7)])
    assert (same.low, same.high) == pytest.approx((.7, .7)) and math.isnan(same.p)
    alone = estimate([np.array([[.5]])])
    assert alone.mean == .5 and all(map(math.isnan, (alone.low, alone.high, alone.p)))
    for bad in ([], [A, np.zeros((1, 0))], [A, np.zeros((0, 3))], [A[0]]):
        with pytest.raises(SubnetError, match="at least one item"): interval(bad)


# ── language and labels ──────────────────────────────────────────────────────────────────────────────────────────────

@torch.no_grad()
def plain_perplexity(model, tok, texts, values=None):
    twin, nll = multiplied(model, values), []
    for t in texts:
        ids = tok(t).input_ids
        if tok.mask_token is None:
            ids = [tok.bos_token_id, *ids]
            for i in range(1, len(ids)):
                logits = twin(input_ids=torch.tensor([ids[:i]])).logits[0, -1]
                nll.append(-logits.log_softmax(-1)[ids[i]].item())
        else:
            for i, gold in enumerate(ids):
                if gold not in (tok.cls_token_id, tok.sep_token_id):
                    hidden = [*ids[:i], tok.mask_token_id, *ids[i + 1:]]
                    logits = twin(input_ids=torch.tensor([hidden])).logits[0, i]
                    nll.append(-logits.log_softmax(-1)[gold].item())
    return math.exp(np.mean(nll))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_perplexity(request, name):
    model, tok = request.getfixturevalue(f"pocket_{name}")
    mask = Mask.random(Space.of(model, "weight", layers=4), .7, seed=0)
    for under in (None, mask):
        plain = plain_perplexity(model, tok, TEXTS, under)
        assert perplexity(model, tok, TEXTS, under) == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_perplexity_of_a_text_longer_than_the_model(request, name):
    model, tok = request.getfixturevalue(f"pocket_{name}")
    long = " ".join(TEXTS * 3)
    with pytest.raises(SubnetError, match=r"text 1 .* has .* tokens, and the model reads at most 64"):
        perplexity(model, tok, [TEXTS[0], long])
    ids = tok(long, add_special_tokens=False).input_ids
    # one for the beginning of a text, two for [CLS] and [SEP]
    room = 63 if name == "gpt2" else 62
    longest = tok.decode(ids[:room])
    assert tok(longest, add_special_tokens=False).input_ids == ids[:room]
    assert perplexity(model, tok, [long], cut=True) == pytest.approx(perplexity(model, tok, [longest]))
    with pytest.raises(SubnetError, match="has 65 tokens"): perplexity(model, tok, [tok.decode(ids[:room + 1])])


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("kind", ["words", "texts"])
def test_accuracy(request, name, kind):
    model, tok = request.getfixturevalue(f"pocket_{name}")
    examples = [s.tagged for s in read_conllu(treebank(12))] if kind == "words" else plausible(30)
    head = (Tagger if kind == "words" else Classifier)(model, examples, seed=1)
    with torch.no_grad(): head.out.weight.normal_(generator=torch.Generator().manual_seed(0))
    mask = Mask.random(Space.of(model, "weight", layers="top-half"), .5, seed=0)
    for under in (None, mask):
        twin, right = multiplied(model, under), []
        for e in examples:
            ids, rows, targets = head.encode(tok, e)
            with torch.no_grad(): states = twin.base_model(input_ids=torch.tensor([ids]))[0][0]
            right += [head.out(states[p]).argmax().item() == t for p, t in zip(rows, targets, strict=True)]
        assert accuracy(model, tok, examples, head, under) == pytest.approx(np.mean(right)) and 0 < np.mean(right) < 1


@pytest.mark.parametrize("measure", ["cloze", "perplexity", "accuracy"])
def test_numbers_do_not_depend_on_dropout(pocket_bert, facts, measure):
    "A model that comes from training is measured without it, and stays in training mode."
    model, tok = copy.deepcopy(pocket_bert[0]), pocket_bert[1]
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout): m.p = .5
    trees = [s.tagged for s in read_conllu(treebank(12))]
    head = Tagger(model, trees)
    fit(model, tok, Task(trees, head), steps=30, head_lr=.1, train="head")

    def number():
        if measure == "cloze": return cloze(model, tok, facts, {"x": None}).logprob.sum()
        if measure == "perplexity": return perplexity(model, tok, TEXTS)
        return accuracy(model, tok, trees, head)
    wanted = number()
    model.train()
    assert number() == pytest.approx(wanted, rel=1e-5) and model.training


# ── what is refused by name ──────────────────────────────────────────────────────────────────────────────────────────

def test_nothing_to_measure_is_refused(pocket_bert, pocket_gpt2, facts):
    model, tok = pocket_bert
    with pytest.raises(SubnetError, match="nothing to ask: 0 facts"): cloze(model, tok, Facts(()), {"full": None})
    with pytest.raises(SubnetError, match="under 0 conditions"): cloze(model, tok, facts, {})
    for texts in ([], [""]):
        with pytest.raises(SubnetError, match=r"no token to predict|nothing to read"): perplexity(model, tok, texts)
    with pytest.raises(SubnetError, match="no question"): plausibility(model, tok, [])
    with pytest.raises(SubnetError, match="needs a masked model"): plausibility(*pocket_gpt2, choices(1))
    empty = [{**choices(1)[0], "premise": " . "}]
    with pytest.raises(SubnetError, match="a question is ''"): plausibility(model, tok, empty)
    with pytest.raises(UnknownName, match="relation of the training facts"): majority(facts["IsA"], facts)


def test_a_fact_asked_twice_is_no_repetition(pocket_bert, facts):
    items = cloze(*pocket_bert, Facts(facts.items[:3] + facts.items[:1]), {"full": None})
    with pytest.raises(SubnetError, match="1 facts were asked twice") as e: precision(items)
    assert f"e.g. {facts.items[0].sub!r}" in str(e.value)


def test_nothing_to_measure(pocket_bert, pocket_gpt2):
    "Empty input and a diverged model are errors, not silent NaN."
    for some in (pocket_bert, pocket_gpt2):
        for texts in ([], [""]):
            with pytest.raises(SubnetError, match="no token to predict"): perplexity(*some, texts)
    model, tok = pocket_bert
    with torch.no_grad():
        broken = copy.deepcopy(model)
        next(broken.cls.parameters()).fill_(float("nan"))
    with pytest.raises(SubnetError, match="NaN or infinite logits"): perplexity(broken, tok, TEXTS[:2])
    with pytest.raises(SubnetError, match="NaN or infinite"): interval([np.array([[1., np.nan]])])
    question = dict(premise=" . ", choice1="a", choice2="b", question="cause", label=0, idx=0)
    with pytest.raises(SubnetError, match="row 0: a question is ''"): plausibility(model, tok, [question])
