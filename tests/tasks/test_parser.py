"Parser, trees, probes before a head, reset models and control tasks."
from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.nn import functional as F

from subnet_explorer.core.errors import SpaceMismatch, SubnetError, UnknownName
from subnet_explorer.core.layout import FAMILIES
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.space import Space
from subnet_explorer.data.grammar import sentences
from subnet_explorer.measure.metrics import TaskScore, accuracy, predict, task_scores
from subnet_explorer.model.apply import masked
from subnet_explorer.model.load import load, tiny
from subnet_explorer.search.find import find
from subnet_explorer.search.gates import HardConcrete
from subnet_explorer.search.objectives import Context, Density, Task
from subnet_explorer.search.prune import iterate
from subnet_explorer.search.score import importance
from subnet_explorer.tasks.controls import control_labels, reset, selectivity
from subnet_explorer.tasks.fit import fit
from subnet_explorer.tasks.heads import LowRank, Tagger, TaskHead
from subnet_explorer.tasks.parser import Biaffine, Parser, decoded, parse_scores, spanning_tree, split_sentences


def trees(n: int, seed: int) -> list[SimpleNamespace]:
    def column(sentence, key): return [t[key] for t in sentence]
    keys = dict(words="form", upos="upos", head="head", deprel="deprel")
    found = sentences(n, seed)
    return [SimpleNamespace(**{name: column(s, key) for name, key in keys.items()}) for s in found]


TRAIN, DEV = trees(300, 1), trees(80, 2)
ODD = SimpleNamespace(
    words=["the", "xqz", "cat", "ab12", "."], upos=list("DXNXP"), head=[3, 3, 0, 3, 3],
    deprel=["det", "compound", "root", "dep", "punct"],
)
SMALL = dict(arc=16, label=8, std=.1)

@pytest.fixture(scope="module")
def models(pocket_bert): return {"pocket-bert": pocket_bert, "pocket-gpt2": load("pocket-gpt2")}

@pytest.fixture(params=["pocket-bert", "pocket-gpt2"])
def name(request): return request.param

def weights(module): return {k: v.clone() for k, v in module.state_dict().items()}
def same(module, before): return all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


# ── scores and loss ──────────────────────────────────────────────────────────────────────────────────────────────────

def probed(mlp, x):
    "What a low-rank probe makes of a vector, from its matrices."
    inner = mlp.up.weight @ (mlp.down.weight @ x + mlp.down.bias) + mlp.up.bias
    return F.relu(F.layer_norm(inner, x.shape, mlp.norm.weight, mlp.norm.bias))


def by_hand(model, tok, parser, example, pool="last"):
    "Scores of a sentence, (word, head) and (word, head, label), from a plain forward pass and loops."
    ids = tok(example.words, is_split_into_words=True)
    states = model.base_model(input_ids=torch.tensor([ids.input_ids]))[0][0]
    of = [[i for i, w in enumerate(ids.word_ids()) if w == j] for j in range(len(example.words))]
    words = [states[p].mean(0) if pool == "mean" else states[p[0 if pool == "first" else -1]] for p in of]
    nodes = [states[0] if parser.root is None else parser.root[0], *words]
    if parser.mlp: nodes = [probed(parser.mlp, x) for x in nodes]
    a, b = parser.sizes
    W, bias = parser.layer.weight, parser.layer.bias
    def layer(x, start, size): return torch.relu(W[start:start + size] @ x + bias[start:start + size])
    n, k = len(words), len(parser.labels)
    def score(m, i, h, d): return h @ m.W[i] @ d + m.A[i] @ h + m.B[i] @ d + m.c[i]
    arcs, rels = torch.empty(n, n + 1), torch.empty(n, n + 1, k)
    for j, d in enumerate(nodes[1:]):
        for i, h in enumerate(nodes):
            arcs[j, i] = score(parser.arcs, 0, layer(h, 0, a), layer(d, a, a))
            for r in range(k): rels[j, i, r] = score(parser.rels, r, layer(h, 2 * a, b), layer(d, 2 * a + b, b))
    return arcs, rels


@pytest.mark.parametrize("path", ["auto", "plain"])
@pytest.mark.parametrize("options", [{}, dict(pool="mean"), dict(pool="first", mlp=3)], ids=str)
@torch.no_grad()
def test_scores_and_loss_are_those_of_loops(models, name, path, options):
    "Sentences of several lengths, words of several pieces."
    model, tok = models[name]
    data = [ODD, *sorted(DEV[:20], key=lambda s: len(s.words))[::6]]
    parser = Parser(model, data, **options, **SMALL)
    scores = list(split_sentences(predict(model, parser, [parser.encode(tok, e) for e in data], path)))
    losses = []
    for e, out in zip(data, scores, strict=True):
        arcs, rels = by_hand(model, tok, parser, e, options.get("pool", "last"))
        assert np.allclose(out[..., 0], arcs, atol=1e-4)
        assert np.array_equal(out[..., 1], rels.argmax(-1))
        gold = torch.tensor([parser.labels.index(r) for r in e.deprel])
        for j, h in enumerate(e.head):
            losses.append(F.cross_entropy(arcs[j], torch.tensor(h)) + F.cross_entropy(rels[j, h], gold[j]))
    ours = Task(data, parser).prepare(Context(model, tok, 1, len(data), 0, path=path))(0)
    assert ours.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_scores_are_initialised_as_published():
    draw = torch.Generator().manual_seed(0)
    arcs, rels = Biaffine(64, 1, draw, 1., uniform=True), Biaffine(64, 9, draw, 1.)
    assert arcs.W.abs().max() <= 1 / 8 and arcs.W.std().item() == pytest.approx(1 / 8 / 3 ** .5, rel=.05)
    assert rels.W.std().item() == pytest.approx(1, rel=.02) and rels.A.std().item() == pytest.approx(1, rel=.1)


@torch.no_grad()
def test_sentences_do_not_see_each_other(models, name):
    "Scores of a sentence are the same alone, in any company, and however many sentences are scored at a time."
    model, tok = models[name]
    parser = Parser(model, DEV, **SMALL)
    coded = [parser.encode(tok, e) for e in DEV[:24]]
    together = list(split_sentences(predict(model, parser, coded)))
    assert [p.shape[:2] for p in together] == [(len(e.words), len(e.words) + 1) for e in DEV[:24]]
    for c, p in zip(coded, together, strict=True):
        alone = predict(model, parser, [c])
        assert alone.shape == p.shape and np.allclose(alone, p, atol=1e-4)
    odd = [p[..., 0] for p in split_sentences(predict(model, parser, coded, batch=5))]
    assert all(np.allclose(a, b[..., 0], atol=1e-4) for a, b in zip(odd, together, strict=True))


def test_few_sentences_at_a_time_make_the_same_scores(models, monkeypatch):
    import subnet_explorer.tasks.parser as module
    model, tok = models["pocket-bert"]
    parser = Parser(model, DEV, **SMALL)
    coded = [parser.encode(tok, e) for e in DEV[:12]]
    whole = predict(model, parser, coded)
    monkeypatch.setattr(module, "LOGITS", 1)
    assert np.allclose(predict(model, parser, coded), whole, atol=1e-4)


def test_the_gradient_of_a_sentence_is_its_own(models):
    "No slope of one sentence's loss reaches the words of another through padding."
    model, _ = models["pocket-bert"]
    parser = Parser(model, TRAIN, **SMALL)
    states = torch.randn(4 + 9, 128, requires_grad=True)
    out = parser.fold(parser(states), [4, 9], 9)
    loss = parser.losses(out[:3], torch.tensor([[0, 1], [1, 2], [2, 0]])).sum()
    assert loss.isfinite()
    loss.backward()
    assert states.grad[:4].abs().sum(-1).gt(0).all() and not states.grad[4:].any() and states.grad.isfinite().all()


def test_labels_are_read_under_the_chosen_head(models):
    model, _ = models["pocket-bert"]
    parser = Parser(model, TRAIN, **SMALL)
    low = np.finfo(np.float32).min
    out = np.full((3, 4, 2), 7.0)
    out[..., 0] = low
    out[:2, :3, 0] = [[0, 1, 3], [5, 2, 1]]
    out[:2, :3, 1] = [[0, 1, 2], [3, 4, 5]]
    out[2, :2, 0], out[2, :2, 1] = [9, 1], [6, 1]
    assert parser.read(out) == [(2, parser.labels[2]), (0, parser.labels[3]), (0, parser.labels[6])]


@pytest.mark.parametrize("change, match", [
    (dict(head=[3, 3, 0, 3, 9]), "word 5 of 5 has the head 9"),
    (dict(head=[3, 2, 0, 3, 3]), "word 2 of 5 has the head 2"),
    (dict(head=[3, 3, -1, 3, 3]), "has the head -1"),
    (dict(head=[3, 3, 0]), "5 words has 3 heads and 5 labels"),
    (dict(deprel=["det"]), "5 words has 5 heads and 1 labels"),
    (dict(deprel=["det", "compound", "root", "dep", "punkt"]), "did you mean punct"),
    (dict(words=[], head=[], deprel=[]), "has no words"), (dict(words=["the", "", "cat", "ab12", "."]), "has no token"),
])
def test_broken_sentences_are_refused(models, change, match):
    model, tok = models["pocket-bert"]
    parser = Parser(model, [ODD], **SMALL)
    with pytest.raises(SubnetError, match=match): parser.encode(tok, SimpleNamespace(**{**vars(ODD), **change}))


def test_bad_settings_are_refused(models):
    model, tok = models["pocket-bert"]
    refused = [
        (dict(arc=0), "at least 1"), (dict(inner=1.), "below 1"), (dict(dropout=-.1), "of at least 0 and below 1"),
        (dict(mlp=0), "at least 1, got 0"), (dict(mlp=True), "got True"),
        (dict(pool="max"), "Known: last, first, mean"),
    ]
    for options, match in refused:
        with pytest.raises(SubnetError, match=match): Parser(model, TRAIN, **options)
    class Bare:
        "A tokenizer without special tokens."
        model_max_length = 64
        def __call__(self, words, **kw):
            n = len(words)
            return SimpleNamespace(input_ids=list(range(n)), word_ids=lambda: range(n))
    parser = Parser(model, TRAIN, **SMALL)
    with pytest.raises(SubnetError, match="begins with a special token"): parser.encode(Bare(), TRAIN[0])
    with pytest.raises(SubnetError, match="use task_scores"): accuracy(model, tok, TRAIN[:2], parser)
    with pytest.raises(SubnetError, match="has no measure"): task_scores(model, tok, TaskHead(model, ["a"]), [])


# ── trees ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def leads_home(heads, i):
    for _ in range(len(heads) + 1):
        if i == 0: return True
        i = heads[i - 1]
    return False


def all_trees(n):
    "Heads of every tree over n words with one word under the root."
    for heads in itertools.product(range(n + 1), repeat=n):
        if heads.count(0) != 1 or any(h == i for i, h in enumerate(heads, 1)): continue
        if all(leads_home(heads, i) for i in range(1, n + 1)): yield heads

ALL = {n: list(all_trees(n)) for n in range(1, 6)}
def test_there_are_as_many_trees_as_cayley_says(): assert [len(ALL[n]) for n in ALL] == [n ** (n - 1) for n in ALL]

def tables(numbers):
    def of_size(n):
        rows = st.lists(numbers, min_size=n * (n + 1), max_size=n * (n + 1))
        return rows.map(lambda x: np.array(x, float).reshape(n, n + 1))
    return st.integers(1, 5).flatmap(of_size)

@given(st.one_of(tables(st.integers(-3, 3)), tables(st.floats(-50, 50, width=32))))
def test_the_tree_is_the_best_of_all(scores):
    def total(heads): return scores[np.arange(len(scores)), list(heads)].sum()
    heads = spanning_tree(scores)
    assert tuple(heads) in ALL[len(scores)]
    assert total(heads) == pytest.approx(max(map(total, ALL[len(scores)])), abs=1e-6)


def test_large_trees_agree_with_networkx():
    nx, rng = pytest.importorskip("networkx"), np.random.default_rng(0)
    for n in (7, 20, 40):
        scores = rng.normal(size=(n, n + 1)) * 3
        g = nx.DiGraph()
        for d, h in itertools.product(range(n), range(n + 1)):
            if h != d + 1: g.add_edge(h, d + 1, weight=scores[d, h] - (1e3 if h == 0 else 0))
        theirs = {d: h for h, d in nx.maximum_spanning_arborescence(g).edges}
        assert spanning_tree(scores).tolist() == [theirs[d] for d in range(1, n + 1)]


def test_a_tree_of_nothing_is_refused():
    refused = [(np.zeros((0, 1)), "0 by 1"), (np.zeros(3), "found 3"), (np.full((1, 2), np.nan), "NaN or infinite")]
    for wrong, match in refused:
        with pytest.raises(SubnetError, match=match): spanning_tree(wrong)


# ── attachment ───────────────────────────────────────────────────────────────────────────────────────────────────────

def test_attachment_by_hand():
    def part(heads, labels):                       # labels: (word, head)
        return np.stack([np.eye(len(heads) + 1)[heads], np.array(labels)], -1)
    gold = [np.array([[2, 0], [0, 1]]), np.array([[2, 0], [3, 0], [0, 1], [3, 2]])]
    parts = [part([2, 0], [[0] * 3, [1] * 3]),                                         # all right
             part([2, 1, 0, 1], [[0] * 5, [0] * 5, [2] * 5, [2] * 5])]      # head; label; head, not label wrong
    t = parse_scores(gold, parts)
    macro = dict(score=(1 + .25) / 2, las=(1 + .25) / 2, uas=(1 + .5) / 2, la=(1 + .75) / 2)
    assert t == pytest.approx(macro | dict(las_micro=3 / 6, uas_micro=4 / 6, la_micro=5 / 6))
    with pytest.raises(SubnetError, match="do not belong together"): parse_scores(gold, parts[::-1])


@given(st.integers(0, 10 ** 6))
def test_las_with_labels_under_the_true_head_is_las(seed):
    rng = np.random.default_rng(seed)
    gold = [np.stack([rng.integers(0, n + 1, n), rng.integers(0, 3, n)], -1) for n in (3, 6)]
    parts = [np.stack([rng.normal(size=(n, n + 1)), rng.integers(0, 3, (n, n + 1))], -1) for n in (3, 6)]
    for tree in (False, True):
        published = []
        for p, g in zip(parts, gold, strict=True):
            right = p[np.arange(len(p)), g[:, 0], 1] == g[:, 1]
            published.append(((decoded(p, tree)[0] == g[:, 0]) & right).mean())
        assert parse_scores(gold, parts, tree)["las"] == pytest.approx(np.mean(published))


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def places(e):
    "The part of speech of each word, with the place of its head and its label."
    rows = enumerate(zip(e.upos, e.head, e.deprel, strict=True), 1)
    return [(u, (h - i if h else "root", r)) for i, (u, h, r) in rows]


def majority():
    "LAS on DEV of the most common place of the head, from the word, and label for each part of speech."
    seen = {}
    for e in TRAIN:
        for u, place in places(e): seen.setdefault(u, Counter())[place] += 1
    best = {u: c.most_common(1)[0][0] for u, c in seen.items()}
    right = [np.mean([best[u] == place for u, place in places(e)]) for e in DEV]
    return float(np.mean(right))


def test_a_probe_learns_the_pocket_treebank(models, name):
    "On held-out sentences, far above what parts of speech alone tell; the model stays as it is."
    model, tok = models[name]
    before, parser = weights(model), Parser(model, TRAIN, arc=64, label=32, std=.1)
    watch = TaskScore(DEV, parser)
    fit(model, tok, Task(TRAIN, parser), steps=200, head_lr=.01, train="head", monitor=watch, every=100)
    found = task_scores(model, tok, parser, DEV)
    assert found["las"] > majority() + .2 and found["las"] > .75 and same(model, before)
    parser.tree = True
    as_trees = task_scores(model, tok, parser, DEV)
    assert as_trees["uas"] > found["uas"] - .02
    for part in split_sentences(predict(model, parser, [parser.encode(tok, e) for e in DEV[:20]])):
        heads = decoded(part, True)[0]
        assert (heads == 0).sum() == 1


def test_a_parser_is_trained_along_with_a_gate(models, tmp_path):
    "The run keeps gate and head, and gives both back."
    model, tok = models["pocket-bert"]
    def go():
        parser = Parser(model, TRAIN, **SMALL)
        gate, goal = HardConcrete(Space.of(model, "head"), seed=1), Task(TRAIN, parser) + .5 * Density()
        how = dict(steps=12, lr=.1, head_lr=.01, batch=8, every=6, to=tmp_path, progress=False)
        run = find(model, tok, gate, goal, monitor=TaskScore(DEV[:10], parser), **how)
        return run, parser
    (run, parser), (again, loaded) = go(), go()
    assert not same(parser, Parser(model, TRAIN, **SMALL).state_dict()) and same(loaded, parser.state_dict())
    assert again.mask == run.mask
    assert run.metrics.score.tolist() == run.metrics.las.tolist() and run.metrics.uas.between(0, 1).all()
    found = task_scores(model, tok, parser, DEV[:10], run.mask)
    assert found.keys() == task_scores(model, tok, loaded, DEV[:10]).keys()


def test_heads_of_a_parser_can_be_ranked(models):
    "Importance is per sentence: a batch at once is one sentence at a time."
    model, tok = models["pocket-bert"]
    data = [e for e in DEV if len(e.words) == len(DEV[0].words)][:4]      # means of words are means of sentences
    goal, space = Task(data, Parser(model, TRAIN, **SMALL)), Space.of(model, "head+mlp")
    one, all_ = importance(model, tok, goal, space, batch=1), importance(model, tok, goal, space, batch=4)
    assert all(np.allclose(one[g.name], all_[g.name], rtol=1e-3, atol=1e-6) for g in space.groups)
    watch = TaskScore(data, goal.head)
    found = iterate(model, tok, goal, watch, Space.of(model, "mlp"), least=-1., progress=False)
    assert found.table.score.iloc[0] == pytest.approx(task_scores(model, tok, goal.head, data)["las"])


# ── dropout in heads ─────────────────────────────────────────────────────────────────────────────────────────────────

def test_dropout_is_on_in_training_only(models):
    model, tok = models["pocket-bert"]
    head = Tagger(model, TRAIN, dropout=.5)
    learning = Task(TRAIN, head).prepare(Context(model, tok, 9, 8, 0, learning=True))
    state = torch.get_rng_state()
    assert learning(0).item() == learning(0).item()      # a function of seed and step
    asking = Task(TRAIN, head).prepare(Context(model, tok, 9, 8, 0))
    assert asking(0).item() == asking(0).item() != learning(0).item() and head.rng is None
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.ones(2000, 128)
    head.rng = torch.Generator().manual_seed(0)
    dropped = head.drop(x, .25)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / .75])
    assert dropped.mean().item() == pytest.approx(1, abs=.01)


def test_training_with_dropout_continues_exactly(models, tmp_path):
    model, tok = models["pocket-bert"]
    class Stop(Exception): pass
    class Stopping(TaskScore):
        def prepare(self, context):
            of, looks = super().prepare(context), []
            def score():
                looks.append(1)
                if len(looks) == 2: raise Stop
                return of()
            return score
    def go(folder, kind=TaskScore):
        parser = Parser(model, TRAIN, **SMALL)
        how = dict(steps=9, every=3, head_lr=.01, batch=8, train="head", keep="last", checkpoint=0)
        fit(model, tok, Task(TRAIN, parser), monitor=kind(DEV[:5], parser), to=folder, **how)
        return parser
    whole = go(tmp_path / "whole")
    with pytest.raises(Stop): go(tmp_path / "parts", Stopping)
    assert same(go(tmp_path / "parts"), whole.state_dict())


# ── words and probes ─────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("pool", ["last", "first", "mean"])
@torch.no_grad()
def test_pieces_of_a_word(models, name, pool):
    model, tok = models[name]
    data = [ODD, *DEV[:3]]
    head, rows = Tagger(model, data, pool=pool), []
    for e in data:
        coded = tok(e.words, is_split_into_words=True)
        states = model.base_model(input_ids=torch.tensor([coded.input_ids]))[0][0]
        for w in range(len(e.words)):
            at = [i for i, v in enumerate(coded.word_ids()) if v == w]
            rows.append(head.out({"last": states[at[-1]], "first": states[at[0]], "mean": states[at].mean(0)}[pool]))
    assert np.allclose(predict(model, head, [head.encode(tok, e) for e in data]), torch.stack(rows), atol=1e-4)


def test_pairs_and_sentences_are_the_same_to_a_tagger(models):
    model, tok = models["pocket-bert"]
    pairs = [(e.words, e.upos) for e in DEV]
    assert [Tagger(model, DEV).encode(tok, e) for e in DEV] == [Tagger(model, pairs).encode(tok, p) for p in pairs]
    rels = Tagger(model, DEV, of="deprel")
    assert "nsubj" in rels.labels and repr(rels).endswith("of deprel)")
    with pytest.raises(SubnetError, match="2 words has 1 tags"): Tagger(model, [(["a", "b"], ["X"])])


def test_accuracy_is_the_mean_over_sentences_or_words(models):
    model, tok = models["pocket-bert"]
    data = [(["the", "cat", "."], list("DNP")), (["anna", "slept", "again", "today", "."], list("NVAAP"))]
    head = Tagger(model, data)
    gold = [head.encode(tok, e)[2] for e in data]
    out = np.eye(len(head.labels))[np.concatenate(gold)]
    out[0] = np.roll(out[0], 1)
    assert head.measure(gold, out) == pytest.approx(dict(score=(2 / 3 + 1) / 2, macro=(2 / 3 + 1) / 2, micro=7 / 8))
    assert task_scores(model, tok, head, data)["micro"] == pytest.approx(accuracy(model, tok, data, head))


RANKS = (1, 2, 5, 10, 25, 50, 125, 250, 768)


@pytest.mark.parametrize("rank, weights_, parameters", [(r, 1536 * r, 1537 * r + 2304) for r in RANKS])
def test_the_size_of_a_probe_is_as_published(rank, weights_, parameters):
    probe = LowRank(768, rank, torch.Generator().manual_seed(0))
    assert probe.complexity() == {"weights": weights_, "parameters": parameters}
    assert sum(p.numel() for p in probe.parameters()) == parameters
    assert {1: 1536, 768: 1_179_648}.get(rank, weights_) == weights_
    assert {1: 3841, 768: 1_182_720}.get(rank, parameters) == parameters


def test_a_probe_is_what_the_paper_writes(models):
    model, _ = models["pocket-bert"]
    head, x = Tagger(model, DEV, mlp=6), torch.randn(5, 128)
    p = head.mlp
    theirs = nn.Sequential(nn.Linear(128, 6), nn.Linear(6, 128), nn.LayerNorm(128), nn.ReLU())
    for ours, other in zip((p.down, p.up, p.norm), theirs, strict=False): other.load_state_dict(ours.state_dict())
    assert torch.allclose(head(x), head.out(theirs(x)), atol=1e-5)
    assert torch.linalg.matrix_rank(p.up.weight @ p.down.weight).item() == 6
    assert Tagger(model, DEV).complexity() == {"weights": 0, "parameters": 0}
    assert Parser(model, TRAIN, mlp=6, **SMALL).complexity() == head.complexity()
    assert torch.equal(Tagger(model, DEV).out.weight, head.out.weight), "a probe changes what the head begins with"
    state = torch.get_rng_state()
    assert same(Tagger(model, DEV, mlp=6), head.state_dict()) and torch.equal(torch.get_rng_state(), state)


# ── reset models ─────────────────────────────────────────────────────────────────────────────────────────────────────

def embedding_names(model):
    return {n for n, _ in model.base_model.named_parameters() if n.startswith(("embed", "wte", "wpe"))}

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", ["encoder", "all"])
@pytest.mark.parametrize("init", ["architecture", "framework"])
def test_reset_draws_and_restores(family, what, init):
    model = tiny(family)
    before, buffers = weights(model), {k: v.clone() for k, v in model.named_buffers()}
    ids = {n: id(p) for n, p in model.named_parameters()}
    old, state = {n: p.clone() for n, p in model.base_model.named_parameters()}, torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), reset(model, what, init, seed=3):
        now = dict(model.base_model.named_parameters())
        kept = embedding_names(model) if what == "encoder" else set()
        unchanged = {n for n, p in now.items() if torch.equal(p, old[n])}
        assert unchanged == kept and kept < now.keys()      # tiny weights are all random
        drawn = weights(model)
        raise ZeroDivisionError
    assert same(model, before) and all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())
    assert {n: id(p) for n, p in model.named_parameters()} == ids
    assert torch.equal(torch.get_rng_state(), state)
    with reset(model, what, init, seed=3): assert same(model, drawn)
    with reset(model, what, init, seed=4): assert not same(model, drawn)
    assert same(model, before)


@pytest.mark.parametrize("init", ["architecture", "framework"])
def test_reset_draws_from_the_distribution_of_a_new_model(models, name, init):
    "Also for weights that were loaded from files, which transformers marks as not to be touched."
    model, _ = models[name]
    new = type(model)(model.config)
    if init == "framework":
        for m in new.base_model.modules():
            if isinstance(m, (nn.Linear, nn.Embedding, nn.LayerNorm)): m.reset_parameters()
    with reset(model, "all", init):
        for (n, p), q in zip(model.base_model.named_parameters(), new.base_model.parameters(), strict=True):
            few = p.numel() ** -.5
            deviation, mean = q.std().item(), q.mean().item()
            assert p.std().item() == pytest.approx(deviation, rel=5 * few, abs=1e-6), n
            assert p.mean().item() == pytest.approx(mean, abs=7 * few * deviation), n


def test_marks_of_loaded_weights_are_put_back(models):
    model, _ = models["pocket-bert"]
    def marks(): return [getattr(t, "_is_hf_initialized", None) for t in [*model.parameters(), *model.buffers()]]
    w = model.bert.encoder.layer[0].output.dense.weight
    w._is_hf_initialized, old = True, w.clone()
    before = marks()
    with reset(model): assert not torch.equal(w, old)
    assert marks() == before


def test_masks_of_a_reset_model_are_its_own(models):
    model, _ = models["pocket-bert"]
    with reset(model, seed=1): mask = Mask.random(Space.of(model, "head"), .5, seed=0)
    with pytest.raises(SpaceMismatch), masked(model, mask): pass
    with pytest.raises(SpaceMismatch): mask & Mask.full(Space.of(model, "head"))
    with reset(model, seed=1), masked(model, mask): pass
    with pytest.raises(SpaceMismatch), reset(model, seed=2), masked(model, mask): pass


def test_less_is_found_in_a_reset_model(models):
    model, tok = models["pocket-bert"]
    def probed():
        parser = Parser(model, TRAIN, **SMALL)
        fit(model, tok, Task(TRAIN, parser), steps=80, head_lr=.01, train="head")
        return task_scores(model, tok, parser, DEV)["las"]
    trained = probed()
    with reset(model, "all"): assert probed() < trained - .05


def test_reset_refuses(models):
    model, _ = models["pocket-bert"]
    for options in (("layers",), ("all", "default")):
        with pytest.raises(UnknownName), reset(model, *options): pass


# ── control tasks ────────────────────────────────────────────────────────────────────────────────────────────────────

def test_control_tags_belong_to_word_types():
    tags = control_labels(TRAIN, seed=5)
    of = {}
    for words, labels in tags:
        for w, t in zip(words, labels, strict=True): assert of.setdefault(w, t) == t
    assert [w for w, _ in tags] == [e.words for e in TRAIN]
    held_out = control_labels(DEV, seed=5, like=TRAIN)
    assert all(of.get(w, t) == t for words, labels in held_out for w, t in zip(words, labels, strict=True))
    assert control_labels([(e.words, e.upos) for e in TRAIN], seed=5) == tags and control_labels(TRAIN, seed=6) != tags


def test_control_tags_are_as_frequent_as_real_ones():
    "By word type, over many types."
    data = [([f"w{i}" for i in range(4000)], ["A"] * 2000 + ["B"] * 1200 + ["C"] * 800)]
    counts = Counter(control_labels(data)[0][1])
    assert [counts[t] / 4000 for t in "ABC"] == pytest.approx([.5, .3, .2], abs=.03)


def test_selectivity_is_the_difference(models):
    model, tok = models["pocket-bert"]
    t = selectivity(model, tok, TRAIN[:60], DEV[:30], steps=40, head_lr=.02)
    assert t["selectivity"] == pytest.approx(t["accuracy"] - t["control"]) and 0 <= t["control"] <= 1
    head = Tagger(model, [*TRAIN[:60], *DEV[:30]])
    fit(model, tok, Task(TRAIN[:60], head), train="head", steps=40, head_lr=.02)
    assert t["accuracy"] == accuracy(model, tok, DEV[:30], head)
    mask = Mask.random(Space.of(model, "layer"), .5, seed=0)
    empty = selectivity(model, tok, TRAIN[:60], DEV[:30], under=mask, steps=40, head_lr=.02)
    assert empty != t
