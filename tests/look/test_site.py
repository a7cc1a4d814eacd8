"Sites about folders of runs: nothing from the data becomes markup, nothing is loaded, nothing is written twice."
from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from subnet_explorer import Mask, Run, Space, Store, SubnetError
from subnet_explorer.cli import main
from subnet_explorer.core.compare import jaccard
from subnet_explorer.core.folders import open_study
from subnet_explorer.look import site as site_module
from subnet_explorer.look.runs import MANIFEST, discover
from subnet_explorer.look.site import publish

EVIL = "</script><script>alert('x')</script>\"'><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    "Tags, addresses and texts of a page."

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.links: list[str] = []
        self.inline: list[tuple[str, str]] = []      # type and text of scripts
        self.open: str | None = None                 # type of the script that is read
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.links += [attrs[k] for k in ("href", "src") if k in attrs]
        self.open = attrs.get("type", "") if tag == "script" and "src" not in attrs else None

    def handle_data(self, data):
        if self.open is not None and data.strip(): self.inline.append((self.open, data))


def pages(site) -> dict[str, str]:
    "The text of every page, by its address."
    place = site.index.parent
    return {p.relative_to(place).as_posix(): p.read_text(encoding="utf-8") for p in place.rglob("*.html")}


@pytest.fixture
def space(pocket_bert): return Space.of(pocket_bert[0], "head")


def by_task_and_seed(i: int) -> dict: return {"task": f"t{i % 3}", "seed": i // 3}


def make(folder: Path, space: Space | None, n: int, labels=by_task_and_seed, **config) -> Store:
    "A store of runs; without a space they are not finished."
    store = Store(folder)
    for i in range(n):
        run = Run(store.folder / f"{i:03}", {"method": "example", "n": i, **config}, labels(i))
        for step in (1, 2): run.log(step=step, loss=1 / (step + i))
        if space is not None: run.finish(Mask.random(space, .5, seed=i))
    return store


def test_everything_is_a_file_of_the_site(tmp_path, space):
    make(tmp_path / "a", space, 6)
    site = publish(tmp_path)
    for name, text in pages(site).items():
        page = Page(text)
        place = (site.index.parent / name).parent
        for link in page.links:
            if link.startswith("#"): continue
            assert not re.match(r"(?i)[a-z]+:|//", link), f"{name} loads {link}"
            assert place.joinpath(link).resolve().is_file(), f"{name} links to {link}"
        assert all(kind == "application/json" for kind, _ in page.inline), f"{name} has a script of its own"
        assert text.startswith("<!doctype html>") and '<html lang="en">' in text
        assert text.count("<h1>") == 1 and '<main id="content">' in text
        assert not re.search(r"\son[a-z]+\s*=", re.sub(r"<script.*?</script>", "", text, flags=re.S))
    assert len(list(site.index.parent.rglob("plotly*.js"))) == 1
    assert max(map(len, pages(site).values())) < 500_000


def test_text_stays_text(tmp_path, space):
    store = make(tmp_path / "a", space, 2, labels=lambda i: {"task": EVIL, "seed": i, EVIL: "x"}, note=EVIL)
    for run in store: run.log(step=3, loss=.1, why=EVIL)
    for name, text in pages(publish(tmp_path)).items():
        page = Page(text)
        assert not [t for t, a in page.tags if t == "img" or "onerror" in a], name
        assert not [d for _, d in page.inline if "alert('x')" in d and "<" in d], name
        scripts = [a for t, a in page.tags if t == "script"]
        assert all(a.get("type") == "application/json" or "src" in a for a in scripts), name


def test_numbers_are_those_of_compare(tmp_path, space):
    "The overlap on the page is `compare.jaccard`, with its chance."
    store = make(tmp_path / "a", space, 3, labels=lambda i: {"task": f"t{i}"})
    text = next(t for n, t in pages(publish(tmp_path)).items() if n.startswith("compare/"))
    table = jaccard(store.masks(), by="task").query("a != b")
    number = r'<td class=n data-v="([\d.e-]+)">'
    shown = re.findall(rf"<td>task=(t\d)</td><td>task=(t\d)</td>{number}[^<]*</td>{number}", text)
    got = {(a, b): (float(distance), float(chance)) for a, b, distance, chance in shown}
    want = {(r.a, r.b): (r.distance, r.chance) for r in table.itertuples()}
    assert len(want) == 6 and set(got) == set(want)
    for pair, numbers in want.items(): assert got[pair] == pytest.approx(numbers)


def test_only_what_changed_is_written(tmp_path, space):
    store = make(tmp_path / "a", space, 4)
    first = publish(tmp_path)
    def times() -> dict[Path, int]:
        found = [p for p in first.index.parent.rglob("*") if p.name != MANIFEST and p.is_file()]
        return {p: p.stat().st_mtime_ns for p in found}
    before, second = times(), publish(tmp_path)
    assert (second.written, second.kept) == (0, first.written) and times() == before
    next(iter(store)).log(step=9, loss=.5)
    changed = publish(tmp_path)
    assert {p.name for p, t in times().items() if before[p] != t} >= {"index.html"}
    assert changed.written == 3                          # the run, its comparison, the index
    assert publish(tmp_path, fresh=True).written == first.written


def test_an_interrupted_site_goes_on(tmp_path, space, monkeypatch):
    make(tmp_path / "a", space, 5)
    write, count = site_module.atomic_write, iter(range(100))
    def stopped(path, data):
        if str(path).endswith(".html") and next(count) == 3: raise KeyboardInterrupt
        return write(path, data)
    monkeypatch.setattr(site_module, "atomic_write", stopped)
    with pytest.raises(KeyboardInterrupt): publish(tmp_path)
    monkeypatch.undo()
    rest = publish(tmp_path)
    assert rest.kept == 3 and rest.written == 7 - 3 and rest.index.exists()


@pytest.mark.parametrize("damage", ["config", "labels", "metrics", "mask", "space"])
def test_a_broken_run_is_listed_and_harms_nobody(tmp_path, space, damage):
    folder = make(tmp_path / "a", space, 2).folder / "000"
    name, content = {
        "config": ("config.json", b"{"),
        "labels": ("config.json", json.dumps({"id": "x", "config": {}}).encode()),
        "metrics": ("metrics.jsonl", b"\xff\xfe\n"),
        "mask": ("mask.safetensors", b""),
        "space": ("mask.safetensors", (folder / "mask.safetensors").read_bytes()[:-3]),
    }[damage]
    (folder / name).write_bytes(content)
    site = publish(tmp_path)
    assert list(site.broken) == ["a/000"] and site.broken["a/000"]
    assert "What cannot be read" in site.index.read_text()
    text = next(t for n, t in pages(site).items() if "000" in n)
    assert "cannot be read completely" in text and str(tmp_path) not in text


def test_unfinished_runs_and_odd_logs(tmp_path, space):
    store = make(tmp_path / "a", None, 3)
    run = Run(store.folder / "odd", {"n": 9}, {"task": "odd"})
    run.log(stage="one", score=float("nan"))
    run.log(stage="two", score=1, more=[1, 2], none=None, flag=True)
    Run(store.folder / "silent", {"n": 10}, {})
    site = publish(tmp_path)
    assert site.broken == {} and site.runs == 5 and site.index.read_text().count(">unfinished<") >= 5
    assert not [n for n in pages(site) if n.startswith("compare/")]


def test_studies_with_cells_and_foreign_folders(tmp_path, space):
    study = tmp_path / "probe"
    make(open_study(study, {"recipe": "probe", "model": "m"}).folder, space, 2)
    open_study(tmp_path / "transfer", {"recipe": "transfer"})
    files = {
        study / "cells" / "mlp-0.json": json.dumps({"score": .75, "mask": str(tmp_path)}),
        study / "cells" / "torn.json": "{",
        study / "tables" / "t.json": json.dumps([{"relation": "IsA", "hits": [1, 2]}]),
        tmp_path / "bert" / "config.json": '{"model_type": "bert"}',
    }
    for file, text in files.items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    site = publish(tmp_path)
    made = pages(site)
    probe = next(t for n, t in made.items() if n.startswith("study/probe"))
    assert site.runs == 2 and sum(n.startswith("study/") for n in made) == 2
    for word in ("0.75", "torn", "IsA"): assert word in probe
    assert str(tmp_path) not in probe


def test_two_hundred_runs_are_one_index(tmp_path, space, monkeypatch):
    "All are listed; what a page depends on is its own run, so that one more run means one more page."
    make(tmp_path / "a", space, 200, labels=lambda i: {"task": f"t{i % 4}", "seed": i // 4})
    def no_figures(entry, *rest) -> str: return f"<!doctype html><title>{entry.path}</title>"      # tested elsewhere
    monkeypatch.setattr(site_module, "run_page", no_figures)
    site = publish(tmp_path)
    text = site.index.read_text()
    assert site.written == 202 and text.count('href="run/') == 200 and len(text) < 300_000
    make(tmp_path / "b", space, 1)
    assert publish(tmp_path).written == 3              # its page, the comparison, the index
    assert len(discover(tmp_path).runs) == 201


def test_what_is_refused(tmp_path, space, capsys):
    with pytest.raises(SubnetError, match="there is no run"): publish(tmp_path)
    with pytest.raises(SubnetError, match="there is no folder"): publish(tmp_path / "x")
    make(tmp_path / "a", space, 1)
    mine = tmp_path / "mine" / "index.html"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(SubnetError, match="holds no site"): publish(tmp_path, mine.parent)
    assert mine.read_text() == "mine"
    assert main(["report", str(tmp_path / "x")]) == 2 and "there is no folder" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out"), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["runs"] == 1 and Path(out["index"]).is_file() and out["broken"] == {}
