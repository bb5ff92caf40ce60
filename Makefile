# One command each; the first one to run makes .venv. `make help` lists them.

PYTHON ?= python3
# Test processes; each holds torch and the models of its tests (0: all in one process).
WORKERS ?= 2
# More arguments for pytest, for example PYTEST_ARGS="-k dora".
PYTEST_ARGS ?=
# Another index to look for torch in, for example https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The test processes share the cores among themselves: one thread each is fastest together.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow check format bench gates experiments clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=$(PYTHON) WORKERS=$(WORKERS) PYTEST_ARGS=... TORCH_INDEX=..."

demo: $(STAMP) ## Sort customer messages with MiniLM, then mend a network's worst digit; two reports
	@$(BIN)/lorakit demo text
	@$(BIN)/lorakit demo digits

test: $(STAMP) ## Run the tests (without the slow ones)
	@$(PYTEST) $(PYTEST_ARGS)

test-slow: $(STAMP) ## Run the slow tests
	@$(PYTEST) -m slow $(PYTEST_ARGS)

check: $(STAMP) ## Lint, check the formatting and the types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP) ## Format the code and mend what ruff can mend
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

bench: $(STAMP) ## Run the benchmarks, one after the other
	@set -e; for file in benchmarks/startup.py $(sort $(filter-out benchmarks/bench_gpu.py,$(wildcard benchmarks/bench_*.py))); do \
		echo "== $$file"; $(BIN)/python $$file; \
	done

gates: $(STAMP) ## Run every method's claims on several seeds (minutes); goes on where it was
	@$(BIN)/python experiments/run_gates.py

experiments: $(STAMP) ## Compare all methods on real work (an hour or two); goes on where it was
	@$(BIN)/python experiments/run_methods.py

clean: ## Remove .venv, caches and build artefacts
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and under its pin, so that no dependency brings another build of it. The stamp is
# written last: an install that fails is tried again by the next make.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("lorakit needs Python 3.10 or newer, this is " + sys.version.split()[0] + ": make PYTHON=...")'
	@rm -f $@
	@echo "Installing into $(VENV) (torch and the tested packages; some minutes the first time) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@$(PIP) install --quiet -c constraints.txt -e '.[test,dev,demo]'
	@touch $@
	@echo "Installed into $(VENV)."
