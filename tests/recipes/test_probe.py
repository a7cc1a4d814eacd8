"Subnetwork probes: heads, cells, controls, study, files, shell."

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import cut
from torch.nn import functional as F
from transformers import BertConfig, BertModel

import subnet_explorer.core.space as spaces
from subnet_explorer import masked
from subnet_explorer.cli import main
from subnet_explorer.core.compare import placement
from subnet_explorer.core.errors import SpaceMismatch, SubnetError
from subnet_explorer.core.files import write_json
from subnet_explorer.core.intervals import estimate
from subnet_explorer.core.items import read_items
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.run import OtherRun
from subnet_explorer.core.scores import Scores
from subnet_explorer.core.space import GRANULARITIES, Space, granular
from subnet_explorer.data.sentences import GAP, gapped, read_conllu, read_ner
from subnet_explorer.look.curves import pareto
from subnet_explorer.measure.metrics import entity_scores, task_scores
from subnet_explorer.model import load as loading
from subnet_explorer.model.apply import applied
from subnet_explorer.model.load import load
from subnet_explorer.recipes import sweep
from subnet_explorer.recipes.choice import lambda_of_report
from subnet_explorer.recipes.probe import (
    POCKET,
    centre,
    centres,
    layers,
    localisation,
    notes,
    probe,
    strongest_lambda,
    where_figures,
    where_kept,
    with_published,
)
from subnet_explorer.recipes.probes import (
    BASELINES,
    PROBES,
    SOURCE,
    TASKS,
    Cell,
    ProbeSetting,
    attention_soft,
    gap_score,
    head_of,
    online_code,
    plan,
    published,
    run_cell,
    unseen,
)
from subnet_explorer.search.gates import HardConcrete
from subnet_explorer.search.loop import lr_at
from subnet_explorer.search.objectives import Context, Task
from subnet_explorer.search.score import magnitude
from subnet_explorer.tasks.controls import control_labels, reset
from subnet_explorer.tasks.fit import fit, preserved
from subnet_explorer.tasks.heads import EntityTagger, Tagger

chapter = importlib.import_module("subnet_explorer.recipes.probe")
probes = importlib.import_module("subnet_explorer.recipes.probes")
TRAIN, DEV = read_conllu("pocket", part="train")[:24], read_conllu("pocket", part="dev")[:16]
NER = read_ner("pocket", part="train")[:24], read_ner("pocket", part="dev")[:16]
LAYERS, STEPS = 2, 6  # of the model that is probed; of a probe
HEAD_ALONE: dict[str, Any] = dict(
    steps=STEPS, lr=1e-3, head_lr=5e-3, batch=32, train="head", keep="last", progress=False
)
FAST = POCKET | dict(steps=STEPS, progress=False)


@pytest.fixture(scope="module")
def bert():
    return cut(*load("pocket-bert"), layers=LAYERS)


@pytest.fixture(scope="module")
def study(bert):
    return probe(
        *bert,
        "pos",
        TRAIN,
        DEV,
        granularity=("neuron", "matrix"),
        lambdas=(1.0, 25.0),
        seeds=(0, 1),
        **FAST | dict(steps=24, ranks=(128, 2)),
    )


def setting(bert, task="pos", **training) -> ProbeSetting:
    model, tok = bert
    train, dev = NER if task == "ner" else (TRAIN, DEV)
    settings: dict[str, Any] = {"steps": STEPS, "lr": 0.2, "head_lr": 5e-3, "tune_lr": 1e-3, "batch": 32, **training}
    return ProbeSetting(
        model,
        tok,
        task,
        train,
        dev,
        settings,
        POCKET["parser"],
        "architecture",
    )


# ── granularities ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["pocket-bert", "pocket-gpt2"])
def test_granularities_are_what_their_names_say(name):
    "A bit of a neuron switches one input feature of one matrix, a bit of a matrix the matrix."
    model, _ = load(name)
    weights = granular(model, "weight", layers=2)
    for g in ("neuron", "matrix", "16x8"):
        space = granular(model, g, layers=2)
        for group in space.groups:
            bits = {x.name: np.zeros(x.shape, bool) for x in space.groups}
            bits[group.name].flat[0] = True
            fine = Mask.of(space, bits).to("weight")
            kept = fine[group.name].T if space.layout.transposed else fine[group.name]  # (out, in)
            want = np.zeros_like(kept)
            if g == "neuron":
                want[:, 0] = True
            elif g == "matrix":
                want[:] = True
            else:
                want[(slice(8), slice(16)) if space.layout.transposed else (slice(16), slice(8))] = (
                    True  # blocks are of the stored matrix
                )
            assert (kept == want).all() and fine.count == want.sum() and fine.space.id == weights.id
    assert {granular(model, g).kind for g in GRANULARITIES} == {"weight", "block", "head", "layer"}
    for wrong in ("neurons", "16x", "x", "0.5"):
        with pytest.raises(SubnetError):
            granular(model, wrong)


@pytest.mark.parametrize("name", ["pocket-bert", "pocket-gpt2"])
@pytest.mark.parametrize("rows, cols", [(128, 1), (32, 4), (2, 128), (128, 128)])
def test_strided_groups_are_the_published_ones(name, rows, cols):
    "Weight (o, i) has logit (o mod out/rows, i mod in/cols): of masks, soft gates, their gradients, magnitudes."
    model, tok = load(name)
    space, turn = (
        granular(model, f"{rows}x{cols}-strided", layers=2),
        (lambda w: w.T) if name == "pocket-gpt2" else (lambda w: w),
    )  # (out, in), and back
    mask, rng = Mask.random(space, 0.5, seed=1), np.random.default_rng(0)
    soft = Scores(space, {g.name: rng.random(g.shape, np.float32) for g in space.groups})
    fine, ids, wide = mask.to("weight"), torch.tensor([tok("a robin is a kind of bird .").input_ids]), {}
    for g in space.groups:
        n_out, n_in = space.layout.widths(g.role)
        o, i = np.ogrid[:n_out, :n_in]
        at = o % (n_out // rows), i % (n_in // cols)
        assert (
            turn(mask[g.name]).shape == (n_out // rows, n_in // cols)
            and (turn(fine[g.name]) == turn(mask[g.name])[at]).all()
        )
        wide[g.name] = turn(turn(soft[g.name])[at])
        weights = turn(np.abs(model.base_model.get_parameter(g.name).detach().numpy()))
        assert np.allclose(
            turn(magnitude(model, space)[g.name]),
            weights.reshape(rows, n_out // rows, cols, n_in // cols).mean((0, 2)),
            atol=1e-6,
        )
    with torch.no_grad(), masked(model, soft):
        under = model(input_ids=ids).logits
    values = {g.name: torch.tensor(soft[g.name], requires_grad=True) for g in space.groups}
    with applied(model, space, values):
        model(input_ids=ids).logits.square().mean().backward()
    model.zero_grad()
    with preserved(model):
        before = {n: model.base_model.get_parameter(n).detach().clone() for n in wide}
        with torch.no_grad():
            for n, v in wide.items():
                model.base_model.get_parameter(n).mul_(torch.as_tensor(v))
        plain = model(input_ids=ids).logits
        plain.square().mean().backward()
        for g in space.groups:
            slope = turn((model.base_model.get_parameter(g.name).grad * before[g.name]).numpy())
            n_out, n_in = slope.shape
            want = slope.reshape(rows, n_out // rows, cols, n_in // cols).sum((0, 2))
            assert np.allclose(
                turn(values[g.name].grad.numpy()), want, rtol=1e-3, atol=1e-4 * max(np.abs(want).max(), 1e-6)
            )
        model.zero_grad()
    assert (under - plain).abs().max() < 1e-4 * plain.abs().max()


def test_strided_spaces_are_their_own(bert, tmp_path):
    model, _ = bert
    side, far = granular(model, "32x4"), granular(model, "32x4-strided")
    assert (
        [g.shape for g in side.groups] == [g.shape for g in far.groups]
        and side.id != far.id
        and "strided" not in json.dumps(side.to_json())
    )
    mask = Mask.random(far, 0.5, seed=0)
    mask.save(tmp_path / "m.mask.safetensors")
    assert Mask.load(tmp_path / "m.mask.safetensors") == mask and Space.from_json(far.to_json()) == far
    with pytest.raises(SubnetError, match="cannot rebase"):
        mask.rebase(side)
    for wrong in ("3x1-strided", "3x1", "256x1-strided", "0x1"):
        with pytest.raises(SubnetError, match=r"do not fill|at least one row"):
            granular(model, wrong)
    with pytest.raises(SubnetError, match="strided goes with"):
        Space.of(model, "weight", strided=True)


def test_bits_of_the_published_grid(monkeypatch):
    "Counts for BERT-base: those of the code, and the 72 matrices of the paper."
    monkeypatch.setattr(spaces, "fingerprint", lambda *_: "none")
    model = BertModel(BertConfig())
    assert spaces.grid(model) == ("768x768", "768x192", "768x24", "768x6", "768x1", "192x1", "24x1", "6x1", "1x1")
    for strided in (False, True):
        assert [granular(model, g).size for g in spaces.grid(model, strided)] == [
            144,
            576,
            4608,
            18432,
            110592,
            442368,
            3538944,
            14155776,
            84934656,
        ]
    assert granular(model, "matrix").size == 72 and granular(model, "neuron").size == 12 * (5 * 768 + 3072)
    small = BertModel(BertConfig(hidden_size=10, num_attention_heads=2, intermediate_size=40, num_hidden_layers=1))
    assert spaces.grid(small) == ("10x10", "10x5", "10x2", "10x1", "5x1", "2x1", "1x1")


def test_soft_gates_are_evaluated_as_published(bert):
    "Without the temperature: sigmoid, stretched and clipped; .9 at the start, exactly 0 and 1 beyond ±2.398."
    gate = HardConcrete(granular(bert[0], "matrix"))
    assert gate.soft().values[gate.space.groups[0].name].item() == pytest.approx(0.9, abs=1e-6)
    at = torch.tensor([-5, -2.41, -2.38, 0, 1.0, 2.38, 2.41, 5])
    z = gate.transform(at, None)[0]
    assert (
        torch.allclose(z, (1.2 / (1 + torch.exp(-at)) - 0.1).clamp(0, 1), atol=1e-6)
        and (z == 0).tolist() == [True, True] + [False] * 6
        and (z == 1).tolist() == [False] * 6 + [True] * 2
    )


def test_an_input_feature_gated_is_the_feature_scaled(bert):
    "Soft gates of neurons equal scaled columns of the weight, to rounding."
    model, tok = bert
    space = granular(model, "neuron", layers=1)
    gate = HardConcrete(space, init="normal", seed=0)
    ids = torch.tensor([tok("a robin is a kind of bird .").input_ids])
    with torch.no_grad():
        with masked(model, gate.soft()):
            soft = model(input_ids=ids).logits
        with preserved(model):
            for g, v in gate.soft().values.items():
                model.base_model.get_parameter(g).mul_(torch.as_tensor(v))
            plain = model(input_ids=ids).logits
    assert (soft - plain).abs().max() < 1e-5 * plain.abs().max()


# ── heads ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_entities_are_scored_whole(bert):
    model, _tok = bert
    head = EntityTagger(model, NER[0])
    gold = [list(t) for _, t in NER[1]]
    targets = [[head.labels.index(t) for t in g] for g in gold]
    out = np.eye(len(head.labels))[np.concatenate(targets)]
    assert head.measure(targets, out)["score"] == 1 == head.measure(targets, out)["accuracy"]
    spoiled = [g[:] for g in gold]
    i, j = next((i, g.index("B-PER")) for i, g in enumerate(spoiled) if "B-PER" in g)
    spoiled[i][j] = "O"
    wrong = np.eye(len(head.labels))[[head.labels.index(t) for g in spoiled for t in g]]
    assert (
        head.measure(targets, wrong)["f1"] == pytest.approx(entity_scores(gold, spoiled)["f1"])
        and entity_scores(gold, spoiled)["f1"] < 1
    )


@pytest.mark.parametrize("task", ["pos", "dep", "ner"])
def test_every_task_has_its_probes(bert, task):
    s = setting(bert, task)
    for cell in (Cell("subnetwork", 0, "neuron", 1.0), Cell("linear", 0), Cell("mlp", 0, rank=4)):
        out = run_cell(s, cell, None, False)
        assert 0 <= out["score"] <= 1 and ("density" in out) == (cell.probe == "subnetwork")
    with pytest.raises(SubnetError, match="Known: pos, dep, ner"):
        head_of("tags", bert[0], TRAIN, 0)


@pytest.mark.parametrize("task", ["pos", "dep"])
def test_special_tokens_are_learned_from_and_not_scored(bert, task):
    "The loss is the mean over words, [CLS] and [SEP], which have the first label or the root; scores stay the same."
    model, tok = bert
    plain, more = (
        head_of(task, model, TRAIN, 0, **how, **POCKET["parser"] if task == "dep" else {})
        for how in ({}, {"published": True})
    )
    more.dropout = plain.dropout = 0.0
    if task == "dep":
        more.inner = plain.inner = 0.0
    assert plain.encode(tok, DEV[0]) == more.encode(tok, DEV[0]) and task_scores(model, tok, plain, DEV) == task_scores(
        model, tok, more, DEV
    )
    assert repr(plain) != repr(more) and "specials" in repr(more) and "specials" not in repr(plain)
    for words in (DEV[0], DEV[1]):
        with torch.no_grad():
            loss = Task([words], more).prepare(Context(model, tok, 1, 1, 0, learning=True))(0).item()
            states = model.base_model(
                input_ids=torch.tensor([tok(list(words.words), is_split_into_words=True).input_ids])
            ).last_hidden_state[0]
            if task == "pos":
                want = F.cross_entropy(
                    more.out(states), torch.tensor([0, *(more.labels.index(t) for t in words.upos), 0])
                ).item()
            else:
                arc, label = more.sizes
                head, dep, over, under = F.relu(more.layer(states)).split([arc, arc, label, label], -1)
                gold, rels = (
                    torch.tensor([0, *words.head, 0]),
                    torch.tensor([0, *(more.labels.index(r) for r in words.deprel), 0]),
                )
                arcs = more.arcs(head[None], dep[None])[0, :, :, 0]
                want = (
                    F.cross_entropy(arcs, gold)
                    + F.cross_entropy(more.rels(over[None], under[None])[0, torch.arange(len(gold)), gold], rels)
                ).item()
        assert len(tok(list(words.words), is_split_into_words=True).input_ids) == len(
            words
        ) + 2 and loss == pytest.approx(want, rel=1e-4)  # a piece for each word


def test_a_batch_of_lessons_is_its_sentences(bert):
    "Padding changes nothing where special tokens are learned from."
    model, tok = bert
    parser = head_of("dep", model, TRAIN, 0, published=True, **POCKET["parser"] | dict(inner=0.0, dropout=0.0))

    def loss(sentences):
        return Task(sentences, parser).prepare(Context(model, tok, 1, len(sentences), 0, learning=True))(0).item()

    few = sorted(DEV[:12], key=len)[::5]
    assert loss(few) == pytest.approx(np.average([loss([s]) for s in few], weights=[len(s) + 2 for s in few]), rel=1e-4)


def test_labels_that_cannot_be_learned_count_as_wrong(bert):
    model, tok = bert
    for task, name in (("pos", "upos"), ("dep", "deprel")):
        odd = [replace(s, **{name: ("odd", *getattr(s, name)[1:])}) for s in DEV[:5]] + DEV[5:]
        assert unseen(task, TRAIN, odd) == {"odd": 5} | unseen(task, TRAIN, DEV)
        s = replace(setting(bert, task), dev=odd)
        head = s.head(Cell("linear", 0))
        assert (
            head.unseen == ["odd"]
            and "odd" not in head.labels
            and repr(head) == repr(setting(bert, task).head(Cell("linear", 0)))
        )
        before = task_scores(model, tok, setting(bert, task).head(Cell("linear", 0)), DEV)
        assert task_scores(model, tok, head, odd)["score"] <= before["score"]
    unknown = [replace(s, upos=("odd",) * len(s)) for s in DEV]
    out = probe(*bert, "pos", TRAIN, unknown, baselines=("linear",), **FAST).to_json()
    assert (
        out["results"]["linear"]["score"] == 0
        and "count as wrong" in out["notes"][0]
        and out["config"]["unseen"] == {"odd": sum(map(len, DEV))}
    )
    with pytest.raises(SubnetError, match="unknown label"):
        fit(
            model,
            tok,
            Task([replace(TRAIN[0], upos=("odd",) * len(TRAIN[0]))], Tagger(model, TRAIN)),
            steps=1,
            train="head",
        )


# ── cells ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_linear_probe_is_plain_regression_on_states(bert):
    "The scores of the linear probe equal those of the trained head on states of the untouched model."
    model, tok = bert
    s, before = setting(bert), {k: v.clone() for k, v in model.state_dict().items()}
    out, head = run_cell(s, Cell("linear", 3), None, False), s.head(Cell("linear", 3))
    with preserved(model):
        fit(model, tok, Task(TRAIN, head), seed=3, **HEAD_ALONE)
    right = []
    with torch.no_grad():
        for e in DEV:
            ids, places, gold = head.encode(tok, e)
            states = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0][places]
            right.append((head.out(states).argmax(-1) == torch.tensor(gold)).float().mean().item())
    assert out["score"] == pytest.approx(np.mean(right), abs=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_model_is_borrowed_by_every_probe(bert):
    model, _ = bert
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for p in PROBES:
        run_cell(
            setting(bert, steps=2),
            Cell(p, 0, "neuron" if p.startswith("sub") else "", 1.0, 4 if p.startswith("mlp") else 0),
            None,
            False,
        )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_controls_are_on_other_weights(bert, study):
    model, tok = bert
    own, drawn = (
        study.masks.sel(probe="subnetwork", granularity="neuron", lam=1.0, seed=0)[0],
        study.masks.sel(probe="subnetwork_reset_all", seed=0)[0],
    )
    assert own.space.id != drawn.space.id
    with pytest.raises(SpaceMismatch):
        own & drawn
    with reset(model, "all", seed=0):
        assert granular(model, "neuron").id == drawn.space.id
        head = head_of("pos", model, [*TRAIN, *DEV], 0)
        task_scores(model, tok, head, DEV, drawn)
    with pytest.raises(SpaceMismatch):
        task_scores(model, tok, head, DEV, drawn)


def test_complexity_is_counted(bert, study):
    t = study.summary()

    def of(**k):
        return t.query(" and ".join(f"{a} == {b!r}" for a, b in k.items())).bits.iloc[0]

    widths = [granular(bert[0], "weight").layout.widths(r) for r in ("q", "k", "v", "o", "up", "down")]
    assert (
        of(probe="subnetwork", granularity="neuron") == LAYERS * sum(i for _, i in widths)
        and of(probe="subnetwork", granularity="matrix") == 6 * LAYERS
    )
    assert of(probe="mlp", rank=2) == (2 * 128 + 1) * 2 + 3 * 128 and of(probe="linear") == 0
    assert (
        study.scores[study.scores.probe == "mlp"]
        .bits_stored.eq(32 * study.scores[study.scores.probe == "mlp"].bits)
        .all()
    )


def test_the_weight_of_density_presses(study):
    t = study.summary().query("probe == 'subnetwork' and granularity == 'neuron'").set_index("lam")
    assert t.density[25.0] < t.density[1.0]


def test_the_online_code_by_hand(bert):
    "The first portion uniformly, each next one under a probe of all before."
    model, tok = bert
    s, cell = setting(bert), Cell("linear", 0)
    code, k = online_code(s, cell, (0.25, 0.5, 1.0)), len(s.head(cell).labels)
    quarter = len(TRAIN) // 4
    bits = sum(len(e.words) for e in TRAIN[:quarter]) * np.log2(k)
    for a, b in ((quarter, 2 * quarter), (2 * quarter, 4 * quarter)):
        head = s.head(cell)
        with preserved(model):
            fit(model, tok, Task(TRAIN[:a], head), seed=0, **HEAD_ALONE)
            for e in TRAIN[a:b]:
                ids, places, gold = head.encode(tok, e)
                with torch.no_grad():
                    logits = head.out(model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0][places])
                bits += F.cross_entropy(logits, torch.tensor(gold), reduction="sum").item() / np.log(2)
    assert code["bits"] == pytest.approx(bits, rel=1e-5) and code["portions"] == [6, 12, 24]
    assert code["uniform"] == pytest.approx(sum(len(e.words) for e in TRAIN) * np.log2(k)) and code[
        "compression"
    ] == pytest.approx(code["uniform"] / code["bits"])
    for wrong, says in (((0.5, 1.0), "tags"), ((), "grow"), ((0.5, 0.5, 1.0), "grow"), ((0.5, 0.9), "grow")):
        with pytest.raises(SubnetError, match="pos or ner" if says == "tags" else says):
            online_code(setting(bert, "dep") if says == "tags" else s, cell, wrong)


def test_controls_within_the_study(bert, tmp_path, monkeypatch):
    "Selectivity is the score less that of a probe of random labels; the code is that of `online_code`; both are kept."
    monkeypatch.setattr(online_code, "__defaults__", ((0.5, 1.0), False))
    how = FAST | dict(steps=4, ranks=(4,), baselines=("linear", "mlp", "reset", "control", "code"), to=tmp_path)
    found = probe(*bert, "pos", TRAIN, DEV, **how)
    t, s = found.scores.set_index("probe"), setting(bert, steps=4)
    assert (
        len(found.scores) == 7
        and t.control.notna().sum() == 3
        and set(t.index[t.code.notna()])
        == {"subnetwork", "mlp", "linear", "subnetwork_reset_encoder", "subnetwork_reset_all"}
    )
    random = replace(s, train=control_labels(TRAIN, 0), dev=control_labels(DEV, 0, TRAIN))
    assert t.control["linear"] == pytest.approx(
        run_cell(random, Cell("linear", 0), None, False)["score"]
    ) and t.selectivity["linear"] == pytest.approx(t.score["linear"] - t.control["linear"])
    assert t.code["linear"] == pytest.approx(online_code(s, Cell("linear", 0), (0.5, 1.0))["bits"]) and t.compression[
        "linear"
    ] == pytest.approx(online_code(s, Cell("linear", 0), (0.5, 1.0))["compression"])
    out = found.to_json()
    assert (
        json.loads(json.dumps(out)) == out
        and set(out["selectivity"]) == {"subnetwork", "mlp", "linear"}
        and set(out["code"]) == set(t.index[t.code.notna()])
        and out["selectivity"]["mlp"]["interval"] == [None, None]
    )
    assert {"control", "selectivity", "code", "compression"} <= set(found.summary())
    assert "not learned by heart" in next(found.sections())[1]
    monkeypatch.setattr(
        chapter, "run_cell", lambda s, cell, *a: (_ for _ in ()).throw(AssertionError(f"trained again: {cell}"))
    )
    again = probe(*bert, "pos", TRAIN, DEV, **how)
    pd.testing.assert_frame_equal(again.scores.drop(columns="mask"), found.scores.drop(columns="mask"))
    assert (
        len(probe(*bert, "pos", TRAIN, DEV, **how | dict(baselines=("linear",))).scores) == 2
    )  # what is there is not needed


def test_an_empty_subnetwork_has_a_name(bert, tmp_path):
    "A weight of the density that switches everything off: a score, no NaN in the data, and a note."
    found = probe(*bert, "pos", TRAIN, DEV, lambdas=(1e4, 1.0), baselines=("finetune",), **FAST | dict(steps=30))
    row = found.scores[found.scores.lam == 1e4].iloc[0]
    assert row["empty"] and row.density == 0 and 0 <= row.score <= 1 and found.masks.sel(lam=1e4)[0].count == 0
    out = found.to_json()
    assert (
        json.loads(json.dumps(out, allow_nan=False)) == out
        and out["results"]["subnetwork"]["empty"] == 1
        and out["lambda"]["1"]["empty"] == 0
        and out["centre"]["subnetwork"]["centre"] is None
    )
    assert (
        len(out["notes"]) == 2 == len(notes(found)) + 1      # the other: sixteen sentences are few
        and "the mask is empty in 1 of 1 seeds" in out["notes"][0]
        and out["notes"][0] in found._repr_html_()
    )
    assert (
        centre(found).centre.isna().all()
        and centre(found, 1.0).centre.between(1, LAYERS).all()
        and strongest_lambda(found, 1.0) == 1e4
    )
    assert len(where_figures(found, 1e4)) == 2  # of nothing but empty masks
    assert "the mask is empty" in found.report(tmp_path / "r.html").read_text()


def test_published_is_the_released_code(bert, tmp_path, monkeypatch):
    "Strided groups, lessons with special tokens, constant rates, framework resets; another study than without."
    seen = []
    def seeing(f):
        return lambda *a, **k: seen.append((k["schedule"], k["dropout"])) or f(*a, **k)

    for door in ("fit", "find"):
        monkeypatch.setattr(probes, door, seeing(getattr(probes, door)))
    monkeypatch.setattr(probes, "reset", lambda m, what, init, seed: seen.append(init) or reset(m, what, init, seed))
    found = probe(
        *bert,
        "pos",
        TRAIN,
        DEV,
        granularity=("neuron", "matrix", "weight"),
        published=True,
        to=tmp_path,
        **FAST | dict(steps=2),
    )
    assert (
        found.config["granularity"] == ["128x1-strided", "128x128-strided", "weight"]
        and found.config["published"] is True
        and found.config["init"] == "framework"
    )
    assert set(seen) == {("constant", True), "framework"} and all(
        g.strided for _, m in found.masks.sel(granularity="128x1-strided") for g in m.space.groups
    )
    with pytest.raises(OtherRun, match="differs in"):
        probe(*bert, "pos", TRAIN, DEV, to=tmp_path, **FAST | dict(steps=2))
    assert "published" not in probe(*bert, "pos", TRAIN, DEV, baselines=(), **FAST | dict(steps=2)).config
    assert [lr_at(t, 100, "constant") for t in (4, 9, 10, 99)] == [0.5, 1, 1, 1]


def test_the_strongest_lambda(study):
    "By scores on the sentences that choose, seed by seed; all of them if much may be lost."
    t = study.scores.set_index(["probe", "granularity", "lam", "seed"]).score_selection
    t = t.sort_index()
    mine, tuned = t["subnetwork", "neuron"].groupby("lam").mean(), t["finetune"].mean()
    for within in (0.05, 0.5, 1.0):
        ok = mine.index[mine >= (1 - within) * tuned]
        if len(ok):
            assert strongest_lambda(study, within) == ok.max()
        else:
            with pytest.raises(SubnetError, match="no subnetwork probe comes within"):
                strongest_lambda(study, within)
    assert set(layers(study, 25.0).probe) == {"subnetwork"} and len(centre(study, 25.0)) == 2


def test_sentences_that_choose_do_not_report(bert, tmp_path):
    "Every other sentence, or a part of its own; said in the results and the report."
    other, some = read_conllu("pocket", part="test")[:10], FAST | dict(steps=2, baselines=("finetune",), seeds=(0,))
    halves = probe(*bert, "pos", TRAIN, DEV, **some)
    named = probe(*bert, "pos", TRAIN, DEV, selection=other, **some)
    for found, parts in ((halves, (DEV[::2], DEV[1::2])), (named, (other, DEV))):
        for name, part in zip(("score_selection", "score_reported"), parts, strict=True):
            alone = probe(*bert, "pos", TRAIN, part, **some).scores.score
            assert found.scores[name].tolist() == pytest.approx(alone.tolist())
    assert named.scores.score.tolist() == named.scores.score_reported.tolist()
    assert named.config["chosen_on"] == "the 10 sentences of the selection"
    assert halves.config["chosen_on"] == "every other sentence of dev (8)"
    at = chapter.choose_lambda(halves.scores, "neuron", within=1.0)
    assert at["score"] == halves.scores.score_reported[0] and at["n"] == 1
    study = replace(halves, tables={"scores": halves.scores.assign(score_selection=1.0)})
    out, said = study.to_json()["chosen"], lambda_of_report(study.scores, study.config)[1]
    assert out["chosen_on"] == halves.config["chosen_on"] and out["score"] == pytest.approx(at["score"], abs=1e-6)
    assert "Chosen on every other sentence of dev (8)" in said
    with pytest.raises(OtherRun, match="selection"):
        for selection in (None, other):
            probe(*bert, "pos", TRAIN, DEV, selection=selection, to=tmp_path / "study", **some)


# ── gaps ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("task", ["pos", "dep", "ner"])
def test_gaps_alone_by_hand(bert, task):
    "The share of right words among those taken away, sentence by sentence."
    model, tok = bert
    s, dev = setting(bert, task), gapped(NER[1] if task == "ner" else DEV)
    head = s.head(Cell("linear", 0))
    fit(model, tok, Task(s.train, head), steps=8, head_lr=0.01, train="head", keep="last", progress=False)
    right = []
    for e in dev:
        ids, places, gold = head.encode(tok, e)
        with torch.no_grad():
            states = head(model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0][places])
            out = head.brief(head.fold(states, [len(places)], len(places))) if task == "dep" else states
        told = head.read(out.numpy())
        true = [(h, head.labels[k]) for h, k in gold] if task == "dep" else [head.labels[k] for k in gold]
        right += [t == g for t, g, w in zip(told, true, e[0] if task == "ner" else e.words, strict=True) if w == GAP]
    assert gap_score(model, tok, head, dev)["gaps"] == pytest.approx(np.mean(right)) and len(right) > 0
    assert gap_score(model, tok, head, NER[1] if task == "ner" else DEV) == {}
    assert gap_score(model, tok, head, [*dev, *s.dev]) == gap_score(model, tok, head, dev)


def test_gaps_are_in_the_study(bert):
    found = probe(*bert, "pos", gapped(TRAIN), gapped(DEV), baselines=("linear",), **FAST)
    assert (
        found.scores.gaps.between(0, 1).all() and "gaps" in found.summary() and json.loads(json.dumps(found.to_json()))
    )


# ── where ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_where_adds_up(study):
    "Pieces of matrices add up to the mask, and their means to its densities by layer."
    t, dense = where_kept(study, 1.0), layers(study)
    assert set(t.probe) == {p for p in PROBES if p.startswith("sub")} and t.n.eq(2).all() and t.lam.eq(1).all()
    for name, part in t.groupby("probe"):
        own = [m for _, m in study.masks.sel(probe=name, granularity="neuron", lam=1.0)]
        assert part["size"].sum() == own[0].to("weight").space.size and part.kept.sum() == pytest.approx(
            np.mean([m.to("weight").count for m in own])
        )
        assert (
            part[["kept", "size"]].groupby(part.layer).sum().pipe(lambda x: x.kept / x["size"])
        ).to_numpy() == pytest.approx([np.mean([placed_density(m, i) for m in own]) for i in range(1, LAYERS + 1)])
        assert part.groupby("matrix")["head"].max().to_dict() == dict(q=4, k=4, v=4, o=4, up=0, down=0)
        a, b = (placement(m.to("weight")).density.to_numpy() for m in own)
        assert part.density.to_numpy() == pytest.approx((a + b) / 2) and part.sd.to_numpy() == pytest.approx(
            abs(a - b) / np.sqrt(2)
        )
    assert set(dense.probe) == set(t.probe)


def placed_density(mask: Mask, layer: int) -> float:
    t = mask.to("weight").table().query("layer == @layer")
    return t.kept.sum() / t["size"].sum()


def test_a_lambda_without_controls_stands_beside_those_of_the_main_one(study):
    t = where_kept(study, 25.0)
    assert t.groupby("probe").lam.unique().map(list).to_dict() == {
        "subnetwork": [25.0],
        "subnetwork_reset_encoder": [1.0],
        "subnetwork_reset_all": [1.0],
    }
    with pytest.raises(SubnetError, match="lambda"):
        where_kept(study, 7.0)


def anywhere(model, granularity):
    "A named granularity, or blocks that stick out at the edges."
    return granular(model, granularity) if granularity in GRANULARITIES else Space.of(model, "block", block=(16, 100))


@pytest.mark.parametrize("granularity", [*GRANULARITIES, "16x100 at the edges"])
def test_masks_of_any_granularity_are_placed_on_the_weights_they_switch(bert, granularity):
    "Placed by head and matrix, a mask says of every weight what multiplying by it does."
    space = anywhere(bert[0], granularity)
    mask = Mask.random(space, 0.5, seed=1)
    fine = mask.to("weight", how="full")
    t = placement(fine).set_index(["layer", "matrix", "head"])
    weights = {g.name: (g, fine[g.name]) for g in fine.space.groups if g.kind == "weight"}
    for g, bits in weights.values():
        for h in range(4) if g.role in "qkvo" else [None]:
            part = (
                bits if h is None else bits[:, 32 * h : 32 * (h + 1)] if g.role == "o" else bits[32 * h : 32 * (h + 1)]
            )
            assert t.density[g.layer + 1, g.role, 0 if h is None else h + 1] == pytest.approx(part.mean())
    assert t["size"].sum() == sum(b.size for _, b in weights.values())


@pytest.mark.parametrize("granularity", [*GRANULARITIES, "16x100 at the edges"])
def test_soft_gates_of_attention_are_means_over_weights(bert, granularity):
    gate = HardConcrete(anywhere(bert[0], granularity), init="normal", seed=0)
    soft, found = gate.soft(), attention_soft(gate.soft())
    for i, value in enumerate(found):
        if granularity in ("head", "layer"):
            want = np.mean([soft[g.name].mean() for g in gate.space.groups if g.layer == i])
        else:
            tall, wide = {"weight": (1, 1), "neuron": (512, 1), "matrix": (512, 512)}.get(granularity, (16, 100))
            want = np.mean(
                [
                    np.kron(soft[g.name], np.ones((tall, wide)))[:128, :128].mean()
                    for g in gate.space.groups
                    if g.layer == i and g.role in "qkv"
                ]
            )
        assert value == pytest.approx(want, rel=1e-5)
    assert len(found) == LAYERS


def test_the_published_quantity_survives_the_folder(bert, tmp_path):
    "Read from cells, and from runs of cells that do not say it."
    args = dict(baselines=(), seeds=(0, 1), to=tmp_path / "s", **FAST)
    first = localisation(probe(*bert, "pos", TRAIN, DEV, **args), 1.0)
    again = localisation(probe(*bert, "pos", TRAIN, DEV, **args), 1.0)
    for file in (tmp_path / "s" / "cells").glob("*.json"):
        kept = json.loads(file.read_text())
        assert kept.pop("checksum") and len(kept.pop("attention")) == LAYERS
        write_json(file, kept)
    old = localisation(probe(*bert, "pos", TRAIN, DEV, **args), 1.0)
    for other in (again, old):
        assert other.soft.to_numpy() == pytest.approx(first.soft.to_numpy(), abs=1e-6)
    assert first.groupby("seed").share.sum().to_numpy() == pytest.approx(1)
    in_memory = localisation(probe(*bert, "pos", TRAIN, DEV, **args | dict(to=None)), 1.0)
    assert in_memory.soft.to_numpy() == pytest.approx(first.soft.to_numpy(), abs=1e-3)


def test_centres_have_intervals(study):
    t = centres(study, 1.0)
    assert (
        set(t.quantity) == {"density", "published"}
        and t.n.eq(2).all()
        and (t.low <= t.centre).all()
        and t.centre.between(1, LAYERS).all()
    )
    own = centre(study).query("probe == 'subnetwork'").centre
    row = t.query("probe == 'subnetwork' and quantity == 'density'").iloc[0]
    assert row.centre == pytest.approx(own.mean()) and row.high - row.centre == pytest.approx(
        12.706204736 * own.std(ddof=1) / np.sqrt(2)
    )
    share = localisation(study, 1.0).query("probe == 'subnetwork_reset_all' and seed == 1")
    both = localisation(study, 1.0).query("probe == 'subnetwork_reset_all'")
    assert t.query("probe == 'subnetwork_reset_all' and quantity == 'published'").centre.item() == pytest.approx(
        (both.layer * both.share).sum() / 2
    ) and share.share.sum() == pytest.approx(1)


def test_figures_of_where_have_one_scale(study):
    bars, *maps = where_figures(study, 1.0)
    assert len(maps) == 3 and len({m.plotly.layout.coloraxis.cmax for m in maps}) == 1
    assert "λ 1" in maps[0].alt and "Reset all" not in maps[0].alt and f"layer {LAYERS}" in bars.alt
    assert len(bars.plotly.data) == 3 and all(t.error_y.array is not None for t in bars.plotly.data)


# ── published ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_published_numbers():
    t = published()
    assert (
        len(t) == 54
        and not t.duplicated(["task", "probe", "lam"]).any()
        and t.score.between(0, 1).all()
        and t.attrs["source"] == SOURCE
        and set(t.task) == set(TASKS)
    )
    at = t.set_index(["task", "probe", "lam"]).score
    assert (
        at["pos", "subnetwork", 1.0] == 0.9339
        and at["dep", "mlp_reset_encoder", 0.0] == 0.5409
        and at["ner", "subnetwork_reset_all", 125.0] == 0.0204
        and at["ner", "finetune", 0.0] == 0.9368
        and at["dep", "finetune_reset_all", 0.0] == 0.7448
    )
    assert set(t[t["rank"] == 768].probe) == {"mlp", "mlp_reset_encoder", "mlp_reset_all"}
    with pytest.raises(SubnetError, match="Known: pos, dep, ner"):
        published("tree")


def test_beside_the_published(study):
    t = with_published(study)
    at = t.set_index(["probe", "lam"])
    assert (
        len(t) == 9
        and at.published["subnetwork", 25.0] == 0.9066
        and np.isnan(at.published["linear", 0.0])
        and at.published["mlp", 0.0] == 0.9025
    )
    assert at.score["finetune", 0.0] == pytest.approx(study.scores.query("probe == 'finetune'").score.mean())


# ── study ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_plan_has_every_cell_once():
    cells = plan(("neuron", "matrix"), (1.0, 5.0), (768, 1), BASELINES, (0, 1))
    assert (
        len(set(cells)) == len(cells)
        and len({c.name for c in cells}) == len(cells)
        and {c.probe for c in cells} == set(PROBES)
    )
    main = [c for c in cells if c.probe == "subnetwork" and c.seed == 0]
    assert [(c.granularity, c.lam) for c in main] == [("neuron", 1.0), ("matrix", 1.0), ("neuron", 5.0)]
    assert {c.probe for c in plan(("neuron",), (1.0,), (768,), (), (0,))} == {"subnetwork"}
    assert {c.probe for c in plan(("neuron",), (1.0,), (768,), ("reset",), (0,))} == {
        "subnetwork",
        "subnetwork_reset_encoder",
        "subnetwork_reset_all",
    }


def test_tables(study):
    t = study.summary()
    assert t.n.eq(2).all() and (t.low <= t.score).all() and t[t.probe == "finetune"].of_finetuning.item() == 1
    hits = np.stack([read_items(text).values for text in study.scores.query("probe == 'linear'")["items"]])
    over = estimate([hits], bounds=(0, 1))  # seeds and sentences are crossed
    linear = t[t.probe == "linear"].iloc[0]
    assert (linear.score, linear.low, linear.high) == pytest.approx((over.mean, over.low, over.high), abs=1e-5)
    assert (linear.n, linear["items"]) == hits.shape
    where_kept = layers(study)
    assert where_kept.groupby(["probe", "seed"]).share.sum().to_numpy() == pytest.approx(1) and set(
        where_kept.probe
    ) == {p for p in PROBES if p.startswith("sub")}
    for r in where_kept[where_kept.probe == "subnetwork"].itertuples():
        m = (
            study.masks.sel(probe="subnetwork", granularity="neuron", lam=1.0, seed=r.seed)[0]
            .table()
            .query("layer == @r.layer")
        )
        assert r.density == pytest.approx(m.kept.sum() / m["size"].sum())
    w = where_kept[(where_kept.probe == "subnetwork") & (where_kept.seed == 0)]
    each = centre(study).query("probe == 'subnetwork'").centre
    row, half = (
        t[(t.probe == "subnetwork") & (t.granularity == "neuron") & (t.lam == 1)].iloc[0],
        12.706204736 * each.std(ddof=1) / np.sqrt(2),
    )
    assert (row.centre, row.centre_high) == pytest.approx((each.mean(), each.mean() + half)) and study.to_json()[
        "centre"
    ]["subnetwork"]["interval"] == pytest.approx([row.centre_low, row.centre_high], abs=1e-5)
    assert t[t.probe == "mlp"].centre.isna().all()
    assert centre(study).query("probe == 'subnetwork' and seed == 0").centre.item() == pytest.approx(
        (w.layer * w.density).sum() / w.density.sum()
    )


def test_plain_data_and_figures(study, tmp_path):
    out = study.to_json()
    assert (
        json.loads(json.dumps(out)) == out
        and set(out["results"]) == set(PROBES)
        and set(out["granularity"]) == {"neuron", "matrix"}
        and set(out["lambda"]) == {"1", "25"}
        and len(out["layers"]) == LAYERS
    )
    assert out["results"]["subnetwork"]["score"] == pytest.approx(
        study.scores.query("probe == 'subnetwork' and granularity == 'neuron' and lam == 1").score.mean(), abs=1e-6
    )
    fig = pareto(study.summary())
    assert "subnetwork" in fig.alt and fig.save(tmp_path / "p.svg").read_text().startswith("<?xml")
    page = study.report(tmp_path / "r.html").read_text()
    assert lambda_of_report(study.scores, study.config)[1] in page
    for title in ("Scores", "Beside the published numbers", "Score against complexity", "Where", "How it was made"):
        assert title in page


def test_a_study_goes_on(bert, tmp_path, monkeypatch):
    first = probe(*bert, "pos", TRAIN, DEV, **FAST, to=tmp_path / "s")
    monkeypatch.setattr(
        chapter,
        "run_cell",
        lambda s, cell, *a: (
            (_ for _ in ()).throw(AssertionError(f"trained again: {cell}")) if cell.seed == 0 else run_cell(s, cell, *a)
        ),
    )
    more = probe(*bert, "pos", TRAIN, DEV, **FAST, seeds=(0, 1), to=tmp_path / "s")
    assert len(more.scores) == 2 * len(first.scores)
    pd.testing.assert_series_equal(more.scores[more.scores.seed == 0].score.reset_index(drop=True), first.scores.score)
    assert [m.id for _, m in more.masks.sel(seed=0)] == [m.id for _, m in first.masks]
    (tmp_path / "s").rename(tmp_path / "moved")
    moved = probe(*bert, "pos", TRAIN, DEV, **FAST, to=tmp_path / "moved")
    assert [m.id for _, m in moved.masks] == [m.id for _, m in first.masks] and moved.to_json()["masks"][0].startswith(
        str(tmp_path / "moved")
    )
    (tmp_path / "moved").rename(tmp_path / "s")
    for change in (dict(steps=STEPS + 1), dict(init="framework")):
        with pytest.raises(OtherRun, match=f"differs in {next(iter(change))}"):
            probe(*bert, "pos", TRAIN, DEV, **FAST | change, to=tmp_path / "s")


def test_probe_refuses(bert):
    for wrong, says in (
        (dict(task="pso"), "Known: pos"),
        (dict(granularity=("neurons",)), "did you mean neuron"),
        (dict(baselines=("mpl",)), "did you mean mlp"),
        (dict(seeds=(0, 0)), "different numbers"),
        (dict(lambdas=()), "at least one"),
        (dict(train=[]), "nothing to learn from"),
        (dict(dev=[]), "nothing to report on"),
        (dict(task="ner"), "what read_ner reads"),
        (dict(task="dep", dev=NER[1]), "what read_conllu reads"),
        (dict(steps=0), "at least 1"),
        (dict(ranks=(0,)), "rank"),
        (dict(granularity=("48x1",)), "do not fill"),
        (dict(task="dep", baselines=("control",)), "with the task pos only"),
        (dict(task="dep", baselines=("code",)), "pos or ner"),
    ):
        args = dict(task="pos", train=TRAIN, dev=DEV) | {
            k: v for k, v in wrong.items() if k in ("task", "train", "dev")
        }
        with pytest.raises(SubnetError, match=says):
            probe(
                *bert,
                **args,
                **FAST | {k: v for k, v in wrong.items() if k not in args} | dict(steps=wrong.get("steps", 1)),
            )


def test_a_task_is_an_axis(bert):
    "Of one treebank: tags and heads, compared within each; entities are refused before anything is trained."
    how = FAST | dict(baselines=("linear",), steps=2)
    found = sweep("probe", *bert, train=TRAIN, dev=DEV, over={"task": ["pos", "dep"]}, **how)
    assert found.gains().task.tolist() == ["pos", "dep"] and len(found.tables["scores"]) == 4
    alone = probe(*bert, "dep", TRAIN, DEV, **how).scores.score
    table = found.tables["scores"]
    assert table[table.task == "dep"].score.tolist() == pytest.approx(alone.tolist())
    with pytest.raises(SubnetError, match="what read_ner reads"):
        sweep("probe", *bert, train=TRAIN, dev=DEV, over={"task": ["pos", "dep", "ner"]}, **how)


def test_a_causal_model():
    model, tok = cut(*load("pocket-gpt2"), layers=LAYERS)
    found = probe(model, tok, "dep", TRAIN, DEV, baselines=("linear",), **FAST)
    assert found.scores.score.between(0, 1).all() and found.masks[0].space.layout.transposed


# ── shell ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small(bert, monkeypatch):
    "A shell that is told of pocket-bert loads the smaller model."
    monkeypatch.setattr(loading, "load", lambda name, **how: bert if name == "pocket-bert" else load(name, **how))


def shell(tmp_path, *more: str) -> list[str]:
    return [
        "probe",
        "--model",
        "pocket-bert",
        "--task",
        "pos",
        "--train",
        "pocket",
        "--dev",
        "pocket",
        "--limit-train",
        "24",
        "--limit-dev",
        "8",
        "--steps",
        "3",
        "--baselines",
        "linear",
        "--quiet",
        "--out",
        str(tmp_path / "out"),
        *more,
    ]


def test_the_command(tmp_path, capsys, small):
    assert main(shell(tmp_path, "--granularity", "neuron,matrix", "--json", "--no-report")) == 0
    out = json.loads(capsys.readouterr().out)
    assert (
        set(out["results"]) == {"subnetwork", "linear"}
        and set(out["granularity"]) == {"neuron", "matrix"}
        and out["metric"].startswith("accuracy")
    )
    assert (
        all(Mask.load(m).space.kind == "block" for m in out["masks"])
        and len(out["masks"]) == 2
        and json.loads((tmp_path / "out" / "results.json").read_text())["results"] == out["results"]
    )
    assert main(shell(tmp_path, "--granularity", "neuron,matrix")) == 0
    assert "density by layer" in capsys.readouterr().out and (tmp_path / "out" / "report.html").exists()


def test_the_command_with_everything(tmp_path, capsys, small):
    assert (
        main(
            shell(
                tmp_path,
                "--published",
                "--granularity",
                "matrix,grid",
                "--baselines",
                "linear,control",
                "--steps",
                "1",
                "--json",
                "--no-report",
            )
        )
        == 0
    )
    out = json.loads(capsys.readouterr().out)
    assert (
        list(out["granularity"]) == list(spaces.grid(load("pocket-bert")[0], strided=True))
        and set(out["selectivity"]) == {"subnetwork", "linear"}
        and out["config"]["published"]
    )


def test_the_command_reads_gaps(tmp_path, capsys, small):
    assert (
        main(shell(tmp_path, "--train", "pocket-gaps", "--dev", "pocket-gaps", "--baselines", "", "--no-report")) == 0
    )
    assert pd.read_csv(tmp_path / "out" / "scores.csv").gaps.between(0, 1).all() and "gaps" in capsys.readouterr().out
    assert (
        main(shell(tmp_path, "--train", "pocket-gaps", "--model", "pocket-gpt2")) == 2
        and "no mask token" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "change, says",
    [
        (("--task", "psо"), "Known: pos"),
        (("--granularity", "neuro"), "did you mean neuron"),
        (("--lambdas", "one"), "lambdas"),
        (("--ranks", "x"), "ranks"),
        (("--baselines", "mpl"), "did you mean mlp"),
        (("--init", "other"), "framework"),
        (("--train", "nowhere.conllu"), "nowhere.conllu"),
    ],
    ids=str,
)
def test_the_command_refuses(tmp_path, capsys, small, change, says):
    args = shell(tmp_path)
    if change[0] in args:
        args[args.index(change[0]) + 1] = change[1]
        change = ()
    assert main([*args, *change]) == 2 and says in capsys.readouterr().err and not (tmp_path / "out").exists()
