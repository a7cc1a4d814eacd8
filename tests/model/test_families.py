"What masks promise, on every family, against independent implementations: the paths are written out again."
from __future__ import annotations

import copy

import pytest
import torch

from subnet_explorer.core.errors import SpaceMismatch, SubnetError
from subnet_explorer.core.layout import FAMILIES, family_of
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.scores import Scores
from subnet_explorer.core.space import Space
from subnet_explorer.model.apply import applied, attending, masked
from subnet_explorer.model.load import tiny

IDS = torch.tensor([[7, 12, 33, 5, 21, 9, 14], [30, 6, 6, 25, 11, 2, 8]])
REAL = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])

# block, value projection, attention output, first and second MLP linear (on purpose not read from FAMILIES)
BERT = ("attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense")
PATHS = {
    "bert": ("bert.encoder.layer.{}.", *BERT),
    "roberta": ("roberta.encoder.layer.{}.", *BERT),
    "electra": ("electra.encoder.layer.{}.", *BERT),
    "distilbert": ("distilbert.transformer.layer.{}.", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"),
    "mpnet": ("mpnet.encoder.layer.{}.", "attention.attn.v", "attention.attn.o", "intermediate.dense", "output.dense"),
    "gpt2": ("transformer.h.{}.", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "llama": ("model.layers.{}.", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"),
    "xlm-roberta": ("roberta.encoder.layer.{}.", *BERT),
    "mistral": ("model.layers.{}.", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"),
}
HEAD_DIM, LAYER, HEADS, NEURONS = 4, 1, [0, 1], [3, 30]      # heads 0 and 1 share keys and values in Llama


def build(name: str):
    "A tiny random model: a known family, or one that only its structure gives away."
    if name in FAMILIES: return tiny(name)
    import transformers as tf
    torch.manual_seed(0)
    common = dict(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=32,
    )
    model = (tf.XLMRobertaForMaskedLM(tf.XLMRobertaConfig(**common)) if name == "xlm-roberta" else
             tf.MistralForCausalLM(tf.MistralConfig(**common, num_key_value_heads=2, bos_token_id=0, eos_token_id=0)))
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.fixture(params=PATHS)
def name(request): return request.param

@pytest.fixture
def model(name): return build(name)


@torch.no_grad()
def logits(m) -> torch.Tensor: return m(input_ids=IDS, attention_mask=REAL).logits

def part(m, name: str, which: int): return m.get_submodule((PATHS[name][0] + PATHS[name][which]).format(LAYER))

def out_axis(module, w): return w.T if type(module).__name__ == "Conv1D" else w      # a view with output features first

def off(space: Space, **where) -> Mask:
    "Everything kept but some coordinates of layer LAYER: kind=indices."
    m = Mask.full(space)
    bits = {g.name: b for g, b in m.items()}
    for kind, index in where.items(): bits[f"layer.{LAYER}.{kind}"][index] = False
    return Mask.of(space, bits)


def same(a, b, tol=1e-5): return torch.allclose(a, b, atol=tol, rtol=0)


# ── identity and restoration ─────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("kind", ["weight", "block", "neuron", "head", "mlp", "layer", "head+neuron+mlp"])
def test_identity_is_bit_equal(model, kind):
    space = Space.of(model, kind, block=(3, 5) if kind == "block" else None)
    full = logits(model)
    with masked(model, Mask.full(space)) as n:
        assert n == 0 and torch.equal(logits(model), full)
    with masked(model, None) as n: assert n == 0 and torch.equal(logits(model), full)


def snapshot(model):
    return ({k: v.clone() for k, v in model.state_dict().items()}, dict(model.named_parameters(remove_duplicate=False)),
            [p.requires_grad for p in model.parameters()], model.training)

def assert_untouched(model, before):
    state, params, grads, training = before
    now = model.state_dict()
    assert list(now) == list(state) and all(torch.equal(now[k], v) for k, v in state.items())
    found = dict(model.named_parameters(remove_duplicate=False))
    assert list(found) == list(params) and all(found[k] is p for k, p in params.items())
    assert [p.requires_grad for p in model.parameters()] == grads and model.training == training
    for m in model.modules(): assert not m._forward_hooks and not m._forward_pre_hooks and not m._backward_hooks


@pytest.mark.parametrize("kind", ["weight", "block", "head+neuron+mlp", "layer"])
@pytest.mark.parametrize("end", [None, KeyError, KeyboardInterrupt])
def test_restored_bit_by_bit(model, kind, end):
    space = Space.of(model, kind, block=(3, 5) if kind == "block" else None, embeddings=kind == "weight")
    m = Mask.random(space, .5, seed=1)
    before, full = snapshot(model), logits(model)
    try:
        with masked(model, m) as n:
            assert n == m.space.size - m.count and not same(logits(model), full, 1e-3)
            if end: raise end
    except BaseException as e: assert type(e) is end
    assert_untouched(model, before)
    assert torch.equal(logits(model), full)


def test_refused_masks_leave_the_model_alone():
    model, other = tiny("bert"), tiny("bert", seed=1)
    before = snapshot(model)
    foreign = Mask.full(Space.of(other, "head"))
    with pytest.raises(SpaceMismatch, match="another model"), masked(model, foreign): pass
    soft = Scores(Space.of(model, "head"), {g.name: torch.ones(4).numpy() for g in Space.of(model, "head").groups})
    with pytest.raises(SubnetError, match="binary mask"), masked(model, soft, train=True): pass
    assert_untouched(model, before)
    with masked(model, foreign, check=False) as n: assert n == 0


# ── meaning ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_weight_mask_is_a_product(model):
    m = Mask.random(Space.of(model, "weight"), .5, seed=2)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for g, bits in m.items(): twin.base_model.get_parameter(g.name).mul_(torch.tensor(bits))
    with masked(model, m): assert torch.equal(logits(model), logits(twin))
    s = Scores(m.space, {g.name: bits * .5 for g, bits in m.items()})
    with torch.no_grad():
        for g, _ in m.items(): twin.base_model.get_parameter(g.name).mul_(.5)
    with masked(model, s): assert same(logits(model), logits(twin))


@pytest.mark.parametrize("heads", [HEADS, [0, 1, 2, 3], [2]])
def test_head_off_is_its_output_projection_off(model, name, heads):
    twin = copy.deepcopy(model)
    o = part(twin, name, 2)
    with torch.no_grad():
        for h in heads: out_axis(o, o.weight)[:, h * HEAD_DIM:(h + 1) * HEAD_DIM] = 0
    with masked(model, off(Space.of(model, "head"), head=heads)) as n:
        assert n == len(heads) and same(logits(model), logits(twin))
        assert not same(logits(model), logits(build(name)), 1e-3)


@pytest.mark.parametrize("heads", [HEADS, [0, 1, 2, 3]])
def test_head_off_is_its_values_off(model, name, heads):
    "The other side: an attention whose values are all zero, bias included, adds nothing, whatever it attends to."
    twin = copy.deepcopy(model)
    v, grouped = part(twin, name, 1), name in ("llama", "mistral")
    start = 2 * 16 if name == "gpt2" else 0                            # query, key, value in one matrix
    with torch.no_grad():
        for h in {h // 2 for h in heads} if grouped else heads:
            at = slice(start + h * HEAD_DIM, start + (h + 1) * HEAD_DIM)
            out_axis(v, v.weight)[at] = 0
            if v.bias is not None: v.bias[at] = 0
    with masked(model, off(Space.of(model, "head"), head=heads)): assert same(logits(model), logits(twin))


def test_mlp_off_includes_the_bias(model, name):
    twin = copy.deepcopy(model)
    part(twin, name, 4).register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    with masked(model, off(Space.of(model, "mlp"), mlp=[0])): assert same(logits(model), logits(twin))


def test_neuron_off_is_its_row_off(model, name):
    twin = copy.deepcopy(model)
    up = part(twin, name, 3)
    with torch.no_grad():                                              # gelu(0) = 0, and silu(gate) · 0 = 0
        out_axis(up, up.weight)[NEURONS] = 0
        if up.bias is not None: up.bias[NEURONS] = 0
    with masked(model, off(Space.of(model, "neuron"), neuron=NEURONS)): assert same(logits(model), logits(twin))


def test_layer_off_is_attention_and_mlp_off(model, name):
    twin = copy.deepcopy(model)
    for which in (2, 4): part(twin, name, which).register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    with masked(model, off(Space.of(model, "layer"), layer=[0])): assert same(logits(model), logits(twin))


def test_a_gate_for_every_example(model):
    space = Space.of(model, "head+neuron+mlp")
    rows = [Mask.random(space, .5, seed=s) for s in (1, 2)]
    values = {g.name: torch.stack([torch.tensor(r[g.name]).float() for r in rows]) for g in space.groups}
    with applied(model, space, values): both = logits(model)
    for i, r in enumerate(rows):
        with masked(model, r): assert same(logits(model)[i], both[i])


def test_embeddings_are_one_coordinate(model):
    space = Space.of(model, "weight", embeddings=True)
    (group,) = [g for g in space.groups if g.role == "embedding"]
    assert group.shape == tuple(model.get_input_embeddings().weight.shape)
    assert [g.name for g in space.groups].count(group.name) == 1
    m = Mask.full(space)
    bits = {g.name: b for g, b in m.items()} | {group.name: Mask.random(space, .5, seed=3)[group.name]}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    twin = copy.deepcopy(model)
    with torch.no_grad():                      # the same tensor in the output layer, if tied
        twin.get_input_embeddings().weight.mul_(torch.tensor(bits[group.name]))
    with masked(model, Mask.of(space, bits)):
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
        assert torch.equal(logits(model), logits(twin))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_some_families_tie_their_embeddings():
    tied = [f for f in FAMILIES if (m := tiny(f)).get_output_embeddings().weight is m.get_input_embeddings().weight]
    assert {"bert", "roberta", "gpt2"} <= set(tied) and "llama" not in tied


@pytest.mark.parametrize("kind", ["weight", "head+mlp"])
def test_masks_survive_another_attention_kernel(model, kind):
    m = Mask.random(Space.of(model, kind), .5, seed=4)
    with masked(model, m): default = logits(model)
    before = model.config._attn_implementation
    with attending(model):
        assert model.config._attn_implementation == "eager"
        maps = model(input_ids=IDS, attention_mask=REAL, output_attentions=True).attentions
        assert len(maps) == 2 and maps[0].shape == (2, 4, 7, 7)
    assert model.config._attn_implementation == before
    with masked(model, m):
        model.set_attn_implementation("eager")
        assert same(logits(model), default)
    with masked(model, m): assert same(logits(model), default)


@pytest.mark.parametrize("name, family", [("xlm-roberta", "bert"), ("mistral", "llama")])
def test_structure_gives_the_family_away(name, family): assert family_of(build(name)) == family


def test_half_precision_identity():
    model = tiny("bert").to(torch.bfloat16)
    full = logits(model)
    for kind in ("weight", "head"):
        with masked(model, Mask.full(Space.of(model, kind))): assert torch.equal(logits(model), full)


# ── training inside a mask ───────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("kind", ["weight", "head+mlp"])
@pytest.mark.parametrize("optimizer", [
    lambda p: torch.optim.AdamW(p, lr=.01, weight_decay=.1),
    lambda p: torch.optim.SGD(p, lr=.1, momentum=.9),
], ids=["adamw", "sgd"])
def test_training_keeps_the_zeros(model, kind, optimizer):
    m = Mask.random(Space.of(model, kind), .5, seed=5)
    fine = m.to("weight")
    start = {g.name: model.base_model.get_parameter(g.name).detach().clone() for g in fine.space.groups}
    opt = optimizer(model.parameters())
    def step():
        opt.zero_grad()
        model(input_ids=IDS, attention_mask=REAL, labels=IDS).loss.backward()
        opt.step()
    with masked(model, m, train=True):
        for _ in range(3): step()
    for g, bits in fine.items():
        w, keep = model.base_model.get_parameter(g.name).detach(), torch.tensor(bits)
        assert (w[~keep] == 0).all()
        if keep.any(): assert (w[keep] != start[g.name][keep]).any()
    with masked(model, m, check=False): inside = logits(model)
    assert same(logits(model), inside, 1e-6)                           # the trained model is its own subnetwork


def test_training_hooks_go_away_after_an_exception():
    model = tiny("bert")
    m = Mask.random(Space.of(model, "weight"), .5, seed=5)
    with pytest.raises(KeyError), masked(model, m, train=True): raise KeyError
    model(input_ids=IDS, labels=IDS).loss.backward()
    g, bits = m.items()[0]
    assert (model.base_model.get_parameter(g.name).grad[torch.tensor(~bits)] != 0).any()


# ── other machines ───────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["weight", "head+neuron+mlp"])
def test_the_same_on_a_gpu(kind):
    model = tiny("bert")
    m = Mask.random(Space.of(model, kind), .5, seed=1)
    with masked(model, m): wanted = logits(model)
    model.cuda()
    def gpu(): return model(input_ids=IDS.cuda(), attention_mask=REAL.cuda()).logits.detach().cpu()
    full = gpu()
    with masked(model, m): assert same(gpu(), wanted, 1e-3)
    with masked(model, Mask.full(m.space)): assert torch.equal(gpu(), full)
    assert torch.equal(gpu(), full)


@pytest.mark.real
def test_a_real_model(real):
    from subnet_explorer.model.load import load
    model, tok = load(real / "models" / "minilm-l6-mlm")
    inputs = tok(["paris is the capital of [MASK] .", "[MASK] is red ."], return_tensors="pt", padding=True)
    run = torch.no_grad()(lambda: model(**inputs).logits)
    before, full = snapshot(model), run()
    for kind in ("weight", "head+mlp"):
        space = Space.of(model, kind, layers="top-half")
        with masked(model, Mask.full(space)): assert torch.equal(run(), full)
        m = Mask.random(space, .5, seed=0)
        with masked(model, m): gated = run()
        assert not same(gated, full, 1e-2)
        with masked(model, m.to("weight", how="full")): assert same(run(), gated, 1e-3)
    assert_untouched(model, before)
