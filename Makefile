# Two commands do everything: `make demo` and `make test`. Both set themselves up in .venv.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# torch is pinned for development only; slimrank itself takes the torch that is there.
TORCH ?= torch==2.13.0

.PHONY: demo test check format types imports docs unit slow bench

demo: $(VENV)/.demo
	rm -rf demo-model
	$(BIN)/slimrank demo --out demo-model

test: check unit slow

check: format types imports docs

format: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

docs: $(VENV)/.dev
	$(BIN)/cog --check -P -I benchmarks README.md docs/*.md

unit: $(VENV)/.dev
	$(BIN)/pytest -n 2 -m "not slow and not gpu"

slow: $(VENV)/.dev
	$(BIN)/pytest -n 0 -m "slow and not gpu"

bench: $(VENV)/.demo
	$(BIN)/python benchmarks/precision.py --out benchmarks/results/precision.json

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/.demo: $(VENV)/.venv pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --editable ".[demo]" --group dev --group test
	touch $@
