# Each target sets up what it needs in .venv, then does its job.
PYTHON ?= python3
BIN := .venv/bin
# uv installs the same packages several times faster where it is present; told to, it compiles them as pip does: every
# process that starts would do it anew where nothing may be written later.
INSTALL := $(if $(shell command -v uv),VIRTUAL_ENV=.venv uv pip install --quiet --compile-bytecode,$(BIN)/python -m pip install --quiet --disable-pip-version-check)

.PHONY: demo test faults lint bench clean

demo: .venv/installed
	$(BIN)/crosslevel demo

test: .venv/installed-test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Kills at every change of a file, half-written and failing writes: a table of how many were tried and survived.
faults: .venv/installed-test
	$(BIN)/python tests/faults/kills.py
	$(BIN)/python tests/faults/kills.py --faults kill,half --twice --seed 1

lint: .venv/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/installed
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/views.py

.venv/bin/python:
	$(if $(shell command -v uv),uv venv --quiet --python $(PYTHON) --seed .venv,$(PYTHON) -m venv .venv)

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(INSTALL) -c constraints.txt -e ".[test]"
	touch $@

.venv/installed-lint: .venv/installed
	$(INSTALL) -c constraints.txt -e ".[lint]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
