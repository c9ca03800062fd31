# `make` prints the targets. Setting up is tools/setup.sh, done once and again when pyproject.toml changes.

PYTHON ?= python3
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test lint docs clean

help:
	@echo "make quickstart   set up, then play SPIN with a small model on this machine: runs/quickstart"
	@echo "make test         set up, lint, and run the tests"
	@echo "make lint         set up, then ruff and mypy"
	@echo "make docs         set up, then write the generated pages and the site: build/site/index.html"
	@echo "make setup        only build .venv; PYTHON=python3.12 chooses the interpreter"
	@echo "make clean        remove .venv, caches and builds; runs/ is kept"

setup: $(READY)

$(READY): pyproject.toml tools/setup.sh
	@bash tools/setup.sh "$(PYTHON)"
	@touch $@

quickstart: $(READY)
	.venv/bin/qspin run quickstart --out runs/quickstart

test: lint
	.venv/bin/python -m pytest -q

lint: $(READY)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

docs: $(READY)
	.venv/bin/python tools/commands.py
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
