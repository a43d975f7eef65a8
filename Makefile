# The only commands to know. Each builds what it needs; PYTHON picks the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: demo test check bench gpu docs clean

$(VENV)/.base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cli]'
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

$(VENV)/.bench: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]' '$(or $(TORCH),torch)'
	touch $@

demo: $(VENV)/.base  ## run the main job on the packaged real heads
	$(BIN)/fastattn demo $(ARGS)

test: $(VENV)/.test  ## laws, oracles, attacks, doctests
	$(BIN)/python -m pytest --numprocesses 2 $(ARGS)
	$(BIN)/python -m pytest --doctest-modules --ignore=fastattn/data --ignore-glob='*/_ops/gpu/*' sketching fastattn lowerbounds

check: $(VENV)/.test  ## everything that CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test
	$(BIN)/python -m pytest benches --benchmark-disable --quiet

bench: $(VENV)/.bench  ## time against torch; TORCH='torch==2.13.0' picks a build
	$(BIN)/python -m benches $(ARGS)

gpu: $(VENV)/.test  ## the tests that need a CUDA device
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[gpu]'
	$(BIN)/python -m pytest -m gpu $(ARGS)

docs: $(VENV)/.test  ## every exported docstring obeys numpydoc
	$(BIN)/python -m pytest tests/test_docstrings.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
