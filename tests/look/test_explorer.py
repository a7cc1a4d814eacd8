"The explorer's state without a browser, its face without a front end, and what both write."
from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subnet_explorer import Mask, Masks, Scores, Space, SpaceMismatch, SubnetError, compare, compare_view, evaluate, explore, load, masked, pieces, plots, read_facts, show, split, watch
from subnet_explorer.look.state import TABS, Explorer, unit_at
from subnet_explorer.core.space import unit_space

UNITS = unit_space(4, 4, mlps=True)
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def many(n_seeds=3, space=UNITS, tasks=("RTE", "CoLA")):
    return Masks([(dict(method="iterate", task=t, seed=s), Mask.random(space, .75, seed=10 * i + s)) for i, t in enumerate(tasks) for s in range(n_seeds)])


@pytest.fixture(scope="module")
def model(): return load("pocket-bert")


@pytest.fixture(scope="module")
def facts(): return split(read_facts("pocket", "IsA,PartOf")).test


@pytest.fixture
def alive(model, facts): return explore(many(space=Space.of(model[0], "head+mlp")), model, facts, batch=24)


# ── state ────────────────────────────────────────────────────────────────────────────────────────────────────────────

@given(st.lists(st.one_of(st.tuples(st.just("toggle"), st.integers(1, 4), st.sampled_from([1, 2, 3, 4, "mlp"])), st.tuples(st.just("focus"), st.integers(0, 5)), st.tuples(st.just("undo"))), max_size=30))
@settings(max_examples=40, deadline=None)
def test_edits_and_undo_against_a_plain_model(steps):
    masks = many()
    e, at, bits, past = Explorer(masks), 0, {g.name: b for g, b in masks[0].items()}, []
    for what, *args in steps:
        getattr(e, what)(*args)
        if what == "undo":
            if past: at, bits = past.pop()
            continue
        past.append((at, {k: v.copy() for k, v in bits.items()}))
        if what == "focus": at, bits = args[0], {g.name: b for g, b in masks[args[0]].items()}
        else: bits[f"layer.{args[0] - 1}.{'mlp' if args[1] == 'mlp' else 'head'}"][0 if args[1] == "mlp" else args[1] - 1] ^= True
    assert e.at == at and e.mask == Mask.of(UNITS, bits)
    assert e.edits == (e.mask ^ masks[at]).count and isinstance(e.mask, Mask)
    for _ in past: e.undo()
    assert e.mask == masks[0] and e.at == 0


@given(st.lists(st.sampled_from(["ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight", " ", "Enter", "z"]), max_size=40))
@settings(max_examples=40, deadline=None)
def test_keys_do_what_methods_do(keys):
    by_key, by_method, (row, column) = Explorer(many()), Explorer(many()), (1, 1)
    for key in keys:
        by_key.press(key)
        if key in (" ", "Enter"): by_method.toggle(row, column if column < 5 else "mlp")
        elif key == "z": by_method.undo()
        else: row, column = (int(np.clip(v, 1, n)) for v, n in zip((row + (key == "ArrowDown") - (key == "ArrowUp"), column + (key == "ArrowRight") - (key == "ArrowLeft")), (4, 5)))
    assert by_key.mask == by_method.mask and by_key.cursor == (row, column)


def test_filters():
    e = Explorer(many())
    assert e.axes == {"method": ["iterate"], "task": ["RTE", "CoLA"], "seed": [0, 1, 2]}
    assert e.select(task="CoLA", seed=[1, 2]).shown == [4, 5] and e.select(task=None).shown == [1, 2, 4, 5]
    low, high = sorted({*e.densities})[0], max(e.densities)
    assert e.select(seed=None, density=(low, high)).shown == list(range(6)) and e.select(density=(0, .1)).shown == []
    with pytest.raises(SubnetError, match="no mask passes the filters"): e.colour("survival").figure()
    for bad, message in ((dict(step=3), "unknown axis"), (dict(task="rte"), "RTE"), (dict(density=.5), "lowest and highest"), (dict(density=(.5, .2)), "lowest and highest")):
        with pytest.raises(SubnetError, match=message): e.select(**bad)
    with pytest.raises(SubnetError, match="unknown heat-map"): e.colour("red")


def test_masks_in_files_are_read_when_needed(tmp_path):
    for labels, m in many(): m.save(tmp_path / f"{labels['task']}-{labels['seed']}.mask.safetensors")
    e = Explorer(tmp_path)
    read = lambda: sum(isinstance(m, Mask) for m in e.masks._items)
    assert len(e.masks) == 6 and read() == 1 and np.isnan(e.densities).sum() == 5
    e.focus(3); assert read() == 2
    with pytest.raises(SubnetError, match="have not been read"): e.select(density=(0, 1))
    steps = list(e.work("densities")); assert steps and steps[-1] == (6, 6) and read() == 6
    assert e.select(density=(0, 1)).shown == list(range(6))
    Mask.full(unit_space(4, 2)).save(tmp_path / "other.mask.safetensors")
    other = Explorer(tmp_path)
    with pytest.raises(SpaceMismatch): [other.focus(i) for i in range(7)]


def test_names_and_files(tmp_path):
    e = Explorer(many(), to=tmp_path / "edited")
    path = e.toggle(1, 1).name("no first head")
    assert path.name == "no first head.mask.safetensors" and Mask.load(path) == e.mask and Mask.load(path).meta["operation"] == "edited by hand"
    assert e.label(e.at) == "method=iterate, task=RTE, seed=0, name=no first head" and e.edits == 0 and len(e.masks) == 7
    assert e.axes["seed"] == [0, 1, 2] and e.select(seed=1).shown == [1, 4]                         # labels keep their type
    for bad, message in (("no first head", "already"), ("", "name of a file"), ("../up", "name of a file"), ("a/b", "name of a file"), ("..", "name of a file")):
        with pytest.raises(SubnetError, match=message): e.name(bad)
    assert [p.name for p in (tmp_path / "edited").iterdir()] == [path.name] and list(tmp_path.iterdir()) == [tmp_path / "edited"]
    again = Explorer(tmp_path / "edited"); assert again.mask == e.mask and again.label(0) == "name=no first head"
    with pytest.raises(SubnetError, match="exists already"): Explorer(many(), to=tmp_path / "edited").name("no first head")
    assert Explorer(many()).name("only here") is None


def test_tabs_say_what_others_compute():
    masks = many(4)
    e = Explorer(masks).focus(2)
    t = e.table("overlap")
    assert sorted(t.position) == [i for i in range(8) if i != 2]
    for r in t.itertuples():
        assert r.distance == pytest.approx(compare.jaccard_distance(masks[2], masks[r.position])) and r.chance == pytest.approx(compare.jaccard_chance(masks[2], masks[r.position])) and r.shared == (masks[2] & masks[r.position]).count
    a = e.table("agreement")
    want = compare.consensus(masks, "head", by="task", samples=300)
    assert a[a.kind == "head"].kappa.tolist() == pytest.approx(want.kappa.tolist()) and a[a.kind == "mlp"].notes.map(bool).all()
    p = e.table("profile")
    assert p[(p.under == "mask in hand") & (p.part == "head")].density.tolist() == [masks[2][f"layer.{i}.head"].mean() for i in range(4)]
    e.toggle(1, 1)
    assert "before edits" in e.table("overlap").label[0] and e.table("overlap").distance[0] == pytest.approx(compare.jaccard_distance(e.mask, masks[2]))
    for tab in list(TABS)[3:]:
        with pytest.raises(SubnetError, match=r"needs the model: explore\(masks, model=load"): e.table(tab)
    with pytest.raises(SubnetError, match="unknown tab"): e.table("weather")
    with pytest.raises(SubnetError, match="no other mask"): Explorer(masks[0]).table("overlap")
    with pytest.raises(SubnetError, match="labels? that tells? masks apart"): Explorer(masks[0]).table("agreement")


def test_what_a_model_says(model, facts):
    net, tok = model
    space = Space.of(net, "head+mlp")
    before, implementation = {n: p.clone() for n, p in net.named_parameters()}, net.config._attn_implementation
    e = Explorer(many(space=space), model, facts, batch=16)
    with masked(net, e.mask): top = float(np.mean(evaluate.cloze(net, tok, e.facts, {"x": None})["rank"] == 1))
    assert len(e.facts) == 16 and e.scores().loc["subnetwork", "top1"] == pytest.approx(top)
    asked = e.ask(prompt="a robin is a kind of [MASK] .").table("predictions")
    with masked(net, ~e.mask): there = evaluate.predictions(net, tok, e.prompt)
    assert asked[asked.under == "complement"].token.tolist() == there.token.tolist()
    m = e.table("map")
    assert m.groupby("under").size().tolist() == [16, 16] and e.pick("IsA").picked == tuple(i for i, f in enumerate(e.facts) if f.relation == "IsA")
    assert {t.name for t in e.figure("map").plotly.data} == {"IsA", "not picked"}
    assert set(e.ask(sentence="a robin is a kind of bird .").figure("attention").data.condition) == {"full", "subnetwork"}
    s = e.ask(sentence="the old dog and the young cat sleep in the house .").table("patterns")
    assert s.groupby("under").share.sum().tolist() == pytest.approx([1, 1])
    assert all(torch_equal(p, before[n]) for n, p in net.named_parameters()) and net.config._attn_implementation == implementation
    with pytest.raises(SubnetError, match="found 0 "): e.ask(prompt="nothing here").table("predictions")
    with pytest.raises(SubnetError, match="type a sentence"): e.ask(sentence=" ").table("attention")
    with pytest.raises(SubnetError, match="needs facts"): Explorer(many(space=space), model).table("map")


def torch_equal(a, b): return bool((a == b).all())


def test_causal_models_too():
    model, tok = load("pocket-gpt2")
    e = Explorer(many(space=Space.of(model, "head+mlp")), (model, tok)).ask("a robin is a kind of [MASK]", "a robin is a kind of bird")
    assert len(e.table("predictions")) == 15 and e.figure("attention").alt


def test_a_head_is_measured_on_labelled_data(model):
    from subnet_explorer import Labelled, head_for
    from subnet_explorer.data.tables import LabelTask
    net, tok = model
    rows = tuple(dict(sentence=f"a {w} is here .", label=str(i % 2)) for i, w in enumerate(["robin", "wheel", "dog", "house", "cat", "tree"]))
    data = Labelled(rows, LabelTask("toy", labels=("0", "1")))
    head = head_for(net, data)
    e = Explorer(Mask.full(Space.of(net, "head+mlp")), model, data, head=head)
    assert e.scores().loc["full", "score"] == e.scores().loc["subnetwork", "score"] == evaluate.task_scores(net, tok, head, data)["score"]


# ── bad inputs ───────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("given, message", [
    (Masks([]), "no mask to explore"), ({}, "no mask to explore"), (7, "cannot explore a int"), ("/nowhere/at/all", "no mask to explore"),
    (Masks([(dict(name="a"), Mask.full(UNITS)), (dict(name="b"), Mask.full(unit_space(3, 4)))]), "different"),
], ids=["empty", "nothing", "number", "no folder", "two spaces"])
def test_what_cannot_be_explored(given, message):
    with pytest.raises(SubnetError, match=message): explore(given)


def test_what_does_not_belong_together(model, facts):
    net, tok = model
    own = Mask.full(Space.of(net, "head"))
    with pytest.raises(SpaceMismatch, match="another model"): explore(many(), model)
    with pytest.raises(SubnetError, match=r"model=\(model, tok\)"): explore(own, net)
    with pytest.raises(SubnetError, match="trained head"): explore(own, model, [dict(sentence="x", label="1")])
    with pytest.raises(SubnetError, match="is empty"): explore(own, model, facts["IsA"].__class__((), "none"))
    with pytest.raises(SubnetError, match="needs data"): explore(own, model).scores()
    with pytest.raises(SubnetError, match="heads 1 to 4"): explore(own).toggle(1, 5)
    with pytest.raises(SubnetError, match="there is no mlp in layer 1"): explore(own).toggle(1, "mlp")
    with pytest.raises(SubnetError, match="there is no mask 3"): explore(own).focus(3)
    with pytest.raises(SubnetError, match="there is no fact"): explore(own, model, facts).pick([10**6])


def test_weights_are_shown_by_matrix_and_say_why_they_cannot_be_switched(model):
    space = Space.of(model[0], "weight")
    ui = explore({"a": Mask.random(space, .5, seed=0), "b": Mask.random(space, .25, seed=1)}, model)
    parts = ui.widget.parts
    assert parts["board"].grid["columns"][:4] == ["query", "key", "value", "attention out"] and abs(parts["board"].grid["values"][0][0] - .5) < 1e-3
    parts["board"]._handle_custom_msg({"key": " ", "cursor": [1, 1]}, [])
    assert "Translate it first" in parts["message"].value and ui.edits == 0
    assert ui.table("overlap").distance[0] == pytest.approx(compare.jaccard_distance(*(m for _, m in ui.masks)))
    for _, m in ui.masks: assert unit_at(ui, 1, 1) is None


# ── the face ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_controls(alive, tmp_path):
    alive.to = tmp_path
    p = alive.widget.parts
    press = lambda key, at: p["board"]._handle_custom_msg({"key": key, "cursor": at}, [])
    assert len(p["list"].options) == 6 and "full" in p["scores"].value and "complement" in p["answers"].value
    press(" ", [3, 5]); assert alive.edits == 1 and p["board"].grid["edited"][2][4] and "edited" in p["board"].grid["notes"][2][4]
    press("z", [3, 5]); assert alive.edits == 0 and not np.any(p["board"].grid["edited"])
    press("Enter", [1, 1]); press("s mine", [1, 1])
    assert (tmp_path / "mine.mask.safetensors").exists() and "saved" in p["message"].value and "bytes" in p["message"].value and p["list"].value == 6
    for odd in ({"key": "q"}, {"key": 3}, {"key": " ", "cursor": [99, -7]}, {"key": " ", "cursor": "x"}, [], None, {"key": "s ../x"}): p["board"]._handle_custom_msg(odd, [])
    assert "name of a file" in p["message"].value and not list(tmp_path.parent.glob("x*")) and alive.cursor == (4, 1)
    p["layer"].value, p["unit"].value, here = 2, "mlp", alive.mask
    p["switch"].click(); assert (alive.mask ^ here).table().query("kept > 0").name.tolist() == ["layer.1.mlp"]
    p["undo"].click(); assert alive.mask == here
    task = next(f for f in p["filters"].children if f.description == "task")
    task.value = "CoLA"; assert [i for _, i in p["list"].options] == [3, 4, 5] and "<b>3</b> of 7" in p["count"].value
    low = next(f for f in p["filters"].children if f.description == "density ≥")
    low.value = .99; assert alive.shown == [] and alive.filters["density"] == [.99, 1]
    low.value = 0; assert alive.shown == [3, 4, 5] and "density" not in alive.filters
    p["list"].value = 5; assert alive.at == 5 and "seed=2" in p["status"].value
    p["shade"].value = "survival"; assert "share of 3 masks" in p["board"].grid["label"]


def test_only_the_open_tab_is_computed(alive):
    p = alive.widget.parts
    assert "map" not in alive._known and "patterns" not in alive._known and "overlap" in alive._known
    for i, tab in enumerate(TABS):
        p["tabs"].selected_index = i
        assert tab in alive._known, tab
    assert "<iframe" in p["tab attention"].value and "κ" in p["tab agreement"].value and "chance" in p["tab overlap"].value
    points = p["points"]
    assert [q["name"] for q in points.points["panels"]] == ["full", "subnetwork"] and len(points.points["texts"]) == 24
    p["tabs"].selected_index = 3
    points.picked = [0, 3]; assert alive.picked == (0, 3) and "2 picked" in p["picked"].value
    alive.pick("IsA"); assert list(points.picked) == list(alive.picked)


def test_without_a_model_tabs_say_what_to_pass():
    p = explore(many()).widget.parts
    for i, tab in enumerate(TABS):
        p["tabs"].selected_index = i
        assert ("explore(masks, model=load(" in p[f"tab {tab}"].value) == (i > 2)
    assert p["message"].value == "" and p["scores"].value == ""


def test_long_work_makes_way_and_stops(tmp_path):
    for i in range(12): Mask.random(UNITS, .5, seed=i).save(tmp_path / f"{i:02d}.mask.safetensors")
    ui = explore(tmp_path)
    read = lambda: sum(isinstance(m, Mask) for m in ui.masks._items)
    async def session():
        from subnet_explorer.look.app import _start
        p = ui.widget.parts
        ui.stop()
        before = read()
        _start(ui, [("densities", lambda _: None)])
        for _ in range(3): await asyncio.sleep(.002)
        busy = p["busy"].layout.display, p["progress"].max
        p["stop"].click()
        n = read()
        for _ in range(5): await asyncio.sleep(.002)
        return before, busy, n, read(), p["message"].value, p["busy"].layout.display
    before, busy, n, later, message, display = asyncio.run(session())
    assert before <= 3 and n < 12 and later == n and busy == (None, 12) and "stopped" in message and display == "none"


def test_without_anywidget_everything_is_still_reachable(alive, monkeypatch):
    import subnet_explorer.look.app as widgets
    monkeypatch.setattr(widgets, "living", lambda name: None); monkeypatch.setattr(pieces, "living", lambda name: None)
    p = alive.widget.parts
    assert "<table" in p["board"].value and "layer 1" in p["board"].value
    here = p["board"].value
    p["switch"].click(); assert alive.edits == 1 and p["board"].value != here
    p["tabs"].selected_index = 3; assert "<svg" in p["points"].value
    assert "<table" in show(alive.mask).widget.value


def test_text_stays_text(model, tmp_path, facts):
    space = Space.of(model[0], "head+mlp")
    ui = explore(Masks([({EVIL: EVIL + str(s), "seed": s}, Mask.random(space, .75, seed=s)) for s in range(3)]), model, facts, batch=8)
    ui.ask(prompt=f"{EVIL} is a kind of [MASK] .", sentence=f"{EVIL} is a kind of [MASK] .")
    p = ui.widget.parts
    for i in range(len(TABS)): p["tabs"].selected_index = i
    try: ui.name(EVIL)
    except SubnetError: pass
    shown = {k: w.value for k, w in p.items() if type(w).__name__ == "HTML"}
    assert "complement" in shown["tab predictions"] and not [k for k, v in shown.items() if "<script>alert" in v or "<img" in v]
    page = ui.save(tmp_path / "state.html").read_text()
    assert "<script>alert" not in page and "<img src=x" not in page and "&lt;script&gt;alert" in page
    assert "<script>alert" not in pieces.predictions(*model, f"{EVIL} is [MASK] .", ui.mask).save(tmp_path / "p.html").read_text()
    look = pieces.attention(*model, f"{EVIL} is [MASK] .", ui.mask); assert "<script>alert" not in look.save(tmp_path / "a.html").read_text()
    pair = compare_view(ui.masks[0], ui.masks[1], (EVIL, "b"))
    assert "<script>" not in "".join(w.value for w in walk(pair.widget) if type(w).__name__ == "HTML") and "<script>alert" not in pair.save(tmp_path / "c.html").read_text()
    assert "innerHTML" not in "".join((pieces.files("subnet_explorer") / "static" / f).read_text() for f in ("board.js", "points.js"))


def walk(w):
    yield w
    for c in getattr(w, "children", ()): yield from walk(c)


# ── still pictures ───────────────────────────────────────────────────────────────────────────────────────────────────

def test_every_view_has_a_still_twin(alive, tmp_path):
    alive.toggle(1, 1).ask(sentence="the old dog and the young cat sleep in the house .")
    for tab in (None, *TABS):
        figure = alive.figure(tab)
        assert len(figure.data) and len(figure.alt) > 20, tab
        assert ET.parse(figure.save(tmp_path / f"{tab}.svg")).getroot().tag.endswith("svg")
    assert alive.save(tmp_path / "h.png").stat().st_size > 2000 and alive.save(tmp_path / "h.pdf").read_bytes()[:4] == b"%PDF"
    assert "1 edit" in alive.figure().alt and "Survival" in alive.colour("survival").figure().alt
    page = alive.save(tmp_path / "all.html").read_text()
    assert all(f"<h2>{t}</h2>" in page for t in TABS.values()) and "src=\"http" not in page
    with pytest.raises(SubnetError, match="cannot save"): alive.save(tmp_path / "x.bmp")


def test_pieces(model, tmp_path):
    space = Space.of(model[0], "head+mlp")
    a, b = Mask.random(space, .75, seed=0), Mask.random(space, .5, seed=1)
    pair = compare_view(a, b)
    assert set(pair.data["mask"]) == {"a", "b", "kept by both"} and f"{compare.jaccard_distance(a, b):.3f}" in pair.alt
    scores = Scores(space, {g.name: np.linspace(-3, 5, g.size) for g in space.groups})
    for piece in (show(a), show(scores), pair, pieces.predictions(*model, "a robin is a kind of [MASK] .", {"all": None, "b": b}), pieces.attention(*model, "a robin is a kind of [MASK] .", a)):
        assert piece.widget is piece.widget and len(piece.data) and piece.alt and "Piece" in repr(piece)
        for kind in ("html", "svg"): assert piece.save(tmp_path / f"p.{kind}").stat().st_size > 1000
    with pytest.raises(SpaceMismatch): compare_view(a, Mask.full(UNITS))
    with pytest.raises(SubnetError, match="use explore"): show([a])


def test_an_attention_page_of_forty_tokens_is_small(tmp_path):
    rng = np.random.default_rng(0)
    maps = {n: (rng.dirichlet(np.full(40, .3), (12, 12, 40)), [f"token{i}" for i in range(40)]) for n in ("full", "subnetwork")}
    assert plots.attention_pair(maps).save(tmp_path / "a.html").stat().st_size < 1_500_000


def test_attention_values_survive_packing():
    import base64, html, re
    rng = np.random.default_rng(1)
    maps = rng.dirichlet(np.ones(5), (2, 3, 5)) * 2                          # normed maps may exceed one
    inner = html.unescape(plots.attention(maps, list("abcde"), layers=[2]).html)
    (code, shape, top), = re.findall(r'unpacked\("([^"]*)", (\[[^\]]*\]), ([0-9.]+)\)', inner)
    back = np.frombuffer(base64.b64decode(code), np.uint8).reshape(json.loads(shape)) * float(top) / 255
    assert np.abs(back - maps[1:]).max() <= float(top) / 255 / 2 + 1e-6


# ── watching ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_watch_follows_another_process(tmp_path):
    code = """
import sys, time
from subnet_explorer.mask import Mask
from subnet_explorer.space import unit_space
from subnet_explorer.store import Run
run = Run(sys.argv[1], {"steps": 6})
for step in (2, 4, 6): run.log(step=step, loss=1 / step, density=.5, score=step / 10); time.sleep(.2)
run.finish(Mask.full(unit_space(2, 2)))
"""
    w = watch(tmp_path / "run", every=.05)
    box, seen = w.widget, []
    box.observe(lambda change: seen.append(change["new"]), "value")
    assert "waiting" in box.value
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    until = time.time() + 20
    while "done" not in box.value and time.time() < until: time.sleep(.05)
    assert "done, step 6" in box.value and box.value.count("<polyline") == 3 and any("running" in v for v in seen)
    figure = w.figure
    assert {"loss", "density", "score"} == set(figure.data.metric) and w.save(tmp_path / "w.svg").exists() and w.refresh()
    with pytest.raises(SubnetError, match="seconds above 0"): watch(tmp_path, every=0)


def test_watch_follows_a_busy_cell(model, tmp_path):
    from subnet_explorer import Cloze, Threshold, find
    w = watch(tmp_path / "run", every=.02)
    box = w.widget
    run = find(*model, Threshold(Space.of(model[0], "weight", layers=4)), Cloze(read_facts("pocket", "MadeOf")), steps=4, every=2, to=tmp_path / "run", progress=False)
    until = time.time() + 20
    while "done" not in box.value and time.time() < until: time.sleep(.02)
    assert "done, step 4" in box.value and {"loss", "density"} <= set(w.figure.data.metric) and list(w.metrics.step) == run.metrics.step.tolist() == watch(run).metrics.step.tolist()


def test_watch_stops_when_told(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "density": 0.5, "score": null}\n{"step": 2, "lo')        # a line that is being written
    w = watch(tmp_path, every=.01)
    w.widget; w.stop()
    assert "running, step 1" in w.widget.value and "score" not in w.widget.value
    with pytest.raises(SubnetError, match="nothing was logged"): watch(tmp_path / "none").figure


# ── without torch ────────────────────────────────────────────────────────────────────────────────────────────────────

def test_masks_are_explored_without_torch(tmp_path):
    code = f"""
import sys
from subnet_explorer.mask import Mask
from subnet_explorer.masks import Masks
from subnet_explorer.space import unit_space
from subnet_explorer.widgets import explore
space = unit_space(4, 4, mlps=True)
ui = explore(Masks([(dict(task=t, seed=s), Mask.random(space, .7, seed=s + 9 * i)) for i, t in enumerate("ab") for s in range(3)]))
p = ui.widget.parts
for i in range(7): p["tabs"].selected_index = i
ui.toggle(1, 1).colour("survival"); ui.save({str(tmp_path / "x.html")!r})
sys.exit(', '.join({{'torch', 'transformers', 'datasets'}} & set(sys.modules)) or 0)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
