# The same commands for a person and for CI. Everything lives in .venv and runs/; `make clean` removes both.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch goes first, and pinned: where the index offers a CPU wheel of it, nothing later replaces that wheel.
TORCH ?= torch==2.13.0
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-slow mutants bench bench-gpu unit-costs check format ui clean

demo: $(VENV)/.installed  ## raw images to a report, at laptop size
	@$(BIN)/python jobs/demo.py

test: $(VENV)/.installed-dev  ## the test suite, in two processes
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.installed-dev  ## long chaos tests
	@$(BIN)/python -m pytest -m slow

mutants: $(VENV)/.installed-dev  ## small changes of the code that the tests must notice; a sample
	@$(BIN)/python tests/mutants.py --sample 40 --seed 0

bench: $(VENV)/.peers  ## benchmarks, each a ratio measured in one run; the table at the end is tests/benchmarks/README.md's
	@DDPM_PEERS=$(CURDIR)/$(VENV)/peers $(BIN)/python -m pytest -o addopts="-ra --strict-markers" -m bench -s tests/benchmarks

bench-gpu: $(VENV)/.installed-dev  ## what one GPU does, as a table and as JSON
	@$(BIN)/python tests/gpu/bench.py --output runs/bench-gpu.json

unit-costs: $(VENV)/.installed-dev  ## measures what jobs/plan.py counts with, on this machine
	@PYTHONPATH=.:tests $(BIN)/python tests/benchmarks/unit_costs.py

check: $(VENV)/.installed-dev  ## formatting, lint, types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(VENV)/.installed-dev
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

ui: $(VENV)/.installed  ## the MLflow UI over runs/, on http://127.0.0.1:5000, and where it ranks checkpoints
	@$(BIN)/python jobs/ui.py

clean:
	rm -rf $(VENV) runs

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
		sys.exit(0 if (3, 11) <= v < (3, 14) else "Python %d.%d found: Python 3.11 to 3.13 is wanted; name one with make PYTHON=..." % v)'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV) (2 GB, some minutes the first time) ..."
	@$(PIP) "$(TORCH)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	@echo "Installing the test tools into $(VENV) ..."
	@$(PIP) --editable ".[dev]"
	@touch $@

$(VENV)/.peers: tests/benchmarks/peers.txt $(VENV)/.installed-dev
	@echo "Installing what is measured beside ours into $(VENV)/peers ..."
	@$(PIP) --no-deps --upgrade --target $(VENV)/peers --requirement $<
	@touch $@
