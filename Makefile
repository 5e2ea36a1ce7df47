# `make demo` and `make test` do all the set-up they need; the only prerequisite is Python 3.11.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo serve test lint size docs-check clean

setup: $(STAMP)

$(STAMP): requirements.txt requirements-beam.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet --no-compile --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[dev,serve]"
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --requirement requirements-beam.txt
	touch $(STAMP)

demo: setup
	$(BIN)/python -m launch.demo --out demo

serve: setup
	$(BIN)/python -m launch.serve --checkpoint demo

test: setup
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs-check: setup
	$(BIN)/python -m launch.make.docs_check

size: setup
	$(BIN)/python -m launch.size

clean:  # (not data/ and runs/, which may hold what took days)
	rm -rf demo .pytest_cache .ruff_cache
