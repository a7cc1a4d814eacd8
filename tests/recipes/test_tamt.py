"Text of any size, masks on the way, iterative pruning, the study of task-agnostic masks: exact and resumable."

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from subnet_explorer.cli import main
from subnet_explorer.core.errors import SubnetError, UnknownName
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.run import OtherRun, Run
from subnet_explorer.core.space import Space
from subnet_explorer.core.store import Store
from subnet_explorer.data.files import BadTexts
from subnet_explorer.data.grammar import sentences
from subnet_explorer.data.parts import task_data
from subnet_explorer.data.tables import BadTable
from subnet_explorer.data.texts import blocks, read_blocks, read_texts
from subnet_explorer.measure.fluency import HeldOut, text_nll
from subnet_explorer.model.apply import applied, masked, parameter
from subnet_explorer.model.load import load, tiny
from subnet_explorer.model.sequences import Sequences, row_losses
from subnet_explorer.recipes.tamt import tamt
from subnet_explorer.recipes.textmasks import METHODS, first_mask, imp, ladder, objective, pruned
from subnet_explorer.recipes.textreport import means_by_task
from subnet_explorer.recipes.tuning import SPANS, TUNE, tuned_by
from subnet_explorer.search.distil import MLM, Hidden, LanguageHead
from subnet_explorer.search.find import find
from subnet_explorer.search.gates import TopK
from subnet_explorer.search.objectives import Context

chapter = importlib.import_module("subnet_explorer.recipes.tamt")
textmasks = importlib.import_module("subnet_explorer.recipes.textmasks")
tuning = importlib.import_module("subnet_explorer.recipes.tuning")
texts = importlib.import_module("subnet_explorer.data.texts")
TEXTS = [" ".join(t["form"] for t in s) for s in sentences(60)]
DEV = [" ".join(t["form"] for t in s) for s in sentences(20, seed=9)]


@pytest.fixture(scope="module")
def world():
    return load("pocket-bert")


@pytest.fixture(scope="module")
def space(world):
    return Space.of(world[0], "weight", embeddings=True)


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def at_step(goal, world, step=0, batch=8, **more):
    "The loss of a step, without any gate."
    c = Context(*world, steps=10, batch=batch, seed=3, **more)
    loss = goal.prepare(c)
    with torch.no_grad():
        for look in c.ahead:
            look(step)
        return loss(step).item()


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.text("ab \n.", max_size=40), min_size=1, max_size=12), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_pieces_of_a_file_are_its_lines(tmp_path_factory, lines, piece):
    "However small the pieces that are read."
    text = "\n".join(lines) + "x"
    file = tmp_path_factory.getbasetemp() / "pieces.txt"
    file.write_text(text)
    before, texts.PIECE = texts.PIECE, piece
    try:
        assert read_texts(file) == [t.strip() for t in text.splitlines() if t.strip()]
    finally:
        texts.PIECE = before


def test_a_line_without_end_is_cut_between_words(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "PIECE", 16)
    monkeypatch.setattr(texts, "LINE", 64)
    text = "a dog can run and " * 40
    (tmp_path / "a.txt").write_text(text)
    got = read_texts(tmp_path / "a.txt")
    assert len(got) > 5 and " ".join(got).split() == text.split() and max(map(len, got)) <= 80


def test_mapped_blocks_are_those_in_memory(world, tmp_path, monkeypatch):
    _model, tok = world
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    want = blocks(tok, TEXTS, 24)
    monkeypatch.setattr(texts, "PIECE", 100)  # tokenised a few lines at a time
    got = read_blocks(tok, tmp_path / "a.txt", 24, cache=tmp_path / "cache")
    assert (
        isinstance(got.ids, np.memmap)
        and np.array_equal(got.ids, want.ids)
        and (got.dropped, got.top, got.fingerprint) == (want.dropped, want.top, want.fingerprint)
    )
    assert (
        (got.ids[:, 0] == tok.cls_token_id).all()
        and (got.ids[:, -1] == tok.sep_token_id).all()
        and not np.isin(got.ids[:, 1:-1], [tok.cls_token_id, tok.sep_token_id]).any()
    )
    assert got[1:3].fingerprint == want[1:3].fingerprint != want.fingerprint


def test_the_cache_is_of_content(world, tmp_path):
    tok, cache = world[1], tmp_path / "cache"
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("\n".join(TEXTS))
    b.write_text("\n".join(TEXTS))

    def files():
        return sorted(p.name for p in (cache / "blocks").iterdir())

    one = read_blocks(tok, a, 24, cache=cache)
    made = files()
    assert (
        len(made) == 2 and read_blocks(tok, b, 24, cache=cache).fingerprint == one.fingerprint and files() == made
    )  # the same text elsewhere
    tok("a dog", truncation=True, padding="max_length", max_length=8)
    read_blocks(tok, a, 24, cache=cache)
    assert files() == made  # what a tokenizer did before
    read_blocks(tok, a, 32, cache=cache)
    assert len(files()) == 4
    b.write_text("\n".join(TEXTS[1:]))
    read_blocks(tok, b, 24, cache=cache)
    assert len(files()) == 6
    read_blocks(load("pocket-gpt2")[1], a, 24, cache=cache)
    assert len(files()) == 8
    (cache / "blocks" / made[0]).unlink()  # half of it lost: made again
    assert read_blocks(tok, a, 24, cache=cache).fingerprint == one.fingerprint


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "there is no text"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"a dog\0", "binary file"),
        (b"a dog runs .\n" * 99 + b"\xff\xfe", "not UTF-8"),
        (b"a dog", "too few for one block"),
    ],
)
def test_bad_text_leaves_nothing_behind(world, tmp_path, content, says):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(BadTexts, match=says):
        read_blocks(world[1], tmp_path / "a.txt", 24, cache=tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


MEMORY = """
import resource, sys
from subnet_explorer.core.space import Space
from subnet_explorer.data.texts import read_blocks
from subnet_explorer.model.load import load
from subnet_explorer.search.distil import MLM, Hidden
from subnet_explorer.search.find import find
from subnet_explorer.search.gates import TopK
model, tok = load("pocket-bert")
for file in sys.argv[2:]:
    text = read_blocks(tok, file, 64, cache=sys.argv[1])
    for goal in (MLM(text), Hidden(text)):
        gate = TopK(Space.of(model, "weight"), .5)
        find(model, tok, gate, goal, steps=3, batch=4, progress=False)
    print(len(text), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def peaks(folder: Path, *megabytes: float) -> list[tuple[int, int]]:
    "Of generated files, read and trained on in one process: their blocks, and the megabytes it needed at most."
    text, files = "\n".join(TEXTS) + "\n", [folder / f"{m}.txt" for m in megabytes]
    for file, m in zip(files, megabytes, strict=False):
        with file.open("w") as f:
            for _ in range(int(m * 1e6 / len(text))):
                f.write(text)
    out = subprocess.run(
        [sys.executable, "-c", MEMORY, folder / "cache", *files],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert out.returncode == 0, out.stderr
    pairs = [line.split() for line in out.stdout.splitlines()]
    return [(int(a), int(b)) for a, b in pairs]


def test_memory_does_not_grow_with_the_text(tmp_path):
    "Hidden states of the larger one would take 400 MB."
    (few, small), (many, large) = peaks(tmp_path, 0.3, 3)
    assert many > 9 * few and large - small < 60


@pytest.mark.slow
def test_memory_does_not_grow_with_a_text_of_200_megabytes(tmp_path):
    (few, small), (many, large) = peaks(tmp_path, 2, 200)
    assert many > 99 * few and large - small < 300


# ── objectives ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_masking_is_berts_recipe(world):
    "Fifteen per cent of the tokens that are no special ones; of these 80 % [MASK], 10 % random, 10 % left."
    from subnet_explorer.search.distil import _masked

    model, tok = world
    cut = blocks(tok, TEXTS * 5, 64)
    c = Context(model, tok, 10, len(cut), 0)
    seqs = Sequences(model, cut.ids)
    picked = swapped = left = total = 0
    for step in range(20):
        mixed, b, p, gold = _masked(MLM(cut), seqs, np.arange(len(cut)), c, step)
        assert torch.equal(gold, torch.tensor(cut.ids).long()[b, p]) and not np.isin(gold, tok.all_special_ids).any()
        untouched = torch.ones_like(mixed, dtype=torch.bool)
        untouched[b, p] = False
        assert torch.equal(mixed[untouched], torch.tensor(cut.ids).long()[untouched])
        now = mixed[b, p]
        picked, total = picked + len(gold), total + int((~np.isin(cut.ids, tok.all_special_ids)).sum())
        left, swapped = (
            left + int((now == gold).sum()),
            swapped + int(((now != gold) & (now != tok.mask_token_id)).sum()),
        )
    assert abs(picked / total - 0.15) < 0.01 and abs(left / picked - 0.1) < 0.02 and abs(swapped / picked - 0.1) < 0.02


@pytest.mark.parametrize("share", [1.0, 1e-9])
def test_unknown_words_are_neither_masked_nor_predicted(world, share):
    "Not even where no other token was drawn, and one must be."
    from subnet_explorer.search.distil import _masked

    model, tok = world
    c = Context(model, tok, 10, 2, 0)
    ids = [tok(t).input_ids for t in ("[UNK] [UNK] a dog can run", "[UNK] a bird")]
    mixed, batch, position, gold = _masked(MLM(["a"], share=share), Sequences(model, ids), np.arange(2), c, 0)
    words = [(i, j) for i, row in enumerate(ids) for j, t in enumerate(row) if t not in tok.all_special_ids]
    chosen = list(zip(batch.tolist(), position.tolist(), strict=True))
    assert chosen == (words if share == 1 else [(0, 3), (1, 2)])
    assert mixed[0, 1] == mixed[0, 2] == mixed[1, 1] == tok.unk_token_id and tok.unk_token_id not in gold


def test_a_causal_model_predicts_no_unknown_word():
    model, tok = load("pocket-gpt2")
    text = "a dog can run"
    known = tok(text, add_special_tokens=False).input_ids
    plain = text_nll(model, tok, [text]).tokens.item()
    tok.unk_token = tok.convert_ids_to_tokens(known[1])  # as if the word were the token of unknown ones
    try:
        assert tok.unk_token_id == known[1] and text_nll(model, tok, [text]).tokens.item() == plain - 1
        c = Context(model, tok, 10, 1, 0)
        mean = MLM([text]).prepare(c)(0).item()
        assert mean == pytest.approx(text_nll(model, tok, [text]).nll.item() / (plain - 1), rel=1e-5)
        with pytest.raises(SubnetError, match="no token to predict"):
            MLM([text, " dog"]).prepare(c)
    finally:
        tok.unk_token = None


def test_blocks_cost_what_hugging_face_says(world):
    from subnet_explorer.search.distil import _masked

    model, tok = world
    cut = blocks(tok, TEXTS, 32)
    c = Context(model, tok, 10, len(cut), 3)
    mixed, b, p, gold = _masked(
        MLM(cut), Sequences(model, cut.ids), (index := c.part(0, np.full(len(cut), 32), None)), c, 0
    )
    with torch.no_grad():
        want = F.cross_entropy(model(input_ids=mixed).logits[b, p], gold).item()
    assert abs(at_step(MLM(cut), world, batch=len(cut)) - want) < 1e-4
    assert sorted(index) == list(range(len(cut)))


@pytest.mark.parametrize("padding", [False, True])
def test_distance_with_and_without_padding(world, space, padding):
    "Against cosines written down plainly."
    model, tok = world
    texts = ["a dog has fur", "the quiet girl ran in the big garden with a dog", "a cat"]
    x = tok(texts, return_tensors="pt", padding=True)
    mask = Mask.random(space, 0.8, seed=0)
    c = Context(model, tok, 10, 3, 3)
    loss = Hidden(texts, padding=padding).prepare(c)
    with torch.no_grad():
        full = model(**x, output_hidden_states=True).hidden_states[1:]
        for look in c.ahead:
            look(0)
        with masked(model, mask):
            mine, got = model(**x, output_hidden_states=True).hidden_states[1:], loss(0).item()
    far = torch.stack([1 - F.cosine_similarity(h, g, dim=-1) for h, g in zip(mine, full, strict=False)]).mean(0)
    assert abs(got - (far.mean() if padding else far[x.attention_mask.bool()].mean()).item()) < 1e-5


def test_the_head_reads_the_embedding_of_the_full_model(world, space):
    "A tied decoder is masked with the embedding, that of a LanguageHead is not; it learns all but the decoder."
    model, tok = world
    before, mask, cut = state(model), Mask.random(space, 0.5, seed=1), blocks(tok, TEXTS, 32)

    def hf(own):
        c = Context(model, tok, 10, len(cut), 3)
        loss = MLM(cut, head=LanguageHead(model, False) if own else None).prepare(c)
        with torch.no_grad(), masked(model, mask):
            return loss(0).item()

    tied, apart = hf(False), hf(True)
    w = model.get_input_embeddings().weight
    with torch.no_grad(), masked(model, mask):
        from subnet_explorer.search.distil import _masked

        c = Context(model, tok, 10, len(cut), 3)
        mixed, b, p, gold = _masked(MLM(cut), Sequences(model, cut.ids), c.part(0, np.full(len(cut), 32), None), c, 0)
        h = model.cls.predictions.transform(model.bert(input_ids=mixed).last_hidden_state[b, p])
        for weight, got in ((w * torch.tensor(mask[space.groups[0].name]), tied), (w, apart)):
            assert abs(F.cross_entropy(h @ weight.T + model.cls.predictions.bias, gold).item() - got) < 1e-4
    head = LanguageHead(model)
    start = [p.detach().clone() for p in head.own]
    run = find(
        model,
        tok,
        TopK(space, 0.5, init=first_mask(model, space, 0.5)),
        MLM(cut, head=head),
        steps=3,
        lr=1e-3,
        progress=False,
    )
    assert all(not torch.equal(a, b) for a, b in zip(start, head.own, strict=False)) and same(model, before)
    assert run.config["goal"]["head"] and torch.equal(head.copied[0].get_output_embeddings().weight, w)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert", "mpnet", "gpt2"])
def test_heads_of_every_family(family):
    "The copy predicts what the model predicts, is trained alone, and leaves the model as it is."
    model, ids = tiny(family), [[5, 6, 7, 8], [9, 8, 5]]
    before, head = state(model), LanguageHead(model)
    seqs = Sequences(model, ids)
    states = seqs.hidden(np.arange(2), [0, 1], [1, 2]).detach()
    assert torch.allclose(head.over(seqs).predict(states), seqs.predict(states), atol=1e-6) and head.learns == (
        family != "gpt2"
    )
    row_losses(
        head.over(seqs), states.requires_grad_(), lambda logits, part: -logits.log_softmax(-1)[:, 5]
    ).sum().backward()
    assert (
        states.grad.any()
        and (not head.learns or any(p.grad is not None and p.grad.any() for p in head.own))
        and all(p.grad is None for p in model.parameters())
    )
    with torch.no_grad():
        [p.add_(1) for p in head.own]
    assert same(model, before)


def test_a_causal_model(tmp_path):
    model, tok = load("pocket-gpt2")
    space = Space.of(model, "weight", embeddings=True)
    run = find(
        model,
        tok,
        TopK(space, 0.5, init=first_mask(model, space, 0.5)),
        objective("mlm+kd", model, blocks(tok, TEXTS, 24)),
        steps=3,
        lr=2e-2,
        to=tmp_path / "r",
        progress=False,
    )
    assert run.mask.table().kept.tolist() == [round(0.5 * g.size) for g in space.groups] and run.mask != first_mask(
        model, space, 0.5
    )
    ladder_ = imp(model, tok, TEXTS, Space.of(model, "weight"), [0.8], **LADDER)
    assert ladder_.mask.density == pytest.approx(0.8, abs=1e-4)


def test_a_teacher_must_have_the_same_shape(world):
    _model, _tok = world
    for goal in (
        Hidden(TEXTS, teacher=tiny("bert")),
        MLM(TEXTS, distil=1.0, teacher=tiny("bert")),
        Hidden(TEXTS, padding=True, teacher=tiny("bert")),
    ):
        with pytest.raises(SubnetError, match="a teacher of another architecture"):
            at_step(goal, world)
    other = load("pocket-bert")[0]
    assert abs(at_step(Hidden(TEXTS, teacher=other), world)) < 1e-5
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight.mul_(1.5)
    assert (
        at_step(Hidden(TEXTS, teacher=other), world) > 1e-3
        and Hidden(TEXTS, teacher=other).identity() != Hidden(TEXTS).identity()
    )


# ── finding ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_omp_is_argpartition(world, space):
    mask = first_mask(world[0], space, 0.3)
    for g, bits in mask.items():
        w = parameter(world[0], g).detach().abs().numpy().ravel()
        k = round(0.3 * w.size)
        best = np.argpartition(w, w.size - k)[w.size - k :]
        assert (
            bits.sum() == k
            and w[bits.ravel()].sum() == pytest.approx(w[best].sum(), rel=1e-6)
            and w[bits.ravel()].min() >= w[~bits.ravel()].max()
        )


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("method", METHODS[3:])
def test_density_is_exact_at_every_evaluation(world, space, method, scope):
    "Also with scores that tie: words that never occur get no gradient, and all start from two values."
    model, tok = world
    run = find(
        model,
        tok,
        TopK(space, 0.3, init=first_mask(model, space, 0.3, scope=scope), scope=scope),
        objective(method, model, TEXTS),
        steps=6,
        lr=3e-3,
        snapshots=range(7),
        every=1,
        progress=False,
    )
    assert len({m.id for _, m in run.snapshots}) > 3
    for _, m in run.snapshots:
        assert (
            m.count == round(0.3 * space.size)
            if scope == "global"
            else m.table().kept.tolist() == [round(0.3 * g.size) for g in space.groups]
        )
    assert (run.metrics.density == run.mask.density).all() and run.snapshots[6] == run.mask


def test_choosing_every_few_steps(world):
    "Between two choices the mask stands still."
    model, tok = world
    space = Space.of(model, "weight")

    class Seen:
        def identity(self):
            return {"monitor": "seen"}

        def prepare(self, c):
            return lambda: {
                "score": 0.0,
                "chosen": Mask.of(
                    space, {g.name: c.gate.multiplier(i)[0].numpy() for i, g in enumerate(space.groups)}
                ).id,
            }

    def ids(every):
        return find(
            model,
            tok,
            TopK(space, 0.3, init=first_mask(model, space, 0.3), every=every),
            MLM(TEXTS),
            steps=8,
            lr=2e-2,
            warmup=0.0,
            every=1,
            monitor=Seen(),
            progress=False,
        ).metrics.chosen.tolist()

    one, four = ids(1), ids(4)
    assert (
        len(set(one)) == 8
        and len(set(four[:3])) == 1
        and four[3] != four[2]
        and len(set(four[3:7])) == 1
        and len(set(four)) == 3
    )


def test_the_gradient_is_that_of_the_relaxed_mask(world):
    "Straight-through: the slope of the loss in each multiplier, by finite differences."
    model, tok = world
    space = Space.of(model, "weight", layers=4, only="q")
    gate = TopK(space, 0.5, init=first_mask(model, space, 0.5))
    goal, c = MLM(TEXTS[:8], static=True), Context(model, tok, 1, 8, 0)
    loss = goal.prepare(c)
    values = gate.sample()
    with applied(model, space, values):
        loss(0).backward()
    (name, v), slope = next(iter(values.items())), gate.logits[0].grad
    base = {name: v.detach()}

    def moved(at, by):
        t = base[name].clone()
        t.view(-1)[at] += by
        with torch.no_grad(), applied(model, space, {name: t}):
            return loss(0).item()

    for at in slope.abs().flatten().topk(4).indices.tolist():
        assert (moved(at, 0.5) - moved(at, -0.5)) == pytest.approx(slope.flatten()[at].item(), rel=0.1, abs=2e-5)


# ── iterative pruning ────────────────────────────────────────────────────────────────────────────────────────────────

LADDER = dict(interval=2, lr=2e-3, batch=8)


@given(st.lists(st.floats(0.05, 0.95), min_size=1, max_size=4), st.sampled_from([0.1, 0.2, 0.25]))
def test_ladders(densities, drop):
    rungs = ladder(densities, drop)
    assert (
        rungs == sorted(set(rungs), reverse=True)
        and rungs[-1] == round(min(densities), 6)
        and {round(d, 6) for d in densities} <= set(rungs)
    )
    assert all(a - b <= drop + 1e-6 for a, b in zip([1.0, *rungs], rungs, strict=False))


@pytest.mark.parametrize("rewind", [True, False])
def test_iterative_pruning(world, space, rewind, monkeypatch):
    "Sparsities add up, masks are nested, and every interval begins with the pretrained values, or not."
    model, tok = world
    before, met = state(model), []
    names = {id(p): n for n, p in model.base_model.named_parameters()}
    real = textmasks.fit

    def watching(m, *args, **more):
        met.append([p.detach().clone() for p in m.base_model.parameters()])
        return real(m, *args, **more)

    monkeypatch.setattr(textmasks, "fit", watching)
    run = imp(model, tok, TEXTS, space, [0.6], rewind=rewind, **LADDER)
    assert run.metrics.step.tolist() == [0, 2, 4, 6] and same(model, before)
    masks = [m for _, m in run.snapshots]
    for i, m in enumerate(masks, 1):
        assert m.table().kept.tolist() == [round((1 - 0.1 * i) * g.size) for g in space.groups]
    assert masks[0] == first_mask(model, space, 0.9) and all(b <= a for a, b in itertools.pairwise(masks))
    assert masks[3] != pruned(model, masks[0], 0.6)  # training had a say
    for weights, mask in zip(met, masks, strict=False):
        kept = [
            torch.ones_like(p, dtype=torch.bool) if (n := names[id(p)]) not in space.by_name else torch.tensor(mask[n])
            for p in model.base_model.parameters()
        ]
        assert all((w[~k] == 0).all() for w, k in zip(weights, kept, strict=False))  # held
        assert all(
            torch.equal(w[k], p[k]) for w, k, p in zip(weights, kept, model.base_model.parameters(), strict=False)
        ) == (rewind or mask is masks[0])


class Stop(Exception):
    pass


@pytest.mark.parametrize("rewind", [True, False])
@pytest.mark.parametrize("when", [1, 3, 4])
def test_a_stopped_ladder_goes_on(world, tmp_path, when, rewind, monkeypatch):
    "Bit for bit, wherever it was stopped."
    model, tok = world
    space, before = Space.of(model, "weight", layers="3-4"), state(model)

    def climb(to):
        return imp(model, tok, TEXTS, space, [0.6], rewind=rewind, seed=2, to=to, **LADDER)

    real, left = textmasks.pruned, [when]

    def stopping(*args):
        left[0] -= 1
        if left[0] == 0:
            raise Stop
        return real(*args)

    monkeypatch.setattr(textmasks, "pruned", stopping)
    with pytest.raises(Stop):
        climb(tmp_path / "a")
    assert same(model, before) and not Run.open(tmp_path / "a").done
    again, straight = climb(tmp_path / "a"), climb(None)
    assert [m for _, m in again.snapshots] == [
        m for _, m in straight.snapshots
    ] and again.metrics.loss.dropna().tolist() == straight.metrics.loss.dropna().tolist()
    assert not list((tmp_path / "a").glob("cycle*")) and same(model, before)


# ── the study ────────────────────────────────────────────────────────────────────────────────────────────────────────

SMALL = dict(
    densities=(0.6,),
    steps=4,
    lr=2e-2,
    batch=8,
    snapshots=2,
    tuning=dict(epochs=1, lr=1e-3),
    tuning_seeds=(0,),
    progress=False,
)


@pytest.fixture(scope="module")
def tasks():
    return {t: task_data(f"pocket:{t}", train=32, test=32) for t in ("entails", "similar")}


@pytest.fixture(scope="module")
def straight(world, tasks, tmp_path_factory):
    to = tmp_path_factory.mktemp("tamt") / "study"
    return tamt(
        *world, TEXTS, DEV, methods=("omp", "random", "imp", "mlm"), seeds=(0, 1), tasks=tasks, to=to, **SMALL
    ), to


def test_the_study(world, straight, tasks):
    study, _to = straight
    assert (
        study.scores.method.tolist() == ["full", "omp", "random", "random", "imp", "imp", "mlm", "mlm"]
        and len(study.transfer) == 2 * 8
    )
    assert all(m.table().kept.tolist() == [round(0.6 * g.size) for g in m.space.groups] for _, m in study.masks)
    head = HeldOut(*world, MLM(DEV, head=LanguageHead(world[0], False)))
    for (_labels, m), r in zip(study.masks, study.scores[1:].itertuples(), strict=False):
        assert head(m) == pytest.approx(r.mlm_loss, rel=1e-5)
    full, random = study.scores.mlm_loss[0], study.scores.query("method == 'random'").mlm_loss
    assert full < random.min() and study.scores.query("method in ('omp', 'imp')").mlm_loss.max() < random.min()
    assert (
        set(study.curves[study.curves.method == "mlm"].step) == {0, 2, 4}
        and (study.curves[study.curves.step == 0].moved == 0).all()
    )
    t = study.summary()
    assert t.loc[0, "mean"] == pytest.approx(
        study.transfer.query("method == 'full'").score.mean()
    ) and t.n.tolist() == [1, 1, 2, 2, 2]


def test_a_study_is_read_again_and_extended(world, straight, tasks, monkeypatch):
    study, to = straight

    def no(*args, **more):
        raise AssertionError("trained again")

    with monkeypatch.context() as m:
        m.setattr(textmasks, "fit", no)
        for name in ("fit", "score_after_training"):
            m.setattr(tuning, name, no)
        m.setattr("subnet_explorer.search.loop.one_step", no)
        again = tamt(
            *world, TEXTS, DEV, methods=("omp", "random", "imp", "mlm"), seeds=(0, 1), tasks=tasks, to=to, **SMALL
        )
    for name in ("scores", "curves", "transfer"):
        assert getattr(again, name).equals(getattr(study, name)), name
    more = tamt(*world, TEXTS, DEV, methods=("omp", "kd"), seeds=(0,), tasks={}, to=to, **SMALL)
    assert (
        more.scores.method.tolist() == ["full", "omp", "kd"] and more.masks[0] == study.masks[0] and more.transfer.empty
    )
    with pytest.raises(OtherRun, match="another study"):
        tamt(*world, TEXTS[1:], DEV, methods=("omp",), to=to, **SMALL)


def test_a_stopped_study_goes_on(world, straight, tasks, tmp_path, monkeypatch):
    study, _ = straight
    real, left = tuning.score_after_training, [4]

    def stopping(*args, **more):
        left[0] -= 1
        if left[0] == 0:
            raise Stop
        return real(*args, **more)

    def go():
        return tamt(*world, TEXTS, DEV, methods=("omp", "mlm"), seeds=(0,), tasks=tasks, to=tmp_path / "s", **SMALL)

    with monkeypatch.context() as m:
        m.setattr(tuning, "score_after_training", stopping)
        with pytest.raises(Stop):
            go()
    got, want = go().transfer, study.transfer.query("method in ('full', 'omp', 'mlm') and seed == 0")
    keys = ["task", "method", "density", "tuning_seed"]
    assert got.set_index(keys).score.to_dict() == want.set_index(keys).score.to_dict()


def test_json_and_report(straight, tmp_path):
    study, _to = straight
    out = json.loads(json.dumps(study.to_json(), allow_nan=False))
    assert (
        list(out)[:4] == ["model", "full", "methods", "jaccard"]
        and list(out["full"]) == ["mlm_loss", "tasks"]
        and list(out["methods"]) == ["omp", "random", "imp", "mlm"]
    )
    for m, by in out["methods"].items():
        cell = by["0.6"]
        assert list(cell) == ["density", "mlm_loss", "hidden_loss", "steps", "seconds", "masks", "tasks"] and len(
            cell["masks"]
        ) == (1 if m == "omp" else 2)
        assert [Mask.load(p).density for p in cell["masks"]] == pytest.approx(
            [cell["density"]] * len(cell["masks"]), abs=1e-6
        )
        assert all(
            list(t) == ["mean", "std", "scores"] and len(t["scores"]) == len(cell["masks"])
            for t in cell["tasks"].values()
        ) and list(cell["tasks"]) == ["entails", "similar"]
        assert cell["steps"] == {"omp": 0, "random": 0, "imp": 3 * 1, "mlm": 4}[m]
    assert {r["step"] for r in out["jaccard_by_step"]} == {0, 2, 4}
    assert [(r["task"], r["method"]) for r in out["by_task"]] == [
        (t, m) for t in ("entails", "similar") for m in ("full", "omp", "random", "imp", "mlm")
    ]
    n, j = len(out["jaccard"]["labels"]), out["jaccard"]
    assert n == 4 and np.shape(j["distance"]) == np.shape(j["chance"]) == (4, 4)
    assert j["distance"][0][1] == pytest.approx(j["chance"][0][1], abs=0.01)
    page = study.report(tmp_path / "r.html").read_text()
    assert all(s in page for s in ("Mean over tasks", "Jaccard distance", "Score against loss", "Masks on the way"))
    assert all(s in page for s in ("Score of every task at density 0.6", "Score of every task against loss on text"))


def test_matched_masks_have_taken_what_pruning_takes(world):
    study = tamt(
        *world, TEXTS, DEV, methods=("imp", "mlm"), matched=True, interval=1, **SMALL | dict(densities=(0.8, 0.6))
    )
    assert study.scores.set_index(["method", "density"]).steps.to_dict() == {
        ("full", 1.0): 0,
        ("imp", 0.8): 1,
        ("imp", 0.6): 3,
        ("mlm", 0.8): 1,
        ("mlm", 0.6): 3,
    }


def test_a_study_with_other_settings_beside(world, straight, tmp_path):
    "Each names its own masks: settings, teachers, and prunes on the way tell them apart."

    def go(to, **more):
        return tamt(*world, TEXTS, DEV, to=to, **SMALL | dict(steps=2, snapshots=0) | more)

    def named(study, to):
        return [Mask.load(p) for m in study.to_json()["methods"].values() for by in m.values() for p in by["masks"]]

    for steps in (2, 3, 1):
        study = go(tmp_path / "a", methods=("mlm",), steps=steps)
        assert named(study, tmp_path / "a") == [m for _, m in study.masks] and study.scores.steps.tolist() == [0, steps]
    other = load("pocket-bert")[0]
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight.mul_(3)
    own, taught = go(tmp_path / "a", methods=("kd",)), go(tmp_path / "a", methods=("kd",), teacher=other)
    assert (
        own.masks[0] != taught.masks[0] == go(None, methods=("kd",), teacher=other).masks[0]
        and own.config["teacher"] is None
        and "weights" in taught.config["teacher"]
    )
    few, more = go(tmp_path / "a", methods=("imp",)), go(tmp_path / "a", methods=("imp",), densities=(0.65, 0.6))
    assert (few.scores.steps.tolist(), more.scores.steps.tolist()) == ([0, 3], [0, 3, 4]) and more.masks[1] == go(
        None, methods=("imp",), densities=(0.65, 0.6)
    ).masks[1]


def test_how_far_masks_are(straight, world):
    "From the mask before training, whatever snapshots there are; and by matrix, against masks counted plainly."
    study, _ = straight
    alone = tamt(*world, TEXTS, DEV, methods=("mlm",), **SMALL | dict(snapshots=0))
    last = study.curves.query("method == 'mlm' and step == 4 and seed == 0")
    assert alone.curves.moved.tolist() == last.moved.tolist() != [
        0.0
    ] and alone.curves.chance.tolist() == pytest.approx([1 - 0.6 / 1.4], abs=1e-3)
    imp_ = study.curves.query("method == 'imp' and step == 0")
    assert (imp_.moved == 0).all() and (imp_.density == 0.9).all()  # nothing was trained before the first prune
    t, (a, b) = study.by_matrix(), (study.masks.sel(method=m, seed=0)[0] for m in ("omp", "imp"))
    t = t[(t.a == "omp 0.6") & (t.b == "imp 0.6")].reset_index()
    two = study.masks.sel(method="imp", seed=1)[0]

    def far(m, name):
        return 1 - (a[name] & m[name]).sum() / (a[name] | m[name]).sum()

    for r, g in zip(t.itertuples(), study.space.groups, strict=True):
        assert (
            (r.layer, r.matrix, r.size) == (g.layer + 1, g.role, g.size)
            and r.distance == pytest.approx((far(b, g.name) + far(two, g.name)) / 2)
            and r.chance == pytest.approx(1 - 0.6 / 1.4, abs=1e-3)
        )
    assert t.distance.gt(0).any() and len(study.by_matrix()) == 6 * len(study.space.groups)


def test_distances_at_every_step(straight):
    "Of seeds of one method, of methods with each other, and with masks that stand still, counted plainly."
    study, to = straight
    t = study.tables["jaccard_by_step"].set_index(["density", "step", "a", "b"])
    way = {
        (seed, step): mask
        for seed in (0, 1)
        for labels, mask in Run.open(next(to.glob(f"searches/mlm-0.6-{seed}-*"))).snapshots
        for step in [labels["step"]]
    }

    def far(a, b):
        both = sum(int((x & y).sum()) for (_, x), (_, y) in zip(a.items(), b.items(), strict=True))
        return 1 - both / (a.count + b.count - both)

    (omp,), imps = study.masks.sel(method="omp"), study.masks.sel(method="imp")
    omp = omp[1]
    for step in (0, 2, 4):
        assert t.distance[0.6, step, "mlm", "mlm"] == pytest.approx(far(way[0, step], way[1, step]))
        assert t.distance[0.6, step, "omp", "mlm"] == pytest.approx(np.mean([far(omp, way[s, step]) for s in (0, 1)]))
        assert t.distance[0.6, step, "imp", "mlm"] == pytest.approx(
            np.mean([far(mask, way[s, step]) for _, mask in imps for s in (0, 1)])
        )
    assert t.distance[0.6, 0, "mlm", "mlm"] == 0 < t.distance[0.6, 4, "mlm", "mlm"] < t.chance[0.6, 4, "mlm", "mlm"]
    assert t.chance.to_numpy() == pytest.approx(1 - 0.6 / 1.4, abs=1e-3)
    assert ("omp", "omp") not in t.loc[0.6, 0].index and ("mlm", "omp") not in t.loc[0.6, 0].index


def test_every_task_has_its_own_interval(straight):
    "Over masks, fine-tuning seeds and sentences; of a single run over sentences."
    study, _ = straight
    t = means_by_task(study).set_index(["task", "method"])
    for task, method in itertools.product(study.tasks, ("full", "omp", "random", "imp", "mlm")):
        scores = study.transfer.query("task == @task and method == @method").score
        assert t["mean"][task, method] == pytest.approx(scores.mean()) and t.seeds[task, method] == len(scores)
    assert t.low["entails", "mlm"] <= t["mean"]["entails", "mlm"] <= t.high["entails", "mlm"]
    assert (t["items"]["entails"] == 32).all() and t.low["entails", "omp"] < t.high["entails", "omp"]  # one run


def test_questions_are_tuned_by_their_own_settings():
    of = {t: task_data(f"pocket:{t}", train=20, test=20) for t in ("entails", "answers")}
    assert (
        tuned_by(of["entails"], {}) == TUNE
        and tuned_by(of["answers"], {}) == TUNE | SPANS
        and (SPANS["length"], TUNE["length"]) == tuple(of[t].train.task.length for t in ("answers", "entails"))
    )
    assert tuned_by(of["answers"], {"batch": 4}) == TUNE | SPANS | {"batch": 4}


def test_a_report_of_masks_on_the_way(world, tasks, tmp_path):
    study = tamt(
        *world,
        TEXTS,
        DEV,
        methods=("omp", "imp", "mlm"),
        along=True,
        tasks={"entails": tasks["entails"]},
        to=None,
        **SMALL | dict(densities=(0.8, 0.6)),
    )
    assert set(study.transfer.query("method == 'mlm' and density == 0.6").step) == {0, 2, 4}
    page = study.report(tmp_path / "r.html").read_text()
    assert all(
        s in page
        for s in (
            "Score against steps of search, density 0.8",
            "Score against steps of search, density 0.6",
            "imp to 0.6",
            "mlm 0.6: distance from the largest weights (chance 0.57)",
            "Unrelated masks: 0.33 at 0.8, 0.57 at 0.6",
        )
    )
    assert "mlm 0.8: distance from" not in page  # at the lowest density only


@pytest.mark.parametrize(
    "more, says",
    [
        (dict(interval=0), "interval must be a whole number of at least 1, got 0"),
        (dict(interval=2.5), "whole number"),
        (dict(snapshots=-1), "at least 0"),
        (dict(snapshots=[0, 9]), "there is no step 9"),
        (dict(densities=(1e-9,), scope="global"), "keeps none of"),
        (dict(matched=True, interval=3), "imp takes 9 steps to a density of 0.6"),
        (dict(tuning=dict(epoch=3)), "did you mean epochs"),
        (dict(tuning=dict(epochs=0)), "fine-tuning: epochs must be"),
        (dict(tuning=dict(lr=-1.0)), "fine-tuning: lr must be"),
        (dict(text=[]), "text is empty"),
        (dict(dev=[]), "dev is empty"),
        (dict(densities=(1e-6,)), "keeps nothing of"),
        (dict(densities=(1.5,)), "densities must be several values"),
        (dict(seeds=(0, 0)), "different numbers"),
        (dict(methods=()), "at least one method"),
        (dict(tasks={"RTE": TEXTS}), "each value of it the data of a task as tasks"),
        (dict(drop=0.0), "drop must be a number above 0"),
        (dict(steps=0), "steps must be"),
    ],
)
def test_bad_input(world, tmp_path, more, says):
    text, dev = more.pop("text", TEXTS), more.pop("dev", DEV)
    with pytest.raises(SubnetError, match=says):
        tamt(*world, text, dev, to=tmp_path / "s", **SMALL | more)
    assert not (tmp_path / "s").exists()


def test_names_are_checked(world):
    with pytest.raises(UnknownName, match="did you mean mlm"):
        tamt(*world, TEXTS, DEV, methods=("mln",), **SMALL)
    with pytest.raises(UnknownName, match="did you mean random"):
        tamt(*world, TEXTS, DEV, init="randon", **SMALL)
    with pytest.raises(SubnetError, match="another architecture"):
        tamt(*world, TEXTS, DEV, methods=("kd",), teacher=tiny("bert"), **SMALL)


def test_a_task_without_development_sentences(tmp_path):
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "train.tsv").write_text(
        "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\ta\tc\tnot_entailment\n"
    )
    with pytest.raises(BadTable, match=r"there is no table .*dev\.tsv"):
        task_data(tmp_path / "RTE")


def test_the_shell(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    call = [
        "tamt",
        "--model",
        "pocket-bert",
        "--text",
        str(tmp_path / "a.txt"),
        "--densities",
        "0.6",
        "--methods",
        "omp,mlm",
        "--steps",
        "3",
        "--snapshots",
        "1",
        "--tasks",
        "pocket:entails",
        "--limit-train",
        "40",
        "--limit-test",
        "40",
        "--tuning",
        "epochs=1",
        "--tuning-seeds",
        "0",
        "--out",
        str(tmp_path / "out"),
        "--quiet",
    ]
    assert main([*call, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert (
        list(out["methods"]) == ["omp", "mlm"]
        and all(Path(p).exists() for m in out["methods"].values() for p in m["0.6"]["masks"])
        and (tmp_path / "out" / "report.html").exists()
    )
    assert (
        len(Store(tmp_path / "out" / "runs").masks()) == 2
        and json.loads((tmp_path / "out" / "results.json").read_text())["full"] == out["full"]
    )
    assert (
        (tmp_path / "out" / "distances.csv")
        .read_text()
        .startswith("a,b,layer,matrix,size,distance,chance\nomp 0.6,mlm 0.6,")
    )
    for more, says in (
        (["--limit-train", "-5"], "--limit-train must be a whole number"),
        (["--methods", "omp, mln"], "did you mean mlm"),
        (["--densities", "1e-9", "--scope", "global"], "keeps none of"),
    ):
        assert main([*call, *more]) == 2 and says in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("a dog runs")
    assert main(call) == 2 and "has one line of text, so that none can be held out" in capsys.readouterr().err
    (tmp_path / "a.txt").write_bytes(b"\0\0")
    assert main(call) == 2 and "binary file" in capsys.readouterr().err


# ── intervals over what is independent ───────────────────────────────────────────────────────────────────────────────


def test_intervals_over_masks_cover_the_truth():
    "Runs under one mask share it: three masks are three, however often each was fine-tuned."
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        x = rng.normal(0, 1, 3)[:, None] + rng.normal(0, 0.5, (3, 3))
        runs = pd.DataFrame({"seed": np.repeat(range(3), 3), "tuning_seed": [0, 1, 2] * 3, "score": x.ravel()})
        row = chapter.over_masks(runs)
        covered += row["low"] <= 0 <= row["high"]
    assert (row["n"], row["tuning_seeds"]) == (3, 3) and 0.93 < covered / 400 < 0.98
    one = chapter.over_masks(runs[runs.seed == 0])
    assert (one["n"], one["tuning_seeds"]) == (1, 3)


def test_undefined_runs_are_left_out_and_counted():
    runs = pd.DataFrame({"seed": [0, 0, 1, 1], "tuning_seed": [0, 1, 0, 1], "score": [0.5, np.nan, 0.7, 0.8]})
    row = chapter.over_masks(runs)
    assert (row["n"], row["undefined"]) == (1, 1) and row["mean"] == pytest.approx(0.75)
