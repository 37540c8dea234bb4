VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: help install test slow lint demo bench clean

help:  ## Show the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

install: $(VENV)/installed  ## Make the virtual environment

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

test: install  ## Run the test suite
	$(BIN)/python -m pytest

slow: install  ## Run the tests that take minutes, such as the survey of timm
	$(BIN)/python -m pytest -m slow

lint: install  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: install  ## Pre-train, fine-tune and calibrate on digits: a table and a picture
	$(BIN)/python examples/digits.py

bench: install  ## Measure what the package costs, as ratios
	$(BIN)/python -m pytest tests/benchmarks --benchmark-json=outputs/benchmarks.json

clean:  ## Remove what the other targets made
	rm -rf $(VENV) outputs .pytest_cache .mypy_cache .ruff_cache
