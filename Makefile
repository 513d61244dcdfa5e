# `make demo` and `make test` each work as the first command in a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test slow lint types docs notebooks bench zoo hostile surface clean

help:  ## Show what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */\1\t/' | expand -t 10

demo: $(VENV)/run-time  ## Train a small network on digits and explain one
	$(BIN)/diffsal demo

test: lint types  ## ruff, mypy, pytest (docstrings' examples included)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

slow: $(VENV)/installed  ## What the tests leave out because it takes minutes: further seeds and models
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --slow -m slow -n auto --dist worksteal

lint: $(VENV)/installed  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed  ## mypy, strict
	$(BIN)/mypy

docs: $(VENV)/documents  ## The pages, build/docs/index.html; warnings are errors
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -W --keep-going docs build/docs

notebooks: $(VENV)/documents  ## Run examples/notebooks
	OMP_NUM_THREADS=1 $(BIN)/python examples/notebooks/run.py

bench: $(VENV)/installed  ## Ratios measured side by side; rewrites docs/benchmarks.md
	$(BIN)/python -m pip install --quiet --editable '.[zoo]'
	$(BIN)/python benchmarks/all.py

zoo: $(VENV)/installed  ## Other libraries' models, one of each family; rewrites docs/models.md
	$(BIN)/python -m pip install --quiet --editable '.[zoo]'
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python -m models.zoo.report

hostile: $(VENV)/installed  ## Files made to do harm, all of them; rewrites docs/reliability.md's table
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python -m hostile.report

surface: $(VENV)/installed  ## Rewrite tests/api_surface.json after a change that is meant
	$(BIN)/python tests/surface.py

clean:  ## Remove what was made
	rm -rf $(VENV) demo dist build .mypy_cache .pytest_cache .ruff_cache

$(VENV)/run-time: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/documents: $(VENV)/run-time
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

$(VENV)/installed: $(VENV)/run-time
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
