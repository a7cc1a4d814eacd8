"The documentation: pages are listed, links lead somewhere, errors are explained, notebooks go through nbdev."
from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"


def inside(path: Path) -> str: return path.relative_to(NBS).as_posix()


def is_page(path: Path) -> bool:
    "Whether a file is a page of the documentation, and not of a run or of a tool."
    parts = path.relative_to(NBS).parts
    return path.suffix in (".ipynb", ".qmd") and not any(p.startswith((".", "_")) or p == "runs" for p in parts)


PAGES = sorted(p for p in NBS.rglob("*.*") if is_page(p))
pages = pytest.mark.parametrize("page", PAGES, ids=inside)


def prose(path: Path) -> str:
    "What a page says, without its code."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".qmd": return re.sub(r"```.*?```", "", text, flags=re.S)
    return "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")


def listed(entry: object) -> list[str]:
    "Pages of a sidebar or navbar; `auto` stands for all pages of a folder."
    if isinstance(entry, str): return [entry]
    if isinstance(entry, list): return [page for part in entry for page in listed(part)]
    assert isinstance(entry, dict)
    if "auto" in entry: return [inside(p) for p in PAGES if p.parent == NBS / entry["auto"]]
    return [page for key in ("contents", "left", "href") if key in entry for page in listed(entry[key])]


def website(name: str) -> dict:
    return yaml.safe_load((NBS / name).read_text(encoding="utf-8"))["website"]


def test_the_sidebar_has_every_page_once():
    found = listed(website("sidebar.yml")["sidebar"])
    assert sorted(found) == [inside(p) for p in PAGES], "add the new page to nbs/sidebar.yml"
    assert all((NBS / page).is_file() for page in listed(website("proc.yml")["navbar"]))


def rendered(page: Path) -> str:
    "The file that nbdev makes of a page: numbers are left out."
    return f"{page.parent}/{re.sub(r'^[0-9]+[a-z]?_', '', page.stem)}.html"


@pages
def test_links_lead_somewhere(page):
    made = {rendered(p) for p in PAGES}
    for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)\s#]+)", prose(page)):
        place = (page.parent / target).resolve()
        found = str(place) in made if target.endswith(".html") else place.is_file()
        assert found, f"{page.name} links to {target}"


def test_no_two_pages_become_one():
    assert len({rendered(p) for p in PAGES}) == len(PAGES)


def test_every_error_is_explained():
    made = runpy.run_path(str(NBS / "errors.py"))
    errors, folder = made["named_errors"](), NBS / "errors"
    assert len(errors) >= 20
    assert set(errors) == set(made["EXAMPLES"]), "every error needs an example, or None, in nbs/errors.py"
    for name, error in errors.items():
        said = made["parts"](error)
        explained = said["symptom"].endswith(".") and len(said.get("cause", "")) > 30 and len(said.get("fix", "")) > 20
        assert explained, f"{name}: its docstring needs a Cause: and a Fix: line"
    texts = made["pages"]()
    assert {name: (folder / name).read_text(encoding="utf-8") for name in texts} == texts, "run make pages"
    assert {p.name for p in folder.glob("*.qmd")} == set(texts)


CARD = (
    "**Paper.**", "**Here.**", "## Equations", "$$", "## What we do differently, and why", "## Published, and ours",
)


def test_method_cards_are_complete():
    from subnet_explorer import recipes
    cards = sorted((NBS / "methods").glob("*.qmd"))
    for card in cards:
        text = card.read_text(encoding="utf-8")
        assert text.startswith("---\ntitle: ")
        if card.stem == "which":
            assert all(f"({other.name})" in text for other in cards if other != card)
            continue
        for part in CARD: assert part in text, f"{card.name} lacks {part}"
        assert all(hasattr(recipes, name) for name in re.findall(r"`recipes\.(\w+)`", text))


def test_cards_have_the_clauses_of_their_recipes():
    made = runpy.run_path(str(NBS / "cards.py"))
    assert set(made["CARDS"]) == {card.stem for card in (NBS / "methods").glob("*.qmd")} - {"which"}
    for path, text in made["cards"]().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run make pages"
        assert "| what | here | published | where | published=True | why |" in text


# what nbdev does to notebooks before Quarto sees them
FILTER = """
import os, sys, json
from execnb.nbio import read_nb
from nbdev.processors import FilterDefaults
os.environ["IN_TEST"] = "1"
out = {}
for name in sys.argv[1:]:
    nb = read_nb(name)
    FilterDefaults()(nb)
    out[name] = [[c.cell_type, c.source, "".join(str(o) for o in c.get("outputs", []))] for c in nb.cells]
print("RESULT" + json.dumps(out))
"""


def filtered(names: list[str]) -> dict[str, list[tuple[str, str, str]]]:
    "Cells of notebooks as Quarto sees them: kind, source, outputs."
    command = [sys.executable, "-c", FILTER, *names]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.rpartition("RESULT")[2])


def documented(cells: list[tuple[str, str, str]]) -> list[str]:
    "Outputs of the cells that show a name of the library."
    shown = [(s.rstrip(), out) for _, s, out in cells if "show_doc(" in s and "echo: false" in s]
    return [out for source, out in shown if source.endswith(")")]


def test_notebooks_go_through_nbdev():
    "The half of the build that needs no Quarto: hidden cells go, signatures come from the library."
    made = filtered([p.relative_to(ROOT).as_posix() for p in PAGES if p.suffix == ".ipynb"])
    for name, cells in made.items():
        kind, head, _ = cells[0]
        stem = re.sub(r"^[0-9]+_", "", Path(name).stem)
        assert kind == "raw" and f"output-file: {stem}.html" in head and "title:" in head
        assert not [s for _, s, _ in cells if re.search(r"^#\| ?(hide|default_exp)\b", s, re.M)], name
        shown = documented(cells)
        assert all("text/markdown" in out for out in shown), f"{name}: {len(shown)} names"
        assert shown or not re.match(r"\d\d_", Path(name).name), f"{name} documents nothing"
    shown = [out for _, s, out in made["nbs/core/10_masks.ipynb"] if "show_doc" in s]
    assert len(shown) >= 4 and "Keep what at least `share` of the masks keep" in "".join(shown)
    assert "plotly" in json.dumps(made["nbs/gallery.ipynb"])


def commands(job: dict) -> str:
    "What the steps of a job run or use."
    return " ".join(step.get("run", step.get("uses", "")) for step in job["steps"])


def test_workflows_are_valid():
    "YAML that says what it should: systems, versions, both halves; actions by version."
    files = (ROOT / ".github" / "workflows").glob("*.yml")
    flows = {p.stem: yaml.safe_load(p.read_text(encoding="utf-8")) for p in files}
    assert set(flows) == {"test", "docs"}
    for flow in flows.values():
        assert {"push", "pull_request", "workflow_dispatch"} & set(flow[True])      # `on` is a boolean in YAML 1.1
        assert flow["permissions"] == {"contents": "read"}
        for job in flow["jobs"].values():
            assert job["runs-on"] and all(("uses" in s) != ("run" in s) for s in job["steps"])
            used = [s["uses"] for s in job["steps"] if "uses" in s]
            assert all(re.fullmatch(r"[\w-]+/[\w./-]+@v\d+", action) for action in used)
    test, docs = flows["test"]["jobs"]["test"], flows["docs"]["jobs"]
    matrix = test["strategy"]["matrix"]
    assert matrix["python"] == ["3.11", "3.12", "3.13"]
    assert {m.split("-")[0] for m in matrix["os"]} == {"ubuntu", "macos"}
    needed = ("nbdev_test", "pytest", "nbdev_export && nbdev_clean && git diff --exit-code")
    assert all(words in commands(test) for words in needed)
    assert "quarto-dev/quarto-actions/setup" in commands(docs["build"])
    assert "deploy-pages" in commands(docs["deploy"])
    for file in ("_quarto.yml", "nbs/root.yml"): assert yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
