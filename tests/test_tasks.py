"Tables of labelled sentences, task metrics and fine-tuning on them."
from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from subnet_explorer.apply import masked, parameter
from subnet_explorer.data import GLUE, BadTable, Labelled, read_glue
from subnet_explorer.evaluate import TaskScore, accuracy, task_metrics, task_scores
from subnet_explorer.heads import Classifier, Fitted, fit, head_for, preserved
from subnet_explorer.mask import Mask
from subnet_explorer.objectives import Context, Task, batch_at
from subnet_explorer.pocket import POCKET_TASKS, labelled, load, vocabulary
from subnet_explorer.search import lr_at
from subnet_explorer.score import importance, iterate
from subnet_explorer.space import Space, SubnetError, UnknownName
from subnet_explorer.store import OtherRun

# one row of every task in the files of the download script
ROWS = {
    "CoLA": (None, "gj04\t1\t\tThe boat sank.", dict(sentence="The boat sank.", label="1")),
    "SST-2": ("sentence\tlabel", "a fine film \t1", dict(sentence="a fine film", label="1")),
    "MRPC": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t7\t8\tHe \"said so.\tHe left.", dict(sentence='He "said so.', pair="He left.", label="0")),
    "STS-B": ("index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore", "0\tg\tf\t2012\t1\ta\tb\tA cat.\tA dog.\t1.250", dict(sentence="A cat.", pair="A dog.", label=1.25)),
    "QQP": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\tWhy?\tHow?\t0", dict(sentence="Why?", pair="How?", label="0")),
    "MNLI": ("index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label", "0\t1\t1a\tg\tIt rains.\tIt is wet.\tneutral\tentailment", dict(sentence="It rains.", pair="It is wet.", label="entailment")),
    "QNLI": ("index\tquestion\tsentence\tlabel", "0\tWho?\tHe did.\tnot_entailment", dict(sentence="Who?", pair="He did.", label="not_entailment")),
    "RTE": ("index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\tentailment", dict(sentence="A.", pair="B.", label="entailment")),
    "WNLI": ("index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\t1", dict(sentence="A.", pair="B.", label="1")),
}


@pytest.fixture(scope="module")
def bert(pocket_bert): return pocket_bert


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("task", GLUE)
@pytest.mark.parametrize("packed", [False, True])
def test_all_nine_layouts(task, packed, tmp_path):
    head, row, wanted = ROWS[task]
    (folder := tmp_path / task.replace("-", "").lower()).mkdir()
    text = "\n".join(filter(None, [head, row])) + "\n"
    name = "dev_matched.tsv" if task == "MNLI" else "dev.tsv"
    if packed: (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    else: (folder / name).write_text(text)
    data = read_glue(folder, "dev")
    assert data.task is GLUE[task] and list(data) == [wanted] and data.real == (task == "STS-B") and not data.skipped


def test_the_numbers_and_names_of_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache")); monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (folder := tmp_path / "mnli").mkdir()
    rows = [dict(premise="It rains.", hypothesis="It is wet.", label=0, idx=0), dict(premise="It rains.", hypothesis="It is dry.", label=2, idx=1), dict(premise="x", hypothesis="y", label=-1, idx=2)]
    (folder / "validation_matched.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    import datasets
    parts = {"validation_matched": datasets.Dataset.from_list(rows)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: {("glue", "mnli"): parts, ("nyu-mll/glue", "mnli"): parts}[args])
    data = read_glue("datasets:nyu-mll/glue/mnli", "dev")
    assert data.task is GLUE["MNLI"] and [r["label"] for r in data] == ["entailment", "contradiction"] and data.skipped == {"no gold label": 1}
    with pytest.raises(BadTable, match="no part 'train'"): read_glue("datasets:nyu-mll/glue/mnli")
    parts["validation_matched"] = datasets.Dataset.from_list([dict(premise=None, hypothesis="It is wet.", label=0), *rows])
    with pytest.raises(BadTable, match="the sentence is empty"): read_glue("datasets:nyu-mll/glue/mnli", "dev")


@pytest.mark.parametrize("text, error", [
    ("index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\n", "line 2: 3 columns where 4"),
    ("index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tmaybe\n", "line 2: the label 'maybe' is none of entailment, not_entailment"),
    ("index\tsentence1\tsentence2\tlabel\n0\tA.\t \tentailment\n", "the pair is empty"),
    ("index\tsentence1\tsentence2\n0\tA.\tB.\n", "no column label"),
    ("index\tsentence1\tsentence2\tlabel\n0\t\tB.\tentailment\n", "the sentence is empty"),
    ("index\tpremise\tsentence2\tlabel\n0\tA.\tB.\tentailment\n", "no column sentence1: found index, premise"),
    ("index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\t-\n", "no labelled sentence .*no gold label"),
    ("index\tsentence1\tsentence2\tlabel\n", "no labelled sentence"), ("", "no column"),
])
def test_broken_tables(text, error, tmp_path):
    (file := tmp_path / "rte.tsv").write_text(text)
    with pytest.raises(BadTable, match=error): read_glue(file)


def test_more_bad_input(tmp_path):
    with pytest.raises(BadTable, match="there is no table"): read_glue(tmp_path / "none.tsv")
    with pytest.raises(BadTable, match="there is no table .*dev.tsv"): read_glue(tmp_path, "dev")
    with pytest.raises(UnknownName, match="did you mean RTE"): read_glue(tmp_path, "dev", task="RTEE")
    with pytest.raises(UnknownName, match="unknown part"): read_glue(tmp_path, "test")
    (file := tmp_path / "sts-b.tsv").write_text("sentence1\tsentence2\tscore\na\tb\thigh\nc\td\tnan\ne\tf\t2.5\n")
    with pytest.raises(BadTable, match="line 2: the label 'high' is no number"): read_glue(file)
    data = read_glue(file, strict=False)
    assert len(data) == 1 and data.skipped == {"broken line": 2}


def test_a_table_of_ones_own(tmp_path):
    (file := tmp_path / "mine.tsv").write_text("sentence1\tsentence2\tlabel\na b\tc\tyes\nd\te\tno\n")
    data = read_glue(file)
    assert data.task.labels == ("no", "yes") and data[0] == dict(sentence="a b", pair="c", label="yes") and data.task.metrics == ("accuracy",)
    file.write_text("text\tlabel\na\t1.5\nb\t2\n")
    assert read_glue(file).real and read_glue(file)[1]["label"] == 2.0
    file.write_text("text\tlabel\n" + "".join(f"a\tx{i}\n" for i in range(200)))
    with pytest.raises(BadTable, match="200 different labels"): read_glue(file)


# ── the pocket tasks ─────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("task", POCKET_TASKS)
def test_pocket_tasks(task):
    train, dev = read_glue(f"pocket:{task}"), read_glue(f"pocket:{task}", "dev")
    assert len(train) == 1500 and len(dev) == 400
    key = lambda r: (r["sentence"], r.get("pair"))
    assert not {key(r) for r in train} & {key(r) for r in dev}
    assert {w for r in dev for k in ("sentence", "pair") for w in r.get(k, "").split()} <= set(vocabulary())
    if dev.real: assert 0 <= min(r["label"] for r in dev) and max(r["label"] for r in dev) <= 5 and np.std([r["label"] for r in dev]) > 1
    else: assert sum(r["label"] == dev.task.labels[0] for r in dev) in range(180, 221)
    assert labelled(task, 9, seed=1) == labelled(task, 9, seed=1) != labelled(task, 9, seed=2)


# ── metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_metrics_by_hand():
    gold, said = list("1101001011"), list("1001011010")
    tp, fp, fn, tn = 4, 1, 2, 3
    c = task_metrics(GLUE["CoLA"], gold, said)
    assert c["score"] == c["matthews"] == pytest.approx((tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))) and c["note"] == ""
    m = task_metrics(GLUE["MRPC"], gold, said)
    assert m["score"] == m["accuracy"] == .7 and m["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    x, y = np.array([0., 1, 2, 5, 4]), np.array([.2, .1, 3, 4, 9])
    s = task_metrics(GLUE["STS-B"], x.tolist(), y.tolist())
    rank = lambda v: np.argsort(np.argsort(v))
    assert s["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1]) and s["spearman"] == pytest.approx(np.corrcoef(rank(x), rank(y))[0, 1]) and s["score"] == pytest.approx((s["pearson"] + s["spearman"]) / 2)


def test_metrics_that_say_nothing(recwarn):
    assert task_metrics(GLUE["CoLA"], list("01"), list("11")) == dict(score=0., matthews=0., accuracy=.5, note="all predictions are equal")
    assert task_metrics(GLUE["QQP"], list("00"), list("00")) == dict(score=1., accuracy=1., f1=0., note="all labels are equal and all predictions are equal")
    s = task_metrics(GLUE["STS-B"], [1., 2.], [3., 3.])
    assert np.isnan([s["score"], s["pearson"], s["spearman"]]).all() and s["note"] == "all predictions are equal" and not recwarn.list
    with pytest.raises(SubnetError, match="NaN or infinite"): task_metrics(GLUE["STS-B"], [1., 2.], [3., float("nan")])
    with pytest.raises(SubnetError, match="no row to score RTE"): task_metrics(GLUE["RTE"], [], [])
    with pytest.raises(SubnetError, match="1 predictions for 2 labels"): task_metrics(GLUE["RTE"], ["entailment"] * 2, ["entailment"])


# ── heads ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_pairs_are_read_as_the_model_reads_them(bert):
    model, tok = bert
    data = read_glue("pocket:similar", "dev").take(6)
    head = head_for(model, data, seed=2)
    coded = [tok(r["sentence"], r["pair"], return_tensors="pt", return_token_type_ids=True) for r in data]
    with torch.no_grad(): out = torch.cat([head(model.bert(**c)[0][:, 0]) for c in coded])[:, 0]
    gold = torch.tensor([r["label"] for r in data])
    assert Task(data, head).prepare(Context(model, tok, 1, 6, 0))(0).item() == pytest.approx(F.mse_loss(out, gold).item(), rel=1e-4)
    assert Task(data, head).prepare(Context(model, tok, 1, 6, 0, path="plain"))(0).item() == pytest.approx(F.mse_loss(out, gold).item(), rel=1e-4)
    assert task_scores(model, tok, head, data)["pearson"] == pytest.approx(np.corrcoef(out, gold)[0, 1], abs=1e-4)
    with torch.no_grad(): untyped = head(model.bert(input_ids=coded[0].input_ids)[0][:, 0])
    assert abs(untyped.item() - out[0].item()) > 1e-4, "token types make no difference"
    with pytest.raises(SubnetError, match="gives numbers, not labels"): accuracy(model, tok, data, head)


def test_accuracy_of_pairs_is_that_of_the_task(bert):
    "Both measures read token types; with them the untrained head answers differently."
    model, tok = bert
    data = read_glue("pocket:entails", "dev").take(60)
    head = head_for(model, data, seed=2)
    with torch.no_grad(): head.out.weight.normal_(generator=torch.Generator().manual_seed(0))
    found = accuracy(model, tok, data, head)
    assert found == task_scores(model, tok, head, data)["accuracy"]
    coded = [head.encode(tok, e) for e in data]
    with torch.no_grad(): said = [[head.out(model.bert(input_ids=torch.tensor([c[0]]), **kw)[0][0, 0]).argmax().item() for c, kw in ((c, dict(token_type_ids=torch.tensor([c[3]])) if typed else {}) for c in coded)] for typed in (True, False)]
    assert found == np.mean([a == c[2][0] for a, c in zip(said[0], coded)]) and said[0] != said[1]
    with pytest.raises(SubnetError, match="no row to ask"): accuracy(model, tok, [], head)


def test_long_texts_are_cut_and_counted(bert):
    model, tok = bert
    rows = Labelled((dict(sentence="the cat " * 40, pair="a dog .", label="0"), dict(sentence="a cat .", pair="a dog .", label="1")), GLUE["WNLI"])
    head = head_for(model, rows)
    ids, _, _, types = head.encode(tok, rows[0])
    assert len(ids) == len(types) == 64 and sum(types) == 4 and head.cut(tok, rows) == 1
    gpt2, gtok = load("pocket-gpt2")
    head = head_for(gpt2, rows, length=20)
    ids, at, _ = head.encode(gtok, rows[0])
    assert len(ids) == 20 and at == [19] and ids[-4:] == [gtok.eos_token_id, *gtok("a dog .").input_ids][-4:] and head.cut(gtok, rows) == 1


def test_labels_come_from_the_task_not_from_the_rows(bert):
    one = Labelled((dict(sentence="a cat .", label="1"),), GLUE["CoLA"])
    assert head_for(bert[0], one).labels == ["0", "1"] and type(head_for(bert[0], one)) is Classifier


# ── fine-tuning ──────────────────────────────────────────────────────────────────────────────────────────────────────

def test_regression_by_hand(bert):
    model, tok = bert
    data = read_glue("pocket:similar").take(12)
    with preserved(model):
        done = fit(model, tok, data, steps=3, lr=1e-3, head_lr=1e-2, warmup=0, clip=.5, batch=4, seed=1, every=1)
        ours = torch.cat([p.detach().flatten() for p in model.parameters()])
    head = head_for(model, data, seed=1)
    coded = [tok(r["sentence"], r["pair"], return_tensors="pt", return_token_type_ids=True) for r in data]
    with preserved(model):
        opt, losses = torch.optim.AdamW([dict(params=model.parameters(), lr=1e-3), dict(params=head.parameters(), lr=1e-2)], weight_decay=0), []
        for step in range(3):
            index = batch_at(step, np.array([c.input_ids.shape[1] for c in coded]), 4, 1)
            loss = torch.stack([(head(model.bert(**coded[i])[0][0, 0])[0] - data[i]["label"]) ** 2 for i in index]).mean()
            for g, peak in zip(opt.param_groups, (1e-3, 1e-2)): g["lr"] = peak * lr_at(step, 3, warmup=0)
            opt.zero_grad(); loss.backward(); torch.nn.utils.clip_grad_norm_([*model.parameters(), *head.parameters()], .5); opt.step(); losses.append(loss.item())
        assert done.log.loss.tolist() == pytest.approx(losses, rel=1e-3)
        assert (torch.cat([p.detach().flatten() for p in model.parameters()]) - ours).abs().gt(1e-4).float().mean() < .01
    model.zero_grad(set_to_none=True)


def test_fit_returns_head_log_and_what_was_cut(bert):
    model, tok = bert
    data, dev = read_glue("pocket:acceptable").take(60), read_glue("pocket:acceptable", "dev").take(40)
    with preserved(model):
        done = fit(model, tok, data, epochs=2, batch=16, dev=dev, every=4, length=8)
        assert isinstance(done, Fitted) and done.steps == 8 and done.log.step.tolist() == [4, 8] and done.cut == done.head.cut(tok, data) > 0
        assert task_scores(model, tok, done.head, dev)["score"] == pytest.approx(done.log.score.max())


def test_patience_and_the_last_state(bert):
    model, tok = bert
    data = read_glue("pocket:acceptable").take(32)
    class Falling:
        def recipe(self): return {}
        def prepare(self, context): n = iter(range(99)); return lambda: -next(n)
    head = Classifier(model, data)
    with preserved(model):
        log = fit(model, tok, Task(data, head), steps=20, every=2, monitor=Falling(), patience=3)
        assert log.step.tolist() == [2, 4, 6, 8]
        early = model.bert.encoder.layer[0].output.dense.weight.clone()
    with preserved(model):
        fit(model, tok, Task(data, Classifier(model, data)), steps=20, every=2, monitor=Falling(), patience=3, keep="last")
        assert not torch.equal(early, model.bert.encoder.layer[0].output.dense.weight)
    with pytest.raises(SubnetError, match="needs something to watch"): fit(model, tok, data, patience=2)


def test_dropout_follows_from_the_seed_and_leaves_other_randomness_alone():
    def run(seed, dropout=True):
        model, tok = load("pocket-bert")
        for m in model.modules():
            if isinstance(m, torch.nn.Dropout): m.p = .3
        data = read_glue("pocket:acceptable").take(32)
        torch.manual_seed(5)
        log = fit(model, tok, Task(data, Classifier(model, data)), steps=3, every=1, dropout=dropout, seed=seed)
        assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(5))) and not model.training
        return log.loss.tolist()
    assert run(1) == run(1) and run(1) != run(2) and run(1) != run(1, dropout=False)


@pytest.mark.parametrize("kind", ["head+mlp", "weight"])
def test_masks_hold_during_training(bert, kind):
    model, tok = bert
    mask = Mask.random(Space.of(model, kind), .5, 0)
    data = read_glue("pocket:entails").take(32)
    with preserved(model), masked(model, mask, train=True):
        fit(model, tok, data, steps=3, weight_decay=.1)
        weights = mask.to("weight") if kind != "weight" else mask
        assert all((parameter(model, g)[torch.as_tensor(~b)] == 0).all() and parameter(model, g)[torch.as_tensor(b)].any() for g, b in weights.items() if b.any())


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_interrupted_fine_tuning_continues_to_the_bit(tmp_path, stop):
    data, dev = read_glue("pocket:paraphrase").take(64), read_glue("pocket:paraphrase", "dev").take(30)
    class Stopping(TaskScore):
        def prepare(self, context):
            of, looks = super().prepare(context), []
            def score():
                looks.append(0)
                if len(looks) > stop: raise KeyboardInterrupt
                return of()
            return score
    def run(folder, kind=TaskScore, lr=3e-4):
        model, tok = load("pocket-bert")
        head = head_for(model, data, seed=1)
        log = fit(model, tok, Task(data, head), steps=10, lr=lr, batch=16, every=2, dropout=True, clip=1.0, monitor=kind(dev, head), to=folder, checkpoint=0, seed=1)
        return log, torch.cat([p.detach().flatten() for p in [*model.parameters(), *head.parameters()]])
    log, whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt): run(tmp_path / "run", Stopping)
    for _ in range(2):                                                 # the second time it is read, not trained
        again, weights = run(tmp_path / "run")
        assert torch.equal(whole, weights) and again.equals(log)
    assert not (tmp_path / "run" / "state.safetensors").exists()
    with pytest.raises(OtherRun, match="lr"): run(tmp_path / "run", lr=1e-3)


def test_fine_tuned_heads_are_pruned_to_the_floor(bert):
    "The whole way on a pocket task: fine-tune, rank on held-out sentences, prune."
    model, tok = bert
    data, dev = read_glue("pocket:entails"), read_glue("pocket:entails", "dev").take(200)
    with preserved(model):
        done = fit(model, tok, data, epochs=2)
        space, goal = Space.of(model, "head+mlp"), Task(dev, done.head)
        found = iterate(model, tok, goal, TaskScore(dev, done.head), space, progress=False)
        assert found.full == task_scores(model, tok, done.head, dev)["score"] > .9
        assert found.score == task_scores(model, tok, done.head, dev, found.mask)["score"] >= .9 * found.full
        one, other = (importance(model, tok, goal, space, None, batch) for batch in (64, 9))
        assert all(np.allclose(one[n], other[n], rtol=1e-3, atol=1e-6) for n in one.values)


# ── real tables ──────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.real
@pytest.mark.parametrize("task, part, n, shares", [("RTE", "train", 2490, None), ("RTE", "dev", 277, ("entailment", 146)), ("CoLA", "train", 8551, None), ("CoLA", "dev", 1043, ("1", 721)),
                                                   ("SST-2", "train", 67349, None), ("SST-2", "dev", 872, ("1", 444))])
def test_real_tables(real, task, part, n, shares):
    data = read_glue(real / "datasets" / "glue" / task, part)
    assert data.task is GLUE[task] and len(data) == n and not data.skipped
    if shares: assert sum(r["label"] == shares[0] for r in data) == shares[1]


@pytest.mark.real
def test_a_real_encoder_learns_a_real_task(real):
    model, tok = load(real / "models" / "minilm-l6-mlm")
    folder = real / "datasets" / "glue"
    assert len(read_glue(folder / "QNLI" / "dev-a.tsv.gz")) == 4428
    train, dev = read_glue(folder / "SST-2").take(1500, 1), read_glue(folder / "SST-2", "dev").take(200, 1)
    done = fit(model, tok, train, epochs=2, lr=2e-4, length=48, seed=1)
    assert task_scores(model, tok, done.head, dev)["score"] > .62
