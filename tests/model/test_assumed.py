"What is assumed of heads, neurons, maps to weights and output layers, tried on families where it does not hold."
from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf

from subnet_explorer import Cloze, Mask, Space, Threshold, evaluate, find, load, masked, read_facts
from subnet_explorer.core.errors import SubnetError, UnknownFamily
from subnet_explorer.core.layout import FAMILIES, layout_of
from subnet_explorer.data.facts import encode
from subnet_explorer.model import assumed, sequences
from subnet_explorer.model.assumed import check_assumed, difference
from subnet_explorer.model.load import tiny
from subnet_explorer.model.sequences import Sequences

IDS = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))
SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
             max_position_embeddings=96)
CAUSAL = dict(**SIZES, num_key_value_heads=2, pad_token_id=0, bos_token_id=0, eos_token_id=1)
ADDED = {
    "opt": dict(blocks="decoder.layers", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj",
                o="self_attn.out_proj", up="fc1", down="fc2"),
    "gpt_neox": dict(blocks="layers", qkv="attention.query_key_value", o="attention.dense",
                     up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
    "bloom": dict(blocks="h", qkv="self_attention.query_key_value", o="self_attention.dense",
                  up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
    "phi": dict(blocks="layers", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj",
                o="self_attn.dense", up="mlp.fc1", down="mlp.fc2"),
    "gpt_bigcode": dict(blocks="h", qkv="attn.c_attn", o="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj"),
}
"Families as an error message asks people to add them."


def drawn(model):
    torch.manual_seed(0)
    for p in model.parameters(): torch.nn.init.normal_(p, std=.2)
    return model.eval()


def opt(words: int = 64):
    small = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32)
    return tf.OPTForCausalLM(tf.OPTConfig(vocab_size=words, max_position_embeddings=96, **small))


BUILD = {
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**CAUSAL)),
    "olmo3": lambda: tf.Olmo3ForCausalLM(tf.Olmo3Config(**CAUSAL)),
    "diffllama": lambda: tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(**CAUSAL)),
    "bitnet": lambda: tf.BitNetForCausalLM(tf.BitNetConfig(**CAUSAL)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**CAUSAL, head_dim=8)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**CAUSAL, head_dim=8)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**CAUSAL, head_dim=8)),
    "smollm3": lambda: tf.SmolLM3ForCausalLM(tf.SmolLM3Config(**CAUSAL)),
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**CAUSAL)),
    "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**CAUSAL)),
    "one-key": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**{**CAUSAL, "num_key_value_heads": 1})),
    "opt": opt,
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SIZES)),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=3, n_head=4)),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**CAUSAL)),
    "longformer": lambda: tf.LongformerForMaskedLM(tf.LongformerConfig(
        **{**SIZES, "max_position_embeddings": 200}, attention_window=32, pad_token_id=0)),
    "camembert": lambda: tf.CamembertForMaskedLM(tf.CamembertConfig(**SIZES)),
    "bert-pre": lambda: tf.RobertaPreLayerNormForMaskedLM(tf.RobertaPreLayerNormConfig(**SIZES)),
}
MODELS = [*BUILD, *FAMILIES]


@pytest.fixture(params=MODELS)
def model(request, monkeypatch):
    name = request.param
    if name in ADDED: monkeypatch.setitem(FAMILIES, name, ADDED[name])
    return drawn(BUILD[name]()) if name in BUILD else drawn(tiny(name))


@torch.no_grad()
def logits(m) -> torch.Tensor: return m(input_ids=IDS % m.config.vocab_size).logits

def far(a, b) -> float: return float((a - b).abs().max() / b.abs().max())


def _without_values(model, off: dict[int, list[int]]) -> torch.Tensor:
    "Logits with the attention of some heads added up from nothing, by the attention function of transformers itself."
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    real, called = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def attend(module, query, key, value, *args, **kwargs):
        out, maps = real(module, query, key, value, *args, **kwargs)
        called.append(module)
        out = out.clone()
        out[:, :, off[module.layer_idx]] = 0
        return out, maps
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try: found = logits(model)
    finally: ALL_ATTENTION_FUNCTIONS["sdpa"] = real
    assert called
    return found


@pytest.mark.parametrize("name", [
    "olmo2", "qwen3", "gemma2", "gpt_neox", "opt", "phi", "cohere", "one-key", "llama", "gpt2",
])
def test_a_head_that_is_off_attends_to_nothing(name, monkeypatch):
    if name in ADDED: monkeypatch.setitem(FAMILIES, name, ADDED[name])
    model = drawn(BUILD[name]() if name in BUILD else tiny(name))
    space, off = Space.of(model, "head"), {i: [i % 4, 3] for i in range(3)}
    bits = {g.name: ~np.isin(np.arange(4), off[g.layer]) for g in space.groups}
    try:
        with masked(model, Mask.of(space, bits)): found = logits(model)
    except UnknownFamily: pytest.fail("heads of this family can be masked")
    if model.config._attn_implementation == "sdpa": assert far(found, _without_values(model, off)) < 1e-5


def test_the_full_map_is_exact_or_refused(model):
    for kind in ("head", "neuron", "mlp", "layer"): exact_or_refused(model, kind)

def exact_or_refused(model, kind):
    mask = Mask.random(Space.of(model, kind), .5, seed=0)
    try:
        with masked(model, mask): wanted = logits(model)
    except UnknownFamily as e:
        assert "are not what a mask over" in str(e) or "could not be tried" in str(e)
        return
    with masked(model, mask.to("weight")): assert far(logits(model), wanted) < 1e-4
    whole = mask.to("weight", how="full")
    for full in (whole, whole.rebase(whole.space)):
        for check in (True, False):
            try:
                with masked(model, full, check=check): found = logits(model)
            except UnknownFamily as e: assert "not the same subnetwork" in str(e)
            else: assert far(found, wanted) < 1e-4


@pytest.mark.parametrize("name, what, holds", [
    ("olmo2", "head", True), ("olmo2", "full", False), ("olmo3", "full", False), ("diffllama", "head", False),
    ("bitnet", "head", False), ("bitnet", "neuron", False), ("qwen3", "full", True), ("gemma3", "full", True),
    ("gpt_neox", "head", True), ("gpt_neox", "full", False), ("bloom", "head", True), ("bloom", "full", False),
    ("opt", "full", True), ("phi", "full", True), ("one-key", "full", True), ("longformer", "head", True),
])
def test_which_families_hold_what(name, what, holds, monkeypatch):
    if name in ADDED: monkeypatch.setitem(FAMILIES, name, ADDED[name])
    model = drawn(BUILD[name]())
    apart, close = difference(model, layout_of(model), what)
    assert (apart <= close) == holds
    if holds: check_assumed(model, layout_of(model), [what])
    else:
        said = f"{apart:.2g} of the largest"
        with pytest.raises(UnknownFamily, match=said): check_assumed(model, layout_of(model), [what])


@pytest.mark.parametrize("scale", [.02, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_of_weights_does_not_matter(scale, dtype):
    cases = [("olmo2", "full", False), ("olmo2", "head", True), ("diffllama", "head", False), ("qwen3", "full", True)]
    for name, what, holds in cases:
        model = drawn(BUILD[name]())
        with torch.no_grad():
            for p in model.parameters(): p.mul_(scale / .2) if p.dim() > 1 else p.fill_(1)
        apart, close = difference(model.to(dtype), layout_of(model), what)
        assert (apart <= close) == holds, (name, what, apart)


def test_once_and_without_a_trace(monkeypatch):
    model = drawn(BUILD["olmo2"]()).train()
    calls, real = [], assumed.difference
    monkeypatch.setattr(assumed, "difference", lambda *a: (calls.append(a[2]), real(*a))[1])
    model.model.layers[1].eval()
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    mask = Mask.random(Space.of(model, "head+neuron"), .5, seed=0)
    for _ in range(3):
        with masked(model, mask): pass
        with pytest.raises(UnknownFamily), masked(model, mask.to("weight", how="full")): pass
    assert sorted(calls) == ["full", "head", "neuron"]
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_matrices_that_are_never_called():
    model = tiny("bert")
    for layer in model.bert.encoder.layer:
        layer.attention.output.forward = lambda states, inputs: states[..., :16] + inputs      # its matrix is passed by
    with pytest.raises(UnknownFamily), masked(model, Mask.full(Space.of(model, "head"))): pass


# ── predictions ──────────────────────────────────────────────────────────────────────────────────────────────────────

def own_answers(model, tok, facts) -> list[float]:
    "Log-probabilities by the model's own forward pass, one prompt at a time."
    found = []
    for f in facts:
        ids, position, gold = encode(tok, f, "Causal" in type(model).__name__)
        with torch.no_grad(): found.append(float(model(torch.tensor([ids])).logits[0, position].log_softmax(-1)[gold]))
    return found


@pytest.mark.parametrize("name", ["opt", "gpt_neox", "gemma2", "granite", "longformer"])
def test_cloze_asks_the_model_itself(name, monkeypatch):
    if name in ADDED: monkeypatch.setitem(FAMILIES, name, ADDED[name])
    _, tok = load("pocket-bert" if name == "longformer" else "pocket-gpt2")
    monkeypatch.setitem(SIZES, "vocab_size", len(tok))
    monkeypatch.setitem(CAUSAL, "vocab_size", len(tok))
    model = drawn(opt(len(tok)) if name == "opt" else BUILD[name]())
    facts = read_facts("pocket", "MadeOf")
    table = evaluate.cloze(model, tok, facts, {"full": None})
    assert np.allclose(table.logprob, own_answers(model, tok, facts), atol=1e-4)
    gate = Threshold(Space.of(model, "weight", layers=[3]), seed=0)
    run = find(model, tok, gate, Cloze(facts), steps=1, progress=False)
    half = evaluate.cloze(model, tok, facts, {"half": run.mask})
    with masked(model, run.mask): assert np.allclose(half.logprob, own_answers(model, tok, facts), atol=1e-4)


def test_a_head_that_reads_more_is_refused():
    class Skipping(tf.BertForMaskedLM):
        def forward(self, input_ids, **kwargs):
            out = super().forward(input_ids, **kwargs)
            out.logits = out.logits + self.get_output_embeddings()(self.get_input_embeddings()(input_ids))
            return out
    model = drawn(Skipping(tf.BertConfig(**SIZES)))
    seqs = Sequences(model, [[7, 12, 33]])
    with pytest.raises(SubnetError, match="predicts otherwise"): seqs.read(np.arange(1), [0], [1])
    assert seqs.hidden(np.arange(1), [0], [1]).shape == (1, 32)
    assert sequences.objection(drawn(tf.BertForMaskedLM(tf.BertConfig(**SIZES)))) == ""
