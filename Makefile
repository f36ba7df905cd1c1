# make help lists the targets. Needs Python 3.12 or later and pip; everything else goes into .venv and build/.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# Compiled steps, kept between runs and shared by the test processes. The demo's are the user's: the next command is quick.
pytest notebooks: export NANOFLOW_COMPILE_CACHE ?= $(CURDIR)/build/xla
# pyright comes with everything it needs; this keeps it from asking for newer versions.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# Python files are compiled when they are first imported, and that is kept: most that are installed never are. (Images of
# containers often turn the keeping off, which has every process compile them again.)
export PYTHONDONTWRITEBYTECODE :=
INSTALL := -m pip install --no-compile --quiet --disable-pip-version-check
PIP := $(BIN)/python $(INSTALL) --constraint constraints.txt

# The oldest transformers that pyproject.toml accepts, with the tokenizers that belong to it.
FLOOR := $(shell sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)

.PHONY: help demo test checks lint types docs pytest floor notebooks wheel clean

help:
	@echo "make demo        generate text with the embedded model on eight CPU devices"
	@echo "make test        lint, types, the site of docs/, and all tests (README and notebooks included), some at the oldest transformers"
	@echo "make checks      what needs no test: lint, types and docs, and the floor, two at a time"
	@echo "make lint        ruff check and ruff format --check"
	@echo "make types       pyright"
	@echo "make pytest      the tests alone; ARGS='-k words' selects, WORKERS=n sets the processes"
	@echo "make floor       the tokenizer tests with the oldest transformers that is accepted"
	@echo "make notebooks   execute the notebooks into build/notebooks"
	@echo "make docs        the site of docs/, into build/site; warnings are errors"
	@echo "make wheel       build the package into dist"
	@echo "make clean       remove .venv, build and caches"

demo: $(VENV)/base
	@$(BIN)/python -c "print('\nCompletions: the embedded model, split over eight CPU devices (a first run compiles for about a minute)')"
	@set -x; $(BIN)/nanoflow generate --cpu-devices 8 '12+30=' '47+85=' 'reverse nanobatch=' 'sort 52917='
	@echo; echo "Chat:"
	@set -x; $(BIN)/nanoflow generate --cpu-devices 8 --quiet --chat 'What is 25+17?' 'Reverse overlap' 'Thank you'

test: checks pytest
	@echo "All checks passed."

checks:
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint types docs floor

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build  # not --quiet, which would count no warnings
	@echo "The site is in build/site: open build/site/index.html"

# With files whole in a process, pytest-xdist waits for ever for a process started in place of one that has ended.
pytest: $(VENV)/dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart=0 --durations=15 $(ARGS)

floor: build/floor-$(FLOOR)/made
	build/floor-$(FLOOR)/bin/python -m pytest --noconftest tests/test_tokenizer.py

# What those tests import and no more; jax is not needed.
build/floor-$(FLOOR)/made: $(VENV)/base constraints.txt
	@echo "Making an environment with transformers $(FLOOR)"
	@mkdir -p build
	@grep -viE '^(transformers|tokenizers|huggingface)' constraints.txt > build/floor-constraints.txt
	@$(BIN)/python -m venv --clear build/floor-$(FLOOR)
	@build/floor-$(FLOOR)/bin/python $(INSTALL) --constraint build/floor-constraints.txt \
	    transformers==$(FLOOR) jinja2 ml_dtypes numpy safetensors pytest hypothesis
	@touch $@

notebooks: $(VENV)/dev
	rm -rf build/notebooks && mkdir -p build/notebooks
	cp notebooks/*.ipynb build/notebooks/
	$(BIN)/jupyter-execute --inplace build/notebooks/*.ipynb
	@echo "Executed notebooks are in build/notebooks."

wheel: $(VENV)/dev
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is made once, and again when pyproject.toml or constraints.txt change.
$(VENV)/base: pyproject.toml constraints.txt
	@for python in $${PYTHON:-} python3.12 python3 python python3.13 python3.14; do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	    echo "Python 3.12 or later is needed and was not found; install it, or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	echo "Making $(VENV) with $$("$$found" --version); packages are installed quietly, which takes a few minutes"; \
	"$$found" -m venv --clear $(VENV)
	@$(PIP) --editable .
	@touch $@

$(VENV)/dev: $(VENV)/base
	@echo "Installing the development packages"
	@$(PIP) --editable ".[dev]"
	@touch $@
