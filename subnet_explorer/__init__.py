"Find, compare, look at and use subnetworks of pretrained transformers."
from __future__ import annotations

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "space": ("Space", "SubnetError", "SpaceMismatch"),
    "mask": ("Mask", "Scores"),
    "masks": ("Masks",),
    "apply": ("masked",),
    "gates": ("Threshold", "TopK", "Concrete", "HardConcrete"),
    "objectives": ("Cloze", "MLM", "Task", "Hidden", "Suppress", "Maintain", "Kept", "Density", "Ramp"),
    "data": ("Fact", "Facts", "read_facts", "split", "answerable"),
    "texts": ("read_texts", "Blocks", "blocks", "read_blocks"),
    "sentences": ("Sentence", "read_conllu", "read_ner", "fitting"),
    "tables": ("Labelled", "read_glue", "read_choices"),
    "squad": ("Questions", "read_squad"),
    "pocket": ("load",),
    "store": ("Run", "Store"),
    "search": ("find",),
    "heads": ("Tagger", "Classifier", "Regressor", "Chooser", "Lora", "head_for", "fit", "preserved", "relearning", "relearned"),
    "parser": ("Parser",),
    "spans": ("SpanFinder",),
    "controls": ("reset", "control_labels", "selectivity"),
    "score": ("iterate",),
    "shrink": ("compact", "load_compact"),
    "pieces": ("show", "compare_view", "watch"),
    "widgets": ("explore",),
}
_MODULES = ("compare", "evaluate", "knowledge", "patterns", "pieces", "plots", "recipes", "represent", "score", "transfer", "widgets")
_WHERE = {name: module for module, names in _HOMES.items() for name in names}
__all__ = [*_WHERE, *_MODULES]


def __getattr__(name: str) -> Any:
    "Import on first use, so that masks and figures can be handled without loading torch."
    if name in _MODULES: return import_module(f"{__name__}.{name}")
    if name in _WHERE:
        value = globals()[name] = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]: return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from subnet_explorer import compare, evaluate, knowledge, patterns, pieces, plots, recipes, represent, score, transfer, widgets
    from subnet_explorer.apply import masked
    from subnet_explorer.data import Fact, Facts, answerable, read_facts, split
    from subnet_explorer.search import find
    from subnet_explorer.gates import Concrete, HardConcrete, Threshold, TopK
    from subnet_explorer.heads import Chooser, Classifier, Lora, Regressor, Tagger, fit, head_for, preserved, relearned, relearning
    from subnet_explorer.controls import control_labels, reset, selectivity
    from subnet_explorer.mask import Mask, Scores
    from subnet_explorer.masks import Masks
    from subnet_explorer.objectives import MLM, Cloze, Density, Hidden, Kept, Maintain, Ramp, Suppress, Task
    from subnet_explorer.parser import Parser
    from subnet_explorer.pieces import compare_view, show, watch
    from subnet_explorer.pocket import load
    from subnet_explorer.score import iterate
    from subnet_explorer.sentences import Sentence, fitting, read_conllu, read_ner
    from subnet_explorer.shrink import compact, load_compact
    from subnet_explorer.space import Space, SpaceMismatch, SubnetError
    from subnet_explorer.spans import SpanFinder
    from subnet_explorer.squad import Questions, read_squad
    from subnet_explorer.store import Run, Store
    from subnet_explorer.tables import Labelled, read_choices, read_glue
    from subnet_explorer.texts import Blocks, blocks, read_blocks, read_texts
    from subnet_explorer.widgets import explore
