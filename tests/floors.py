"Tickets of models that train for seconds, which are at chance."
from __future__ import annotations

from importlib import import_module
from typing import Any

import pandas as pd

from subnet_explorer.recipes.tasks import baseline_table


def on_test(bench: Any, tasks: Any, parts: Any) -> pd.DataFrame:
    "The baselines of the sentences that are reported on, none of the search."
    return baseline_table(bench, tasks, ("test",))


def any_floor(patch: Any) -> None:
    "Let floors be held against no baseline: what is tested is something else."
    patch.setattr(import_module("subnet_explorer.recipes.tickets"), "baseline_table", on_test)
