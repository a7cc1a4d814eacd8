"""What works at pocket size works at the size of BERT-base and GPT-2 small, on both sides of every rule about size.

Weights are random, widths and vocabulary are real; tokenizers are those of the pocket models, whose tokens fit.
As part of the suite two recipes run on all twelve layers, and memory rules are crossed with two of them;
with --slow everything has twelve, and the other recipes and the rest of the library run, too.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from floors import any_floor

from subnet_explorer import recipes
from subnet_explorer.core.compare import jaccard_distance
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.masks import Masks, overlaps, votes
from subnet_explorer.core.scores import Scores
from subnet_explorer.core.space import Space
from subnet_explorer.data.facts import Facts, read_facts
from subnet_explorer.data.parts import task_data
from subnet_explorer.data.sentences import read_conllu
from subnet_explorer.data.texts import blocks, read_texts
from subnet_explorer.measure import decisions, patterns
from subnet_explorer.measure.attention import attention_maps
from subnet_explorer.measure.fluency import HeldOut
from subnet_explorer.model import sequences
from subnet_explorer.model.apply import masked
from subnet_explorer.model.compact import compact
from subnet_explorer.model.load import load
from subnet_explorer.search import engine, gates
from subnet_explorer.search.distil import MLM, Hidden, Maintain
from subnet_explorer.search.find import find, find_all
from subnet_explorer.search.gates import Concrete, HardConcrete, Threshold, TopK
from subnet_explorer.search.objectives import Cloze, Density
from subnet_explorer.search.score import GateImportance, importance

pytestmark = pytest.mark.real_size
HUGE = 1 << 60


@pytest.fixture(scope="module")
def layers(request) -> int:
    return 12 if request.config.getoption("--slow") else 2


def bert_of(layers: int) -> tuple[torch.nn.Module, Any]:
    "The shape of BERT-base."
    from transformers import BertConfig, BertForMaskedLM
    tok = load("pocket-bert")[1]
    tok.model_max_length = 512
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(vocab_size=30_522, num_hidden_layers=layers)).eval(), tok


def gpt2_of(layers: int) -> tuple[torch.nn.Module, Any]:
    "The shape of GPT-2 small."
    from transformers import GPT2Config, GPT2LMHeadModel
    tok = load("pocket-gpt2")[1]
    tok.model_max_length = 1024
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=layers)).eval(), tok


@pytest.fixture(scope="module")
def bert(layers):
    return bert_of(layers)


@pytest.fixture(scope="module")
def gpt2(layers):
    return gpt2_of(layers)


@pytest.fixture(scope="module")
def whole_bert():
    return bert_of(12)


@pytest.fixture(scope="module")
def texts(bert):
    "Eight blocks of 128 tokens."
    return blocks(bert[1], read_texts("pocket"), 128)[:8]


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def unchanged(model: torch.nn.Module, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def both_sides(monkeypatch, owner: Any, name: str, work: Callable[[], Any], sides: tuple[Any, Any] = (0, HUGE)) -> Any:
    "What some work gives on either side of a rule."
    found = []
    for value in sides:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            found.append(work())
    return found


def equal(one: Scores, other: Scores, rtol: float = 0.0) -> bool:
    return all(np.allclose(one[g.name], other[g.name], rtol=rtol, atol=0) for g in one.space.groups)


# ── blocks that are computed again in backward ───────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("kind", ["head+mlp", "neuron", "layer"])
def test_importance_kept_or_recomputed(bert, texts, monkeypatch, kind):
    model, tok = bert
    measure = GateImportance(model, tok, MLM(texts[:2]), Space.of(model, kind), batches=1, batch=2)
    measure.context.recompute = None
    def found(): return importance(model, tok, MLM(texts[:2]), Space.of(model, kind), batches=1, batch=2)
    kept, again = both_sides(monkeypatch, sequences, "KEPT", found, (HUGE, 0))
    assert equal(kept, again) and all(np.abs(v).sum() > 0 for v in kept.values.values())


SEARCHES = {
    "threshold": (lambda space: Threshold(space, seed=1), "weight", {}),
    "top k": (lambda space: TopK(space, .5, seed=1), "weight", {"clip": 1.0}),
    "concrete, complement": (lambda space: Concrete(space, density=.45, straight_through=True, seed=1), "weight",
                             {"complement": True}),
    "heads": (lambda space: HardConcrete(space, seed=1), "head+mlp", {}),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_searches_kept_or_recomputed(bert, texts, monkeypatch, name):
    model, tok = bert
    make, kind, more = SEARCHES[name]
    space, before = Space.of(model, kind, layers="top-half"), weights(model)
    goal = MLM(texts[:2], batch=1) + 0.1 * Density()
    def mask(): return find(model, tok, make(space), goal, steps=2, lr=.1, progress=False, **more)
    kept, again = both_sides(monkeypatch, sequences, "KEPT", mask, (HUGE, 0))
    assert kept.mask == again.mask and unchanged(model, before)
    assert kept.metrics.loss.tolist() == again.metrics.loss.tolist()


# ── other rules about size ───────────────────────────────────────────────────────────────────────────────────────────

def test_states_in_memory_or_on_disk(bert, texts, layers, monkeypatch):
    model, tok = bert
    space = Space.of(model, "head", layers=layers)
    def found(): return importance(model, tok, Hidden(texts[:2]) + Maintain(texts[:2]), space, batches=1, batch=2)
    one, other = both_sides(monkeypatch, sequences, "IN_MEMORY", found, (HUGE, 0))
    assert equal(one, other)


def test_logits_at_once_or_in_parts(bert, gpt2, texts, monkeypatch):
    for model, tok in (bert, gpt2):
        space = Space.of(model, "mlp")
        def found(): return importance(model, tok, MLM(texts[:1]), space, batches=1, batch=1)      # noqa: B023
        parts, whole = both_sides(monkeypatch, sequences, "LOGITS", found, (16 * 30_522, HUGE))
        assert equal(parts, whole, rtol=1e-3)


def test_small_groups_together_or_one_by_one(bert, monkeypatch):
    space = Space.of(bert[0], "neuron")
    def values(): return HardConcrete(space, seed=3).sample()
    one, other = both_sides(monkeypatch, gates, "SMALL", values)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_pieces_of_a_matrix(bert, texts, monkeypatch):
    "Noise and pressure are applied piece by piece; a matrix of the pocket models is one piece."
    model, tok = bert
    space = Space.of(model, "weight", layers=1)
    goal = MLM(texts[:1], batch=1) + 0.1 * Density()
    def logits():
        gate = Concrete(space, seed=2)
        find(model, tok, gate, goal, steps=2, lr=.1, progress=False)
        return gate.scores()
    one, other = both_sides(monkeypatch, engine, "PIECE", logits, (1 << 14, HUGE))
    assert equal(one, other)


@pytest.mark.slow
def test_engines_agree(bert, texts):
    model, tok = bert
    space = Space.of(model, "weight", layers=1)
    def mask(how):
        gate = Threshold(space, seed=0)
        return find(model, tok, gate, MLM(texts[:1], batch=1), steps=3, lr=1e-3, engine=how, progress=False).mask
    wanted = mask("all")
    assert mask("reachable") == wanted
    assert jaccard_distance(mask("plain"), wanted) < 1e-4


@pytest.mark.slow
def test_searches_that_share_passes(bert):
    model, tok = bert
    facts = Facts(tuple(read_facts("pocket", "MadeOf").items[:8]))
    space = Space.of(model, "weight", layers="top-half")
    goals, settings = [Cloze(facts), Cloze(facts)], {"steps": 2, "batch": 4, "progress": False}
    team = find_all(model, tok, [Threshold(space, seed=s) for s in (0, 1)], goals, **settings)
    alone = [find(model, tok, Threshold(space, seed=s), goals[s], **settings) for s in (0, 1)]
    for one, other in zip(team, alone, strict=True): assert jaccard_distance(one.mask, other.mask) < 1e-3


@pytest.mark.slow
def test_long_sentences_in_any_batch(bert, texts):
    model, tok = bert
    long = blocks(tok, read_texts("pocket") * 4, 512)[:2]
    mask = Mask.random(Space.of(model, "head"), .5, seed=0)
    for part in (texts[:3], long):
        losses = [HeldOut(model, tok, Hidden(part), batch=n)(mask) for n in (1, 2)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_masks_of_many_weights(bert):
    "Choosing, counting and comparing in blocks, against plain numpy."
    space = Space.of(bert[0], "weight", layers=1)
    rng = np.random.default_rng(0)
    scores = [Scores(space, {g.name: rng.standard_normal(g.shape).astype(np.float32) for g in space.groups})
              for _ in range(3)]
    masks = [s.top(.3) for s in scores]
    flat = [np.concatenate([s[g.name].ravel() for g in space.groups]) for s in scores]
    bits = [np.concatenate([m[g.name].ravel() for g in space.groups]) for m in masks]
    for x, kept in zip(flat, bits, strict=True):
        assert kept.sum() == round(.3 * len(x)) and x[kept].min() >= x[~kept].max()
    shared = overlaps(Masks([({"seed": i}, m) for i, m in enumerate(masks)])).sum(2)
    assert shared.tolist() == [[int((a & b).sum()) for b in bits] for a in bits]
    counts = votes(Masks([({"seed": i}, m) for i, m in enumerate(masks)])).sum(0)
    assert counts.tolist() == np.bincount(np.sum(bits, 0), minlength=4).tolist()


@pytest.mark.slow
def test_compact(bert, texts):
    model = bert[0]
    mask = Mask.random(Space.of(model, "head+mlp+neuron"), .7, seed=0)
    ids = torch.as_tensor(texts.ids[:1].astype(np.int64))
    with torch.no_grad(), masked(model, mask): wanted = model(input_ids=ids).logits
    small = compact(model, mask)
    with torch.no_grad(): got = small.model(input_ids=ids).logits
    assert (got - wanted).abs().max() < 1e-3


@pytest.mark.slow
def test_patterns_of_long_texts(bert, monkeypatch):
    model, tok = bert
    texts = ["the robin met a girl near the park . " * n for n in (2, 14)]
    maps = attention_maps(model, tok, texts)
    cnn = patterns.classifier()
    long = [m for layer in maps[1][0][:1] for m in layer[:4]]
    together, apart = cnn.probabilities(long), np.concatenate([cnn.probabilities([m]) for m in long])
    assert len(long[0]) > 100 and np.allclose(together, apart, atol=1e-5)
    table = decisions.decide(model, tok, texts)
    assert len(table) == 2 * len(maps[0][0]) * 12


# ── every recipe once ────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.slow
def test_tickets_kept_or_recomputed(bert, monkeypatch):
    any_floor(monkeypatch)
    data = task_data("pocket:entails", train=8, test=8, limit_search=8)
    def masks():
        study = recipes.tickets(*bert, {"entails": data}, kind="head+mlp", seeds=(0,), epochs=1, lr=1e-4, batch=8,
                                drop=.45, floor=.01, supers=False, progress=False)
        return study.good[0], study.scores.score.tolist()
    kept, again = both_sides(monkeypatch, sequences, "KEPT", masks, (HUGE, 0))
    assert kept == again


def test_tickets(whole_bert, monkeypatch):
    any_floor(monkeypatch)
    data = task_data("pocket:entails", train=8, test=8, limit_search=8)
    study = recipes.tickets(*whole_bert, {"entails": data}, kind="head+mlp", seeds=(0,), epochs=1, lr=1e-4, batch=8,
                            drop=.9, floor=.01, supers=False, progress=False)
    assert study.good[0].density < 1 and study.scores.score.between(0, 1).all()


def test_lamp(whole_bert):
    facts = read_facts("pocket")
    some = Facts(tuple(f for r in ("MadeOf", "IsA") for f in facts[r].items[:20]))
    study = recipes.lamp(*whole_bert, some, steps=2, batch=8, random=1, progress=False)
    assert {m.space.layers[-1] for _, m in study.masks} == {whole_bert[0].config.num_hidden_layers - 1}
    assert set(study.items.under) == {"full", "subnetwork", "random", "mismatched", "majority"}


@pytest.mark.slow
def test_tamt(whole_bert, texts):
    study = recipes.tamt(*whole_bert, texts[:2], texts[4:5], densities=(.5,), methods=("omp", "mlm+kd"), steps=2,
                         batch=1, lr=.05, snapshots=0, embeddings=False, progress=False)
    omp, trained = (study.masks.sel(method=m)[0] for m in ("omp", "mlm+kd"))
    assert omp != trained and all(round(m.density, 6) == .5 for m in (omp, trained))
    assert np.isfinite(study.scores[["mlm_loss", "hidden_loss"]]).all(axis=None)


@pytest.mark.slow
def test_critical():
    gpt2 = gpt2_of(12)
    facts = Facts(tuple(f for f in read_facts("pocket", prompt=1) if f.prompt.endswith("[MASK] .")))
    target, control = Facts(facts.items[:6]), Facts(facts.items[100:115])
    text = blocks(gpt2[1], read_texts("pocket"), 64)[:10]
    study = recipes.critical(*gpt2, target, control, text, steps=2, batches=(8, 2), checks=1, seeds=(0,), random=1,
                             progress=False)
    assert 0 < study.masks[0].density < 1 and np.isfinite(study.items[["logprob", "nll"]]).all(axis=None)


@pytest.mark.slow
def test_probe(whole_bert):
    train, dev = (read_conllu("pocket", part=part)[:6] for part in ("train", "dev"))
    study = recipes.probe(*whole_bert, "pos", train, dev, granularity=("neuron", "weight"), steps=2, lr=1.0, batch=6,
                          ranks=(8,), baselines=("mlp", "linear"), progress=False)
    assert set(study.scores.granularity.dropna()) >= {"neuron", "weight"}
    assert study.scores.score.between(0, 1).all() and all(0 < m.density < 1 for _, m in study.masks)
