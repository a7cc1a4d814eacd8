"Importance in its published readings, and pruning step by step, against plain loops."
from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from subnet_explorer import score
from subnet_explorer.model.apply import applied, masked
from subnet_explorer.data.facts import Facts, encode, read_facts
from subnet_explorer.measure.ask import Precision
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.scores import Scores
from subnet_explorer.search.objectives import Cloze, batch_at
from subnet_explorer.model.sequences import Sequences
from subnet_explorer.core.masks import Masks
from subnet_explorer.search.prune import _ladder, matched_controls, iterate, without_lowest, super_survivors
from subnet_explorer.search.score import example_gradients, importance, normalised
from subnet_explorer.core.space import Space
from subnet_explorer.core.errors import SubnetError, UnknownName
from subnet_explorer.core.store import OtherRun, Store


@pytest.fixture(scope="module")
def bert(pocket_bert): return pocket_bert

@pytest.fixture(scope="module")
def facts(): return Facts(read_facts("pocket", "MadeOf,IsA", prompt=1).items[::20][:24])


# ── importance ───────────────────────────────────────────────────────────────────────────────────────────────────────

def by_hand(model, tok, facts, mode, batch, under=None):
    "Head gates as plain tensors, one backward per batch; for `cumulative` the gradient buffer is never cleared."
    at = lambda i: torch.ones(4) if under is None else torch.as_tensor(under[f"layer.{i}.head"]).float()
    xi = [at(i).requires_grad_() for i in range(4)]
    hooks = [model.bert.encoder.layer[i].attention.output.dense.register_forward_pre_hook(lambda m, a, i=i: (a[0] * xi[i].repeat_interleave(32),)) for i in range(4)]
    coded = [encode(tok, f, False) for f in facts]
    steps, total = -(-len(facts) // batch), torch.zeros(4, 4)
    for t in range(steps):
        index = batch_at(t, np.array([len(c[0]) for c in coded]), batch, 0)
        loss = torch.stack([F.cross_entropy(model(input_ids=torch.tensor([coded[i][0]])).logits[0, coded[i][1]], torch.tensor(coded[i][2])) for i in index]).mean()
        grads = torch.autograd.grad(loss, xi)
        for g, x in zip(grads, xi): x.grad = g if mode == "batch" or x.grad is None else x.grad + g
        total += torch.stack([x.grad for x in xi]).abs() / steps
    for h in hooks: h.remove()
    return total.numpy()


@pytest.mark.parametrize("mode", ["batch", "cumulative"])
@pytest.mark.parametrize("batch", [24, 7])
def test_published_modes(bert, facts, mode, batch):
    got = importance(*bert, Cloze(facts), Space.of(bert[0], "head"), None, batch, mode=mode)
    assert np.allclose(np.stack(list(got.values.values())), by_hand(*bert, facts, mode, batch), rtol=2e-3, atol=1e-6)


def test_example_importance_does_not_depend_on_the_batch_and_the_others_do(bert, facts):
    space = Space.of(bert[0], "head+mlp")
    at = lambda mode, batch: np.concatenate([v for v in importance(*bert, Cloze(facts), space, None, batch, mode=mode).values.values()])
    assert np.allclose(at("example", 24), at("example", 5), rtol=1e-3, atol=1e-7)
    for mode in ("batch", "cumulative"): assert not np.allclose(at(mode, 24), at(mode, 5), rtol=.05)
    assert (at("batch", 24) <= at("example", 24) + 1e-7).all()                      # |mean| ≤ mean of |.|


def test_example_importance_does_not_depend_on_the_order(bert, facts):
    space = Space.of(bert[0], "head+mlp")
    turned = Facts(facts.items[::-1])
    for batch in (24, 7):
        one, two = (importance(*bert, Cloze(f), space, None, batch, seed=seed) for f, seed in ((facts, 0), (turned, 3)))
        assert all(np.allclose(one[g.name], two[g.name], rtol=1e-3, atol=1e-7) for g in space.groups)


@pytest.mark.parametrize("kind", ["head+mlp", "neuron", "layer"])
def test_gates_that_are_removed_have_the_gradient_of_a_product(bert, kind):
    "Padded, with token axis: against gates that are multiplied in."
    model, tok = bert
    x = tok(["the cat slept .", "anna walked in the garden ."], padding=True, return_tensors="pt")
    space = Space.of(model, kind)
    under = Mask.random(space, .6, seed=1)
    loss = lambda: F.cross_entropy(model(**x).logits[:, 2], torch.tensor([7, 90]))
    values = {g.name: torch.as_tensor(under[g.name]).float().repeat(2, 1).requires_grad_() for g in space.groups}
    with applied(model, space, values): wanted = torch.autograd.grad(2 * loss(), list(values.values()))
    got = example_gradients(model, space, loss, under)
    for g, w in zip(space.groups, wanted): assert got[g.name].shape == (2, g.size) and torch.allclose(got[g.name], w, rtol=1e-4, atol=1e-6)


def test_terms_with_batches_of_different_sizes_count_by_their_own(bert, facts):
    space = Space.of(bert[0], "head")
    few, many = Cloze(Facts(facts.items[:4])), Cloze(facts)
    both, one, two = (importance(*bert, goal, space, 1, 24) for goal in (few + many, few, many))
    assert both.meta["examples"] == 28
    assert all(np.allclose(28 * both[g.name], 4 * one[g.name] + 24 * two[g.name], rtol=1e-3, atol=1e-6) for g in space.groups)


def test_examples_are_encoded_once_for_all_masks(bert, facts):
    class Counting(Cloze):
        prepared = 0
        def prepare(self, context): Counting.prepared += 1; return super().prepare(context)
    found = iterate(*bert, Counting(facts), Precision(facts), Space.of(bert[0], "head"), progress=False)
    assert len(found.scores) > 1 and Counting.prepared == 1


@pytest.mark.parametrize("settings", [dict(batches=0), dict(batch=0), dict(batches=-3)])
def test_importance_of_nothing_is_refused(bert, facts, settings):
    with pytest.raises(SubnetError, match="at least one batch"): importance(*bert, Cloze(facts), Space.of(bert[0], "head"), **settings)


def test_a_diverged_model_ranks_nothing(bert, facts):
    model = copy.deepcopy(bert[0])
    with torch.no_grad(): model.bert.encoder.layer[3].output.dense.bias[0] = float("nan")
    with pytest.raises(SubnetError, match="gradient of a gate is NaN"): importance(model, bert[1], Cloze(facts), Space.of(model, "head"))


def test_importance_within_a_subnetwork(bert, facts):
    space = Space.of(bert[0], "head")
    under = Mask.of(space, {f"layer.{i}.head": np.arange(4) != i if i != 2 else np.zeros(4, bool) for i in range(4)})
    wanted = by_hand(*bert, facts, "batch", 24, under)
    got = np.stack(list(importance(*bert, Cloze(facts), space, None, 24, mode="batch", under=under, include_removed=True).values.values()))
    assert np.allclose(got, wanted, rtol=2e-3, atol=1e-6) and (got[0, 0] > 0)
    bits = np.stack([under[g.name] for g in space.groups])
    got = np.stack(list(importance(*bert, Cloze(facts), space, None, 24, mode="batch", under=under).values.values()))
    assert np.allclose(got, wanted * bits, rtol=2e-3, atol=1e-6)


def test_nothing_left_has_no_importance(bert, facts):
    space = Space.of(bert[0], "head+mlp")
    got = importance(*bert, Cloze(facts), space, None, under=Mask.full(space, False))
    assert all((v == 0).all() for v in got.values.values())


def test_gradients_are_those_of_an_objective_in_rows(bert):
    space, x = Space.of(bert[0], "mlp"), torch.tensor([bert[1]("the cat slept .").input_ids] * 3)
    grads = example_gradients(bert[0], space, lambda: bert[0](input_ids=x).logits[:, 2].logsumexp(-1).mean())
    assert all(g.shape == (3, 1) and torch.allclose(g, g[:1].expand(3, 1), rtol=1e-4) for g in grads.values())


@pytest.mark.parametrize("kind", ["head+mlp", "neuron", "layer"])
def test_gradients_belong_to_their_examples_when_as_many_rows_are_read_as_there_are_tokens(bert, kind):
    "In whatever order: tokens and rows are then packings of one size, with other examples at the same place."
    model, tok = bert
    ids = [tok(t).input_ids for t in ("the cat slept .", "anna walked in the garden .")]
    seqs, (a, b) = Sequences(model, ids), map(len, ids)
    rows = [(0, i) for i in range(a)] + [(1, i) for i in range(b)]
    loss = lambda rows: seqs.read(np.arange(2), *zip(*rows)).logsumexp(-1).sum() / 2
    one, two = (example_gradients(model, Space.of(model, kind), lambda: loss(r)) for r in (rows, rows[::-1]))
    assert seqs.packed and a != b and all(torch.allclose(one[n], two[n], rtol=1e-3, atol=1e-5) for n in one)


def test_normalisation(bert):
    space = Space.of(bert[0], "head+mlp")
    s = score.random(space, 1)
    v = np.stack([s[f"layer.{i}.head"] for i in range(4)])
    v = v / np.sqrt((v ** 2).sum(1, keepdims=True))
    assert np.allclose(np.stack([normalised(s, "layer")[f"layer.{i}.head"] for i in range(4)]), v)
    assert np.allclose(np.stack([normalised(s, "published")[f"layer.{i}.head"] for i in range(4)]), (v - v.min()) / (v.max() - v.min()))
    m = np.array([s[f"layer.{i}.mlp"][0] for i in range(4)])
    assert np.allclose([normalised(s, "published")[f"layer.{i}.mlp"][0] for i in range(4)], (m - m.min()) / np.ptp(m))
    assert normalised(s, None) is s
    with pytest.raises(UnknownName, match="Known: layer, published"): normalised(s, "l2")
    flat = Scores(space, {g.name: np.zeros(g.shape) for g in space.groups})
    for how in ("layer", "published"): assert all((x == 0).all() for x in normalised(flat, how).values.values())


# ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def base():
    "Twelve layers of twelve heads."
    from transformers import BertConfig, BertForMaskedLM
    return BertForMaskedLM(BertConfig(vocab_size=20, hidden_size=24, num_hidden_layers=12, num_attention_heads=12, intermediate_size=8)).eval()


@pytest.mark.parametrize("published", [False, True])
def test_three_phases_of_twelve_by_twelve(base, published):
    space = Space.of(base, "head+mlp")
    kinds = lambda m: tuple(int(m.table().query("kind == @k").kept.sum()) for k in ("head", "mlp"))
    for seed in range(6):
        s, floor, seen = score.random(space, seed), np.random.default_rng(seed).uniform(.05, .95), []
        rate = lambda m, phase: (2 * kinds(m)[0] / 144 + kinds(m)[1] / 12) / 3
        kept = Mask.full(space)
        for phase, m, value, ok in _ladder(space, "three-phase", .1, floor, 999, published, lambda source: s, rate):
            seen.append(phase)
            assert m <= kept and m != kept and ok == (value >= floor)
            h0, m0, h1, m1 = *kinds(kept), *kinds(m)
            assert {"head+mlp": (min(14, h0), min(1, m0)), "head": (min(7, h0), 0), "mlp": (0, 1)}[phase] == (h0 - h1, m0 - m1)
            if ok: kept = m
        a, b = sum(p == "head+mlp" for p in seen) - 1, sum(p == "head" for p in seen) - 1
        assert kinds(kept)[0] == 144 - 14 * a - 7 * b and list(dict.fromkeys(seen)) == ["head+mlp", "head", "mlp"]


def test_a_floor_that_everything_passes_empties_the_model(base):
    space = Space.of(base, "head+mlp")
    sizes = [m.count for _, m, _, _ in _ladder(space, "three-phase", .1, 0, 999, False, lambda m: score.random(space, 0), lambda m, p: 1.0)]
    assert sizes[-1] == 0 and sorted(sizes, reverse=True) == sizes and len(set(sizes)) == len(sizes)


def test_stale_scores_are_those_of_the_rejected_mask(base):
    space = Space.of(base, "head+mlp")
    for published in (False, True):
        sources = []
        def rank(m): sources.append(m); return score.random(space, 0)
        steps = list(_ladder(space, "three-phase", .1, .7, 999, published, rank, lambda m, p: m.density))
        first = next(i for i, (phase, *_) in enumerate(steps) if phase == "head")
        assert steps[first - 1][3] is False
        assert sources[first] == (steps[first - 1][1] if published else steps[first - 2][1])


def test_nan_stops_and_does_not_pass(base):
    space = Space.of(base, "head")
    steps = list(_ladder(space, "single", .1, .5, 99, False, lambda m: score.random(space, 0), lambda m, p: float("nan") if m.count < 120 else 1.0))
    assert [(m.count, ok) for _, m, _, ok in steps] == [(130, True), (116, False)]


def test_lowered_removes_the_lowest_that_are_left(base):
    space = Space.of(base, "head+mlp")
    s, m = score.random(space, 5), Mask.random(space, .5, 2)
    heads = sorted((float(s[g.name][i]), g.name, i) for g in space.groups if g.kind == "head" for i in range(12) if m[g.name][i])
    include_removed = m - without_lowest(m, s, {"head": 9})
    assert {(g.name, i) for g, b in include_removed.items() for i in np.flatnonzero(b)} == {(n, i) for _, n, i in heads[:9]}
    with pytest.raises(UnknownName): without_lowest(m, s, {"neuron": 1})


# ── the whole ────────────────────────────────────────────────────────────────────────────────────────────────────────

class Counting:
    "A monitor that counts how often it looks."
    def __init__(self, facts, stop=10**9): self.inner, self.looks, self.stop = Precision(facts), 0, stop
    def identity(self): return self.inner.identity()
    def prepare(self, context):
        of = self.inner.prepare(context)
        def look():
            self.looks += 1
            if self.looks > self.stop: raise KeyboardInterrupt
            return of()
        return look


def test_heads_alone_by_a_plain_loop(bert, facts):
    model, tok = bert
    space = Space.of(model, "head")
    found = iterate(model, tok, Cloze(facts), Precision(facts), space, drop=.2, floor=.8, progress=False)
    def p1(mask):
        coded = [encode(tok, f, False) for f in facts]
        with torch.no_grad(), masked(model, mask): return np.mean([int(model(input_ids=torch.tensor([i])).logits[0, at].argmax()) == y for i, at, y in coded])
    full, kept = p1(None), Mask.full(space)
    while True:
        s = importance(model, tok, Cloze(facts), space, None, 64, under=kept, normalise="layer")
        fewer = without_lowest(kept, s, {"head": 3})
        if p1(fewer) < .8 * full: break
        kept = fewer
    assert found.mask == kept and found.full == pytest.approx(full) and found.score == pytest.approx(p1(kept))
    assert found.table.passed.tolist() == [True] * (len(found.table) - 1) + [False] and found.masks.sel(passed=True)[len(found.table) - 2] == kept


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_an_interrupted_run_goes_on(bert, facts, tmp_path, stop):
    model, tok = bert
    space = Space.of(model, "head+mlp")
    go = lambda monitor, to: iterate(model, tok, Cloze(facts), monitor, space, to=to, labels={"task": "x", "seed": 0}, progress=False)
    whole = go(Counting(facts), None)
    with pytest.raises(KeyboardInterrupt): go(Counting(facts, stop), tmp_path / "run")
    rest = go(second := Counting(facts), tmp_path / "run")
    assert second.looks == len({m.id for _, m in whole.masks}) - stop              # a mask that comes back is remembered
    assert rest.mask == whole.mask and rest.table.drop(columns="seconds").equals(whole.table.drop(columns="seconds"))
    again = go(third := Counting(facts), tmp_path / "run")
    assert third.looks == 0 and again.table.equals(rest.table)
    assert all(np.allclose(again.scores[k][n], s[n]) for k, s in rest.scores.items() for n in s.values)
    with pytest.raises(OtherRun, match="floor"): iterate(model, tok, Cloze(facts), Counting(facts), space, floor=.5, to=tmp_path / "run", progress=False)


def test_a_store_gives_back_what_was_pruned(bert, facts, tmp_path):
    model, tok = bert
    store = Store(tmp_path)
    kept = {s: iterate(model, tok, None, Precision(facts), Space.of(model, "head"), scores=score.random(Space.of(model, "head"), s), to=store, labels={"seed": s}, progress=False).mask for s in (0, 1)}
    assert {s: m for s, m in store.masks().by("seed").items()} == kept and kept[0].meta["method"] == "iterate"


def test_a_magnitude_ladder(bert, facts):
    model, tok = bert
    space = Space.of(model, "weight", layers="3-4")
    found = iterate(model, tok, None, Precision(facts), space, least=0, progress=False)
    n, sizes = space.size, []
    while len(sizes) < 9: n -= round(.1 * n); sizes.append(n)      # torch.nn.utils.prune rounds
    assert found.table.weight.tolist() == [space.size, *sizes] and found.mask == score.magnitude(model, space).top(sizes[-1] / space.size)
    assert found.mask.density == pytest.approx(.9 ** 9, abs=1e-4)


def test_iterate_refuses_odd_scores(bert, facts):
    model, tok = bert
    space, args = Space.of(model, "head"), dict(progress=False)
    class Fixed:
        def __init__(self, value): self.value = value
        def identity(self): return {}
        def prepare(self, context): return lambda: self.value
    for value, text in ((float("nan"), "predictions are constant"), (0.0, "no floor"), (-.2, "no floor")):
        with pytest.raises(SubnetError, match=text): iterate(model, tok, Cloze(facts), Fixed(value), space, **args)
    with pytest.raises(SubnetError, match="below the floor"): iterate(model, tok, Cloze(facts), Fixed(.5), space, least=.6, **args)
    with pytest.raises(SubnetError, match="drop is a share"): iterate(model, tok, Cloze(facts), Fixed(1.), space, drop=10, **args)
    with pytest.raises(SubnetError, match="needs an objective"): iterate(model, tok, None, Fixed(1.), space, **args)
    with pytest.raises(UnknownName): iterate(model, tok, Cloze(facts), Fixed(1.), space, schedule="two-phase", **args)


# ── controls ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_matched_sizes_and_pools(base):
    space = Space.of(base, "head+mlp")
    kinds = lambda m: tuple(int(m.table().query("kind == @k").kept.sum()) for k in ("head", "mlp"))
    for density in (0, .2, .5, .8, 1):
        for seed in range(3):
            good = score.random(space, seed).top(density)
            got = score.matched_controls(good, seed)
            assert got["good"] is good and kinds(got["random"]) == kinds(got["bad"]) == kinds(good) and got == score.matched_controls(good, seed)
            for kind, n, size in zip(("head", "mlp"), kinds(good), (144, 12)):
                shared = int((good & got["bad"]).table().query("kind == @kind").kept.sum())
                assert shared == max(0, 2 * n - size)                       # no more than must be
    sizes = {kinds(score.matched_controls(score.random(space, 0).top(.5), s, published=True)["random"]) for s in range(9)}
    assert len(sizes) > 1


def test_super_survivors(base):
    space = Space.of(base, "head+mlp")
    for density in (.3, .6, .9):
        masks = score.Masks([({"seed": s}, score.random(space, s).top(density)) for s in range(5)])
        got, rows = score.super_survivors(masks), np.stack([np.concatenate([m[g.name] for g in space.groups]) for _, m in masks])
        flat = {k: np.concatenate([m[g.name] for g in space.groups]) for k, m in got.items()}
        heads = np.concatenate([[g.kind == "head"] * g.size for g in space.groups])
        alive, dead = rows.all(0), ~rows.any(0)
        assert (flat["good"] == alive).all()
        for of in (heads, ~heads):
            n = int(alive[of].sum())
            assert flat["bad"][of].sum() == flat["random"][of].sum() == n
            assert (flat["bad"] & dead)[of].sum() == min(n, dead[of].sum())
            assert (flat["random"] & ~alive & ~dead)[of].sum() == min(n, (~alive & ~dead)[of].sum())


def test_iterate_refuses(bert, facts):
    head, goal = Space.of(bert[0], "head"), Cloze(facts)
    for settings, match in ((dict(schedule="three-phase"), "'head' has no mlp"), (dict(limit=0), "at least 1, got 0"), (dict(least=float("nan")), "must be a number"), (dict(floor=90), "between 0 and 1"), (dict(drop=10), "between 0 and 1")):
        with pytest.raises(SubnetError, match=match): iterate(*bert, goal, Precision(facts), head, progress=False, **settings)
    with pytest.raises(SubnetError, match="below the floor"): iterate(*bert, goal, Precision(facts), head, least=1.5, progress=False)      # the full model itself misses it


def test_super_survivors_need_seeds_and_controls_say_what_they_share(bert):
    space = Space.of(bert[0], "head")
    with pytest.raises(SubnetError, match="several seeds; 1 mask given"): super_survivors(Masks([({"seed": 0}, Mask.full(space))]))
    whole = matched_controls(Mask.full(space), 0)                               # nothing removed: its counterparts can only be itself, and say so
    assert whole["bad"] == whole["good"] and whole["bad"].meta["shared"] == space.size
    few = Mask.random(space, .25, 0)
    assert matched_controls(few, 0)["bad"].meta["shared"] == 0 and matched_controls(few, 0)["random"].meta["shared"] == (matched_controls(few, 0)["random"] & few).count
    assert matched_controls(Mask.full(space, False), 0)["random"].count == 0
