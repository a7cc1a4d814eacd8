"Scores against torch and single backward passes; task heads; fine-tuning that can be taken back."
from __future__ import annotations

import numpy as np
import pytest
import torch
from floors import any_floor
from torch.nn import functional as F

from subnet_explorer.core.errors import SpaceMismatch, SubnetError, UnknownName
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.space import Space
from subnet_explorer.data.facts import Facts, encode, read_facts
from subnet_explorer.data.grammar import treebank
from subnet_explorer.data.parts import task_data
from subnet_explorer.data.pocket_tasks import plausible
from subnet_explorer.data.sentences import read_conllu
from subnet_explorer.model import packed, sequences
from subnet_explorer.model.load import load, tiny
from subnet_explorer.recipes.tickets import tickets
from subnet_explorer.search.distil import MLM
from subnet_explorer.search.loop import Diverged, lr_at
from subnet_explorer.search.objectives import Cloze, Context, Density, Objective, Task, batch_at, encoded
from subnet_explorer.search.score import attribution, importance, magnitude
from subnet_explorer.tasks.fit import fit, preserved
from subnet_explorer.tasks.heads import Classifier, Tagger

# block, attention output and second MLP linear, written out again
PATHS = {
    "pocket-bert": ("bert.encoder.layer.{}.", "attention.output.dense", "output.dense"),
    "pocket-gpt2": ("transformer.h.{}.", "attn.c_proj", "mlp.c_proj"),
}


@pytest.fixture(scope="module")
def models(pocket_bert):
    return {"pocket-bert": pocket_bert, "pocket-gpt2": load("pocket-gpt2")}


@pytest.fixture(params=PATHS)
def name(request):
    return request.param


@pytest.fixture
def facts():
    return Facts(read_facts("pocket", "MadeOf,IsA", prompt=1).items[::40][:12])


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def fact_loss(model, coded):
    "The loss of one fact that is read alone; `coded` are its ids, the place of the answer, and the answer."
    ids, place, gold = coded
    logits = model(input_ids=torch.tensor([ids])).logits[0, place]
    return F.cross_entropy(logits, torch.tensor(gold))


# ── magnitude ────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("kind", ["weight", "bias", "weight+bias"])
def test_magnitude(models, name, kind):
    model, _ = models[name]
    space = Space.of(model, kind, layers="2-3")
    scores = magnitude(model, space)
    for g in space.groups:
        assert np.array_equal(scores[g.name], model.base_model.get_parameter(g.name).detach().abs().numpy())


@pytest.mark.parametrize("block", [(32, 32), (48, 100), (1, 7)])
def test_magnitude_of_blocks_is_the_mean_of_what_they_cover(models, name, block):
    "Blocks may stick out of the matrix: only real weights count."
    model, _ = models[name]
    space = Space.of(model, "block", layers=4, block=block)
    for g in space.groups:
        w, score = model.base_model.get_parameter(g.name).detach().abs(), magnitude(model, space)[g.name]
        rows = w.split(block[0], 0)
        assert score.shape == (len(rows), len(w.split(block[1], 1)))
        for i in (0, len(rows) - 1):
            parts = rows[i].split(block[1], 1)
            for j in (0, len(parts) - 1): assert score[i, j] == pytest.approx(parts[j].mean().item(), rel=1e-5)


def test_magnitude_refuses(models):
    model, _ = models["pocket-bert"]
    with pytest.raises(SubnetError, match="use importance"): magnitude(model, Space.of(model, "head+mlp"))
    with pytest.raises(SpaceMismatch): magnitude(tiny("bert"), Space.of(model, "weight"))


# ── importance ───────────────────────────────────────────────────────────────────────────────────────────────────────

def times_input(xi, repeat):
    def hook(module, args): return (args[0] * xi.repeat_interleave(repeat),)
    return hook


def times_output(xi):
    def hook(module, args, out): return out * xi
    return hook


def gated_block(name, model, i, kind, xi):
    "Hooks by which a block is scaled with gates."
    block, output, down = PATHS[name]
    attention = model.get_submodule(block.format(i) + output)
    mlp = model.get_submodule(block.format(i) + down)
    if kind == "head": return [attention.register_forward_pre_hook(times_input(xi, 32))]
    if kind == "neuron": return [mlp.register_forward_pre_hook(times_input(xi, 1))]
    handles = [mlp.register_forward_hook(times_output(xi))]
    if kind == "layer": handles.append(attention.register_forward_hook(times_output(xi)))
    return handles


def importance_by_hand(name, model, tok, facts, kind):
    "One example at a time: a vector of ones at the right place, and the size of its gradient."
    width, total = dict(head=4, mlp=1, neuron=512, layer=1)[kind], {}
    for f in facts:
        gates = [torch.ones(width, requires_grad=True) for _ in range(4)]
        handles = [h for i, xi in enumerate(gates) for h in gated_block(name, model, i, kind, xi)]
        loss = fact_loss(model, encode(tok, f, name == "pocket-gpt2"))
        for h in handles: h.remove()
        for i, grad in enumerate(torch.autograd.grad(loss, gates)):
            group = f"layer.{i}.{kind}"
            total[group] = total.get(group, 0) + grad.abs().numpy() / len(facts)
    return total


@pytest.mark.parametrize("kind", ["head", "mlp", "neuron", "layer"])
@pytest.mark.parametrize("batch", [12, 4])
def test_importance_is_that_of_single_examples(models, name, facts, kind, batch):
    if name == "pocket-gpt2": facts = Facts(tuple(f for f in facts if f.prompt.endswith("[MASK] .")))
    model, tok = models[name]
    n = len(facts)
    epoch = -(-n // batch)      # every fact once
    scores = importance(model, tok, Cloze(facts), Space.of(model, kind), batches=epoch, batch=batch)
    for group, wanted in importance_by_hand(name, model, tok, facts, kind).items():
        assert np.allclose(scores[group], wanted, rtol=2e-3, atol=1e-5), group
    assert scores.meta["examples"] == n


def test_importance_of_two_kinds_at_once(models, facts):
    model, tok = models["pocket-bert"]
    both = importance(model, tok, Cloze(facts), Space.of(model, "head+mlp", layers="2-3"), batches=1)
    for kind in ("head", "mlp"):
        alone = importance(model, tok, Cloze(facts), Space.of(model, kind, layers="2-3"), batches=1)
        assert all(np.allclose(both[g.name], alone[g.name], rtol=1e-4) for g in alone.space.groups)


def test_importance_needs_no_weight_gradient_and_leaves_no_trace(models, name, facts):
    model, tok = models[name]
    few = facts if name == "pocket-bert" else Facts(facts.items[-4:])

    class Spy(Objective):
        def prepare(self, context):
            loss = Cloze(few).prepare(context)

            def spied(step):
                assert not model.training
                assert not any(p.requires_grad for p in model.parameters())
                return loss(step)

            return spied

    def hooks():      # transformers itself leaves some once attention was asked for
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    before, first, kept = weights(model), next(model.parameters()), hooks()
    first.requires_grad_(False)
    model.train()
    try:
        importance(model, tok, Spy(), Space.of(model, "head"), batches=2, batch=4)
        assert model.training
        assert not first.requires_grad
        assert all(p.requires_grad for p in list(model.parameters())[1:])
        assert all(p.grad is None for p in model.parameters())
        assert same(model, before)
        assert hooks() == kept
    finally:
        first.requires_grad_(True)
        model.eval()


def test_importance_refuses(models, facts):
    model, tok = models["pocket-bert"]
    for kind in ("weight", "bias", "head+bias"):
        with pytest.raises(SubnetError, match="for weights use magnitude"):
            importance(model, tok, Cloze(facts), Space.of(model, kind))
    with pytest.raises(SpaceMismatch):
        importance(models["pocket-gpt2"][0], tok, Cloze(facts), Space.of(model, "head"))


# ── what is computed again ───────────────────────────────────────────────────────────────────────────────────────────

KINDS = ["head", "mlp", "neuron", "layer", "head+mlp"]


@pytest.fixture
def repeats(monkeypatch):
    "The functions that backward was told to compute again."
    calls, original = [], packed.recomputed

    def counting(f, *args):
        calls.append(f)
        return original(f, *args)

    monkeypatch.setattr(packed, "recomputed", counting)
    return calls


def kept_and_again(measure, monkeypatch, repeats):
    "What `measure` gives where blocks keep all that backward needs, and where they keep nothing."
    monkeypatch.setattr(sequences, "KEPT", 1 << 60)
    kept = measure()
    assert not repeats
    monkeypatch.setattr(sequences, "KEPT", 0)
    again = measure()
    assert repeats
    return kept, again


def equal(one, two):
    "Whether scores have the same names and, to rounding, the same values."
    assert one.values.keys() == two.values.keys()
    return all(np.allclose(one[n], two[n], rtol=1e-5, atol=1e-7) for n in one.values)


@pytest.mark.parametrize("kind", KINDS)
def test_importance_does_not_depend_on_what_is_kept(models, name, facts, kind, monkeypatch, repeats):
    model, tok = models[name]
    goal, space = Cloze(Facts(facts.items[-4:])), Space.of(model, kind)

    def measure(): return importance(model, tok, goal, space, batches=2, batch=3)

    kept, again = kept_and_again(measure, monkeypatch, repeats)
    assert equal(kept, again)
    assert kept.meta == again.meta
    assert all(kept[n].any() for n in kept.values)


@pytest.mark.parametrize("include_removed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_does_not_matter_within_a_subnetwork(models, facts, kind, include_removed, monkeypatch, repeats):
    "Some units are removed, and all of one layer."
    model, tok = models["pocket-bert"]
    space = Space.of(model, kind)
    bits = {g.name: np.arange(g.size) % 3 != 1 for g in space.groups}
    for g in space.groups:
        if g.layer == 2: bits[g.name][:] = False
    under = Mask.of(space, bits)

    def measure():
        within = dict(under=under, include_removed=include_removed)
        return importance(model, tok, Cloze(facts), space, batches=1, **within)

    assert equal(*kept_and_again(measure, monkeypatch, repeats))


def test_terms_of_different_sizes_do_not_depend_on_what_is_kept(models, facts, monkeypatch, repeats):
    "Two passes in one loss, each with as many gates as it has examples."
    model, tok = models["pocket-bert"]
    goal, space = Cloze(Facts(facts.items[:4])) + Cloze(facts), Space.of(model, "head+mlp")

    def measure(): return importance(model, tok, goal, space, batches=1)

    kept, again = kept_and_again(measure, monkeypatch, repeats)
    assert equal(kept, again)
    assert again.meta["examples"] == 16


def test_attribution_does_not_depend_on_what_is_kept(models, facts, monkeypatch, repeats):
    model, tok = models["pocket-bert"]
    space = Space.of(model, "weight", layers="2-3")

    def measure(): return attribution(model, tok, Cloze(facts), space, batches=1, batch=12, mode="batch")

    assert equal(*kept_and_again(measure, monkeypatch, repeats))


def test_fine_tuning_with_dropout_does_not_depend_on_what_transformers_keeps(models):
    "Its own switch for computing blocks again works only in training mode, which must last until backward is done."
    model, tok = models["pocket-bert"]
    rates = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    before, found = [m.p for m in rates], []
    texts = ["a robin is a kind of bird .", "a robin can fly ."]
    try:
        for m in rates: m.p = .2
        for again in (False, True):
            if again: model.gradient_checkpointing_enable()
            with preserved(model):
                log = fit(model, tok, MLM(texts), steps=3, batch=2, lr=1e-3, warmup=0.0, dropout=True, every=1)
                found.append((log.loss.tolist(), weights(model)))
    finally:
        model.gradient_checkpointing_disable()
        for m, p in zip(rates, before, strict=True): m.p = p
    (one, kept), (two, again) = found
    assert one == pytest.approx(two, rel=1e-5)
    moved = torch.cat([(kept[k] - again[k]).abs().flatten() for k in kept])
    assert moved.gt(1e-4).float().mean() < .01      # AdamW blows up the rounding of tiny gradients


@pytest.fixture(scope="module")
def base():
    "Random weights in the shape of BERT-base, with words of the pocket world."
    from transformers import BertConfig, BertForMaskedLM
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig()).eval(), load("pocket-bert")[1]


@pytest.mark.slow
def test_importance_at_the_size_of_bert_base(base, monkeypatch, repeats):
    "As much is read at once as makes the rule change, and the result stays what it was."
    model, tok = base
    facts = Facts(read_facts("pocket", prompt=1).items[:96])
    space = Space.of(model, "head+mlp")

    def measure(): return importance(model, tok, Cloze(facts), space, batches=1, batch=96)

    again = measure()
    assert len(repeats) == 12
    monkeypatch.setattr(sequences, "KEPT", 1 << 60)
    assert equal(measure(), again)
    assert len(repeats) == 12


@pytest.mark.slow
def test_tickets_at_the_size_of_bert_base(base, repeats, monkeypatch):
    "Units are ranked on batches of which not everything is kept."
    any_floor(monkeypatch)
    model, tok = base
    data = {"entails": task_data("pocket:entails", search=.03, train=32, test=10)}
    few = dict(kind="head", drop=.5, epochs=1, length=32, supers=False)
    study = tickets(model, tok, data, seeds=(0,), floor=.5, **few, progress=False)
    assert repeats
    assert not study.skipped
    assert all(v.any() for v in study.importance["entails", 0].values.values())


# ── fine-tuning ──────────────────────────────────────────────────────────────────────────────────────────────────────

def test_fine_tuning_is_adamw(models, facts):
    "Four steps written out."
    model, tok = models["pocket-bert"]
    with preserved(model):
        log = fit(model, tok, Cloze(facts), steps=4, lr=1e-3, weight_decay=.1, batch=5, seed=3, every=1)
        ours = weights(model)
    coded = [encode(tok, f, False) for f in facts]
    lengths = np.array([len(c[0]) for c in coded])
    with preserved(model):
        opt, losses = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=.1), []
        for step in range(4):
            loss = torch.stack([fact_loss(model, coded[i]) for i in batch_at(step, lengths, 5, 3)]).mean()
            opt.param_groups[0]["lr"] = 1e-3 * lr_at(step, 4)
            opt.zero_grad()
            loss.backward()
            opt.step()
            losses.append(loss.item())
        model.zero_grad()
        assert log.loss.tolist() == pytest.approx(losses, rel=1e-3)
        assert losses[-1] < losses[0]
        apart = torch.cat([(v - ours[k]).abs().flatten() for k, v in model.state_dict().items()])
        assert apart.gt(1e-4).float().mean() < .01      # AdamW blows up the rounding of tiny gradients


@pytest.mark.parametrize("end", ["done", "diverged", "stopped"])
def test_preserved_gives_back_every_bit(models, name, facts, end):
    model, tok = models[name]

    class Ends(Objective):
        def prepare(self, context):
            loss = Cloze(Facts(facts.items[-4:])).prepare(context)

            def ending(step):
                if step == 3 and end == "stopped": raise KeyboardInterrupt
                return loss(step) * (float("nan") if step == 3 and end == "diverged" else 1)

            return ending

    before, params = weights(model), dict(model.named_parameters())
    try:
        with preserved(model):
            try: fit(model, tok, Ends(), steps=5)
            finally: assert not same(model, before)
    except Diverged as e:
        assert end == "diverged"
        assert "step 4" in str(e)
    except KeyboardInterrupt: assert end == "stopped"
    else: assert end == "done"
    assert same(model, before)
    assert all(p is params[n] for n, p in model.named_parameters())
    model.zero_grad()


def test_the_best_state_is_kept(models, facts):
    model, tok = models["pocket-bert"]
    states = []

    class Second:      # the second look is the best
        def identity(self): return {}

        def prepare(self, context):
            def score():
                states.append(weights(model))
                return -abs(len(states) - 2)

            return score

    with preserved(model):
        log = fit(model, tok, Cloze(facts), steps=6, every=2, monitor=Second())
        assert log.step.tolist() == [2, 4, 6]
        assert log.score.tolist() == [-1, 0, -1]
        assert same(model, states[1])
        assert not same(model, states[2])


def test_a_linear_probe_leaves_the_model_untouched(models):
    model, tok = models["pocket-bert"]
    trees = [s.tagged for s in read_conllu(treebank(20))]
    model.zero_grad()
    before, flags, head = weights(model), [p.requires_grad for p in model.parameters()], Tagger(model, trees)
    start = head.out.weight.detach().clone()
    log = fit(model, tok, Task(trees, head), steps=12, head_lr=.05, train="head", every=6)
    assert same(model, before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert log.loss.iloc[-1] < log.loss.iloc[0]
    assert not torch.equal(head.out.weight, start)
    left = [n for n, p in model.named_parameters() if p.grad is not None]
    model.zero_grad()
    assert not left, f"gradients were left on {len(left)} parameters"


def test_seeds_reproduce(models):
    model, tok = models["pocket-gpt2"]
    rows = plausible(40)

    def run(head_seed, seed):
        task = Task(rows, Classifier(model, rows, head_seed))
        with preserved(model): return fit(model, tok, task, steps=4, batch=8, seed=seed, every=1).loss.tolist()

    first = run(0, 0)
    assert run(0, 0) == first
    assert run(1, 0) != first
    assert run(0, 1) != first


def test_global_randomness_is_left_alone(models):
    model, _ = models["pocket-bert"]
    rows = plausible(8)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    a = Classifier(model, rows, seed=2)
    assert torch.equal(torch.rand(3), wanted)
    torch.rand(100)
    assert torch.equal(a.out.weight, Classifier(model, rows, seed=2).out.weight)
    assert not torch.equal(a.out.weight, Classifier(model, rows, seed=3).out.weight)


def test_fit_refuses(models, facts):
    model, tok = models["pocket-bert"]
    with pytest.raises(SubnetError, match="nothing to train"): fit(model, tok, Cloze(facts), train="head")
    with pytest.raises(SubnetError, match="needs a gate"): fit(model, tok, Cloze(facts) + Density())


# ── heads ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_word_is_represented_by_its_last_piece(models, name):
    model, tok = models[name]
    words = ["the", "xqz", "cat", "ab12", "."]
    head = Tagger(model, [(words, list("DXNXP"))])
    ids, rows, targets = head.encode(tok, (words, list("DXNXP")))
    pieces = [tok(" " + w, add_special_tokens=False).input_ids for w in words]
    assert max(map(len, pieces)) > 1, "no word of several pieces"
    start = len(ids) - sum(map(len, pieces)) - (name == "pocket-bert")
    assert rows == [start - 1 + sum(map(len, pieces[:i + 1])) for i in range(len(words))]
    assert [ids[r] for r in rows] == [p[-1] for p in pieces]
    assert [head.labels[t] for t in targets] == list("DXNXP")


def test_a_head_sees_the_rows_it_asked_for(models, name):
    model, tok = models[name]
    examples = [(["the", "xqz", "."], list("DXP")), (["a", "cat", "slept", "again", "."], list("DNVAP"))]
    head = Tagger(model, examples)
    loss = Task(examples, head).prepare(Context(model, tok, 1, 2, 0))(0)
    rows = []
    for e in examples:
        ids, at, y = head.encode(tok, e)
        states = model.base_model(input_ids=torch.tensor([ids]))[0][0]
        rows += [F.cross_entropy(head(states[p]), torch.tensor(t)) for p, t in zip(at, y, strict=True)]
    assert loss.item() == pytest.approx(torch.stack(rows).mean().item(), abs=1e-5)


@pytest.mark.parametrize("learning", [False, True])
def test_a_head_may_learn_from_more_than_it_is_asked_about(learning):
    class Eager:
        def encode(self, tok, example): return "asked", example
        def encode_for_training(self, tok, example): return "learned", example

    assert encoded(Eager(), None, [1], learning) == [("learned" if learning else "asked", 1)]


def test_texts_are_labelled_at_the_first_or_last_token(models):
    rows = [dict(sentence="anna slept .", label="no"), dict(sentence="the old book was red .", label="yes")]
    for name, at in (("pocket-bert", lambda ids: 0), ("pocket-gpt2", lambda ids: len(ids) - 1)):
        model, tok = models[name]
        head = Classifier(model, rows)
        for e in rows:
            ids, where, target = head.encode(tok, e)
            assert ids == tok(e["sentence"]).input_ids
            assert where == [at(ids)]
            assert head.labels[target[0]] == e["label"]
    with pytest.raises(UnknownName, match="did you mean yes"): head.target("yess")


@pytest.mark.parametrize("last", ["slept", "xqz"], ids=["a word too many", "pieces too many"])
@pytest.mark.parametrize("n", [59, 60, 61, 62, 63, 64, 65, 90])
def test_sentences_that_do_not_fit_are_refused(models, name, n, last):
    "Whole, not cut in the middle of a word: the last piece is what represents it."
    model, tok = models[name]
    words = ["the"] * (n - 1) + [last]
    head = Tagger(model, [(words, ["X"] * n)])
    fits = len(tok(words, is_split_into_words=True, verbose=False).input_ids) <= 64
    if fits:
        ids, rows, _ = head.encode(tok, (words, ["X"] * n))
        assert len(rows) == n
        assert ids[rows[-1]] == tok(" " + last, add_special_tokens=False).input_ids[-1]
    else:
        with pytest.raises(SubnetError, match=f"{n} words is too long"): head.encode(tok, (words, ["X"] * n))
