"""Suppress, Maintain and MLM: fused losses and slopes equal naive ones, also where the head itself is masked.

Blocks of text; where a fact is read.
"""
from __future__ import annotations

import copy
import gzip

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from subnet_explorer.core.errors import SubnetError
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.space import Space
from subnet_explorer.data.facts import Facts, encode, read_facts
from subnet_explorer.data.files import BadTexts
from subnet_explorer.data.grammar import sentences
from subnet_explorer.data.texts import Blocks, blocks, read_texts
from subnet_explorer.measure.fluency import perplexity
from subnet_explorer.model import packed, sequences
from subnet_explorer.model.apply import masked
from subnet_explorer.model.load import load, tiny
from subnet_explorer.model.sequences import LossWithSlope, Prompts, Sequences, output_learns, row_losses
from subnet_explorer.search.distil import MLM, Maintain, Reference, Suppress, from_goal, from_uniform
from subnet_explorer.search.find import find
from subnet_explorer.search.gates import Concrete, Threshold
from subnet_explorer.search.loop import frozen
from subnet_explorer.search.objectives import Context, look_ahead

FACTS = Facts(read_facts("pocket", "IsA", prompt=1).items[:20])
TEXTS = [" ".join(t["form"] for t in s) for s in sentences(24)]
IDS = [[7, 12, 33, 5, 21, 9], [30, 6], [6, 25, 11, 9], [3, 4, 5]]


@pytest.fixture(scope="module", params=["pocket-bert", "pocket-gpt2"])
def world(request):
    model, tok = load(request.param)
    with frozen(model): yield model, tok


def ready(objective, world, **options):
    "The loss of an objective, after what it wants to see of the full model."
    context = Context(*world, steps=4, batch=8, seed=0, **options)
    loss = objective.prepare(context)

    def at(step: int) -> torch.Tensor:
        look_ahead(context, step)
        return loss(step)

    return at


def top_half(model): return Space.of(model, "weight", layers="top-half")


# ── fused rows ───────────────────────────────────────────────────────────────────────────────────────────────────────

LOSSES = {
    "to uniform": lambda logits, goal, gold: LossWithSlope.apply(logits, *from_uniform(logits)),
    "to goal": lambda logits, goal, gold: LossWithSlope.apply(logits, *from_goal(goal, logits)),
    "cross-entropy": lambda logits, goal, gold: F.cross_entropy(logits, gold, reduction="none"),
}


def to_uniform(logits, goal=None, gold=None):
    size = logits.shape[-1]
    return (1 / size * (-np.log(size) - logits.log_softmax(-1))).sum(-1)


def to_goal(logits, goal, gold=None):
    return (goal.softmax(-1) * (goal.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)


def cross_entropy(logits, goal, gold):
    return -logits.log_softmax(-1).gather(1, gold[:, None])[:, 0]


NAIVE = {"to uniform": to_uniform, "to goal": to_goal, "cross-entropy": cross_entropy}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rows", [1, 3, None])
def test_chunked_rows_equal_naive_rows(world, name, rows):
    "Losses and gradients of hidden states, whatever each row weighs, through a head with a bias and one without."
    seqs = Sequences(world[0], IDS)
    rng = torch.Generator().manual_seed(0)
    h = torch.randn(7, seqs.layout.hidden, generator=rng).requires_grad_()
    goal = seqs.predict(torch.randn(7, seqs.layout.hidden, generator=rng)).detach()
    gold, weight = torch.arange(7) + 5, torch.rand(7, generator=rng)

    def loss(logits, part): return LOSSES[name](logits, goal[part], gold[part])
    def slope(losses): return torch.autograd.grad((losses * weight).sum(), h, retain_graph=True)[0]

    got, want = row_losses(seqs, h, loss, rows), NAIVE[name](seqs.predict(h), goal, gold)
    assert torch.allclose(got, want, atol=1e-6, rtol=1e-5)
    assert torch.allclose(slope(got), slope(want), atol=1e-6, rtol=1e-5)
    with torch.no_grad(): assert torch.allclose(row_losses(seqs, h, loss, rows), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_head_that_is_trained_gets_its_gradient(name):
    model = tiny("bert")
    seqs, h = Sequences(model, IDS), torch.randn(7, 16, requires_grad=True)
    goal, gold = torch.randn(7, seqs.predict(h).shape[-1]), torch.arange(7)
    weight = model.get_output_embeddings().weight
    assert output_learns(seqs)
    got = row_losses(seqs, h, lambda logits, p: LOSSES[name](logits, goal[p], gold[p]), 2).sum()
    want = NAIVE[name](seqs.predict(h), goal, gold).sum()
    ours, naive = (torch.autograd.grad(loss, [h, weight]) for loss in (got, want))
    for a, b in zip(ours, naive, strict=True): assert torch.allclose(a, b, atol=1e-5)


@given(st.integers(1, 9), st.integers(2, 40), st.floats(0.01, 30), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_divergences_are_those_of_double_precision(rows, size, scale, seed):
    goal, logits = scale * torch.randn(2, rows, size, generator=torch.Generator().manual_seed(seed))
    for got, wanted in ((from_goal(goal.clone(), logits), to_goal), (from_uniform(logits), to_uniform)):
        x = logits.double().requires_grad_()
        exact = wanted(x, goal.double())
        assert torch.allclose(got[0].double(), exact, atol=1e-5, rtol=1e-5)
        assert torch.allclose(got[1].double(), torch.autograd.grad(exact.sum(), x)[0], atol=1e-6)


def test_no_logits_of_all_rows_exist(world, monkeypatch):
    "Neither forward nor backward, on either side."
    monkeypatch.setattr(sequences, "LOGITS", 4 * len(world[1]))
    largest, original = [], Sequences.predict
    model, tok = world
    kept = []

    def counting(self, states):
        largest.append(len(states))
        return original(self, states)

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    monkeypatch.setattr(Sequences, "predict", counting)
    gate, goal = Threshold(top_half(model)), 1.5 * Suppress(FACTS) + Maintain(TEXTS)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        find(model, tok, gate, goal, steps=1, batch=8, progress=False)
    assert max(largest) == 4
    assert len(largest) > 10
    assert max(kept) <= max(p.numel() for p in model.parameters())


# ── what is maintained ───────────────────────────────────────────────────────────────────────────────────────────────

def naive_step(model, tok, gate, facts, texts, causal):
    """1.5 Suppress + Maintain(facts) + Maintain(texts) of all examples, by two models, full logits and autograd.

    Loss and gradients of the gate's logits.
    """
    full = copy.deepcopy(model)
    values = gate.values(range(len(gate.logits)))
    names = {id(p): n for n, p in model.named_parameters()}
    weights = {}
    for g in gate.space.groups:
        weight = model.base_model.get_parameter(g.name)
        weights[names[id(weight)]] = weight.detach() * values[g.name]

    def run(ids):
        inputs = dict(input_ids=torch.tensor([ids]))
        ours = torch.func.functional_call(model, weights, kwargs=inputs, tie_weights=True)
        return ours.logits[0], full(**inputs).logits[0].detach()

    asked = [(run(ids), place) for ids, place, _ in (encode(tok, f, causal) for f in facts)]
    a = torch.stack([to_uniform(ours[p][None])[0] for (ours, _), p in asked]).mean()
    b = torch.stack([to_goal(ours[p][None], goal[p][None])[0] for (ours, goal), p in asked]).mean()
    start = [tok.bos_token_id] if causal else []
    c = torch.cat([to_goal(*run(start + tok(text).input_ids)) for text in texts]).mean()
    loss = 1.5 * a + b + c
    return loss.item(), torch.autograd.grad(loss, list(gate.logits))


@pytest.mark.parametrize("engine", ["plain", "all"])
@pytest.mark.parametrize("embeddings", [False, True], ids=["head kept", "head masked"])
def test_a_step_is_that_of_two_models_with_full_logits(world, engine, embeddings, monkeypatch):
    "Also where the gate masks the embedding to which the head is tied: the reference keeps the full head."
    monkeypatch.setattr(sequences, "LOGITS", 3 * len(world[1]))
    model, tok = world
    facts, texts = Facts(FACTS.items[:5]), TEXTS[:4]
    space = Space.of(model, "weight", layers=None if embeddings else "top-half", embeddings=embeddings)

    def make(): return Threshold(space, .1, seed=3)

    loss, grads = naive_step(model, tok, make(), facts, texts, "gpt2" in type(model).__name__.lower())
    gate, goal = make(), 1.5 * Suppress(facts) + Maintain(facts) + Maintain(texts)
    plain = dict(steps=1, every=1, lr=1.0, schedule="constant", warmup=0, batch=50, progress=False)
    run = find(model, tok, gate, goal, engine=engine, **plain)
    assert abs(run.metrics.loss.iloc[0] - loss) < 1e-5
    pairs = zip(gate.logits, make().logits, strict=True)
    first = torch.cat([(logit - start.detach()).flatten() for logit, start in pairs])
    grads = torch.cat([g.flatten() for g in grads])
    clear = grads.abs() > 1e-5
    assert clear.sum() > 1000
    agree = torch.sign(first) == -torch.sign(grads)      # Adam's first step is minus the sign of the gradient
    assert agree[clear].float().mean() > .9999


def test_the_reference_is_read_once_per_sequence(world, monkeypatch):
    model, tok = world
    seen, original = [], Sequences.hidden

    def spy(self, index, *args, **kw):
        if not torch.is_grad_enabled(): seen.extend(index)
        return original(self, index, *args, **kw)

    monkeypatch.setattr(Sequences, "hidden", spy)
    gate = Threshold(top_half(model))
    find(model, tok, gate, Maintain(TEXTS), steps=9, batch=8, progress=False)      # three times all texts
    assert sorted(seen) == list(range(len(TEXTS)))


def test_the_reference_may_lie_on_disk(world, monkeypatch):
    model, tok = world

    def search():
        gate, goal = Threshold(top_half(model)), Maintain(TEXTS) + Maintain(FACTS)
        return find(model, tok, gate, goal, steps=4, every=1, batch=8, progress=False)

    here = search()
    monkeypatch.setattr(sequences, "IN_MEMORY", 64)
    there = search()
    assert here.mask == there.mask
    assert list(here.metrics.loss) == list(there.metrics.loss)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_computed_again_is_the_same_to_the_bit(world, precision):
    "Blocks that are run twice do not count twice: a matrix is used when its last gradient is there, of all terms."
    model, tok = world
    goal = Suppress(FACTS) + Maintain(TEXTS) + MLM(TEXTS)
    space = Space.of(model, "weight+head", layers="top-half")
    same = dict(steps=4, every=1, batch=8, complement=True, precision=precision, progress=False)
    kept, recomputed = (
        find(model, tok, Concrete(space, .5, straight_through=True), goal, recompute=r, **same) for r in (False, True)
    )
    assert kept.mask == recomputed.mask
    assert list(kept.metrics.loss) == list(recomputed.metrics.loss)
    assert kept.id == recomputed.id


@pytest.mark.parametrize("asked", [None, True, False])
def test_long_texts_are_computed_again_by_themselves(world, asked, monkeypatch):
    "What would keep too much is, and what keeps little is not, unless one says so."
    model, _ = world
    seqs, calls, original = Sequences(model, IDS, recompute=asked), [], packed.recomputed

    def counting(f, *args):
        calls.append(f)
        return original(f, *args)

    monkeypatch.setattr(packed, "recomputed", counting)
    index, per_token = np.arange(len(IDS)), 4 * 32 * seqs.layout.hidden * seqs.layout.n_layers
    for kept in (per_token * 14, per_token * 15):
        calls.clear()
        monkeypatch.setattr(sequences, "KEPT", kept)
        seqs.hidden(index, [0], [1])
        assert bool(calls) == (asked if asked is not None else kept < per_token * sum(map(len, IDS)))
        calls.clear()
        with torch.no_grad(): seqs.hidden(index, [0], [1])
        assert not calls


def test_lower_precision_stays_close(world):
    model, tok = world
    space, goal = top_half(model), Suppress(FACTS) + Maintain(TEXTS) + Maintain(FACTS)
    same = dict(steps=3, every=1, batch=8, progress=False)
    exact, rough = (find(model, tok, Threshold(space, .1), goal, precision=p, **same) for p in ("float32", "bfloat16"))
    assert np.allclose(exact.metrics.loss, rough.metrics.loss, rtol=.05)


# ── blocks ───────────────────────────────────────────────────────────────────────────────────────────────────────────

@given(st.integers(4, 64), st.integers(1, 24))
@settings(max_examples=25, deadline=None)
def test_blocks_hold_every_token_once(size, n):
    tok = load("pocket-gpt2")[1]
    ids = [i for t in TEXTS[:n] for i in tok(t, add_special_tokens=False).input_ids]
    if len(ids) < size:
        with pytest.raises(BadTexts, match=f"have {len(ids)} tokens.*size={len(ids)} or less"):
            blocks(tok, TEXTS[:n], size)
        assert len(blocks(tok, TEXTS[:n], len(ids))) == 1
    else:
        cut = blocks(tok, TEXTS[:n], size)
        assert cut.ids.ravel().tolist() == ids[:len(ids) - cut.dropped]
        assert cut.dropped < size == cut.size
        assert cut.fingerprint == blocks(tok, TEXTS[:n], size).fingerprint
        assert cut.fingerprint != Blocks(cut.ids[:, ::-1], 0).fingerprint


def test_blocks_are_what_they_are_cut_from():
    "A block as such, and a sentence of the same tokens, cost the same; perplexity is Hugging Face's."
    world = model, tok = load("pocket-gpt2")
    cut = blocks(tok, TEXTS, 16)
    with torch.no_grad():
        x = torch.tensor(cut.ids).long()
        logits = model(input_ids=x).logits
        nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        assert abs(ready(MLM(cut, batch=len(cut)), world)(0).item() - nll.item()) < 1e-5
        assert abs(perplexity(model, tok, cut) - nll.exp().item()) < 1e-3 * nll.exp().item()
    assert MLM(cut).identity() != MLM(cut[:2]).identity()
    assert Maintain(cut).identity()["what"] == cut.fingerprint


def test_blocks_maintain_every_position(world):
    model, tok = world
    cut = blocks(tok, TEXTS, 16)[:3]
    seqs = Sequences(model, cut.ids.tolist(), recompute=None)
    reference = Reference(seqs, [range(16)] * 3, Context(model, tok, 1, 3, 0))
    reference.compute_missing(np.arange(3))
    space = Space.of(model, "head")
    inputs = dict(input_ids=torch.tensor(cut.ids).long())
    with torch.no_grad():
        full = model(**inputs).logits
        with masked(model, Mask.random(space, .5, seed=0)):
            got, want = reference.distance(np.arange(3)), to_goal(model(**inputs).logits, full).flatten()
    assert got.shape == (48,)
    assert got.min() > 0
    assert torch.allclose(got, want, atol=1e-5, rtol=1e-4)


SIZES = [(1, "needs at least 2"), (65, "longer than the 64"), (10**6, "longer than the 64")]


@pytest.mark.parametrize("size, says", SIZES)
def test_block_sizes_are_checked(size, says):
    with pytest.raises(BadTexts, match=says): blocks(load("pocket-gpt2")[1], TEXTS, size)


def test_blocks_of_another_model_are_refused(world):
    _, tok = world
    long, unknown = np.ones((2, 600), np.int32), np.full((2, 8), 10**6, np.int32)
    for bad, says in ((Blocks(long, 0), "reads at most"), (Blocks(unknown, 0), r"knows .* tokens")):
        with pytest.raises(SubnetError, match=says): ready(Maintain(bad), world)
    with pytest.raises(BadTexts, match="longer than the 64"): blocks(tok, "one text")


BAD = [
    (None, 'give "pocket"'),
    (b"", "is empty"),
    (b" \n\n", "is empty"),
    (b"ab\0c", "binary file"),
    (b"\xff\xfe\x00", "save it as UTF-8"),
    (b"\x1f\x8bnonsense", "compressed with gzip"),
]


@pytest.mark.parametrize("content, says", BAD)
def test_bad_texts_are_named(tmp_path, content, says):
    if content is not None: (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(BadTexts, match=says): read_texts(tmp_path / "a.txt")


def test_texts_from_folders_and_compressed_files(tmp_path):
    with pytest.raises(BadTexts, match=r"holds no \.txt"): read_texts(tmp_path)
    (tmp_path / "b.txt").write_text("second\n", encoding="utf-8-sig")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"first\r\n\r\nfirst again"))
    (tmp_path / "notes.md").write_text("no")
    assert read_texts(tmp_path) == ["first", "first again", "second"]
    (tmp_path / "a.txt.gz").write_bytes(b"plain")
    with pytest.raises(BadTexts, match="gzip-compressed"): read_texts(tmp_path)
    with pytest.raises(BadTexts, match="cannot load the data set"):
        read_texts(f"datasets:{tmp_path / 'nowhere'}/x")


# ── where a fact is read ─────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("make", [Suppress, Maintain])
def test_only_the_published_position_misses_the_prediction_of_the_answer(make, monkeypatch):
    """The off-by-one of the released code.

    With the row that predicts the tail perturbed and nothing else, the default reacts and at_tail does not; and the
    other way round.
    """
    world = model, tok = load("pocket-gpt2")
    fact = Facts(FACTS.items[:1])
    _, place, _ = encode(tok, fact.items[0], True)
    original, perturbed_row, moved = Sequences.hidden, None, []

    def perturbed(self, index, batch, position, *args, **kw):
        states = original(self, index, batch, position, *args, **kw)
        if perturbed_row is None: return states
        hit = torch.as_tensor(np.asarray(position) == perturbed_row)[:, None]
        return torch.where(hit, -states, states)

    monkeypatch.setattr(Sequences, "hidden", perturbed)
    for row in (place, place + 1):
        for position in ("predict_tail", "at_tail"):
            with frozen(model), torch.no_grad():
                perturbed_row = None
                loss = ready(make(fact, position=position), world)
                before = loss(0).item()
                perturbed_row = row
                moved.append(abs(loss(0).item() - before) > 1e-3)
    assert moved == [True, False, False, True]


def test_at_the_tail_the_answer_is_read():
    model, tok = load("pocket-gpt2")
    p = Prompts(model, tok, FACTS, position="at_tail")
    with torch.no_grad():
        for i, f in enumerate(FACTS.items[:4]):
            ids, _, gold = encode(tok, f, True)
            want = model(input_ids=torch.tensor([[*ids, gold]])).logits[0, -1]
            assert torch.allclose(p.logits(np.array([i]))[0], want, atol=1e-4)
            assert p.gold[i] == gold


def test_positions_are_recorded_only_if_unusual(world):
    for make in (Suppress, Maintain):
        assert "position" not in make(FACTS).identity()
        assert make(FACTS, position="at_tail").identity()["position"] == "at_tail"
        with pytest.raises(SubnetError, match="did you mean at_tail"): make(FACTS, position="at_tale").identity()
    usual = {"objective": "Suppress", "facts": FACTS.fingerprint, "n": len(FACTS), "batch": None}
    assert Suppress(FACTS).identity() == usual
    with pytest.raises(SubnetError, match="about facts"): ready(Maintain(TEXTS, position="at_tail"), world)
    if "Bert" in type(world[0]).__name__:
        for make in (Suppress, Maintain):
            with pytest.raises(SubnetError, match="is a masked model"):
                ready(make(FACTS, position="at_tail"), world)
