"Masks that others published as arrays: what is read, what is written, and what is refused."
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from toys import LAYOUT, MODEL, write_arrays

from subnet_explorer.cli import main
from subnet_explorer.core.errors import SpaceMismatch, SubnetError, UnknownFamily, UnknownName
from subnet_explorer.core.formats import BadMasks, read_masks, write_masks
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.masks import Masks
from subnet_explorer.core.space import Group, Space, unit_space
from subnet_explorer.core.store import Store

HEAD, MLP = Group("h0", "head", 0, "head", (4,)), Group("m0", "mlp", 0, "mlp", (1,))


def test_published_arrays(tmp_path):
    rng = np.random.default_rng(0)
    keys = [(t, s) for t in ("RTE", "CoLA") for s in (1337, 42, 86)]
    heads, mlps = {k: rng.integers(0, 2, (3, 5)) for k in keys}, {k: rng.integers(0, 2, 3) for k in keys}
    write_arrays(tmp_path, heads, mlps)
    (tmp_path / "README").write_text("x")
    (tmp_path / ".git").mkdir()
    np.save(tmp_path / "RTE" / "seed_42" / "head_importance.npy", rng.random((3, 5)))
    masks = Store.read(tmp_path, format="npy")
    assert masks.index.values.tolist() == [[t, s] for t in ("CoLA", "RTE") for s in (42, 86, 1337)]
    for labels, m in masks:
        k = labels["task"], labels["seed"]
        assert np.array_equal([m[f"layer.{i}.head"] for i in range(3)], heads[k])
        assert np.array_equal([m[f"layer.{i}.mlp"][0] for i in range(3)], mlps[k])
    again = read_masks(write_masks(masks, tmp_path / "again"))
    assert [m for _, m in again] == [m for _, m in masks]
    written = np.load(tmp_path / "again" / "RTE" / "seed_42" / "mlp_mask.npy")
    assert written.tolist() == mlps["RTE", 42].tolist()
    assert Mask.load(masks[0].save(tmp_path / "x")) == masks[0]        # a space without a model survives a file
    with pytest.raises(UnknownFamily, match="use mask\\.rebase"): masks[0].to("weight")
    other = Space((HEAD, MLP), LAYOUT, MODEL)                                    # a model with another number of heads
    with pytest.raises(SubnetError, match="coordinates differ"): masks.rebase(other)


@pytest.mark.parametrize("only", ["head", "mlp"])
def test_published_arrays_of_one_kind(tmp_path, only):
    bits = {("RTE", s): np.eye(3)[:2] for s in (1, 2)}
    write_arrays(tmp_path, bits, {k: [1, 0] for k in bits})
    for f in tmp_path.rglob("*_mask.npy"):
        if not f.name.startswith(only): f.unlink()
    masks = read_masks(tmp_path)
    assert masks[0].space.kind == only
    assert masks[0].space == unit_space(2, 3 if only == "head" else None, only == "mlp")


# ── what is wrong in a folder ────────────────────────────────────────────────────────────────────────────────────────

SEED = Path("RTE", "seed_2")
CONTENT = {                            # arrays for head_mask.npy of one seed, and what is said of them
    "scores": (np.full((2, 3), .5), "6 of 6 values are neither 0 nor 1, e.g. 0.5. Are these importance"),
    "nan": (np.array([[1, 0, np.nan], [1, 1, 1]]), "1 of 6 values are neither 0 nor 1, e.g. nan"),
    "two": (np.array([[1, 0, 1], [2, 1, 1]]), "neither 0 nor 1, e.g. 2"),
    "flat": (np.ones(6), r"shape \(6,\), expected \(layers, heads\)"),
    "no layers": (np.ones((0, 3)), r"shape \(0, 3\)"),
    "words": (np.array([["a"] * 3] * 2), "no zeros and ones"),
    "objects": (np.array([[None] * 3] * 2, object), "cannot be read as an array"),
}


def refused(folder: Path, error: type[SubnetError], says: str, capsys) -> None:
    "The reader raises, and the command says the same in one line."
    with pytest.raises(error, match=says): read_masks(folder)
    assert main(["agreement", str(folder), "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and error.__name__ in err


@pytest.fixture
def folder(tmp_path):
    keys = [(t, s) for t in ("RTE", "SST-2") for s in (1, 2)]
    return write_arrays(tmp_path, {k: np.eye(3)[:2] for k in keys}, {k: [1, 0] for k in keys})


@pytest.mark.parametrize("name", CONTENT)
def test_arrays_that_are_no_masks(folder, capsys, name):
    content, says = CONTENT[name]
    np.save(folder / SEED / "head_mask.npy", content)
    refused(folder, BadMasks, says, capsys)


@pytest.mark.parametrize("content, says", [
    (np.ones((2, 1)), r"shape \(2, 1\), expected \(layers,\)"),
    (np.ones(3), r"head_mask\.npy has 2 layers and mlp_mask\.npy has 3"),
], ids=["column", "layers"])
def test_arrays_that_are_no_masks_of_mlps(folder, capsys, content, says):
    np.save(folder / SEED / "mlp_mask.npy", content)
    refused(folder, BadMasks, says, capsys)


@pytest.mark.parametrize("content", [b"\x93NUMPY", b""], ids=["cut short", "empty file"])
def test_files_that_are_no_arrays(folder, capsys, content):
    (folder / SEED / "head_mask.npy").write_bytes(content)
    refused(folder, BadMasks, "cannot be read as an array", capsys)


def test_seeds_that_differ(folder, capsys):
    np.save(folder / SEED / "head_mask.npy", np.ones((2, 4)))
    says = r"seeds with different spaces: .*seed_1 has head_mask.npy \(2, 3\).*seed_2 has head_mask.npy \(2, 4\)"
    refused(folder, SpaceMismatch, says, capsys)


def test_one_seed_without_mlps(folder, capsys):
    (folder / SEED / "mlp_mask.npy").unlink()
    refused(folder, SpaceMismatch, "seeds with different spaces", capsys)


def test_tasks_that_differ(folder, capsys):
    for file in (folder / "SST-2").rglob("mlp_mask.npy"): file.unlink()
    refused(folder, SpaceMismatch, "tasks with different spaces", capsys)


def test_an_empty_seed(folder, capsys):
    for file in (folder / SEED).iterdir(): file.unlink()
    refused(folder, BadMasks, r"neither head_mask\.npy nor mlp_mask\.npy", capsys)


@pytest.mark.parametrize("name, says", [("seed_two", "whole number"), ("seed_01", "seed 1 twice")])
def test_names_of_seeds(folder, capsys, name, says):
    (folder / SEED).rename(folder / "RTE" / name)
    refused(folder, BadMasks, says, capsys)


def test_a_task_without_seeds(folder, capsys):
    (folder / "figures").mkdir()
    refused(folder, BadMasks, "figures holds no folder of a seed", capsys)


def test_folders_that_hold_no_masks(tmp_path):
    with pytest.raises(BadMasks, match="no folder"): read_masks(tmp_path / "nothing")
    with pytest.raises(BadMasks, match="no masks in"): read_masks(tmp_path)
    write_arrays(tmp_path / "heads_mlps", {("RTE", 1): np.eye(2)})
    with pytest.raises(BadMasks, match=r"Are the tasks in .*heads_mlps"): read_masks(tmp_path)
    with pytest.raises(BadMasks, match="Give the folder above"): read_masks(tmp_path / "heads_mlps" / "RTE")
    with pytest.raises(UnknownName, match="format"): read_masks(tmp_path, format="pickle")


def test_masks_that_cannot_be_written(tmp_path):
    one = Mask.full(Space((HEAD,), LAYOUT, MODEL))                               # heads of one layer of two
    part = Masks([({"task": "a", "seed": 0}, one)])
    with pytest.raises(SubnetError, match=r"use mask\.save"): write_masks(part, tmp_path)
    twice = Masks([({"task": "a", "seed": 0}, Mask.full(unit_space(2, 4)))] * 2)
    with pytest.raises(SubnetError, match="same task and seed"): write_masks(twice, tmp_path)
