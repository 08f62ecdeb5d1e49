# `make help` lists the targets. Everything runs in .venv, made on first use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# Without torch already there, a range would let pip take a CUDA build of several gigabytes.
TORCH := torch==2.13.0

.DEFAULT_GOAL := help

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $(STAMP)

.PHONY: help
help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

.PHONY: install
install: $(STAMP) ## make the virtual environment

.PHONY: demo
demo: $(STAMP) ## quantize, fine-tune, fold, export and run SmolLM2-135M (ARGS=--quick for less)
	$(BIN)/python -W ignore examples/demo.py $(ARGS)

.PHONY: test
test: $(STAMP) ## run the tests, without the slow ones
	$(BIN)/python -m pytest -n 2 -q -m "not slow" $(ARGS)

.PHONY: test-slow
test-slow: $(STAMP) ## run the slow tests: a real model, the command line end to end
	$(BIN)/python -m pytest -q -m slow $(ARGS)

.PHONY: lint
lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: format
format: $(STAMP) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: wheel-check
wheel-check: $(STAMP) ## build the wheel and import all of it without extras
	$(BIN)/python scripts/check_wheel.py

.PHONY: readme-check
readme-check: $(STAMP) ## run the commands of the README and the examples
	$(BIN)/python scripts/check_readme.py

.PHONY: clean
clean: ## remove what the targets made
	rm -rf $(VENV) build dist demo-out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
