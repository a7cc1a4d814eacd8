"The tables of the method cards from the clauses of the recipes: `make pages` writes them into nbs/methods/*.qmd."
from __future__ import annotations

import re
from pathlib import Path

from subnet_explorer.recipes.clauses import clause_table
from subnet_explorer.recipes.study import find_recipe

HERE = Path(__file__).resolve().parent / "methods"
CARDS = {"lamp": "lamp", "tickets": "tickets", "critical": "critical", "probing": "probe", "tamt": "tamt"}
"The recipe of every card."
PLACE = re.compile(r"(<!-- clauses -->\n).*?(<!-- end of clauses -->)", re.S)


def table(name: str) -> str:
    "The clauses of a recipe in Markdown."
    rows = clause_table(find_recipe(name).clauses)
    lines = [list(rows.columns), ["---"] * len(rows.columns), *rows.to_numpy().tolist()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cards() -> dict[Path, str]:
    "Every card with its table as it should be."
    made = {}
    for card, name in CARDS.items():
        path = HERE / f"{card}.qmd"
        made[path] = PLACE.sub(rf"\g<1>{table(name)}\g<2>", path.read_text(encoding="utf-8"))
    return made


if __name__ == "__main__":
    for path, text in cards().items(): path.write_text(text, encoding="utf-8")
