# `make` prints the targets. Setting up is tools/setup.sh, done once and again when pyproject.toml or constraints.txt
# changes.

PYTHON ?= python3
READY := .venv/.ready

# two processes of one thread each, a file's tests in one of them, as they share what they make; a test that hangs is
# ended after so many seconds and shows where it was, and the others go on; one that hangs in a library's C, where no
# signal is heard, ends its process and all the tests a minute later
SIDE_BY_SIDE := --numprocesses 2 --dist loadfile --no-loadscope-reorder --timeout 1200 --max-worker-restart 0 \
	--override-ini faulthandler_timeout=1260 --override-ini faulthandler_exit_on_timeout=true

# what a library's release most easily breaks: arithmetic beside transformers and PEFT, tokens, files, the command line
FLOOR_TESTS := $(addprefix tests/test_,adapters.py bitsandbytes.py chat.py chat_template.py cli.py config.py \
	config_errors.py config_files.py control_tokens.py data.py dry_run.py evaluation.py file_types.py formats.py \
	fused.py fuzz_data.py generation.py gguf_file.py heldout.py hub_rows.py invariants.py json_lines.py lines.py lora.py \
	loss.py merge.py merge_memory.py model.py names.py optimisation.py packing.py page.py presets.py push.py record.py \
	refusals.py sampling.py scoring.py status.py track.py training.py upload.py view.py whole_run.py)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test coverage lint docs constraints floors clean

help:
	@echo "make quickstart   set up, then play SPIN with a small model on this machine: runs/quickstart"
	@echo "make test         set up, lint, and run the tests"
	@echo "make coverage     the tests again, and which lines of qspin/ none of them reaches"
	@echo "make lint         set up, then ruff and mypy"
	@echo "make docs         set up, then write the generated pages and the site: build/site/index.html"
	@echo "make setup        only build .venv; PYTHON=python3.12 chooses the interpreter"
	@echo "make constraints  write the versions in .venv to constraints.txt"
	@echo "make floors       test with the lowest versions that pyproject.toml allows, in .floors"
	@echo "make clean        remove .venv, .floors, caches and builds; runs/ is kept"

setup: $(READY)

$(READY): pyproject.toml constraints.txt tools/setup.sh
	@bash tools/setup.sh "$(PYTHON)"
	@touch $@

quickstart: $(READY)
	.venv/bin/qspin run quickstart --out runs/quickstart

test: lint
	.venv/bin/python -m pytest -q $(SIDE_BY_SIDE)

coverage: $(READY)
	.venv/bin/coverage erase
	.venv/bin/coverage run -m pytest -q $(SIDE_BY_SIDE)
	.venv/bin/coverage combine -q
	.venv/bin/coverage report --skip-covered --show-missing

lint: $(READY)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

docs: $(READY)
	.venv/bin/python tools/commands.py
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

constraints: $(READY)
	@bash tools/constraints.sh
	@touch $(READY)

floors:
	@mkdir -p .floors
	@$(PYTHON) tools/floors.py > .floors/constraints.txt
	@VENV=.floors/venv CONSTRAINTS=.floors/constraints.txt bash tools/setup.sh "$(PYTHON)"
	QSPIN_CACHE=.floors/cache .floors/venv/bin/python -m pytest -q $(SIDE_BY_SIDE) $(FLOOR_TESTS)

clean:
	rm -rf .venv .floors build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
