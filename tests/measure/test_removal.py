"""Knowledge-critical subnetworks, measured: what removal takes away, the rule that chooses a mask,
baselines by gradient, and learning again."""
from __future__ import annotations

import copy
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st

from subnet_explorer.core.errors import SpaceMismatch, SubnetError, UnknownName
from subnet_explorer.core.intervals import interval
from subnet_explorer.core.log import read_log
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.space import Space
from subnet_explorer.data.facts import Facts, encode, read_facts
from subnet_explorer.data.grammar import sentences, treebank
from subnet_explorer.data.texts import blocks
from subnet_explorer.measure.ask import Answers, Precision, cloze
from subnet_explorer.measure.fluency import perplexity, text_nll
from subnet_explorer.measure.removal import REMOVAL, Removal, removal, removal_table
from subnet_explorer.model.apply import masked
from subnet_explorer.model.load import load
from subnet_explorer.search.distil import Maintain, Suppress
from subnet_explorer.search.find import find
from subnet_explorer.search.gates import Concrete, Threshold
from subnet_explorer.search.loop import seen
from subnet_explorer.search.objectives import Cloze, Context, Density, Task
from subnet_explorer.search.prune import iterate
from subnet_explorer.search.score import attribution, magnitude
from subnet_explorer.tasks import relearn
from subnet_explorer.tasks.fit import fit, preserved
from subnet_explorer.tasks.heads import Tagger
from subnet_explorer.tasks.relearn import relearned, relearning

TEXTS = [" ".join(t["form"] for t in s) for s in sentences(30, seed=3)]
known = read_facts("pocket", "MadeOf,IsA", prompt=1)
# relations in turn
MADE_OF, IS_A = known["MadeOf"].items, known["IsA"].items
TARGET, CONTROL = Facts((MADE_OF[5], IS_A[7], *MADE_OF[6:9], IS_A[8])), Facts(IS_A[20:28])
ON = {"target": TARGET, "control": CONTROL, "text": TEXTS[:7]}


@pytest.fixture(scope="module")
def gpt2(): return load("pocket-gpt2")

@pytest.fixture(scope="module")
def models(gpt2, pocket_bert): return {"pocket-bert": pocket_bert, "pocket-gpt2": gpt2}

@pytest.fixture(params=["pocket-bert", "pocket-gpt2"])
def name(request): return request.param

@pytest.fixture(scope="module")
def space(gpt2): return Space.of(gpt2[0], "weight", layers="top-half")

@pytest.fixture(scope="module")
def some(space): return Mask.random(space, .3, seed=0)                    # plays the critical weights

@pytest.fixture(scope="module")
def items(gpt2, some):
    return removal(*gpt2, {"full": None, "without": [~some, ~some.random_like(1)], "empty": ~(some - some)}, ON)

@pytest.fixture(scope="module")
def summary(items): return removal_table(items)


def zeroed(model, mask):
    "A copy of the model without the weights that `mask` marks."
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for g, bits in mask.items(): twin.base_model.get_parameter(g.name)[torch.as_tensor(bits)] = 0
    return twin


@torch.no_grad()
def plain(model, tok, facts, texts):
    "One whole forward pass each: (log-probability, rank) of answers, (mean log-probability, tokens) of texts."
    answers, written = [], []
    for f in facts:
        ids, at, gold = encode(tok, f, True)
        logits = model(input_ids=torch.tensor([ids])).logits[0, at].double()
        answers.append((logits.log_softmax(0)[gold].item(), 1 + int((logits > logits[gold]).sum())))
    for t in texts:
        ids = [tok.bos_token_id, *tok(t).input_ids]
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
        logp = logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        written.append((logp.mean().item(), len(logp)))
    return answers, written


# ── items ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_items_are_those_of_plain_forward_passes(gpt2, some, items):
    model, tok = gpt2
    assert list(items.columns) == REMOVAL and len(items) == 4 * (6 + 8 + 7)
    removed = {("without", 0): some, ("without", 1): some.random_like(1)}
    twins = {("full", 0): model, **{k: zeroed(model, m) for k, m in removed.items()}}
    for (under, draw), twin in twins.items():
        part = items[(items.under == under) & (items.draw == draw)]
        for data, facts in (("target", TARGET), ("control", CONTROL)):
            t = part[part.data == data].set_index("item").sort_index()
            answers, _ = plain(twin, tok, facts, [])
            # items are numbered as facts were given
            assert t.uuid.tolist() == [f.uuid for f in facts] and t["sub"].tolist() == [f.subject for f in facts]
            assert np.allclose(t.logprob, [a for a, _ in answers], atol=1e-4)
            assert t["rank"].tolist() == [r for _, r in answers]
            assert (t.tokens == 1).all()
        t = part[part.data == "text"]
        _, written = plain(twin, tok, [], TEXTS[:7])
        assert np.allclose(t.nll, [-a for a, _ in written], atol=1e-4)
        assert t.tokens.tolist() == [n for _, n in written]
        assert t["rank"].isna().all()
    assert (items.nll == -items.logprob).all()


def test_an_empty_critical_mask_changes_nothing(items, summary):
    a, b = (items[items.under == u].drop(columns="under").reset_index(drop=True) for u in ("full", "empty"))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    t = summary[summary.under == "empty"]
    differences = t[t.measure.str.endswith("_difference")]
    ends, hits = ["low", "high"], differences.measure.str.startswith("top")      # others might have been lost
    assert (differences[["value", "median", "min", "max"]] == 0).all(axis=None)
    assert (differences.loc[~hits, ends] == 0).all(axis=None) and (differences.loc[hits, "low"] < 0).all()
    assert (t[t.measure == "perplexity_ratio"][["value", "low", "high", "median", "min", "max"]] == 1).all(axis=None)


@pytest.mark.parametrize("kind", ["head", "neuron"])
def test_units_can_be_removed(gpt2, kind):
    model, tok = gpt2
    m = Mask.random(Space.of(model, kind, layers="3-4"), .5, seed=0)
    t = removal(model, tok, {"x": ~m}, {"text": TEXTS[:3]})
    assert np.allclose(t.nll, text_nll(model, tok, TEXTS[:3], ~m).eval("nll / tokens"), atol=1e-5)


def test_masks_for_each_relation(gpt2, some):
    model, tok = gpt2
    by = {"MadeOf": [~some, None], "IsA": ~some}
    t = removal(model, tok, {"x": by, "full": None}, {"target": TARGET})
    # those of the one relation with a second draw
    assert t[(t.under == "x") & (t.draw == 1)].item.tolist() == [0, 2, 3, 4]
    full = t[t.under == "full"].set_index("item").logprob
    assert t[(t.under == "x") & (t.draw == 1)].set_index("item").logprob.to_dict() == full[[0, 2, 3, 4]].to_dict()
    with pytest.raises(SubnetError, match="not asked for the same items"): removal_table(t)
    with pytest.raises(SubnetError, match="one mask for all"): removal(model, tok, {"x": by}, ON)


def test_texts_by_themselves_and_together(models, name):
    "The sum over texts is what perplexity is made of; a text alone gives what it gives among others."
    model, tok = models[name]
    t = text_nll(model, tok, TEXTS)
    assert perplexity(model, tok, TEXTS) == pytest.approx(math.exp(t.nll.sum() / t.tokens.sum()), rel=1e-9)
    assert t.tokens.tolist() == [len(tok(x, add_special_tokens=False).input_ids) for x in TEXTS]
    for i in (0, 11): assert text_nll(model, tok, [TEXTS[i]]).nll[0] == pytest.approx(t.nll[i], rel=1e-5)


def test_texts_are_called_by_what_they_say(gpt2):
    "Whatever their order, and twice the same text is two items."
    said = ["the dog sleeps .", "a bird can fly .", "the dog sleeps ."]
    one = removal(*gpt2, {"full": None}, {"text": said}).set_index("uuid").logprob
    other = removal(*gpt2, {"full": None}, {"text": said[::-1]}).set_index("uuid").logprob
    assert one.index.is_unique and set(one.index) == set(other.index)
    assert one.loc[other.index].to_numpy() == pytest.approx(other.to_numpy(), rel=1e-5)
    joined = blocks(gpt2[1], said, 4)
    assert removal(*gpt2, {"full": None}, {"text": joined}).uuid.is_unique


def test_removal_refuses(gpt2, pocket_bert, some):
    model, tok = gpt2
    for under, on, says in (
        ({}, ON, "nothing to compare"),
        ({"full": None}, {}, "nothing to compare"),
        ({"full": None}, {"text": []}, "'text' is empty"),
        ({"full": None}, {"text": [" ".join(TEXTS)]}, "the model reads at most 64"),
        ({"full": None}, {"text": [TEXTS[0], ""]}, "text 1 has no token to predict"),
    ):
        with pytest.raises(SubnetError, match=says): removal(model, tok, under, on)
    for on in ({"target": TARGET}, {"text": TEXTS[:2]}):
        with pytest.raises(SpaceMismatch): removal(*pocket_bert, {"x": some}, on)
    assert len(removal(model, tok, {"full": None}, {"text": [" ".join(TEXTS)]}, cut=True)) == 1
    broken = copy.deepcopy(model)
    with torch.no_grad(): broken.transformer.h[3].mlp.c_proj.bias[0] = float("nan")
    for on in ({"target": TARGET}, {"text": TEXTS[:2]}):
        with pytest.raises(SubnetError, match="NaN or infinite"): removal(broken, tok, {"full": None}, on)


# ── table ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_the_table_is_plain_arithmetic(items, summary):
    def cell(u, d, m): return summary[(summary.under == u) & (summary.data == d) & (summary.measure == m)].iloc[0]
    for d, n in (("target", 6), ("control", 8), ("text", 7)):
        of = {u: items[(items.data == d) & (items.under == u)] for u in ("full", "without")}
        values = ["logprob", "rank", "tokens"]
        full, lost = (part.pivot(index="draw", columns="item", values=values) for part in of.values())
        w = full["tokens"].iloc[0]
        v, v0 = lost["logprob"].mean(axis=0), full["logprob"].iloc[0]
        m, m0 = np.average(v, weights=w), np.average(v0, weights=w)
        wanted = {
            "perplexity": math.exp(-m),
            "perplexity_ratio": math.exp(m0 - m),
            "perplexity_difference": math.exp(-m) - math.exp(-m0),
            "logprob": m,
            "logprob_difference": m - m0,
        }
        if d != "text":
            r, r0 = lost["rank"], full["rank"].iloc[0]
            wanted |= {"rank": r.to_numpy().mean(), "rank_difference": r.to_numpy().mean() - r0.mean()}
            for k in (1, 5, 10):
                hits = (r <= k).to_numpy().mean()
                wanted |= {f"top{k}": hits, f"top{k}_difference": hits - (r0 <= k).mean()}
        assert set(summary[summary.data == d].measure) == set(wanted)
        for measure, value in wanted.items():
            c = cell("without", d, measure)
            assert c.value == pytest.approx(value, rel=1e-9, abs=1e-12)
            assert (c.n, c.draws) == (n, 2)
            assert c.low <= c.high
            assert c["min"] <= c["median"] <= c["max"]
        assert cell("without", d, "logprob_difference")["median"] == pytest.approx(np.median(v - v0))
        assert cell("without", d, "logprob_difference")["min"] == pytest.approx((v - v0).min())
        ratios = np.exp(lost["logprob"].rsub(v0, axis=1)).mean(axis=0)
        assert cell("without", d, "perplexity_ratio")["max"] == pytest.approx(ratios.max())
    lengths = items.tokens[items.data == "text"]
    assert not (lengths == lengths.iloc[0]).all(), "texts of one length do not test the weights"


def test_the_interval_is_the_one_of_compare(items, summary):
    "An interval of a difference is that of the differences; of a perplexity, the exponential of that of its logarithm."
    without = items[(items.data == "control") & (items.under == "without")]
    t = without.pivot(index="draw", columns="item", values="logprob").to_numpy()
    full = items[(items.data == "control") & (items.under == "full")].sort_values("item").logprob.to_numpy()
    at = summary[(summary.under == "without") & (summary.data == "control")].set_index("measure")
    value, low, high = interval([t - full])
    columns = ["value", "low", "high"]
    assert at.loc["logprob_difference", columns].tolist() == pytest.approx([value, low, high])
    ratios = [math.exp(-x) for x in (value, high, low)]
    assert at.loc["perplexity_ratio", columns].tolist() == pytest.approx(ratios)
    one, other = math.exp(-t.mean()), math.exp(-full.mean())
    moved = one - other - one * (t - t.mean()) + other * (full - full.mean())      # at first order
    assert at.loc["perplexity_difference", columns].tolist() == pytest.approx(interval([moved]))


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 9)), min_size=1, max_size=8), st.integers(1, 3))
def test_weights_of_items_are_repetitions(pairs, draws):
    x, w = np.array([[v + d for v, _ in pairs] for d in range(draws)]), np.array([n for _, n in pairs])
    assert interval([x], weights=[w])[0] == pytest.approx(np.repeat(x, w, axis=1).mean(), abs=1e-9)
    assert np.allclose(interval([x]), interval([x], weights=[3 * np.ones(len(w))]), equal_nan=True)


def test_weighted_intervals_cover():
    "Texts of different lengths, whose tokens share the luck of their text."
    rng, hits = np.random.default_rng(0), []
    for _ in range(400):
        n = rng.integers(1, 30, 80)
        low, high = interval([rng.normal(1, 1, (1, 80))], weights=[n])[1:]
        hits.append(low <= 1 <= high)
    assert .92 < np.mean(hits) < .98


def test_the_table_refuses(items):
    with pytest.raises(UnknownName, match="'whole'"): removal_table(items, reference="whole")
    with pytest.raises(SubnetError, match="NaN or infinite"):
        removal_table(items.assign(logprob=items.logprob.where(items.index != 3)))
    with pytest.raises(SubnetError, match="not asked for the same items"):
        removal_table(items.drop(index=items[items.under == "full"].index[0]))
    with pytest.raises(SubnetError, match="not asked for the same items"):
        removal_table(items.assign(item=items.item + 100 * (items.under == "full")))
    with pytest.raises(SubnetError, match="84 items were measured twice"): removal_table(pd.concat([items, items]))
    with pytest.raises(SubnetError, match="too large a number"):
        removal_table(items.assign(logprob=items.logprob.where(items.under == "full", -800.)))
    for weights in ([np.ones(2)], [np.zeros(3)], []):
        with pytest.raises(SubnetError, match="one weight above 0"): interval([np.ones((1, 3))], weights=weights)


# ── the rule ─────────────────────────────────────────────────────────────────────────────────────────────────────────

RULE = Removal(TARGET, CONTROL, TEXTS[:5], sparsity=.95, tolerance=.1)
FULL = {"target": -2.0, "control": -3.0, "text": -4.0}


def now(target=-5.0, control=0.0, text=0.0):
    return {"target": target, "control": -3 - math.log(1 + control), "text": -4 - math.log(1 + text)}


@pytest.mark.parametrize(
    "state, sparsity, failed",
    [
        (now(), 0.95, ""),
        (now(control=0.099, text=-0.099), 0.99, ""),
        (now(), 0.94, "sparsity"),
        (now(control=0.11), 0.95, "control"),
        (now(text=-0.11), 0.95, "text"),
        (now(control=-0.2, text=0.2), 0.5, "sparsity, control, text"),
    ],
)
def test_rule(state, sparsity, failed):
    r = RULE.rule(FULL, state, sparsity)
    assert r["failed"] == failed and r["sparsity"] == sparsity
    for n in state:
        assert r[f"{n}_perplexity"] == pytest.approx(math.exp(-state[n]))
        assert r[f"{n}_ratio"] == pytest.approx(math.exp(FULL[n] - state[n]))
    if not failed: assert r["score"] == 3.0
    else: assert r["score"] < FULL["target"] - 1


logprobs = st.floats(-50, 0)
three_logprobs = st.fixed_dictionaries({"target": logprobs, "control": logprobs, "text": logprobs})
states = st.tuples(three_logprobs, st.floats(0, 1))

@given(states, states, three_logprobs, st.floats(.01, .99), st.floats(.01, .9))
def test_what_is_allowed_beats_what_is_not(a, b, full, sparsity, tolerance):
    rule = Removal(TARGET, CONTROL, TEXTS[:5], sparsity, tolerance)
    x, y = (rule.rule(full, *s) for s in (a, b))
    for r, (s, sp) in ((x, a), (y, b)):
        ratio = {n: math.exp(full[n] - s[n]) for n in ("control", "text")}
        # at the very edge rounding decides
        def clear(v, edge): return abs(v - edge) > 1e-9 * max(1, v)
        if all(clear(v, e) for v in ratio.values() for e in (1 - tolerance, 1 + tolerance)) and clear(sp, sparsity):
            within = all(1 - tolerance <= v <= 1 + tolerance for v in ratio.values())
            assert (r["failed"] == "") == (sp >= sparsity and within)
        assert math.isfinite(r["score"]) and (r["failed"] == "" or r["score"] < 0)
    if x["failed"] == "" != y["failed"]: assert x["score"] > y["score"]


@given(states, st.floats(0, 1))
def test_less_violation_scores_more(state, step):
    "On the way from a broken state to the full model with everything kept nothing gets worse until the rule holds."
    s, sparsity = state
    def at(t): return RULE.rule(FULL, {n: s[n] + t * (FULL[n] - s[n]) for n in s}, sparsity + t * (1 - sparsity))
    a, b = at(0.0), at(step)
    if a["failed"] and b["failed"]: assert b["score"] >= a["score"] - 1e-9


def test_the_monitor_sees_the_model_without_the_critical_weights(gpt2, space, tmp_path):
    "What the log says at the end is what removal measures; it survives the way through a file."
    model, tok = gpt2
    goal = 1.5 * Suppress(TARGET) + Maintain(CONTROL) + Maintain(TEXTS[10:20]) + 2 * Density()
    settings = dict(steps=6, lr=.3, schedule="constant", complement=True, every=2, progress=False)
    watch = Removal(TARGET, CONTROL, TEXTS[:5], sparsity=.6, tolerance=.5)

    def gate(): return Concrete(space, density=.45, temperature=1., straight_through=True, seed=0)
    run = find(model, tok, gate(), goal, monitor=watch, to=tmp_path / "run", **settings)
    log = read_log(tmp_path / "run" / "metrics.jsonl").rows
    assert [r["step"] for r in log] == [2, 4, 6] and run.metrics.to_dict("records") == log
    best = max(log, key=lambda r: (r["score"], r["step"]))
    on = {"target": TARGET, "control": CONTROL, "text": TEXTS[:5]}
    t = removal_table(removal(model, tok, {"full": None, "without": ~run.mask}, on))
    value = t[(t.measure == "perplexity") & (t.under == "without")].set_index("data")["value"]
    assert best["sparsity"] == run.mask.sparsity
    for d in ("target", "control", "text"): assert best[f"{d}_perplexity"] == pytest.approx(value[d], rel=1e-4)
    assert {"target_ratio", "control_ratio", "text_ratio", "failed"} <= set(best)
    plain_run = find(model, tok, gate(), goal, **settings)
    assert plain_run.metrics.loss.tolist() == [r["loss"] for r in log]                       # watching changes nothing


def test_an_empty_critical_mask_is_allowed_and_worth_nothing(gpt2, space):
    "A gate that marks nothing: all ratios exactly 1, the score exactly 0."
    model, tok = gpt2
    gate = Threshold(space, init=-1.0)
    look = RULE.prepare(Context(model, tok, 1, 1, 0, first=2, gate=gate))
    with torch.no_grad(), masked(model, ~gate.harden()): r = look()
    assert (r["score"], r["failed"], r["sparsity"]) == (0.0, "", 1.0)
    assert r["target_ratio"] == r["control_ratio"] == r["text_ratio"] == 1.0


def test_the_rule_refuses(gpt2, space):
    model, tok = gpt2
    with pytest.raises(SubnetError, match="between 0 and 1, got 95"): Removal(TARGET, CONTROL, TEXTS, sparsity=95)
    with pytest.raises(SubnetError, match="above 0 and below 1, got 10"): Removal(TARGET, CONTROL, TEXTS, tolerance=10)
    with pytest.raises(SubnetError, match="one of them is empty"):
        Removal(TARGET, CONTROL, []).prepare(Context(model, tok, 1, 1, 0, gate=Threshold(space)))
    with pytest.raises(SubnetError, match="watches the gate"): iterate(model, tok, None, RULE, space, progress=False)
    rules = [
        RULE,
        Removal(TARGET, CONTROL, TEXTS[:5]),      # the same
        Removal(TARGET, CONTROL, TEXTS[:4]),
        Removal(TARGET, CONTROL, TEXTS[:5], tolerance=.2),
        Removal(CONTROL, TARGET, TEXTS[:5]),
    ]
    assert len({json.dumps(r.identity()) for r in rules}) == 4


# ── monitors ─────────────────────────────────────────────────────────────────────────────────────────────────────────

class Named(Precision):
    "P@1 with a name and a remark."
    def prepare(self, context):
        of = super().prepare(context)
        return lambda: {"remark": "here", "score": of(), "half": of() / 2}


def test_named_numbers_reach_every_log_and_change_nothing_else(gpt2, space, tmp_path):
    model, tok = gpt2
    runs = {
        "find": lambda m, to: (
            find(
                model,
                tok,
                Threshold(space, seed=0),
                Cloze(TARGET),
                steps=4,
                every=2,
                monitor=m,
                progress=False,
            ).metrics
        ),
        "fit": lambda m, to: fitted(model, tok, m),
        "iterate": lambda m, to: (
            iterate(
                model, tok, None, m, space, limit=2, progress=False, scores=magnitude(model, space), to=to
            ),
            pd.DataFrame(read_log(to / "metrics.jsonl").rows),
        )[1],
    }
    for name, run in runs.items():
        a, b = run(Precision(TARGET), tmp_path / name), run(Named(TARGET), tmp_path / f"{name} named")
        assert a.score.tolist() == b.score.tolist()
        assert (b.half == b.score / 2).all()
        assert (b.remark == "here").all()
        assert not {"remark", "half"} & set(a.columns)
    assert seen(.5) == {"score": .5} and seen({"x": 1, "score": 2}) == {"x": 1, "score": 2.0}
    with pytest.raises(SubnetError, match="must name one score"): seen({"x": 1})


def fitted(model, tok, monitor):
    with preserved(model): return fit(model, tok, Cloze(TARGET), steps=4, every=2, monitor=monitor)


def test_answers_are_those_of_cloze(gpt2, some):
    model, tok = gpt2
    look = Answers(TARGET).prepare(Context(model, tok, 1, 1, 0, first=2))
    with torch.no_grad(), masked(model, ~some): r = look()
    t = cloze(model, tok, TARGET, {"x": ~some})
    assert r["score"] == r["logprob"] == pytest.approx(t.logprob.mean(), abs=1e-5)
    assert r["top1"] == pytest.approx((t["rank"] == 1).mean())


# ── attribution ──────────────────────────────────────────────────────────────────────────────────────────────────────

def gradients(model, tok, facts, groups):
    "Weight gradients of each fact's loss by plain autograd on the model's own forward pass."
    causal, out = tok.mask_token is None, []
    for f in facts:
        ids, at, gold = encode(tok, f, causal)
        logits = model(input_ids=torch.tensor([ids])).logits[0, at]
        loss = torch.nn.functional.cross_entropy(logits[None], torch.tensor([gold]))
        weights = [model.base_model.get_parameter(g.name) for g in groups]
        out.append([g.numpy() for g in torch.autograd.grad(loss, weights)])
    return out


@pytest.mark.parametrize("kind, layers", [("weight", "3-4"), ("weight+bias", "all"), ("bias", "2")])
def test_attribution_is_plain_autograd(models, name, kind, layers):
    model, tok = models[name]
    space = Space.of(model, kind, layers=None if layers == "all" else layers)
    per = gradients(model, tok, TARGET, space.groups)
    w = [model.base_model.get_parameter(g.name).detach().numpy() for g in space.groups]
    found = {mode: attribution(model, tok, Cloze(TARGET), space, mode=mode) for mode in ("example", "batch")}
    # an objective's own batch does not matter to examples
    small = attribution(model, tok, Cloze(TARGET, batch=5), space)
    for i, g in enumerate(space.groups):
        each = np.mean([np.abs(w[i] * p[i]) for p in per], 0)
        assert np.allclose(found["example"][g.name], each, atol=1e-6, rtol=1e-4)
        assert np.allclose(found["batch"][g.name], np.abs(w[i] * np.mean([p[i] for p in per], 0)), atol=1e-6, rtol=1e-4)
        assert np.array_equal(small[g.name], found["example"][g.name])
    assert found["example"].meta["batches"] == 6 and found["batch"].meta["batches"] == 1


def test_attribution_leaves_no_trace(gpt2, space):
    model, tok = copy.deepcopy(gpt2[0]), gpt2[1]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    p, q = model.transformer.h[3].mlp.c_fc.weight, model.transformer.h[0].mlp.c_fc.weight
    p.grad, kept = torch.ones_like(p), torch.ones_like(p)
    q.requires_grad_(False)
    model.train()
    attribution(model, tok, Cloze(TARGET), space)
    class Stop(Exception): pass
    class Broken(Cloze):
        def prepare(self, context):
            loss, steps = super().prepare(context), []
            def one(step):
                if steps: raise Stop
                steps.append(1)
                return loss(step)
            return one
    with pytest.raises(Stop): attribution(model, tok, Broken(TARGET), space)
    assert torch.equal(p.grad, kept)
    assert [x.grad for x in model.parameters() if x is not p] == [None] * (len(list(model.parameters())) - 1)
    assert model.training and not q.requires_grad and p.requires_grad and not p._post_accumulate_grad_hooks
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_heads_get_no_gradient(pocket_bert):
    from subnet_explorer.data.sentences import read_conllu
    model, tok = pocket_bert
    data = [s.tagged for s in read_conllu(treebank(6))]
    head = Tagger(model, data)
    s = attribution(model, tok, Task(data, head), Space.of(model, "weight", layers=4), batches=2)
    assert all(p.grad is None for p in head.parameters()) and all((s[g.name] > 0).any() for g in s.space.groups)


def test_attribution_finds_what_matters(gpt2, space):
    "Removing the two percent with the highest attribution harms the facts more than as many others of their size."
    model, tok = gpt2
    best = attribution(model, tok, Cloze(TARGET), space).top(.02)
    like = [best.random_like(s, strata=magnitude(model, space)) for s in range(3)]
    t = cloze(model, tok, TARGET, {"best": ~best, "like": [~m for m in like]}).groupby(["under", "draw"]).logprob.mean()
    assert t["best"].item() < t["like"].min()
    assert all(m.table().kept.tolist() == best.table().kept.tolist() for m in like)


def test_attribution_refuses(gpt2, pocket_bert, space):
    model, tok = gpt2
    with pytest.raises(SubnetError, match="use importance"):
        attribution(model, tok, Cloze(TARGET), Space.of(model, "head"))
    with pytest.raises(UnknownName, match="Known: example, batch"):
        attribution(model, tok, Cloze(TARGET), space, mode="cumulative")
    with pytest.raises(SubnetError, match="batches must be a whole number of at least 1, got 0"):
        attribution(model, tok, Cloze(TARGET), space, batches=0)
    with pytest.raises(SpaceMismatch): attribution(*pocket_bert, Cloze(TARGET), space)
    with pytest.raises(SubnetError, match="how many examples"):
        attribution(model, tok, Cloze(TARGET) + Cloze(CONTROL), space)
    broken = copy.deepcopy(model)
    with torch.no_grad(): broken.transformer.h[3].mlp.c_proj.bias[0] = float("nan")
    with pytest.raises(SubnetError, match="NaN or infinite"):
        attribution(broken, tok, Cloze(TARGET), Space.of(broken, "weight", layers=4))


# ── learning again ───────────────────────────────────────────────────────────────────────────────────────────────────

def spying(monkeypatch):
    "Remember the weights that every fine-tuning ends with."
    ends = []
    def spy(model, *args, **kwargs):
        out = fit(model, *args, **kwargs)
        ends.append({k: v.clone() for k, v in model.state_dict().items()})
        return out
    monkeypatch.setattr(relearn, "fit", spy)
    return ends


@pytest.mark.parametrize("hold", [True, False])
def test_relearning(gpt2, space, some, hold, monkeypatch):
    "Step 0 is the model without the weights; they stay away or come back; everything is restored."
    model, tok = gpt2
    before, ends = {k: v.clone() for k, v in model.state_dict().items()}, spying(monkeypatch)
    under = {"full": None, "without": [~some, ~some.random_like(1)]}
    t = relearning(model, tok, TARGET, under, steps=5, every=2, lr=1e-3, hold=hold)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(t.columns) == ["under", "draw", "step", "logprob", "top1"]
    steps = t.groupby(["under", "draw"], sort=False).step.apply(list).to_dict()
    assert steps == {key: [0, 2, 4, 5] for key in (("full", 0), ("without", 0), ("without", 1))}
    start = t[t.step == 0].set_index(["under", "draw"]).logprob
    wanted = cloze(model, tok, TARGET, under).groupby(["under", "draw"]).logprob.mean()
    assert all(start[k] == pytest.approx(wanted[k], abs=1e-4) for k in wanted.index)
    assert (t[(t.under == "without") & (t.step == 5)].logprob.to_numpy() > start["without"].to_numpy()).all()
    for end, mask in zip(ends[1:], (some, some.random_like(1)), strict=True):
        for g, bits in mask.items(): assert (end[f"transformer.{g.name}"][torch.as_tensor(bits)] == 0).all() == hold


def test_relearning_is_plain_fine_tuning(gpt2, some):
    "AdamW on a copy without the weights, all facts in every step, a rate that falls to zero."
    model, tok = gpt2
    twin, steps, rows = zeroed(model, some), 4, []
    opt = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.0)
    coded = [encode(tok, f, True) for f in TARGET]

    def losses():
        logits = [twin(input_ids=torch.tensor([ids])).logits[0, at] for ids, at, _ in coded]
        golds = torch.tensor([gold for _, _, gold in coded])
        return torch.nn.functional.cross_entropy(torch.stack(logits), golds, reduction="none")
    twin.eval()
    for step in range(steps):
        rows.append(-losses().mean().item())
        for g in opt.param_groups: g["lr"] = 1e-3 * (1 - step / steps)
        opt.zero_grad()
        losses().mean().backward()
        for g, bits in some.items(): twin.base_model.get_parameter(g.name).grad[torch.as_tensor(bits)] = 0
        opt.step()
    rows.append(-losses().mean().item())
    t = relearning(model, tok, TARGET, {"x": ~some}, steps=steps, every=1, lr=1e-3)
    assert t.logprob.tolist() == pytest.approx(rows, abs=2e-3)


def test_the_model_comes_back_after_an_error(gpt2, some):
    model, tok = gpt2
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for hold in (True, False):
        with pytest.raises(SubnetError): relearning(model, tok, TARGET, {"x": ~some}, steps=3, lr=1e30, hold=hold)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    refused = {
        "nothing to learn again": {},
        "one mask for all": {"x": {"IsA": None}},
        "training needs a binary mask": {"x": magnitude(model, some.space)},
    }
    for says, under in refused.items():
        with pytest.raises(SubnetError, match=says): relearning(model, tok, TARGET, under, steps=1)


def test_when_facts_are_back():
    def row(u, d, values):
        return [dict(under=u, draw=d, step=10 * i, logprob=v, top1=0.0) for i, v in enumerate(values)]
    of_without = row("without", 1, [-5, -4, -3]) + row("without", 0, [-5, -1.05, -.5])
    t = pd.DataFrame(of_without + row("full", 0, [-1, -.5, -.1]))
    r = relearned(t)
    wanted = [["without", 0, -5, -.5], ["without", 1, -5, -3], ["full", 0, -1, -.1]]
    assert r[["under", "draw", "start", "end"]].values.tolist() == wanted
    assert r.steps.fillna(-1).tolist() == [10, -1, 0]
    assert relearned(t, tolerance=3).steps.tolist() == [10, 10, 0]
    assert relearned(t, tolerance=0).steps.fillna(-1).tolist() == [20, -1, 0]
    with pytest.raises(UnknownName): relearned(t, reference="whole")
    with pytest.raises(SubnetError, match="of at least 0"): relearned(t, tolerance=-1)
