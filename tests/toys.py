"A toy model's shape and files on disk, shared by the tests of masks."
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from subnet_explorer.core.layout import Layout
from subnet_explorer.core.space import ModelId

LAYOUT = Layout("bert", 2, 4, 4, 4, 16, 32, False, (), "embeddings.word_embeddings.weight", 40)
MODEL = ModelId("toy", None, "c", "w")


def write_arrays(folder: Path, bits: Mapping[Any, Any], mlps: Mapping[Any, Any] | None = None) -> Path:
    "Write arrays as published: bits[task, seed] (layers, heads), mlps[task, seed] (layers,)."
    for (task, seed), b in bits.items():
        place = folder / task / f"seed_{seed}"
        place.mkdir(parents=True)
        np.save(place / "head_mask.npy", np.asarray(b, np.float32))
        if mlps is not None: np.save(place / "mlp_mask.npy", np.asarray(mlps[task, seed], np.float32))
    return folder
