# make demo   sets up .venv, optimizes the embedded model, leaves an artifact, a report and videos
# make test   sets up .venv, runs lint, types and the whole suite

PYTHON ?= python3
VENV   ?= .venv
# Installed before everything else, so that no other package chooses a build of torch.
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
WORKERS ?= 2

.PHONY: demo test lint types unit install clean

install: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet --no-compile "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[dev]"
	touch $(STAMP)

demo: install
	$(BIN)/turbo-opt demo --out demo-output

# Types are checked while the first tests run: that takes one core for a minute.
test: lint
	$(MAKE) --no-print-directory -j2 types unit

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

unit: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope

clean:
	rm -rf demo-output build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
