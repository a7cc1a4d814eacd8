"The recipe on a real pretrained model and real facts."

import json

import pytest

from subnet_explorer import Space, load, read_facts, recipes
from subnet_explorer.cli import main

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def minilm(real):
    return real / "models" / "minilm-l6-mlm"


@pytest.mark.slow
def test_trex_from_the_shell(real, minilm, tmp_path, capsys):
    lama = real / "datasets" / "lama"
    assert (
        main(
            [
                "lamp",
                "--model",
                str(minilm),
                "--facts",
                str(lama / "TREx"),
                "--templates",
                str(lama / "relations.jsonl"),
                "--relations",
                "P140,P407",
                "--layers",
                "4-6",
                "--steps",
                "60",
                "--out",
                str(tmp_path / "out"),
                "--json",
                "--quiet",
                "--no-report",
            ]
        )
        == 0
    )
    out = json.loads(capsys.readouterr().out)
    assert list(out["relations"]) == ["P140", "P407"] and out["relations"]["P140"]["n_test"] == 48
    p = out["macro"]["p_at_1"]
    assert (
        p["subnetwork"] > 3 * p["full"]
        and p["subnetwork"] > 0.3
        and p["random"] < 0.05
        and p["mismatched"] < 0.5 * p["subnetwork"]
    )
    assert all(0.48 < r["sparsity"] < 0.52 and 0 < r["flips"] < 0.1 for r in out["relations"].values())


@pytest.mark.slow
def test_conceptnet_triples(real, minilm):
    model, tok = load(minilm)
    facts = read_facts(real / "datasets" / "conceptnet100k" / "train.tsv.gz", "MadeOf,PartOf")
    study = recipes.lamp(model, tok, facts, steps=60, random=1, progress=False)
    assert study.space == Space.of(model, "weight", layers="4-6")  # bit-identical weights after the study
    assert {r: set(s) for r, s in study.skipped.items()} == {
        "MadeOf": {"object is not one token"},
        "PartOf": {"object is not one token"},
    }
    t = study.table()
    assert (
        t.loc["macro", "subnetwork"] > 2 * t.loc["macro", "full"]
        and t.loc["macro", "subnetwork"] > t.loc["macro", "majority"]
    )


@pytest.mark.parametrize("task", ["RTE", "CoLA", "SST-2"])
def test_glue_is_read_whole(real, task):
    from subnet_explorer.data.parts import task_data

    data = task_data(real / "datasets" / "glue" / task, search=0.05)
    assert (len(data.test), data.metric) == {
        "RTE": (277, "accuracy"),
        "CoLA": (1043, "matthews"),
        "SST-2": (872, "accuracy"),
    }[task]
    assert len(data.train) + len(data.search) == {"RTE": 2490, "CoLA": 8551, "SST-2": 67349}[task]


@pytest.mark.slow
def test_tickets_of_a_real_encoder(real, minilm):
    "The published three phases: survivors are 72 − 7a − 3b heads of 72 (a tenth at once, then half as many)."
    from subnet_explorer.data.parts import task_data

    model, tok = load(minilm)
    data = task_data(real / "datasets" / "glue" / "SST-2", search=0.001, train=960, test=200)
    study = recipes.tickets(
        model, tok, {"SST-2": data}, seeds=(0,), epochs=1, lr=3e-4, length=32, floor=0.95, progress=False
    )
    assert (
        set(study.scores.kind) == {"full", "good", "random", "bad"}
        and study.scores.query("kind == 'full'").score.item() > 0.6
    )
    heads = study.steps["head"]
    assert (
        all(any(72 - 7 * a - 3 * b == h for a in range(11) for b in range(25)) or h == 0 for h in heads)
        and study.good[0].density < 1
    )
