"Atlases: what is written is read again, lazily; nothing of the machine is told; hostile content is refused by name."
from __future__ import annotations

import io
import json
import platform
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from subnet_explorer import Mask, Masks, Space, compare, plots, read_atlas, save_atlas
from subnet_explorer.cli import main
from subnet_explorer.core import atlas as atlases
from subnet_explorer.core.atlas import BadAtlas, atlas_tables, bundled_atlas, verified
from subnet_explorer.core.errors import SubnetError
from subnet_explorer.core.escape import yaml_text
from subnet_explorer.core.space import unit_space

SPACE = unit_space(3, 4)


def some(labels: list[dict[str, Any]] | None = None, **meta: Any) -> Masks:
    labels = labels or [{"task": task, "seed": seed} for task in ("IsA", "PartOf") for seed in (0, 1)]
    return Masks([(row, Mask.random(SPACE, .5, seed=i, **meta)) for i, row in enumerate(labels)])


# ── what is written is read ──────────────────────────────────────────────────────────────────────────────────────────

VALUES = st.one_of(st.text(st.characters(codec="utf-8", exclude_characters="/\\~:%"), max_size=8), st.integers(-9, 9),
                   st.booleans(), st.floats(0, 1))


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.dictionaries(st.sampled_from(["task", "seed", "method", "density"]), VALUES, min_size=1),
                     min_size=1, max_size=5), zipped=st.booleans())
def test_labels_and_masks_come_back_as_they_were(rows, zipped, tmp_path_factory):
    place = tmp_path_factory.mktemp("atlas") / ("masks.zip" if zipped else "masks")
    masks = some(rows)
    found = read_atlas(save_atlas(masks, place))
    assert [m.id for _, m in found] == [m.id for _, m in masks] and verified(place) == []
    told = [json.loads(text) for text in pd.read_parquet(io.BytesIO(content(place, "index.parquet"))).mask_labels]
    assert told == [json.loads(json.dumps(atlases.without_traces(row))) for row in rows]


def content(place: Path, name: str) -> bytes:
    if place.suffix != ".zip": return (place / name).read_bytes()
    with zipfile.ZipFile(place) as opened: return opened.read(name)


def test_the_same_masks_make_the_same_file(tmp_path):
    first = save_atlas(some(), tmp_path / "a.zip").read_bytes()
    time.sleep(2.1)      # two seconds are what a zip file tells apart
    assert save_atlas(some(), tmp_path / "b.zip").read_bytes() == first


def test_equal_masks_are_stored_once(tmp_path):
    mask = Mask.random(SPACE, .5, seed=0)
    save_atlas(Masks([({"seed": i}, mask) for i in range(5)]), tmp_path / "atlas")
    assert len(list((tmp_path / "atlas" / "masks").iterdir())) == 1 and len(read_atlas(tmp_path / "atlas")) == 5


def test_pandas_and_datasets_read_the_index(tmp_path):
    save_atlas(some(), tmp_path / "atlas")
    table = pd.read_parquet(tmp_path / "atlas" / "index.parquet")
    assert table.task.tolist() == ["IsA", "IsA", "PartOf", "PartOf"] and table.seed.dtype.kind in "iI"
    import datasets
    found = datasets.Dataset.from_parquet(str(tmp_path / "atlas" / "index.parquet"), cache_dir=str(tmp_path / "c"))
    assert found.filter(lambda row: row["task"] == "IsA").num_rows == 2


def test_masks_are_read_when_they_are_used(tmp_path, monkeypatch):
    place, read = save_atlas(some(), tmp_path / "atlas"), list[str]()
    usual = atlases._Folder.read
    monkeypatch.setattr(atlases._Folder, "read", lambda self, name, most: read.append(name) or usual(self, name, most))
    found = read_atlas(place, task="IsA")
    assert read == ["index.parquet"] and len(found) == 2
    assert found[0] == found[0] and len(read) == 2


# ── the hub ──────────────────────────────────────────────────────────────────────────────────────────────────────────

class Hub:
    "A hub that is a folder, and counts."

    def __init__(self, place: Path) -> None:
        self.place, self.asked, self.tags = place, list[str](), list[str]()

    def create_repo(self, repo: str, private: bool, exist_ok: bool, repo_type: str) -> None: self.kind = repo_type
    def create_tag(self, repo: str, tag: str, repo_type: str) -> None: self.tags.append(tag)

    def upload_folder(self, repo_id: str, folder_path: str, repo_type: str, delete_patterns: list[str]) -> str:
        shutil.copytree(folder_path, self.place / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}"

    def get(self, repo: str, name: str, revision: str | None = None, repo_type: str = "model") -> str:
        self.asked.append(name)
        if not (self.place / repo / name).exists(): raise FileNotFoundError(name)
        return str(self.place / repo / name)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: made)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", made.get)
    return made


def test_only_what_is_asked_for_is_downloaded(hub):
    masks = some()
    assert masks.push_to_hub("anna/heads", version="v1", title="Heads").endswith("anna/heads")
    found = Masks.from_hub("anna/heads", task="PartOf")
    assert hub.asked == ["index.parquet"] and hub.kind == "dataset" and hub.tags == ["v1"]
    assert [m.id for _, m in found] == [m.id for _, m in masks.sel(task="PartOf")]
    assert len(hub.asked) == 3 and read_atlas("anna/heads")[0].id == masks[0].id


def test_a_repository_that_is_not_there_is_named(hub):
    named = pytest.raises(BadAtlas, match=r"cannot get index.parquet of anna/none .* Mask.from_hub")
    with named: Masks.from_hub("anna/none")


# ── nothing of the machine ───────────────────────────────────────────────────────────────────────────────────────────

TELLING = ["/home/anna/runs/IsA", r"C:\Users\Anna B\IsA", "~/IsA", "file:///srv/anna/IsA", r"\\server\anna\IsA",
           "%2Fhome%2Fanna%2FIsA"]


@pytest.mark.parametrize("text", TELLING)
def test_paths_stay_at_home(text, tmp_path):
    masks = some([{"task": text, "seed": 0}], facts=text, nested={"to": [text]})
    place = save_atlas(masks, tmp_path / "atlas")
    every = b"".join(file.read_bytes() for file in place.rglob("*") if file.is_file())
    assert b"anna" not in every.lower() and verified(place) == []
    assert read_atlas(place).index.task[0] == "IsA"


def test_names_of_this_machine_stay_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("USER", "annabelle")
    monkeypatch.setattr(platform, "node", lambda: "annas-laptop")
    masks = some([{"task": "by annabelle on annas-laptop", "seed": 0}], note="annas-laptop", host="x")
    place = save_atlas(masks, tmp_path / "atlas", title="Masks of annabelle")
    every = b"".join(file.read_bytes() for file in place.rglob("*") if file.is_file())
    assert b"annabelle" not in every and b"annas-laptop" not in every
    with pytest.raises(BadAtlas, match="would tell of this machine"):
        save_atlas(some(), tmp_path / "b", tables={"t": pd.DataFrame({"file": ["/home/annabelle/x/y"]})})


def test_the_bundled_atlas_tells_nothing():
    assert verified("pocket") == []
    for file in [*bundled_atlas().glob("*.md"), *bundled_atlas().glob("tables/*.csv")]:
        assert atlases.traces(file.read_text(encoding="utf-8")) == []


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def place(tmp_path) -> Path: return save_atlas(some(), tmp_path / "atlas")


def rewrite(place: Path, **columns: Any) -> None:
    table = pd.read_parquet(place / "index.parquet")
    table.assign(**columns).to_parquet(place / "index.parquet", index=False)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "masks/../../x.mask.safetensors", "masks/a", ""])
def test_an_index_that_leads_elsewhere(place, name):
    rewrite(place, mask_file=name)
    with pytest.raises(BadAtlas, match="it is no mask"): read_atlas(place)[0]


def test_a_link_is_not_followed(place, tmp_path):
    entry: Any = read_atlas(place).entries[0]
    file = place / entry.file
    secret = tmp_path / "secret"
    file.rename(secret)
    file.symlink_to(secret)
    with pytest.raises(BadAtlas, match="is a link"): read_atlas(place)[0]


def test_damaged_masks_are_named(place):
    files = sorted((place / "masks").iterdir())
    files[0].write_bytes(files[0].read_bytes()[:-2])
    files[1].write_bytes(files[1].read_bytes() + b"more")
    files[2].unlink()
    wrong = verified(place)
    assert len(wrong) == 3
    assert sum("longer than" in w for w in wrong) == 1 and sum("there is no" in w for w in wrong) == 1


def test_masks_that_were_exchanged_are_named(place):
    table = pd.read_parquet(place / "index.parquet")
    rewrite(place, **{c: table[c].tolist()[::-1] for c in ("mask_file", "mask_bytes", "mask_sha256")})
    assert any("another mask than its row says" in w for w in verified(place))


@pytest.mark.parametrize("make", ["missing", "text", "other"])
def test_what_is_no_index(place, make):
    if make == "missing": (place / "index.parquet").unlink()
    if make == "text": (place / "index.parquet").write_text("hello")
    if make == "other": pd.DataFrame({"a": [1]}).to_parquet(place / "index.parquet")
    with pytest.raises(BadAtlas): read_atlas(place)
    assert len(verified(place)) == 1


def test_a_zip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(atlases, "_LARGEST", 1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("index.parquet", b"\0" * 10_000_000)
    with pytest.raises(BadAtlas, match="longer than the 1,000 bytes"): read_atlas(tmp_path / "a.zip")


def test_what_is_nothing(tmp_path):
    (tmp_path / "text.zip").write_text("no zip")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()
    for source in (tmp_path / "text.zip", tmp_path / "nowhere", tmp_path / "thesis"):
        with pytest.raises(BadAtlas): read_atlas(source)
    with pytest.raises(SubnetError, match="holds no atlas"): save_atlas(some(), tmp_path / "thesis")
    with pytest.raises(SubnetError, match="would hide"): save_atlas(some([{"mask_id": 1}]), tmp_path / "x")
    place = save_atlas(some(), tmp_path / "m")
    with pytest.raises(SubnetError, match="did you mean IsA"): read_atlas(place, task="Isa")


def test_text_of_data_is_text_in_the_card(tmp_path):
    masks = some([{"task": "<script>alert(1)</script>", "seed": 0}])
    card = (save_atlas(masks, tmp_path / "a", title="# [x](javascript:y)\n---") / "README.md").read_text()
    assert "<script>" not in card.split("---", 2)[2].split("```")[0] and "[x](" not in card
    assert yaml_text({"license": "unknown"}) in card


# ── the shell, and what is bundled ───────────────────────────────────────────────────────────────────────────────────

def test_shell(tmp_path, capsys):
    assert main(["atlas", "show", "pocket", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["masks"]
    assert {row["recipe"] for row in shown} == {"lamp", "tickets", "critical", "probe", "tamt"}
    assert main(["atlas", "verify", "pocket"]) == 0 and "nothing is wrong" in capsys.readouterr().out
    assert main(["atlas", "build", str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == 2
    assert main(["atlas", "bild", "x"]) == 2 and "did you mean build" in capsys.readouterr().err


def test_a_study_becomes_an_atlas(tmp_path, capsys):
    words = ["lamp", "--model", "pocket-bert", "--facts", "pocket", "--relations", "MadeOf,Desires", "--layers", "4",
             "--steps", "4", "--batch", "4", "--random", "1", "--no-report", "--quiet"]
    assert main([*words, "--out", str(tmp_path / "runs" / "lamp")]) == 0
    assert main(["atlas", "build", str(tmp_path / "runs"), "--out", str(tmp_path / "a.zip")]) == 0
    found = read_atlas(tmp_path / "a.zip")
    assert found.index.recipe.unique().tolist() == ["lamp"] and set(found.index.task) == {"MadeOf", "Desires"}
    assert verified(tmp_path / "a.zip") == [] and "masks and" in capsys.readouterr().out


def test_every_analysis_has_something_to_look_at():
    began = time.monotonic()
    masks = read_atlas("pocket")
    assert time.monotonic() - began < 5 and sum(f.stat().st_size for f in bundled_atlas().rglob("*")) < 2 << 20
    lamp, tickets = masks.sel(recipe="lamp"), masks.sel(recipe="tickets")
    distances = compare.jaccard(lamp.sel(seed=0), by="task")
    assert len(distances) and 0 < compare.jaccard_distance(lamp[0], lamp[1]) < 1
    assert compare.overlap(lamp, "task") is not None and plots.density(lamp[0]) is not None
    assert tickets.survival() is not None
    assert {"probe-scores", "tamt-scores", "critical-curves"} <= set(atlas_tables("pocket"))


def test_the_explorer_opens_it():
    from subnet_explorer.look.state import Selection
    assert len(Selection(read_atlas("pocket", recipe="lamp")).masks) == len(read_atlas("pocket", recipe="lamp"))


def test_masks_know_their_space():
    from subnet_explorer import load
    model, _ = load("pocket-bert")
    first = read_atlas("pocket", recipe="lamp")[0]
    assert first.space.model == Space.of(model, "weight").model
