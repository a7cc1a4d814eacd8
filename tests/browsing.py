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
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).resolve().parent.parent
SHOTS = ROOT / "build" / "screenshots"          # ignored by git; CI keeps it
SCREENS = ROOT / "tests" / "screens"             # small, and kept
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@contextmanager
def chromium(path: str) -> Iterator[Browser]:
    "A browser, closed at the end."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=QUIET)
        try: yield browser
        finally: browser.close()


@dataclass
class Opened:
    "A page, what it asked the network for, and what it complained about."
    page: Page
    asked: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def of_jupyterlab(error: Any) -> bool:
    "Whether JupyterLab's own scripts are at fault, which fail now and then while a kernel is chosen."
    scripts = re.findall(r"https?://[^\s)]+", error.stack or "")
    return bool(scripts) and all("/static/lab/" in script for script in scripts)


def opened(
    browser: Browser,
    where: str | Path,              # a file; or with `local`, an address on this machine
    scheme: Literal["light", "dark"] = "light",
    wait: int = 800,                # milliseconds after loading
    local: bool = False,
) -> Opened:
    "Open a file with the network off; or an address on this machine, with everything beyond it blocked."
    here = ("127.0.0.1", "localhost") if local else ()

    def beyond(url: str) -> bool:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https", "ws", "wss") and parts.hostname not in here

    context = browser.new_context(offline=not local, color_scheme=scheme, viewport={"width": 1280, "height": 900})
    out = Opened(context.new_page())
    if local: context.route("**/*", lambda r: r.abort() if beyond(r.request.url) else r.continue_())
    out.page.on("request", lambda r: out.asked.append(r.url) if beyond(r.url) else None)
    out.page.on("pageerror", lambda e: None if of_jupyterlab(e) else out.errors.append(str(e)))
    if not local: out.page.on("console", lambda m: out.errors.append(m.text) if m.type == "error" else None)
    out.page.goto(str(where) if local else Path(where).as_uri(), wait_until="load")
    out.page.wait_for_timeout(wait)
    return out


RULES = {"preload": False, "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}


def violations(page: Page, within: str | None = None) -> list[str]:      # within: CSS selector of a part of the page
    "What axe-core finds serious or critical on a page, or in a part of it."
    from axe_playwright_python.sync_playwright import Axe
    found = Axe().run(page, context=within, options=RULES).response["violations"]
    grave = [v for v in found if v["impact"] in ("serious", "critical")]
    return [f"{v['impact']} {v['id']}: {v['nodes'][0]['html'][:160]}" for v in grave]


# ── screenshots ──────────────────────────────────────────────────────────────────────────────────────────────────────

WRITE = "run once with SUBNET_EXPLORER_SCREENS=write"


def shot(page: Page, name: str, whole: bool = True, like: bool = True) -> None:
    "Keep a screenshot; something is on it, and with `like` it looks much as the one that is kept in tests/screens."
    from PIL import Image
    SHOTS.mkdir(parents=True, exist_ok=True)
    made, kept = SHOTS / f"{name}.png", SCREENS / f"{name}.png"
    page.screenshot(path=made, full_page=whole)
    image = Image.open(made).convert("RGB")
    assert image.width >= 800 and image.height >= 400, f"{name} is {image.size}"
    counts = [n for n, _ in image.getcolors(1 << 24) or []]
    common = max(counts) / (image.width * image.height)
    assert len(counts) > 40 and common < .995, f"{name} looks blank"
    if not like: return
    if os.environ.get("SUBNET_EXPLORER_SCREENS") == "write": small(image).save(kept)
    assert kept.exists(), f"there is no {kept} to compare with: look at {made}, and if it is right, {WRITE}"
    share = alike(small(image), Image.open(kept))
    hint = f"see {made}; if the new look is right, {WRITE}"
    assert share > .76, f"{name} looks like {kept.name} in {share:.0%} of what is on it: {hint}"


def small(image: Image) -> Image:
    "A picture in 48 × 30 shades of grey: where things are, but no letters."
    from PIL import Image
    return image.convert("L").resize((48, 30), Image.Resampling.BOX)


def alike(one: Any, other: Any) -> float:
    """Compare two small pictures: the share of what stands out in either that the other has there or right beside.

    0 if one is light and the other dark.
    """
    a, b = np.asarray(one, int), np.asarray(other, int)
    if abs(np.median(a) - np.median(b)) > 40: return 0.0
    a, b = abs(a - np.median(a)) > 8, abs(b - np.median(b)) > 8
    return float(((a & beside(b)).sum() + (b & beside(a)).sum()) / max(1, a.sum() + b.sum()))


def beside(marked: np.ndarray) -> np.ndarray:      # (30, 48)
    "Where something is marked, or right beside."
    wide = np.pad(marked, 1)
    steps = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))
    return np.any([wide[1 + i:31 + i, 1 + j:49 + j] for i, j in steps], axis=0)


# ── JupyterLab ───────────────────────────────────────────────────────────────────────────────────────────────────────

LAB = (
    "--no-browser", "--allow-root", "--ip=127.0.0.1", "--IdentityProvider.token=", "--ServerApp.password=",
    "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
)
OWN = {
    "JUPYTER_CONFIG_DIR": "config",
    "JUPYTER_DATA_DIR": "data",
    "JUPYTER_RUNTIME_DIR": "runtime",
    "IPYTHONDIR": "ipython",
    "JUPYTERLAB_SETTINGS_DIR": "settings",
    "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
}


def started(folder: Path, port: int, log: Any) -> subprocess.Popen:
    "A JupyterLab with settings of its own."
    own = {variable: str(folder / ".jupyter" / name) for variable, name in OWN.items()}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, "-m", "jupyterlab", *LAB, f"--port={port}", f"--ServerApp.root_dir={folder}"]
    environment = {**os.environ, **own, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment)


def answers(address: str) -> bool:
    "Whether JupyterLab is there."
    try: urllib.request.urlopen(f"{address}/api/status", timeout=2).close()
    except OSError: return False
    return True


@contextmanager
def lab(folder: Path) -> Iterator[str]:
    "Start JupyterLab on a folder; gives its address."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = (folder / "lab.log").open("w")
    server = started(folder, port, log)
    address, until = f"http://127.0.0.1:{port}", time.monotonic() + 60
    SHOTS.mkdir(parents=True, exist_ok=True)
    try:
        while not answers(address):
            if server.poll() is not None or time.monotonic() > until:
                said = (folder / "lab.log").read_text()[-2000:]
                raise AssertionError(f"JupyterLab did not start:\n{said}")
            time.sleep(.3)
        yield address
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()
        log.close()


KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}


def copied(notebook: str, folder: Path, keep: int | None = None) -> Path:
    """Copy a notebook of nbs/ without outputs and cells that take minutes; of `keep` code cells if that is said.

    Its searches are cut short, so they need not reach what is asserted of them; nbdev_test runs them as they are.
    """
    nb = json.loads((ROOT / "nbs" / notebook).read_text(encoding="utf-8"))
    code = [c for c in nb["cells"] if c["cell_type"] == "code" and not takes_long(c)][:keep]
    nb["cells"] = [c for c in nb["cells"] if c["cell_type"] != "code" or c in code]
    for c in code:
        short = re.sub(r"\bsteps=\d{3,}", "steps=20", "".join(c["source"]))
        c["source"] = re.sub(r"(?m)^(\s*)assert .*$", r"\1pass", short)
        c["outputs"], c["execution_count"] = [], None
    nb["metadata"]["kernelspec"] = KERNEL
    to = folder / Path(notebook).name
    to.write_text(json.dumps(nb), encoding="utf-8")
    images = ROOT / "nbs" / "images"
    if images.is_dir(): shutil.copytree(images, folder / "images", dirs_exist_ok=True)
    return to


def takes_long(cell: dict) -> bool:
    "Whether a cell is marked as slow, or as one that needs more than this machine has."
    return bool(re.search(r"^#\s*\|\s*(slow|gpu|real)\b", "".join(cell["source"]), re.M))


def written(folder: Path, name: str, *cells: str) -> Path:
    "A notebook of code cells."
    import nbformat
    v4, to = nbformat.v4, folder / f"{name}.ipynb"
    nb = v4.new_notebook(cells=[v4.new_code_cell(c) for c in cells], metadata={"kernelspec": KERNEL})
    nbformat.write(nb, to)
    return to


def in_lab(browser: Browser, address: str, notebook: Path) -> Opened:
    "Open a notebook in JupyterLab and wait until its kernel is there."
    where = f"{address}/lab/workspaces/{notebook.stem}/tree/{notebook.name}?reset"
    seen = opened(browser, where, local=True, wait=0)
    dialog = seen.page.locator("dialog.jp-Dialog").first
    seen.page.add_locator_handler(dialog, lambda: settle(seen.page))                # one may come at any time
    for part in (".jp-Notebook .jp-Cell", ".jp-Notebook-ExecutionIndicator[data-status=idle]"):
        seen.page.locator(part).first.wait_for(timeout=180_000)
    return seen


def settle(page: Page) -> None:
    "Answer a dialog as a reader would, with its default; an error in it is an error."
    for _ in range(3):
        dialog = page.locator("dialog.jp-Dialog").first
        if not dialog.is_visible(): return
        text = dialog.inner_text()
        if "error" in text.lower():
            page.screenshot(path=SHOTS / "dialog.png")
            raise AssertionError(f"JupyterLab says: {text}")
        print("dialog:", text)
        try: dialog.locator("button.jp-mod-accept").click(timeout=10_000)
        except Exception:                                                           # the handler of `in_lab` was faster
            if dialog.is_visible(): raise
        page.wait_for_timeout(500)


def press_run(page: Page) -> None:
    "Run all cells from the menu, as a reader would."
    prompts = page.locator(".jp-CodeCell .jp-InputPrompt")
    for _ in range(3):                                                              # the front end may not listen yet
        settle(page)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.wait_for_timeout(300)
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.wait_for_timeout(1500)
        if any(re.search(r"[\d*]", p) for p in prompts.all_inner_texts()): break


def saved_code(page: Page, notebook: Path) -> list[dict]:
    "Save the notebook and read its code cells; none while it is being written."
    page.keyboard.press("Control+s")
    page.wait_for_timeout(500)
    try: cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except ValueError: return []
    return [c for c in cells if c["cell_type"] == "code"]


def run_all(seen: Opened, notebook: Path, timeout: float = 300) -> list[dict]:
    "Run all cells from the menu; give the saved code cells; fail on the first error."
    page, until = seen.page, time.monotonic() + timeout
    press_run(page)
    while True:
        page.wait_for_timeout(1500)
        cells = saved_code(page, notebook)
        outputs = [o for c in cells for o in c["outputs"]]
        wrong = [(o["ename"], o["evalue"]) for o in outputs if o["output_type"] == "error"]
        if wrong: raise AssertionError(f"{notebook.name}: {wrong}")
        todo = [c for c in cells if "".join(c["source"]).strip() and not c["execution_count"]]
        if cells and not todo: return cells
        if time.monotonic() > until:
            page.screenshot(path=SHOTS / f"failed-{notebook.stem}.png")
            raise AssertionError(f"{notebook.name} did not finish: {len(todo)} of {len(cells)} cells are left")
