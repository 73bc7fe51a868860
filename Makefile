# Everything from nothing: each target makes the environment that it needs. What is installed is
# locked, transitive packages included: requirements/lock.txt, written by `make lock`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Two workers with one torch thread each (tests/conftest.py).
WORKERS ?= 2
LOCK   := requirements/lock.txt
UV     := uv==0.13.9
COMPILE = .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.10 --extra dev \
	--no-header --no-annotate -c requirements/constraints.txt pyproject.toml requirements/build.in
# What is tried on the oldest and the newest release: assumptions, laws on six kinds of host, the
# family, the golden checks and one training test.
GROUND = tests/host tests/family tests/golden tests/hosts tests/training/test_recipes_hosts.py
KINDS  := llama or gemma3 or gpt2 or qwen3_next or mixtral or qwen3_vl

.PHONY: help demo test lint laws check lock test-oldest test-newest bench-check clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.ready ## train trol-tiny, show what traversal did to it: runs/demo/report.html
	$(BIN)/trol demo

test: lint ## lint, types, import contract, then every test, on the locked packages
	$(BIN)/python -m pytest -n $(WORKERS) tests/host
	$(BIN)/python -m pytest -n $(WORKERS) --ignore=tests/host

lint: $(VENV)/.ready-dev ## style, types and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

laws: $(VENV)/.ready-dev ## only the laws of the depth core
	$(BIN)/python -m pytest -n $(WORKERS) tests/laws

check: test ## the same as test

test-oldest: .venv-oldest/.ready-dev ## the core of the tests on the oldest releases that are allowed
	$(call on_ground,.venv-oldest,oldest)

test-newest: .venv-newest/.ready-dev ## ... on the newest that pip finds today
	$(call on_ground,.venv-newest,newest)

lock: .venv-lock/.ready ## write requirements/lock.txt and oldest.txt anew, from pyproject.toml
	$(COMPILE) --upgrade -o $(LOCK)
	$(COMPILE) --upgrade --resolution lowest-direct -o requirements/oldest.txt

bench-check: $(VENV)/.ready ## every benchmark suite, against the stored results (25 minutes)
	$(BIN)/trol bench all --against benchmarks/results

clean: ## forget the environments and the caches; runs/ stays
	rm -rf $(VENV) .venv-* .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# $(1): the environment, $(2): what tests/host/test_lock.py holds it to.
define on_ground
	TROL_GROUND=$(2) $(1)/bin/python -m pytest -n $(WORKERS) tests/host
	TROL_GROUND=$(2) $(1)/bin/python -m pytest -n $(WORKERS) $(GROUND) --ignore=tests/host
	TROL_GROUND=$(2) $(1)/bin/python -m pytest -n $(WORKERS) tests/laws -k "$(KINDS)"
endef

# torch first and alone: pip then takes the file that its own configuration points at (a CPU build,
# say) instead of whichever newer one another package would accept.
%/.torch: requirements/constraints.txt
	@echo "== new environment in $*: torch first (the largest part), then the rest"
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "trol needs Python 3.10 or newer"'
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --progress-bar on $$(grep '^torch==' requirements/constraints.txt)
	@touch $@

# $(1): the environment, $(2): the files that pip must keep to, $(3): extras.
define install
	$(1)/bin/python -m pip install --progress-bar on $(foreach file,$(2),-c $(file)) -r requirements/build.in
	$(1)/bin/python -m pip install --progress-bar on $(foreach file,$(2),-c $(file)) --no-build-isolation -e '.$(3)'
	@touch $@
endef

$(VENV)/.ready: $(VENV)/.torch pyproject.toml $(LOCK)
	$(call install,$(VENV),requirements/constraints.txt $(LOCK),)

# Not locked: builds of torch for CUDA bring the Triton that they need; its interpreter runs the
# kernel's law on a CPU. Where there is no Triton for a platform, that law is skipped.
$(VENV)/.ready-dev: $(VENV)/.ready
	$(call install,$(VENV),requirements/constraints.txt $(LOCK),[dev])
	$(BIN)/python -m pip install --progress-bar off 'triton>=3.6' || true

.venv-oldest/.ready-dev: .venv-oldest/.torch pyproject.toml requirements/oldest.txt
	$(call install,.venv-oldest,requirements/constraints.txt requirements/oldest.txt,[dev])

.venv-newest/.ready-dev: .venv-newest/.torch pyproject.toml
	$(call install,.venv-newest,requirements/constraints.txt,[dev])

.venv-lock/.ready:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install $(UV)
	@touch $@

.PRECIOUS: %/.torch
