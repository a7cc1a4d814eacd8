"A browser for tests: pages with the network off, JupyterLab on this machine, accessibility, screenshots that are kept."
from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SHOTS = ROOT / "build" / "screenshots"          # ignored by git; CI keeps it
SCREENS = ROOT / "tests" / "screens"             # small, and kept
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@contextmanager
def chromium(path: str) -> Iterator:
    "A browser, closed at the end."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=QUIET)
        try: yield browser
        finally: browser.close()


@dataclass
class Opened:
    "A page, what it asked the network for, and what it complained about."
    page: object
    asked: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def opened(browser, where: str | Path, scheme: str = "light", wait: int = 800, local: bool = False) -> Opened:
    "Open a file with the network off; or an address on this machine, with everything beyond it blocked."
    context = browser.new_context(offline=not local, color_scheme=scheme, viewport={"width": 1280, "height": 900})
    out = Opened(context.new_page())
    beyond = lambda url: urlsplit(url).scheme in ("http", "https", "ws", "wss") and not (local and urlsplit(url).hostname in ("127.0.0.1", "localhost"))
    if local: context.route("**/*", lambda r: r.abort() if beyond(r.request.url) else r.continue_())
    out.page.on("request", lambda r: out.asked.append(r.url) if beyond(r.url) else None)
    out.page.on("pageerror", lambda e: out.errors.append(str(e)))
    if not local: out.page.on("console", lambda m: out.errors.append(m.text) if m.type == "error" else None)
    out.page.goto(where if local else Path(where).as_uri(), wait_until="load")
    out.page.wait_for_timeout(wait)
    return out


def violations(page, within: str | None = None) -> list[str]:      # within: CSS selector of a part of the page
    "What axe-core finds serious or critical on a page, or in a part of it."
    from axe_playwright_python.sync_playwright import Axe
    found = Axe().run(page, context=within, options={"preload": False, "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}).response["violations"]
    return [f"{v['impact']} {v['id']}: {v['nodes'][0]['html'][:160]}" for v in found if v["impact"] in ("serious", "critical")]


def shot(page, name: str, whole: bool = True, like: bool = True) -> None:
    "Keep a screenshot; see that something is on it, and that it looks roughly like the one that is kept in tests/screens."
    from PIL import Image
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=whole)
    image = Image.open(SHOTS / f"{name}.png").convert("RGB")
    assert image.width >= 800 and image.height >= 400, f"{name} is {image.size}"
    common = max(n for n, _ in image.getcolors(1 << 24)) / (image.width * image.height)
    assert len(image.getcolors(1 << 24)) > 40 and common < .995, f"{name} looks blank"
    if not like: return
    kept = SCREENS / f"{name}.png"
    if os.environ.get("SUBNET_EXPLORER_SCREENS") == "write": small(image).save(kept)
    assert kept.exists(), f"there is no {kept} to compare with: look at {SHOTS / name}.png, and if it is right, run once with SUBNET_EXPLORER_SCREENS=write"
    share = alike(small(image), Image.open(kept))
    assert share > .76, f"{name} looks like {kept.name} in {share:.0%} of what is on it: see {SHOTS / name}.png; if the new look is right, run once with SUBNET_EXPLORER_SCREENS=write"


def small(image):
    "A picture in 48 × 30 shades of grey: where things are, but no letters."
    from PIL import Image
    return image.convert("L").resize((48, 30), Image.Resampling.BOX)


def alike(*pictures) -> float:
    "Share of what stands out in either of two small pictures that the other one has there or right beside; 0 if one is light and the other dark."
    a, b = (np.asarray(p, int) for p in pictures)
    if abs(np.median(a) - np.median(b)) > 40: return 0.0
    a, b = (abs(x - np.median(x)) > 8 for x in (a, b))
    beside = lambda m: sum(np.pad(m, 1)[1 + i:31 + i, 1 + j:49 + j] for i, j in ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))) > 0
    return float(((a & beside(b)).sum() + (b & beside(a)).sum()) / max(1, a.sum() + b.sum()))


# ── JupyterLab ───────────────────────────────────────────────────────────────────────────────────────────────────────

@contextmanager
def lab(folder: Path) -> Iterator[str]:
    "Start JupyterLab on a folder, with settings of its own; gives its address."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    own = {f"JUPYTER_{n}_DIR": str(folder / ".jupyter" / n.lower()) for n in ("CONFIG", "DATA", "RUNTIME")} | {"IPYTHONDIR": str(folder / ".jupyter" / "ipython"), "JUPYTERLAB_SETTINGS_DIR": str(folder / ".jupyter" / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / ".jupyter" / "workspaces")}
    log = (folder / "lab.log").open("w")
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1", "--IdentityProvider.token=", "--ServerApp.password=", "--LabApp.news_url=None",
                               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", f"--ServerApp.root_dir={folder}"], stdout=log, stderr=log, cwd=folder,
                              env={**os.environ, **own, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep), "HF_HUB_OFFLINE": "1"})
    address, until = f"http://127.0.0.1:{port}", time.monotonic() + 60
    SHOTS.mkdir(parents=True, exist_ok=True)
    try:
        while True:
            try: urllib.request.urlopen(f"{address}/api/status", timeout=2).close(); break
            except OSError:
                if server.poll() is not None or time.monotonic() > until: raise AssertionError("JupyterLab did not start:\n" + (folder / "lab.log").read_text()[-2000:]) from None
                time.sleep(.3)
        yield address
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()
        log.close()


def copied(notebook: str, folder: Path, keep: int | None = None) -> Path:
    "A copy of a notebook of nbs/ without outputs and cells that take minutes, its searches cut short (nbdev_test runs them as they are); of the first `keep` code cells if that is said."
    nb = json.loads((ROOT / "nbs" / notebook).read_text(encoding="utf-8"))
    nb["cells"] = [c for c in nb["cells"] if not (c["cell_type"] == "code" and re.search(r"^#\s*\|\s*(slow|gpu|real)\b", "".join(c["source"]), re.M))]
    code = [c for c in nb["cells"] if c["cell_type"] == "code"][:keep]
    nb["cells"] = [c for c in nb["cells"] if c["cell_type"] != "code" or c in code]
    for c in code: c["outputs"], c["execution_count"], c["source"] = [], None, re.sub(r"(?m)^(\s*)assert .*$", r"\1pass", re.sub(r"\bsteps=\d{3,}", "steps=20", "".join(c["source"])))      # cut short, they need not reach their targets
    nb["metadata"]["kernelspec"] = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    (to := folder / Path(notebook).name).write_text(json.dumps(nb), encoding="utf-8")
    if (images := ROOT / "nbs" / "images").is_dir(): shutil.copytree(images, folder / "images", dirs_exist_ok=True)
    return to


def written(folder: Path, name: str, *cells: str) -> Path:
    "A notebook of code cells."
    import nbformat
    v4 = nbformat.v4
    nb = v4.new_notebook(cells=[v4.new_code_cell(c) for c in cells], metadata={"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}})
    nbformat.write(nb, to := folder / f"{name}.ipynb")
    return to


def in_lab(browser, address: str, notebook: Path) -> Opened:
    "Open a notebook in JupyterLab and wait until its kernel is there."
    seen = opened(browser, f"{address}/lab/workspaces/{notebook.stem}/tree/{notebook.name}?reset", local=True, wait=0)
    dialog = seen.page.locator("dialog.jp-Dialog").first
    seen.page.add_locator_handler(dialog, lambda: settle(seen.page))                         # one may come at any time
    seen.page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=180_000)
    seen.page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for(timeout=180_000)
    return seen


def settle(page) -> None:
    "Answer a dialog as a reader would, with its default; an error in it is an error."
    for _ in range(3):
        if not (dialog := page.locator("dialog.jp-Dialog").first).is_visible(): return
        text = dialog.inner_text()
        if "error" in text.lower(): page.screenshot(path=SHOTS / "dialog.png"); raise AssertionError(f"JupyterLab says: {text}")
        print("dialog:", text)
        try: dialog.locator("button.jp-mod-accept").click(timeout=10_000)
        except Exception:                                                                    # answered meanwhile, by the handler of `in_lab`
            if dialog.is_visible(): raise
        page.wait_for_timeout(500)


def run_all(seen: Opened, notebook: Path, timeout: float = 300) -> list[dict]:
    "Run all cells from the menu, as a reader would; give the saved code cells, and fails on the first error."
    page = seen.page
    until, prompts = time.monotonic() + timeout, page.locator(".jp-CodeCell .jp-InputPrompt")
    for _ in range(3):                                                                       # a click may come before the front end listens
        settle(page)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.wait_for_timeout(300)
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.wait_for_timeout(1500)
        if any(re.search(r"[\d*]", p) for p in prompts.all_inner_texts()): break
    while True:
        page.wait_for_timeout(1500)
        page.keyboard.press("Control+s")
        page.wait_for_timeout(500)
        try: cells = [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        except ValueError: continue                                                          # saved right now
        if wrong := [(o["ename"], o["evalue"]) for c in cells for o in c["outputs"] if o["output_type"] == "error"]: raise AssertionError(f"{notebook.name}: {wrong}")
        if all(c["execution_count"] for c in cells if "".join(c["source"]).strip()): return cells
        if time.monotonic() > until: page.screenshot(path=SHOTS / f"failed-{notebook.stem}.png")
        assert time.monotonic() < until, f"{notebook.name} did not finish: {sum(bool(c['execution_count']) for c in cells)} of {len(cells)} cells"
