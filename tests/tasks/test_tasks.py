"Tables of labelled sentences, task metrics and fine-tuning on them."
from __future__ import annotations

import copy
import gzip
import itertools
import json
import re
import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from subnet_explorer.core.errors import SpaceMismatch, SubnetError, UnknownName
from subnet_explorer.core.mask import Mask
from subnet_explorer.core.run import OtherRun
from subnet_explorer.core.space import Space
from subnet_explorer.data.grammar import PARTS, vocabulary
from subnet_explorer.data.pocket import TUNING, WORDINGS, pocket_rows
from subnet_explorer.data.pocket_tasks import POCKET_TASKS, labelled
from subnet_explorer.data.tables import GLUE, BadTable, Labelled, read_glue
from subnet_explorer.measure.metrics import TaskScore, accuracy, task_metrics, task_scores
from subnet_explorer.model.apply import masked, parameter
from subnet_explorer.model.load import load, tiny
from subnet_explorer.search.loop import lr_at
from subnet_explorer.search.objectives import Context, Task, batch_at
from subnet_explorer.search.prune import iterate
from subnet_explorer.search.score import importance
from subnet_explorer.tasks.fit import Fitted, fit, head_for, preserved
from subnet_explorer.tasks.heads import Classifier

# one row of every task in the files of the download script
STS = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score"]
MNLI = ["index", "promptID", "pairID", "genre", "sentence1", "sentence2", "label1", "gold_label"]
QUORA = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
PAIR, ASKED = ["index", "sentence1", "sentence2", "label"], ["index", "question", "sentence", "label"]
ROWS = {
    "CoLA": (None, ["gj04", "1", "", "The boat sank."], dict(sentence="The boat sank.", label="1")),
    "SST-2": (["sentence", "label"], ["a fine film ", "1"], dict(sentence="a fine film", label="1")),
    "MRPC": (["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["0", "7", "8", 'He "said so.', "He left."],
             dict(sentence='He "said so.', pair="He left.", label="0")),
    "STS-B": (STS, ["0", "g", "f", "2012", "1", "a", "b", "A cat.", "A dog.", "1.250"],
              dict(sentence="A cat.", pair="A dog.", label=1.25)),
    "QQP": (QUORA, ["1", "2", "3", "Why?", "How?", "0"], dict(sentence="Why?", pair="How?", label="0")),
    "MNLI": (MNLI, ["0", "1", "1a", "g", "It rains.", "It is wet.", "neutral", "entailment"],
             dict(sentence="It rains.", pair="It is wet.", label="entailment")),
    "QNLI": (ASKED, ["0", "Who?", "He did.", "not_entailment"],
             dict(sentence="Who?", pair="He did.", label="not_entailment")),
    "RTE": (PAIR, ["0", "A.", "B.", "entailment"], dict(sentence="A.", pair="B.", label="entailment")),
    "WNLI": (PAIR, ["0", "A.", "B.", "1"], dict(sentence="A.", pair="B.", label="1")),
}


@pytest.fixture(scope="module")
def bert(pocket_bert): return pocket_bert


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("task", GLUE)
@pytest.mark.parametrize("packed", [False, True])
def test_all_nine_layouts(task, packed, tmp_path):
    head, row, wanted = ROWS[task]
    (folder := tmp_path / task.replace("-", "").lower()).mkdir()
    text = "\n".join("\t".join(cells) for cells in (head, row) if cells) + "\n"
    name = "dev_matched.tsv" if task == "MNLI" else "dev.tsv"
    if packed: (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    else: (folder / name).write_text(text)
    data = read_glue(folder, "dev")
    assert data.task is GLUE[task] and list(data) == [wanted] and data.real == (task == "STS-B") and not data.skipped


def test_the_numbers_and_names_of_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (folder := tmp_path / "mnli").mkdir()
    rows = [
        dict(premise="It rains.", hypothesis="It is wet.", label=0, idx=0),
        dict(premise="It rains.", hypothesis="It is dry.", label=2, idx=1),
        dict(premise="x", hypothesis="y", label=-1, idx=2),
    ]
    (folder / "validation_matched.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    import datasets
    parts = {"validation_matched": datasets.Dataset.from_list(rows)}
    known = {("glue", "mnli"): parts, ("nyu-mll/glue", "mnli"): parts}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: known[args])
    data = read_glue("datasets:nyu-mll/glue/mnli", "dev")
    assert data.task is GLUE["MNLI"] and [r["label"] for r in data] == ["entailment", "contradiction"]
    assert data.skipped == {"no gold label": 1}
    with pytest.raises(BadTable, match="no part 'train'"): read_glue("datasets:nyu-mll/glue/mnli")
    nothing = dict(premise=None, hypothesis="It is wet.", label=0)
    parts["validation_matched"] = datasets.Dataset.from_list([nothing, *rows])
    with pytest.raises(BadTable, match="the sentence is empty"): read_glue("datasets:nyu-mll/glue/mnli", "dev")


@pytest.mark.parametrize("text, error", [
    ("index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\n", "line 2: 3 columns where 4"),
    ("index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tmaybe\n",
     "line 2: the label 'maybe' is none of entailment, not_entailment"),
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
    with pytest.raises(BadTable, match=r"there is no table .*dev\.tsv"): read_glue(tmp_path, "dev")
    with pytest.raises(UnknownName, match="did you mean RTE"): read_glue(tmp_path, "dev", task="RTEE")
    with pytest.raises(UnknownName, match="unknown part"): read_glue(tmp_path, "test")
    (file := tmp_path / "sts-b.tsv").write_text("sentence1\tsentence2\tscore\na\tb\thigh\nc\td\tnan\ne\tf\t2.5\n")
    with pytest.raises(BadTable, match="line 2: the label 'high' is no number"): read_glue(file)
    data = read_glue(file, strict=False)
    assert len(data) == 1 and data.skipped == {"broken line": 2}


def test_a_table_of_ones_own(tmp_path):
    (file := tmp_path / "mine.tsv").write_text("sentence1\tsentence2\tlabel\na b\tc\tyes\nd\te\tno\n")
    data = read_glue(file)
    assert data.task.labels == ("no", "yes") and data.task.metrics == ("accuracy",)
    assert data[0] == dict(sentence="a b", pair="c", label="yes")
    file.write_text("text\tlabel\na\t1.5\nb\t2\n")
    assert read_glue(file).real and read_glue(file)[1]["label"] == 2.0
    file.write_text("text\tlabel\n" + "".join(f"a\tx{i}\n" for i in range(200)))
    with pytest.raises(BadTable, match="200 different labels"): read_glue(file)


# ── the pocket tasks ─────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("task", POCKET_TASKS)
def test_pocket_tasks(task):
    train, dev = read_glue(f"pocket:{task}"), read_glue(f"pocket:{task}", "dev")
    assert len(train) == PARTS["train"] and len(dev) == PARTS["dev"]
    assert {w for r in dev for k in ("sentence", "pair") for w in r.get(k, "").split()} <= set(vocabulary())
    gold = [r["label"] for r in dev]
    if dev.real: assert min(gold) >= 0 and max(gold) <= 5 and np.std(gold) > 1
    for part in (train, dev) if not dev.real else ():
        assert 2 * sum(r["label"] == dev.task.labels[0] for r in part) == len(part)
    assert labelled(task, 9, seed=1) == labelled(task, 9, seed=1) != labelled(task, 9, seed=2)
    assert labelled(task, 9, part="test") != labelled(task, 9, part="dev")
    with pytest.raises(SubnetError, match="must be a whole number of at least 0, got -1"): labelled(task, -1)


@pytest.mark.parametrize("task", POCKET_TASKS)
def test_pocket_parts_share_no_example_no_sentence_and_no_subject(task):
    rows = {part: labelled(task, 4000, part=part) for part in PARTS}
    examples = {part: {tuple(v for k, v in r.items() if k != "label") for r in rs} for part, rs in rows.items()}
    firsts = {part: {e[0] for e in es} for part, es in examples.items()}
    seconds = {part: {e[-1] for e in es} for part, es in examples.items()}
    for one, two in itertools.combinations(PARTS, 2):
        assert not examples[one] & examples[two]
        # there are few sentences about an eagle, so there the subject counts
        if task != "entails": assert not firsts[one] & firsts[two]
        if task in ("paraphrase", "similar"): assert not (firsts[one] | seconds[one]) & (firsts[two] | seconds[two])
    if task == "entails":
        subjects = {r["sub_phrase"] for r in pocket_rows() if r["pred"] == "IsA"}
        def subject(r): return max((p for p in subjects if f" {p} " in r["sentence1"]), key=len)
        told = {part: {subject(r) for r in rs if "kind of" in r["sentence2"]} for part, rs in rows.items()}
        assert len(told["dev"]) > 15 and not told["train"] & (told["dev"] | told["test"])
        assert not told["dev"] & told["test"]


@pytest.mark.parametrize("task", ["acceptable", "paraphrase", "entails"])
def test_no_pocket_example_has_two_labels(task):
    labels = {}
    for part in PARTS:
        for r in labelled(task, 4000, part=part):
            example = tuple(v for k, v in r.items() if k != "label")
            labels.setdefault(example, set()).add(r["label"])
    assert all(len(v) == 1 for v in labels.values())


def test_negatives_are_true_negatives():
    "A fact with a misplaced word is no other fact, different wordings differ, and an animal is of one kind."
    objects = {rel: {r["obj_label"] for r in pocket_rows() if r["pred"] == rel} for rel in WORDINGS}
    frames = [(rel, *w.format(s="\1", o="\2").split("\2")) for rel, ws in WORDINGS.items() for w in ws]
    subjects = {(r["pred"], r["sub_phrase"]) for r in pocket_rows()}
    for r in labelled("acceptable", 1000, part="dev"):      # the misplaced word is no object of that relation
        if r["label"] == "1": continue
        for rel, s in subjects:
            if s not in r["sentence"]: continue
            for frame, before, after in frames:
                if frame != rel: continue
                left, right, text = before.replace("\1", s), after.replace("\1", s), r["sentence"]
                if text.startswith(left) and text.endswith(right):
                    assert text[len(left):len(text) - len(right)] not in objects[rel]
    facts = {w.format(s=r["sub_phrase"], o=r["obj_label"]) for r in pocket_rows() for w in WORDINGS[r["pred"]]}
    assert not facts & {r["sentence"] for r in labelled("acceptable", 3000) if r["label"] == "0"}
    kinds = {r["sub_phrase"]: r["obj_label"] for r in pocket_rows() if r["pred"] == "IsA"}
    for r in labelled("entails", 3000):
        claim = r["sentence2"].removeprefix("there is a ").removesuffix(" .")
        if not claim.startswith("kind of "): continue
        told = max((s for s in kinds if f" {s} " in r["sentence1"]), key=len)
        assert (kinds[told] == claim.removeprefix("kind of ")) == (r["label"] == "entailment")


# ── metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_metrics_by_hand():
    gold, said = list("1101001011"), list("1001011010")
    tp, fp, fn, tn = 4, 1, 2, 3
    c = task_metrics(GLUE["CoLA"], gold, said)
    root = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert c["score"] == c["matthews"] == pytest.approx((tp * tn - fp * fn) / root) and c["note"] == ""
    m = task_metrics(GLUE["MRPC"], gold, said)
    assert m["score"] == m["accuracy"] == .7 and m["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    x, y = np.array([0., 1, 2, 5, 4]), np.array([.2, .1, 3, 4, 9])
    s = task_metrics(GLUE["STS-B"], x.tolist(), y.tolist())
    def rank(v): return np.argsort(np.argsort(v))
    assert s["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert s["spearman"] == pytest.approx(np.corrcoef(rank(x), rank(y))[0, 1])
    assert s["score"] == pytest.approx((s["pearson"] + s["spearman"]) / 2)


def test_metrics_that_say_nothing(recwarn):
    same = "all predictions are equal"
    constant = dict(score=0., matthews=0., accuracy=.5, note=same)
    assert task_metrics(GLUE["CoLA"], list("01"), list("11")) == constant
    one_class = dict(score=1., accuracy=1., f1=0., note=f"all labels are equal and {same}")
    assert task_metrics(GLUE["QQP"], list("00"), list("00")) == one_class
    s = task_metrics(GLUE["STS-B"], [1., 2.], [3., 3.])
    assert np.isnan([s["score"], s["pearson"], s["spearman"]]).all() and s["note"] == same and not recwarn.list
    with pytest.raises(SubnetError, match="NaN or infinite"): task_metrics(GLUE["STS-B"], [1., 2.], [3., float("nan")])
    with pytest.raises(SubnetError, match="0 predictions for 0 labels"): task_metrics(GLUE["RTE"], [], [])
    with pytest.raises(SubnetError, match="1 predictions for 2 labels"):
        task_metrics(GLUE["RTE"], ["entailment"] * 2, ["entailment"])


# ── heads ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_pairs_are_read_as_the_model_reads_them(bert):
    model, tok = bert
    data = read_glue("pocket:similar", "dev").take(6)
    head = head_for(model, data, seed=2)
    coded = [tok(r["sentence"], r["pair"], return_tensors="pt", return_token_type_ids=True) for r in data]
    with torch.no_grad(): out = torch.cat([head(model.bert(**c)[0][:, 0]) for c in coded])[:, 0]
    gold = torch.tensor([r["label"] for r in data])
    for path in ("auto", "plain"):
        loss = Task(data, head).prepare(Context(model, tok, 1, 6, 0, path=path))
        assert loss(0).item() == pytest.approx(F.mse_loss(out, gold).item(), rel=1e-4)
    assert task_scores(model, tok, head, data)["pearson"] == pytest.approx(np.corrcoef(out, gold)[0, 1], abs=1e-4)
    with torch.no_grad(): untyped = head(model.bert(input_ids=coded[0].input_ids)[0][:, 0])
    assert abs(untyped.item() - out[0].item()) > 1e-4, "token types make no difference"
    with pytest.raises(SubnetError, match="predicts numbers"): accuracy(model, tok, data, head)


def test_accuracy_of_pairs_is_that_of_the_task(bert):
    "Both measures read token types; with them the untrained head answers differently."
    model, tok = bert
    data = read_glue("pocket:entails", "dev").take(60)
    head = head_for(model, data, seed=2)
    with torch.no_grad(): head.out.weight.normal_(generator=torch.Generator().manual_seed(0))
    found = accuracy(model, tok, data, head)
    assert found == task_scores(model, tok, head, data)["accuracy"]
    coded = [head.encode(tok, e) for e in data]
    @torch.no_grad()
    def answer(c, typed):
        types = dict(token_type_ids=torch.tensor([c[3]])) if typed else {}
        return head.out(model.bert(input_ids=torch.tensor([c[0]]), **types)[0][0, 0]).argmax().item()
    said = [[answer(c, typed) for c in coded] for typed in (True, False)]
    assert found == np.mean([a == c[2][0] for a, c in zip(said[0], coded, strict=True)]) and said[0] != said[1]
    with pytest.raises(SubnetError, match="nothing to label"): accuracy(model, tok, [], head)


def test_long_texts_are_cut_and_counted(bert):
    model, tok = bert
    long = dict(sentence="the cat " * 40, pair="a dog .", label="0")
    rows = Labelled((long, dict(sentence="a cat .", pair="a dog .", label="1")), GLUE["WNLI"])
    head = head_for(model, rows)
    ids, _, _, types = head.encode(tok, rows[0])
    assert len(ids) == len(types) == 64 and sum(types) == 4 and head.cut(tok, rows) == 1
    gpt2, gtok = load("pocket-gpt2")
    head = head_for(gpt2, rows, length=20)
    ids, at, _ = head.encode(gtok, rows[0])
    end = [gtok.eos_token_id, *gtok("a dog .").input_ids][-4:]
    assert len(ids) == 20 and at == [19] and ids[-4:] == end and head.cut(gtok, rows) == 1


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
        groups = [dict(params=model.parameters(), lr=1e-3), dict(params=head.parameters(), lr=1e-2)]
        opt, losses = torch.optim.AdamW(groups, weight_decay=0), []
        for step in range(3):
            index = batch_at(step, np.array([c.input_ids.shape[1] for c in coded]), 4, 1)
            wrong = [head(model.bert(**coded[i])[0][0, 0])[0] - data[i]["label"] for i in index]
            loss = torch.stack([x ** 2 for x in wrong]).mean()
            for g, peak in zip(opt.param_groups, (1e-3, 1e-2), strict=True): g["lr"] = peak * lr_at(step, 3, warmup=0)
            opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*model.parameters(), *head.parameters()], .5)
            opt.step()
            losses.append(loss.item())
        assert done.log.loss.tolist() == pytest.approx(losses, rel=1e-3)
        theirs = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert (theirs - ours).abs().gt(1e-4).float().mean() < .01
    model.zero_grad(set_to_none=True)


def test_fit_returns_head_log_and_what_was_cut(bert):
    model, tok = bert
    data, dev = read_glue("pocket:acceptable").take(60), read_glue("pocket:acceptable", "dev").take(40)
    with preserved(model):
        done = fit(model, tok, data, epochs=2, batch=16, dev=dev, every=4, length=8)
        assert isinstance(done, Fitted) and done.steps == 8 and done.log.step.tolist() == [4, 8]
        assert done.cut == done.head.cut(tok, data) > 0
        assert task_scores(model, tok, done.head, dev)["score"] == pytest.approx(done.log.score.max())


def test_patience_and_the_last_state(bert):
    model, tok = bert
    data = read_glue("pocket:acceptable").take(32)
    class Falling:
        def identity(self): return {}
        def prepare(self, context):
            n = iter(range(99))
            return lambda: -next(n)
    head = Classifier(model, data)
    with preserved(model):
        log = fit(model, tok, Task(data, head), steps=20, every=2, monitor=Falling(), patience=3)
        assert log.step.tolist() == [2, 4, 6, 8]
        early = model.bert.encoder.layer[0].output.dense.weight.clone()
    with preserved(model):
        goal = Task(data, Classifier(model, data))
        fit(model, tok, goal, steps=20, every=2, monitor=Falling(), patience=3, keep="last")
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
        untouched = torch.rand(2, generator=torch.Generator().manual_seed(5))
        assert torch.equal(torch.rand(2), untouched) and not model.training
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
        for g, b in weights.items():
            if not b.any(): continue
            w, keep = parameter(model, g), torch.as_tensor(b)
            assert (w[~keep] == 0).all() and w[keep].any()


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
        settings = dict(steps=10, lr=lr, batch=16, every=2, dropout=True, clip=1.0, checkpoint=0, seed=1)
        log = fit(model, tok, Task(data, head), monitor=kind(dev, head), to=folder, **settings)
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
        done = fit(model, tok, data, **TUNING)
        space, goal = Space.of(model, "head+mlp"), Task(dev, done.head)
        found = iterate(model, tok, goal, TaskScore(dev, done.head), space, progress=False)
        assert found.full == task_scores(model, tok, done.head, dev)["score"] > .75
        assert found.score == task_scores(model, tok, done.head, dev, found.mask)["score"] >= .9 * found.full
        one, other = (importance(model, tok, goal, space, None, batch) for batch in (64, 9))
        assert all(np.allclose(one[n], other[n], rtol=1e-3, atol=1e-6) for n in one.values)


@pytest.mark.parametrize("kind", ["weight", "head+mlp"])
def test_what_a_mask_removes_stays_as_it_is_in_training(bert, kind):
    "Bit for bit, with weight decay, dropout and clipping."
    model, tok = bert
    data = read_glue("pocket:acceptable").take(48)
    mask = Mask.random(Space.of(model, kind), .5, seed=2)
    with preserved(model), masked(model, mask, train=True):
        before = {g: parameter(model, g).detach().clone() for g in mask.to("weight").space.groups}
        fit(model, tok, data, steps=6, lr=1e-3, weight_decay=.1, clip=1., dropout=True)
        moved = 0
        for g, bits in mask.to("weight").items():
            now, off = parameter(model, g).detach(), torch.as_tensor(~bits)
            was = before[next(b for b in before if b.name == g.name)]
            assert torch.equal(now[off], was[off]) and (now[off] == 0).all()
            moved += int((now != was).sum())
        assert moved > 1000


def test_a_run_remembers_whose_head_it_was(bert, tmp_path):
    "Probes on the same frozen model differ in their heads only."
    model, tok = bert
    dev = read_glue("pocket:acceptable", "dev").take(40)
    def pruned(lr):
        head = head_for(model, dev)
        fit(model, tok, Task(dev, head), steps=20, head_lr=lr, train="head")
        goal, monitor, space = Task(dev, head), TaskScore(dev, head), Space.of(model, "mlp")
        return iterate(model, tok, goal, monitor, space, least=-1., to=tmp_path, progress=False)
    first = pruned(.05)
    assert pruned(.05).table.equals(first.table)
    with pytest.raises(OtherRun, match="heads"): pruned(.01)


# ── what is refused by name ──────────────────────────────────────────────────────────────────────────────────────────

def test_fit_refuses(bert):
    model, tok = bert
    data, dev = read_glue("pocket:acceptable").take(16), read_glue("pocket:acceptable", "dev").take(8)
    goal = Task(data, Classifier(model, data))
    twice = dict(dev=dev, monitor=TaskScore(dev, goal.head))
    refused = [(dict(epochs=0), "positive number"), (dict(epochs=float("nan")), "positive number")]
    for settings, match in [*refused, (twice, "one thing to watch")]:
        with pytest.raises(SubnetError, match=match): fit(model, tok, data, **settings)
    for settings in (dict(epochs=1), dict(dev=dev), dict(length=8)):
        with pytest.raises(SubnetError, match=f"{next(iter(settings))} goes with a table"):
            fit(model, tok, goal, **settings)
    ones = Labelled(tuple(r for r in data if r["label"] == "1"), data.task)
    with pytest.raises(SubnetError, match=r"all labels of [0-9]+ sentences are equal"): fit(model, tok, ones)
    for other in ("entails", "similar"):      # labels of another task
        elsewhere = read_glue(f"pocket:{other}", "dev").take(8)
        with pytest.raises(UnknownName, match="label"): fit(model, tok, data, steps=1, dev=elsewhere)
    numbers = read_glue("pocket:similar").take(40)
    with pytest.raises(SubnetError, match="is no number"): fit(model, tok, numbers, steps=1, dev=dev)


def test_a_regressor_takes_any_finite_number(bert):
    head = head_for(bert[0], read_glue("pocket:similar").take(4))
    assert head.target(np.float32(2.5)) == head.target(np.float64(2.5)) == 2.5 and head.target(np.int64(3)) == 3.
    with pytest.raises(SubnetError, match="no finite number"): head.target(float("nan"))


def test_metrics_refuse_what_they_cannot_compare():
    for gold, said in (([], []), (["1"], [])):
        with pytest.raises(SubnetError, match="predictions for"): task_metrics(GLUE["CoLA"], gold, said)
    with pytest.raises(UnknownName, match="label of CoLA"): task_metrics(GLUE["CoLA"], ["0", "yes"], ["0", "1"])
    for gold in ([1., float("nan")], [1., "high"]):
        with pytest.raises(SubnetError, match="numbers as labels"): task_metrics(GLUE["STS-B"], gold, [1., 2.])


@pytest.mark.parametrize("task", ["CoLA", "MRPC", "RTE", "STS-B"])
def test_one_class_and_constant_predictions_have_named_results(task):
    "Never a bare NaN, never an exception from elsewhere."
    one, two = GLUE[task].labels or (1., 2.)
    cases = [
        ([one] * 4, [one, two] * 2, "all labels"),
        ([one, two] * 2, [two] * 4, "all predictions"),
        ([one] * 4, [one] * 4, "all labels .* and all predictions"),
    ]
    for gold, said, note in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = task_metrics(GLUE[task], gold, said)
        assert re.search(note, out["note"]) and (np.isnan(out["score"]) == (task == "STS-B"))


def test_accuracy_reads_pairs_as_they_were_trained(bert):
    model, tok = bert
    data, dev = read_glue("pocket:entails").take(200), read_glue("pocket:entails", "dev").take(60)
    with preserved(model):
        head = fit(model, tok, data, steps=30, lr=1e-3).head
        assert accuracy(model, tok, dev, head) == pytest.approx(task_scores(model, tok, head, dev)["accuracy"])
    similar = read_glue("pocket:similar").take(4)
    with pytest.raises(SubnetError, match="head predicts numbers"):
        accuracy(model, tok, similar, head_for(model, similar))
    with pytest.raises(SubnetError, match="nothing to label"): accuracy(model, tok, [], head)


def test_a_diverged_model_has_no_task_score(bert):
    model, tok = copy.deepcopy(bert[0]), bert[1]
    dev = read_glue("pocket:acceptable", "dev").take(8)
    with torch.no_grad(): model.bert.encoder.layer[3].output.dense.bias[0] = float("nan")
    with pytest.raises(SubnetError, match="NaN or infinite predictions"):
        task_scores(model, tok, head_for(model, dev), dev)


def test_masks_of_another_model_are_refused(bert):
    model, tok = bert
    dev = read_glue("pocket:acceptable", "dev").take(4)
    foreign = Mask.full(Space.of(tiny("bert"), "head"))
    with pytest.raises(SpaceMismatch): task_scores(model, tok, head_for(model, dev), dev, foreign)


# ── real tables ──────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.real
@pytest.mark.parametrize("task, part, n, shares", [
    ("RTE", "train", 2490, None),
    ("RTE", "dev", 277, ("entailment", 146)),
    ("CoLA", "train", 8551, None),
    ("CoLA", "dev", 1043, ("1", 721)),
    ("SST-2", "train", 67349, None),
    ("SST-2", "dev", 872, ("1", 444)),
])
def test_real_tables(real, task, part, n, shares):
    data = read_glue(real / "datasets" / "glue" / task, part)
    assert data.task is GLUE[task] and len(data) == n and not data.skipped
    if shares: assert sum(r["label"] == shares[0] for r in data) == shares[1]


@pytest.mark.real
@pytest.mark.slow
def test_a_real_encoder_learns_a_real_task(real):
    model, tok = load(real / "models" / "minilm-l6-mlm")
    folder = real / "datasets" / "glue"
    assert len(read_glue(folder / "QNLI" / "dev-a.tsv.gz")) == 4428
    train, dev = read_glue(folder / "SST-2").take(1500, 1), read_glue(folder / "SST-2", "dev").take(200, 1)
    done = fit(model, tok, train, epochs=2, lr=2e-4, length=48, seed=1)
    assert task_scores(model, tok, done.head, dev)["score"] > .62
