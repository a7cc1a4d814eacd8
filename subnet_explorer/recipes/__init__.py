"""The papers, each as one function.

Every module here is imported, and registers its recipe; a new one needs no word in this file.
"""
from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from .study import RECIPES

for _module in iter_modules(__path__): import_module(f"{__name__}.{_module.name}")

# a function hides the module of its name: recipes.lamp(…) is what people call
globals().update({name: recipe.run for name, recipe in RECIPES.items()})
