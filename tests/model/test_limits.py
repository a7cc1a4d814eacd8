"What a model cannot read or say is refused by name; what is read is read in one way."
from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import transformers

from subnet_explorer.core.errors import SubnetError
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.space import Space
from subnet_explorer.data.facts import read_facts
from subnet_explorer.measure.ask import cloze, predictions
from subnet_explorer.measure.fluency import EncodedTexts, HeldOut, perplexity, text_nll
from subnet_explorer.model.limits import longest, positions_of
from subnet_explorer.model.load import UnknownModel, load
from subnet_explorer.search.distil import MLM, Hidden, Maintain
from subnet_explorer.search.find import find
from subnet_explorer.search.gates import HardConcrete, Threshold
from subnet_explorer.search.objectives import Cloze, Context

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
TEXTS = ["a robin is a kind of bird .", "my sister wrote about a robin and a boy met her near the park .",
         "a car has wheels .", "a boy met anna ."] * 5


@pytest.fixture(scope="module")
def bert(): return load("pocket-bert")


@pytest.fixture(scope="module")
def gpt(): return load("pocket-gpt2")


def facts(): return read_facts("pocket", "MadeOf")


@pytest.mark.parametrize("name", ["pocket-bert", "pocket-gpt2"])
def test_a_folder_without_a_tokenizer_is_refused(name, tmp_path):
    model, tok = load(name)
    model.save_pretrained(tmp_path / "alone")
    with pytest.raises(UnknownModel, match="tokenizer"): load(tmp_path / "alone")
    tok.save_pretrained(tmp_path / "alone")
    assert load(tmp_path / "alone")[1]("a robin").input_ids == tok("a robin").input_ids


@pytest.mark.parametrize("family", ["Roberta", "MPNet", "Longformer", "XLMRoberta", "Camembert"])
def test_positions_behind_the_paddings_are_not_there(family, bert):
    extra = dict(attention_window=8) if family == "Longformer" else {}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=40, max_position_embeddings=40, pad_token_id=1, **SMALL, **extra)
    model = getattr(transformers, f"{family}ForMaskedLM")(config).eval()
    assert positions_of(model) == 38 and longest(model, bert[1]) == 38
    with torch.no_grad(): assert model(torch.full((1, 38), 5)).logits.shape[1] == 38


def test_too_long_for_the_positions(bert):
    _, tok = bert
    config = transformers.BertConfig(vocab_size=len(tok), max_position_embeddings=8, **SMALL)
    model = transformers.BertForMaskedLM(config).eval()
    with pytest.raises(SubnetError, match="reads at most 8"): cloze(model, tok, facts(), None)


@pytest.mark.parametrize("goal", [lambda: Cloze(facts()), lambda: MLM(TEXTS), lambda: Maintain(TEXTS)])
@pytest.mark.parametrize("name", ["pocket-bert", "pocket-gpt2"])
def test_a_model_without_a_head(name, goal):
    model, tok = load(name)
    bare = model.base_model
    with pytest.raises(SubnetError, match="no language-modelling head"):
        find(bare, tok, HardConcrete(Space.of(bare, "head"), seed=0), goal(), steps=1, progress=False)
    for ask in (lambda: cloze(bare, tok, facts(), None), lambda: perplexity(bare, tok, TEXTS),
                lambda: predictions(bare, tok, "a robin is a [MASK]")):
        with pytest.raises(SubnetError, match="no language-modelling head"): ask()


def test_a_tokenizer_without_a_mask(bert, gpt):
    model, tok = bert[0], gpt[1]
    gate = Threshold(Space.of(model, "weight", layers=4), seed=0)
    for ask in (lambda: find(model, tok, gate, MLM(TEXTS), steps=1, progress=False),
                lambda: perplexity(model, tok, TEXTS), lambda: cloze(model, tok, facts(), None),
                lambda: predictions(model, tok, "a robin is a [MASK] .")):
        with pytest.raises(SubnetError, match="no mask token"): ask()


def test_a_tokenizer_that_knows_more(bert):
    _, tok = bert
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=64, **SMALL)
    model = transformers.BertForMaskedLM(config).eval()
    gate = Threshold(Space.of(model, "weight"), seed=0)
    for ask in (lambda: find(model, tok, gate, MLM(TEXTS), steps=1, progress=False),
                lambda: perplexity(model, tok, TEXTS), lambda: cloze(model, tok, facts(), None)):
        with pytest.raises(SubnetError, match="the model knows 40 tokens"): ask()


@pytest.mark.parametrize("name", ["pocket-bert", "pocket-gpt2"])
def test_texts_with_nothing_to_predict(name):
    model, tok = load(name)
    gate = Threshold(Space.of(model, "weight", layers=4), seed=0)
    with pytest.raises(SubnetError, match=r"1 of 21 texts have no token to predict, .* text 20"):
        find(model, tok, gate, MLM([*TEXTS, ""]), steps=1, progress=False)
    table = text_nll(model, tok, ["", *TEXTS[:2]])
    assert table.tokens[0] == 0 and table.nll[0] == 0
    assert perplexity(model, tok, ["", *TEXTS[:2]]) == pytest.approx(perplexity(model, tok, TEXTS[:2]))
    with pytest.raises(SubnetError, match="no token to predict"): perplexity(model, tok, "")


# ── held-out text ────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("make", [Hidden, MLM, lambda t: MLM(t, distil=.5), lambda t: MLM(t, static=True)],
                         ids=["hidden", "mlm", "distil", "static"])
@pytest.mark.parametrize("name", ["pocket-bert", "pocket-gpt2"])
def test_held_out_loss_is_the_mean_of_all_tokens(name, make):
    model, tok = load(name)
    texts = list(dict.fromkeys(TEXTS))
    mask = Mask.random(Space.of(model, "weight"), .8, seed=0)
    found = [HeldOut(model, tok, make(texts), batch=b)(mask) for b in (1, 3, 4, 50)]
    random.Random(0).shuffle(texts)
    found.append(HeldOut(model, tok, make(texts), batch=2)(mask))
    assert np.ptp(found) < 1e-5 and found[0] > .01


def test_held_out_loss_of_a_causal_model_is_that_of_perplexity(gpt):
    model, tok = gpt
    mask = Mask.random(Space.of(model, "weight"), .9, seed=0)
    assert np.exp(HeldOut(model, tok, MLM(TEXTS))(mask)) == pytest.approx(perplexity(model, tok, TEXTS, mask), rel=1e-4)


def test_all_readers_begin_with_the_same_token(gpt):
    model, tok = gpt
    wanted = [s.tolist() for s in EncodedTexts(model, tok, TEXTS[:2]).sequences.ids]
    seen: list[list[list[int]]] = []

    class Watched(Context):
        def sequences(self, ids, first=None, types=None):
            seen.append([list(i) for i in ids])
            return super().sequences(ids, first, types)
    for goal in (Maintain(TEXTS[:2]), MLM(TEXTS[:2]), Hidden(TEXTS[:2])): goal.prepare(Watched(model, tok, 1, 1, 0))
    assert seen == [wanted] * 3 and all(ids[0] == tok.bos_token_id for ids in wanted)
