# Everything runs in .venv, made from requirements.lock. `make` alone says what there is.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# JupyterLab's defaults in .venv: it would ask, over the first notebook, whether to fetch news.
LAB_SETTINGS := .venv/share/jupyter/lab/settings
LAB_ARGS ?=
ARGS ?=

# The kit needs nothing from the network once it is installed, and sends nothing.
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
# Two threads that wait for each other are slower than one when anything else runs; the demo alone may use every core.
ONE_THREAD := OMP_NUM_THREADS=1

# A file's tests stay together, since what they share is made once in a process. In the order of names, long files begin early.
TWO_AT_ONCE := --numprocesses 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast browser lab notebooks check format lock peer clean

help: ## what there is
	@echo "usage: make TARGET"
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 14

setup: $(INSTALLED) ## make .venv and install requirements.lock (PYTHON=python3.12 picks another Python)
	@echo "setup: .venv holds requirements.lock and rlhf-kit ($$($(BIN)/python --version))"

$(INSTALLED): requirements.lock pyproject.toml | $(BIN)/pip
	@echo "setup: installing requirements.lock ($$(grep -c '==' requirements.lock) packages) into .venv; this takes minutes the first time"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@echo "setup: installing rlhf-kit itself, as an editable package"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@mkdir -p $(LAB_SETTINGS) && echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}' \
		> $(LAB_SETTINGS)/overrides.json
	@touch $@

# pip is the last thing that venv puts there, so an interrupted .venv is made again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
		echo "setup: rlhf-kit needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is: $$($(PYTHON) --version 2>&1)"; \
		echo "setup: name one that you have, for example: make setup PYTHON=python3.12"; exit 1; }
	@echo "setup: making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear .venv

demo: $(INSTALLED) ## run the whole pipeline at pocket size, offline, on the CPU (ARGS="--fresh" and the like)
	@$(OFFLINE) $(BIN)/rlhf-kit demo $(ARGS)

test: $(INSTALLED) check ## check, then every test, the notebooks and the browser too
	@$(OFFLINE) $(ONE_THREAD) $(BIN)/python -m pytest $(TWO_AT_ONCE) $(ARGS)

test-fast: $(INSTALLED) ## the tests that run while one types
	@$(OFFLINE) $(ONE_THREAD) $(BIN)/python -m pytest $(TWO_AT_ONCE) -m "not slow and not browser" $(ARGS)

browser: $(INSTALLED) ## the tests in a real browser: the tour, and the rating page in JupyterLab and served
	@$(OFFLINE) $(ONE_THREAD) $(BIN)/python -m pytest -m browser $(ARGS)

check: $(INSTALLED) ## lint, format, types, and which room imports which
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo --no-cache

format: $(INSTALLED) ## put the code into the format that check asks for
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

lab: $(INSTALLED) ## JupyterLab on this machine only, opened on the tour (LAB_ARGS="--no-browser" and the like)
	@HF_HUB_DISABLE_TELEMETRY=1 $(BIN)/jupyter lab --ip=127.0.0.1 --ServerApp.root_dir="$(CURDIR)" \
		$(LAB_ARGS) notebooks/00_tour.ipynb

notebooks: $(INSTALLED) ## build every notebook from its text: a full run, outputs kept (ARGS="05_ppo" builds one)
	@$(OFFLINE) $(BIN)/python notebooks/build.py $(ARGS)

# torch stays where it is, since a new one is a decision and several GB: make lock TORCH=2.14.0
TORCH ?= $(shell sed -n 's/^torch==//p' requirements.lock)
lock: ## write requirements.lock anew from pyproject.toml, in a clean environment (PYTHON=python3.11: pins of the oldest fit all)
	@echo "lock: installing pyproject.toml's newest allowed packages, with torch $(TORCH), into .venv-lock"
	@$(PYTHON) -m venv --clear .venv-lock
	@.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH) ".[dev,notebooks]"
	@{ sed '/^#/!d' requirements.lock; .venv-lock/bin/python -m pip freeze --all --exclude pip --exclude rlhf-kit \
		| grep -vE '^(nvidia|cuda|triton)' | sed -E 's/\+[a-z0-9.]+$$//'; } > .venv-lock/requirements.lock
	@mv .venv-lock/requirements.lock requirements.lock
	@rm -rf .venv-lock build rlhf_kit.egg-info
	@echo "lock: requirements.lock has $$(grep -c '==' requirements.lock) packages; now: make test"

# torch is pinned by the lock like everything else: only TRL is another.
PEER := .venv-trl-1.12
PEER_NEEDS := experiments/ppo_vs_trl/requirements.txt
peer: $(PEER)/.installed ## make .venv-trl-1.12, the last TRL that has PPO, for experiments/ppo_vs_trl
	@echo "peer: $(PEER) holds $$($(PEER)/bin/python -m pip freeze | grep -E '^(trl|torch|transformers)==' | xargs)"

$(PEER)/.installed: requirements.lock $(PEER_NEEDS)
	@echo "peer: installing $(PEER_NEEDS) into $(PEER), every other version as in requirements.lock"
	@$(PYTHON) -m venv --clear $(PEER)
	@grep -v '^trl==' requirements.lock > $(PEER)/constraints.txt
	@$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check -c $(PEER)/constraints.txt -r $(PEER_NEEDS)
	@touch $@

clean: ## remove .venv and every cache; results/ stays
	@rm -rf .venv .venv-lock $(PEER) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -prune -exec rm -rf {} +
