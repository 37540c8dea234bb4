VENV ?= .venv
PYTHON ?= python3
BIN := $(abspath $(VENV))/bin

.PHONY: help install test test-all test-pytorch-lightning slow lint docs dist demo bench costs benchmark-digits \
	benchmark-glyphs benchmark-pictures clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 20

install: $(VENV)/dev  ## Make the virtual environment

# Dependency groups need pip 25.1.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/examples: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[examples]'
	touch $@

$(VENV)/docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable . --group docs
	touch $(VENV)/examples $@

$(VENV)/release: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --group release
	touch $@

$(VENV)/dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $(VENV)/docs $(VENV)/examples $(VENV)/release $@

# In two processes, each of them on one thread.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test: install  ## Run the quick tests: all but those that tests/conftest.py marks as thorough (four minutes)
	$(PYTEST) -m 'not thorough and not slow'

test-all: install  ## Run all tests, as continuous integration does: thorough ones start processes, kill and export too
	$(PYTEST)

test-pytorch-lightning: COPY = outputs/pytorch_lightning
test-pytorch-lightning: TESTS ?= tests/callback tests/checkpoint/test_checkpoint.py
test-pytorch-lightning: install  ## Run tests of the callback and of its files with the other package of Lightning
	rm -rf $(COPY)
	mkdir -p $(COPY)
	cp -R tests pyproject.toml $(COPY)
	rm $(COPY)/tests/callback/*package*  # these use both packages
	grep -rlE 'lightning\.(pytorch|fabric)' $(COPY)/tests | xargs sed -i.orig -E \
		's/lightning\.pytorch/pytorch_lightning/g; s/lightning\.fabric/lightning_fabric/g'
	cd $(COPY) && $(PYTEST) $(TESTS)

slow: install  ## Run the tests that take minutes, such as the survey of timm
	$(BIN)/python -m pytest -m slow

lint: install  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs  ## Build the documentation site, which runs its two notebooks; a warning is an error
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -W --keep-going -b html -d outputs/doctrees docs outputs/site

dist: $(VENV)/release  ## Build the wheel and the sdist, and check them
	rm -rf outputs/dist
	$(BIN)/python -m build --outdir outputs/dist
	$(BIN)/python -m twine check --strict outputs/dist/*
	$(BIN)/check-wheel-contents outputs/dist

demo: $(VENV)/examples  ## Pre-train, fine-tune and calibrate on digits: a table and a picture
	$(BIN)/python examples/digits.py

bench: install  ## Measure what the package costs; what is over its budget fails
	$(BIN)/python -m pytest tests/benchmarks --benchmark-quiet --benchmark-json=outputs/benchmarks.json

costs: install  ## Measure the same, and write docs/costs.md
	-$(BIN)/python -m pytest tests/benchmarks --benchmark-quiet --benchmark-json=outputs/benchmarks.json
	$(BIN)/python tests/benchmarks/page.py outputs/benchmarks.json > docs/costs.md

benchmark-digits: install  ## Compare all methods on digits, from scratch: the tables of examples/benchmarks (minutes)
	$(BIN)/python examples/benchmarks/digits.py

benchmark-glyphs: install  ## The same on characters drawn from Debian's fonts (an hour)
	$(BIN)/python examples/benchmarks/glyphs.py --jobs 2

benchmark-pictures: install  ## The same with an ImageNet network on drawings, which are downloaded (half an hour): examples/benchmarks/pictures.md
	$(BIN)/python -m pip install --quiet --editable '.[benchmarks]'
	$(BIN)/python examples/benchmarks/pictures.py --jobs 2

clean:  ## Remove what the other targets made
	rm -rf $(VENV) outputs .pytest_cache .mypy_cache .ruff_cache
