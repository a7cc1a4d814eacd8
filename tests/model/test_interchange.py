"What leaves the library computes what a mask computes, and comes back as that mask."
from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.utils import prune

from subnet_explorer import interchange
from subnet_explorer.core.errors import SpaceMismatch, SubnetError
from subnet_explorer.core.layout import FAMILIES
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.scores import Scores
from subnet_explorer.core.space import Space
from subnet_explorer.model.apply import ModelInUse, masked, parameter
from subnet_explorer.model.compact import compact, digest
from subnet_explorer.model.interchange import NotPruned, NotSemiStructured
from subnet_explorer.model.load import tiny

IDS = torch.tensor([[7, 12, 33, 5, 21, 9, 14], [30, 6, 6, 25, 11, 2, 8]])
KINDS = ("weight", "weight+bias", "head", "neuron", "mlp", "layer", "head+mlp")
ANATOMIES = ("bert", "gpt2", "llama")
kinds = pytest.mark.parametrize("kind", KINDS)
families = pytest.mark.parametrize("family", ANATOMIES)


def outputs(model):
    with torch.no_grad(): return model(input_ids=IDS)[0]


def under(model, mask):
    with masked(model, mask): return outputs(model)


def random_scores(space: Space, seed: int) -> Scores:
    rng = np.random.default_rng(seed)
    return Scores(space, {g.name: rng.integers(0, 5, g.shape).astype(np.float32) for g in space.groups})


# ── torch.nn.utils.prune ─────────────────────────────────────────────────────────────────────────────────────────────

@families
@kinds
def test_pruned_models_compute_what_masked_ones_do(family, kind):
    model, theirs = tiny(family), tiny(family)
    space = Space.of(model, kind)
    mask = Mask.random(space, .5, seed=1)
    weights = mask.to("weight")
    off = interchange.to_prune(theirs, mask)
    assert off == weights.space.size - weights.count > 0
    assert torch.equal(outputs(theirs), under(model, mask))
    state = {name: t.clone() for name, t in theirs.state_dict().items()}
    order = [list(m._parameters) for m in theirs.modules()]
    assert interchange.from_prune(theirs, weights.space) == interchange.from_prune(theirs) == weights
    assert [list(m._parameters) for m in theirs.modules()] == order      # reading leaves no trace
    assert all(torch.equal(t, state[name]) for name, t in theirs.state_dict().items())
    assert torch.equal(outputs(theirs), under(model, mask))


def test_every_family_has_its_matrices_pruned():
    for family in FAMILIES:
        model, theirs = tiny(family), tiny(family)
        mask = Mask.random(Space.of(model), .5, seed=0)
        interchange.to_prune(theirs, mask)
        assert torch.equal(outputs(theirs), under(model, mask)) and interchange.from_prune(theirs) == mask, family


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_tied_embedding_is_pruned_at_both_ends(family):
    model, theirs = tiny(family), tiny(family)
    mask = Mask.random(Space.of(model, "weight", embeddings=True), .5, seed=0)
    interchange.to_prune(theirs, mask)
    assert theirs.get_output_embeddings().weight_orig is theirs.get_input_embeddings().weight_orig
    assert torch.equal(outputs(theirs), under(model, mask)) and interchange.from_prune(theirs) == mask
    theirs.get_output_embeddings().weight_mask[0] = 1 - theirs.get_output_embeddings().weight_mask[0]
    with pytest.raises(NotPruned, match="one tensor, and are pruned differently"): interchange.from_prune(theirs)


def test_what_others_pruned_is_read():
    model, theirs = tiny("bert"), tiny("bert")
    for block in theirs.base_model.encoder.layer:
        prune.l1_unstructured(block.output.dense, "weight", amount=.25)
        prune.random_unstructured(block.output.dense, "bias", amount=2)
        prune.ln_structured(block.intermediate.dense, "weight", amount=.5, n=2, dim=0)
    mask = interchange.from_prune(theirs)
    assert {g.kind for g in mask.space.groups} == {"weight", "bias"}
    assert torch.equal(outputs(theirs), under(model, mask))
    magnitudes = [np.abs(parameter(model, g).detach().numpy()) for g in mask.space.groups if g.role == "down"]
    kept = [mask[g.name] for g in mask.space.groups if g.role == "down"]
    assert magnitudes[0][~kept[0]].max() <= magnitudes[0][kept[0]].min()
    prune.l1_unstructured(theirs.base_model.encoder.layer[0].output.dense, "weight", amount=.5)      # a second time
    assert interchange.from_prune(theirs) <= mask and interchange.from_prune(theirs) != mask


def test_pruning_that_is_no_mask_of_the_space_is_refused():
    model, theirs = tiny("bert"), tiny("bert")
    first = theirs.base_model.encoder.layer[0]
    with pytest.raises(NotPruned, match="no matrix of this model is pruned"): interchange.from_prune(theirs)
    prune.l1_unstructured(first.output.dense, "weight", amount=.5)
    with pytest.raises(NotPruned, match=r"is not pruned \(\d+ of \d+ tensors"):
        interchange.from_prune(theirs, Space.of(model))
    down = Space.of(model, "weight", layers=1, only="down")
    assert interchange.from_prune(theirs, down).space == down
    with pytest.raises(SpaceMismatch): interchange.from_prune(theirs, Space.of(tiny("gpt2")))
    heads = Space.of(model, "head")
    with pytest.raises(SubnetError, match="masks over head are not"): interchange.from_prune(theirs, heads)
    with pytest.raises(SubnetError, match="pruned already"): interchange.to_prune(theirs, Mask.full(down))
    prune.l1_unstructured(first.output.LayerNorm, "weight", amount=2)
    with pytest.raises(NotPruned, match="weight is pruned, and the space has no"): interchange.from_prune(theirs)
    prune.remove(first.output.LayerNorm, "weight")
    first.output.dense.weight_mask[0, 0] = .5
    with pytest.raises(SpaceMismatch): interchange.from_prune(theirs, down)      # a norm has other weights now
    with pytest.raises(NotPruned, match=r"1 values that are neither 0 nor 1, e\.g\. 0\.5"):
        interchange.from_prune(theirs)
    assert first.output.dense.weight_orig.shape == first.output.dense.weight.shape      # and it is as it was


def test_a_model_in_use_is_not_pruned():
    model = tiny("bert")
    before, mask = digest(model), Mask.random(Space.of(model), .5, seed=0)
    with masked(model, mask), pytest.raises(ModelInUse, match="prune it before or after"):
        interchange.to_prune(model, mask)
    assert digest(model) == before
    mixed = Mask.full(Space.of(model, "weight+head"))
    with pytest.raises(SubnetError, match="mixes weights with whole units"): interchange.to_prune(model, mixed)
    with pytest.raises(SpaceMismatch): interchange.to_prune(tiny("gpt2"), mask)


# ── zeros ────────────────────────────────────────────────────────────────────────────────────────────────────────────

@families
@kinds
def test_zeros_compute_what_masked_models_do(family, kind, tmp_path):
    model = tiny(family)
    before, mask = digest(model), Mask.random(Space.of(model, kind), .5, seed=2)
    zeros = interchange.baked(model, mask)
    assert digest(model) == before
    assert torch.equal(outputs(zeros), under(model, mask))
    if kind == "weight":
        again = type(model).from_pretrained(interchange.save_baked(model, mask, tmp_path)).eval()
        assert torch.equal(outputs(again), outputs(zeros))
        assert interchange.from_zeros(again, mask.space) == mask


@pytest.mark.parametrize("block", [(4, 4), (1, 64), (64, 1)])
def test_blocks_leave_as_weights(block):
    model, theirs = tiny("bert"), tiny("bert")
    mask = Mask.random(Space.of(model, "block", block=block), .5, seed=0)
    interchange.to_prune(theirs, mask)
    assert interchange.from_prune(theirs) == mask.to("weight")
    assert torch.equal(outputs(theirs), outputs(interchange.baked(model, mask)))
    assert torch.equal(outputs(theirs), under(model, mask))


def test_zeros_of_their_own_are_kept():
    model = tiny("bert")
    space = Space.of(model)
    w = parameter(model, space.groups[0])
    with torch.no_grad(): w[0, :3] = 0
    space = Space.of(model)
    mask = Mask.random(space, .5, seed=0)
    zeros = interchange.baked(model, mask)
    blind, knowing = interchange.from_zeros(zeros, space), interchange.from_zeros(zeros, space, model)
    assert knowing.meta["zero_before"] == 3 and "zero_before" not in blind.meta
    assert blind.meta["zeros"] == space.size - blind.count == knowing.meta["zeros"]
    assert blind <= mask <= knowing and knowing[space.groups[0].name][0, :3].all()
    assert torch.equal(under(model, knowing), under(model, mask))
    with pytest.raises(SpaceMismatch, match="zeros of another model"): interchange.from_zeros(tiny("gpt2"), space)
    with pytest.raises(SpaceMismatch): interchange.from_zeros(zeros, space, zeros)      # not the original
    with pytest.raises(SubnetError, match="translate it"): interchange.from_zeros(zeros, Space.of(model, "neuron"))


# ── N of M ───────────────────────────────────────────────────────────────────────────────────────────────────────────

@families
@settings(max_examples=12, deadline=None)
@given(density=st.floats(0, 1), m=st.integers(1, 7), n=st.integers(1, 7), seed=st.integers(0, 99))
def test_the_nearest_pattern_fits_and_changes_least(family, density, m, n, seed):
    n = min(n, m)
    space = Space.of(tiny(family), "weight", layers=1)
    mask, scores = Mask.random(space, density, seed), random_scores(space, seed)
    found = interchange.nearest_n_of_m(mask, scores, n, m)
    assert interchange.n_of_m(found, n, m).fits.all() and found <= mask
    surplus = 0
    for g, bits in mask.items():
        rows = bits.T if space.layout.transposed else bits                     # (output, input)
        values, left = (a.T if space.layout.transposed else a for a in (scores[g.name], found[g.name]))
        for row, score, now in zip(rows, values, left, strict=True):
            for i in range(0, len(row), m):
                part = slice(i, i + m)
                surplus += max(0, int(row[part].sum()) - n)
                gone = score[part][row[part] & ~now[part]]
                assert not gone.size or gone.max() <= score[part][now[part]].min()
    assert found.meta["flips"] == mask.count - found.count == surplus
    assert interchange.nearest_n_of_m(found, scores, n, m) == found


def test_scores_alone_fill_the_pattern():
    space = Space.of(tiny("gpt2"))
    found = interchange.nearest_n_of_m(random_scores(space, 0))
    table = interchange.n_of_m(found)
    assert found.density == .5 and table.fits.all() and list(table.name) == [g.name for g in space.groups]
    across = {g.name: np.tile(np.array([True, True, False, False])[:, None], (g.shape[0] // 4, g.shape[1]))
              for g in space.groups}
    assert interchange.n_of_m(Mask.of(space, across)).fits.all()       # Conv1D: inputs are rows
    full = interchange.n_of_m(Mask.full(space))
    assert (full.broken == full.groups).all() and full.groups.sum() * 4 == space.size


def test_patterns_that_cannot_be_are_refused():
    model = tiny("bert")
    mask = Mask.full(Space.of(model))
    with pytest.raises(SubnetError, match="n is at most m"): interchange.n_of_m(mask, 4, 2)
    with pytest.raises(SubnetError, match="scores are needed"): interchange.nearest_n_of_m(mask)
    scores = random_scores(mask.space, 0)
    with pytest.raises(SubnetError, match="given twice"): interchange.nearest_n_of_m(scores, scores)
    other = random_scores(Space.of(model, "weight", layers=1), 0)
    with pytest.raises(SpaceMismatch): interchange.nearest_n_of_m(mask, other)
    with pytest.raises(NotSemiStructured, match="more than 2 of 4"): interchange.semi_structured(model, mask)
    fits = interchange.nearest_n_of_m(mask, scores)
    with pytest.raises(NotSemiStructured, match="on cpu in float32"): interchange.semi_structured(model, fits)
    gpt2 = tiny("gpt2")
    turned = interchange.nearest_n_of_m(random_scores(Space.of(gpt2), 0))
    with pytest.raises(NotSemiStructured, match="inputs in columns"): interchange.semi_structured(gpt2, turned)


def test_what_torch_makes_sparse_is_every_masked_matrix(monkeypatch):
    "Everything but the device: a stand-in for it hands the matrices back as they are."
    model, seen = tiny("bert"), []
    fits = interchange.nearest_n_of_m(random_scores(Space.of(model), 0))
    device = SimpleNamespace(is_cuda=True, dtype=torch.float16, device="cuda")
    monkeypatch.setattr("subnet_explorer.model.interchange.parameter_like", lambda model: device)
    with pytest.raises(NotSemiStructured, match="torch refuses encoder"): interchange.semi_structured(model, fits)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda w: seen.append(w) or w.clone())
    before, sparse = digest(model), interchange.semi_structured(model, fits)
    assert len(seen) == len(fits.space.groups) and digest(model) == before
    assert all(((w.reshape(-1, 4) != 0).sum(1) <= 2).all() for w in seen)
    assert torch.equal(outputs(sparse), under(model, fits))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has semi-structured tensors on CUDA only")
def test_sparse_tensors_compute_what_zeros_do():
    from subnet_explorer.model.load import load
    model = load("pocket-bert")[0].half().cuda()
    fits = interchange.nearest_n_of_m(random_scores(Space.of(model), 0))
    ids = torch.randint(5, 100, (8, 16), device="cuda")
    with torch.no_grad():
        found = interchange.semi_structured(model, fits)(input_ids=ids)[0]
        wanted = interchange.baked(model, fits)(input_ids=ids)[0]
    assert (found - wanted).abs().max() < .02 * wanted.abs().max()


# ── ONNX ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_without_the_extra_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SubnetError, match=r"subnet_explorer\[onnx\]"):
        interchange.to_onnx(tiny("bert"), tmp_path / "bert.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_compact_models_leave_as_onnx(family, tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    model = tiny(family)
    small = compact(model, Mask.random(Space.of(model, "head+neuron"), .5, seed=0)).model
    before, cache = digest(small), small.config.use_cache
    file = interchange.to_onnx(small, tmp_path / "small.onnx")
    assert (digest(small), small.config.use_cache) == (before, cache)
    session = runtime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    real = torch.ones_like(IDS)
    real[1, -2:] = 0
    found = session.run(["output"], {"input_ids": IDS.numpy(), "attention_mask": real.numpy()})[0]
    with torch.no_grad(): wanted = small(input_ids=IDS, attention_mask=real)[0].numpy()
    assert np.abs(found - wanted).max() < 1e-4 * max(1, np.abs(wanted).max())
