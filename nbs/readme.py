"README.md from nbs/index.ipynb: hidden cells out, the rest through nbconvert."
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- made from nbs/index.ipynb by make readme: edit that -->"


def is_hidden(cell: nbformat.NotebookNode) -> bool:
    "Whether a cell is marked with `#| hide`."
    return cell.cell_type == "code" and bool(re.search(r"^#\|\s*hide\s*$", cell.source, re.M))


def readme() -> str:
    "The text of the README."
    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    nb.cells = [c for c in nb.cells if not is_hidden(c)]
    for c in nb.cells:
        if c.cell_type != "code": continue
        if re.search(r"^#\|\s*echo:\s*false", c.source, re.M): c.source = ""
        c.outputs = [o for o in c.outputs if o.get("name") != "stderr"]
        for o in c.outputs:                                     # text only: viewers of a README strip styles
            data = o.get("data", {})
            data.pop("text/html", None)
            if "text/markdown" in data: data.pop("text/plain", None)
    body, _ = MarkdownExporter().from_notebook_node(nb)
    body = re.sub(r"```\w*\n\n```\n", "", body)
    body = body.replace("\n```\nfrom subnet_explorer", "\n```python\nfrom subnet_explorer")
    body = re.sub(r"\]\((?!http)([\w/]+\.(?:ipynb|png|qmd))\)", r"](nbs/\1)", body)
    return f"{NOTE}\n" + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
