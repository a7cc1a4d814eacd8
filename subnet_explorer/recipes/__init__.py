"""The papers, each as one function.

Every module here is imported and registers its recipe; a new one needs no word in this file.
"""
from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from .study import RECIPES, find_recipe

for _module in iter_modules(__path__): import_module(f"{__name__}.{_module.name}")

# a function hides the module of its name: recipes.lamp(…) is what people call
globals().update({name: recipe.run for name, recipe in RECIPES.items()})


def pocket_settings(name: str) -> Mapping[str, Any]:
    "Settings of a recipe that suit the pocket models, which are far smaller than those of the papers."
    return find_recipe(name).pocket


def __dir__() -> list[str]:
    return sorted([*RECIPES, "lamp_ablation", "pocket_settings", "sweep"])


from .lamp import lamp_ablation as lamp_ablation  # noqa: E402  (after its module, whose name `lamp` hides)
from .sweep import sweep as sweep  # noqa: E402  (likewise)

if TYPE_CHECKING:
    from .answer import answer as answer
    from .complete import complete as complete
    from .critical import critical as critical
    from .finetune import finetune as finetune
    from .lamp import lamp as lamp
    from .mine import mine as mine
    from .probe import probe as probe
    from .tamt import tamt as tamt
    from .tickets import tickets as tickets
