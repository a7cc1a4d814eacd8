"`subnet-explorer agreement` on published arrays and on stores: by hand, against other packages, and what is undefined."
from __future__ import annotations

import json

import krippendorff
import numpy as np
import pytest
from statsmodels.stats.contingency_tables import cochrans_q
from statsmodels.stats.inter_rater import fleiss_kappa as sm_fleiss
from toys import LAYOUT, write_arrays

from subnet_explorer.cli import main
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.run import Run
from subnet_explorer.core.space import Group, ModelId, Space, unit_space
from subnet_explorer.core.store import Store

UNITS = tuple(Group(f"{k}{i}", k, i, k, (n,)) for i in range(2) for k, n in (("head", 4), ("mlp", 1)))
FIELDS = {
    "seeds", "kappa", "alpha", "raw_agreement", "prevalence", "q", "q_p", "survivors", "super_survivors",
    "mean_jaccard_distance",
}


def counts(bits: np.ndarray) -> np.ndarray:      # (unit, category), as statsmodels wants it
    return np.stack([(1 - bits).sum(0), bits.sum(0)], 1)


def agree(capsys, *args) -> dict:
    "What the command says as JSON."
    capsys.readouterr()
    assert main(["agreement", *map(str, args), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == 1
    return json.loads(out, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))


def test_the_command_by_hand(tmp_path, capsys):
    """Four heads in two layers; of task A two seeds agree and one dissents in one head, of task B all keep the same.

    A: votes of the heads 3, 3, 1, 0, so P = (1 + 1 + 1/3 + 1)/4 = 5/6, p = 7/12, Pe = 74/144;
    Q = 2 (3·(4+4+9) − 49)/(21 − 19) = 2 with two degrees of freedom; Jaccard distances 0, 1/3, 1/3.
    Overlaps with B (two heads: 1, 2) under one seed: 2, 2, 2."""
    a, b = np.array([[1, 1], [0, 0]]), np.array([[1, 1], [1, 0]])
    write_arrays(tmp_path, {("A", 0): a, ("A", 1): a, ("A", 2): b, **{("B", s): a for s in range(3)}})
    out = agree(capsys, tmp_path)
    assert set(out) == {"tasks", "overlap"}
    assert set(out["tasks"]["A"]) == FIELDS and set(out["tasks"]["B"]) == FIELDS | {"notes"}
    one = out["tasks"]["A"]
    assert one["seeds"] == [0, 1, 2] and one["survivors"] == pytest.approx(7 / 3) and one["super_survivors"] == 2
    assert one["raw_agreement"] == pytest.approx(5 / 6) and one["prevalence"] == pytest.approx(7 / 12)
    assert one["kappa"] == pytest.approx((5 / 6 - 74 / 144) / (1 - 74 / 144))
    assert one["alpha"] == pytest.approx(1 - 11 * 1 / (7 * 5)) and one["q"] == pytest.approx(2)
    assert one["q_p"] == pytest.approx(np.exp(-1)) and one["mean_jaccard_distance"] == pytest.approx(2 / 9)
    two = out["tasks"]["B"]
    assert [two[k] for k in ("kappa", "alpha", "q", "q_p", "mean_jaccard_distance")] == [1, 1, None, None, 0]
    assert two["notes"] == dict.fromkeys(("q", "q_p"), "undefined: the masks are equal")
    assert out["overlap"] == {
        "tasks": ["A", "B"],
        "mean": [[pytest.approx(7 / 3), 2], [2, 2]],
        "std": [[pytest.approx(3 ** -.5), 0], [0, 0]],
    }


def expected(bits: np.ndarray) -> dict[str, float]:      # (seed, unit)
    "What other packages and plain sums say of the masks of one task."
    q = cochrans_q(bits.T)
    distances = [1 - (x & y).sum() / (x | y).sum() for i, x in enumerate(bits) for y in bits[:i]]
    return dict(
        kappa=sm_fleiss(counts(bits)), alpha=krippendorff.alpha(bits, level_of_measurement="nominal"),
        q=q.statistic, q_p=q.pvalue, prevalence=bits.mean(), survivors=bits.sum(1).mean(),
        super_survivors=bits.all(0).sum(), mean_jaccard_distance=np.mean(distances))


def test_the_command_against_other_packages(tmp_path, capsys):
    rng = np.random.default_rng(3)
    densities = {"CoLA": .7, "RTE": .4, "WNLI": .1}
    tasks = {t: (rng.random((5, 12, 12)) < p).astype(int) for t, p in densities.items()}
    mlps = {t: rng.integers(0, 2, (5, 12)) for t in tasks}
    keys = [(t, s) for t in tasks for s in range(5)]
    write_arrays(tmp_path, {(t, s): tasks[t][s] for t, s in keys}, {(t, s): mlps[t][s] for t, s in keys})
    for kind, found in (("head", tasks), ("mlp", mlps)):
        out = agree(capsys, tmp_path, "--kind", kind)
        for t, b in found.items():
            row, wanted = out["tasks"][t], expected(b.reshape(5, -1))
            assert set(row) == FIELDS
            assert {k: row[k] for k in wanted} == pytest.approx(wanted)
        for i, x in enumerate(found):
            for j, y in enumerate(found):
                shared = (found[x] & found[y]).reshape(5, -1).sum(1)
                assert out["overlap"]["mean"][i][j] == pytest.approx(shared.mean())
                assert out["overlap"]["std"][i][j] == pytest.approx(shared.std(ddof=1))


def test_the_command_names_what_is_undefined(tmp_path, capsys):
    full, none = np.ones((2, 2)), np.zeros((2, 2))
    masks = {**{("full", s): full for s in (1, 2, 3)}, **{("none", s): none for s in (1, 2)}, ("alone", 7): np.eye(2)}
    write_arrays(tmp_path, masks)
    out = agree(capsys, tmp_path)
    alone, kept, gone = (out["tasks"][t] for t in ("alone", "full", "none"))
    assert [alone[k] for k in ("seeds", "prevalence", "survivors", "super_survivors")] == [[7], .5, 2, 2]
    nothing = {"kappa", "alpha", "raw_agreement", "q", "q_p", "mean_jaccard_distance"}
    assert all(alone[k] is None for k in nothing)
    assert alone["notes"] == dict.fromkeys(nothing, "undefined: there is one seed only")
    for row, word in ((kept, "kept"), (gone, "removed")):
        assert {k for k in FIELDS if row[k] is None} == {"kappa", "alpha", "q", "q_p"} == set(row["notes"])
        reason = f"undefined: all masks agree on one category ({word})"
        assert row["notes"]["kappa"] == row["notes"]["alpha"] == reason
        assert row["raw_agreement"] == 1 and row["mean_jaccard_distance"] == 0
    table = out["overlap"]
    assert table["tasks"] == ["alone", "full", "none"]
    assert table["mean"] == [[2, None, None], [None, 4, 0], [None, 0, 0]]
    assert table["std"] == [[None, None, None], [None, 0, 0], [None, 0, 0]]
    assert sum("no seed in common" in n for n in out["notes"]) == 2
    assert "overlap of alone and alone: one seed in common, so no standard deviation." in out["notes"]
    assert any(n.startswith("tasks have different seeds") for n in out["notes"])
    assert main(["agreement", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "nan" not in said.lower() and "not whether they agree" in said
    reasons = "kappa, alpha, raw_agreement, q, q_p, mean_jaccard_distance undefined: there is one seed only"
    assert f"alone: {reasons}" in said


def test_the_command_on_a_store(tmp_path, capsys):
    "Runs on fine-tuned copies (other weights, the same shape) are compared by place; runs of other shapes are not."
    store = Store(tmp_path / "runs")

    def run(task, seed, kind, mask):
        labels, config = {"task": task, "seed": seed, "kind": kind}, {"t": task, "s": seed, "k": kind}
        return Run(store.path(labels, config), config, labels).finish(mask)

    def tuned(seed): return Space(UNITS, LAYOUT, ModelId(f"copy-{seed}", None, "c", f"w{seed}"))

    masks = {s: Mask.random(tuned(s), .5, seed=s) for s in range(3)}
    for s, m in masks.items():
        run("RTE", s, "bad", ~m)
        run("RTE", s, "random", m)
    assert main(["agreement", str(tmp_path)]) == 2
    assert "several masks of task 'RTE' have the same 'seed'" in capsys.readouterr().err
    for s, m in masks.items(): run("RTE", s, "good", m)
    out = agree(capsys, tmp_path, "--where", "kind=good")
    by_default = agree(capsys, tmp_path)                       # of a study of tickets the good masks are counted
    assert by_default["tasks"] == out["tasks"]
    why = "this is a study of lottery tickets: its good masks are compared; ask for others with --where kind=NAME."
    assert by_default["notes"] == [why, *out["notes"]]
    heads = [np.concatenate([b for g, b in m.items() if g.kind == "head"]) for m in masks.values()]
    assert out["tasks"]["RTE"]["kappa"] == pytest.approx(sm_fleiss(counts(np.array(heads).astype(int))))
    assert "3 models with different weights" in out["notes"][0]
    assert agree(capsys, tmp_path, "--where", "kind=bad", "--kind", "mlp")["tasks"]["RTE"]["seeds"] == [0, 1, 2]
    for args, says in (
        (["--where", "kind=godo"], "did you mean good"),
        (["--where", "knid=good"], "did you mean kind"),
        (["--kind", "heads", "--where", "kind=good"], "did you mean head"),
    ):
        assert main(["agreement", str(tmp_path), *args]) == 2 and says in capsys.readouterr().err
    labels = {"task": "RTE", "seed": 4, "kind": "good"}
    Run(store.path(labels, {"s": 4}), {"s": 4}, labels)
    assert "1 of 10 runs are not finished and left out." in agree(capsys, tmp_path, "--where", "kind=good")["notes"]
    run("RTE", 3, "good", Mask.full(unit_space(3, 4)))
    assert main(["agreement", str(tmp_path), "--where", "kind=good"]) == 2
    assert "SpaceMismatch" in capsys.readouterr().err
