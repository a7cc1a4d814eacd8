"The recipe on a real pretrained model and real facts."
import json

import pytest

from subnet_explorer import Space, load, read_facts, recipes
from subnet_explorer.cli import main

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def minilm(real): return real / "models" / "minilm-l6-mlm"


def test_trex_from_the_shell(real, minilm, tmp_path, capsys):
    lama = real / "datasets" / "lama"
    assert main(["lamp", "--model", str(minilm), "--facts", str(lama / "TREx"), "--templates", str(lama / "relations.jsonl"), "--relations", "P140,P407", "--layers", "4-6",
                 "--steps", "60", "--out", str(tmp_path / "out"), "--json", "--quiet", "--no-report"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert list(out["relations"]) == ["P140", "P407"] and out["relations"]["P140"]["n_test"] == 48
    p = out["macro"]["p_at_1"]
    assert p["subnetwork"] > 3 * p["full"] and p["subnetwork"] > .3 and p["random"] < .05 and p["mismatched"] < .5 * p["subnetwork"]
    assert all(.48 < r["sparsity"] < .52 and 0 < r["flips"] < .1 for r in out["relations"].values())


def test_conceptnet_triples(real, minilm):
    model, tok = load(minilm)
    facts = read_facts(real / "datasets" / "conceptnet100k" / "train.tsv.gz", "MadeOf,PartOf")
    study = recipes.lamp(model, tok, facts, steps=60, random=1, progress=False)
    assert study.space == Space.of(model, "weight", layers="4-6")                           # bit-identical weights after the study
    assert {r: set(s) for r, s in study.skipped.items()} == {"MadeOf": {"object is not one token"}, "PartOf": {"object is not one token"}}
    t = study.table()
    assert t.loc["macro", "subnetwork"] > 2 * t.loc["macro", "full"] and t.loc["macro", "subnetwork"] > t.loc["macro", "majority"]
