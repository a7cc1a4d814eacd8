"A lambda is chosen on other sentences than it is reported on: guessing stays guessing."
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from subnet_explorer.core.errors import SubnetError
from subnet_explorer.recipes.choice import choice_parts, choice_said, choose_lambda


def noise(rng: np.random.Generator, seeds: int, lambdas: int = 12, n: int = 40, chance: float = .5) -> pd.DataFrame:
    "Scores of cells that all guess."
    cells = [(probe, grain, float(lam), seed) for seed in range(seeds)
             for probe, grain, lam in [*(("subnetwork", "neuron", lam) for lam in range(lambdas)), ("finetune", "", 0)]]
    t = pd.DataFrame(cells, columns=["probe", "granularity", "lam", "seed"])
    return t.assign(**{f"score_{k}": rng.binomial(n, chance, len(t)) / n for k in ("selection", "reported")})


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_chosen_score_of_noise_is_chance(seeds):
    "Where it was chosen, it is better than chance, and as good as fine-tuning; where it is reported, it is neither."
    rng, chosen_on, reported, apart, refused = np.random.default_rng(seeds), [], [], [], 0
    for _ in range(150):
        t = noise(rng, seeds)
        means = t.groupby(["probe", "lam"]).score_selection.mean()
        good = [lam for lam, mean in means["subnetwork"].items() if mean >= 1.051 * means["finetune"][0]]
        if not good:
            refused += 1
            with pytest.raises(SubnetError, match="no subnetwork probe comes within"): choose_lambda(t, "neuron", -.051)
            continue
        found = choose_lambda(t, "neuron", within=-.051)
        assert found["lam"] == max(good)
        chosen_on.append(means["subnetwork", max(good)])
        reported.append(found["score"])
        apart.append(found["difference"])
    assert refused and len(reported) > 75
    assert np.mean(chosen_on) > .5 + 4 * sure(chosen_on)
    assert abs(np.mean(reported) - .5) < 4 * sure(reported) and abs(np.mean(apart)) < 4 * sure(apart)


def sure(values: list[float]) -> float:
    "Standard error of a mean."
    return float(np.std(values) / np.sqrt(len(values)))


def table(**cells) -> pd.DataFrame:
    "Rows from lam_seed=(selection, reported); lam 0 is fine-tuning."
    rows = []
    for name, (selection, reported) in cells.items():
        lam, seed = map(int, name[1:].split("_"))
        rows.append({"probe": "subnetwork" if lam else "finetune", "granularity": "neuron" if lam else "",
                     "lam": float(lam), "seed": seed, "score_selection": selection, "score_reported": reported})
    return pd.DataFrame(rows)


def test_seeds_are_paired():
    "A seed without fine-tuning, or with an undefined score, is left out; the rest is compared seed by seed."
    t = table(x0_0=(1, .9), x0_1=(.5, .7), x5_0=(.9, .8), x5_1=(.46, .5), x5_2=(.1, .1), x9_0=(.1, .9), x9_1=(.1, .9))
    found = choose_lambda(t, "neuron")
    assert (found["lam"], found["n"]) == (5, 2)
    assert (found["score"], found["finetune"]) == (pytest.approx(.65), pytest.approx(.8))
    assert found["difference"] == pytest.approx(-.15) and found["difference_low"] < -.15 < found["difference_high"]
    gone = t.assign(score_selection=t.score_selection.where((t.lam != 5) | (t.seed != 1)))
    assert choose_lambda(gone, "neuron")["n"] == 1 and np.isnan(choose_lambda(gone, "neuron")["low"])


def test_the_strongest_and_not_the_best():
    t = table(x0_0=(1, 1), x1_0=(1, 1), x5_0=(.91, .6), x9_0=(.8, .99))
    assert (choose_lambda(t, "neuron")["lam"], choose_lambda(t, "neuron")["score"]) == (5, .6)
    assert choose_lambda(t, "neuron", within=.3)["lam"] == 9


@pytest.mark.parametrize("t, says", [
    (table(x1_0=(1, 1)), "add \"finetune\""),
    (table(x0_0=(1, 1), x1_0=(.5, 1)), "no subnetwork probe comes within 10%"),
    (table(x0_0=(1, 1), x1_0=(1, 1)).drop(columns="score_selection"), "no scores on sentences to choose on"),
], ids=["bound", "none", "old"])
def test_what_cannot_be_chosen(t, says):
    with pytest.raises(SubnetError, match=says): choose_lambda(t, "neuron")


def test_the_parts_never_meet():
    for n in range(6):
        chosen, reported = choice_parts(list(range(n)))
        assert sorted([*chosen, *reported]) == list(range(n))
    assert choice_said("abc") == {"chosen_on": "every other sentence of dev (2)",
                                  "reported_on": "the other sentences of dev (1)"}
