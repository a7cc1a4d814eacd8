"What compact promises, on every family: the outputs of the masked model, from fewer parameters."
from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given, settings, strategies as st

from subnet_explorer import compact, load_compact
from subnet_explorer.core.errors import SpaceMismatch, SubnetError, UnknownFamily
from subnet_explorer.core.layout import FAMILIES, family_of
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.maskfile import MaskFileError
from subnet_explorer.core.scores import Scores
from subnet_explorer.core.space import Space
from subnet_explorer.model.apply import attending, blocks_of, masked
from subnet_explorer.model.compact import compared, digest
from subnet_explorer.model.cut import remains
from subnet_explorer.model.export import NotExpressible, filled
from subnet_explorer.model.load import UnknownModel, load, tiny
from subnet_explorer.search.distil import MLM
from subnet_explorer.tasks.fit import fit

IDS = torch.tensor([[7, 12, 33, 5, 21, 9, 14], [30, 6, 6, 25, 11, 2, 8]])
REAL = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
PRE = ("gpt2", "llama", "llama-bias", "mistral", "qwen2", "qwen3")      # norms first: a removed layer is the identity
COMMON = dict(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
    max_position_embeddings=32,
)


def build(name: str):
    "A tiny random model: a known family, or a relative that only its structure gives away."
    if name in FAMILIES: return tiny(name)
    torch.manual_seed(0)
    both = dict(attention_bias=True, mlp_bias=True)
    grouped = dict(**COMMON, num_key_value_heads=2, bos_token_id=0, eos_token_id=0)
    model = {"xlm-roberta": lambda: tf.XLMRobertaForMaskedLM(tf.XLMRobertaConfig(**COMMON)),
             "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**grouped)),
             "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**grouped)),      # biases at q, k, v only
             "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**grouped, head_dim=8)),      # norms in wide heads
             "llama-bias": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**grouped, **both))}[name]()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.2)
    return model.eval()


RELATIVES = ["xlm-roberta", "mistral", "qwen2", "qwen3", "llama-bias"]
ANATOMIES = ["bert", "distilbert", "mpnet", "gpt2", "llama"]      # RoBERTa and ELECTRA are built like BERT
MODELS = {n: build(n) for n in [*FAMILIES, *RELATIVES]}           # borrowed by every test; none may change them


def off(space: Space, *where: tuple[int, str, list[int]]) -> Mask:
    "Everything kept but some (layer, kind, indices)."
    bits = {g.name: np.ones(g.shape, bool) for g in space.groups}
    for layer, kind, index in where: bits[f"layer.{layer}.{kind}"][index] = False
    return Mask.of(space, bits)


CASES = {
    "heads": ("head", [(0, "head", [1]), (1, "head", [0, 2, 3])]),                       # uneven, and uneven groups
    "group": ("head", [(1, "head", [0, 1])]),                                            # a key/value head goes
    "pairs": ("head", [(0, "head", [1, 3])]),      # one query head per key/value head
    "no heads": ("head", [(0, "head", [0, 1, 2, 3])]),
    "neurons": ("neuron", [(0, "neuron", [0, 5, 31]), (1, "neuron", list(range(17)))]),
    "no neurons": ("neuron", [(0, "neuron", list(range(32)))]),
    "mlp": ("mlp", [(1, "mlp", [0])]),
    "layer": ("layer", [(0, "layer", [0])]),
    "last layer": ("layer", [(1, "layer", [0])]),
    "union": ("head+mlp+neuron", [
        (0, "head", [2]), (0, "neuron", [4, 7]), (1, "mlp", [0]), (1, "head", [3]), (1, "neuron", [1]),
    ]),
    "all kinds": ("head+mlp+neuron+layer", [(0, "layer", [0]), (0, "head", [0]), (1, "head", [1]), (1, "neuron", [2])]),
    "nothing": ("head+neuron", []),
}


def some(names, cases=("",)):
    pairs = [pytest.param(n, c, id=f"{n}-{c}".strip("-")) for n in names for c in cases]
    return pytest.mark.parametrize(("name", "case"), pairs)

@pytest.fixture
def model(name): return MODELS[name]

@pytest.fixture
def mask(case, model): return off(Space.of(model, CASES[case][0]), *CASES[case][1])


@torch.no_grad()
def logits(m, ids=IDS, real=REAL, **more) -> torch.Tensor: return m(input_ids=ids, attention_mask=real, **more).logits

def size(m) -> int: return sum(p.numel() for p in m.parameters())

def close(a, b, scale: float = 1e-5):
    assert float((a.float() - b.float()).abs().max()) <= scale * max(1.0, float(b.float().abs().max()))


# ── the same outputs ─────────────────────────────────────────────────────────────────────────────────────────────────

@some(FAMILIES, CASES)
def test_compact_is_the_masked_model(model, mask): same_outputs(model, mask)

@some(RELATIVES, ("heads", "union", "layer", "no heads"))
def test_relatives(model, mask): same_outputs(model, mask)

def same_outputs(model, mask):
    before = {n: t.clone() for n, t in model.state_dict().items()}
    small = compact(model, mask)
    with masked(model, mask): wanted, bare = logits(model), logits(model, real=None)
    close(logits(small.model), wanted)
    close(logits(small.model, real=None), bare)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not hasattr(model.base_model, "compacted")
    mine, theirs = ({p.data_ptr() for p in m.parameters() if p.numel()} for m in (model, small.model))
    assert not mine & theirs


@some([*ANATOMIES, "llama-bias"], CASES)
def test_parameters_are_those_of_the_full_map(model, mask):
    "What goes is what `to('weight', how='full')` switches off; beside it only the norms of blocks that go as a whole."
    small, weights = compact(model, mask), mask.to("weight", how="full")
    gone = [b for i, b in enumerate(blocks_of(model, family_of(model))[2]) if i not in small.layers]
    norms = sum(p.numel() for b in gone for n, p in b.named_parameters() if "norm" in n or "ln_" in n)
    assert size(small.model) == size(model) - (weights.space.size - weights.count) - norms


@some(ANATOMIES, ("heads", "group", "no heads", "union", "layer", "last layer"))
def test_hidden_states_and_attention_maps(name, model, mask):
    "Of the layers and heads that are left."
    small = compact(model, mask)
    rests = [r for r in remains(mask) if r.layer in small.layers]
    with torch.no_grad(), attending(model), attending(small.model):
        asked = dict(input_ids=IDS, attention_mask=REAL, output_hidden_states=True, output_attentions=True)
        with masked(model, mask): wanted = model(**asked)
        got = small.model(input_ids=IDS, attention_mask=REAL, output_hidden_states=True, output_attentions=True)
    assert len(got.attentions) == len(rests) and len(got.hidden_states) == len(rests) + 1
    for place, r in enumerate(rests):
        assert got.attentions[place].shape[1] == len(r.heads)
        if r.heads: close(got.attentions[place], wanted.attentions[r.layer][:, list(r.heads)])
        if place + 1 < len(rests) or name not in PRE:
            close(got.hidden_states[place + 1], wanted.hidden_states[r.layer + 1])
    close(got.hidden_states[-1], wanted.hidden_states[-1])


@pytest.mark.parametrize("which", ["heads", "no heads", "layer", "group"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_it_writes_with_a_cache(name, which):
    model = MODELS[name]
    mask = off(Space.of(model, CASES[which][0]), *CASES[which][1])
    small = compact(model, mask).model
    with torch.no_grad():
        with masked(model, mask): wanted = model(input_ids=IDS).logits[:, -1]
        start = small(input_ids=IDS[:, :4], use_cache=True)
        step = small(input_ids=IDS[:, 4:5], past_key_values=start.past_key_values, use_cache=True)
        close(small(input_ids=IDS[:, 5:], past_key_values=step.past_key_values, use_cache=True).logits[:, -1], wanted)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_uneven_groups_under_both_attentions(implementation):
    model = copy.deepcopy(MODELS["llama"])
    model.set_attn_implementation(implementation)
    mask = off(Space.of(model, "head"), *CASES["heads"][1])
    with masked(model, mask): wanted = logits(model)
    close(logits(compact(model, mask).model), wanted)


@pytest.mark.parametrize("name", ANATOMIES)
def test_half_precision(name, tmp_path):
    model = copy.deepcopy(MODELS[name]).bfloat16()
    mask = off(Space.of(model, "head+mlp+neuron"), *CASES["union"][1])
    small = compact(model, mask)
    with masked(model, mask): wanted = logits(model)
    assert {p.dtype for p in small.model.parameters()} == {torch.bfloat16}
    close(logits(small.model), wanted, 0.05)
    assert torch.equal(logits(load_compact(small.save(tmp_path)).model), logits(small.model))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["bert", "mpnet", "gpt2", "llama"]), st.integers(0, 2**32 - 1), st.sampled_from([0.2, 0.5, 0.8]))
def test_random_masks(name, seed, density):
    model, space = MODELS[name], Space.of(MODELS[name], "head+mlp+neuron")
    rng = np.random.default_rng(seed)
    mask = Mask.of(space, {g.name: rng.random(g.shape) < density for g in space.groups})
    try: small = compact(model, mask)
    except SubnetError as e:
        assert "nothing is left" in str(e) and not any(mask[g.name].any() for g in space.groups if g.kind == "head")
        return
    with masked(model, mask): wanted = logits(model)
    close(logits(small.model), wanted)
    close(logits(filled(small)), wanted)


def test_tasks_heads_and_bare_models():
    for cls in (tf.BertModel, tf.BertForSequenceClassification):
        torch.manual_seed(0)
        model = cls(tf.BertConfig(**COMMON)).eval()
        mask = off(Space.of(model, "head"), *CASES["heads"][1])
        small = compact(model, mask).model
        with torch.no_grad():
            with masked(model, mask): wanted = model(input_ids=IDS, attention_mask=REAL)[0]
            close(small(input_ids=IDS, attention_mask=REAL)[0], wanted)


# ── masks over weights ───────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", ANATOMIES)
def test_weight_masks_with_a_rule(model):
    "Whole units go; scattered zeros in what stays are zeros there."
    units = off(Space.of(model, "head+neuron"), (0, "head", [0, 1]), (1, "neuron", [3, 4, 9]))
    whole = units.to("weight", how="full")
    space = Space.of(model, "weight")
    random = Mask.random(space, 0.7, 0)
    bits = {g.name: random[g.name] for g in space.groups}
    for name in bits.keys() & whole.space.by_name.keys(): bits[name] = bits[name] & whole[name]
    mask = Mask.of(space, bits)
    small = compact(model, mask, keep="any")
    found = {g.name: small.units[g.name].tolist() for g in units.space.groups}
    assert found == {g.name: b.tolist() for g, b in units.items()}
    with masked(model, mask): wanted = logits(model)
    close(logits(small.model), wanted)
    stricter = compact(model, mask, keep=0.69)
    assert size(stricter.model) < size(small.model)
    with masked(model, mask), masked(model, stricter.units, check=False): wanted = logits(model)
    close(logits(stricter.model), wanted)


def test_weight_masks_with_embeddings():
    "Zeros in the word embedding, which the output shares."
    model = MODELS["bert"]
    space = Space.of(model, "weight", layers=[2], embeddings=True)
    first = {g.name: np.zeros(g.shape, bool) for g in space.groups}
    for g in space.groups:
        if g.role == "o": first[g.name][:, :4] = True
    mask = Mask.random(space, 0.6, 0) & ~Mask.of(space, first)
    small = compact(model, mask, keep=0.5)
    assert 0 not in remains(small.units)[1].heads
    with masked(model, mask), masked(model, small.units, check=False): wanted = logits(model)
    close(logits(small.model), wanted)


def test_weight_masks_without_output_matrices():
    model = MODELS["bert"]
    asked = Mask.full(Space.of(model, "weight", only="q,k"))
    with pytest.raises(SubnetError, match="removes no whole unit: a head goes with"): compact(model, asked, keep="any")
    some = Mask.full(Space.of(model, "weight", only="up,down"))
    assert compact(model, some, keep="any").units.space.kind == "neuron"


# ── afterwards ───────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", ["pocket-bert", "pocket-gpt2"])
def test_it_can_be_trained_and_saved(name, tmp_path):
    model, tok = load(name)
    gone = [(0, "head", [0, 1, 2, 3]), (1, "head", [1]), (1, "mlp", [0]), (2, "neuron", list(range(100)))]
    mask = off(Space.of(model, "head+neuron+mlp"), *gone)
    small = compact(model, mask)
    text = ["a robin is a kind of bird .", "a spoon is used for eating ."]
    if name == "pocket-bert": fit(small.model, tok, MLM(text), steps=3, batch=2, to=tmp_path / "fit")
    ids = tok(text, return_tensors="pt", padding=True).input_ids
    small.model.train()
    loss = small.model(input_ids=ids, labels=ids).loss
    loss.backward()
    unused = {"transformer.h.0.ln_1"}                     # the norm before heads that are gone
    idle = {n.rpartition(".")[0] for n, p in small.model.named_parameters() if p.numel() and p.grad is None}
    assert idle == (unused if name == "pocket-gpt2" else set())
    assert all(p.grad.isfinite().all() for p in small.model.parameters() if p.grad is not None)
    with torch.no_grad():
        for p in small.model.parameters():
            if p.grad is not None: p.sub_(0.01 * p.grad)
    small.model.eval()
    with pytest.raises(SubnetError, match="trained after it was made compact"):
        small.save(tmp_path / "thin", weights=False)
    again = load_compact(small.save(tmp_path / "whole"))
    assert digest(again.model) == digest(small.model)
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=ids).logits, small.model(input_ids=ids).logits)
        close(filled(again)(input_ids=ids).logits, small.model(input_ids=ids).logits, 1e-4)


@some(ANATOMIES, ("heads", "union", "layer"))
def test_save_and_load(model, mask, tmp_path):
    "Bit for bit, from saved weights and from the full model; also what comes out."
    small = compact(model, mask)
    again = load_compact(small.save(tmp_path))
    assert digest(again.model) == digest(small.model) == small.born
    assert again.layers == small.layers and again.mask == mask
    assert torch.equal(logits(again.model), logits(small.model))
    thin = load_compact(small.save(tmp_path, weights=False), model)
    assert not (tmp_path / "model.safetensors").exists() and torch.equal(logits(thin.model), logits(small.model))


def test_the_reference_is_a_name(tmp_path):
    "A full model from a folder is asked for, since its path is nobody's business; another is not taken for it."
    MODELS["bert"].save_pretrained(tmp_path / "base")
    model = tf.BertForMaskedLM.from_pretrained(tmp_path / "base").eval()
    small = compact(model, off(Space.of(model, "head"), *CASES["heads"][1]))
    folder = small.save(tmp_path / "small", weights=False)
    assert torch.equal(logits(load_compact(folder, model).model), logits(small.model))
    other = copy.deepcopy(model)
    with torch.no_grad(): other.cls.predictions.bias += 1
    with pytest.raises(SubnetError, match="other weights elsewhere"): load_compact(folder, other)
    with pytest.raises(SpaceMismatch): load_compact(folder, tiny("bert", seed=1))
    assert str(tmp_path) not in (folder / "compact.json").read_text()
    with pytest.raises(UnknownModel, match="no weights were saved"): load_compact(folder)


def test_broken_folders(tmp_path):
    small = compact(MODELS["bert"], off(Space.of(MODELS["bert"], "head"), *CASES["heads"][1]))
    with pytest.raises(MaskFileError, match="cannot read a compact model"): load_compact(tmp_path)
    folder = small.save(tmp_path)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:200])
    with pytest.raises(MaskFileError, match="cannot read a compact model"): load_compact(folder)
    off(Space.of(MODELS["bert"], "head"), (0, "head", [0, 1])).save(small.save(tmp_path) / "mask.safetensors")
    with pytest.raises(MaskFileError, match="do not fit the mask"): load_compact(folder)
    small.save(tmp_path)
    info = json.loads((folder / "compact.json").read_text()) | {"class": "Path"}
    (folder / "compact.json").write_text(json.dumps(info))
    with pytest.raises(MaskFileError, match="does not fit its checksum"): load_compact(folder)
    del info["checksum"]                                                # as earlier versions wrote it
    (folder / "compact.json").write_text(json.dumps(info))
    with pytest.raises(UnknownModel, match="not a model of transformers"): load_compact(folder)


DAMAGE = {
    "no JSON": "no JSON", "a list": "[]", "nothing": "{}", "deep": "[" * 100_000, "a number": '{"format": 1}',
    "newer": '{"format": "subnet_explorer.compact/2"}',
}


@pytest.mark.parametrize("text", DAMAGE.values(), ids=DAMAGE)
def test_descriptions_that_are_none(tmp_path, text):
    small = compact(MODELS["bert"], off(Space.of(MODELS["bert"], "head"), *CASES["heads"][1]))
    (small.save(tmp_path) / "compact.json").write_text(text)
    with pytest.raises(MaskFileError, match="compact"): load_compact(tmp_path)


def test_fields_of_another_kind_and_other_weights(tmp_path):
    "Also where there is no checksum, as in files of earlier versions."
    small = compact(MODELS["bert"], off(Space.of(MODELS["bert"], "head"), *CASES["heads"][1]))
    file = small.save(tmp_path) / "compact.json"
    info = {k: v for k, v in json.loads(file.read_text()).items() if k != "checksum"}
    file.write_text(json.dumps(info))
    assert load_compact(tmp_path).mask == small.mask
    for name in info:
        file.write_text(json.dumps({k: v for k, v in info.items() if k != name}))
        with pytest.raises(MaskFileError): load_compact(tmp_path)
        file.write_text(json.dumps(info | {name: [1] if name != "layers" else 1}))
        with pytest.raises(MaskFileError): load_compact(tmp_path)
    file.write_text(json.dumps(info | {"digest": "0" * 16}))
    with pytest.raises(MaskFileError, match="are not those"): load_compact(tmp_path)


# ── plain Hugging Face format ────────────────────────────────────────────────────────────────────────────────────────

EXPRESSIBLE = {                              # what a configuration can say, by family
    "even neurons": ("neuron", [(0, "neuron", [0, 1, 2]), (1, "neuron", [4, 5, 6])], set(MODELS)),
    "even heads": ("head", [(0, "head", [0, 2]), (1, "head", [1, 3])], {"llama", "mistral", "qwen3", "llama-bias"}),
    "even groups": ("head", [(0, "head", [0, 1]), (1, "head", [2, 3])], {"llama", "mistral", "qwen3", "llama-bias"}),
    "layer": ("layer", [(0, "layer", [0])], set(PRE)),
    "uneven heads": ("head", [(0, "head", [1])], set()),
    "no mlp": ("mlp", [(0, "mlp", [0])], set()),
}


@pytest.mark.parametrize("which", EXPRESSIBLE)
@pytest.mark.parametrize("name", [*ANATOMIES, "qwen3"])
def test_export(name, model, which, tmp_path):
    kind, removed, families = EXPRESSIBLE[which]
    small = compact(model, off(Space.of(model, kind), *removed))
    auto = tf.AutoModelForCausalLM if name in PRE else tf.AutoModelForMaskedLM
    if name in families:
        theirs = auto.from_pretrained(small.export(tmp_path / "plain")).eval()
        assert size(theirs) == size(small.model)
        close(logits(theirs), logits(small.model))
    else:
        with pytest.raises(NotExpressible, match="zero_filled=True"): small.export(tmp_path / "plain")
        assert not (tmp_path / "plain").exists()
    theirs = auto.from_pretrained(small.export(tmp_path / "zeros", zero_filled=True)).eval()
    assert size(theirs) == size(model)
    close(logits(theirs), logits(small.model))


# ── the report, and what goes wrong ──────────────────────────────────────────────────────────────────────────────────

def test_report(tmp_path):
    model = MODELS["gpt2"]
    mask = off(Space.of(model, "head+neuron"), (0, "head", [0]), (1, "neuron", list(range(20))))
    small = compact(model, mask)
    t = compared(small, rounds=2)
    assert t.parameters.tolist() == [size(model), size(model), size(small.model)]
    assert (t.bytes == 4 * t.parameters).all() and (t.milliseconds > 0).all()
    assert t.difference["masked"] == 0 and t.difference["compact"] < 1e-4 < t.difference["dense"]
    again = load_compact(small.save(tmp_path))
    with pytest.raises(SubnetError, match="full model is needed"): _ = again.report
    assert compared(again, model, rounds=1).parameters.tolist() == t.parameters.tolist()


def test_bad_input():
    model = MODELS["bert"]
    heads = Mask.full(Space.of(model, "head"))
    with pytest.raises(SpaceMismatch, match="another model"): compact(tiny("bert", seed=1), heads)
    with pytest.raises(SpaceMismatch, match="another model"): compact(MODELS["gpt2"], heads)
    with pytest.raises(SubnetError, match="give a rule"): compact(model, Mask.full(Space.of(model, "weight")))
    with pytest.raises(SubnetError, match="is a rule for masks over weights"): compact(model, heads, keep="any")
    with pytest.raises(SubnetError, match="nothing is left"): compact(model, Mask.full(Space.of(model, "layer"), False))
    soft = Scores(heads.space, {g.name: np.ones(g.shape) for g in heads.space.groups})
    with pytest.raises(SubnetError, match="choose how many to keep"): compact(model, soft)
    mixed = Mask.full(Space.of(model, "head+weight"))
    with pytest.raises(SubnetError, match="mixes weights"): compact(model, mixed, keep="any")
    with pytest.raises(SubnetError, match="already compact"): compact(compact(model, heads).model, heads)
    bloom = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=4))
    with pytest.raises(UnknownFamily, match="no known layout fits BloomForCausalLM"): compact(bloom, heads)
    odd = copy.deepcopy(model)
    odd.bert.encoder.layer[1].attention.self.query = type("Adapter", (torch.nn.Linear,), {})(16, 16)
    with pytest.raises(SubnetError, match="cannot cut a Adapter: merge adapters"): compact(odd, heads, check=False)


def test_a_structure_with_more_to_it_is_refused():
    "Norms over all heads at once (OLMo 2) depend on the heads that went: the model looks like Llama and is none."
    torch.manual_seed(0)
    config = tf.Olmo2Config(**COMMON, num_key_value_heads=4, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = tf.Olmo2ForCausalLM(config).eval()
    heads = off(Space.of(model, "head"), (0, "head", [1]))
    with pytest.raises(SubnetError, match="cannot be made compact"): compact(model, heads)
    neurons = off(Space.of(model, "neuron"), (0, "neuron", [1, 2]))
    with masked(model, neurons): wanted = logits(model)
    close(logits(compact(model, neurons).model), wanted)


def test_the_command(tmp_path, capsys):
    from subnet_explorer.cli import main
    model, _ = load("pocket-bert")
    space = Space.of(model, "neuron")
    mask = Mask.random(space, 0.5, seed=0).save(tmp_path / "m.mask.safetensors")
    ask = ["compact", "--model", "pocket-bert", "--mask", str(mask), "--out", str(tmp_path / "out")]
    ask += ["--device", "cpu", "--json"]
    assert main([*ask, "--export", "plain"]) == 0
    out = json.loads(capsys.readouterr().out)
    small = load_compact(out["folder"])
    sizes = {name: row["parameters"] for name, row in out["report"].items()}
    assert sizes["compact"] == size(small.model) < sizes["dense"] and out["layers"] == [1, 2, 3, 4]
    theirs = tf.AutoModelForMaskedLM.from_pretrained(out["exported"]).eval()
    close(logits(theirs, IDS + 20), logits(small.model, IDS + 20))
    assert small.report.equals(load_compact(out["folder"]).report)                # saved, so it needs no full model
    refused = [
        (["--keep", "any"], "is a rule for masks over weights"),
        (["--keep", "some"], "cannot read the rule"),
        (["--mask", str(tmp_path / "none")], "cannot read a mask"),
    ]
    for more, message in refused:
        assert main([*ask, *more]) == 2 and message in capsys.readouterr().err
