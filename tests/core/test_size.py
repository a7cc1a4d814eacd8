"Masks on disk: one bit per weight, or nearly their entropy."
from __future__ import annotations

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM

from subnet_explorer.core.mask import Mask
from subnet_explorer.core.space import Space


def test_sixteen_masks_of_bert_base_take_90_mb(tmp_path):
    "The upper half of the layers, as published: 42 million weights."
    with torch.device("meta"): model = BertForMaskedLM(BertConfig())
    space = Space.of(model.to_empty(device="cpu"), "weight", layers="top-half")
    assert space.size == 6 * (4 * 768 * 768 + 2 * 768 * 3072)
    rng = np.random.default_rng(0)
    meta = {"method": "find", "task": "IsA", "seed": 0, "steps": 400}
    mask = Mask(space, tuple(rng.bytes(g.size // 8) for g in space.groups), meta)
    file = mask.save(tmp_path / "mask.safetensors")
    assert 16 * file.stat().st_size <= 90e6 and file.stat().st_size < space.size / 8 + 20_000
    assert Mask.load(file) == mask


def test_a_sparse_mask_of_bert_base_takes_little_more_than_its_entropy(tmp_path):
    "98.6 % of 85 million weights removed: 10.6 MB of packed bits hold 1.13 MB of information."
    with torch.device("meta"): model = BertForMaskedLM(BertConfig())
    space = Space.of(model.to_empty(device="cpu"), "weight")
    rng, p = np.random.default_rng(0), .014
    mask = Mask(space, tuple(np.packbits(rng.random(g.size, dtype=np.float32) < p).tobytes() for g in space.groups))
    entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) * space.size / 8
    file = mask.save(tmp_path / "mask.safetensors")
    assert file.stat().st_size < 1.02 * entropy + 20_000 < space.size / 8 / 9
    assert Mask.load(file) == mask and abs((~mask).save(tmp_path / "rest").stat().st_size - file.stat().st_size) < 200
