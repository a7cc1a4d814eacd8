"The documentation: every page is listed, every link leads somewhere, every error is explained, notebooks go through nbdev."
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
PAGES = sorted(p for kind in ("ipynb", "qmd") for p in NBS.rglob(f"*.{kind}") if not any(part.startswith((".", "_")) or part == "runs" for part in p.relative_to(NBS).parts))


def prose(path: Path) -> str:
    "What a page says, without its code."
    if path.suffix == ".qmd": return re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    return "\n\n".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown")


def listed(entry: object) -> list[str]:
    "Pages of a sidebar or navbar."
    if isinstance(entry, str): return [entry]
    if isinstance(entry, list): return [p for e in entry for p in listed(e)]
    return [p for k, v in entry.items() if k in ("contents", "left", "href") for p in listed(v)]


def test_the_sidebar_has_every_page_once():
    pages = listed(yaml.safe_load((NBS / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"])
    assert sorted(pages) == sorted(p.relative_to(NBS).as_posix() for p in PAGES), "add the new page to nbs/sidebar.yml"
    assert all((NBS / p).is_file() for p in listed(yaml.safe_load((NBS / "proc.yml").read_text(encoding="utf-8"))["website"]["navbar"]))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(NBS).as_posix())
def test_links_lead_somewhere(page):
    rendered = {f"{p.parent}/{re.sub(r'^[0-9]+[a-z]?_', '', p.stem)}.html" for p in PAGES}             # nbdev leaves numbers out
    for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)\s#]+)", prose(page)):
        place = (page.parent / target).resolve()
        assert (str(place) in rendered) if target.endswith(".html") else place.is_file(), f"{page.name} links to {target}"


def test_every_error_is_explained():
    made = runpy.run_path(str(NBS / "errors.py"))
    errors = made["named_errors"]()
    assert len(errors) >= 20 and set(errors) == set(made["EXAMPLES"]), "every error needs an example, or None, in nbs/errors.py"
    for name, error in errors.items():
        said = made["parts"](error)
        assert said["symptom"].endswith(".") and len(said.get("cause", "")) > 30 and len(said.get("fix", "")) > 20, f"{name}: its docstring needs a Cause: and a Fix: line"
    pages = made["pages"]()
    assert {n: (NBS / "errors" / n).read_text(encoding="utf-8") for n in pages} == pages, "run make pages"
    assert {p.name for p in (NBS / "errors").glob("*.qmd")} == set(pages)


def test_method_cards_are_complete():
    for card in (NBS / "methods").glob("*.qmd"):
        text = card.read_text(encoding="utf-8")
        assert text.startswith("---\ntitle: ")
        if card.stem == "which": assert all(f"({c.name})" in text for c in (NBS / "methods").glob("*.qmd") if c != card); continue
        for part in ("**Paper.**", "**Here.**", "## Equations", "$$", "## What we do differently, and why", "## Published, and ours"): assert part in text, f"{card.name} lacks {part}"
        from subnet_explorer import recipes
        assert all(hasattr(recipes, name) for name in re.findall(r"`recipes\.(\w+)`", text))


def test_notebooks_go_through_nbdev():
    "The half of the build that needs no Quarto: hidden cells go, signatures come from the library."
    code = """
import os, sys, json
from pathlib import Path
from execnb.nbio import read_nb
from nbdev.processors import FilterDefaults
os.environ["IN_TEST"] = "1"
out = {}
for name in sys.argv[1:]:
    nb = read_nb(name); FilterDefaults()(nb)
    out[name] = [[c.cell_type, c.source, "".join(str(o) for o in c.get("outputs", []))] for c in nb.cells]
print("RESULT" + json.dumps(out))
"""
    names = [p.relative_to(ROOT).as_posix() for p in PAGES if p.suffix == ".ipynb"]
    run = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    made = json.loads(run.stdout.rpartition("RESULT")[2])
    for name, cells in made.items():
        assert cells[0][0] == "raw" and f"output-file: {re.sub(r'^[0-9]+_', '', Path(name).stem)}.html" in cells[0][1] and "title:" in cells[0][1]
        assert not [s for _, s, _ in cells if re.search(r"^#\| ?(hide|default_exp)\b", s, re.M)], name
        shown = [o for _, s, o in cells if s.rstrip().endswith(")") and "show_doc(" in s and "echo: false" in s]
        assert all("text/markdown" in o for o in shown) and (shown or not re.match(r"\d\d_", Path(name).name)), f"{name}: {len(shown)} names"
    shown = [o for _, s, o in made["nbs/02_masks.ipynb"] if "show_doc" in s]
    assert len(shown) >= 4 and "Keep what at least `share` of the masks keep" in "".join(shown)
    assert "plotly" in json.dumps(made["nbs/gallery.ipynb"])


def test_workflows_are_valid():
    "YAML that says what it should: systems, versions, both halves; actions by version."
    flows = {p.stem: yaml.safe_load(p.read_text(encoding="utf-8")) for p in (ROOT / ".github" / "workflows").glob("*.yml")}
    assert set(flows) == {"test", "docs"}
    for name, flow in flows.items():
        assert {"push", "pull_request", "workflow_dispatch"} & set(flow[True]) and flow["permissions"] == {"contents": "read"}      # `on` is a boolean in YAML 1.1
        for job in flow["jobs"].values():
            assert job["runs-on"] and all(("uses" in s) != ("run" in s) for s in job["steps"])
            assert all(re.fullmatch(r"[\w-]+/[\w./-]+@v\d+", s["uses"]) for s in job["steps"] if "uses" in s)
    matrix = flows["test"]["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.11", "3.12", "3.13"] and {m.split("-")[0] for m in matrix["os"]} == {"ubuntu", "macos"}
    steps = lambda job: " ".join(s.get("run", s.get("uses", "")) for s in job["steps"])
    assert all(w in steps(flows["test"]["jobs"]["test"]) for w in ("nbdev_test", "pytest", "nbdev_export && nbdev_clean && git diff --exit-code"))
    assert "quarto-dev/quarto-actions/setup" in steps(flows["docs"]["jobs"]["build"]) and "deploy-pages" in steps(flows["docs"]["jobs"]["deploy"])
    for file in ("_quarto.yml", "nbs/root.yml"): assert yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
