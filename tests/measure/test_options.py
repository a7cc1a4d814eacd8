"Zero-shot answers to multiple-choice questions: parity with a plain loop over the model, ties, what is refused."
import numpy as np
import pytest
import torch

from subnet_explorer.core.errors import SubnetError, UnknownName
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.space import Space
from subnet_explorer.data.choices import BadChoices, as_choices, choice_task, read_choices
from subnet_explorer.data.pocket_tasks import choices
from subnet_explorer.measure.options import SCORES, OptionReader, check_readable, plausibility
from subnet_explorer.model.apply import masked
from subnet_explorer.model.load import load

COPA = as_choices(choices(6))
GAPS = read_choices("pocket:IsA+HasSubevent", "dev").take(6)
WHOLE = as_choices(
    [dict(question="[MASK]", choices=["a robin is a bird .", "a robin is a tool", "a robin"], label=0)] * 2
)
CONCEPT = as_choices(
    [
        dict(id="1", question="where is a robin found ?", question_concept="a robin", answerKey="B",
             choices=dict(label=["A", "B"], text=["city", "garden"])),
        dict(id="2", question="where are birds found ?", question_concept="robin", answerKey="A",
             choices=dict(label=["A", "B"], text=["city", "garden"])),
    ]
)  # fmt: skip
KINDS = {"copa": COPA, "gaps": GAPS, "whole": WHOLE, "concept": CONCEPT}


@pytest.fixture(scope="module")
def bert(): return load("pocket-bert")


def logits(model, ids, position):
    with torch.no_grad(): return model(input_ids=torch.tensor([ids])).logits[0, position].float()


def plainly(model, tok, row, option, score):
    "Score one option, token by token, from the text alone."
    q = row["question"]
    around = q.replace("[MASK]", " ").strip()
    text = q.replace("[MASK]", option) if "[MASK]" in q else f"{q} {option}"
    ids = tok(text).input_ids
    own = tok(option, add_special_tokens=False).input_ids
    before = q.partition("[MASK]")[0] if "[MASK]" in q else q
    start = 1 + len(tok(before, add_special_tokens=False).input_ids)
    option_places = list(range(start, start + len(own)))
    if score == "pll" or not around: places = option_places
    else: places = [p for p in range(1, len(ids) - 1) if p not in option_places]
    if score != "pll" and "kind" in row: places = places[:-1]      # not "so" and "because"
    found = []
    for p in places:
        hidden = [*ids[:p], tok.mask_token_id, *ids[p + 1:]]
        found.append(logits(model, hidden, p).log_softmax(-1)[ids[p]].item())
    return np.mean(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", ["logprob", "pll"])
def test_parity_with_a_plain_loop(bert, kind, score):
    model, tok = bert
    mask = Mask.random(Space.of(model, "weight", layers="top-half"), .5, seed=0)
    for under in (None, mask):
        table = plausibility(model, tok, KINDS[kind], under, score)
        with masked(model, under):
            for row, (_, found) in zip(KINDS[kind], table.iterrows(), strict=True):
                wanted = [plainly(model, tok, row, option, score) for option in row["choices"]]
                assert [found[f"score{i}"] for i in range(1, 1 + len(wanted))] == pytest.approx(wanted, abs=1e-4)
                assert found.choice == np.argmax(wanted) and found.label == row["label"]


def test_published_written_out(bert):
    model, tok = bert
    def summed(words, places, behind):
        total = []
        for i in places:
            ids = tok(" ".join([*words[:i], "[MASK]", *words[i + 1:], *behind])).input_ids
            total.append(logits(model, ids, ids.index(tok.mask_token_id))[tok.convert_tokens_to_ids(words[i])].item())
        return total
    row = as_choices([dict(choices(1)[0], premise="There was a storm, rain .", choice1="a b", choice2="c d")])[0]
    words = row["scored"].split()
    assert words == ["There", "was", "a", "storm,", "rain"] and tok.convert_tokens_to_ids("storm,") == tok.unk_token_id
    for kind, word, reduce in (("effect", "so", np.sum), ("cause", "because", np.mean)):
        found = plausibility(model, tok, as_choices([{**row, "kind": kind}]), score="published").iloc[0]
        for i, option in enumerate(row["choices"], 1):      # there, was, a are stop words
            assert found[f"score{i}"] == pytest.approx(reduce(summed(words, [3, 4], [word, option])), abs=1e-3)
    reader = OptionReader(model, tok, CONCEPT, "published")
    assert reader.skipped == {"concept not found verbatim": 1} and [q["id"] for q in reader.questions] == ["1"]
    words = CONCEPT[0]["question"].split()
    for i, option in enumerate(CONCEPT[0]["choices"]):
        assert reader.scores()[0, i] == pytest.approx(sum(summed(words, [2, 3], ["[SEP]", option])), abs=1e-3)
    with pytest.raises(BadChoices, match="in no question of questions does its concept stand"):
        OptionReader(model, tok, as_choices([CONCEPT[1]]), "published")


def test_ties(bert):
    rows = as_choices([dict(question="a robin is a", choices=["bird", "bird", "tool"], label=0)])
    for score, place in (("logprob", 0), ("pll", 0), ("published", 1)):
        reader = OptionReader(*bert, rows, score)
        assert reader.chosen(np.array([[1., 1., .5]])).tolist() == [place]
    uneven = as_choices([rows[0], dict(question="a robin is a", choices=["bird", "tool"], label=1)])
    found = OptionReader(*bert, uneven).scores()
    assert np.isnan(found).tolist() == [[False] * 3, [False, False, True]]
    assert OptionReader(*bert, uneven).chosen(found).shape == (2,)


def test_texts_are_read_once(bert):
    model, tok = bert
    assert len(OptionReader(model, tok, GAPS, "pll").positions) == len(GAPS)      # options are one token
    reader = OptionReader(model, tok, GAPS, first=2)
    mask = Mask.random(Space.of(model, "weight", layers="top-half"), .5, seed=1)
    with masked(model, mask): later = reader.scores()
    assert later == pytest.approx(plausibility(model, tok, GAPS, mask).filter(like="score").to_numpy(), abs=1e-5)


def test_what_cannot_be_asked(bert):
    model, tok = bert
    with pytest.raises(UnknownName, match="score of options"): plausibility(model, tok, COPA, score="logprobs")
    with pytest.raises(BadChoices, match=r"question 7: it has \d+ tokens with the option 'y', and the model reads"):
        plausibility(model, tok, [dict(id=7, question="a robin " * 60, choices=["y", "z"], label=0)])
    with pytest.raises(SubnetError, match="needs a masked model"): plausibility(*load("pocket-gpt2"), COPA)
    for score in SCORES:
        with pytest.raises(BadChoices, match="no question"): plausibility(model, tok, [], score=score)


@pytest.mark.real
def test_the_real_sets(real):
    model, tok = load(str(real / "models" / "minilm-l6-mlm"))
    for name, score in (("copa", "logprob"), ("copa", "published"), ("arct", "pll"), ("commonsenseqa", "published")):
        task = choice_task(real / "datasets" / name, test=12)
        table = plausibility(model, tok, task.test, score=score)
        assert 0 < len(table) <= 12 and table.filter(like="score").notna().all().all()
        row = task.test[0]
        if score in ("logprob", "pll"):
            wanted = [plainly(model, tok, row, option, score) for option in row["choices"]]
            assert table.filter(like="score").iloc[0].tolist() == pytest.approx(wanted, abs=1e-3)


def test_what_has_no_token_is_refused(bert):
    "Nothing can be said of it; a sum over nothing would be more plausible than any other option."
    rows = as_choices([dict(question="a robin is a [MASK] .", choices=["bird", "\u200b"], label=0)])
    for ask in (plausibility, check_readable):
        with pytest.raises(BadChoices, match=r"question 0: .* no token to score"): ask(*bert, rows, score="pll")
        ask(*bert, rows, score="logprob")      # its surroundings are scored


def test_all_questions_are_looked_at_beforehand(bert):
    long = as_choices([*choices(3), {**choices(1)[0], "premise": "the robin met a girl near the park " * 20}])
    for score in SCORES:
        with pytest.raises(BadChoices, match="reads at most 64"): check_readable(*bert, long, score)
        check_readable(*bert, COPA, score)
    with pytest.raises(SubnetError, match="masked model"): check_readable(*load("pocket-gpt2"), COPA)
