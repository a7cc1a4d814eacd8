"The explorer's state without a browser, its face without a front end, and what both write."
from __future__ import annotations

import asyncio
import base64
import html
import json
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from subnet_explorer import (
    Mask,
    Masks,
    Scores,
    Space,
    SpaceMismatch,
    SubnetError,
    compare,
    compare_view,
    evaluate,
    explore,
    load,
    masked,
    pieces,
    plots,
    read_facts,
    show,
    split,
    watch,
)
from subnet_explorer.core.space import unit_space
from subnet_explorer.look.explorer import Explorer
from subnet_explorer.look.state import in_memory, unit_at
from subnet_explorer.look.tabs import TABS, WITH_MODEL

UNITS = unit_space(4, 4, mlps=True)
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"
ROBIN = "a robin is a kind of [MASK] ."
HOUSE = "the old dog and the young cat sleep in the house ."


def many(n_seeds=3, space=UNITS, tasks=("RTE", "CoLA")):
    "Random masks, labelled as if they were found for some tasks from several seeds."
    rows = []
    for i, task in enumerate(tasks):
        for seed in range(n_seeds):
            mask = Mask.random(space, .75, seed=10 * i + seed)
            rows.append((dict(method="iterate", task=task, seed=seed), mask))
    return Masks(rows)


def read_so_far(e):
    "How many masks of an explorer have been read from their files."
    return sum(in_memory(e.masks, i) is not None for i in range(len(e.masks)))


def send(p, key, at):
    "Press a key on the heat-map, as a browser would."
    p["board"]._handle_custom_msg({"key": key, "cursor": at}, [])


def wait_for(box, text):
    "Wait until a widget says something."
    until = time.time() + 20
    while text not in box.value and time.time() < until: time.sleep(.02)


@pytest.fixture(scope="module")
def model(): return load("pocket-bert")


@pytest.fixture(scope="module")
def facts(): return split(read_facts("pocket", "IsA,PartOf")).test


@pytest.fixture
def alive(model, facts): return explore(many(space=Space.of(model[0], "head+mlp")), model, facts, batch=24)


# ── state ────────────────────────────────────────────────────────────────────────────────────────────────────────────

STEPS = st.one_of(
    st.tuples(st.just("toggle"), st.integers(1, 4), st.sampled_from([1, 2, 3, 4, "mlp"])),
    st.tuples(st.just("focus"), st.integers(0, 5)),
    st.tuples(st.just("undo")),
)


@given(st.lists(STEPS, max_size=30))
@settings(max_examples=40, deadline=None)
def test_edits_and_undo_against_a_plain_model(steps):
    masks = many()
    e, at, past = Explorer(masks), 0, []
    bits = {g.name: b for g, b in masks[0].items()}
    for what, *args in steps:
        getattr(e, what)(*args)
        if what == "undo":
            if past: at, bits = past.pop()
            continue
        past.append((at, {k: v.copy() for k, v in bits.items()}))
        if what == "focus":
            at = args[0]
            bits = {g.name: b for g, b in masks[at].items()}
            continue
        layer, unit = args
        if unit == "mlp": bits[f"layer.{layer - 1}.mlp"][0] ^= True
        else: bits[f"layer.{layer - 1}.head"][unit - 1] ^= True
    assert e.at == at and e.mask == Mask.of(UNITS, bits)
    assert e.edits == (e.mask ^ masks[at]).count and isinstance(e.mask, Mask)
    for _ in past: e.undo()
    assert e.mask == masks[0] and e.at == 0


MOVES = {"ArrowUp": (-1, 0), "ArrowDown": (1, 0), "ArrowLeft": (0, -1), "ArrowRight": (0, 1)}


@given(st.lists(st.sampled_from([*MOVES, " ", "Enter", "z"]), max_size=40))
@settings(max_examples=40, deadline=None)
def test_keys_do_what_methods_do(keys):
    by_key, by_method, (row, column) = Explorer(many()), Explorer(many()), (1, 1)
    for key in keys:
        by_key.press(key)
        if key in (" ", "Enter"): by_method.toggle(row, column if column < 5 else "mlp")
        elif key == "z": by_method.undo()
        else:
            down, right = MOVES[key]
            row, column = int(np.clip(row + down, 1, 4)), int(np.clip(column + right, 1, 5))
    assert by_key.mask == by_method.mask and by_key.cursor == (row, column)


def test_filters():
    e = Explorer(many())
    assert e.axes == {"method": ["iterate"], "task": ["RTE", "CoLA"], "seed": [0, 1, 2]}
    assert e.select(task="CoLA", seed=[1, 2]).shown == [4, 5]
    assert e.select(task=None).shown == [1, 2, 4, 5]
    low, high = min(e.densities), max(e.densities)
    assert e.select(seed=None, density=(low, high)).shown == list(range(6))
    assert e.select(density=(0, .1)).shown == []
    with pytest.raises(SubnetError, match="no mask passes the filters"): e.colour("survival").figure()
    with pytest.raises(SubnetError, match="unknown heat-map"): e.colour("red")


@pytest.mark.parametrize("bad, message", [
    (dict(step=3), "unknown axis"), (dict(task="rte"), "RTE"),
    (dict(density=.5), "lowest and highest"), (dict(density=(.5, .2)), "lowest and highest"),
], ids=["axis", "value", "one number", "wrong way round"])
def test_filters_are_checked(bad, message):
    e = Explorer(many()).select(task="CoLA")
    with pytest.raises(SubnetError, match=message): e.select(**bad)
    assert e.filters == {"task": ["CoLA"]}


def test_masks_in_files_are_read_when_needed(tmp_path):
    for labels, m in many(): m.save(tmp_path / f"{labels['task']}-{labels['seed']}.mask.safetensors")
    e = Explorer(tmp_path)
    assert len(e.masks) == 6 and read_so_far(e) == 1 and np.isnan(e.densities).sum() == 5
    e.focus(3)
    assert read_so_far(e) == 2
    with pytest.raises(SubnetError, match="have not been read"): e.select(density=(0, 1))
    steps = list(e.work("densities"))
    assert steps and steps[-1] == (6, 6) and read_so_far(e) == 6
    assert e.select(density=(0, 1)).shown == list(range(6))
    Mask.full(unit_space(4, 2)).save(tmp_path / "other.mask.safetensors")
    other = Explorer(tmp_path)
    with pytest.raises(SpaceMismatch): [other.focus(i) for i in range(7)]


def test_names_and_files(tmp_path):
    edited = tmp_path / "edited"
    e = Explorer(many(), to=edited)
    path = e.toggle(1, 1).name("no first head")
    assert path.name == "no first head.mask.safetensors" and Mask.load(path) == e.mask
    assert Mask.load(path).meta["operation"] == "edited by hand"
    assert e.label(e.at) == "method=iterate, task=RTE, seed=0, name=no first head"
    assert e.edits == 0 and len(e.masks) == 7
    assert e.axes["seed"] == [0, 1, 2] and e.select(seed=1).shown == [1, 4]      # labels keep their type
    with pytest.raises(SubnetError, match="already"): e.name("no first head")
    for bad in ("", "../up", "a/b", ".."):
        with pytest.raises(SubnetError, match="name of a file"): e.name(bad)
    assert [p.name for p in edited.iterdir()] == [path.name] and list(tmp_path.iterdir()) == [edited]
    reopened = Explorer(edited)
    assert reopened.mask == e.mask and reopened.label(0) == "name=no first head"
    with pytest.raises(SubnetError, match="exists already"): Explorer(many(), to=edited).name("no first head")
    assert Explorer(many()).name("only here") is None


def test_tabs_say_what_others_compute():
    masks = many(4)
    e = Explorer(masks).focus(2)
    t = e.table("overlap")
    assert sorted(t.position) == [i for i in range(8) if i != 2]
    for r in t.itertuples():
        assert r.distance == pytest.approx(compare.jaccard_distance(masks[2], masks[r.position]))
        assert r.chance == pytest.approx(compare.jaccard_chance(masks[2], masks[r.position]))
        assert r.shared == (masks[2] & masks[r.position]).count
    a = e.table("agreement")
    want = compare.consensus(masks, "head", by="task", samples=300)
    assert a[a.kind == "head"].kappa.tolist() == pytest.approx(want.kappa.tolist())
    assert a[a.kind == "mlp"].notes.map(bool).all()
    p = e.table("profile")
    in_hand = p[(p.under == "mask in hand") & (p.part == "head")]
    assert in_hand.density.tolist() == [masks[2][f"layer.{i}.head"].mean() for i in range(4)]
    first = e.toggle(1, 1).table("overlap").iloc[0]
    assert "before edits" in first.label
    assert first.distance == pytest.approx(compare.jaccard_distance(e.mask, masks[2]))


def test_tabs_say_what_they_need():
    e = Explorer(many())
    for tab in WITH_MODEL:
        with pytest.raises(SubnetError, match=r"needs the model: explore\(masks, model=load"): e.table(tab)
    with pytest.raises(SubnetError, match="unknown tab"): e.table("weather")
    alone = Explorer(many()[0])
    with pytest.raises(SubnetError, match="no other mask"): alone.table("overlap")
    with pytest.raises(SubnetError, match=r"labels? that tells? masks apart"): alone.table("agreement")


def test_what_a_model_says(model, facts):
    net, tok = model
    space = Space.of(net, "head+mlp")
    before = {n: p.clone() for n, p in net.named_parameters()}
    implementation = net.config._attn_implementation
    e = Explorer(many(space=space), model, facts, batch=16)
    with masked(net, e.mask): ranks = evaluate.cloze(net, tok, e.facts, {"x": None})["rank"]
    assert len(e.facts) == 16
    assert e.scores().loc["subnetwork", "top1"] == pytest.approx(float(np.mean(ranks == 1)))
    asked = e.ask(prompt=ROBIN).table("predictions")
    with masked(net, ~e.mask): there = evaluate.predictions(net, tok, e.prompt)
    assert asked[asked.under == "complement"].token.tolist() == there.token.tolist()
    assert e.table("map").groupby("under").size().tolist() == [16, 16]
    assert e.pick("IsA").picked == tuple(i for i, f in enumerate(e.facts) if f.relation == "IsA")
    assert {t.name for t in e.figure("map").plotly.data} == {"IsA", "not picked"}
    looked = e.ask(sentence="a robin is a kind of bird .").figure("attention").data
    assert set(looked.condition) == {"full", "subnetwork"}
    shares = e.ask(sentence=HOUSE).table("patterns")
    assert shares.groupby("under").share.sum().tolist() == pytest.approx([1, 1])
    for name, p in net.named_parameters(): assert bool((p == before[name]).all()), name
    assert net.config._attn_implementation == implementation
    with pytest.raises(SubnetError, match="found 0 "): e.ask(prompt="nothing here").table("predictions")
    with pytest.raises(SubnetError, match="type a sentence"): e.ask(sentence=" ").table("attention")
    with pytest.raises(SubnetError, match="needs facts"): Explorer(many(space=space), model).table("map")


def test_causal_models_too():
    model, tok = load("pocket-gpt2")
    e = Explorer(many(space=Space.of(model, "head+mlp")), (model, tok))
    e.ask("a robin is a kind of [MASK]", "a robin is a kind of bird")
    assert len(e.table("predictions")) == 15 and e.figure("attention").alt


def test_a_head_is_measured_on_labelled_data(model):
    from subnet_explorer import Labelled, head_for
    from subnet_explorer.data.tables import LabelTask
    net, tok = model
    words = ["robin", "wheel", "dog", "house", "cat", "tree"]
    rows = tuple(dict(sentence=f"a {w} is here .", label=str(i % 2)) for i, w in enumerate(words))
    data = Labelled(rows, LabelTask("toy", labels=("0", "1")))
    head = head_for(net, data)
    scores = Explorer(Mask.full(Space.of(net, "head+mlp")), model, data, head=head).scores()
    want = evaluate.task_scores(net, tok, head, data)["score"]
    assert scores.loc["full", "score"] == scores.loc["subnetwork", "score"] == want


# ── bad inputs ───────────────────────────────────────────────────────────────────────────────────────────────────────

TWO_SPACES = Masks([(dict(name="a"), Mask.full(UNITS)), (dict(name="b"), Mask.full(unit_space(3, 4)))])


@pytest.mark.parametrize("given, message", [
    (Masks([]), "no mask to explore"), ({}, "no mask to explore"), (7, "cannot explore a int"),
    ("/nowhere/at/all", "there is no folder"), (TWO_SPACES, "different"),
], ids=["empty", "nothing", "number", "no folder", "two spaces"])
def test_what_cannot_be_explored(given, message):
    with pytest.raises(SubnetError, match=message): explore(given)


def test_what_does_not_belong_together(model, facts):
    net, _ = model
    own = Mask.full(Space.of(net, "head"))
    nothing = facts["IsA"].__class__((), "none")
    with pytest.raises(SpaceMismatch, match="another model"): explore(many(), model)
    with pytest.raises(SubnetError, match=r"model=\(model, tok\)"): explore(own, net)
    with pytest.raises(SubnetError, match="trained head"): explore(own, model, [dict(sentence="x", label="1")])
    with pytest.raises(SubnetError, match="is empty"): explore(own, model, nothing)
    with pytest.raises(SubnetError, match="needs data"): explore(own, model).scores()
    with pytest.raises(SubnetError, match="heads 1 to 4"): explore(own).toggle(1, 5)
    with pytest.raises(SubnetError, match="there is no mlp in layer 1"): explore(own).toggle(1, "mlp")
    with pytest.raises(SubnetError, match="there is no mask 3"): explore(own).focus(3)
    with pytest.raises(SubnetError, match="there is no fact"): explore(own, model, facts).pick([10**6])


def test_weights_are_shown_by_matrix_and_say_why_they_cannot_be_switched(model):
    space = Space.of(model[0], "weight")
    ui = explore({"a": Mask.random(space, .5, seed=0), "b": Mask.random(space, .25, seed=1)}, model)
    parts = ui.widget.parts
    grid = parts["board"].grid
    assert grid["columns"][:4] == ["query", "key", "value", "attention out"]
    assert abs(grid["values"][0][0] - .5) < 1e-3
    send(parts, " ", [1, 1])
    assert "Translate it first" in parts["message"].value and ui.edits == 0
    masks = [m for _, m in ui.masks]
    assert ui.table("overlap").distance[0] == pytest.approx(compare.jaccard_distance(*masks))
    assert unit_at(ui, 1, 1) is None and unit_at(ui.focus(1), 1, 1) is None


# ── the face ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_controls_that_edit(alive, tmp_path):
    alive.to = tmp_path
    p = alive.widget.parts
    assert len(p["list"].options) == 6
    assert "full" in p["scores"].value and "complement" in p["answers"].value
    send(p, " ", [3, 5])
    assert alive.edits == 1 and p["board"].grid["edited"][2][4] and "edited" in p["board"].grid["notes"][2][4]
    send(p, "z", [3, 5])
    assert alive.edits == 0 and not np.any(p["board"].grid["edited"])
    send(p, "Enter", [1, 1])
    send(p, "s mine", [1, 1])
    assert (tmp_path / "mine.mask.safetensors").exists() and p["list"].value == 6
    assert "saved" in p["message"].value and "bytes" in p["message"].value
    p["layer"].value, p["unit"].value, here = 2, "mlp", alive.mask
    p["switch"].click()
    assert (alive.mask ^ here).table().query("kept > 0").name.tolist() == ["layer.1.mlp"]
    p["undo"].click()
    assert alive.mask == here


def test_odd_messages_of_a_browser_do_no_harm(alive, tmp_path):
    alive.to = tmp_path / "kept"
    p = alive.widget.parts
    odd = [{"key": "q"}, {"key": 3}, {"key": " ", "cursor": [99, -7]}, {"key": " ", "cursor": "x"}, [], None]
    for message in [*odd, {"key": "s ../x"}]: p["board"]._handle_custom_msg(message, [])
    assert "name of a file" in p["message"].value and not list(tmp_path.glob("x*")) and alive.cursor == (4, 1)


def test_controls_that_filter(alive):
    alive.name("mine")
    p = alive.widget.parts
    task, low = (next(f for f in p["filters"].children if f.description == d) for d in ("task", "density ≥"))
    task.value = "CoLA"
    assert [i for _, i in p["list"].options] == [3, 4, 5] and "<b>3</b> of 7" in p["count"].value
    low.value = .99
    assert alive.shown == [] and alive.filters["density"] == [.99, 1]
    low.value = 0
    assert alive.shown == [3, 4, 5] and "density" not in alive.filters
    p["list"].value = 5
    assert alive.at == 5 and "seed=2" in p["status"].value
    p["shade"].value = "survival"
    assert "share of 3 masks" in p["board"].grid["label"]


def test_only_the_open_tab_is_computed(alive):
    p = alive.widget.parts
    assert "map" not in alive.memory and "patterns" not in alive.memory and "overlap" in alive.memory
    for i, tab in enumerate(TABS):
        p["tabs"].selected_index = i
        assert tab in alive.memory, tab
    assert "<iframe" in p["tab attention"].value and "κ" in p["tab agreement"].value
    assert "chance" in p["tab overlap"].value
    points = p["points"]
    assert [q["name"] for q in points.points["panels"]] == ["full", "subnetwork"]
    assert len(points.points["texts"]) == 24
    p["tabs"].selected_index = 3
    points.picked = [0, 3]
    assert alive.picked == (0, 3) and "2 picked" in p["picked"].value
    alive.pick("IsA")
    assert list(points.picked) == list(alive.picked)


def test_without_a_model_tabs_say_what_to_pass():
    p = explore(many()).widget.parts
    for i, tab in enumerate(TABS):
        p["tabs"].selected_index = i
        assert ("explore(masks, model=load(" in p[f"tab {tab}"].value) == (i > 2)
    assert p["message"].value == "" and p["scores"].value == ""


def test_long_work_makes_way_and_stops(tmp_path):
    from subnet_explorer.look.app import _start
    for i in range(12): Mask.random(UNITS, .5, seed=i).save(tmp_path / f"{i:02d}.mask.safetensors")
    ui = explore(tmp_path)
    async def session():
        p = ui.widget.parts
        ui.stop()
        assert read_so_far(ui) <= 3
        _start(ui, [("densities", lambda _: None)])
        for _ in range(3): await asyncio.sleep(.002)
        assert (p["busy"].layout.display, p["progress"].max) == (None, 12)
        p["stop"].click()
        n = read_so_far(ui)
        for _ in range(5): await asyncio.sleep(.002)
        assert n < 12 and read_so_far(ui) == n
        assert "stopped" in p["message"].value and p["busy"].layout.display == "none"
    asyncio.run(session())


def test_without_anywidget_everything_is_still_reachable(alive, monkeypatch):
    from subnet_explorer.look import app, views
    for module in (app, views): monkeypatch.setattr(module, "living", lambda name: None)
    p = alive.widget.parts
    assert "<table" in p["board"].value and "layer 1" in p["board"].value
    here = p["board"].value
    p["switch"].click()
    assert alive.edits == 1 and p["board"].value != here
    p["tabs"].selected_index = 3
    assert "<svg" in p["points"].value
    assert "<table" in show(alive.mask).widget.value


def test_text_stays_text_in_the_app(model, tmp_path, facts):
    space = Space.of(model[0], "head+mlp")
    rows = [({EVIL: EVIL + str(seed), "seed": seed}, Mask.random(space, .75, seed=seed)) for seed in range(3)]
    ui = explore(Masks(rows), model, facts, batch=8)
    ui.ask(prompt=f"{EVIL} is a kind of [MASK] .", sentence=f"{EVIL} is a kind of [MASK] .")
    p = ui.widget.parts
    for i in range(len(TABS)): p["tabs"].selected_index = i
    with pytest.raises(SubnetError, match="name of a file"): ui.name(EVIL)
    texts = {name: w.value for name, w in p.items() if type(w).__name__ == "HTML"}
    assert "complement" in texts["tab predictions"]
    for name, text in texts.items(): assert "<script>alert" not in text and "<img" not in text, name
    page = ui.save(tmp_path / "state.html").read_text()
    assert "<script>alert" not in page and "<img src=x" not in page and "&lt;script&gt;alert" in page


def test_text_stays_text_in_pieces(model, tmp_path):
    a, b = (Mask.random(Space.of(model[0], "head+mlp"), .75, seed=seed) for seed in range(2))
    pair = compare_view(a, b, (EVIL, "b"))
    asked = pieces.predictions(*model, f"{EVIL} is [MASK] .", a)
    looked = pieces.attention(*model, f"{EVIL} is [MASK] .", a)
    for i, piece in enumerate((pair, asked, looked)):
        assert "<script>alert" not in piece.save(tmp_path / f"{i}.html").read_text()
    assert "<script>" not in "".join(w.value for w in walk(pair.widget) if type(w).__name__ == "HTML")
    for name in ("board.js", "points.js"):
        assert "innerHTML" not in (files("subnet_explorer") / "static" / name).read_text()


def walk(w):
    "A widget and all that it holds."
    yield w
    for child in getattr(w, "children", ()): yield from walk(child)


# ── still pictures ───────────────────────────────────────────────────────────────────────────────────────────────────

def test_every_view_has_a_still_twin(alive, tmp_path):
    alive.toggle(1, 1).ask(sentence=HOUSE)
    for tab in (None, *TABS):
        figure = alive.figure(tab)
        assert len(figure.data) and len(figure.alt) > 20, tab
        assert ET.parse(figure.save(tmp_path / f"{tab}.svg")).getroot().tag.endswith("svg")
    assert alive.save(tmp_path / "h.png").stat().st_size > 2000
    assert alive.save(tmp_path / "h.pdf").read_bytes()[:4] == b"%PDF"
    assert "1 edit" in alive.figure().alt and "Survival" in alive.colour("survival").figure().alt
    page = alive.save(tmp_path / "all.html").read_text()
    assert all(f"<h2>{t}</h2>" in page for t in TABS.values()) and "src=\"http" not in page
    with pytest.raises(SubnetError, match="cannot save"): alive.save(tmp_path / "x.bmp")


def test_pieces(model, tmp_path):
    space = Space.of(model[0], "head+mlp")
    a, b = Mask.random(space, .75, seed=0), Mask.random(space, .5, seed=1)
    pair = compare_view(a, b)
    assert set(pair.data["mask"]) == {"a", "b", "kept by both"}
    assert f"{compare.jaccard_distance(a, b):.3f}" in pair.alt
    scores = Scores(space, {g.name: np.linspace(-3, 5, g.size) for g in space.groups})
    asked = pieces.predictions(*model, ROBIN, {"all": None, "b": b})
    for piece in (show(a), show(scores), pair, asked, pieces.attention(*model, ROBIN, a)):
        assert piece.widget is piece.widget and len(piece.data) and piece.alt and "Piece" in repr(piece)
        for kind in ("html", "svg"): assert piece.save(tmp_path / f"p.{kind}").stat().st_size > 1000
    with pytest.raises(SpaceMismatch): compare_view(a, Mask.full(UNITS))
    with pytest.raises(SubnetError, match="show takes a mask or scores as mask"): show([a])


def test_an_attention_page_of_forty_tokens_is_small(tmp_path):
    rng = np.random.default_rng(0)
    tokens = [f"token{i}" for i in range(40)]
    maps = {n: (rng.dirichlet(np.full(40, .3), (12, 12, 40)), tokens) for n in ("full", "subnetwork")}
    assert plots.attention_pair(maps).save(tmp_path / "a.html").stat().st_size < 1_500_000


def test_attention_values_survive_packing():
    rng = np.random.default_rng(1)
    maps = rng.dirichlet(np.ones(5), (2, 3, 5)) * 2                          # normed maps may exceed one
    inner = html.unescape(plots.attention(maps, list("abcde"), layers=[2]).html)
    (code, shape, top), = re.findall(r'unpacked\("([^"]*)", (\[[^\]]*\]), ([0-9.]+)\)', inner)
    back = np.frombuffer(base64.b64decode(code), np.uint8).reshape(json.loads(shape)) * float(top) / 255
    assert np.abs(back - maps[1:]).max() <= float(top) / 255 / 2 + 1e-6


# ── watching ─────────────────────────────────────────────────────────────────────────────────────────────────────────

SEARCH = """
import sys, time
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.space import unit_space
from subnet_explorer.core.run import Run
run = Run(sys.argv[1], {"steps": 6})
for step in (2, 4, 6):
    run.log(step=step, loss=1 / step, density=.5, score=step / 10)
    time.sleep(.2)
run.finish(Mask.full(unit_space(2, 2)))
"""


def test_watch_follows_another_process(tmp_path):
    w = watch(tmp_path / "run", every=.05)
    box, seen = w.widget, []
    box.observe(lambda change: seen.append(change["new"]), "value")
    assert "waiting" in box.value
    call = [sys.executable, "-c", SEARCH, str(tmp_path / "run")]
    run = subprocess.run(call, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    wait_for(box, "done")
    assert "done, step 6" in box.value and box.value.count("<polyline") == 3
    assert any("running" in v for v in seen)
    assert {"loss", "density", "score"} == set(w.figure.data.metric)
    assert w.save(tmp_path / "w.svg").exists() and w.refresh()
    with pytest.raises(SubnetError, match="seconds above 0"): watch(tmp_path, every=0)


def test_watch_follows_a_busy_cell(model, tmp_path):
    from subnet_explorer import Cloze, Threshold, find
    w = watch(tmp_path / "run", every=.02)
    box = w.widget
    gate, goal = Threshold(Space.of(model[0], "weight", layers=4)), Cloze(read_facts("pocket", "MadeOf"))
    run = find(*model, gate, goal, steps=4, every=2, to=tmp_path / "run", progress=False)
    wait_for(box, "done")
    assert "done, step 4" in box.value and {"loss", "density"} <= set(w.figure.data.metric)
    assert list(w.metrics.step) == run.metrics.step.tolist() == watch(run).metrics.step.tolist()


def test_watch_stops_when_told(tmp_path):
    written = '{"step": 1, "loss": 2.0, "density": 0.5, "score": null}\n{"step": 2, "lo'      # a line is being written
    (tmp_path / "metrics.jsonl").write_text(written)
    w = watch(tmp_path, every=.01)
    box = w.widget
    w.stop()
    assert w.widget is box and "running, step 1" in box.value and "score" not in box.value
    none = watch(tmp_path / "none")
    with pytest.raises(SubnetError, match="nothing was logged"): none.save(tmp_path / "none.svg")


# ── without torch ────────────────────────────────────────────────────────────────────────────────────────────────────

WITHOUT_TORCH = """
import sys
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.masks import Masks
from subnet_explorer.core.space import unit_space
from subnet_explorer.look.app import explore
space = unit_space(4, 4, mlps=True)
labels = [dict(task=t, seed=s) for t in "ab" for s in range(3)]
ui = explore(Masks([(found, Mask.random(space, .7, seed=i)) for i, found in enumerate(labels)]))
p = ui.widget.parts
for i in range(7): p["tabs"].selected_index = i
ui.toggle(1, 1).colour("survival")
ui.save(sys.argv[1])
sys.exit(", ".join({"torch", "transformers", "datasets"} & set(sys.modules)) or 0)
"""


def test_masks_are_explored_without_torch(tmp_path):
    call = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path / "x.html")]
    run = subprocess.run(call, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
