"Importance in its published readings, and pruning step by step, against plain loops."
from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from subnet_explorer import score
from subnet_explorer.core.errors import SubnetError, UnknownName
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.masks import Masks
from subnet_explorer.core.run import OtherRun
from subnet_explorer.core.scores import Scores
from subnet_explorer.core.space import Space
from subnet_explorer.core.store import Store
from subnet_explorer.data.facts import Facts, encode, read_facts
from subnet_explorer.measure.ask import Precision
from subnet_explorer.model.apply import applied, masked
from subnet_explorer.model.sequences import Sequences
from subnet_explorer.search.objectives import Cloze, batch_at
from subnet_explorer.search.prune import NoFloor, _steps, iterate, matched_controls, super_survivors, without_lowest
from subnet_explorer.search.score import example_gradients, importance, normalised


@pytest.fixture(scope="module")
def bert(pocket_bert):
    return pocket_bert


@pytest.fixture(scope="module")
def facts():
    return Facts(read_facts("pocket", "MadeOf,IsA", prompt=1).items[::20][:24])


def kept_by_kind(mask):
    "How many heads and MLPs a mask keeps."
    return tuple(int(mask.table().query("kind == @kind").kept.sum()) for kind in ("head", "mlp"))


def stacked(scores):
    "Scores of all layers, one below the other."
    return np.stack(list(scores.values.values()))


def close(one, two, **tolerance):
    return all(np.allclose(one[name], two[name], **tolerance) for name in one.values)


# ── importance ───────────────────────────────────────────────────────────────────────────────────────────────────────

def scaled_by(xi):
    "A hook that scales the 32 features of each head."
    def hook(module, args): return (args[0] * xi.repeat_interleave(32),)
    return hook


def by_hand(model, tok, facts, mode, batch, under=None):
    "Head gates as plain tensors, one backward per batch; for `cumulative` the gradient buffer is never cleared."
    gates, hooks = [], []
    for i in range(4):
        xi = torch.ones(4) if under is None else torch.as_tensor(under[f"layer.{i}.head"]).float()
        gates.append(xi.requires_grad_())
        output = model.bert.encoder.layer[i].attention.output.dense
        hooks.append(output.register_forward_pre_hook(scaled_by(xi)))
    coded = [encode(tok, f, False) for f in facts]
    lengths = np.array([len(c[0]) for c in coded])
    steps, total = -(-len(facts) // batch), torch.zeros(4, 4)
    for t in range(steps):
        losses = []
        for ids, place, gold in (coded[i] for i in batch_at(t, lengths, batch, 0)):
            logits = model(input_ids=torch.tensor([ids])).logits[0, place]
            losses.append(F.cross_entropy(logits, torch.tensor(gold)))
        for grad, xi in zip(torch.autograd.grad(torch.stack(losses).mean(), gates), gates, strict=True):
            xi.grad = grad if mode == "batch" or xi.grad is None else xi.grad + grad
        total += torch.stack([xi.grad for xi in gates]).abs() / steps
    for h in hooks: h.remove()
    return total.numpy()


@pytest.mark.parametrize("mode", ["batch", "cumulative"])
@pytest.mark.parametrize("batch", [24, 7])
def test_published_modes(bert, facts, mode, batch):
    got = importance(*bert, Cloze(facts), Space.of(bert[0], "head"), None, batch, mode=mode)
    assert np.allclose(stacked(got), by_hand(*bert, facts, mode, batch), rtol=2e-3, atol=1e-6)


def test_example_importance_does_not_depend_on_the_batch_and_the_others_do(bert, facts):
    space = Space.of(bert[0], "head+mlp")

    def at(mode, batch):
        found = importance(*bert, Cloze(facts), space, None, batch, mode=mode)
        return np.concatenate(list(found.values.values()))

    assert np.allclose(at("example", 24), at("example", 5), rtol=1e-3, atol=1e-7)
    for mode in ("batch", "cumulative"): assert not np.allclose(at(mode, 24), at(mode, 5), rtol=.05)
    assert (at("batch", 24) <= at("example", 24) + 1e-7).all()                      # |mean| ≤ mean of |.|


def test_example_importance_does_not_depend_on_the_order(bert, facts):
    space = Space.of(bert[0], "head+mlp")
    turned = Facts(facts.items[::-1])
    for batch in (24, 7):
        one = importance(*bert, Cloze(facts), space, None, batch, seed=0)
        two = importance(*bert, Cloze(turned), space, None, batch, seed=3)
        assert close(one, two, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", ["head+mlp", "neuron", "layer"])
def test_gates_that_are_removed_have_the_gradient_of_a_product(bert, kind):
    "Padded, with token axis: against gates that are multiplied in."
    model, tok = bert
    x = tok(["the cat slept .", "anna walked in the garden ."], padding=True, return_tensors="pt")
    space = Space.of(model, kind)
    under = Mask.random(space, .6, seed=1)

    def loss(): return F.cross_entropy(model(**x).logits[:, 2], torch.tensor([7, 90]))

    values = {g.name: torch.as_tensor(under[g.name]).float().repeat(2, 1).requires_grad_() for g in space.groups}
    with applied(model, space, values): wanted = torch.autograd.grad(2 * loss(), list(values.values()))
    got = example_gradients(model, space, loss, under)
    for g, w in zip(space.groups, wanted, strict=True):
        assert got[g.name].shape == (2, g.size)
        assert torch.allclose(got[g.name], w, rtol=1e-4, atol=1e-6)


def test_terms_with_batches_of_different_sizes_count_by_their_own(bert, facts):
    space = Space.of(bert[0], "head")
    few, many = Cloze(Facts(facts.items[:4])), Cloze(facts)
    both, one, two = (importance(*bert, goal, space, 1, 24) for goal in (few + many, few, many))
    assert both.meta["examples"] == 28
    for g in space.groups:
        assert np.allclose(28 * both[g.name], 4 * one[g.name] + 24 * two[g.name], rtol=1e-3, atol=1e-6)


def test_examples_of_all_terms_count_also_where_nothing_is_left_of_the_last_layer(bert, facts):
    space = Space.of(bert[0], "head")
    under = Mask.of(space, {g.name: np.full(g.shape, g.layer != 3) for g in space.groups})
    few, many = Cloze(Facts(facts.items[:4])), Cloze(facts)
    both, one, two = (importance(*bert, goal, space, 1, 24, under=under) for goal in (few + many, few, many))
    assert both.meta["examples"] == 28
    for g in space.groups:
        assert np.allclose(28 * both[g.name], 4 * one[g.name] + 24 * two[g.name], rtol=1e-3, atol=1e-6)


def test_examples_are_encoded_once_for_all_masks(bert, facts):
    class Counting(Cloze):
        prepared = 0

        def prepare(self, context):
            Counting.prepared += 1
            return super().prepare(context)

    found = iterate(*bert, Counting(facts), Precision(facts), Space.of(bert[0], "head"), progress=False)
    assert len(found.scores) > 1 and Counting.prepared == 1


@pytest.mark.parametrize("settings", [dict(batches=0), dict(batch=0), dict(batches=-3)])
def test_importance_of_nothing_is_refused(bert, facts, settings):
    with pytest.raises(SubnetError, match=r"batch(es)? must be a whole number of at least 1"):
        importance(*bert, Cloze(facts), Space.of(bert[0], "head"), **settings)


def test_a_diverged_model_ranks_nothing(bert, facts):
    model = copy.deepcopy(bert[0])
    with torch.no_grad(): model.bert.encoder.layer[3].output.dense.bias[0] = float("nan")
    with pytest.raises(SubnetError, match="gradient of a gate is NaN"):
        importance(model, bert[1], Cloze(facts), Space.of(model, "head"))


def test_importance_within_a_subnetwork(bert, facts):
    space = Space.of(bert[0], "head")
    one_less = {f"layer.{i}.head": np.arange(4) != i for i in range(4)}
    under = Mask.of(space, {**one_less, "layer.2.head": np.zeros(4, bool)})
    wanted = by_hand(*bert, facts, "batch", 24, under)

    def found(**how):
        return stacked(importance(*bert, Cloze(facts), space, None, 24, mode="batch", under=under, **how))

    everything = found(include_removed=True)
    assert np.allclose(everything, wanted, rtol=2e-3, atol=1e-6)
    assert everything[0, 0] > 0
    bits = np.stack([under[g.name] for g in space.groups])
    assert np.allclose(found(), wanted * bits, rtol=2e-3, atol=1e-6)


def test_nothing_left_has_no_importance(bert, facts):
    space = Space.of(bert[0], "head+mlp")
    got = importance(*bert, Cloze(facts), space, None, under=Mask.full(space, False))
    assert all((v == 0).all() for v in got.values.values())


def test_gradients_are_those_of_an_objective_in_rows(bert):
    space, x = Space.of(bert[0], "mlp"), torch.tensor([bert[1]("the cat slept .").input_ids] * 3)

    def loss(): return bert[0](input_ids=x).logits[:, 2].logsumexp(-1).mean()

    for grad in example_gradients(bert[0], space, loss).values():
        assert grad.shape == (3, 1)
        assert torch.allclose(grad, grad[:1].expand(3, 1), rtol=1e-4)


@pytest.mark.parametrize("kind", ["head+mlp", "neuron", "layer"])
def test_gradients_belong_to_their_examples_when_as_many_rows_are_read_as_there_are_tokens(bert, kind):
    "In whatever order: tokens and rows are then packings of one size, with other examples at the same place."
    model, tok = bert
    ids = [tok(t).input_ids for t in ("the cat slept .", "anna walked in the garden .")]
    seqs, (a, b) = Sequences(model, ids), map(len, ids)
    rows = [(0, i) for i in range(a)] + [(1, i) for i in range(b)]

    def found(rows):
        batch, position = zip(*rows, strict=True)
        def loss(): return seqs.read(np.arange(2), batch, position).logsumexp(-1).sum() / 2
        return example_gradients(model, Space.of(model, kind), loss)

    one, two = found(rows), found(rows[::-1])
    assert seqs.packed
    assert a != b
    assert all(torch.allclose(one[n], two[n], rtol=1e-3, atol=1e-5) for n in one)


def test_normalisation(bert):
    space = Space.of(bert[0], "head+mlp")
    s = score.random(space, 1)

    def heads(scores): return np.stack([scores[f"layer.{i}.head"] for i in range(4)])
    def mlps(scores): return np.array([scores[f"layer.{i}.mlp"][0] for i in range(4)])

    v, m = heads(s), mlps(s)
    v = v / np.sqrt((v ** 2).sum(1, keepdims=True))
    assert np.allclose(heads(normalised(s, "layer")), v)
    assert np.allclose(heads(normalised(s, "published")), (v - v.min()) / (v.max() - v.min()))
    assert np.allclose(mlps(normalised(s, "published")), (m - m.min()) / np.ptp(m))
    assert normalised(s, None) is s
    with pytest.raises(UnknownName, match="Known: layer, published"): normalised(s, "l2")
    flat = Scores(space, {g.name: np.zeros(g.shape) for g in space.groups})
    for how in ("layer", "published"):
        assert all((x == 0).all() for x in normalised(flat, how).values.values())


# ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def base():
    "Twelve layers of twelve heads."
    from transformers import BertConfig, BertForMaskedLM
    size = dict(vocab_size=20, hidden_size=24, intermediate_size=8)
    return BertForMaskedLM(BertConfig(num_hidden_layers=12, num_attention_heads=12, **size)).eval()


def tried(space, schedule, floor, rate, published=False, rank=None):
    "The steps of a loop that takes a tenth at a time, ranked at random unless told otherwise."
    rank = rank or (lambda mask: score.random(space, 0))
    return list(_steps(space, schedule, .1, floor, 999, published, rank, rate))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("published", [False, True])
def test_three_phases_of_twelve_by_twelve(base, published, seed):
    space = Space.of(base, "head+mlp")
    scores, floor = score.random(space, seed), np.random.default_rng(seed).uniform(.05, .95)

    def rate(mask, phase): return (2 * kept_by_kind(mask)[0] / 144 + kept_by_kind(mask)[1] / 12) / 3
    def rank(mask): return scores

    kept, seen = Mask.full(space), []
    for step in tried(space, "three-phase", floor, rate, published, rank):
        seen.append(step.phase)
        assert step.mask <= kept
        assert step.mask != kept
        assert step.passed == (step.score >= floor)
        (heads, mlps), (heads_now, mlps_now) = kept_by_kind(kept), kept_by_kind(step.mask)
        wanted = {"head+mlp": (min(14, heads), min(1, mlps)), "head": (min(7, heads), 0), "mlp": (0, 1)}
        assert wanted[step.phase] == (heads - heads_now, mlps - mlps_now)
        if step.passed: kept = step.mask
    a, b = (seen.count(phase) - 1 for phase in ("head+mlp", "head"))
    assert kept_by_kind(kept)[0] == 144 - 14 * a - 7 * b
    assert list(dict.fromkeys(seen)) == ["head+mlp", "head", "mlp"]


def test_a_floor_that_everything_passes_empties_the_model(base):
    space = Space.of(base, "head+mlp")
    sizes = [step.mask.count for step in tried(space, "three-phase", 0, lambda mask, phase: 1.0)]
    assert sizes[-1] == 0
    assert sorted(sizes, reverse=True) == sizes
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize("published", [False, True])
def test_stale_scores_are_those_of_the_rejected_mask(base, published):
    space, sources = Space.of(base, "head+mlp"), []

    def rank(mask):
        sources.append(mask)
        return score.random(space, 0)

    steps = tried(space, "three-phase", .7, lambda mask, phase: mask.density, published, rank)
    first = next(i for i, step in enumerate(steps) if step.phase == "head")
    assert steps[first - 1].passed is False
    assert sources[first] == steps[first - (1 if published else 2)].mask


def test_nan_stops_and_does_not_pass(base):
    def rate(mask, phase): return float("nan") if mask.count < 120 else 1.0

    steps = tried(Space.of(base, "head"), "single", .5, rate)
    assert [(step.mask.count, step.passed) for step in steps] == [(130, True), (116, False)]


def test_the_lowest_that_are_left_are_removed(base):
    space = Space.of(base, "head+mlp")
    s, m = score.random(space, 5), Mask.random(space, .5, 2)
    groups = [g for g in space.groups if g.kind == "head"]
    heads = sorted((float(s[g.name][i]), g.name, i) for g in groups for i in range(12) if m[g.name][i])
    removed = m - without_lowest(m, s, {"head": 9})
    assert {(g.name, i) for g, b in removed.items() for i in np.flatnonzero(b)} == {(n, i) for _, n, i in heads[:9]}
    with pytest.raises(UnknownName): without_lowest(m, s, {"neuron": 1})


# ── the whole ────────────────────────────────────────────────────────────────────────────────────────────────────────

class Counting:
    "A monitor that counts how often it looks."

    def __init__(self, facts, stop=10**9):
        self.inner, self.looks, self.stop = Precision(facts), 0, stop

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
        right = []
        with torch.no_grad(), masked(model, mask):
            for ids, place, gold in (encode(tok, f, False) for f in facts):
                right.append(int(model(input_ids=torch.tensor([ids])).logits[0, place].argmax()) == gold)
        return np.mean(right)

    full, kept = p1(None), Mask.full(space)
    while True:
        s = importance(model, tok, Cloze(facts), space, None, 64, under=kept, normalise="layer")
        fewer = without_lowest(kept, s, {"head": 3})
        if p1(fewer) < .8 * full: break
        kept = fewer
    assert found.mask == kept
    assert found.full == pytest.approx(full)
    assert found.score == pytest.approx(p1(kept))
    assert found.table.passed.tolist() == [True] * (len(found.table) - 1) + [False]
    assert found.masks.sel(passed=True)[len(found.table) - 2] == kept


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_an_interrupted_run_goes_on(bert, facts, tmp_path, stop):
    model, tok = bert
    space = Space.of(model, "head+mlp")

    def go(monitor, to, **more):
        labels = {"task": "x", "seed": 0}
        return iterate(model, tok, Cloze(facts), monitor, space, to=to, labels=labels, progress=False, **more)

    def timeless(found): return found.table.drop(columns="seconds")

    second, third = Counting(facts), Counting(facts)
    whole = go(Counting(facts), None)
    with pytest.raises(KeyboardInterrupt): go(Counting(facts, stop), tmp_path / "run")
    rest = go(second, tmp_path / "run")
    assert second.looks == len({m.id for _, m in whole.masks}) - stop      # a mask that comes back is remembered
    assert rest.mask == whole.mask
    assert timeless(rest).equals(timeless(whole))
    again = go(third, tmp_path / "run")
    assert third.looks == 0
    assert again.table.equals(rest.table)
    assert all(close(s, again.scores[k]) for k, s in rest.scores.items())
    with pytest.raises(OtherRun, match="floor"): go(Counting(facts), tmp_path / "run", floor=.5)


def test_a_store_gives_back_what_was_pruned(bert, facts, tmp_path):
    model, tok = bert
    store, space, kept = Store(tmp_path), Space.of(model, "head"), {}
    for seed in (0, 1):
        given = dict(scores=score.random(space, seed), to=store, labels={"seed": seed})
        kept[seed] = iterate(model, tok, None, Precision(facts), space, **given, progress=False).mask
    assert dict(store.masks().by("seed").items()) == kept
    assert kept[0].meta["method"] == "iterate"


def test_a_magnitude_ladder(bert, facts):
    model, tok = bert
    space = Space.of(model, "weight", layers="3-4")
    found = iterate(model, tok, None, Precision(facts), space, least=0, progress=False)
    n, sizes = space.size, []
    while len(sizes) < 9:
        n -= round(.1 * n)                                         # torch.nn.utils.prune rounds
        sizes.append(n)
    assert found.table.weight.tolist() == [space.size, *sizes]
    assert found.mask == score.magnitude(model, space).top(sizes[-1] / space.size)
    assert found.mask.density == pytest.approx(.9 ** 9, abs=1e-4)


def test_iterate_refuses_odd_scores(bert, facts):
    model, tok = bert
    space = Space.of(model, "head")

    class Fixed:
        def __init__(self, value): self.value = value
        def identity(self): return {}
        def prepare(self, context): return lambda: self.value

    def refused(match, value=1., **settings):
        with pytest.raises(SubnetError, match=match):
            iterate(model, tok, Cloze(facts), Fixed(value), space, progress=False, **settings)

    refused("predictions are constant", float("nan"))
    refused("no floor", 0.0)
    refused("no floor", -.2)
    refused("below the floor", .5, least=.6)
    low = {"majority": .527, "first text": float("nan"), "second text": .51}
    refused(r"0\.4959 \(0\.9 of the full 0\.5510\) is not above the 0\.5270 of the baseline 'majority'.*above 0\.956",
            .551, baselines=low)
    refused("is not above .* 'second text'.*train the model better", .6, floor=1, baselines={"second text": .6})
    refused(r"\(least\) is not above", .8, least=.527, baselines=low)
    refused(r"give a higher score \(least\)", 0., least=-.5, baselines={"majority": -.1})      # no share of nothing
    refused("drop must be a number above 0 and below 1", drop=10)
    with pytest.raises(SubnetError, match="needs an objective"):
        iterate(model, tok, None, Fixed(1.), space, progress=False)
    with pytest.raises(UnknownName):
        iterate(model, tok, Cloze(facts), Fixed(1.), space, schedule="two-phase", progress=False)


def test_baselines_refuse_floors_and_change_nothing_else(bert, facts, tmp_path):
    model, tok = bert
    ask = dict(to=tmp_path / "run", progress=False)
    found = iterate(model, tok, Cloze(facts), Precision(facts), Space.of(model, "mlp"), **ask)
    held = iterate(model, tok, Cloze(facts), Precision(facts), Space.of(model, "mlp"), **ask,
                   baselines={"majority": found.floor - .01, "options": float("nan")})      # the same run
    assert held.mask == found.mask and held.table.equals(found.table)
    with pytest.raises(NoFloor, match="baseline 'majority'"):
        iterate(model, tok, Cloze(facts), Precision(facts), Space.of(model, "mlp"), **ask,
                baselines={"majority": found.floor})


# ── controls ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_matched_sizes_and_pools(base):
    space = Space.of(base, "head+mlp")
    for density in (0, .2, .5, .8, 1):
        for seed in range(3):
            good = score.random(space, seed).top(density)
            got = matched_controls(good, seed)
            sizes = kept_by_kind(good)
            assert got["good"] is good
            assert kept_by_kind(got["random"]) == kept_by_kind(got["bad"]) == sizes
            assert got == matched_controls(good, seed)
            least = tuple(max(0, 2 * n - size) for n, size in zip(sizes, (144, 12), strict=True))
            assert kept_by_kind(good & got["bad"]) == least                 # no more is shared than must be
    half = score.random(space, 0).top(.5)
    assert len({kept_by_kind(matched_controls(half, s, published=True)["random"]) for s in range(9)}) > 1


def test_super_survivors(base):
    space = Space.of(base, "head+mlp")
    heads = np.concatenate([[g.kind == "head"] * g.size for g in space.groups])

    def flat(mask): return np.concatenate([mask[g.name] for g in space.groups])

    for density in (.3, .6, .9):
        masks = Masks([({"seed": s}, score.random(space, s).top(density)) for s in range(5)])
        got = {k: flat(m) for k, m in super_survivors(masks).items()}
        rows = np.stack([flat(m) for _, m in masks])
        alive, dead = rows.all(0), ~rows.any(0)
        assert (got["good"] == alive).all()
        for of in (heads, ~heads):
            n = int(alive[of].sum())
            assert got["bad"][of].sum() == got["random"][of].sum() == n
            assert (got["bad"] & dead)[of].sum() == min(n, dead[of].sum())
            assert (got["random"] & ~alive & ~dead)[of].sum() == min(n, (~alive & ~dead)[of].sum())


REFUSED = [
    (dict(schedule="three-phase"), "'head' has no mlp"),
    (dict(limit=0), "at least 1, got 0"),
    (dict(least=float("nan")), "must be a number"),
    (dict(floor=90), "above 0 and at most 1"),
    (dict(drop=10), "above 0 and below 1"),
    (dict(least=1.5), "below the floor"),      # the full model itself misses it
]


@pytest.mark.parametrize("settings, match", REFUSED)
def test_iterate_refuses(bert, facts, settings, match):
    with pytest.raises(SubnetError, match=match):
        iterate(*bert, Cloze(facts), Precision(facts), Space.of(bert[0], "head"), progress=False, **settings)


def test_super_survivors_need_seeds_and_controls_say_what_they_share(bert):
    space = Space.of(bert[0], "head")
    with pytest.raises(SubnetError, match="several seeds; 1 mask given"):
        super_survivors(Masks([({"seed": 0}, Mask.full(space))]))
    whole = matched_controls(Mask.full(space), 0)      # nothing removed: its counterparts are itself, and say so
    assert whole["bad"] == whole["good"]
    assert whole["bad"].meta["shared"] == space.size
    few = Mask.random(space, .25, 0)
    controls = matched_controls(few, 0)
    assert controls["bad"].meta["shared"] == 0
    assert controls["random"].meta["shared"] == (controls["random"] & few).count
    assert matched_controls(Mask.full(space, False), 0)["random"].count == 0
