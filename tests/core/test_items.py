"What every item adds to a score, and intervals that count items."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import matthews_corrcoef

from subnet_explorer.core.errors import SubnetError
from subnet_explorer.core.items import Items, items_around, items_text, read_items
from subnet_explorer.core.pairs import Pairs


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=2, max_size=1200))
def test_shares_keep_their_mean_in_blocks_and_as_a_text(hits):
    items = Items.of_shares(hits)
    assert items.values.mean() == pytest.approx(np.mean(hits)) and len(items.values) == min(len(hits), 1000)
    again = read_items(items_text(items))
    assert again.shares and again.values == pytest.approx(items.values, rel=1e-5)


def test_leaving_out_gives_the_values_of_a_mean_and_the_score_of_anything():
    rng = np.random.default_rng(0)
    gold, said = rng.integers(0, 2, 150), rng.integers(0, 2, 150)
    items = Items.by_leaving_out(lambda kept: matthews_corrcoef(gold[kept], said[kept]), 150)
    whole = matthews_corrcoef(gold, said)
    without = [matthews_corrcoef(np.delete(gold, i), np.delete(said, i)) for i in range(150)]
    assert items.values.mean() == pytest.approx(whole)
    assert items.values == pytest.approx(whole + 149 * (np.mean(without) - without))
    assert items_around(read_items(items_text(items)), whole).mean() == pytest.approx(whole, abs=1e-15)


@pytest.mark.parametrize("text", ["1;2", "a,b", "1,,2", "nan,1"])
def test_what_is_no_list_of_items_is_refused(text):
    with pytest.raises(SubnetError, match="items are numbers"): read_items(text)


def packed_rows(values, conditions, shares=True):      # values: (condition, seed, item)
    return pd.DataFrame([{"under": name, "seed": seed, "score": row.mean(), "items": items_text(Items(row, shares))}
                         for name, one in zip(conditions, values, strict=True) for seed, row in enumerate(one)])


def test_packed_items_give_what_rows_of_items_give():
    rng = np.random.default_rng(1)
    values = (rng.random((2, 3, 50)) < .6).astype(float)
    long = pd.DataFrame([{"under": "ab"[u], "seed": s, "item": i, "score": values[u, s, i]}
                         for u in range(2) for s in range(3) for i in range(50)])
    packed = Pairs(packed_rows(values, "ab"), ["seed"], packed="items")
    plain = Pairs(long, ["seed"], items=["item"], bounds=(0, 1))
    for one, other in ((packed.gains(), plain.gains()), (packed.means(), plain.means())):
        pd.testing.assert_frame_equal(one, other)


def test_a_perfect_score_of_few_sentences_has_an_interval():
    rows = packed_rows(np.ones((1, 1, 21)), ["full"])
    found = Pairs(rows, ["seed"], packed="items").means().iloc[0]
    assert found["items"] == 21 and found.low < .9 < found.high == 1


def test_rows_without_items_count_as_wholes_and_nothing_is_dropped():
    values = np.random.default_rng(2).random((2, 3, 20))
    rows = packed_rows(values, "ab")
    rows.loc[4, "items"] = ""
    found = Pairs(rows, ["seed"], packed="items").gains().iloc[0]
    assert (found.seeds, found["items"], found.left_out) == (3, 0, "")
    assert found["mean"] == pytest.approx((values[0] - values[1]).mean())


def test_an_undefined_score_takes_its_seed_out_and_says_so():
    values = np.random.default_rng(3).random((2, 3, 20))
    rows = packed_rows(values, "ab")
    rows.loc[1, ["score", "items"]] = [np.nan, ""]
    found = Pairs(rows, ["seed"], packed="items").gains().iloc[0]
    assert (found.seeds, found["items"], found.undefined, found.left_out) == (2, 20, 1, "1 seed")


def test_what_only_one_side_has_is_counted():
    values = np.random.default_rng(4).random((2, 4, 10))
    long = pd.DataFrame([{"under": "ab"[u], "seed": s, "item": i, "score": values[u, s, i]}
                         for u in range(2) for s in range(4) for i in range(10)])
    some = long[(long.under == "a") | (long.seed > 0) & (long["item"] < 7)]
    found = Pairs(some, ["seed"], items=["item"]).gains().iloc[0]
    assert (found.seeds, found["items"], found.left_out) == (3, 7, "1 seed, 3 items")


def correlation_items(x, y):
    return Items.by_leaving_out(lambda kept: np.corrcoef(x[kept], y[kept])[0, 1], len(x))


@pytest.mark.parametrize("correlation", [False, True])
def test_intervals_of_packed_scores_cover_the_truth(correlation):
    "Three seeds, sixty sentences, an effect of each: the interval over seeds alone covers far too little."
    rng, covered, seeds_alone, n = np.random.default_rng(5), 0, 0, 300
    for _ in range(n):
        x = rng.normal(size=60)
        said = x + rng.normal(0, 1, 60) + rng.normal(0, .2, (3, 60))
        if correlation:
            told = [correlation_items(x, y) for y in said]
            truth = 1 / np.sqrt(2.04)
        else:
            told = [Items.of_shares(y > 0) for y in said]
            truth = .5
        rows = pd.DataFrame([{"under": "a", "seed": s, "score": t.values.mean(), "items": items_text(t)}
                             for s, t in enumerate(told)])
        found = Pairs(rows, ["seed"], packed="items").means().iloc[0]
        alone = Pairs(rows, ["seed"]).means().iloc[0]
        covered += found.low <= truth <= found.high
        seeds_alone += alone.low <= truth <= alone.high
    assert .91 < covered / n <= .995 and seeds_alone / n < .8
