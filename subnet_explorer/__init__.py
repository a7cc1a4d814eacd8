"Find, compare, look at and use subnetworks of pretrained transformers."
from __future__ import annotations

__version__ = "0.1.0"

import warnings
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

# where the names at the top come from
_HOMES = {
    "core.errors": ("SubnetError", "SpaceMismatch"),
    "core.space": ("Space",),
    "core.mask": ("Mask",),
    "core.scores": ("Scores",),
    "core.masks": ("Masks",),
    "core.atlas": ("read_atlas", "save_atlas"),
    "core.run": ("Run",),
    "core.store": ("Store",),
    "data.facts": ("Fact", "Facts", "read_facts", "split", "answerable"),
    "data.texts": ("read_texts", "Blocks", "blocks", "read_blocks"),
    "data.sentences": ("Sentence", "read_conllu", "read_ner", "fitting"),
    "data.tables": ("Labelled", "read_glue"),
    "data.questions": ("Questions", "read_squad"),
    "data.choices": ("Choices", "ChoiceTask", "choice_task", "read_choices"),
    "data.parts": ("TaskData", "task_data"),
    "model.load": ("load",),
    "model.apply": ("masked",),
    "model.compact": ("compact", "load_compact"),
    "search.gates": ("Threshold", "TopK", "Concrete", "HardConcrete"),
    "search.objectives": ("Cloze", "Task", "Kept", "Density", "Ramp"),
    "search.distil": ("MLM", "Hidden", "Suppress", "Maintain"),
    "search.find": ("find",),
    "search.together": ("Weights",),
    "search.prune": ("iterate",),
    "tasks.heads": ("Tagger", "Classifier", "Regressor", "Chooser"),
    "tasks.parser": ("Parser",),
    "tasks.spans": ("SpanFinder",),
    "tasks.fit": ("Lora", "head_for", "fit", "preserved"),
    "tasks.relearn": ("relearning", "relearned"),
    "tasks.controls": ("reset", "control_labels", "selectivity"),
    "look.views": ("show", "compare_view", "watch"),
    "look.app": ("explore",),
}

# names under which the functions of several modules are gathered: `plots.density`, `evaluate.cloze`, …
_GATHERED = {
    "compare": ("core.compare", "core.agreement", "core.intervals"),
    "evaluate": ("measure.ask", "measure.fluency", "measure.removal", "measure.metrics", "measure.baselines",
                 "measure.discordant", "measure.links", "measure.graph_embeddings", "measure.options",
                 "measure.proposals", "measure.judged", "measure.who_answers"),
    "interchange": ("model.interchange",),
    "knowledge": ("data.graphs", "data.links", "data.stated", "data.annotations"),
    "patterns": ("measure.patterns", "measure.decisions"),
    "pieces": ("look.tables", "look.views"),
    "plots": (
        "look.style", "look.paper", "look.figure", "look.masks", "look.agreement", "look.curves", "look.models",
        "look.report", "look.answer_map", "look.relation_figures",
    ),
    "represent": ("measure.vectors", "measure.attention"),
    "score": ("search.score", "search.prune"),
    "transfer": ("tasks.relearn",),
    "widgets": ("look.app", "look.annotator", "look.facts_annotator"),
}
# names that changed: the old ones warn for one version
_RENAMED = {
    "compare": {"student": "student_interval"},
    "evaluate": {"fluent": "most_fluent"},
    "knowledge": {"overlap": "shared_triples", "STATED": "IN_TARGET"},
    "patterns": {"train": "train_network"},
    "score": {"lowered": "without_lowest", "matched": "random_matched", "controls": "matched_controls"},
}
_WHERE = {name: module for module, names in _HOMES.items() for name in names}
__all__ = [*_WHERE, *_GATHERED, "recipes"]  # noqa: PLE0604  (names made from the tables above)


class _Gathered(ModuleType):
    "The public names of some modules, under one name, each read when it is asked for."

    def __init__(self, name: str, homes: tuple[str, ...]) -> None:
        super().__init__(f"{__name__}.{name}", f"The public names of {', '.join(homes)}.")
        self._homes, self._renamed = homes, _RENAMED.get(name, {})

    def _modules(self) -> list[ModuleType]:
        return [import_module(f"{__package__}.{home}") for home in self._homes]

    def __dir__(self) -> list[str]:
        return sorted(name for module in self._modules() for name in module.__all__)

    def __getattr__(self, name: str) -> Any:
        for module in self._modules():
            if name in module.__all__: return getattr(module, name)
        if name in self._renamed: return self._by_new_name(name)
        raise AttributeError(f"{self.__name__} has no {name!r}: it has {', '.join(dir(self))}.")

    def _by_new_name(self, old: str) -> Any:
        new = self._renamed[old]
        warnings.warn(f"{self.__name__}.{old} is now called {new}.", DeprecationWarning, stacklevel=3)
        return getattr(self, new)


def __getattr__(name: str) -> Any:
    "Import on first use, so that masks and figures can be handled without loading torch."
    if name == "recipes": return import_module(f"{__name__}.recipes")
    if name in _GATHERED: value: Any = _Gathered(name, _GATHERED[name])
    elif name in _WHERE: value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    else: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from . import recipes as recipes
    from .core.atlas import read_atlas as read_atlas, save_atlas as save_atlas
    from .core.errors import SpaceMismatch as SpaceMismatch, SubnetError as SubnetError
    from .core.mask import Mask as Mask
    from .core.masks import Masks as Masks
    from .core.run import Run as Run
    from .core.scores import Scores as Scores
    from .core.space import Space as Space
    from .core.store import Store as Store
    from .data.choices import (
        Choices as Choices,
        ChoiceTask as ChoiceTask,
        choice_task as choice_task,
        read_choices as read_choices,
    )
    from .data.facts import (
        Fact as Fact,
        Facts as Facts,
        answerable as answerable,
        read_facts as read_facts,
        split as split,
    )
    from .data.parts import TaskData as TaskData, task_data as task_data
    from .data.questions import Questions as Questions, read_squad as read_squad
    from .data.sentences import (
        Sentence as Sentence,
        fitting as fitting,
        read_conllu as read_conllu,
        read_ner as read_ner,
    )
    from .data.tables import Labelled as Labelled, read_glue as read_glue
    from .data.texts import Blocks as Blocks, blocks as blocks, read_blocks as read_blocks, read_texts as read_texts
    from .look.app import explore as explore
    from .look.views import compare_view as compare_view, show as show, watch as watch
    from .model.apply import masked as masked
    from .model.compact import compact as compact, load_compact as load_compact
    from .model.load import load as load
    from .search.distil import MLM as MLM, Hidden as Hidden, Maintain as Maintain, Suppress as Suppress
    from .search.find import find as find
    from .search.gates import Concrete as Concrete, HardConcrete as HardConcrete, Threshold as Threshold, TopK as TopK
    from .search.objectives import Cloze as Cloze, Density as Density, Kept as Kept, Ramp as Ramp, Task as Task
    from .search.prune import iterate as iterate
    from .search.together import Weights as Weights
    from .tasks.controls import control_labels as control_labels, reset as reset, selectivity as selectivity
    from .tasks.fit import Lora as Lora, fit as fit, head_for as head_for, preserved as preserved
    from .tasks.heads import Chooser as Chooser, Classifier as Classifier, Regressor as Regressor, Tagger as Tagger
    from .tasks.parser import Parser as Parser
    from .tasks.relearn import relearned as relearned, relearning as relearning
    from .tasks.spans import SpanFinder as SpanFinder
