"Knowledge-critical subnetworks: material, study, rule, baselines, files, shell."

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from subnet_explorer.cli import main
from subnet_explorer.core.compare import jaccard_chance, placement
from subnet_explorer.core.errors import SubnetError
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.run import OtherRun
from subnet_explorer.core.space import granular
from subnet_explorer.data.facts import Fact, Facts, read_facts
from subnet_explorer.data.grammar import sentences
from subnet_explorer.data.graphs import disjoint, neighbourhood, read_graph, shared_triples, triple, wordings
from subnet_explorer.data.texts import Blocks, blocks
from subnet_explorer.measure.ask import cloze
from subnet_explorer.measure.removal import NOT_KNOWN, NothingKnown
from subnet_explorer.model.load import load
from subnet_explorer.recipes.critical import POCKET, critical, material, sensitivity
from subnet_explorer.recipes.study import without_places

chapter = importlib.import_module("subnet_explorer.recipes.critical")
TEXT = [" ".join(t["form"] for t in s) for s in sentences(60, seed=5)]
FAST = POCKET | dict(layers="4", steps=3, checks=1, batches=(8, 8), seeds=(0,), random=1, progress=False)
LEARNS = dict(layers="top-half", steps=30, batches=(32, 16))
"Enough to forget something."


@pytest.fixture(scope="module")
def gpt2():
    return load("pocket-gpt2")


@pytest.fixture(scope="module")
def graph():
    return read_graph("pocket")


@pytest.fixture(scope="module")
def birds(graph):
    return neighbourhood(graph, "bird", 8)


@pytest.fixture(scope="module")
def control(graph, birds):
    told = [triple(f) for f in graph]
    birds_told = set(map(triple, birds))
    some = set(sorted(set(told) - birds_told)[::24]) | birds_told
    return replace(graph, items=tuple(f for f, t in zip(graph, told, strict=True) if t in some))


@pytest.fixture(scope="module")
def study(gpt2, birds, control):
    return critical(*gpt2, birds, control, TEXT, **FAST | LEARNS | dict(checks=2, seeds=(0, 1, 2)))


def one_worded(facts: Facts) -> Facts:
    return replace(facts, items=tuple({triple(f): f for f in reversed(facts.items)}.values()))


# ── material ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_material_keeps_its_parts_apart(gpt2, birds, control):
    m = material(*gpt2, birds, control, TEXT)
    parts = m.control.train, m.control.dev, m.control.test
    told = [set(map(triple, p)) for p in parts]
    assert (
        not set.intersection(*told)
        and not any(a & b for i, a in enumerate(told) for b in told[i + 1 :])
        and sum(map(len, told)) == sum(map(len, parts))
    )  # one wording of each
    assert not set(map(triple, m.target)) & set.union(*told) and m.removed == len({triple(f) for f in birds}) == len(
        m.target
    )
    assert set(map(triple, m.paraphrases)) <= set(map(triple, m.target)) and not {f.prompt for f in m.paraphrases} & {
        f.prompt for f in m.target
    }
    assert len(m.target) + len(m.paraphrases) == len(birds)
    assert {triple(f) for f in m.near} <= told[2]
    terms = {c for f in m.target for c in (triple(f)[1], triple(f)[2])}
    assert all(
        bool({triple(f)[1], triple(f)[2]} & terms) == (triple(f) in set(map(triple, m.near))) for f in m.control.test
    )
    texts = [t for p in m.text for t in p]
    assert sorted(texts) == sorted(TEXT) and len(m.text[1]) == len(m.text[2]) == 6
    again, other = material(*gpt2, birds, control, TEXT), material(*gpt2, birds, control, TEXT, seed=1)
    assert again.control.hash == m.control.hash != other.control.hash and again.text == m.text != other.text


def test_unfiltered_control_keeps_the_leak(gpt2, birds, control):
    m = material(*gpt2, birds, control, TEXT, filtered=False)
    told = {triple(f) for p in (m.control.train, m.control.dev, m.control.test) for f in p}
    assert set(map(triple, m.target)) <= told and m.removed == 0 and len(shared_triples(birds, control)) == len(birds)


def test_material_refuses(gpt2, birds, control):
    several = replace(
        birds, items=(*birds.items, Fact("IsA", "robin", "unheardofthing", "a robin is a kind of [MASK] .", "x"))
    )
    for wrong, says in (
        (lambda: material(*gpt2, several, control, TEXT), "not one token"),
        (lambda: material(*gpt2, birds, Facts(()), TEXT), "nothing to keep"),
        (lambda: material(*gpt2, Facts(()), control, TEXT), "nothing to forget"),
        (lambda: material(*gpt2, birds, birds, TEXT), "nothing is left"),
        (lambda: material(*gpt2, birds, control, TEXT[:9]), "9 texts are too few"),
        (
            lambda: material(
                *gpt2, birds, replace(control, items=tuple(f for f in disjoint(birds, control))[:9]), TEXT
            ),
            "control facts are too few",
        ),
        (lambda: blocks(gpt2[1], TEXT[:1], 64), "too few for one block"),
    ):
        with pytest.raises(SubnetError, match=says):
            wrong()


def test_blocks_of_running_text(gpt2, birds, control):
    cut = blocks(gpt2[1], TEXT, 24)
    m = material(*gpt2, birds, control, cut)
    assert all(isinstance(p, Blocks) for p in m.text) and sum(map(len, m.text)) == len(cut) and "blocks" in repr(m)
    found = critical(*gpt2, birds, control, cut, **FAST)
    assert np.isfinite(found.items.logprob).all() and set(found.items.data) >= {"target", "control", "text"}


def wrong(facts: Facts) -> Facts:
    "The same subjects with an object that the model does not know of them."
    return replace(facts, items=tuple(replace(f, object="tool") for f in facts.items[:3]), name="wrong")


def test_facts_that_the_model_does_not_know_can_be_left_out(gpt2, birds, control):
    "Of target and control, before the split; counted; with their other wordings."
    asked = replace(birds, items=(*birds.items, *wrong(birds)))
    all_of, known = (material(*gpt2, asked, control, TEXT, known=k) for k in (None, 1))
    lost = {triple(f) for f in all_of.target} - {triple(f) for f in known.target}
    assert {triple(f) for f in wrong(birds)} <= lost and known.target.left_out(NOT_KNOWN.format(1)) == len(lost)
    told = {triple(f) for f in known.target}
    assert {triple(f) for f in known.paraphrases} <= told
    parts = known.control.train, known.control.dev, known.control.test
    for facts in (known.target, *parts):
        assert (cloze(*gpt2, facts, {"full": None})["rank"] == 1).all()
    everything = sum(map(len, (all_of.control.train, all_of.control.dev, all_of.control.test)))
    assert sum(map(len, parts)) + known.control.train.left_out(NOT_KNOWN.format(1)) == everything


def test_a_model_that_knows_nothing_of_it(gpt2, birds, control):
    with pytest.raises(NothingKnown, match=r"no fact of wrong/fluent \(1 asked\).*known=2 was asked for"):
        material(*gpt2, replace(wrong(birds), items=wrong(birds).items[:1]), control, TEXT, known=2)
    with pytest.raises(SubnetError, match="at least 1"):
        material(*gpt2, birds, control, TEXT, known=0)
    with pytest.raises(SubnetError, match="known"):
        material(*gpt2, birds, control, TEXT, known="all")


def test_a_study_says_how_much_of_its_target_was_known(gpt2, birds, control):
    asked = replace(birds, items=(*birds.items, *wrong(birds)))
    free = critical(*gpt2, asked, control, TEXT, **FAST)
    full = free.items.query("under == 'full' and data == 'target'")["rank"]
    said = f"first for {(full == 1).sum()} of {len(full)} target facts"
    assert (full > 1).any() and any(said in note for note in free.notes) and said in free._repr_html_()
    gated = critical(*gpt2, asked, control, TEXT, **FAST, known=1)
    assert gated.config["known"] == 1 and "known" not in free.config and not any("knows" in n for n in gated.notes)
    lost = gated.tables["left_out"].query("data == 'target' and why == @NOT_KNOWN.format(1)")
    assert lost.n.sum() == len(full) - len(gated.material.target)


def test_targets_are_told_apart_by_name(gpt2, graph, control):
    names = {material(*gpt2, neighbourhood(graph, word, 8), control, TEXT).name for word in ("bird", "wood")}
    assert names == {"pocket/bird", "pocket/wood"}


# ── study ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_marked_changes_nothing(gpt2, birds, control):
    "At the start every score lies below zero: the mask is empty, and the remaining model is the full one to the bit."
    found = critical(*gpt2, birds, control, TEXT, **FAST | dict(steps=1, lr=1e-6))
    assert found.masks[0].count == 0 and found.masks[0].sparsity == 1
    t = found.table().set_index(["under", "data", "measure"]).value
    for d in found.material.on:
        assert (
            t["remaining", d, "perplexity_ratio"]
            == 1
            == t["random", d, "perplexity_ratio"]
            == t["attribution", d, "perplexity_ratio"]
        )
        assert t["remaining", d, "logprob_difference"] == 0


def test_the_search_forgets_the_target(study):
    t = study.table().set_index(["under", "data", "measure"])
    assert (
        t.high["remaining", "target", "logprob_difference"] < -1.1
        and t.high["remaining", "paraphrases", "logprob_difference"] < 0
    )
    for baseline in ("random", "magnitude-matched"):
        assert t.low[baseline, "target", "logprob_difference"] > -0.2
    assert abs(t.value["remaining", "text", "logprob_difference"]) < 0.2


def test_conditions_have_the_sizes_they_claim(gpt2, study):
    model, tok = gpt2
    under = chapter.conditions(model, tok, study.masks, study.material, 2)
    found = [m for _, m in study.masks]
    for i, m in enumerate(found):

        def per(x):
            return x.table().kept.tolist()

        assert under["remaining"][i] == ~m and under["subnetwork"][i] == m
        for name, draws in (("random", 2), ("magnitude-matched", 2), ("attribution", 1)):
            for k in range(draws):
                assert per(~under[name][i * draws + k]) == per(m) and ~under[name][i * draws + k] != m
    assert (
        ~under["without the union"] == found[0] | found[1] | found[2]
        and ~under["without the intersection"] == found[0] & found[1] & found[2]
    )
    two = (found[0] & found[1]) | (found[0] & found[2]) | (found[1] & found[2])
    assert ~under["without the majority"] == two


def test_the_chosen_checkpoint_follows_the_rule(gpt2, birds, control):
    "Loose rule: among admissible states the one with the largest fall; a rule that nothing keeps is named."
    loose = critical(*gpt2, birds, control, TEXT, **FAST | dict(steps=18, checks=6, sparsity=0.2, tolerance=0.95))
    ok = loose.curves[loose.curves.note == ""]
    assert not loose.failed and len(ok) > 1 and ok[ok.chosen].target.item() == ok.target.max()
    strict = critical(*gpt2, birds, control, TEXT, **FAST | dict(steps=6, sparsity=1.0))
    assert strict.failed == {0: strict.failed[0]} and "sparsity" in strict.failed[0]
    assert abs(loose.masks[0].sparsity - ok[ok.chosen].sparsity.item()) < 1e-9  # the mask is that of the chosen step


def test_suppression_without_anything_to_hold_is_named(gpt2, birds, control):
    "With no term for control and text the language goes; the study says so instead of presenting it."
    wild = critical(
        *gpt2,
        birds,
        control,
        TEXT,
        **FAST
        | dict(steps=20, weights=dict(suppress=5.0, control=0.0, text=0.0), density_weights=(0.0, 0.0), sparsity=0.0),
    )
    assert "control" in wild.failed[0]
    assert wild.to_json()["seeds"]["0"]["failed"] == wild.failed[0]


def test_named_variants_differ_and_are_recorded(gpt2, birds, control):
    base = critical(*gpt2, birds, control, TEXT, **FAST)
    for change in (
        dict(position="at_tail"),
        dict(noise="independent"),
        dict(weights=dict(suppress=0.2, express=1.0)),
        dict(split_seed=1),
    ):
        other = critical(*gpt2, birds, control, TEXT, **FAST | change)
        assert other.masks[0] != base.masks[0], change
        assert all(other.config[k] == (v if k != "weights" else chapter.WEIGHTS | v) for k, v in change.items())
    for wrong, says in (
        (dict(position="at_tial"), "did you mean at_tail"),
        (dict(noise="indep"), "independent"),
        (dict(granularity="neurons"), "did you mean neuron"),
        (dict(seeds=()), "different numbers"),
        (dict(seeds=(1, 1)), "different numbers"),
        (dict(weights=dict(suppress=0.0, control=0.0, text=0.0)), "all terms have the weight 0"),
        (dict(sparsity=1.5), "between 0 and 1"),
        (dict(steps=0), "at least 1"),
    ):
        with pytest.raises(SubnetError, match=says):
            critical(*gpt2, birds, control, TEXT, **FAST | wrong)


def test_neurons(gpt2, birds, control):
    model, tok = gpt2
    space = granular(model, "neuron", "top-half")
    assert {g.role: g.shape for g in space.groups} == {
        "qkv": (128, 1),
        "o": (128, 1),
        "up": (128, 1),
        "down": (512, 1),
    }  # stored (in, out)
    found = critical(model, tok, birds, control, TEXT, **FAST | dict(layers="top-half", steps=8, granularity="neuron"))
    weights = found.masks[0].to("weight")
    for _g, bits in weights.items():
        assert ((bits.sum(1) == 0) | (bits.sum(1) == bits.shape[1])).all()
    out = found.to_json()
    assert out["maskable"] == 393_216 and out["seeds"]["0"]["weights"] == weights.count
    assert out["parameters"] == sum(p.numel() for p in model.parameters()) and out["seeds"]["0"][
        "sparsity_of_model"
    ] == pytest.approx(1 - weights.count / out["parameters"], abs=1e-6)
    assert set(placement(found.masks).matrix) == {"qkv", "o", "up", "down"}
    bert = granular(load("pocket-bert")[0], "neuron", "top-half")
    assert {g.role: g.shape for g in bert.groups}["down"] == (1, 512)  # stored (out, in)


def test_a_masked_model(birds):
    model, tok = load("pocket-bert")
    known = wordings(one_worded(read_facts("pocket", "IsA,PartOf,MadeOf")), causal=False)
    known = replace(known, items=tuple(f for f in known if not f.uuid.endswith("/0")))
    target = neighbourhood(known, "wood", 6)
    found = critical(model, tok, target, known, TEXT, **FAST | dict(layers="top-half", steps=25, batches=(16, 8)))
    t = found.table().set_index(["under", "data", "measure"]).value
    assert t["remaining", "target", "logprob_difference"] < t["random", "target", "logprob_difference"] - 0.5
    with pytest.raises(SubnetError, match="masked model"):
        critical(model, tok, target, known, TEXT, **FAST | dict(position="at_tail"))


def test_the_model_is_borrowed(gpt2, birds, control):
    model, tok = gpt2
    before, mode = {k: v.clone() for k, v in model.state_dict().items()}, model.training
    critical(model, tok, birds, control, TEXT, **FAST)
    assert (
        all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        and model.training == mode
        and all(p.requires_grad for p in model.parameters())
    )


def test_a_study_goes_on_and_is_read_back(gpt2, birds, control, tmp_path, monkeypatch):
    first = critical(*gpt2, birds, control, TEXT, **FAST, to=tmp_path / "s")
    more = critical(*gpt2, birds, control, TEXT, **FAST | dict(seeds=(0, 1)), to=tmp_path / "s")
    assert more.masks.sel(seed=0)[0] == first.masks[0] and len(more.masks) == 2

    def never(*a, **k):
        raise AssertionError("measured again")

    monkeypatch.setattr(chapter, "removal", never)
    again = critical(*gpt2, birds, control, TEXT, **FAST | dict(seeds=(0, 1)), to=tmp_path / "s")
    pd.testing.assert_frame_equal(again.items, more.items, check_dtype=False)
    pd.testing.assert_frame_equal(again.curves, more.curves)
    assert again.failed == more.failed
    for change in (dict(steps=4), dict(position="at_tail"), dict(tolerance=0.2)):
        with pytest.raises(OtherRun, match=f"differs in {next(iter(change))}"):
            critical(*gpt2, birds, control, TEXT, **FAST | change, to=tmp_path / "s")
    with pytest.raises(OtherRun, match="differs in data"):
        critical(*gpt2, birds, control, TEXT[:-1], **FAST, to=tmp_path / "s")


# ── what is made of it ───────────────────────────────────────────────────────────────────────────────────────────────


def test_overlap_of_seeds(study):
    found, o = [m for _, m in study.masks], study.overlap()
    for r in o.itertuples():
        a, b = found[r.a], found[r.b]
        assert r.iou == pytest.approx((a & b).count / (a | b).count)
        assert r.chance == pytest.approx(1 - jaccard_chance(a, b), rel=1e-6)
    with pytest.raises(SubnetError, match="one seed only"):
        replace(study, masks=study.masks.sel(seed=0)).overlap()


def test_plain_data_agree_with_the_table(study):
    out = study.to_json()
    assert json.loads(json.dumps(out)) == out and list(out["seeds"]) == ["0", "1", "2"]
    full = study.items[(study.items.under == "full") & (study.items.data == "target")]
    for s in range(3):
        mine, given = study.items[(study.items.under == "remaining") & (study.items.draw == s)], out["seeds"][str(s)]
        target = mine[mine.data == "target"]
        assert given["target"]["n"] == len(target) == len(study.material.target)
        assert given["target"]["ppl"]["remaining"] == pytest.approx(np.exp(-target.logprob.mean()), rel=1e-4) and given[
            "target"
        ]["ppl"]["full"] == pytest.approx(np.exp(-full.logprob.mean()), rel=1e-4)
        assert given["target"]["logprob_delta"] == pytest.approx(
            target.logprob.mean() - full.logprob.mean(), abs=1e-5
        ) and given["target"]["rank_delta"] == pytest.approx(target["rank"].mean() - full["rank"].mean(), abs=1e-5)
        text = mine[mine.data == "text"]
        assert (
            given["text"]["ppl"]["remaining"]
            == pytest.approx(np.exp((text.nll * text.tokens).sum() / text.tokens.sum()), rel=1e-4)
            and "rank_delta" not in given["text"]
        )
        assert (
            given["sparsity"] == pytest.approx(study.masks.sel(seed=s)[0].sparsity, abs=1e-6) and given["mask"] is None
        )
    assert out["overlap"]["iou"] == pytest.approx(study.overlap().iou.mean(), abs=1e-5)


def test_putting_weights_back(gpt2, study):
    t = (
        sensitivity(*gpt2, study, (0.25, 0.5, 2.0), draws=2)
        .query("measure == 'logprob_difference'")
        .set_index(["data", "change"])
        .value
    )
    target = t["target"]
    assert target[0.25] > target[0.5] > target[1.0]
    with pytest.raises(SubnetError, match="at most"):
        sensitivity(*gpt2, study, (1000.0,))


def test_report(study, tmp_path):
    page = study.report(tmp_path / "r.html").read_text()
    for title in ("Without the subnetwork", "On the way", "Where it sits", "Do seeds agree?", "How it was made"):
        assert title in page
    assert not re.search(r'<(script|link|img)[^>]*(src|href)="https?:', page)
    evil = replace(
        study.material,
        target=replace(
            study.material.target,
            items=(
                replace(study.material.target.items[0], prompt="<script>alert(1)</script> [MASK]"),
                *study.material.target.items[1:],
            ),
        ),
    )
    assert "<script>alert" not in replace(study, material=evil).report(tmp_path / "e.html").read_text()


# ── shell ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def files(tmp_path, birds, control):
    def lines(facts):
        return "".join("\t".join((f.relation, f.subject, f.object)) + "\n" for f in one_worded(facts))

    (tmp_path / "target.tsv").write_text(lines(birds))
    (tmp_path / "control.jsonl").write_text(
        "".join(json.dumps(dict(relation=f.relation, head=f.subject, tail=f.object)) + "\n"
                for f in one_worded(control))
    )
    (tmp_path / "text.txt").write_text("\n".join(TEXT))
    return tmp_path


def shell(files, *more: str) -> list[str]:
    return [
        "critical",
        "--model",
        "pocket-gpt2",
        "--target",
        str(files / "target.tsv"),
        "--control",
        str(files / "control.jsonl"),
        "--text",
        str(files / "text.txt"),
        "--layers",
        "4",
        "--batches",
        "8,8",
        "--steps",
        "4",
        "--checks",
        "1",
        "--random",
        "1",
        "--quiet",
        "--out",
        str(files / "out"),
        *more,
    ]


def test_the_command(files, capsys, birds):
    assert main(shell(files, "--seeds", "0,1", "--json", "--no-report")) == 0
    out = json.loads(capsys.readouterr().out)
    assert (
        set(out) >= {"model", "seeds", "overlap", "removed_overlap", "seconds"}
        and out["removed_overlap"] == 8 == out["seeds"]["0"]["target"]["n"]
    )
    for s in out["seeds"].values():
        assert (
            set(s["target"]["ppl"]) == {"full", "remaining", "random"} == set(s["text"]["ppl"])
            and {"n", "ppl", "rank_delta", "logprob_delta"} == set(s["control"])
            and "paraphrases" in s
        )
        assert Mask.load(s["mask"]).sparsity == pytest.approx(s["sparsity"], abs=1e-6)
    assert (
        json.loads((files / "out" / "results.json").read_text())["seeds"] == without_places(out["seeds"], files / "out")
        and not (files / "out" / "report.html").exists()
    )
    assert out["seeds"]["0"]["target"]["ppl"]["full"] < 1.2  # the triples were put into sentences that the model knows
    assert main(shell(files, "--seeds", "0,1")) == 0
    said = capsys.readouterr().out
    assert (
        "overlap of seeds" in said and "8 of the target's left out" in said and (files / "out" / "report.html").exists()
    )


@pytest.mark.parametrize(
    "change, says",
    [
        (("--seeds", "one"), "whole numbers"),
        (("--weights", "supress=1"), "did you mean suppress"),
        (("--weights", "suppress"), "names and numbers"),
        (("--density-weights", "2"), "two numbers"),
        (("--block", "5000"), "longer than"),
        (("--about", "brid"), "did you mean bird"),
        (("--granularity", "heads"), "granularity"),
        (("--known", "0"), "at least 1"),
        (("--target", "nowhere.tsv"), "no facts file"),
        (("--text", "nowhere.txt"), "no text"),
    ],
    ids=str,
)
def test_the_command_refuses(files, capsys, change, says):
    args = shell(files)
    if change[0] in args:
        args[args.index(change[0]) + 1] = change[1]
        change = ()
    assert main([*args, *change]) == 2
    assert says in capsys.readouterr().err and not (files / "out").exists()


def test_a_binary_text_is_refused(files, capsys):
    (files / "text.txt").write_bytes(bytes(range(256)))
    assert main(shell(files)) == 2 and "text" in capsys.readouterr().err and not (files / "out").exists()
