# All commands. Each builds its environment; PYTHON selects the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# every warning is an error, an unresolved reference too
SPHINX := --builder html --nitpicky --fail-on-warning --quiet
ARGS ?=

# a folder that root cannot write to either
NOWHERE := /proc/nowhere

.PHONY: demo test test-all processors check bench coverage gpu docs clean
.PHONY: environments least readonly homeless interpreted

$(VENV)/.base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cli]'
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

$(VENV)/.all: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[all]' '$(or $(TORCH),torch)'
	touch $@

$(VENV)/.docs: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

$(VENV)/.bench: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]' '$(or $(TORCH),torch)'
	touch $@

demo: $(VENV)/.base  ## run the main job on the packaged real heads
	$(BIN)/fastattn demo $(ARGS)

# each worker has one thread of BLAS: two of each would wait for each other
test: $(VENV)/.test  ## laws, oracles, attacks, doctests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m 'not slow' $(ARGS)
	$(BIN)/python -m pytest --doctest-modules --ignore=fastattn/data --ignore-glob='*/_ops/gpu/*' sketching fastattn lowerbounds

test-all: $(VENV)/.all test processors  ## the same with every library, then the slow tests; TORCH='torch==2.13.0' picks a build
	$(BIN)/python -m pytest --numprocesses 2 -m slow $(ARGS)

# without AVX-512, then without vector instructions that a processor might lack
processors: $(VENV)/.test  ## the kernels' tests, compiled as for other processors
	for name in znver3 generic; do \
	    NUMBA_CPU_NAME=$$name $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m 'kernel and not slow' --quiet $(ARGS) || exit 1; \
	done

check: $(VENV)/.all $(VENV)/.docs  ## everything that CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test-all
	$(BIN)/python -m pytest benches --benchmark-disable --quiet
	rm -rf docs/api/generated
	$(BIN)/python -m sphinx $(SPHINX) --define plot_gallery=0 docs docs/_build/quick

environments: least readonly homeless interpreted  ## the demo's calls in restricted environments

least: $(VENV)/.base  ## with the lowest versions of all dependencies
	test -x $(VENV)-least/bin/python || $(BIN)/python -m venv $(VENV)-least
	$(BIN)/python .ci/least_versions.py > $(VENV)-least/versions.txt
	$(VENV)-least/bin/python -m pip install --quiet --disable-pip-version-check --requirement $(VENV)-least/versions.txt
	NUMBA_CACHE_DIR=$(CURDIR)/$(VENV)-least/code PYTHONPATH=$(CURDIR) $(VENV)-least/bin/python .ci/calls.py

readonly: $(VENV)/.base  ## from a read-only installation
	.ci/readonly $(BIN)/python

homeless: $(VENV)/.base  ## from a read-only installation, by a user without a home
	HOME=$(NOWHERE) XDG_CACHE_HOME=$(NOWHERE) MPLCONFIGDIR= .ci/readonly $(BIN)/python

interpreted: $(VENV)/.base  ## with numba's compilation disabled
	NUMBA_DISABLE_JIT=1 PYTHONPATH=$(CURDIR) $(BIN)/python .ci/calls.py

bench: $(VENV)/.bench  ## measure everything, ARGS=--quick in minutes; TORCH='torch==2.13.0' picks a build
	$(BIN)/python -m benches $(ARGS)

coverage: $(VENV)/.test  ## line coverage of the tests; numba counts the lines that it compiles
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
	rm -rf $(VENV) $(VENV)-least .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
