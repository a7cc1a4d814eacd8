"Models as people hand them over: compiled, spread, hooked, with adapters; looked through, or refused."
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from subnet_explorer import (
    MLM,
    Cloze,
    Mask,
    Space,
    Threshold,
    compact,
    evaluate,
    find,
    fit,
    load,
    masked,
    read_facts,
    represent,
    score,
    task_data,
)
from subnet_explorer.core.errors import HiddenWeights, SubnetError, UnknownFamily
from subnet_explorer.core.layout import body_of, family_of, is_causal, layout_of, unwrap
from subnet_explorer.core.space import fingerprint, granular
from subnet_explorer.model.apply import attending, blocks_of, entering
from subnet_explorer.model.load import tiny
from subnet_explorer.model.packed import packing_agrees
from subnet_explorer.search.gates import HardConcrete

IDS = torch.tensor([[7, 12, 33, 5, 21, 9, 14], [30, 6, 6, 25, 11, 2, 8]])
KINDS = ("head", "neuron", "mlp", "layer", "weight")
FAMILIES = ("bert", "distilbert", "mpnet", "gpt2", "llama")


def compiled(model): return torch.compile(model, backend="eager")

def compiled_in_place(model):
    model.compile(backend="eager")
    return model

def compiled_layers(model):
    blocks = blocks_of(model, family_of(model))[2]
    for i, block in enumerate(blocks): blocks[i] = torch.compile(block, backend="eager")
    return model

def compiled_layers_in_place(model):
    for block in blocks_of(model, family_of(model))[2]: block.compile(backend="eager")
    return model

def compiled_matrices(model):
    layout, body = layout_of(model), body_of(model)
    for i in range(layout.n_layers):
        for role in ("o", "down"):
            path, _, name = layout.module(i, role).rpartition(".")
            holder = body.get_submodule(path)
            setattr(holder, name, torch.compile(getattr(holder, name), backend="eager"))
    return model

def compiled_body(model):
    setattr(model, model.base_model_prefix, torch.compile(model.base_model, backend="eager"))
    return model

def spread(model): return nn.DataParallel(model)

def spread_and_compiled(model): return torch.compile(nn.DataParallel(model), backend="eager")

def hooked(model):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)

def prepared(model):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True, mixed_precision="no").prepare(model)

def adapted(model):
    peft = pytest.importorskip("peft")
    layout = layout_of(model)
    how = peft.LoraConfig(target_modules=[layout.module(0, r).rpartition(".")[2] for r in ("k", "v")], r=2)
    return peft.get_peft_model(model, how).eval()

WRAPPERS = [
    compiled, compiled_in_place, compiled_layers, compiled_layers_in_place, compiled_matrices, compiled_body, spread,
    spread_and_compiled, hooked, prepared,
]
same_weights = pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda f: f.__name__)


@pytest.fixture(autouse=True)
def forgotten():
    yield
    torch._dynamo.reset()


@torch.no_grad()
def logits(model) -> torch.Tensor: return model(input_ids=IDS).logits.clone()

def close(a, b): return float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


# ── a mask acts on what it is given, and goes again ──────────────────────────────────────────────────────────────────

@same_weights
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_mask_acts_and_goes(wrap, family):
    plain, model = tiny(family), wrap(tiny(family))
    full = logits(plain)
    assert close(logits(model), full)                            # whatever is compiled is compiled now
    for kind in KINDS:
        mask = Mask.random(Space.of(plain, kind), .5, seed=3)
        with masked(plain, mask): wanted = logits(plain)
        with masked(model, mask): assert close(logits(model), wanted) and not close(wanted, full)
        assert close(logits(model), full)


@pytest.mark.parametrize("kind", ["head", "weight"])
def test_a_function_compiled_around_the_model(kind):
    model = tiny("bert")
    fast = torch.compile(lambda: model(input_ids=IDS).logits, backend="eager")
    with torch.no_grad():
        full, mask = fast().clone(), Mask.random(Space.of(model, kind), .5, seed=3)
        with masked(model, mask): assert torch.equal(fast(), logits(model)) and not close(fast(), full)
        assert torch.equal(fast(), full)


@pytest.mark.parametrize("kind", ["head", "weight"])
def test_compiling_inside_a_mask_does_not_keep_it(kind):
    model = tiny("bert")
    full, mask = logits(model), Mask.random(Space.of(model, kind), .5, seed=3)
    with masked(model, mask):
        fast = torch.compile(model, backend="eager")
        assert close(logits(fast), logits(model))
    assert close(logits(fast), full)


# ── everything that takes a model takes it wrapped ───────────────────────────────────────────────────────────────────

@same_weights
def test_what_a_model_is(wrap):
    for family in FAMILIES: same_answers(wrap, family)

def same_answers(wrap, family):
    plain, model = tiny(family), wrap(tiny(family))
    assert type(unwrap(model)) is type(plain)
    assert (family_of(model), is_causal(model), layout_of(model)) == (family, is_causal(plain), layout_of(plain))
    assert fingerprint(model, layout_of(model)) == fingerprint(plain, layout_of(plain))
    for kind in KINDS: assert Space.of(model, kind) == Space.of(plain, kind)
    assert Space.of(model, "weight", embeddings=True).id == Space.of(plain, "weight", embeddings=True).id
    assert granular(model, "neuron").id == granular(plain, "neuron").id
    ids = [IDS[0], IDS[1, :4]]
    assert packing_agrees(model, layout_of(model), ids) == packing_agrees(plain, layout_of(plain), ids)
    states = [entering(m, family, 1, input_ids=IDS) for m in (plain, model)]
    assert close(*(s.detach() for s in states))
    with attending(model): assert unwrap(model).config._attn_implementation == "eager"


# ── what is refused, by name ─────────────────────────────────────────────────────────────────────────────────────────

def found(model, tok) -> dict[str, Any]:
    "What searches and measurements give, by name."
    facts, texts = read_facts("pocket", "MadeOf"), ["a robin is a kind of bird .", "the girl met a boy ."]
    units, weights = Space.of(model, "head+mlp"), Space.of(model, "weight", layers=1)
    mask, few = Mask.random(units, .7, seed=0), dict[str, Any](steps=2, progress=False)
    under, ranks = {"full": None, "part": mask}, score.importance(model, tok, MLM(texts), units)
    out = {
        "heads": find(model, tok, HardConcrete(units, seed=0), Cloze(facts), **few).mask.id,
        "weights": find(model, tok, Threshold(weights, seed=0), Cloze(facts), **few).mask.id,
        "answers": evaluate.cloze(model, tok, facts, under).logprob.to_numpy(),
        "texts": np.asarray(evaluate.text_nll(model, tok, texts)),
        "held out": evaluate.HeldOut(model, tok, MLM(texts))(mask),
        "removed": evaluate.removal(model, tok, under, {"facts": facts}).logprob.to_numpy(),
        "importance": np.concatenate([v.ravel() for v in ranks.values.values()]),
        "attention": represent.attention_maps(model, tok, texts)[0][0][0][0],
        "smaller": compact(model, mask).model.num_parameters(),
    }
    data = task_data("pocket:entails", train=16, test=16).train
    return out | {"fine-tuned": fit(model, tok, data, **few).log.loss.to_numpy()}      # last: it changes the model


@pytest.fixture(scope="module")
def plainly() -> dict[str, Any]:
    return found(*load("pocket-bert"))


@same_weights
def test_searches_and_measurements(wrap, plainly):
    model, tok = load("pocket-bert")
    for name, value in found(wrap(model), tok).items():
        if isinstance(value, str): assert value == plainly[name], name
        else: assert value == pytest.approx(plainly[name], rel=1e-4, abs=1e-6), name


def test_adapters():
    "Heads of an adapted model can be masked; single weights that an adapter is added to cannot."
    plain, model = tiny("bert"), adapted(tiny("bert"))
    full, mask = logits(model), Mask.random(Space.of(model, "head"), .5, seed=0)
    with masked(model, mask): assert not close(logits(model), full)
    assert close(logits(model), full)
    for inside in (model, model.get_base_model(), model.base_model):
        assert Space.of(inside, "head") == mask.space and Space.of(inside, "weight", only="q,o").size
        with pytest.raises(HiddenWeights, match="merge_and_unload"): Space.of(inside, "weight")
        with pytest.raises(HiddenWeights, match="merge_and_unload"), \
             masked(inside, Mask.full(Space.of(plain, "weight")), check=False): pass
    assert Space.of(model.merge_and_unload(), "weight").size


def test_every_weight_counts_in_the_fingerprint():
    peft = pytest.importorskip("peft")
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
    config = tf.BertConfig(**sizes, intermediate_size=32)
    torch.manual_seed(0)
    model = peft.get_peft_model(tf.BertModel(config), peft.LoraConfig(r=2, target_modules=["query"])).eval()
    ids = {Space.of(model, "head").id}
    blocks = body_of(model).encoder.layer
    for p in blocks.parameters():
        with torch.no_grad(): p.view(-1)[0] += 1
        ids.add(Space.of(model, "head").id)
    assert len(ids) == 1 + len(list(blocks.parameters()))
    prune.random_unstructured(blocks[1].output.dense, "weight", .5)
    ids.add(Space.of(model, "head").id)
    blocks[1].output.dense.weight_mask[0] = 1 - blocks[1].output.dense.weight_mask[0]
    ids.add(Space.of(model, "head").id)
    assert len(ids) == 3 + len(list(blocks.parameters()))


def test_prompts_in_front_of_a_model_are_refused():
    peft = pytest.importorskip("peft")
    how = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny("gpt2"), how)
    for f in (Space.of, layout_of, is_causal, family_of):
        with pytest.raises(HiddenWeights, match="get_base_model"): f(model)


def offloaded(model):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))

def on_meta(model): return model.to("meta")

def in_eight_bits(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("make", [offloaded, on_meta, in_eight_bits], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_there(make, kind):
    mask, model = Mask.full(Space.of(tiny("bert"), kind)), make(tiny("bert"))
    with pytest.raises(HiddenWeights): Space.of(model, kind)
    with pytest.raises(HiddenWeights), masked(model, mask): pass
    with pytest.raises(HiddenWeights), masked(model, mask, check=False): pass


def pruned(m): return prune.l1_unstructured(m, "weight", .5)

def pruned_bias(m): return prune.l1_unstructured(m, "bias", .5)

MADE = [pruned, pruned_bias, weight_norm, parametrizations.weight_norm, parametrizations.orthogonal,
        nn.utils.spectral_norm]

@pytest.mark.parametrize("make", MADE, ids=lambda f: f"{f.__module__}.{f.__name__}")
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_made_from_others(make, family):
    "Whole units can be masked; the matrices themselves are refused, with the way to make them plain."
    if make is pruned_bias and family == "llama": return
    model = tiny(family)
    layout = layout_of(model)
    make(body_of(model).get_submodule(layout.module(1, "down")))
    kind = "bias" if make is pruned_bias else "weight"
    with pytest.raises(HiddenWeights, match="torch\\.nn\\.utils"): Space.of(model, kind)
    mask = Mask.full(Space.of(tiny(family), kind))
    with pytest.raises(HiddenWeights, match="torch\\.nn\\.utils"), masked(model, mask, check=False): pass
    assert Space.of(model, kind, layers=1).size
    full = logits(model)
    for units in ("head", "neuron", "mlp"):
        with masked(model, Mask.random(Space.of(model, units), .5, seed=0)): assert not close(logits(model), full)
        assert close(logits(model), full)


def test_blocks_that_differ():
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
                 num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=1)
    experts = dict(moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2)
    for first in (0, 1, 2):
        model = tf.Glm4MoeForCausalLM(tf.Glm4MoeConfig(**sizes, **experts, first_k_dense_replace=first))
        with pytest.raises(UnknownFamily, match=r"gate_proj|up_proj|no known layout"): Space.of(model, "head")
    small = dict(vocab_size_per_layer_input=64, hidden_size_per_layer_input=8)
    gemma = tf.Gemma4ForCausalLM(tf.Gemma4TextConfig(**sizes, **small, global_head_dim=16))
    with pytest.raises(UnknownFamily): Space.of(gemma, "head")
    odd = tiny("llama")
    odd.model.layers[1].mlp.up_proj = nn.Linear(16, 32)                       # with a bias, unlike the first
    with pytest.raises(UnknownFamily, match="block 2 has another bias"): Space.of(odd, "head")
    odd.model.layers[1].mlp.up_proj = nn.Linear(16, 48, bias=False)
    with pytest.raises(UnknownFamily, match="in block 2 has shape"): Space.of(odd, "head")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("gate", [HardConcrete, Threshold])
def test_searches_in_half_precision(dtype, precision, gate):
    model, tok = load("pocket-bert", dtype=dtype)
    space = Space.of(model, "head" if gate is HardConcrete else "weight", layers=4)
    def go(): return find(model, tok, gate(space, seed=0), Cloze(read_facts("pocket", "MadeOf")), steps=1,
                          precision=precision, progress=False)
    if dtype == torch.bfloat16 and precision == "bfloat16": assert np.isfinite(go().metrics.loss).all()
    else:
        with pytest.raises(SubnetError, match="load the model in float32"): go()
