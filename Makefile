# Everything that a developer or CI runs; each target first installs what it needs into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help install demo test check fast drills lint format types docs bench clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

install: $(READY)  ## make .venv with every extra

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3.11 or python3 on PATH; run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "unitrain needs Python 3.11 or newer, found $$("$(PYTHON)" -V 2>&1); run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "$(PYTHON) cannot make virtual environments; install its venv package (Debian: python3-venv)" >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
# torch first and alone: pip then takes the pinned version from wherever it finds it, a CPU wheel on disk included,
# and no other package's wish can make it choose a build with gigabytes of CUDA libraries.
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
# What no wheel gives is built for this torch: minutes the first time, seconds from the user's caches later.
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m unitrain.build horovod --mpi
	$(BIN)/python -m unitrain.build deepspeed
	@touch $@

demo: install  ## train a small language model on two ranks
	$(BIN)/unitrain launch recipes/gpt_tiny.yaml --nproc 2

test: lint types  ## everything: ruff, mypy, all tests
	$(BIN)/python -m pytest

check: test  ## the same: what CI runs

fast: install  ## unit tests that start no process
	$(BIN)/python -m pytest -m fast

drills: install  ## the fault drills at their full counts
	$(BIN)/python -m pytest -m drill --drills

lint: install  ## ruff: rules and layout
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check

format: install  ## let ruff repair what it can
	$(BIN)/python -m ruff check --fix
	$(BIN)/python -m ruff format

types: install  ## mypy, strict
	$(BIN)/python -m mypy

docs: install  ## write the generated pages of docs/
	$(BIN)/python docs/generate.py

bench: install  ## measure speed on this machine, side by side with others
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/launch.py
	$(BIN)/python benchmarks/frameworks.py
	$(BIN)/python benchmarks/memory.py

clean:  ## remove .venv, caches and build output; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
