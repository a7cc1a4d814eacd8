"""Pages about errors from their classes: `make pages` writes nbs/errors/*.qmd.

The docstrings say cause and fix, and every example is run.
"""
from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")      # examples ask nobody

import ast
import re
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import chdir
from functools import cache
from importlib import import_module
from pathlib import Path

import subnet_explorer
from subnet_explorer.core.errors import SubnetError

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "subnet_explorer"
HERE = ROOT / "nbs" / "errors"
FOLDERS = ("core", "data", "model", "search", "measure", "tasks", "look", "recipes")

# what raises each error, in few words, where the folder is empty; None where an example would take too much
EXAMPLES = {
    "SubnetError": """
from subnet_explorer import Mask, Space, load
model, tok = load('pocket-bert')
Mask.random(Space.of(model, 'head'), 1.5, seed=0)
""",
    "SpaceMismatch": """
from subnet_explorer import Mask, Space, load
model, tok = load('pocket-bert')
Mask.full(Space.of(model, 'head')) & Mask.full(Space.of(model, 'mlp'))
""",
    "UnknownFamily": """
from transformers import ViTConfig, ViTModel
from subnet_explorer import Space
config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                   intermediate_size=8, image_size=16, patch_size=8)
Space.of(ViTModel(config), 'head')
""",
    "HiddenWeights": """
from torch.nn.utils import prune
from subnet_explorer import Space, load
model, tok = load('pocket-bert')
prune.random_unstructured(model.bert.encoder.layer[0].output.dense, 'weight', 0.5)
Space.of(model, 'weight')
""",
    "NotPruned": """
from subnet_explorer import interchange, load
model, tok = load('pocket-bert')
interchange.from_prune(model)
""",
    "NotSemiStructured": """
from subnet_explorer import Mask, Space, interchange, load
model, tok = load('pocket-bert')
interchange.semi_structured(model, Mask.full(Space.of(model)))
""",
    "BadAnnotations": """
from subnet_explorer.data.annotations import read_annotations
rows = 'relation,sub,obj,annotator,label\\nIsA,oak,tree,Ada,perhaps\\n'
open('annotations.csv', 'w').write(rows)
read_annotations('annotations.csv')
""",
    "Unpaired": """
import pandas as pd
from subnet_explorer.core.pairs import Pairs
scores = pd.DataFrame({'under': ['subnetwork', 'random'], 'seed': [0, 1], 'score': [.6, .5]})
Pairs(scores, ['seed']).gains()
""",
    "UnknownName": """
from subnet_explorer import Space, load
model, tok = load('pocket-bert')
Space.of(model, 'heads')
""",
    "LayerRange": """
from subnet_explorer import Space, load
model, tok = load('pocket-bert')
Space.of(model, 'head', layers='3-9')
""",
    "MaskFileError": """
from subnet_explorer import Mask
Mask.load('made-of.mask.safetensors')
""",
    "CannotWrite": """
from subnet_explorer.core.files import atomic_write
open('runs', 'w').close()
atomic_write('runs/demo/study.json', '{}')
""",
    "DamagedFile": """
from subnet_explorer.core.tensors import open_sealed
open('weights.safetensors', 'w').close()
open_sealed('weights.safetensors')
""",
    "OutsideFolder": """
from subnet_explorer.core.files import atomic_write, inside
import os
os.makedirs('study')
os.symlink('/', 'study/runs')
with inside('study'): atomic_write('study/runs/mask', 'text')
""",
    "Held": None,               # takes two processes
    "TakenOver": None,          # takes two processes, one of which sleeps for minutes
    "BadFacts": """
from subnet_explorer import read_facts
open('facts.jsonl', 'w').write('a sparrow can fly')
read_facts('facts.jsonl')
""",
    "NothingKnown": """
from subnet_explorer import Fact, Facts, knowledge, load, read_texts
from subnet_explorer.recipes.critical import material
model, tok = load('pocket-gpt2')
birds = knowledge.neighbourhood(knowledge.read_graph('pocket'), 'bird', 15)
wrong = Facts((Fact('IsA', 'robin', 'tool', 'a robin is a kind of [MASK]', 'r'),), 'wrong.tsv')
material(model, tok, wrong, birds, read_texts('pocket'), known=1)
""",
    "BadPrompt": None,          # readers of files say it as BadFacts, with file and line
    "BadTexts": """
from subnet_explorer import read_texts
open('texts.txt', 'w').close()
read_texts('texts.txt')
""",
    "BadSentences": """
from subnet_explorer import read_conllu
open('train.conllu', 'w').close()
read_conllu('train.conllu')
""",
    "BadTable": """
from subnet_explorer import read_glue
read_glue('RTE.tsv', task='RTE')
""",
    "BadChoices": """
from subnet_explorer import read_choices
read_choices('questions.txt')
""",
    "BadMap": """
import numpy as np
from subnet_explorer.measure.maps import check_map
check_map(np.zeros((4, 5)))
""",
    "BadLabels": """
from subnet_explorer.measure.maps import read_labels
open('labels.txt', 'w').write('block 0001')
read_labels('labels.txt')
""",
    "CannotDraw": """
from subnet_explorer import Mask, Space, load, plots
model, tok = load('pocket-bert')
plots.density(Mask.full(Space.of(model, 'head'))).save('heads.bmp')
""",
    "UnknownModel": """
import os
from subnet_explorer import load
os.makedirs('bert/empty')
load('bert')
""",
    "NoFloor": """
from subnet_explorer import Cloze, Space, evaluate, iterate, load, read_facts
model, tok = load('pocket-bert')
facts, heads = read_facts('pocket', 'MadeOf', prompt=1), Space.of(model, 'head')
iterate(model, tok, Cloze(facts), evaluate.Precision(facts), heads, baselines={'majority': 0.95}, progress=False)
""",
    "ModelInUse": """
import torch
from subnet_explorer import Mask, Space, load, masked
model, tok = load('pocket-bert')
optimizer = torch.optim.AdamW(model.parameters())
with masked(model, Mask.full(Space.of(model, 'head'))): optimizer.step()
""",
    "BorrowedWeights": """
from subnet_explorer import Cloze, Space, Threshold, find, load, read_facts
model, tok = load('pocket-bert')
class Tuned(Cloze):
    def modules(self): return [model.bert]
find(model, tok, Threshold(Space.of(model, 'weight')), Tuned(read_facts('pocket', 'MadeOf')))
""",
    "Diverged": None,           # needs a search that diverges
    "WrongProcesses": None,     # needs a launcher
    "NoBackend": """
from subnet_explorer.core.workers import engine
with engine('dask', scheduler='tcp://127.0.0.1:9'): pass
""",
    "OtherVersions": """
from subnet_explorer.core.workers import Job, check_worker, versions
check_worker(Job(b'', versions={**versions(), 'torch': '1.0'}))
""",
    "UnseenFolder": """
from subnet_explorer.core.workers import Job, check_worker
check_worker(Job(b'', folder='/shared/runs/study', claim='5f1d'))
""",
    "OtherWeights": """
from dataclasses import replace
from subnet_explorer import load
from subnet_explorer.model.travel import arrived, place_of
place = place_of(load('pocket-bert')[0])
arrived(replace(place, code='0' * 16), ('another machine', 1))
""",
    "WorkersLost": None,        # takes six workers
    "BadAtlas": """
from subnet_explorer import read_atlas
read_atlas('runs/atlas')
""",
    "LostProcess": None,        # takes two processes, one of which is killed
    "OtherRun": """
from subnet_explorer import Run
Run('runs/a', {'seed': 0})
Run('runs/a', {'seed': 1})
""",
    "BadQuestions": """
from subnet_explorer import read_squad
open('train.json', 'w').write('[]')
read_squad('train.json')
""",
    "MisplacedAnswers": """
import json
from subnet_explorer import read_squad
asked = {'id': '1', 'question': 'Who sang?', 'answers': [{'text': 'Anna', 'answer_start': 4}]}
paragraph = {'context': 'Anna sang.', 'qas': [asked]}
open('train.json', 'w').write(json.dumps({'data': [{'title': 't', 'paragraphs': [paragraph]}]}))
read_squad('train.json')
""",
    "NotExpressible": """
from subnet_explorer import Mask, Space, compact, load
model, tok = load('pocket-bert')
compact(model, Mask.random(Space.of(model, 'head'), .5, seed=0)).export('small')
""",
    "BadMasks": """
from subnet_explorer import Store
Store.read('masks')
""",
    "BadSetting": """
from subnet_explorer.recipes.start import order_from_file
open('study.yaml', 'w').write('steps: 200')
order_from_file('study.yaml')
""",
    "BadSweep": """
from subnet_explorer import load, read_facts, recipes
model, tok = load('pocket-bert')
facts = read_facts('pocket', 'MadeOf')
recipes.sweep('lamp', model, tok, facts, over={'sparsity': [.5, .3, .5]})
""",
    "BadRelations": """
from subnet_explorer import Mask, Masks, Space, load
from subnet_explorer.recipes.relations import relation_masks
space = Space.of(load('pocket-bert')[0], 'weight', layers=4)
relation_masks(Masks([({'relation': 'MadeOf'}, Mask.random(space, .5, seed=0))]))
""",
    "DifferentStarts": """
from subnet_explorer import Mask, Masks, Space, load
from subnet_explorer.recipes.relations import check_one_start
space = Space.of(load('pocket-bert')[0], 'weight', layers=4)
relations = enumerate(['IsA', 'HasA'])
check_one_start(Masks([({'task': r, 'seed': 0}, Mask.random(space, .5, seed=i)) for i, r in relations]))
""",
    "NoneSucceeded": None,      # every combination would have to fail
    "TwoRecipes": """
from subnet_explorer.recipes.study import recipe
@recipe('Pruning from another package', 'A. Author, 2026')
def lamp(model, tok, facts): ...
""",
}

OTHERS = r"\((?:We|Can|Unrec|bert )[^)]*\)"      # words of other libraries differ by version

INDEX = """---
title: Errors
description: "Every named error: symptom, cause, fix"
---

The library refuses at the door what cannot work, and says what was expected, what was found and what to do. All of \
these are a `SubnetError`, so one `except` catches them; anything else is a bug. The shell prints them in one line \
and ends with status 2.

| error | symptom |
|---|---|
"""


# ── what the library says ────────────────────────────────────────────────────────────────────────────────────────────

def modules() -> Iterator[tuple[str, Path]]:
    "Modules of the library, `core.mask`, with their files: the folders in their order, then the root."
    for folder in FOLDERS:
        for file in sorted((LIBRARY / folder).glob("*.py")):
            if file.stem != "__init__": yield f"{folder}.{file.stem}", file
    for file in sorted(LIBRARY.glob("*.py")):
        if not file.stem.startswith("_"): yield file.stem, file


def chapter(module: str) -> str:
    "The notebook of a module, as a page about an error links to it."
    folder, _, name = module.rpartition(".")
    [found] = (ROOT / "nbs" / folder).glob(f"[0-9][0-9]_{name}.ipynb")
    return f"../{found.relative_to(ROOT / 'nbs').as_posix()}"


def parsed(file: Path) -> list[ast.stmt]: return ast.parse(file.read_text(encoding="utf-8")).body


def named_errors() -> dict[str, type[SubnetError]]:
    "Public errors of all modules by name, the base first."
    found: dict[str, type[SubnetError]] = {"SubnetError": SubnetError}
    for module, file in modules():
        public = [n for n in parsed(file) if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
        for node in public:
            made = getattr(import_module(f"subnet_explorer.{module}"), node.name)
            if issubclass(made, SubnetError): found[node.name] = made
    return found


def parts(error: type[SubnetError]) -> dict[str, str]:
    "Symptom, cause and fix of a docstring; cause and fix may go on in further lines."
    first, _, rest = (error.__doc__ or "").partition("\n")
    said = re.findall(r"^\s*(Cause|Fix): (.+?)(?=^\s*(?:Cause|Fix): |\Z)", rest, re.M | re.S)
    return {"symptom": first.strip()} | {kind.lower(): " ".join(words.split()) for kind, words in said}


def raised(node: ast.AST) -> Iterator[str]:
    "Names of the classes in `raise Name(…)`, wherever in a statement."
    for inner in ast.walk(node):
        if not (isinstance(inner, ast.Raise) and isinstance(inner.exc, ast.Call)): continue
        if isinstance(inner.exc.func, ast.Name): yield inner.exc.func.id


@cache
def raises() -> dict[str, set[tuple[str, str]]]:
    "Modules and functions or classes that raise each error."
    found: dict[str, set[tuple[str, str]]] = {}
    for module, file in modules():
        for node in parsed(file):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)): continue
            for name in raised(node): found.setdefault(name, set()).add((module, node.name))
    return found


# ── pages ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def message(code: str, name: str) -> str:
    "What an example says when it is run in an empty folder."
    with tempfile.TemporaryDirectory() as here, chdir(here):
        try: exec(code, {"__name__": "example"})
        except SubnetError as error:
            if type(error).__name__ != name: raise
            text = f"{name}: {error}".replace(here + "/", "")
            return re.sub(OTHERS, "(…)", text)
    raise AssertionError(f"the example of {name} raises nothing")


def symptom(name: str) -> list[str]:
    "An example with what it says, or a sentence where there is no example."
    example = EXAMPLES.get(name)
    if example is None: return [f"A traceback that ends with `{name}:` and the sentence that says what was found."]
    code = example.strip()
    lines = textwrap.wrap(message(code, name), 110)
    return [f"```python\n{code}\n```", "```text\n" + "\n".join(lines) + "\n```"]


def sources(name: str) -> list[str]:
    "Where an error comes from, with links to chapters; nothing for the base, which comes from everywhere."
    where = sorted(raises().get(name, ())) if name != "SubnetError" else []
    if not where: return []
    chapters = ", ".join(f"[{module}]({chapter(module)})" for module in dict.fromkeys(m for m, _ in where))
    public = ", ".join(f"`{module}.{function}`" for module, function in where if not function.startswith("_"))
    return ["## Where it comes from", f"Raised in {chapters}" + (f": {public}." if public else ".")]


def page(name: str, error: type[SubnetError]) -> str:
    "The page of one error."
    said, module = parts(error), error.__module__.removeprefix("subnet_explorer.")
    home = "subnet_explorer" if name in subnet_explorer.__all__ else error.__module__
    return "\n\n".join([
        f"---\ntitle: {name}\ndescription: \"{said['symptom']}\"\n---",
        "<!-- made from the docstring by make pages: edit that -->",
        said["symptom"],
        "## Symptom", *symptom(name),
        "## Cause", said["cause"],
        "## Fix", said["fix"],
        *sources(name),
        f"Defined in [{module}]({chapter(module)}). To catch it:",
        f"```python\nfrom {home} import {name}\n```",
        "[All errors](index.qmd)",
    ]) + "\n"


def pages() -> dict[str, str]:
    "All pages by file name."
    errors = named_errors()
    rows = [f"| [{name}]({name}.qmd) | {parts(error)['symptom']} |\n" for name, error in errors.items()]
    return {"index.qmd": INDEX + "".join(rows)} | {f"{name}.qmd": page(name, e) for name, e in errors.items()}


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    made = pages()
    for old in HERE.glob("*.qmd"):
        if old.name not in made: old.unlink()
    for file_name, text in made.items(): (HERE / file_name).write_text(text, encoding="utf-8")
