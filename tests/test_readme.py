"The README is the index notebook, and what it points to exists."
import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_readme_is_made_from_the_index():
    made = runpy.run_path(str(ROOT / "nbs" / "readme.py"))["readme"]()
    assert made == (ROOT / "README.md").read_text(encoding="utf-8"), "run make readme"


def test_links_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text): assert (ROOT / target).exists(), (name, target)
