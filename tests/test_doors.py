"Every public function refuses, by name, an argument of a wrong noun for each of its typed parameters."
from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pandas as pd
import pytest

import subnet_explorer
from subnet_explorer import MLM, Cloze, Facts, Mask, Space, load, read_facts
from subnet_explorer.core.doors import NO, fitted, hints_of, is_open
from subnet_explorer.core.errors import SubnetError
from subnet_explorer.core.numbers import types_of

HELPERS = {"look.style", "look.paper", "look.tables"}      # of figures: they are called thousands of times


class Stranger:
    "Nothing that anybody takes."


def homes() -> Iterator[tuple[str, str]]:
    for home, names in subnet_explorer._HOMES.items(): yield from ((home, name) for name in names)
    for modules in subnet_explorer._GATHERED.values():
        for home in set(modules) - HELPERS:
            yield from ((home, name) for name in import_module(f"subnet_explorer.{home}").__all__)


def doors() -> dict[str, Any]:
    "Functions, and what is called of classes: making one, and their methods."
    found: dict[str, Any] = {}
    for home, name in sorted(set(homes())):
        what = getattr(import_module(f"subnet_explorer.{home}"), name)
        if inspect.isfunction(what): found[f"{home}.{name}"] = what
        if not inspect.isclass(what) or issubclass(what, (Exception, tuple)): continue
        members = ["__init__", *(m for m in vars(what) if not m.startswith("_"))]
        for m in members:
            static = inspect.getattr_static(what, m)
            function = getattr(static, "__func__", static)
            if inspect.isfunction(function) and function.__module__.startswith("subnet_explorer"):
                found[f"{home}.{name}.{m}"] = function
    for name, recipe in subnet_explorer.recipes.study.RECIPES.items(): found[f"recipes.{name}"] = recipe.run
    return found


DOORS = doors()
SMALL = {"data.facts.Fact.__init__"}      # made by the hundred thousand


@pytest.mark.parametrize("name", sorted(set(DOORS) - SMALL))
def test_a_stranger_is_refused(name):
    door = DOORS[name]
    hints = hints_of(door)
    parameters = inspect.signature(inspect.unwrap(door)).parameters.values()
    keywords = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    typed = [k for k in keywords if not is_open(hints[k]) and fitted(Stranger(), hints[k]) is NO]
    for keyword in typed:
        first = () if keywords[0] == keyword else (None,) * (keywords[0] in ("self", "cls"))
        with pytest.raises(SubnetError, match=rf"{keyword}|model is needed"): door(*first, **{keyword: Stranger()})


FREE = {
    "measure.patterns.PatternReport.__init__", "search.prune.Pruned.__init__",      # results
    "core.space.Space.of", "search.gates.Threshold.__init__", "search.gates.TopK.__init__",      # a name, or a number
    "search.gates.Concrete.__init__", "search.gates.HardConcrete.__init__",
    "measure.patterns.train_network", "measure.attention.token_ids", "measure.fluency.EncodedTexts.__init__",
}
"Doors with a number that is any number, or that something else is said about."
INNER = {"key", "multiplier", "drop", "fold", "cut_back", "snapshot", "focus", "label", "read", "toggle"}
"Methods that parts of the library call on each other, or that take the number of an item."


def is_bare(kind: Any) -> bool:
    "Whether a type is a number without bounds, or may be one."
    if get_origin(kind) in (Union, UnionType): return any(map(is_bare, get_args(kind)))
    return kind in (int, float)


CALLED = [name for name in DOORS if name not in FREE and name.rpartition(".")[2] not in INNER]


@pytest.mark.parametrize("name", sorted(CALLED))
def test_every_number_says_what_it_may_be(name):
    assert not [k for k, kind in types_of(DOORS[name]).items() if k != "return" and is_bare(kind)]


@pytest.fixture(scope="module")
def world():
    model, tok = load("pocket-bert")
    return model, tok, read_facts("pocket", "MadeOf"), Space.of(model, "head")


@pytest.mark.parametrize(("call", "says"), [
    ("find(model, tok, Threshold(weights, seed=0), facts)", r"find takes an objective as goal.*Cloze\(facts\)"),
    ("find(model, tok, space, Cloze(facts))", r"find takes a gate as gate, and this is a space: .*Threshold\(space"),
    ("find(tok, model, Threshold(weights, seed=0), Cloze(facts))", "a transformers model is needed"),
    ("find('pocket-bert', tok, Threshold(weights, seed=0), Cloze(facts))", r"load it first: model, tok = load\("),
    ("find(model, tok, Threshold(weights, seed=0), Cloze(facts), steps='ten')",
     "steps must be a whole number of at least 1, got 'ten'"),
    ("split('pocket')", r"split takes facts as facts, and this is the text 'pocket': read them first"),
    ("split(facts, shares=(.7, .2, .1))", r"shares must be a whole number.*, got \(0.7, 0.2, 0.1\)"),
    ("split(facts, shares=(7, -2, 1))", r"shares must be a whole number.*, got \(7, -2, 1\)"),
    ("recipes.lamp(model, tok, 'pocket')", "lamp takes facts as facts"),
    ("Cloze('pocket')", "Cloze takes facts as facts"),
    ("masked(model, 'x')", r"masked takes a mask or scores as mask.*Mask\.load"),
    ("plots.bars(facts)", "bars takes a table as table, and this is facts"),
    ("load(model)", "load takes a text or a path as name, and this is a model: it is loaded already"),
    ("Mask.random(space, 'half')", "density must be a number between 0 and 1, got 'half'"),
    ("Mask.random(space, 50, seed=0)", "density must be a number between 0 and 1, got 50; did you mean 0.5?"),
    ("Mask.random(space, float('nan'), seed=0)", "density must be a number between 0 and 1, got nan"),
    ("Mask.random(space, .5, seed=-1)", "seed must be a whole number between 0 and"),
    ("Mask.random(space, .5, seed=10**20)", "seed must be a whole number between 0 and"),
    ("Mask.of(space, score.magnitude(model, weights))", r"make a mask of them: scores\.top"),
    ("score.magnitude(model, weights).top('half')", "density must be a number between 0 and 1, got 'half'"),
    ("Threshold(weights, sparsity=50)", "sparsity must be a number between 0 and 1, got 50; did you mean 0.5?"),
    ("TopK(weights, .5, every=0)", "every must be a whole number of at least 1, got 0"),
    ("Concrete(weights, temperature=0)", "temperature must be a positive number, got 0"),
    ("HardConcrete(space, seed=-1)", "seed must be a whole number between 0 and"),
    ("HardConcrete(space, gamma=0)", "gamma must be a number below 0, got 0"),
    ("HardConcrete(space, zeta=1)", "zeta must be a number above 1, got 1"),
    ("MLM(['a robin'], batch=-1)", "batch must be a whole number of at least 1, got -1"),
    ("Cloze(facts, batch=True)", "batch must be a whole number of at least 1, got True"),
    ("float('nan') * Density()", "the weight of an objective must be a number, got nan"),
    ("Ramp(0., float('inf'))", "end must be a number, got inf"),
    ("Ramp(0., 1., begin=.5, finish=.2)", "a ramp begins before it finishes"),
    ("Lora(rank=0)", "rank must be a whole number of at least 1"),
    ("Tagger(model, [(['a'], ['X'])], dropout=1)", "dropout must be a number of at least 0 and below 1, got 1"),
    ("compare.agreement(masks, level=2)", "level must be a number above 0 and below 1, got 2"),
    ("compare.agreement(masks, level=float('nan'))", "level must be a number above 0 and below 1, got nan"),
    ("compare.interval([[[.5]]], level=95)", "did you mean 0.95?"),
    ("compare.student_interval([1, 2], level=0)", "level must be a number above 0 and below 1"),
    ("compare.estimate([np.ones((1, 2))], level=0)", "level must be a number above 0 and below 1"),
    ("compare.jaccard(Mask.full(space), by='seed')", "jaccard takes masks as masks, and this is a mask: collect"),
    ("compare.stability({0: score.random(space, 0)}, density=1.5)", "density must be a number between 0 and 1"),
    ("evaluate.perplexity(model, tok, facts)", "perplexity takes .* as texts, and this is facts"),
    ("evaluate.perplexity(model, tok, ['a robin', 3])", "as texts"),
    ("evaluate.perplexity(model, tok, [['a robin']])", "as texts"),
    ("read_facts('pocket', strict='no')", "read_facts takes True or False as strict"),
    ("evaluate.cloze(model, tok, facts, 'x')", "cloze takes a dictionary, each value of it a mask.* as under"),
    ("evaluate.cloze(model, None, facts, None)", "takes a tokenizer as tok, and this is None"),
    ("mask.to(3)", "Mask.to takes a text as kind, and this is the number 3"),
])
def test_another_noun_is_named(world, call, says):
    model, tok, facts, space = world
    names = {n: getattr(subnet_explorer, n) for n in subnet_explorer.__all__}
    import numpy as np
    masks = subnet_explorer.Masks([({"task": "a", "seed": i}, Mask.random(space, .5, i)) for i in range(3)])
    names |= dict(model=model, tok=tok, facts=facts, space=space, masks=masks, mask=Mask.full(space), np=np)
    names["weights"] = Space.of(model, "weight", layers=4)
    with pytest.raises(SubnetError, match=says): eval(call, names)


def test_one_text_is_a_text(world):
    model, tok, _, space = world
    evaluate, text = subnet_explorer.evaluate, "a robin is a kind of bird ."
    assert evaluate.perplexity(model, tok, text) == evaluate.perplexity(model, tok, [text])
    assert len(evaluate.text_nll(model, tok, text)) == 1
    for goal in (MLM, subnet_explorer.Hidden): assert goal(text).texts == [text]
    assert subnet_explorer.Maintain(text).what == [text]
    held = [evaluate.HeldOut(model, tok, MLM(t))() for t in (text, [text])]
    assert held[0] == held[1]
    lost = evaluate.removal(model, tok, Mask.full(space), {"text": text})
    assert len(lost) == 1 and lost.under.tolist() == ["subnetwork"]
    maps = subnet_explorer.represent.attention_maps(model, tok, text)
    assert len(maps) == 1


def test_one_name_is_a_name():
    from subnet_explorer.measure.metrics import attachment
    gold = [([0, 1, 1], ["root", "p", "punct"])]
    wrong = [([0, 3, 1], ["root", "p", "punct"])]
    assert attachment(gold, wrong, without="punct") == attachment(gold, wrong, without=["punct"])
    assert attachment(gold, wrong, without="punct") != attachment(gold, wrong, without=["punct", "p"])


def test_one_mask_is_a_condition(world):
    model, tok, facts, space = world
    mask, cloze = Mask.random(space, .5, 0), subnet_explorer.evaluate.cloze
    pd.testing.assert_frame_equal(cloze(model, tok, facts, mask), cloze(model, tok, facts, {"subnetwork": mask}))
    assert set(cloze(model, tok, facts, None).under) == {"full"}


def test_what_fits_is_handed_on(world):
    _, _, facts, space = world
    assert isinstance(Cloze(facts).facts, Facts) and Cloze(facts).facts is facts
    for density in (1, 0, .5, pd.Series([.5]).iloc[0]): assert Mask.random(space, density, 0).space is space
