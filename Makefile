# Each target sets up what it needs in .venv, then does its job. `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
# uv installs the same packages several times faster where it is present; told to, it compiles them as pip does: every
# process that starts would do it anew where nothing may be written later.
INSTALL := $(if $(shell command -v uv),VIRTUAL_ENV=.venv uv pip install --quiet --compile-bytecode,$(BIN)/python -m pip install --quiet --disable-pip-version-check)
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-fast check durations coverage faults lint docs bench clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 12

demo: .venv/installed ## the first look: trains, compares, writes runs/demo/report.html
	$(BIN)/crosslevel demo

test: .venv/installed-test ## all tests
	$(BIN)/python -m pytest $(PARALLEL)

test-fast: .venv/installed-test ## the tests that are not slow
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not browser"

check: .venv/installed-lint .venv/installed-test ## the inner loop: lint, types, layers, fast tests, side by side
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint test-fast

durations: .venv/installed-test ## how long each test takes: what is slow, and which come first
	CROSSLEVEL_DURATIONS=$(CURDIR)/tests/durations.json $(BIN)/python -m pytest $(PARALLEL)

coverage: .venv/installed-test ## which branches no test takes
	$(BIN)/python -m pytest $(PARALLEL) --cov=crosslevel --cov-branch --cov-report=term-missing:skip-covered

faults: .venv/installed-test ## kills at every change of a file, half-written and failing writes: what survived (LOG=FILE goes on where it was)
	$(BIN)/python tests/faults/killed/kills.py $(if $(LOG),--log $(LOG))
	$(BIN)/python tests/faults/killed/kills.py --faults kill,half --twice --seed 1 --disk $(if $(LOG),--log $(LOG))

lint: .venv/installed-lint ## style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/installed-docs ## the documentation as a site, in site/
	$(BIN)/mkdocs build --strict

bench: .venv/installed ## the speed of a step and of views
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/speed/views.py

.venv/bin/python:
	$(if $(shell command -v uv),uv venv --quiet --python $(PYTHON) --seed .venv,$(PYTHON) -m venv .venv)

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -c constraints.txt -e .
	touch $@

.venv/installed-%: .venv/installed
	$(INSTALL) -c constraints.txt -e ".[$*]"
	touch $@

clean: ## what any of these made
	rm -rf .venv build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
