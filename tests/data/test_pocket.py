"Loading models: what is refused, and how it is said."
import pytest
import torch

from subnet_explorer import load
from subnet_explorer.model.load import UnknownModel, tiny


def same_weights(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_model_without_its_head_is_refused(tmp_path):
    model, tok = load("pocket-bert")
    model.bert.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    with pytest.raises(UnknownModel, match=r"no trained language-modelling head: cls\.predictions"): load(tmp_path)


def test_a_damaged_model_is_named(tmp_path):
    model, tok = load("pocket-bert")
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    assert same_weights(model, again)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UnknownModel, match="cannot be used"): load(tmp_path)


def test_models_of_all_kinds_come_back_with_their_weights(tmp_path):
    _, tok = load("pocket-bert")
    for family in ("roberta", "distilbert", "electra", "mpnet", "gpt2", "llama"):
        model = tiny(family)
        model.save_pretrained(tmp_path / family)
        tok.save_pretrained(tmp_path / family)
        again, _ = load(tmp_path / family)
        assert type(again) is type(model)
        assert same_weights(model, again)
