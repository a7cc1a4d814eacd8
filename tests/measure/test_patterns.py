"Attention maps, raw and normed, against explicit tensors on every family; the classifier and its data."
from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import pearsonr

from subnet_explorer.core.errors import SpaceMismatch, SubnetError
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.masks import Masks
from subnet_explorer.core.scores import Scores
from subnet_explorer.core.space import Space
from subnet_explorer.measure.attention import attention, attention_maps, each_attention
from subnet_explorer.measure.decisions import decide, shares, survival_correlation
from subnet_explorer.measure.maps import (
    ATTENTION_PATTERNS,
    BadLabels,
    BadMap,
    LabelledMaps,
    check_map,
    generate,
    hand_labelled,
    picture,
    read_maps,
)
from subnet_explorer.measure.patterns import PatternCNN, classifier, fitted, pattern_report, train_network
from subnet_explorer.model.apply import attending, masked
from subnet_explorer.model.load import tiny

# block, value projection, attention output (on purpose not read from FAMILIES)
PATHS = {
    "bert": ("bert.encoder.layer.{}.", "attention.self.value", "attention.output.dense"),
    "roberta": ("roberta.encoder.layer.{}.", "attention.self.value", "attention.output.dense"),
    "electra": ("electra.encoder.layer.{}.", "attention.self.value", "attention.output.dense"),
    "distilbert": ("distilbert.transformer.layer.{}.", "attention.v_lin", "attention.out_lin"),
    "mpnet": ("mpnet.encoder.layer.{}.", "attention.attn.v", "attention.attn.o"),
    "gpt2": ("transformer.h.{}.", "attn.c_attn", "attn.c_proj"),
    "llama": ("model.layers.{}.", "self_attn.v_proj", "self_attn.o_proj"),
}
HEADS, SIZE = 4, 4


class Numbers:
    "A tokenizer of numbers: 'a b' is read as the ids a and b."
    mask_token, mask_token_id, bos_token_id, model_max_length = "[MASK]", 39, None, 512
    def __call__(self, one: str, two: str | None = None, **_):
        ids = [[int(w) for w in t.split()] for t in (one, two) if t]
        types = [i for i, part in enumerate(ids) for _ in part]
        return SimpleNamespace(input_ids=[token for part in ids for token in part], token_type_ids=types)
    def convert_ids_to_tokens(self, ids): return [str(i) for i in ids]


TOK = Numbers()
TEXTS = ["7 12 33 5 21 9 14", "30 6 6 25", "11 2 8 8 3 17 20", "4 5 6 7"]


@pytest.fixture(scope="module", params=PATHS)
def name(request): return request.param

@pytest.fixture(scope="module")
def model(name): return tiny(name)


@torch.no_grad()
def explicit(model, name: str, text: str, layer: int, under: Mask | None = None):
    """Raw maps (head, n, n), the tensor of what is added (head, n, n, hidden), the output of the projection
    (n, hidden), its weight (out, in), and the values (n, head, size)."""
    prefix, value, out = PATHS[name]
    v_module, o_module = (model.get_submodule(prefix.format(layer) + p) for p in (value, out))
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        v_module.register_forward_hook(lambda m, a, o: seen.update(v=o[0])),
        o_module.register_forward_hook(lambda m, a, o: seen.update(o=o[0])),
    ]
    with attending(model), masked(model, under):
        ids = torch.tensor([[int(w) for w in text.split()]])
        maps = model(input_ids=ids, output_attentions=True).attentions[layer][0]
        w = o_module.weight.T if type(o_module).__name__ == "Conv1D" else o_module.weight
    for h in hooks: h.remove()
    bias = 0 if o_module.bias is None else o_module.bias
    # (n, head, size)
    width, times = (8, 2) if name == "llama" else (16, 1)
    kv = seen["v"][:, -width:].reshape(len(maps[0]), -1, SIZE).repeat_interleave(times, 1)
    through = [kv[:, h] @ w[:, SIZE * h:SIZE * h + SIZE].T for h in range(HEADS)]
    added = torch.stack([maps[h][:, :, None] * through[h][None] for h in range(HEADS)])
    return maps, added, seen["o"] - bias, w.detach(), kv


# ── maps ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_normed_maps_equal_the_explicit_tensor(model, name):
    for text in TEXTS[:2]:
        got, raw = attention(model, TOK, text, normed="correct")[0], attention(model, TOK, text)[0]
        for layer in range(2):
            maps, added, output, _, _ = explicit(model, name, text, layer)
            assert np.allclose(raw[layer], maps, atol=1e-6)
            # the explicit tensor is what the layer adds
            assert torch.allclose(added.sum((0, 2)), output, atol=1e-4)
            assert np.allclose(got[layer], added.norm(dim=-1), atol=1e-5)


def test_the_published_norm_views_the_stored_matrix(model, name):
    text, layer = TEXTS[0], 1
    got = attention(model, TOK, text, normed="as_published")[0][layer]
    maps, _, _, w, kv = explicit(model, name, text, layer)
    slices = w.contiguous().view(HEADS, SIZE, 16)
    want = torch.stack([maps[h][:, :, None] * (kv[:, h] @ slices[h])[None] for h in range(HEADS)]).norm(dim=-1)
    assert np.allclose(got, want, atol=1e-5)
    assert not np.allclose(got, attention(model, TOK, text, normed="correct")[0][layer], atol=1e-2)


def test_the_published_norm_after_heads_were_removed(model, name):
    "The slices are cut out of the matrix that is left when the columns of removed heads are gone."
    space, kept = Space.of(model, "head"), [0, 2, 3]
    mask = Mask.of(space, {g.name: np.isin(np.arange(HEADS), kept) for g in space.groups})
    text, layer = TEXTS[0], 0
    got = attention(model, TOK, text, mask, "as_published")[0][layer]
    maps, _, _, w, kv = explicit(model, name, text, layer, mask)
    left = torch.cat([w[:, SIZE * h:SIZE * h + SIZE] for h in kept], 1).contiguous().view(len(kept), SIZE, 16)
    for i, h in enumerate(kept):
        assert np.allclose(got[h], (maps[h][:, :, None] * (kv[:, h] @ left[i])[None]).norm(dim=-1), atol=1e-5)
    assert not got[1].any()


@pytest.mark.parametrize("kind", ["weight", "head", "block", "layer", "mlp"])
def test_normed_maps_under_a_mask(model, name, kind):
    mask = Mask.random(Space.of(model, kind, **({"block": (16, 2)} if kind == "block" else {})), .5, seed=3)
    text, layer = TEXTS[0], 1
    got, raw = (attention(model, TOK, text, mask, n)[0][layer] for n in ("correct", None))
    _, added, output, _, _ = explicit(model, name, text, layer, mask)
    if kind == "head": added *= torch.as_tensor(mask[f"layer.{layer}.head"])[:, None, None, None]
    if kind == "layer": added *= float(mask[f"layer.{layer}.layer"][0])
    # blocks may scale what goes into the projection: below
    if kind == "block": return np.testing.assert_array_equal(got.shape, raw.shape)
    assert np.allclose(got, added.norm(dim=-1), atol=1e-5)
    assert kind == "layer" or torch.allclose(added.sum((0, 2)), output, atol=1e-4)


def test_a_block_mask_equals_its_weights():
    model = tiny("bert")
    for shape in ((16, 2), (2, 16), (1, 4), (4, 4)):
        mask = Mask.random(Space.of(model, "block", block=shape), .5, seed=1)
        one, other = (attention(model, TOK, TEXTS[0], m, "correct")[0] for m in (mask, mask.to("weight")))
        assert np.allclose(one, other, atol=1e-5)


def test_soft_gates_scale_both_kinds_and_have_no_published_norm(model):
    space = Space.of(model, "head")
    soft = Scores(space, {g.name: np.linspace(.2, .8, HEADS) for g in space.groups})
    for how in (None, "correct"):
        gated, whole = (attention(model, TOK, TEXTS[0], under, how)[0][0] for under in (soft, None))
        assert np.allclose(gated, whole * np.linspace(.2, .8, HEADS)[:, None, None], atol=1e-5)
    with pytest.raises(SubnetError, match="harden"): attention(model, TOK, TEXTS[0], soft, "as_published")


@pytest.mark.parametrize("normed", [None, "correct", "as_published"])
def test_many_texts_equal_one_at_a_time(model, normed):
    def hooks(m): return [len(x._forward_hooks) + len(x._forward_pre_hooks) for x in m.modules()]
    # transformers itself leaves hooks once attention was asked for
    attention(model, TOK, TEXTS[0])
    weights, kept = {k: v.clone() for k, v in model.state_dict().items()}, hooks(model)
    before = weights, model.config._attn_implementation
    many = attention_maps(model, TOK, TEXTS * 3, normed=normed, batch=5)
    for (maps, tokens), text in zip(many, TEXTS * 3, strict=True):
        assert tokens == text.split() and np.allclose(maps, attention(model, TOK, text, normed=normed)[0], atol=1e-5)
    # shorter texts first, no batch of two lengths
    assert [len(index) for index, _, _ in each_attention(model, TOK, TEXTS * 3, batch=5)] == [5, 1, 5, 1]
    assert all((before[0][k] == v).all() for k, v in model.state_dict().items())
    assert model.config._attn_implementation == before[1]
    assert hooks(model) == kept


def test_segments_reach_the_model_unless_told_otherwise():
    model, pair = tiny("bert"), ("7 12 33", "5 21")
    told, untold = (next(each_attention(model, TOK, [pair], segments=s))[1] for s in (True, False))
    with torch.no_grad(), attending(model):
        for got, types in ((told, [0, 0, 0, 1, 1]), (untold, [0] * 5)):
            inputs = dict(input_ids=torch.tensor([[7, 12, 33, 5, 21]]), token_type_ids=torch.tensor([types]))
            want = model(**inputs, output_attentions=True).attentions
            assert np.allclose(got[0, 1], want[1][0], atol=1e-6)
    assert not np.allclose(told, untold, atol=1e-3)


def test_attention_refuses_what_it_cannot_read(model):
    refused = {
        "text 1": ["1 2", "1 " * 33],
        r"a text or \(a text, a text\) as texts": [("1", "2", "3")],
        "as texts, and this is \\[7\\]": [7],
    }
    for message, texts in refused.items():
        with pytest.raises(SubnetError, match=message): attention_maps(model, TOK, texts)
    with pytest.raises(SubnetError, match="batch must be a whole"): attention_maps(model, TOK, TEXTS, batch=0)
    with pytest.raises(SubnetError, match="did you mean correct"): attention_maps(model, TOK, TEXTS, normed="corect")
    other = tiny("bert", seed=5)
    with pytest.raises(SpaceMismatch):
        attention_maps(model, TOK, TEXTS, under=Mask.random(Space.of(other, "head"), .5, seed=0))


# ── the network ──────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def cnn(): return classifier()


@given(st.lists(st.integers(10, 45), min_size=1, max_size=7), st.integers(0, 99), st.integers(1, 9))
@settings(max_examples=15)
def test_answers_do_not_depend_on_company(sizes, seed, batch):
    cnn, rng = classifier(), np.random.default_rng(seed)
    maps = [rng.dirichlet(np.full(n, .3), n) for n in sizes]
    p = cnn.probabilities(maps, batch=batch)
    assert np.allclose(p, np.concatenate([cnn.probabilities([m]) for m in maps]), atol=1e-5)
    assert np.allclose(p.sum(1), 1, atol=1e-5)
    # padding is cut off, scale does not matter
    padded = [np.pad(m * 7, (0, 5), constant_values=.5) for m in maps]
    assert np.allclose(p, cnn.probabilities(padded, lengths=sizes), atol=1e-5)


@pytest.mark.parametrize(
    "bad, message",
    [
        (np.full((12, 12), np.nan), "144 values that are not finite"),
        (np.full((12, 12), np.inf), "not finite"),
        (np.ones((12, 11)), r"shape \(12, 11\)"),
        (np.ones((2, 12, 12)), "one head of one text"),
        (np.eye(5), "has 5 tokens, at least"),
        (np.zeros((12, 12)), "only zeros"),
        (-np.eye(12), "negative"),
        (np.full((12, 12), "a"), "expected numbers"),
        (np.array([[None] * 12] * 12), "holds object"),
    ],
)
def test_what_is_no_map_is_named(cnn, bad, message):
    with pytest.raises(BadMap, match=message) as e: cnn([np.eye(12), bad])
    assert "attention map 1" in str(e.value)


def test_published_fit_is_that_of_the_published_code():
    a = np.arange(1, 128 * 128 + 1, dtype=np.float32).reshape(128, 128)
    for n, m in ((16, 16), (36, 16), (37, 16), (12, 12), (128, 16)):
        size = max(n, m + 20)
        assert (fitted(a, n, "published", m) == a[:size, :size]).all()
    assert (fitted(a[:20, :20], None, "published", 16)[:20, :20] == a[:20, :20]).all()
    assert fitted(a[:20, :20], None, "published", 16).shape == (36, 36)


def test_training_is_reproducible_and_keeps_the_later_of_equals():
    data, seen = generate(60, seed=3, sizes=(12, 20)), []
    one, two = (train_network(data, epochs=3, published=True, seed=1, log=seen.append) for _ in range(2))
    assert all((v == two.net.state_dict()[k]).all() for k, v in one.net.state_dict().items())
    best = max(s["accuracy"] for s in seen[:3])
    assert one.meta["held_out_accuracy"] == pytest.approx(best, abs=1e-4)
    assert one.meta["fit"] == "published"
    assert not one.meta["scale"]
    last = max(e["epoch"] for e in seen[:3] if e["accuracy"] == best)
    again = train_network(data, epochs=last, published=True, seed=1, keep="last")
    assert all((v == again.net.state_dict()[k]).all() for k, v in one.net.state_dict().items())
    with pytest.raises(SubnetError, match="share between"): train_network(data, held=1.0, epochs=1)
    with pytest.raises(SubnetError, match="diverged"): train_network(data, epochs=3, lr=1e18)


def test_a_stored_classifier_is_read_back_and_others_are_not(tmp_path, cnn):
    path = cnn.save(tmp_path / "c.safetensors")
    again, some = PatternCNN.load(path), generate(10, seed=5)
    assert (again.probabilities(some.maps) == cnn.probabilities(some.maps)).all()
    assert again.meta == cnn.meta
    assert path.stat().st_size < 400_000
    from safetensors.torch import save_file
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    for bad in ("other.safetensors", "nothing.safetensors"):
        with pytest.raises(SubnetError, match=r"pattern classifier|no file"): PatternCNN.load(tmp_path / bad)


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

@given(st.integers(0, 10 ** 6), st.integers(4, 30), st.integers(0, 30))
@settings(max_examples=25)
def test_drawn_maps_are_maps(seed, low, more):
    data = generate(10, seed, sizes=(low, low + more))
    assert data.counts.tolist() == [2] * 5 and all(low <= len(check_map(m)) <= low + more for m in data.maps)
    assert all(np.allclose(m.sum(1), 1, atol=1e-4) for m, n in zip(data.maps, data.table.normed, strict=True) if not n)


def test_the_classifier_knows_drawn_maps(cnn):
    data = generate(500, seed=4_000_000)
    r = pattern_report(cnn(data.maps), data.table.label)
    assert r.f1 > .87 and r.table.f1.min() > .8


def test_the_classifier_on_maps_labelled_by_hand(cnn):
    "Figures of the documentation, with room for other machines; the test part was not used to choose anything."
    for source, least in (("pocket", .6), ("minilm", .75)):
        data = hand_labelled("test", source)
        r = pattern_report(cnn(data.maps), data.table.label)
        assert r.f1 > least and r.f1 > r.majority + .1, (source, r.f1, r.majority)
    table = hand_labelled().table
    assert len(table) == 386
    assert (table.source != "minilm").sum() == 290
    assert table.again.notna().sum() == 60
    assert set(table.part) == {"dev", "test"}
    assert (table.tokens == [len(m) for m in hand_labelled().maps]).all()


def test_published_layouts(tmp_path):
    for i in (1, 2, 12): np.save(tmp_path / f"{i:04d}.npy", np.eye(9) * i)
    (tmp_path / "raw").write_text("mix = 0001,12\n\nother=2\n")
    (tmp_path / "normed").write_text("file\tlabel\n0001.npy\tVertical + Diagonal\n0012.npy\tHeterogeneous\n")
    assert read_maps(tmp_path / "raw").table.label.tolist() == ["vertical+diagonal"] * 2 + ["heterogeneous"]
    assert read_maps(tmp_path / "raw").maps[1][0, 0] == 12
    assert read_maps(tmp_path / "normed").table.id.tolist() == ["0001.npy", "0012.npy"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("mix 1", "line 1: found 'mix 1'"),
        ("mix = 1,x", "'x' is no number"),
        ("swirl = 1", "unknown attention pattern"),
        ("mix = 1\nblock = 0001", "line 2: '0001' has a label already, in line 1"),
        ("", "no labels"),
        ("mix = 3", "cannot read"),
        ("../x.npy\tBlock", "lies outside"),
        ("/etc/x.npy\tBlock", "lies outside"),
        ("p.npy\tBlock", "cannot read"),
        ("s.npy\tBlock", "shape"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path, text, message):
    folder = tmp_path / "maps"
    folder.mkdir()
    np.save(folder / "0001.npy", np.eye(9))
    np.save(folder / "s.npy", np.ones((3, 4)))
    np.save(tmp_path / "x.npy", np.eye(9))
    np.save(folder / "p.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)          # is not unpickled
    (folder / "labels").write_text(text)
    with pytest.raises(BadLabels, match=message): read_maps(folder / "labels")


def test_labels_and_maps_belong_together():
    with pytest.raises(BadLabels, match="2 maps need a table"):
        LabelledMaps([np.eye(4)] * 2, pd.DataFrame(dict(label=["block"])))
    with pytest.raises(SubnetError, match="attention pattern 'x'"):
        LabelledMaps([np.eye(4)], pd.DataFrame(dict(label=["x"])))


def test_pictures_take_any_text():
    maps, titles = [np.eye(9) + .1 * i for i in range(5)], ["$\\frac$", "<b>", "é", "_^", ""]
    tokens = ["$", "\\", "{", "&", "é", "[SEP]", "_", "^", "%"]
    assert picture(maps, titles, [tokens] * 5)[:4] == b"\x89PNG"
    with pytest.raises(BadMap, match="no map to draw"): picture([])


# ── decisions ────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_decisions_are_those_of_the_maps(pocket_bert, cnn):
    model, tok = pocket_bert
    texts = [
        ("anna saw max near the station .", "max was near the station ."),
        "a robin is a kind of bird and can sing in the garden all day .",
        ("the door is warm .", "we found her small door near the park ."),
    ]
    table = decide(model, tok, texts, seed=3, normed="correct")
    assert list(table) == ["seed", "text", "tokens", "layer", "head", "pattern", "probability"]
    assert len(table) == 48
    assert not table.duplicated(["text", "layer", "head"]).any()
    for i, (maps, tokens) in enumerate(attention_maps(model, tok, texts, normed="correct")):
        mine = table[table.text == i]
        assert (mine.tokens == len(tokens)).all()
        assert mine.pattern.tolist() == cnn(list(maps.reshape(16, len(tokens), -1)))
    heads = Space.of(model, "head")
    mask = Mask.random(heads, .4, seed=2)
    under = decide(model, tok, texts, mask)
    kept = {(g.layer + 1, h + 1) for g in heads.groups for h in np.flatnonzero(mask[g.name])}
    assert set(zip(under.layer, under["head"], strict=True)) == kept
    short = decide(model, tok, [*texts, "a robin ."], drop_short=True)
    assert short.attrs["dropped"] == 1 and set(short.text) == {0, 1, 2}
    with pytest.raises(BadMap, match=r"text 3 .*has 5 tokens"): decide(model, tok, [*texts, "a robin ."])
    with pytest.raises(SubnetError, match="removes every head"):
        decide(model, tok, texts, Mask.empty(heads) if hasattr(Mask, "empty") else mask ^ mask)


one_decision = st.tuples(st.integers(0, 3), st.integers(1, 2), st.integers(1, 4), st.sampled_from(ATTENTION_PATTERNS))
decisions_of = st.lists(one_decision, min_size=1, max_size=40)

@given(decisions_of)
def test_shares_add_up(rows):
    table = pd.DataFrame(rows, columns=["text", "layer", "head", "pattern"])
    for by in ("layer", ["layer", "head"], ()):
        s = shares(table, by)
        assert list(s)[-3:] == ["pattern", "share", "n"] and len(s) == 5 * (table.groupby(by).ngroups if by else 1)
        keys = [by] if isinstance(by, str) else list(by)
        assert np.allclose(s.groupby(keys).share.sum() if keys else s.share.sum(), 1)
        assert round((s.share * s.n).sum()) == len(table) and s.pattern[:5].tolist() == list(ATTENTION_PATTERNS)


def test_correlation_is_pearson_over_pairs_and_over_heads(pocket_bert):
    space = Space.of(pocket_bert[0], "head")
    rng = np.random.default_rng(1)
    own = product(enumerate("ab"), range(2))
    masks = Masks([(dict(task=t, seed=s), Mask.random(space, .5, seed=10 * i + s)) for (i, t), s in own])
    cells = product("ab", range(2), range(5), range(1, 5), range(1, 5))
    rows = pd.DataFrame(cells, columns=["task", "seed", "text", "layer", "head"])
    rows["pattern"] = [rng.choice(ATTENTION_PATTERNS) for _ in range(len(rows))]
    got = survival_correlation(rows, masks).set_index("pattern")

    def lives(r):
        return masks.sel(task=r.task, seed=r.seed)[0][f"layer.{r.layer - 1}.head"][r.head - 1]
    alive = np.array([lives(r) for r in rows.itertuples()], float)
    for p in ATTENTION_PATTERNS:
        has = (rows.pattern == p).to_numpy(float)
        assert got.loc[p, ["r", "p"]].tolist() == pytest.approx(list(pearsonr(has, alive)))
        assert got.n[p] == 320
        assert got.heads[p] == 64
        per = rows.assign(has=has, alive=alive).groupby(["task", "seed", "layer", "head"])[["has", "alive"]].mean()
        assert got.r_heads[p] == pytest.approx(pearsonr(per.has, per.alive)[0])
    assert len(survival_correlation(rows, masks, by="task")) == 10
    assert survival_correlation(rows.assign(pattern="block"), masks).r.isna().all()
    with pytest.raises(SubnetError, match="have no mask"): survival_correlation(rows, masks.sel(task="a"))
    with pytest.raises(SubnetError, match="several masks"): survival_correlation(rows.drop(columns="seed"), masks)
    with pytest.raises(SubnetError, match="column of the decisions"):
        survival_correlation(rows.drop(columns="head"), masks)
