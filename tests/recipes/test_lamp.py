"The experiments: what was trained on what, what was compared with what, and that the model comes back."

from __future__ import annotations

import copy
import importlib
import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

from subnet_explorer.core.errors import SubnetError, UnknownName
from subnet_explorer.core.intervals import estimate
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.scores import Scores
from subnet_explorer.data.facts import Facts, answerable, read_facts, split
from subnet_explorer.data.grammar import sentences, treebank
from subnet_explorer.data.sentences import read_conllu
from subnet_explorer.measure.ask import cloze
from subnet_explorer.model.load import load
from subnet_explorer.recipes.lamp import lamp, lamp_ablation

chapter = importlib.import_module("subnet_explorer.recipes.lamp")
RELATIONS, SEEDS = ["MadeOf", "HasSubevent", "Desires"], (0, 1)
FACTS = read_facts("pocket", RELATIONS)
TREES, TEXTS = [s.tagged for s in read_conllu(treebank(40))], [" ".join(t["form"] for t in s) for s in sentences(40)]


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def key(f):
    return (f.relation, f.subject, f.object)


class Spied:
    "What a study did: facts of objectives and monitors, gates as they came in and went out, conditions."

    def __init__(self, monkeypatch):
        self.trained, self.watched, self.gates, self.starts, self.under, self.runs = [], [], [], [], {}, []
        cls, monitor, find, cloze, fit = chapter.Cloze, chapter.Precision, chapter.find, chapter.cloze, chapter.fit

        def found(model, tok, gate, goal, **kw):
            self.starts.append(gate.harden())
            self.gates.append(gate)
            self.runs.append(find(model, tok, gate, goal, **kw))
            return self.runs[-1]

        def asked(model, tok, facts, under, *args, **kw):
            self.under |= under
            return cloze(model, tok, facts, under, *args, **kw)

        monkeypatch.setattr(
            chapter, "Cloze", lambda facts, *a, **kw: self.trained.append(facts) or cls(facts, *a, **kw)
        )
        monkeypatch.setattr(
            chapter, "Precision", lambda facts, *a, **kw: self.watched.append(facts) or monitor(facts, *a, **kw)
        )
        monkeypatch.setattr(chapter, "find", found)
        monkeypatch.setattr(chapter, "cloze", asked)
        monkeypatch.setattr(chapter, "fit", lambda *a, **kw: fit(*a, **{**kw, "steps": 4, "every": 2}))  # fewer steps


@pytest.fixture(scope="module")
def world(pocket_bert):
    "A study with everything, what it did, and the weights before it."
    before = weights(pocket_bert[0])
    with pytest.MonkeyPatch.context() as m:
        spy = Spied(m)
        few = dict(layers="4", steps=6, lr=0.1, batch=16)
        study = lamp(*pocket_bert, FACTS, **few, seeds=SEEDS, random=2, fine_tuned=True, progress=False)
    return study, spy, before


@pytest.fixture(scope="module")
def study(world):
    return world[0]


@pytest.fixture(scope="module")
def spy(world):
    return world[1]


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_split_is_the_recorded_one(pocket_bert, study):
    data = split(answerable(FACTS, pocket_bert[1]), 0)
    assert (
        study.data == data
        and study.config["split"]
        == data.hash
        == study.to_json()["split_hash"]
        != split(answerable(FACTS, pocket_bert[1]), 1).hash
    )
    assert set(study.items.uuid) == {f.uuid for f in data.test}


def test_no_test_fact_is_used_before_the_test(study, spy):
    test = {key(f) for f in study.data.test}
    trained, watched = {key(f) for fs in spy.trained for f in fs}, {key(f) for fs in spy.watched for f in fs}
    assert trained == {key(f) for f in study.data.train} and watched == {key(f) for f in study.data.dev}
    assert not test & (trained | watched) and not trained & watched
    assert all(len(fs.relations) == 1 for fs in spy.trained + spy.watched)
    assert len(spy.trained) == len(spy.watched) == len(RELATIONS) * (len(SEEDS) + 1)  # masks, and fine-tuning


# ── comparisons ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_condition_asks_every_question(study):
    draws = dict(full=1, subnetwork=2, random=2, mismatched=4, majority=1) | {"fine-tuned": 1}
    n = study.items.groupby(["under", "draw"]).uuid.agg(["size", "nunique"])
    assert n.reset_index().groupby("under").size().to_dict() == draws and (n == len(study.data.test)).all().all()


def test_random_masks_have_the_counts_of_the_trained_ones(study, spy):
    for r in RELATIONS:
        own, random = study.masks.sel(task=r, seed=0)[0], spy.under["random"][r]
        assert (
            len(random) == 2
            and all(m.table().kept.tolist() == own.table().kept.tolist() and m != own for m in random)
            and random[0] != random[1]
        )


def test_mismatches_are_all_others_once_per_seed(study, spy):
    for r in RELATIONS:
        wanted = Counter(m.id for labels, m in study.masks if labels["task"] != r)
        assert (
            Counter(m.id for m in spy.under["mismatched"][r]) == wanted
            and set(wanted.values()) == {1}
            and len(wanted) == (len(RELATIONS) - 1) * len(SEEDS)
        )
    assert {r: [m.id for m in ms] for r, ms in spy.under["subnetwork"].items()} == {
        r: [study.masks.sel(task=r, seed=s)[0].id for s in SEEDS] for r in RELATIONS
    }


def test_labels_belong_to_their_runs(study, spy):
    assert [(run.labels["task"], run.labels["seed"]) for run in spy.runs] == [
        (labels["task"], labels["seed"]) for labels, _ in study.masks
    ]
    for run, facts in zip(spy.runs, list(spy.trained[: len(spy.runs)]), strict=False):
        assert facts.relations == [run.labels["task"]] and run.config["goal"]["facts"] == facts.fingerprint


# ── initialisation ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_all_relations_start_from_one_mask_per_seed(study, spy):
    for s in SEEDS:
        assert {m.id for m, run in zip(spy.starts, spy.runs, strict=False) if run.labels["seed"] == s} == {
            study.start[s].id
        }
    assert study.start[0] != study.start[1] and all(abs(m.density - 0.5) < 0.01 for m in study.start.values())


def test_flips_are_counted_from_there(study, spy):
    share = {
        (run.labels["task"], run.labels["seed"], g.name): (run.mask[g.name] != start[g.name]).mean()
        for start, run in zip(spy.starts, spy.runs, strict=False)
        for g in study.space.groups
    }
    sizes = {g.name: g.size for g in study.space.groups}
    table, fine = study.table(), study.flips()
    for r in RELATIONS:
        wanted = np.mean([sum(share[r, s, n] * k for n, k in sizes.items()) / study.space.size for s in SEEDS])
        assert table.flips[r] == pytest.approx(wanted) and 0 < wanted < 0.5
        assert table.sparsity[r] == pytest.approx(
            np.mean(
                [
                    1 - np.mean(np.concatenate([b.ravel() for _, b in m.items()]))
                    for labels, m in study.masks
                    if labels["task"] == r
                ]
            )
        )
    assert len(fine) == len(share) and sorted(fine.flips) == pytest.approx(sorted(share.values()))
    part = fine[(fine.task == "Desires") & (fine.seed == 1) & (fine.layer == 4) & (fine.role == "down")]
    assert part.flips.item() == pytest.approx(share["Desires", 1, "encoder.layer.3.output.dense.weight"]) and pd.isna(
        table.flips["macro"]
    )


def test_own_initialisations_differ(pocket_bert, monkeypatch):
    spy = Spied(monkeypatch)
    study = lamp(
        *pocket_bert,
        FACTS[RELATIONS[:2]],
        steps=2,
        seeds=SEEDS,
        shared_init=False,
        random=0,
        mismatched=False,
        progress=False,
    )
    starts = spy.starts
    assert len({m.id for m in starts}) == 4 and all(
        0.45 < (a ^ b).density < 0.55 for i, a in enumerate(starts) for b in starts[:i]
    )
    assert (
        not study.start
        and study.table().flips.isna().all()
        and {r["flips"] for r in study.to_json()["relations"].values()} == {None}
    )
    assert set(study.items.under) == {"full", "subnetwork", "majority"}
    with pytest.raises(SubnetError, match="no common start to count flips from"):
        study.flips()


# ── stochastic pruning ───────────────────────────────────────────────────────────────────────────────────────────────


def test_stochastic_inference_applies_the_probabilities(pocket_bert, monkeypatch, tmp_path):
    model, tok = pocket_bert
    spy, facts = Spied(monkeypatch), FACTS["MadeOf"]
    study = lamp(model, tok, facts, method="stochastic", steps=4, lr=0.1, random=1, to=tmp_path / "out", progress=False)
    [soft], gate = study.subnetworks["MadeOf"], spy.gates[0]
    assert isinstance(soft, Scores) and spy.under["subnetwork"]["MadeOf"] == [soft]
    twin = copy.deepcopy(model)
    for g, logit in zip(study.space.groups, gate.logits, strict=False):
        p = 1 / (1 + np.exp(-logit.detach().double().numpy()))
        assert np.allclose(soft[g.name], p, atol=1e-3) and np.array_equal(
            study.masks[0][g.name], logit.detach().numpy() > 0
        )
        with torch.no_grad():
            twin.base_model.get_parameter(g.name).mul_(torch.as_tensor(soft[g.name]))
    plain = chapter.cloze(twin, tok, study.data.test, {"x": None})
    ours = study.items[study.items.under == "subnetwork"]
    assert (
        np.allclose(ours.logprob, plain.logprob, atol=1e-3)
        and (ours["rank"].to_numpy() == plain["rank"].to_numpy()).mean() > 0.9
    )
    assert not study.start and abs(study.masks[0].density - 0.5) < 0.05
    again = lamp(model, tok, facts, method="stochastic", steps=4, lr=0.1, random=1, to=tmp_path / "out", progress=False)
    pd.testing.assert_frame_equal(again.items, study.items, rtol=1e-5)


# ── the model is borrowed ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_model_comes_back(pocket_bert, world):
    assert same(pocket_bert[0], world[2]) and all(p.grad is None for p in pocket_bert[0].parameters())


def test_the_mode_comes_back(pocket_bert, monkeypatch):
    model, tok = pocket_bert
    Spied(monkeypatch)
    model.train()
    try:
        lamp(model, tok, FACTS["MadeOf"], steps=2, random=0, fine_tuned=True, progress=False)
        assert model.training
    finally:
        model.eval()


@pytest.mark.parametrize("where", ["find", "cloze", "fine-tuning", "measuring the fine-tuned"])
def test_the_model_comes_back_from_errors(pocket_bert, monkeypatch, where):
    model, tok = pocket_bert

    def hooks():
        return [
            len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()
        ]  # transformers itself leaves some once attention was asked for

    before, flags, kept = weights(model), [p.requires_grad for p in model.parameters()], hooks()
    Spied(monkeypatch)

    class Stop(Exception):
        pass

    def stop(*args, **kw):
        raise Stop

    class Stops:
        def identity(self):
            return {}

        def prepare(self, context):
            return stop

    name = {"cloze": "cloze", "measuring the fine-tuned": "cloze", "fine-tuning": "Precision", "find": "Precision"}[
        where
    ]
    real, calls = getattr(chapter, name), []

    def sometimes(*args, **kw):
        calls.append(where)
        if len(calls) == {"cloze": 1, "find": 2, "fine-tuning": 4, "measuring the fine-tuned": 3}[where]:
            return Stops() if name == "Precision" else stop()
        return real(*args, **kw)

    monkeypatch.setattr(chapter, name, sometimes)
    with pytest.raises(Stop):
        lamp(model, tok, FACTS[RELATIONS[:2]], steps=3, random=0, fine_tuned=True, progress=False)
    assert same(model, before) and [p.requires_grad for p in model.parameters()] == flags
    assert hooks() == kept


# ── results ──────────────────────────────────────────────────────────────────────────────────────────────────────────

CONDITIONS = {"full", "subnetwork", "random", "mismatched", "majority", "fine-tuned"}


def test_the_dictionary(study):
    j = study.to_json()
    assert json.loads(json.dumps(j, allow_nan=False)) == j
    at_k = {"p_at_1", "p_at_2", "p_at_3", "filtered_p_at_1"}
    said = {"model", "relations", "macro", "micro", "left_out", "split_hash", "config", "seconds", "departures"}
    assert set(j) == said
    assert (
        set(j["macro"]) == set(j["micro"]) == at_k | {"p_at_1_interval"}
        and j["model"] == "pocket-bert"
        and j["seconds"] > 0
    )
    assert (
        list(j["relations"]) == study.data.test.relations
        and set(j["relations"]) == set(RELATIONS)
        and j["config"]["steps"] == 6
    )
    for r, d in j["relations"].items():
        assert set(d) == at_k | {"n_train", "n_dev", "n_test", "skipped", "sparsity", "flips", "masks"}
        assert [d[f"n_{part}"] for part in ("train", "dev", "test")] == [
            len(getattr(study.data, part)[r]) for part in ("train", "dev", "test")
        ] and d["masks"] == []
    tables = {k: study.table(k) for k in (1, 2, 3)}
    for k, table in tables.items():
        for r, d in [*j["relations"].items(), ("macro", j["macro"]), ("micro", j["micro"])]:
            assert set(d[f"p_at_{k}"]) == CONDITIONS and d[f"p_at_{k}"] == pytest.approx(
                {u: table.loc[r, u] for u in CONDITIONS}, abs=1e-6
            )
            assert all(d["p_at_1"][u] <= d["filtered_p_at_1"][u] for u in CONDITIONS)
    for r, d in j["relations"].items():
        assert (d["sparsity"], d["flips"]) == pytest.approx((tables[1].sparsity[r], tables[1].flips[r]), abs=1e-6)
    for low, high in j["macro"]["p_at_1_interval"].values():
        assert 0 <= low <= high <= 1


def test_the_tables_are_averages_of_the_items(study):
    hits = study.items.assign(hit=study.items["rank"] <= 1)
    by = hits.groupby(["relation", "under"]).hit.mean().unstack()
    table, summary = study.table(), study.summary((1,))
    for u in CONDITIONS:
        assert table[u][RELATIONS].tolist() == pytest.approx(by[u][RELATIONS].tolist())
        assert table.loc["macro", u] == pytest.approx(by[u].mean())
        assert table.loc["micro", u] == pytest.approx(hits[hits.under == u].hit.mean())
        assert summary.loc[u, "macro P@1"].startswith(f"{by[u].mean():.3f} [")


def arrays(study, under):      # by relation: (seed, shift, question)
    "Which questions are answered under a condition whose draws go through the seeds, put together plainly."
    t, found = study.items[study.items.under == under], []
    for r in study.data.test.relations:
        part = t[t.relation == r]
        hits = [(part[part.draw == d]["rank"] <= 1).to_numpy(float) for d in sorted(part.draw.unique())]
        found.append(np.stack(hits).reshape(-1, len(SEEDS), hits[0].size).swapaxes(0, 1))
    return found


def test_masks_of_other_relations_are_draws_crossed_with_seeds(study):
    "As many answers as shifts times seeds are no more independent than the seeds are."
    found = arrays(study, "mismatched")
    assert {a.shape[:2] for a in found} == {(2, 2)}
    want = estimate(found, ("seed", "shift", "question"), bounds=(0, 1))
    loose = estimate([a.reshape(4, -1) for a in found], bounds=(0, 1))
    got = study.precision((1,)).set_index(["under", "relation"]).loc["mismatched", "macro"]
    assert got[["value", "low", "high"]].tolist() == pytest.approx([want.mean, want.low, want.high])
    assert got.high != pytest.approx(loose.high)
    pooled = estimate(found, ("seed", "shift", "question"), pooled=True, bounds=(0, 1))
    micro = study.precision((1,)).set_index(["under", "relation"]).loc["mismatched", "micro"]
    assert micro[["value", "low", "high"]].tolist() == pytest.approx([pooled.mean, pooled.low, pooled.high])


def test_gains_know_the_shifts_too(study):
    own = [np.repeat(a, 2, axis=1) for a in arrays(study, "subnetwork")]
    apart = [a - b for a, b in zip(own, arrays(study, "mismatched"), strict=True)]
    want = estimate(apart, ("seed", "shift", "question"), bounds=(-1, 1))
    row = study.gains("subnetwork", "mismatched").iloc[0]
    assert row[["mean", "low", "high"]].tolist() == pytest.approx([want.mean, want.low, want.high])
    assert row.seeds == 4


def test_questions_that_one_side_only_answers(study):
    "Counted plainly, both ways; under several draws the majority decides."
    hits = study.items.assign(hit=study.items["rank"] <= 1)
    most = hits.groupby(["under", "relation", "sub", "obj"]).hit.mean().unstack(0) > 0.5
    found = study.discordant("fine-tuned", ["full", "mismatched"])
    theirs = most["full"] | most["mismatched"]
    assert found.wins == (most["fine-tuned"] & ~theirs).sum() and found.losses == (~most["fine-tuned"] & theirs).sum()
    t = found.table
    assert len(t) == found.wins + found.losses and set(t.columns) >= {"prompt", "margin", "fine-tuned answer"}
    prompts = {(f.relation, f.subject, f.object): f.prompt for f in study.data.test}
    assert all(prompts[r.relation, r.sub, r.obj] == r.prompt for r in t.itertuples())
    only = study.discordant("fine-tuned", relations="Desires", n=1).table
    assert set(only.relation) <= {"Desires"} and only.only.is_unique


def test_masks_are_listed_by_path_and_counts_of_what_is_left_out(pocket_bert, tmp_path):
    model, tok = pocket_bert
    odd = Facts(
        (
            *FACTS["MadeOf"].items,
            FACTS["MadeOf"].items[0].__class__("MadeOf", "a cup", "xqzxqz", "a cup is [MASK] .", "odd"),
        ),
        "odd",
        {"MadeOf": {"repeated fact": 2}},
    )
    study = lamp(model, tok, odd, steps=4, seeds=SEEDS, random=0, to=tmp_path / "out", progress=False)
    d = study.to_json()["relations"]["MadeOf"]
    assert [Mask.load(p).id for p in d["masks"]] == [m.id for _, m in study.masks] and len(set(d["masks"])) == 2
    assert d["skipped"] == {"repeated fact": 2, "object is not one token": 1} and "odd" not in set(study.items.uuid)
    assert "mismatched" not in set(study.items.under)  # one relation has no other


def test_a_causal_model(tmp_path):
    model, tok = load("pocket-gpt2")
    before = weights(model)
    facts = read_facts("pocket", "IsA,MadeOf", prompt=1)
    study = lamp(model, tok, facts, layers="4", steps=2, batch=8, random=1, progress=False)
    assert len(study.masks) == 2 and study.table().loc["macro", "full"] > 0.5 and same(model, before)


def test_unknown_methods(pocket_bert):
    with pytest.raises(UnknownName, match="did you mean stochastic"):
        lamp(*pocket_bert, FACTS, method="stochastik")


def test_the_ablation(pocket_bert):
    t = lamp_ablation(
        *pocket_bert, FACTS["MadeOf"], layers=("4", "3-4"), sparsities=(0.5, 0.7), steps=1, progress=False
    )
    assert list(zip(t.layers, t.initial, strict=False)) == [("4", 0.5), ("4", 0.7), ("3-4", 0.5), ("3-4", 0.7)]
    assert np.allclose(t.sparsity, t.initial, atol=0.02) and ((t.low <= t.value) & (t.value <= t.high)).all()


# ── soft gates, few facts ────────────────────────────────────────────────────────────────────────────────────────────


def test_soft_gates_are_reported_as_what_they_are(pocket_bert):
    model, tok = pocket_bert
    few = dict(layers="4", steps=4, lr=0.1, random=0, mismatched=False)
    study = lamp(model, tok, FACTS[RELATIONS[:2]], method="stochastic", **few, progress=False)
    t = study.table()
    assert {"subnetwork", "subnetwork (binary)"} <= set(t.columns)
    for r, found in study.subnetworks.items():
        values = np.concatenate([v.ravel() for v in found[0].values.values()])
        assert (
            t.sparsity[r] == pytest.approx(1 - values.mean(), abs=1e-6) and np.unique(values).size > 1000
        )  # logits start from N(mean, 1), not from one value
    hits = cloze(model, tok, study.data.test, {"x": study.masks.by("task")})["rank"] == 1
    assert (
        study.items.query("under == 'subnetwork (binary)'")["rank"].eq(1).tolist() == hits.tolist()
    )  # the saved masks are what was measured


def test_few_facts_still_give_a_report(pocket_bert, tmp_path):
    facts = Facts(FACTS["MadeOf"].items[:10])
    study = lamp(*pocket_bert, facts, layers="4", steps=1, random=1, progress=False)
    assert "t-SNE needs" in study.report(tmp_path / "r.html").read_text()
    assert study.to_json()["macro"]["p_at_1"]["mismatched"] is None
