"What people see: reports and figures in a real browser, with the network off."
import shutil
from pathlib import Path

import pytest

from subnet_explorer import load, plots, read_facts, recipes

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    model, tok = load("pocket-bert")
    study = recipes.lamp(model, tok, read_facts("pocket", "MadeOf,Desires,HasA"), steps=20, random=1, progress=False)
    return recipes.lamp_report(study, model, tok, tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"])
        yield b
        b.close()


def opened(browser, path):
    "The page, the addresses it asked for, and its errors."
    context = browser.new_context(offline=True)
    page, asked, errors = context.new_page(), [], []
    page.on("request", lambda r: asked.append(r.url))
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.goto(Path(path).as_uri(), wait_until="load")
    page.wait_for_timeout(1500)
    return page, [u for u in asked if not u.startswith(("file:", "data:", "about:", "blob:"))], errors


def test_the_report_stands_alone(report, browser):
    page, asked, errors = opened(browser, report)
    assert asked == [] and errors == []
    assert page.locator("h1").inner_text() == "Relation-specific subnetworks of pocket-bert"
    assert page.locator(".js-plotly-plot .main-svg").count() >= 5                      # every figure is drawn …
    assert page.locator(".js-plotly-plot .hm image, .js-plotly-plot .heatmaplayer image").count() >= 3   # … with its heat-maps
    for name in ("full", "subnetwork", "random", "mismatched", "majority"): assert page.get_by_role("cell", name=name, exact=True).count() >= 1
    assert page.locator("[role=img][aria-label]").count() >= 5                         # and says in words what it shows


def test_attention_views_react(report, browser):
    page, *_ = opened(browser, report)
    frame = page.frame_locator("iframe").first
    lines = frame.locator("svg line")
    before = lines.evaluate_all("ls => ls.map(l => l.getAttribute('stroke-opacity') + l.getAttribute('stroke')).join()")
    select = frame.locator("select").first
    select.select_option(index=select.locator("option").count() - 1)
    page.wait_for_timeout(500)
    assert lines.count() > 0 and lines.evaluate_all("ls => ls.map(l => l.getAttribute('stroke-opacity') + l.getAttribute('stroke')).join()") != before


def test_text_from_data_stays_text(tmp_path, browser):
    import pandas as pd
    evil = "<script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"
    figure = plots.bars(pd.DataFrame({"condition": [evil, "b"], "value": [.5, .2]}), title=evil)
    page, asked, errors = opened(browser, plots.report(tmp_path / "r.html", evil, [(evil, evil, [figure, pd.DataFrame({evil: [evil]})])]))
    assert page.title() != "broken" and errors == [] and asked == []
    assert evil in page.locator("h1").inner_text()
    alone, *_ = opened(browser, figure.save(tmp_path / "f.html"))
    assert alone.title() != "broken" and alone.locator(".main-svg").count() >= 1


def test_saved_figures_need_no_browser(tmp_path):
    import xml.etree.ElementTree as ET

    from PIL import Image
    model, _ = load("pocket-bert")
    from subnet_explorer import Mask, Space
    figure = plots.density(Mask.random(Space.of(model, "weight"), .5, seed=0))
    svg, png, pdf = (figure.save(tmp_path / f"f.{kind}") for kind in ("svg", "png", "pdf"))
    text = " ".join(t for t in ET.parse(svg).getroot().itertext() if t.strip())
    assert "layer 1" in text and "share kept" in text
    assert Image.open(png).size[0] > 500 and pdf.read_bytes()[:5] == b"%PDF-"
    with pytest.raises(plots.CannotDraw): figure.save(tmp_path / "f.bmp")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.pdf", "f.png", "f.svg"]
