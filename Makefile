# Each command makes its own virtual environment (.venv) on first use.
# PYTHON picks the interpreter (3.11 or later): make test PYTHON=python3.12
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

VERSION     := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
CONSTRAINTS := $(if $(filter 3.11,$(VERSION)),constraints/python3.11.txt,constraints/python3.12.txt)
STAMP       := $(VENV)/.installed-$(VERSION)

.DEFAULT_GOAL := help
.PHONY: help install quickstart test lint format docs wheel-check bench clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## make the virtual environment with pinned packages

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "qat_jax needs Python 3.11 or later, $(PYTHON) is $(VERSION): try make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

quickstart: $(STAMP)  ## train a small ResNet on digits: float32, max and OCTAV at 4 and 2 bits
	$(BIN)/python -m experiments.quickstart --workdir=runs/quickstart

test: $(STAMP)  ## run the test suite (a quarter of an hour on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## build the documentation site, build/site, strictly
	@$(BIN)/python -c 'import mkdocstrings_handlers.python' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

wheel-check: $(STAMP)  ## build the wheel and try it in an environment of its own
	$(BIN)/python .ci/check_wheel.py $(CONSTRAINTS)

bench: $(STAMP)  ## time quantised steps and forward passes against float32 ones, and the search for thresholds
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.inference
	$(BIN)/python -m benchmarks.thresholds

clean:  ## remove the virtual environment, builds and run folders
	rm -rf $(VENV) build runs
