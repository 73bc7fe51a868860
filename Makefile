# Everything from nothing: each target makes the environment that it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# Two workers with one torch thread each (tests/conftest.py).
WORKERS ?= 2

.PHONY: help demo test lint laws check bench-check clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.ready ## train trol-tiny, show what traversal did to it: runs/demo/report.html
	$(BIN)/trol demo

test: lint ## lint, types, import contract, then every test
	$(BIN)/python -m pytest -n $(WORKERS)

lint: $(VENV)/.ready-dev ## style, types and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

laws: $(VENV)/.ready-dev ## only the laws of the depth core
	$(BIN)/python -m pytest -n $(WORKERS) tests/laws

check: test ## the same as test

bench-check: $(VENV)/.ready ## every benchmark suite, against the stored results (25 minutes)
	$(BIN)/trol bench all --against benchmarks/results

clean: ## forget the environment and the caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# torch first and alone: pip then takes the file that its own configuration points at (a CPU build,
# say) instead of whichever newer one another package would accept.
$(VENV)/.torch: constraints.txt
	@echo "== new environment in $(VENV): torch first (the largest part), then the rest"
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "trol needs Python 3.10 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --progress-bar on $$(grep '^torch==' constraints.txt)
	@touch $@

$(VENV)/.ready: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) install --progress-bar on -c constraints.txt -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) install --progress-bar on -c constraints.txt -e '.[dev]'
	@touch $@
