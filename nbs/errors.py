"Pages about errors from their classes: `make pages` writes nbs/errors/*.qmd; the docstrings say cause and fix, and every example is run."
from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")      # examples ask nobody

import ast
import re
import tempfile
import textwrap
from functools import cache
from importlib import import_module
from pathlib import Path

from subnet_explorer.core.errors import SubnetError

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "nbs" / "errors"

# what raises each error, in few words; `here` is an empty folder
EXAMPLES = {
    "SubnetError": "from subnet_explorer import Mask, Space, load\nmodel, tok = load('pocket-bert')\nMask.random(Space.of(model, 'head'), 1.5, seed=0)",
    "SpaceMismatch": "from subnet_explorer import Mask, Space, load\nmodel, tok = load('pocket-bert')\nMask.full(Space.of(model, 'head')) & Mask.full(Space.of(model, 'mlp'))",
    "UnknownFamily": "from transformers import ViTConfig, ViTModel\nfrom subnet_explorer import Space\nvision = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8))\nSpace.of(vision, 'head')",
    "UnknownName": "from subnet_explorer import Space, load\nmodel, tok = load('pocket-bert')\nSpace.of(model, 'heads')",
    "LayerRange": "from subnet_explorer import Space, load\nmodel, tok = load('pocket-bert')\nSpace.of(model, 'head', layers='3-9')",
    "MaskFileError": "from subnet_explorer import Mask\nMask.load('made-of.mask.safetensors')",
    "BadFacts": "from subnet_explorer import read_facts\nopen('facts.jsonl', 'w').write('a sparrow can fly')\nread_facts('facts.jsonl')",
    "BadPrompt": None,          # readers of files say it as BadFacts, with file and line
    "BadTexts": "from subnet_explorer import read_texts\nopen('texts.txt', 'w').close()\nread_texts('texts.txt')",
    "BadSentences": "from subnet_explorer import read_conllu\nopen('train.conllu', 'w').close()\nread_conllu('train.conllu')",
    "BadTable": "from subnet_explorer import read_glue\nread_glue('RTE.tsv', task='RTE')",
    "BadChoices": "from subnet_explorer import read_choices\nread_choices('questions.txt')",
    "BadMap": "import numpy as np\nfrom subnet_explorer.maps import check_map\ncheck_map(np.zeros((4, 5)))",
    "BadLabels": "from subnet_explorer.maps import read_labels\nopen('labels.txt', 'w').write('block 0001')\nread_labels('labels.txt')",
    "CannotDraw": "from subnet_explorer import Mask, Space, load, plots\nmodel, tok = load('pocket-bert')\nplots.density(Mask.full(Space.of(model, 'head'))).save('heads.bmp')",
    "UnknownModel": "import os\nfrom subnet_explorer import load\nos.makedirs('bert/empty')\nload('bert')",
    "NoFloor": None,            # needs a model that learned nothing
    "BorrowedWeights": (
        "from subnet_explorer import Cloze, Space, Threshold, find, load, read_facts\n"
        "model, tok = load('pocket-bert')\n"
        "class Tuned(Cloze):\n"
        "    def modules(self): return [model.bert]\n"
        "find(model, tok, Threshold(Space.of(model, 'weight')), Tuned(read_facts('pocket', 'MadeOf')))"
    ),
    "Diverged": None,           # needs a search that diverges
    "WrongProcesses": None,     # needs a launcher
    "OtherRun": "from subnet_explorer import Run\nRun('runs/a', {'seed': 0})\nRun('runs/a', {'seed': 1})",
    "BadQuestions": "from subnet_explorer import read_squad\nopen('train.json', 'w').write('[]')\nread_squad('train.json')",
    "MisplacedAnswers": "import json\nfrom subnet_explorer import read_squad\nasked = {'id': '1', 'question': 'Who sang?', 'answers': [{'text': 'Anna', 'answer_start': 4}]}\nopen('train.json', 'w').write(json.dumps({'data': [{'title': 't', 'paragraphs': [{'context': 'Anna sang.', 'qas': [asked]}]}]}))\nread_squad('train.json')",
    "NotExpressible": "from subnet_explorer import Mask, Space, compact, load\nmodel, tok = load('pocket-bert')\ncompact(model, Mask.random(Space.of(model, 'head'), .5, seed=0)).export('small')",
    "BadMasks": "from subnet_explorer import Store\nStore.read('masks')",
}


def named_errors() -> dict[str, type[SubnetError]]:
    "Public errors of all modules by name, the base first."
    found: dict[str, type[SubnetError]] = {"SubnetError": SubnetError}
    for file in sorted((ROOT / "subnet_explorer").glob("*.py")):
        if file.stem.startswith("_"): continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef) or node.name.startswith("_"): continue
            if issubclass(made := getattr(import_module(f"subnet_explorer.{file.stem}"), node.name), SubnetError): found[node.name] = made
    return found


def parts(error: type[SubnetError]) -> dict[str, str]:
    "Symptom, cause and fix of a docstring."
    first, _, rest = (error.__doc__ or "").partition("\n")
    said = re.findall(r"^\s*(Cause|Fix): (.+?)(?=^\s*(?:Cause|Fix): |\Z)", rest, re.M | re.S)      # either may go on in further lines
    return {"symptom": first.strip()} | {k.lower(): " ".join(v.split()) for k, v in said}


@cache
def raises() -> dict[str, set[tuple[str, str]]]:
    "Modules and functions or classes that raise each error."
    found: dict[str, set[tuple[str, str]]] = {}
    for file in sorted((ROOT / "subnet_explorer").glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)): continue
            for n in ast.walk(node):
                if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call) and isinstance(n.exc.func, ast.Name): found.setdefault(n.exc.func.id, set()).add((file.stem, node.name))
    return found


def message(code: str, name: str) -> str:
    "What an example says when it is run in an empty folder."
    from contextlib import chdir
    with tempfile.TemporaryDirectory() as here, chdir(here):
        try: exec(code, {})
        except SubnetError as e:
            if type(e).__name__ != name: raise
            return re.sub(r"\((?:We|Can|Unrec|bert )[^)]*\)", "(…)", f"{name}: {e}".replace(here + "/", ""))      # other libraries' words differ by version
    raise AssertionError(f"the example of {name} raises nothing")


def page(name: str, error: type[SubnetError]) -> str:
    "The page of one error."
    p, module = parts(error), error.__module__.rpartition(".")[2]
    notebook = {f.stem[3:]: f"../{f.name}" for f in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))}
    where = sorted(raises().get(name, ()) if name != "SubnetError" else ())
    public = [(m, f) for m, f in where if not f.startswith("_")]
    home = sorted({m for m, _ in where})
    text = [f"---\ntitle: {name}\ndescription: \"{p['symptom']}\"\n---", p["symptom"], "## Symptom"]
    if EXAMPLES.get(name): text += ["```python\n" + EXAMPLES[name] + "\n```", "```text\n" + "\n".join(textwrap.wrap(message(EXAMPLES[name], name), 110)) + "\n```"]
    else: text += [f"A traceback that ends with `{name}:` and the sentence that says what was found."]
    text += ["## Cause", p["cause"], "## Fix", p["fix"]]
    if home: text += ["## Where it comes from", "Raised in " + ", ".join(f"[{m}]({notebook[m]})" for m in home) + (": " + ", ".join(f"`{m}.{f}`" for m, f in public) if public else "") + "."]
    text += [f"Defined in [{module}]({notebook[module]}). To catch it:", f"```python\nfrom subnet_explorer.{module} import {name}\n```", "[All errors](index.qmd)"]
    return "\n\n".join([text[0], "<!-- made from the docstring by make pages: edit that -->", *text[1:]]) + "\n"


def pages() -> dict[str, str]:
    "All pages by file name."
    errors = named_errors()
    rows = "\n".join(f"| [{n}]({n}.qmd) | {parts(e)['symptom']} |" for n, e in errors.items())
    index = f"---\ntitle: Errors\ndescription: \"Every named error: symptom, cause, fix\"\n---\n\nThe library refuses at the door what cannot work, and says what was expected, what was found and what to do. All of these are a `SubnetError`, so one `except` catches them; anything else is a bug. The shell prints them in one line and ends with status 2.\n\n| error | symptom |\n|---|---|\n{rows}\n"
    return {"index.qmd": index} | {f"{n}.qmd": page(n, e) for n, e in errors.items()}


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    made = pages()
    for old in set(f.name for f in HERE.glob("*.qmd")) - set(made): (HERE / old).unlink()
    for name, text in made.items(): (HERE / name).write_text(text, encoding="utf-8")
