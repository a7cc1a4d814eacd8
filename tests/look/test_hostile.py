"Text from data, file names and messages is text wherever it is shown or written: never HTML, formula, YAML or control."
from __future__ import annotations

import ast
import csv
import importlib
import io
import pkgutil
import re
import types
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from browsing import chromium as start

import subnet_explorer
from subnet_explorer import Facts, Labelled, Mask, Masks, Run, plots
from subnet_explorer.cli import main
from subnet_explorer.core.errors import SubnetError
from subnet_explorer.core.escape import Html, csv_text, from_cell, markdown_text, visible, yaml_text
from subnet_explorer.core.mask import card
from subnet_explorer.core.selection import StabilitySelection, stability_selection
from subnet_explorer.core.space import unit_space
from subnet_explorer.data.choices import Choices
from subnet_explorer.data.facts import Fact
from subnet_explorer.data.tables import LabelTask
from subnet_explorer.look.figure import Figure, View
from subnet_explorer.look.site import publish
from subnet_explorer.look.views import compare_view, grid_of, show, still
from subnet_explorer.measure.discordant import Discordant
from subnet_explorer.measure.maps import read_labels
from subnet_explorer.measure.patterns import PatternReport
from subnet_explorer.recipes.clauses import Clause
from subnet_explorer.recipes.options import as_yaml, read_yaml
from subnet_explorer.recipes.study import Recipe, Study
from subnet_explorer.recipes.sweep import StudyLinks
from subnet_explorer.search.prune import Pruned

HIT = "parent.__hit=window.__hit=1"
HOSTILE = [
    f"<script>{HIT}</script>", f"<img src=x onerror={HIT}>", f"<svg onload={HIT}>", f"<svg/onload='{HIT}'>",
    f"<a href='javascript:{HIT}'>a</a>", f"javascript:{HIT}", f"<iframe srcdoc='<script>{HIT}</script>'>",
    f'" onmouseover="{HIT}" autofocus onfocus="{HIT}', f"' onfocus='{HIT}' autofocus='", f"x autofocus onfocus={HIT} y",
    f"</script><script>{HIT}</script>", f"</style><script>{HIT}</script>", f"</title><script>{HIT}</script>",
    f"</textarea><img src=x onerror={HIT}>", f"<!--><img src=x onerror={HIT}>-->", f"]]><img src=x onerror={HIT}>",
    f"&lt;img src=x onerror={HIT}&gt;", "&amp;&#60;b&#62;&nbsp;", f"<details open ontoggle={HIT}>",
    f"<body onload={HIT}>",
    f"<style>@import 'http://hit.example/a';</style><img src=http://hit.example/x onload={HIT}>",
    f"`${{{HIT}}}`", f"{{{{constructor.constructor('{HIT}')()}}}}", "{0} {x} {x.__class__} %s %(x)s %n", "%{y} %{text}",
    f"$x$ $$\\href{{javascript:{HIT}}}{{y}}$$ \\(z\\)", "\u202etxt.exe\u2066", "nul\0nul", "\ufeffmark",
    "x\n---\nlicense: stolen\n# Owned\n", '=HYPERLINK("http://hit.example","b")', "@SUM(1,2)", "+cmd|' /C calc'!A0",
    "-2+3", "\t=1+1", "\r=1+1", "word " * 40 + "end",
    "👩‍👩‍👧 e\u0301 \u200b \u2028 \u2029", "../../etc/passwd%00.txt",
    "__proto__ constructor toString", "\x1b[31mred\x1b]0;title\x07\x9b2J",
    "[x](javascript:1) ![y](http://hit.example/z) | `c`",
]
ALL = [*HOSTILE, "half \ud800 pair"]      # the last of them cannot be in a table
PARTS = [" ".join(HOSTILE[i::5]) for i in range(5)]      # all of them in five labels
HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
UNITS = unit_space(2, 3, mlps=True)


def mask(text: str = "", seed: int = 0) -> Mask:
    model = replace(UNITS.model, name=text or "toy", weights="3f9a00")
    made = Mask.random(replace(UNITS, model=model), .5, seed)
    return Mask(made.space, made.packed, {**made.meta, text: text})


# ── every class with a form for notebooks ────────────────────────────────────────────────────────────────────────────

def modules() -> list[types.ModuleType]:
    found = pkgutil.walk_packages(subnet_explorer.__path__, "subnet_explorer.")
    return [importlib.import_module(m.name) for m in found if not m.name.endswith(("__main__", "_modidx"))]


def classes(*methods: str) -> set[str]:
    "Public classes that have one of the methods of their own."
    own = [(m, c) for m in modules() for c in vars(m).values() if isinstance(c, type) and c.__module__ == m.__name__]
    return {c.__name__ for _, c in own if not c.__name__.startswith("_") and set(methods) & set(vars(c))}


FRAME = pd.DataFrame({"text": HOSTILE, "score": .5}, index=pd.Index(HOSTILE, name=PARTS[0]))
FRAME[PARTS[1]] = PARTS[2]
ROWS = [Fact(text, text, text, f"{text} [MASK] .", f"u{i}") for i, text in enumerate(HOSTILE)]


class Example(Study):
    def summary(self) -> pd.DataFrame: return FRAME


def study(cls: type = Example, **more: Any) -> Any:
    made: Any = object.__new__(cls)
    numbers = {"metric": "accuracy", "score": .5, "n": 1}
    baselines = pd.DataFrame([{"task": t, "part": "test", "baseline": t, "note": t, **numbers} for t in HOSTILE])
    tables = {"scores": FRAME.assign(seed=0), "baselines": baselines}
    told = dict(masks=Masks([]), tables=tables, seconds=1., model_name=PARTS[0], folder=None,
                notes=tuple(HOSTILE), config={"recipe": "lamp", "kind": PARTS[1], "made": HOSTILE}, **more)
    for name, value in told.items(): object.__setattr__(made, name, value)
    return made


def html_of(cls: type, **more: Any) -> str:
    "The form of a study of a recipe, whose numbers are put in place."
    frames = {name: lambda self: FRAME for name in ("summary", "table") if hasattr(cls, name)}
    made = study(type(cls.__name__, (cls,), frames), **more)
    return made._repr_html_()


def of_recipes() -> dict[str, str]:
    names = ("tickets", "tamt", "critical", "probe", "sweep", "complete")
    tickets, tamt, critical, probe, sweep, complete = (
        importlib.import_module(f"subnet_explorer.recipes.{n}") for n in names)
    return {
        "CompleteStudy": html_of(complete.CompleteStudy, triples=facts(), hops=None, rank=PARTS[0]),
        "Tickets": html_of(tickets.Tickets, plan=types.SimpleNamespace(tasks=dict.fromkeys(HOSTILE))),
        "Tamt": html_of(tamt.Tamt, tasks=dict.fromkeys(HOSTILE)),
        "Critical": html_of(critical.Critical, material=PARTS[3]),
        "Probing": html_of(probe.Probing, task="pos"),
        "Sweep": html_of(sweep.Sweep, axes={}, parts=[], failed=FRAME),
    }


def facts() -> Facts: return Facts(tuple(ROWS), name=PARTS[0])


def choices() -> Choices:
    row = {"question": PARTS[0], "choices": [PARTS[1], PARTS[2]], "label": 0, "id": PARTS[3]}
    return Choices((row,), name=PARTS[4], skipped={PARTS[0]: 1})


def labelled() -> Labelled:
    items = tuple({"sentence": text, "label": text, text: text} for text in PARTS)
    return Labelled(items, LabelTask(PARTS[0], ("sentence",), labels=tuple(PARTS)), PARTS[1])


def stable() -> StabilitySelection:
    one = [mask(PARTS[0], seed=i) for i in range(2)]
    return stability_selection(Masks([({"seed": i}, m) for i, m in enumerate(one)]), subsample=None)


def a_recipe() -> Recipe:
    clauses = tuple(Clause(text, text, text, text) for text in HOSTILE)
    return Recipe(PARTS[0], study, PARTS[1], PARTS[2], clauses=clauses)


def report_of_patterns() -> PatternReport:
    table = pd.DataFrame({"pattern": HOSTILE, "f1": .5})
    return PatternReport(.5, (.4, .6), .5, .3, .2, table, FRAME[["score"]].T)


def pruned() -> Pruned:
    table = pd.DataFrame({"phase": HOSTILE, "score": .5, "passed": True})
    return Pruned(mask=mask(PARTS[0]), masks=Masks([]), table=table, scores={}, full=1., floor=.9)


def figure() -> Figure: return plots.bars(pd.DataFrame({"condition": HOSTILE, "value": .5}), title=PARTS[0])


def view() -> View:
    maps = np.full((1, 2, len(HOSTILE), len(HOSTILE)), 1 / len(HOSTILE))
    return plots.attention_pair({PARTS[0]: (maps, HOSTILE)})


def only_one_side() -> Discordant:
    n = len(HOSTILE)
    table = pd.DataFrame({"only": HOSTILE, "relation": HOSTILE, "uuid": range(n), "margin": .5, PARTS[0]: HOSTILE})
    return Discordant(PARTS[0], (PARTS[1],), table, 1, n, 0, 2, {PARTS[0]: 3, PARTS[1]: 1}, FRAME)


def links() -> StudyLinks:
    parts = [types.SimpleNamespace(labels={"model": text}, name=text, model_name=text) for text in HOSTILE]
    found: Any = types.SimpleNamespace(folder=Path("sweep"), parts=parts)
    return StudyLinks(found)


FORMS: dict[str, Callable[[], Any]] = {
    "CoordinateSet": lambda: mask(PARTS[0]),
    "Mask": lambda: mask(PARTS[1]),
    "Masks": lambda: Masks([({"task": text, PARTS[0]: text}, mask(seed=i)) for i, text in enumerate(HOSTILE)]),
    "Choices": choices, "Facts": facts, "Labelled": labelled, "PatternReport": report_of_patterns,
    "Pruned": pruned, "Study": study,
    "Figure": figure, "View": view, "StabilitySelection": stable, "Recipe": a_recipe,
    "Discordant": only_one_side, "StudyLinks": links,
}


def form(made: Any) -> str:
    "What a notebook shows of something."
    if hasattr(made, "_repr_mimebundle_"): return made._repr_mimebundle_()["text/html"]
    return made._repr_html_()


def test_every_form_for_notebooks_has_a_case():
    "A new class with a form of its own needs one here."
    assert classes("_repr_html_", "_repr_mimebundle_", "_repr_svg_", "_repr_markdown_") <= set(FORMS)
    studies = {c for c in classes("html") if c not in ("Page", "Study")}
    assert studies <= set(of_recipes()), "a study whose notebook form has no case"


# ── in a browser ─────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def browser(chromium):
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with start(chromium) as b: yield b


STRANGE = """() => [...document.querySelectorAll('*')].filter(e =>
  [...e.attributes].some(a => /^on/i.test(a.name)
    || /^(href|xlink:href|src|action|formaction|data)$/.test(a.name) && /^\\s*javascript:/i.test(a.value))
  || ['IMG', 'OBJECT', 'EMBED', 'LINK', 'BASE', 'FORM'].includes(e.tagName)
    && !e.dataset.table && e.rel != 'stylesheet').map(e => e.outerHTML.slice(0, 200))"""
"Elements that only data could have made."


def harmless(browser, page: Path, wait: int = 300) -> Any:
    "Open a page: nothing of the data runs, is asked for, or becomes an element; gives the page."
    seen = browser.new_context(offline=True).new_page()
    asked: list[str] = []
    dialogs: list[str] = []
    def dismiss(dialog: Any) -> None:
        dialogs.append(dialog.message)
        dialog.dismiss()
    seen.on("request", lambda r: asked.append(r.url))
    seen.on("dialog", dismiss)
    seen.goto(page.as_uri(), wait_until="load")
    seen.wait_for_timeout(wait)
    here = page.parent.parent.as_uri()
    assert [u for u in asked if not u.startswith((here, "data:", "about:")) or u.endswith("/x")] == [] == dialogs
    for frame in seen.frames: assert not frame.evaluate("window.__hit"), page.name
    assert seen.evaluate(STRANGE) == []
    return seen


def squeezed(text: str) -> str: return " ".join(text.split())


def test_forms_show_text(browser, tmp_path):
    shown = {name: form(make()) for name, make in FORMS.items() if name != "Figure"} | of_recipes()
    shown["still"] = still(grid_of(FRAME[["score"]], PARTS[0], PARTS[1]))
    shown |= {f"mask {i}": form(mask(text)) for i, text in enumerate(ALL)}
    body = "".join(f"<section id='{i}'>{made}</section>" for i, made in enumerate(shown.values()))
    file = tmp_path / "site" / "forms.html"
    file.parent.mkdir()
    file.write_text(f"<!doctype html><meta charset=utf-8><body>{body}", encoding="utf-8")
    page = harmless(browser, file)
    said = {name: squeezed(page.locator(f"[id='{i}']").inner_text()) for i, name in enumerate(shown)}
    for text in HOSTILE:
        assert squeezed(visible(text)) in said["Study"], text
        assert squeezed(visible(text).replace("\n", "\\n").replace("\t", "\\t")) in said["Masks"], text
    assert page.locator("section").count() == len(shown)


COURSE = pd.DataFrame({"step": [1, 2, 3], "loss": [3., 2., 1.], "density": .5})
CASES = [(text, seed) for text in PARTS for seed in (0, 1)]
MANY = Masks([({"task": text, "seed": seed}, mask(seed=i)) for i, (text, seed) in enumerate(CASES)])


def two(columns: tuple[str, ...], *values: Any) -> pd.DataFrame:
    "A row for each hostile label."
    return pd.DataFrame([[text if v is ... else v for v in values] for text in PARTS], columns=list(columns))


def attended() -> dict[str, Any]:
    tokens = [*PARTS, "[MASK]"]
    return {text: (np.full((1, 2, 6, 6), 1 / 6), tokens) for text in PARTS}


def course() -> pd.DataFrame:
    steps = {"seed": PARTS[0], "step": [1, 2], PARTS[1]: [1.5, 1.2], "sparsity": [.1, .2], "chosen": [False, True]}
    return pd.DataFrame(steps)


def points() -> pd.DataFrame:
    made = [dict(relation=a, under=b, sub=a, obj=b, x=i, y=j) for i, a in enumerate(PARTS) for j, b in enumerate(PARTS)]
    return pd.DataFrame(made)


EXAMPLE = ("model", "under", "prompt", "obj", "place", "token", "probability", "rank")
GAIN = ("task", "relations", "mean", "low", "high")
FIGURES: dict[str, Callable[[], Figure]] = {
    "bars": figure,
    "answer_map": lambda: plots.answer_map(two(("relation", "sub", "obj", "mask", "rank"), ..., ..., ..., PARTS[1], 2)),
    "density": lambda: plots.density(mask(PARTS[0]), PARTS[1]),
    "densities": lambda: plots.densities({text: mask() for text in PARTS}, PARTS[0], PARTS[1]),
    "jaccard": lambda: plots.jaccard(subnet_explorer.compare.jaccard(MANY.sel(seed=0), by="task"), PARTS[0]),
    "survival": lambda: plots.survival(MANY, title=PARTS[0]),
    "overlap": lambda: plots.overlap(subnet_explorer.compare.overlap(MANY, by="task")),
    "consensus": lambda: plots.consensus(subnet_explorer.compare.consensus(MANY, samples=20)),
    "importance": lambda: plots.importance(MANY.survival(), 1, title=PARTS[0]),
    "placement": lambda: plots.placement(two(("layer", "matrix", "head", "size", "kept"), 1, ..., 0, 9, 3), PARTS[0]),
    "tickets": lambda: plots.tickets(pd.concat([
        two(("task", "kind", "stage", "seed", "score"), ..., PARTS[0], "pruned", PARTS[1], .5),
        two(("task", "kind", "stage", "seed", "score"), ..., "full", "full", PARTS[1], .7)]), label=PARTS[2]),
    "removal": lambda: plots.removal(two(("under", "data", "ratio"), ..., PARTS[1], 1.5)),
    "pareto": lambda: plots.pareto(
        two(("probe", "granularity", "lam", "rank", "score", "bits"), ..., PARTS[1], 1., 0, .5, 9)),
    "scatter": lambda: plots.scatter(two(("method", "loss", "score"), ..., 1., .5), "loss", "score", "method"),
    "curves": lambda: plots.curves(dict.fromkeys(PARTS, COURSE), PARTS[0]),
    "tradeoff": lambda: plots.tradeoff(course()),
    "predictions": lambda: plots.predictions(two(("under", "rank", "token", "probability"), ..., 1, PARTS[1], .5)),
    "mask_attention": lambda: plots.mask_attention(attended(), PARTS[0]),
    "tsne": lambda: plots.tsne(points()),
    "patterns": lambda: plots.patterns(two(("task", "pattern", "share"), ..., PARTS[1], .5), by="task"),
    "pattern_grid": lambda: plots.pattern_grid(
        two(("task", "pattern", "share", "model", "maps"), ..., PARTS[1], .5, PARTS[2], PARTS[3]),
        "task", "model", "maps", PARTS[0], PARTS[4]),
    "answer_examples": lambda: plots.answer_examples(
        two(EXAMPLE, ..., PARTS[0], ..., ..., 1, PARTS[1], .5, 3), PARTS[2]
    ),
    "gain_flows": lambda: plots.gain_flows(two(GAIN, ..., PARTS[1], .1, -.1, .3), PARTS[2]),
    "gain_map": lambda: plots.gain_map(two(GAIN, ..., PARTS[1], -.1, -.2, -.05), PARTS[2]),
    "relation_map": lambda: plots.relation_map(
        points(), two(("under", "k", "value", "low", "high", "chance"), ..., 3, .5, .4, .6, .2), PARTS[0]),
}
NO_FIGURE = {"add_heat", "attention", "attention_pair", "by_layer", "cells", "check_drawable", "color_axis", "draw",
             "html_card", "html_figure", "html_page", "is_dark", "paper_color", "plain_text", "print_figure",
             "print_plotly", "report", "safe_text", "set_layout", "shades", "style", "with_small"}


def test_every_figure_has_a_case():
    made = {n for n in dir(plots) if n[0].islower() and callable(getattr(plots, n))}
    assert made - NO_FIGURE == set(FIGURES)


def test_figures_and_reports_show_text(browser, tmp_path):
    sections = [(name, PARTS[0], [make()]) for name, make in FIGURES.items()]
    sections.append((PARTS[0], PARTS[1], [FRAME, study(), view()]))
    file = plots.report(tmp_path / "site" / "report.html", PARTS[0], sections, {text: text for text in HOSTILE})
    page = harmless(browser, file, 1500)
    assert page.locator(".main-svg").count() >= len(FIGURES)
    assert page.locator(".js-plotly-plot a:not(.modebar-btn):not(.modebar-group a), .js-plotly-plot b").count() == 0
    assert squeezed(visible(PARTS[0])) == squeezed(page.locator("h1").inner_text())
    drawn = page.locator(".js-plotly-plot").first.evaluate("e => e.textContent")
    assert HOSTILE[0] in drawn and HOSTILE[16] in drawn and HOSTILE[25].split()[0] in drawn
    frame = page.frame_locator("iframe").first
    assert HOSTILE[1] in frame.locator("svg").first.evaluate("e => e.textContent")


def test_drawings_are_whole(tmp_path):
    for name in ("bars", "density"):
        drawn = ET.parse(FIGURES[name]().save(tmp_path / f"{name}.svg")).getroot()
        assert HOSTILE[0] in drawn.attrib["aria-label"] and not HARMFUL.search(drawn.attrib["aria-label"])
        assert not [e for e in drawn.iter() if e.tag.endswith(("}script", "}a", "}foreignObject"))]
        assert all(e.attrib[k].startswith(("data:", "#")) for e in drawn.iter() for k in e.attrib if k.endswith("href"))


def test_sites_show_text(browser, tmp_path):
    for i, text in enumerate(PARTS[:3]):
        labels = {"task": text, "seed": i % 2, PARTS[0][:200]: text}
        run = Run(tmp_path / "runs" / f"{i}", {"method": text, "model": text, text: text, "n": i}, labels)
        for step in (1, 2, 3): run.log(step=step, loss=1 / step, said=text)
        run.finish(mask(text, i))
    site = publish(tmp_path / "runs", tmp_path / "site")
    for file in sorted(site.index.parent.rglob("*.html")): page = harmless(browser, file, 200)
    page = harmless(browser, site.index)
    assert squeezed(visible(PARTS[0]))[:300] in squeezed(page.locator("body").inner_text())


def test_widgets_show_text(browser, tmp_path):
    ipywidgets = pytest.importorskip("ipywidgets")
    app = subnet_explorer.explore(MANY)
    boxes = [app.widget, compare_view(mask(seed=1), mask(seed=2), (PARTS[0], PARTS[1])).widget]
    app.message = ""
    from subnet_explorer.look import app as module
    module._say(app, PARTS[2])
    texts: list[str] = []
    def visit(box: Any) -> None:
        if isinstance(box, ipywidgets.HTML): texts.append(box.value)
        for child in getattr(box, "children", ()): visit(child)
    for box in boxes: visit(box)
    file = tmp_path / "site" / "widgets.html"
    file.parent.mkdir()
    file.write_text("<!doctype html><meta charset=utf-8>" + "\n".join(texts), encoding="utf-8")
    page = harmless(browser, file)
    assert squeezed(visible(PARTS[2])) in squeezed(page.locator("body").inner_text()) and len(texts) > 5


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def cells_of(text: str) -> list[list[str]]: return list(csv.reader(io.StringIO(text)))


def test_tables_hold_no_formula(tmp_path):
    lists = [[np.float64(.5), text] for text in HOSTILE]
    table = FRAME.assign(number=-1.5, lists=lists, none=None).rename(columns={"score": "=1+1"})
    made = replace_tables(study(), {"scores": table, "-odd": table})
    object.__setattr__(made, "to_json", lambda: {"model": PARTS[0]})
    made.save(tmp_path)
    for file in tmp_path.glob("*.csv"):
        text = file.read_text(encoding="utf-8")
        assert "np." not in text and not HARMFUL.search(text)
        rows = cells_of(text)
        assert len(rows) == 1 + len(HOSTILE)
        for cell in (cell for row in rows for cell in row):
            assert cell == "-1.5" or not cell.startswith(tuple("=+-@\t\r\n"))
        back = pd.read_csv(file)
        assert list(back.number) == [-1.5] * len(HOSTILE)
        assert list(map(from_cell, back.text)) == list(map(visible, HOSTILE))


def replace_tables(made: Any, tables: dict[str, pd.DataFrame]) -> Any:
    object.__setattr__(made, "tables", tables)
    return made


def test_labels_of_maps_come_back(tmp_path):
    names = [text for text in HOSTILE if not re.search(r"[\t\n\r]", text)]
    a = subnet_explorer.widgets.Annotator([np.full((3, 3), 1 / 3)] * len(names), tmp_path / "labels.tsv", names)
    for _ in names: a.press("1")
    lines = (tmp_path / "labels.tsv").read_text(encoding="utf-8").split("\n")
    assert not [line for line in lines if line.startswith(tuple("=+-@"))]
    again = subnet_explorer.widgets.Annotator([np.full((3, 3), 1 / 3)] * len(names), tmp_path / "labels.tsv", names)
    assert len(again.labels) == len(names) == len(read_labels(tmp_path / "labels.tsv")) and again.current is None


@pytest.mark.parametrize("text", ALL, ids=range(len(ALL)))
def test_cards_and_settings_are_yaml(text, tmp_path):
    made = card(mask(text))
    _, head, body = made.split("---\n", 2)
    assert set(yaml.safe_load(head)) == {"library_name", "base_model"} and not HARMFUL.search(made)
    outside = re.sub(r"(?s)```python.*?```", "", body)
    assert not re.search(r"(?<!\\)<[a-zA-Z/!]", outside) and "](javascript" not in outside.replace("\\]", "")
    assert [line for line in outside.splitlines() if line.startswith("#")] == [body.strip().splitlines()[0]]
    [code] = re.findall(r"(?s)```python\n(.*?)```", body)
    ast.parse(code.replace("...", "pass"))
    values = yaml.safe_load(yaml_text({"name": text, text: [text]}))
    assert values == {"name": text, text: [text]}
    (tmp_path / "a.yaml").write_text(as_yaml({"recipe": text}), encoding="utf-8")
    assert read_yaml(tmp_path / "a.yaml") == {"recipe": text}


def test_markdown_is_text():
    for text in ALL:
        line = markdown_text(text)
        assert "\n" not in line and not re.search(r"(?<!\\)[<>\[\]`|*_~$]", line.replace("\\\\", ""))


# ── printed ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_printed_text_controls_no_terminal(tmp_path, capsys):
    text = "\x1b[31mred\x1b[0m \x07 \u202e \x9b2J"
    printed = [make() for name, make in FORMS.items() if name != "Study"]
    printed += [Masks([({text: text}, mask(text))]), mask(text), mask(text).space, show(mask(), text)]
    for made in printed: assert not HARMFUL.search(repr(made)), type(made).__name__
    for make in (figure, view): assert not HARMFUL.search(repr(make()))
    assert str(SubnetError(f"no such name {text}")) == f"no such name {visible(text)}"
    assert not HARMFUL.search(figure()._repr_mimebundle_()["text/plain"])
    run = Run(tmp_path / "runs" / "a", {"n": 1}, {"task": text})
    run.finish(mask(text))
    capsys.readouterr()
    for words in (["show", str(tmp_path / "runs")], ["show", str(tmp_path / "runs" / "a")], ["show", text], [text]):
        main(words)
        said = capsys.readouterr()
        assert not HARMFUL.search(said.out + said.err), words


# ── one place for HTML ───────────────────────────────────────────────────────────────────────────────────────────────

TAG = re.compile(r"</?[a-zA-Z!][\w-]*(\s[^<>]*)?/?>|<[a-zA-Z]+ [a-z-]+=|<svg ")
NOT_HTML = re.compile(r"<task>/seed_<number>|<unk>|file<TAB>label|^\s*m\.<group>")
MAKES_HTML = {      # what is HTML though it is no literal: made by pandas, plotly, bertviz, or a script of the library
    "core.escape", "look.figure", "look.report", "look.models", "look.markup", "look.tables", "look.views",
}


def literals(tree: ast.AST) -> list[tuple[ast.AST, str]]:
    "Text in a module that is neither a docstring nor the argument of `Html`."
    skip: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant): skip.add(id(node.value))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Html" and isinstance(node.args[0], ast.Constant):
            skip.add(id(node.args[0]))
    return [(n, n.value) for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in skip]


@pytest.mark.parametrize("module", [m.__name__.removeprefix("subnet_explorer.") for m in modules()])
def test_html_is_written_as_html(module):
    "Tags stand in templates of `Html`, which escape what is put into them; never in a plain or an f-string."
    made = importlib.import_module(f"subnet_explorer.{module}")
    tree = ast.parse(Path(made.__file__).read_text(encoding="utf-8"))
    found = [f"line {n.lineno}: {text[:60]}" for n, text in literals(tree) if TAG.search(NOT_HTML.sub("", text))]
    assert not found, "use Html(…).format(…) of core.escape"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call): continue
        called = ast.unparse(node.func)
        assert called not in ("html.escape", "escape") and not called.endswith((".to_html_string", ".to_markdown"))
        where = f"line {node.lineno}"
        if called.endswith(".to_html"): assert module in ("core.escape", "look.figure"), f"{where}: table_html"
        if called.endswith(".to_csv"): assert module == "core.escape", f"{where}: csv_text"
        if re.match(r"yaml\..*dump", called): assert (module, called) == ("core.escape", "yaml.safe_dump"), where
        if called == "Html" and not isinstance(node.args[0], ast.Constant):
            assert module in MAKES_HTML and not isinstance(node.args[0], ast.JoinedStr), f"line {node.lineno}"


def test_html_escapes():
    for text in ALL:
        made = Html('<b title="{}">{}</b>{}').format(text, text, Html("").join([text]))
        assert made.count("<") == 2 and made.count('"') == 2 and not HARMFUL.search(made) and "'" not in made
    assert csv_text(pd.DataFrame({"a": ["=1"]})) == "a\n'=1\n"
