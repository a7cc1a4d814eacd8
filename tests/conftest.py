"Markers, tiers and shared helpers of the suite."
from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
BROWSER = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=40, print_blob=False)
settings.load_profile("suite")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs CUDA")
    real = "real: needs the folder named by SUBNET_EXPLORER_DATA, with datasets/ and models/"
    config.addinivalue_line("markers", real)
    config.addinivalue_line("markers", "browser: needs chromium")
    size = "real_size: a model as large as BERT-base; recipes with twelve layers, the rest with two (--slow: twelve)"
    config.addinivalue_line("markers", size)
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow")


def _why_not(marker: str, config: pytest.Config) -> str | None:
    "The reason to skip a tier, or None where it can run."
    if marker == "slow": return None if config.getoption("--slow") else "takes minutes: give --slow"
    if marker == "gpu":
        import torch
        return None if torch.cuda.is_available() else "no CUDA device"
    if marker == "browser": return None if BROWSER else "no chromium"
    data = os.environ.get("SUBNET_EXPLORER_DATA")
    if data and all((Path(data) / folder).is_dir() for folder in ("datasets", "models")): return None
    return "SUBNET_EXPLORER_DATA names no folder with datasets/ and models/"


def pytest_collection_modifyitems(config, items):
    for name in ("gpu", "real", "browser", "slow"):
        marked = [item for item in items if item.get_closest_marker(name)]
        why = _why_not(name, config) if marked else None
        if why is None: continue
        for item in marked: item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def real() -> Path:
    "Folder of real data sets and models (tests that use it are marked `real`)."
    return Path(os.environ["SUBNET_EXPLORER_DATA"])


@pytest.fixture(scope="session")
def pocket_bert():
    "The masked pocket model and its tokenizer; tests leave it as it is."
    from subnet_explorer.model.load import load
    return load("pocket-bert")


@pytest.fixture(scope="session")
def chromium() -> str | None:
    "Path of the browser (tests that use it are marked `browser`)."
    return BROWSER
