"Write README.md from nbs/index.ipynb: hidden cells out, the rest through nbconvert."
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    nb = nbformat.read(root / "nbs" / "index.ipynb", 4)
    kept = []
    for c in nb.cells:
        if c.cell_type == "code":
            if re.search(r"^#\|\s*hide\s*$", c.source, re.M): continue
            if re.search(r"^#\|\s*echo:\s*false", c.source, re.M): c.source = ""
            c.outputs = [o for o in c.outputs if o.get("name") != "stderr"]
            for o in c.get("outputs", []):                     # text only: README viewers strip styles
                data = o.get("data", {})
                if "text/markdown" in data: data.pop("text/plain", None)
                data.pop("text/html", None)
        kept.append(c)
    nb.cells = kept
    body, _ = MarkdownExporter().from_notebook_node(nb)
    body = re.sub(r"```\w*\n\n```\n", "", body).replace("](images/", "](nbs/images/")
    body = body.replace("\n```\nfrom subnet_explorer", "\n```python\nfrom subnet_explorer")
    body = re.sub(r"\]\((?!http|nbs/)([\w/]+\.ipynb)\)", r"](nbs/\1)", body)
    body = "<!-- made from nbs/index.ipynb by make readme: edit that -->\n" + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"
    (root / "README.md").write_text(body, encoding="utf-8")


if __name__ == "__main__": main()
