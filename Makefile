# The only commands to know. Each builds what it needs; PYTHON picks the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# every warning is an error, a name that leads nowhere too
SPHINX := --builder html --nitpicky --fail-on-warning --quiet
ARGS ?=

.PHONY: demo test check bench coverage gpu docs clean

$(VENV)/.base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cli]'
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

$(VENV)/.docs: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

$(VENV)/.bench: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]' '$(or $(TORCH),torch)'
	touch $@

demo: $(VENV)/.base  ## run the main job on the packaged real heads
	$(BIN)/fastattn demo $(ARGS)

test: $(VENV)/.test  ## laws, oracles, attacks, doctests
	$(BIN)/python -m pytest --numprocesses 2 $(ARGS)
	$(BIN)/python -m pytest --doctest-modules --ignore=fastattn/data --ignore-glob='*/_ops/gpu/*' sketching fastattn lowerbounds

check: $(VENV)/.test $(VENV)/.docs  ## everything that CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test
	$(BIN)/python -m pytest benches --benchmark-disable --quiet
	rm -rf docs/api/generated
	$(BIN)/python -m sphinx $(SPHINX) --define plot_gallery=0 docs docs/_build/quick

bench: $(VENV)/.bench  ## measure everything, ARGS=--quick in minutes; TORCH='torch==2.13.0' picks a build
	$(BIN)/python -m benches $(ARGS)

coverage: $(VENV)/.test  ## lines that the tests run; numba counts those that it compiles
	rm -rf $(VENV)/numba-coverage
	NUMBA_JIT_COVERAGE=1 NUMBA_CACHE_DIR=$(CURDIR)/$(VENV)/numba-coverage \
	$(BIN)/python -m pytest --numprocesses 2 --cov --cov-report=term-missing:skip-covered $(ARGS)

gpu: $(VENV)/.test  ## the tests that need a CUDA device
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[gpu]'
	$(BIN)/python -m pytest -m gpu $(ARGS)

docs: $(VENV)/.docs  ## the pages, into docs/_build/html; every tutorial runs
	rm -rf docs/api/generated
	$(BIN)/python -m sphinx $(SPHINX) $(ARGS) docs docs/_build/html

clean:
	rm -rf docs/_build docs/api/generated docs/results docs/tutorials
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
