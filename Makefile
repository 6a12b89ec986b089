# make run       the quickstart: real digits in, a registered one-step generator out
# make test      the tests a change must pass (minutes)
# make test-all  also the slow ones (clean consumer environment, wheel)
# make chaos     200 seeded faults, and whether the product survives them (75 minutes)
# make lint      format, lint, types, import contracts

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# The environment variable reaches the isolated build of the package too, the option does not.
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: run test test-all chaos lint format clean

run: $(VENV)/.installed
	$(BIN)/cmforge run quickstart

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow" -q

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q

chaos: $(VENV)/.installed-dev
	$(BIN)/python tests/chaos/run.py --seed 0 --faults 200 --out docs/chaos.json

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and "cmforge needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[dev]"
	touch $@ $(VENV)/.installed
