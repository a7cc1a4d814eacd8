"A recipe over lists of models, data and settings: every combination once, one table, values compared."
from __future__ import annotations

import functools
import gc
import importlib.util
import json
import os
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from test_outside import METHOD
from torch import nn

from subnet_explorer.cli import main
from subnet_explorer.core.errors import SubnetError, UnknownName
from subnet_explorer.core.folders import kept_masks, kept_runs
from subnet_explorer.core.intervals import student_interval
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.masks import Masks
from subnet_explorer.core.numbers import Positive, Seeds, SomeShare
from subnet_explorer.core.pairs import Pairs
from subnet_explorer.core.run import OtherRun
from subnet_explorer.core.space import Space
from subnet_explorer.data.facts import read_facts
from subnet_explorer.model import load as loading
from subnet_explorer.model.load import tiny
from subnet_explorer.recipes import lamp, sweep
from subnet_explorer.recipes.cost import Work
from subnet_explorer.recipes.start import order
from subnet_explorer.recipes.study import RECIPES, Bench, Study, find_recipe, labelled_cells, recipe
from subnet_explorer.recipes.sweep import BadSweep, NoneSucceeded
from subnet_explorer.search.loop import Diverged

# ── a recipe that takes no time ──────────────────────────────────────────────────────────────────────────────────────

class Toy(Study):
    "What `toy` measured."

    def summary(self) -> pd.DataFrame:
        return self.tables["scores"].groupby("under", sort=False).score.mean().to_frame()

    def pairs(self) -> Pairs: return Pairs(self.tables["scores"], ["seed"], items=["item"])


class Quiet(Study):
    "A study that pairs nothing."

    def summary(self) -> pd.DataFrame: return self.tables["scores"][["score"]]


MADE: list[tuple[Any, ...]] = []      # what was measured, in order


def read_numbers(model: nn.Module, tok: Any, *, data: str) -> Mapping[str, Any]:
    return {"data": [float(x) for x in data.split("+")]}


def cost(values: Mapping[str, Any]) -> list[Work]: return [Work("guess", {"seed": len(values["seeds"])}, 10, 4)]


def toy(
    model: nn.Module,
    tok: Any,
    data: Sequence[float],
    *,
    scale: Positive = 1.0,                   # of all scores
    kind: str = "good",                      # good, fine, broken or unpaired
    epochs: int = 3,                         # a column of the table, too
    seeds: Seeds = (0, 1),                # of what is drawn
    shares: Sequence[SomeShare] = (0.5,),    # of nothing
    to: str | Path | None = None,
    progress: bool = True,
) -> Study:
    "Measure nothing in no time."
    from subnet_explorer.core.errors import check_names
    check_names([kind], ["good", "fine", "broken", "unpaired"], "kind")
    space = Space.of(model, "head")
    config = {"recipe": "toy", "model": str(space.model), "scale": scale, "kind": kind, "data": list(data)}
    bench = Bench(config, to, progress)

    def measure(labels: dict[str, Any]) -> None:
        if kind == "broken": raise Diverged("the loss of toy is no number.")
        bench.table(f"seed-{labels['seed']}", lambda: scores(labels["seed"]))

    def scores(seed: int) -> pd.DataFrame:
        MADE.append((scale, kind, seed))
        rng = np.random.default_rng(seed)
        rows = [{"under": under, "seed": seed, "item": i, "epochs": epochs, "score": scale * x * rng.random()}
                for under in ("full", "cut") for i, x in enumerate(data)]
        return pd.DataFrame(rows)

    cells = labelled_cells(seed=seeds)
    bench.work("seed", cells, measure)
    made = [bench.table(f"seed-{seed}", functools.partial(scores, seed)) for seed in seeds]
    table = pd.concat(made, ignore_index=True)
    masks = Masks([({"seed": seed}, Mask.random(space, 0.5, seed=seed)) for seed in seeds])
    found: type[Study] = Quiet if kind == "unpaired" else Toy
    return bench.finished(found(
        masks=masks, tables={"scores": table}, config=bench.config, model_name=space.model.name,
        seconds=bench.seconds, folder=bench.folder, notes=("all of it is made up.", f"scale {scale}."),
    ))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    MADE.clear()
    recipe("Toys", "nobody 2026", read=read_numbers, cost=cost)(toy)
    yield
    RECIPES.pop("toy", None)


def tok(*given: Any) -> None: raise AssertionError("nothing is read")


@pytest.fixture(scope="module")
def model() -> nn.Module: return tiny("bert")


DATA = [1.0, 2.0, 4.0, 3.0]


# ── every combination is the recipe ──────────────────────────────────────────────────────────────────────────────────

def test_every_combination_is_the_recipe_called_alone(model, tmp_path):
    made = sweep("toy", model, tok, DATA, over={"scale": [1.0, 2.0], "kind": ["good", "fine"]}, to=tmp_path / "s",
                 progress=False)
    assert made.axes == {"scale": [1.0, 2.0], "kind": ["good", "fine"]} and len(made.parts) == 4
    assert list(made.tables) == ["scores", "failed"] and list(made.tables["scores"])[:2] == ["scale", "kind"]
    for scale in (1.0, 2.0):
        for kind in ("good", "fine"):
            alone = RECIPES["toy"].run(model, tok, DATA, scale=scale, kind=kind, progress=False)
            t = made.tables["scores"]
            mine = t[(t.scale == scale) & (t.kind == kind)].drop(columns=["scale", "kind"]).reset_index(drop=True)
            pd.testing.assert_frame_equal(mine, alone.tables["scores"])
            masks = made.masks.sel(scale=scale, kind=kind)
            assert [m.id for _, m in masks] == [m.id for _, m in alone.masks]
            own = made.summary().reset_index().query("scale == @scale and kind == @kind").set_index("under")
            assert own.score.to_dict() == alone.summary().score.to_dict()
            folder = tmp_path / "s" / "runs" / f"kind-{kind}" / f"scale-{scale}"
            assert json.loads((folder / "results.json").read_text())["config"] == alone.config
    assert set(made.masks.index.columns) == {"scale", "kind", "seed"} and len(made.masks) == 8
    assert made.notes[0] == "all of it is made up." and "scale 1.0, kind good; scale 1.0, kind fine: scale 1.0." in (
        made.notes)
    assert made.config["sweep"] == made.axes and made.config["data"] == DATA and "differing" not in made.config


def test_lamp_over_sparsities_is_lamp(pocket_bert):
    facts, how = read_facts("pocket", "MadeOf"), dict(layers="4", steps=2, batch=4, random=1, progress=False)
    made = sweep("lamp", *pocket_bert, facts, over={"sparsity": [0.5, 0.3]}, **how)
    alone = lamp(*pocket_bert, facts, sparsity=0.3, **how)
    mine = made.tables["items"].query("sparsity == .3").drop(columns="sparsity").reset_index(drop=True)
    pd.testing.assert_frame_equal(mine, alone.tables["items"])
    assert made.masks.sel(sparsity=0.3)[0].id == alone.masks[0].id
    assert {d.name for d in made.departures} >= {d.name for d in alone.departures}
    table = made.gains(over="sparsity")
    assert set(table.under) == {"full", "subnetwork", "random", "majority"} and (table["items"] == 14).all()
    assert (table[table.under == "full"]["mean"] == 0).all()


def test_a_column_of_the_recipe_keeps_its_name(model):
    made = sweep("toy", model, tok, DATA, over={"epochs": [1, 2]}, progress=False)
    t = made.tables["scores"]
    assert t.columns[0] == "setting epochs" and (t["setting epochs"] == t.epochs).all()
    assert list(made.gains(over="epochs")["of"]) == [2, 2] and "setting epochs" in made.means()
    assert set(made.masks.index["setting epochs"]) == {1, 2}


# ── resuming, sharing, folders ───────────────────────────────────────────────────────────────────────────────────────

def test_a_stopped_sweep_goes_on_where_it_was(model, tmp_path, monkeypatch):
    over, table = {"scale": [1.0, 2.0, 3.0]}, Bench.table

    def stop(self: Bench, name: str, make: Any) -> pd.DataFrame:
        if self.config.get("scale") == 2.0 and name == "seed-1": raise KeyboardInterrupt
        return table(self, name, make)

    monkeypatch.setattr(Bench, "table", stop)
    with pytest.raises(KeyboardInterrupt): sweep("toy", model, tok, DATA, over=over, to=tmp_path / "s", progress=False)
    monkeypatch.setattr(Bench, "table", table)
    before = list(MADE)
    assert before == [(1.0, "good", 0), (1.0, "good", 1), (2.0, "good", 0)]
    made = sweep("toy", model, tok, DATA, over=over, to=tmp_path / "s", progress=False)
    assert MADE[len(before):] == [(2.0, "good", 1), (3.0, "good", 0), (3.0, "good", 1)]
    whole = sweep("toy", model, tok, DATA, over=over, progress=False)
    for name in whole.tables: pd.testing.assert_frame_equal(made.tables[name], whole.tables[name])
    n = len(MADE)
    over = {"scale": [1.0, 2.0, 3.0, 4.0]}
    again = sweep("toy", model, tok, DATA, over=over, to=tmp_path / "s", progress=False)
    assert len(again.parts) == 4 and MADE[n:] == [(4.0, "good", 0), (4.0, "good", 1)]
    assert not list((tmp_path / "s").rglob(".leases/*"))


def test_two_processes_share_the_combinations(model, tmp_path):
    def work(name: str) -> Any:
        made = sweep("toy", model, tok, DATA, over={"scale": [1.0, 2.0, 3.0, 4.0]}, to=tmp_path / "s", progress=False)
        (tmp_path / name).write_text(json.dumps(MADE))
        return made

    child = os.fork()
    if not child:
        try: work("child")
        finally: os._exit(0)
    made = work("parent")
    os.waitpid(child, 0)
    whole = sweep("toy", model, tok, DATA, over={"scale": [1.0, 2.0, 3.0, 4.0]}, progress=False)
    pd.testing.assert_frame_equal(made.tables["scores"], whole.tables["scores"])
    done = [tuple(cell) for name in ("child", "parent") for cell in json.loads((tmp_path / name).read_text())]
    assert sorted(done) == sorted((scale, "good", seed) for scale in (1.0, 2.0, 3.0, 4.0) for seed in (0, 1))


def test_other_folders_are_refused(model, tmp_path):
    RECIPES["toy"].run(model, tok, DATA, to=tmp_path / "plain", progress=False)
    with pytest.raises(OtherRun, match="another study"):
        sweep("toy", model, tok, DATA, over={"scale": [1.0]}, to=tmp_path / "plain", progress=False)
    sweep("toy", model, tok, DATA, over={"scale": [1.0]}, to=tmp_path / "s", progress=False)
    with pytest.raises(OtherRun): sweep("toy", model, tok, DATA, over={"kind": ["good"]}, to=tmp_path / "s")
    with pytest.raises(OtherRun): RECIPES["toy"].run(model, tok, DATA, to=tmp_path / "s", progress=False)
    with pytest.raises(OtherRun, match="data"):      # of the combination: not a failure, but another study
        sweep("toy", model, tok, [5.0], over={"scale": [1.0]}, to=tmp_path / "s", progress=False)


def test_models_are_loaded_one_after_another(tmp_path):
    alive: list[weakref.ref[Any]] = []

    def loader(family: str) -> Any:
        def load() -> Any:
            gc.collect()
            alive.append(weakref.ref(found := tiny(family)))
            assert sum(ref() is not None for ref in alive) == 1
            return found, tok
        return load

    over = {"kind": ["good", "fine"], "model": {name: loader(name) for name in ("bert", "gpt2", "roberta")}}
    made = sweep("toy", DATA, over=over, to=tmp_path / "s", progress=False)
    assert len(alive) == 3 and list(made.axes) == ["model", "kind"] and len(made.parts) == 6
    assert made.model_name == "tiny-bert, tiny-gpt2, tiny-roberta"
    assert "model" not in made.config.get("differing", {})
    assert len(made.masks) == 12 and made.masks.sel(model="gpt2")[0].space.model.name == "tiny-gpt2"


# ── comparisons ──────────────────────────────────────────────────────────────────────────────────────────────────────

def test_values_are_compared_as_pairs_by_hand(model):
    made = sweep("toy", model, tok, DATA, over={"scale": [1.0, 2.0, 4.0], "kind": ["good", "fine"]}, progress=False)
    found = made.gains(over="scale")
    assert len(found) == 2 * 2 * 3 and list(found)[:4] == ["kind", "under", "of", "against"]
    parts = {s: RECIPES["toy"].run(model, tok, DATA, scale=s, progress=False).tables["scores"] for s in (1.0, 2.0, 4.0)}
    scores = pd.concat([t.assign(side=str(s), case=t.under) for s, t in parts.items()])
    pairs = [("2.0", "1.0"), ("4.0", "1.0"), ("4.0", "2.0")]
    hand = Pairs(scores, ["seed"], ["case"], pairs, "side", ["item"]).gains()
    one = found[found.kind == "good"].reset_index(drop=True)
    for name in ("seeds", "items", "mean", "low", "high", "p", "wins", "losses", "sign"):
        pd.testing.assert_series_equal(one[name], hand[name])
    assert (found.holm >= found.p).all() and found.holm.max() <= 1
    few = made.gains(over="scale", of=4.0, against=1.0, only="cut")
    assert few[["under", "of", "against"]].drop_duplicates().values.tolist() == [["cut", 4.0, 1.0]] and len(few) == 2
    table = made.gains(over="scale", against=2.0)
    assert set(zip(table["of"], table.against, strict=True)) == {(1.0, 2.0), (4.0, 2.0)}
    with pytest.raises(SubnetError, match="no two values"): made.gains(over="scale", of=1.0, against=1.0)
    with pytest.raises(UnknownName, match="value of scale"): made.gains(over="scale", of=3.0)
    with pytest.raises(UnknownName, match="condition"): made.gains(over="scale", only="cutt")
    with pytest.raises(UnknownName, match="axis"): made.gains(over="scales")


def test_conditions_are_compared_within_combinations(model):
    made = sweep("toy", model, tok, DATA, over={"scale": [1.0, 2.0]}, progress=False)
    for scale in (1.0, 2.0):
        alone = RECIPES["toy"].run(model, tok, DATA, scale=scale, progress=False).gains()
        mine = made.gains()[made.gains().scale == scale].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine[[*alone]].drop(columns=["holm", "bh"]), alone.drop(columns=["holm", "bh"]))
    assert made.gains().holm.tolist() != made.gains().p.tolist()


def test_means_over_an_axis(model):
    over = {"data": {"a": DATA, "b": [3.0, 1.0], "c": [2.0, 2.0, 2.0]}}
    made = sweep("toy", model, tok, over=over, progress=False)
    t = made.tables["scores"]
    each = t.groupby(["data", "under", "seed"]).score.mean().unstack("data")
    macro = made.means("data").set_index("under")
    for under in ("full", "cut"): assert macro["mean"][under] == pytest.approx(each.loc[under].mean().mean())
    assert (macro["items"] == 4 + 2 + 3).all() and (macro.seeds == 2).all()
    sample = made.means("data", sample=True).set_index("under")
    assert (sample["items"] == 3).all()
    assert sample["mean"].tolist() == pytest.approx(macro["mean"].tolist())
    one = sweep("toy", model, tok, over=over, seeds=(0,), progress=False)
    spread = one.tables["scores"].query("under == 'cut'").groupby("data").score.mean()
    hand, found = student_interval(spread.tolist()), one.means("data", sample=True).set_index("under").loc["cut"]
    assert [found.low, found["mean"], found.high] == pytest.approx([hand["low"], hand["mean"], hand["high"]])


def test_items_are_paired_by_what_they_are(pocket_bert):
    "Facts at other places of another table are the same facts."
    from subnet_explorer.recipes.sweep import by_name
    rows = [("a", 0, "x", 1.0), ("a", 1, "y", 2.0), ("b", 0, "y", 5.0), ("b", 1, "z", 9.0)]
    scores = pd.DataFrame(rows, columns=["under", "item", "sub", "score"]).assign(obj="o", relation="r", uuid="u")
    found = by_name(Pairs(scores, items=["item"], contrasts=[("b", "a")])).gains()
    assert found[["items", "mean"]].values.tolist() == [[1, 3.0]]
    texts = scores.assign(relation=None, sub=None, obj=None, uuid=["x", "y", "y", "z"])
    found = by_name(Pairs(texts, items=["item"], contrasts=[("b", "a")])).gains()
    assert found[["items", "mean"]].values.tolist() == [[1, 3.0]]
    nameless = texts.assign(uuid=None)
    assert by_name(Pairs(nameless, items=["item"], contrasts=[("b", "a")])).gains().iloc[0]["mean"] == 5.5


# ── what fails, and what is refused ──────────────────────────────────────────────────────────────────────────────────

def test_a_failing_combination_does_not_stop_the_others(model, tmp_path):
    made = sweep("toy", model, tok, DATA, over={"kind": ["broken", "good"], "scale": [1.0, 2.0]}, to=tmp_path / "s",
                 progress=False)
    assert made.failed.values.tolist() == [
        ["broken", scale, "Diverged", "the loss of toy is no number."] for scale in (1.0, 2.0)]
    assert len(made.parts) == 2 and set(made.tables["scores"].kind) == {"good"}
    said = json.loads((tmp_path / "s" / "results.json").read_text())
    assert [row["error"] for row in said["failed"]] == ["Diverged"] * 2
    assert pd.read_csv(tmp_path / "s" / "failed.csv").error.tolist() == ["Diverged"] * 2
    assert "Diverged" in made.shown() and "Diverged" in made._repr_html_()
    page = made.report(tmp_path / "s" / "report.html").read_text()
    assert "Diverged" in page and "Over scale" in page and "runs/kind-good/scale-1.0" in page


def test_nothing_succeeded(model, tmp_path):
    with pytest.raises(NoneSucceeded, match=r"none of 2 .*scale 1.0: Diverged: the loss of toy"):
        sweep("toy", model, tok, DATA, over={"scale": [1.0, 2.0]}, kind="broken", to=tmp_path / "s", progress=False)


def test_what_pairs_nothing_is_swept_too(model, tmp_path):
    made = sweep("toy", model, tok, DATA, over={"kind": ["unpaired"], "scale": [1.0, 2.0]}, progress=False)
    with pytest.raises(SubnetError, match="pairs"): made.gains()
    assert "not compared" in made.to_json()["gains"][0] and made.report(tmp_path / "report.html").exists()
    some = sweep("toy", model, tok, DATA, over={"kind": ["unpaired", "good"]}, progress=False)
    assert set(some.gains().kind) == {"good"}
    assert any(note.startswith("kind unpaired: nothing to compare") for note in some.notes)


BAD: list[tuple[dict[str, Any], str, type[SubnetError]]] = [
    ({}, "needs an axis", BadSweep),
    ({"scale": []}, "scale has no value", BadSweep),
    ({"scale": [1.0, 1]}, "twice", BadSweep),
    ({"kind": "good"}, "the text 'good'", BadSweep),
    ({"scael": [1.0]}, "did you mean scale", UnknownName),
    ({"to": ["a", "b"]}, "to is no axis", BadSweep),
    ({"progress": [True]}, "progress is no axis", BadSweep),
    ({"seeds": [[0], [1, 1]]}, "seeds 1, 1: seeds must be different", SubnetError),
    ({"scale": [1.0, -2.0]}, "scale -2.0: scale must be a positive number", SubnetError),
    ({"scale": [1.0, "two"]}, "scale two: scale must be a positive number, got 'two'", SubnetError),
    ({"kind": ["good", "godo"]}, "kind godo: unknown kind 'godo': did you mean good", UnknownName),
    ({"data": [DATA, DATA]}, "twice", BadSweep),
    ({"data": {"a": 3.0, "b": "text"}}, "data b: .*text", SubnetError),
]


@pytest.mark.parametrize("over, said, error", BAD, ids=[str(over)[:40] for over, _, _ in BAD])
def test_bad_input_is_refused_before_anything_is_made(model, tmp_path, over, said, error):
    given = (model, tok) if "data" in over else (model, tok, DATA)
    with pytest.raises(error, match=said): sweep("toy", *given, over=over, to=tmp_path / "s", progress=False)
    assert not MADE and not list(tmp_path.iterdir())


def test_arguments_are_refused_by_name(model):
    with pytest.raises(BadSweep, match="scale is given twice"):
        sweep("toy", model, tok, DATA, over={"scale": [1.0]}, scale=2.0)
    with pytest.raises(BadSweep, match="toy needs data"): sweep("toy", model, tok, over={"scale": [1.0]})
    with pytest.raises(BadSweep, match=r"takes data by place here, and 3 values"):
        sweep("toy", model, tok, DATA, over={"model": ["pocket-bert"]})
    with pytest.raises(UnknownName, match="did you mean epochs"):
        sweep("toy", model, tok, DATA, over={"scale": [1.0]}, epoch=3)
    with pytest.raises(BadSweep, match="the model 'a' is"): sweep("toy", DATA, over={"model": {"a": model}})
    with pytest.raises(BadSweep, match="no name"): sweep("toy", DATA, over={"model": [(model, tok)]})
    with pytest.raises(UnknownName, match="recipe"): sweep("toys", over={"scale": [1.0]})


# ── in the shell and in files ────────────────────────────────────────────────────────────────────────────────────────

WORDS = ["toy", "--model", "tiny", "--data", "1+2", "--device", "cpu", "--quiet", "--no-report"]


@pytest.fixture
def shell(tmp_path, monkeypatch, model, capsys) -> Any:
    monkeypatch.chdir(tmp_path)
    loaded: list[str] = []

    def load(name: str, **how: Any) -> Any:
        loaded.append(name)
        return (model if name == "tiny" else tiny(name)), tok

    monkeypatch.setattr(loading, "load", load)

    def run(*words: str) -> tuple[int, str, str]:
        status = main(list(words))
        return (status, *capsys.readouterr())
    run.loaded = loaded      # type: ignore[attr-defined]
    return run


def test_the_shell_sweeps_every_recipe(shell):
    status, out, err = shell(*WORDS, "--out", "s", "--sweep", "kind=good,fine", "--sweep", "shares=0.5,0.3;1", "--json")
    assert status == 0, err
    said = json.loads(out)
    assert said["config"]["sweep"] == {"kind": ["good", "fine"], "shares": ["0.5, 0.3", "1"]} or (
        said["config"]["sweep"] == {"kind": ["good", "fine"], "shares": ["0.5, 0.3", "1.0"]})
    assert len(said["combinations"]) == 4 and shell.loaded == ["tiny"] and len(MADE) == 8
    assert len(list(Path("s").rglob("study.json"))) == 5
    status, out, _ = shell(*WORDS, "--out", "s", "--sweep", "kind=good,fine", "--sweep", "shares=0.5,0.3;1")
    assert status == 0 and len(MADE) == 8 and "kind" in out and "Masks and tables are in s." in out


def test_a_file_and_a_dry_run(shell):
    words = [*WORDS, "--out", "s", "--sweep", "model=bert,gpt2", "scale=1,2"]
    words.remove("--model")
    words.remove("tiny")
    status, out, err = shell(*words, "--dry-run")
    assert status == 0 and not Path("s").exists() and not shell.loaded, err
    assert "sweep: model bert, gpt2 × scale 1.0, 2.0: 4 combinations" in out
    assert "guess: 4 combinations × 2 seeds = 8 cells" in out and out.startswith("toy of bert, gpt2")
    status, text, _ = shell(*words, "--print-config")
    written = yaml.safe_load(text)
    assert written["sweep"] == {"model": ["bert", "gpt2"], "scale": [1.0, 2.0]}
    assert not {"model", "scale"} & set(written) and written["kind"] == "good"
    Path("study.yaml").write_text(text)
    status, out, err = shell("run", "study.yaml", "--json")
    assert status == 0 and json.loads(out)["config"]["sweep"] == written["sweep"], err
    assert len(kept_runs("s")) == 0 and len(list(Path("s").rglob("results.json"))) == 5
    status, out, _ = shell("run", "study.yaml", "--scale", "5", "--out", "t", "--dry-run")
    assert "2 combinations" in out and "scale" not in out      # the shell goes over the file
    Path("named.yaml").write_text("recipe: toy\nmodel: tiny\nout: n\nsweep: {data: {few: '1+2', more: '1+2+3'}}\n")
    status, out, err = shell("run", "named.yaml", "--json", "--quiet", "--device", "cpu")
    assert status == 0 and [row["data"] for row in json.loads(out)["summary"]] == ["few", "few", "more", "more"], err
    assert "report.html" in {p.name for p in Path("n").iterdir()}
    assert Path("n/runs/data-few/report.html").exists()
    assert "runs/data-few/report.html" in Path("n/report.html").read_text()


@pytest.mark.parametrize("words, said", [
    (["--sweep", "kidn=good,fine"], "UnknownName: unknown axis 'kidn': did you mean kind"),
    (["--sweep", "kind=good,good"], "BadSweep: the axis kind has the value 'good' twice"),
    (["--sweep", "kind="], "BadSweep: the axis kind has no value"),
    (["--sweep", "kind"], "BadSweep: cannot read the axis 'kind'"),
    (["--sweep"], "BadSweep: --sweep wants an axis"),
    (["--sweep", "scale=1,two"], "BadSetting: cannot read the scale 'two'"),
    (["--sweep", "scale=1,-2"], "BadSetting: --scale must be a positive number"),
    (["--sweep", "kind=good,godo"], "UnknownName: kind godo: unknown kind 'godo'"),
    (["--sweep", "out=a,b"], "UnknownName: unknown axis 'out'"),
    (["--sweep", "scale=1,2", "--scale", "3"], "BadSweep: scale is given twice"),
])
def test_the_shell_refuses_in_one_line(shell, words, said):
    status, out, err = shell(*WORDS, "--out", "s", *words)
    assert (status, out) == (2, "") and err.startswith(f"subnet-explorer: {said}") and err.count("\n") == 1, err
    assert not Path("s").exists() and not MADE


@pytest.mark.parametrize("name", ["lamp", "tickets", "critical", "probe", "tamt"])
def test_the_cost_of_every_recipe_is_counted(name):
    from test_published import DATA as NEEDED
    words = ["--model", "some/bert", "--out", "out", "--device", "cpu", *NEEDED[name]]
    one = order(find_recipe(name), words).plan()
    many = order(find_recipe(name), [*words, "--sweep", "seeds=0,1;2,3;4,5", "lr=0.1,0.2"]).plan()
    each = order(find_recipe(name), [*words, "--seeds", "0,1"]).plan()
    assert many["combinations"] == 6 and len(many["work"]) == len(each["work"]) >= len(one["work"]) > 0
    for a, b in zip(many["work"], each["work"], strict=True):
        assert a["axes"] == {"combination": 6, **b["axes"]}
        if b["passes"]: assert a["passes"] == 6 * b["passes"]


def test_pocket_and_published_settings_are_those_of_the_combination():
    words = ["--facts", "pocket", "--out", "o", "--published", "--sweep", "method=deterministic,stochastic"]
    made = order(find_recipe("lamp"), ["--model", "some/bert", *words])
    assert [made.at({"method": m})["sparsity"] for m in ("deterministic", "stochastic")] == [0.5, 0.3]
    assert "sparsity" not in made.values and made.values["clip"] == 5
    words = ["--target", "pocket", "--control", "pocket", "--text", "pocket", "--out", "o"]
    made = order(find_recipe("critical"), [*words, "--sweep", "model=pocket-gpt2,gpt2"])
    assert [made.at({"model": m})["steps"] for m in ("pocket-gpt2", "gpt2")] == [600, 2000]


# ── a sixth recipe ───────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_recipe_from_outside_is_swept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("guesses.py").write_text(METHOD)
    spec = importlib.util.spec_from_file_location("guesses", "guesses.py")
    assert spec and spec.loader
    sys.modules["guesses"] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        words = ["guess", "--model", "pocket-bert", "--facts", "pocket", "--device", "cpu", "--quiet", "--out", "out"]
        assert main([*words, "--sweep", "relation=MadeOf,Desires", "--steps", "1", "--seeds", "0", "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert [row["relation"] for row in said["summary"]] == ["MadeOf"] * 2 + ["Desires"] * 2
        assert "not compared" in said["gains"][0] and said["config"]["lr"] == 0.05
        assert pd.read_csv("out/answers.csv").columns[0] == "relation"
        assert len(kept_masks("out")) == len(kept_runs("out")) == 2
        assert Path("out/report.html").exists() and Path("out/runs/relation-MadeOf/report.html").exists()
        before = {p: p.stat().st_mtime_ns for p in Path("out").rglob("mask.safetensors")}
        assert main([*words, "--sweep", "relation=MadeOf,Desires", "--steps", "1", "--seeds", "0"]) == 0
        assert before == {p: p.stat().st_mtime_ns for p in Path("out").rglob("mask.safetensors")}
    finally:
        RECIPES.pop("guess", None)
        del sys.modules["guesses"]
