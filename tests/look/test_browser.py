"What people see: reports, sites, figures and JupyterLab in a real browser, with the network off."

import pytest
from browsing import SCREENS, alike, chromium as start, copied, in_lab, lab, opened, run_all, shot, violations, written

from subnet_explorer import Mask, Run, Space, Store, load, plots, read_facts, recipes, represent
from subnet_explorer.core.space import unit_space
from subnet_explorer.look.site import publish

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser(chromium):
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with start(chromium) as b: yield b


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "lamp"
    model, tok = load("pocket-bert")
    facts = read_facts("pocket", "MadeOf,Desires,HasA")
    study = recipes.lamp(model, tok, facts, steps=20, random=1, to=folder, progress=False)
    study.report(folder / "report.html")
    return folder


@pytest.fixture(scope="module")
def site(study, pocket_bert):
    "A study of weights, a store of heads with an unfinished run and a broken one, and labels that are markup."
    store, space = Store(study.parent / "heads"), Space.of(pocket_bert[0], "head+mlp")
    cases = [("a<b>&amp;", 0), ("a<b>&amp;", 1), ("plain", 0), ("plain", 1), ("late", 0), ("torn", 0)]
    for i, (task, seed) in enumerate(cases):
        labels, config = dict(task=task, seed=seed), dict(method="<script>document.title='broken'</script>", n=i)
        run = Run(store.path(dict(n=i), config), config, labels)
        for step in (10, 20, 30): run.log(step=step, loss=1 / step, score=step / 40)
        if task != "late": run.finish(Mask.random(space, .5, seed=i))
        if task == "torn": (run.folder / "mask.safetensors").write_bytes(b"torn")
    return publish(study.parent)


# ── reports and saved files ──────────────────────────────────────────────────────────────────────────────────────────

def test_the_report_stands_alone(study, browser):
    seen = opened(browser, study / "report.html", wait=1500)
    page = seen.page
    assert seen.asked == [] and seen.errors == []
    assert page.locator("h1").inner_text() == "Relation-specific subnetworks of pocket-bert"
    assert page.locator(".js-plotly-plot .main-svg").count() >= 5                      # every figure is drawn …
    heat_maps = page.locator(".js-plotly-plot .hm image, .js-plotly-plot .heatmaplayer image")
    assert heat_maps.count() >= 3                                                      # … with its heat-maps
    for name in ("full", "subnetwork", "random", "mismatched", "majority"):
        assert page.get_by_role("cell", name=name, exact=True).count() >= 1
    assert page.locator("[role=figure][aria-label]").count() >= 5                      # and says in words what it shows
    assert violations(page) == []
    shot(page, "report", whole=False)


STROKES = "ls => ls.map(l => l.getAttribute('stroke-opacity') + l.getAttribute('stroke')).join()"


def test_attention_views_react(study, browser):
    page = opened(browser, study / "report.html", wait=1500).page
    frame = page.frame_locator("iframe").first
    lines = frame.locator("svg line")
    before = lines.evaluate_all(STROKES)
    select = frame.locator("select").first
    select.select_option(index=select.locator("option").count() - 1)
    page.wait_for_timeout(500)
    assert lines.count() > 0 and lines.evaluate_all(STROKES) != before


def test_saved_attention_is_small_and_draws(tmp_path, browser, pocket_bert):
    model, tok = pocket_bert
    maps, tokens = represent.attention(model, tok, " ".join(["a sparrow can fly and"] * 8))
    assert len(tokens) >= 40
    file = plots.attention_pair({"full": (maps, tokens), "again": (maps, tokens)}).save(tmp_path / "a.html")
    assert file.stat().st_size < 1_500_000
    seen = opened(browser, file)
    frame = seen.page.frame_locator("iframe")
    assert seen.asked == [] and seen.errors == []
    assert frame.locator("svg").count() >= 2 and frame.locator("svg line").count() > 100
    assert violations(seen.page) == []
    shot(seen.page, "attention")


def test_text_from_data_stays_text(tmp_path, browser):
    import pandas as pd
    evil = "<script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"
    figure = plots.bars(pd.DataFrame({"condition": [evil, "b"], "value": [.5, .2]}), title=evil)
    sections = [(evil, evil, [figure, pd.DataFrame({evil: [evil]})])]
    seen = opened(browser, plots.report(tmp_path / "r.html", evil, sections))
    assert seen.page.title() != "broken" and seen.errors == [] and seen.asked == []
    assert evil in seen.page.locator("h1").inner_text()
    alone = opened(browser, figure.save(tmp_path / "f.html"))
    assert alone.page.title() != "broken" and alone.page.locator(".main-svg").count() >= 1
    assert violations(alone.page) == []


def test_saved_figures_need_no_browser(tmp_path):
    import xml.etree.ElementTree as ET

    from PIL import Image
    model, _ = load("pocket-bert")
    figure = plots.density(Mask.random(Space.of(model, "weight"), .5, seed=0))
    svg, png, pdf = (figure.save(tmp_path / f"f.{kind}") for kind in ("svg", "png", "pdf"))
    text = " ".join(t for t in ET.parse(svg).getroot().itertext() if t.strip())
    assert "layer 1" in text and "share kept" in text
    assert Image.open(png).size[0] > 500 and pdf.read_bytes()[:5] == b"%PDF-"
    with pytest.raises(plots.CannotDraw): figure.save(tmp_path / "f.bmp")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.pdf", "f.png", "f.svg"]


# ── the site of a folder of runs ─────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_kind_of_page_stands_alone(site, browser, scheme):
    at = site.index.parent
    pages = {
        "index": (site.index, 0), "comparison": (min(at.glob("compare/*head*.html")), 2),
        "study": (min(at.glob("study/*.html")), 0), "run": (min(at.glob("run/lamp*.html")), 2),
    }
    for name, (file, figures) in pages.items():
        seen = opened(browser, file, scheme, wait=300)
        assert seen.asked == [] and seen.errors == [] and seen.page.title() not in ("", "broken"), name
        drawn = seen.page.locator(".plot .main-svg").count()
        assert drawn >= figures, f"{name} draws {drawn} figures"
        assert violations(seen.page) == [], f"{name}, {scheme}"
        dark = seen.page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert dark == (scheme == "dark")
        shot(seen.page, f"site-{name}-{scheme}", whole=False)
        seen.page.context.close()


def test_the_index_sorts_and_filters_by_keyboard(site, browser):
    page = opened(browser, site.index).page
    def names() -> list[str]: return page.locator("#runs tbody tr:visible td:first-child").all_inner_texts()
    def order() -> str: return page.locator("#runs th").first.get_attribute("aria-sort")
    everything = names()
    assert len(everything) == site.runs
    page.keyboard.press("Tab")
    assert page.locator(":focus").inner_text() == "Skip to the content"
    page.get_by_role("button", name="run").focus()
    page.keyboard.press("Enter")
    assert (order() == "ascending" and names() != everything) or names() == sorted(everything)
    page.keyboard.press("Enter")
    assert order() == "descending" and set(names()) == set(everything)
    page.get_by_label("task").select_option("a<b>&amp;")
    assert len(names()) == 2 and page.locator("output").inner_text() == f"2 of {site.runs} shown"
    page.get_by_role("button", name="Show all").press("Enter")
    page.get_by_label("search").fill("unfinished")
    assert len(names()) == 1 and names()[0].startswith("4-")
    page.get_by_label("search").fill("")
    page.locator("#runs tbody a", has_text="5-").press("Enter")
    page.wait_for_load_state()
    problem = page.locator(".note.error")
    assert problem.count() == 1 and "MaskFileError" in problem.inner_text()


# ── JupyterLab ───────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def jupyter(tmp_path_factory):
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install jupyterlab")
    folder = tmp_path_factory.mktemp("lab")
    with lab(folder) as address: yield address, folder


NOTEBOOKS = [
    pytest.param("index.ipynb", 0, id="index"),
    pytest.param("tutorials/critical.ipynb", 0, id="critical", marks=pytest.mark.slow),
    pytest.param("tutorials/lamp.ipynb", 1, id="lamp"),
]


@pytest.mark.parametrize("notebook, figures", NOTEBOOKS)
def test_notebooks_open_and_run_in_jupyterlab(jupyter, browser, notebook, figures):
    address, folder = jupyter
    file = copied(notebook, folder, keep=7)
    seen = in_lab(browser, address, file)
    cells = run_all(seen, file)
    assert len(cells) >= 3 and any(c["outputs"] for c in cells) and not seen.errors
    drawn = [o for c in cells for o in c["outputs"] if "application/vnd.plotly.v1+json" in o.get("data", {})]
    assert len(drawn) >= figures
    if figures:                                                       # drawn by the front end, with the network off
        seen.page.locator(".js-plotly-plot .main-svg").first.wait_for(timeout=20_000)
        seen.page.locator(".js-plotly-plot").first.scroll_into_view_if_needed()
    shot(seen.page, f"lab-{file.stem}", whole=False, like=False)      # JupyterLab looks as its version does
    seen.page.context.close()


LONG = 300_000      # ms that a slow machine may take
EXPLORE = """
model, tok = load("pocket-bert")
masks = Masks([({"seed": s}, Mask.random(Space.of(model, "head+mlp"), .75, seed=s)) for s in range(3)])
explore(masks, (model, tok), split(read_facts("pocket", "IsA")).test, to="kept", batch=16)"""


@pytest.fixture(scope="module")
def explorer(jupyter, browser):
    """An explorer of three masks in JupyterLab, everything outside this machine blocked.

    Gives a page and the folder that masks are saved in.
    """
    address, folder = jupyter
    file = written(folder, "explorer", "from subnet_explorer import *", EXPLORE)
    seen = in_lab(browser, address, file)
    before = len(seen.asked)
    run_all(seen, file)
    seen.page.locator(".se-board [role=grid]").wait_for(timeout=LONG)
    seen.page.wait_for_function(SCORE + "() !== ''", timeout=LONG)
    yield seen.page, folder / "kept"
    assert seen.asked[before:] == [] and not seen.errors      # nothing outside was asked for, to the end
    seen.page.context.close()


SCORE = """(() => [...document.querySelectorAll('.jp-OutputArea-output td')]
    .filter(d => d.textContent === 'subnetwork' && d.closest('table').textContent.startsWith('on '))
    .map(d => d.parentElement.textContent).join())"""


def score(page, other_than: str | None = None, equal: str | None = None) -> str:
    "The line of scores of the subnetwork, once it is another, or this one."
    if other_than is not None:
        page.wait_for_function(f"old => ![old, ''].includes({SCORE}())", arg=other_than, timeout=LONG)
    if equal is not None:
        page.wait_for_function(f"old => {SCORE}() === old", arg=equal, timeout=LONG)
    return page.evaluate(SCORE)


def at(page, place) -> None:
    "Wait until the keyboard is at a place."
    here = place.element_handle()
    page.wait_for_function("e => e === document.activeElement", arg=here, timeout=LONG)


def test_the_explorer_is_handled_by_keyboard(explorer):
    page, kept = explorer
    first_cell = page.locator(".se-board tbody tr:nth-child(1) td:nth-child(2)")
    cell = page.locator(".se-board tbody tr:nth-child(2) td:nth-child(3)")
    page.get_by_role("button", name="Survival").focus()
    page.keyboard.press("Tab")
    at(page, first_cell)                                              # the heat-map is one stop of the tab order
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    at(page, cell)
    before, chosen = score(page), cell.get_attribute("aria-selected")
    page.keyboard.press(" ")
    after = score(page, other_than=before)
    assert cell.get_attribute("aria-selected") != chosen and "edited" in cell.get_attribute("aria-label")
    page.keyboard.press("z")
    score(page, equal=before)
    assert cell.get_attribute("aria-selected") == chosen and "edited" not in cell.get_attribute("aria-label")
    page.keyboard.press(" ")
    score(page, equal=after)
    page.keyboard.press("s")
    page.keyboard.type("by hand")
    page.keyboard.press("Enter")
    at(page, cell)
    page.get_by_text("saved kept/by hand.mask.safetensors").wait_for(timeout=LONG)
    mask = Mask.load(kept / "by hand.mask.safetensors")
    first = Mask.random(Space.of(load("pocket-bert")[0], "head+mlp"), .75, seed=0)
    assert (mask ^ first).count == 1 and mask["layer.1.head"].tolist() != first["layer.1.head"].tolist()
    assert mask.meta["operation"] == "edited by hand" and mask.meta["parents"] == [first.id]


def test_what_is_typed_into_the_explorer_stays_text(explorer):
    page, _ = explorer
    page.get_by_role("tab", name="Predictions").click()
    output = page.locator(".jp-OutputArea-output:has(.se-board)")
    def ask(prompt: str) -> None:
        field = page.get_by_label("Prompt", exact=True)
        field.fill(prompt)
        field.press("Enter")
    image = "<img src=x onerror=\"document.title='broken'\"> a [MASK] ."
    for evil in ("<script>document.title='broken'</script> a [MASK] .", image):
        ask(evil)
        output.get_by_text(evil).first.wait_for(timeout=LONG)         # above the answers, as it was typed
        assert "broken" not in page.title() and output.locator("img, script").count() == 0
    ask("no gap")                                                     # a mistake is told, and does no harm
    output.get_by_text("expected exactly one").first.wait_for(timeout=LONG)
    ask("a robin is a kind of [MASK] .")
    output.get_by_text("a robin is a kind of [MASK] .").first.wait_for(timeout=LONG)


def test_the_explorer_draws_attention_and_is_accessible(explorer):
    page, _ = explorer
    page.get_by_role("tab", name="Attention").click()
    lines = page.frame_locator(".jp-OutputArea-output iframe").first.locator("svg line")
    lines.first.wait_for(state="attached", timeout=LONG)
    assert lines.count() > 100
    page.get_by_role("tab", name="Overlap").click()
    page.get_by_text("Jaccard distance (line: chance)").first.wait_for(timeout=LONG)
    assert violations(page, ".jp-OutputArea-output:has(.se-board)") == []
    page.locator(".se-board").scroll_into_view_if_needed()
    shot(page, "lab-explorer", whole=False, like=False)


STOPPING = """
import time
from pathlib import Path
import subnet_explorer.core.masks as reading
from subnet_explorer import *
at_once = reading.load_mask
def slowly(path):      # a slow disk: a second for each file
    time.sleep(Path("many/slow").exists())
    return at_once(path)
reading.load_mask = slowly
ui = explore("many", to="stopped")
ui"""
ALL_READ = "() => document.querySelector('.jp-OutputArea-output').innerText.includes('200 of 200 masks')"


def test_long_work_in_the_explorer_is_stopped_by_its_button(jupyter, browser):
    address, folder = jupyter
    many = folder / "many"
    space = unit_space(4, 4, mlps=True)
    for i in range(200): Mask.random(space, .5, seed=i).save(many / f"{i:03d}.mask.safetensors")
    (many / "slow").touch()
    file = written(folder, "stopping", STOPPING)
    seen = in_lab(browser, address, file)
    page, output = seen.page, seen.page.locator(".jp-OutputArea-output:has(.se-board)")
    run_all(seen, file)
    stop, progress = output.get_by_role("button", name="Stop", exact=True), output.locator(".progress-bar")
    edited = output.get_by_text("; 1 edit", exact=False).first
    def done() -> float: return float(progress.evaluate("bar => bar.style.width").removesuffix("%"))
    def stopped() -> None:
        stop.wait_for(timeout=LONG)
        stop.click()
        output.get_by_text("stopped", exact=True).wait_for(timeout=LONG)
        stop.wait_for(state="hidden", timeout=LONG)
        before = done()
        page.wait_for_timeout(1000)
        assert 0 < done() == before < 100 and stop.is_hidden()        # it ended early, and nothing goes on behind
    output.get_by_role("button", name="Read densities").click()       # more than a minute, if nobody stops it
    stopped()
    output.get_by_role("button", name="Switch (Space)").click()       # still there: an edit is heard, and shown …
    edited.wait_for(timeout=LONG)
    stopped()
    assert edited.is_visible()                                        # … and stays when what it set off is stopped
    (many / "slow").unlink()
    output.get_by_role("button", name="Read densities").click()       # not everything was read; now it is
    output.get_by_label("density ≥").wait_for(timeout=LONG)
    page.wait_for_function(ALL_READ, timeout=LONG)
    output.get_by_placeholder("name of this mask").fill("by hand")
    output.get_by_role("button", name="Save (s)").click()
    output.get_by_text("saved stopped/by hand.mask.safetensors").wait_for(timeout=LONG)
    first = Mask.load(many / "000.mask.safetensors")
    by_hand = Mask.load(folder / "stopped" / "by hand.mask.safetensors")
    assert (first ^ by_hand).count == 1 and by_hand.meta["parents"] == [first.id]
    assert not seen.errors
    page.context.close()


ANNOTATE = """
import pandas as pd
from subnet_explorer import widgets
evil = "<img src=x onerror=\\"document.title='broken'\\">"
facts = [("IsA", "oak", "tree"), ("CapableOf", "bird", evil), ("HasA", "car", "wheels")]
table = pd.DataFrame(facts, columns=["relation", "sub", "obj"])
widgets.FactsAnnotator(table, "said.csv", "Ada", seed=None)"""


def test_facts_are_labelled_by_keyboard_and_another_day(jupyter, browser):
    address, folder = jupyter
    said = folder / "said.csv"
    def rows() -> list[str]: return said.read_text(encoding="utf-8").splitlines()[1:] if said.exists() else []
    def opened_on(name: str):
        file = written(folder, name, ANNOTATE)
        seen = in_lab(browser, address, file)
        run_all(seen, file)
        output = seen.page.locator(".jp-OutputArea-output:has(input[placeholder^='type 1'])")
        output.get_by_label("Key", exact=True).wait_for(timeout=LONG)
        return seen, output
    seen, output = opened_on("annotate")
    page, key = seen.page, output.get_by_label("Key", exact=True)
    key.focus()
    def press(letter: str, then: str) -> None:
        page.keyboard.press(letter)
        output.get_by_text(then).first.wait_for(timeout=LONG)
        focused = "e => e === document.activeElement && e.value === ''"
        page.wait_for_function(focused, arg=key.element_handle(), timeout=LONG)
    press("1", "1 of 3 labelled")
    output.get_by_text("<img src=x").first.wait_for(timeout=LONG)      # the next one, as text
    assert rows() == ["IsA,oak,tree,Ada,plausible"]
    press("u", "0 of 3 labelled")
    assert rows() == [] and output.get_by_text("oak – IsA – tree").is_visible()
    press("2", "1 of 3 labelled")
    press("s", "car – HasA – wheels")                                  # skipped: no label, and the next one
    assert rows() == ["IsA,oak,tree,Ada,not"]
    press("9", "unknown key")
    assert output.get_by_role("alert").is_visible() and rows() == ["IsA,oak,tree,Ada,not"]
    press("3", "2 of 3 labelled, 1 skipped")
    assert "broken" not in page.title() and output.locator("img[src=x]").count() == 0
    assert violations(page, ".jp-OutputArea-output:has(input[placeholder^='type 1'])") == [] and not seen.errors
    page.context.close()
    seen, output = opened_on("annotate-again")                         # another day: only the skipped one is left
    output.get_by_text("2 of 3 labelled").first.wait_for(timeout=LONG)
    output.get_by_text("<img src=x").first.wait_for(timeout=LONG)
    output.get_by_role("button", name="1 plausible").press("Enter")
    output.get_by_text("3 of 3 labelled").first.wait_for(timeout=LONG)
    assert [row.rpartition(",")[2] for row in rows()] == ["not", "plausible", "unclear"]
    assert not seen.errors
    seen.page.context.close()


# ── the screenshots' own test ────────────────────────────────────────────────────────────────────────────────────────

def test_screens_tell_pages_apart():
    "The comparison is loose, but no page passes for another."
    from PIL import Image
    kept = {f.stem: Image.open(f) for f in sorted(SCREENS.glob("*.png"))}
    assert len(kept) >= 10 and all(p.size == (48, 30) for p in kept.values())
    for name, one in kept.items():
        assert [other for other, p in kept.items() if alike(one, p) > .76] == [name]
