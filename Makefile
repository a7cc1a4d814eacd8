# make demo   set up .venv and run the main job: sixteen relation-specific subnetworks of the pocket model
# make test   set up .venv and run every test: notebooks (nbdev_test) and tests/ (pytest)
# make lint   ruff and mypy over library, tests and benchmarks
# make test-slow   what takes minutes and is left out of make test
# make test-real-size   models as large as BERT-base on both sides of every rule about size, with all layers (make test: two recipes with all, rules with two)
# make test-browser   only what needs Chromium: reports, sites, figures, JupyterLab (part of make test, where there is a Chromium)
# make gpu    what only a GPU can show, into benchmarks/GPU.md: on a machine with CUDA, by $(PYTHON); it needs no network
# make gpu-wheels   collect, where there is a network, what make gpu needs besides PyTorch, transformers, pytest, hypothesis
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint test-slow test-real-size test-browser docs pages readme clean export python bench bench-quick gpu gpu-wheels
demo: $(STAMP)
	$(BIN)/subnet-explorer demo

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/mypy

# lint, then notebooks, then pytest: one thread each, two files at a time, so that what a file needs is made once
test: lint
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --slow -m slow

test-real-size: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --slow -m real_size --durations=10

# screenshots are kept in build/screenshots
test-browser: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs tests/look/test_browser.py

# measure against plain fine-tuning, parametrize and the limits of the machine; bench-quick: a small model, under three minutes
bench: $(STAMP)
	$(BIN)/python benchmarks/run.py --wait 60 --json benchmarks/results.json --figure benchmarks/growth.svg

bench-quick: $(STAMP)
	$(BIN)/python benchmarks/run.py --quick

# no .venv is made: the machine's own PyTorch is the one that knows its card
gpu:
	$(PYTHON) benchmarks/gpu.py

GPU_PYTHON ?= 3.12
gpu-wheels:
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: -c constraints.txt -d .wheels \
		--python-version $(GPU_PYTHON) --implementation cp --platform manylinux_2_28_x86_64 \
		--platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 zstandard conllu plotly

# notebooks -> library
export: $(STAMP)
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean

docs: $(STAMP) pages
	@command -v quarto >/dev/null || { echo "make docs needs Quarto: pip install quarto-cli"; exit 1; }
	cp $$($(BIN)/python -c "import plotly; print(plotly.__path__[0])")/package_data/plotly.min.js nbs/
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_docs --n_workers 2

$(STAMP): settings.ini setup.py constraints.txt | python
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "subnet_explorer needs Python 3.11 or newer: install it, or say which with make PYTHON=python3.12 (here: $$($(PYTHON) --version 2>&1 | tail -1))"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "the venv module of $(PYTHON) is missing: on Debian, apt install python3-venv"; exit 1; }

clean:
	rm -rf $(VENV) build dist *.egg-info _proc _docs _site

# nbs/index.ipynb -> README.md, without Quarto
readme: $(STAMP)
	$(BIN)/python nbs/readme.py

# the pages about errors, from docstrings, and the tables of the method cards, from clauses
pages: $(STAMP)
	$(BIN)/python nbs/errors.py
	$(BIN)/python nbs/cards.py
