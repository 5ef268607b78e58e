# make setup, then: demo, check, test, test-all, bench, docs. Run `make help` for one line each.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
SOURCES := $(wildcard csrc/*.cpp csrc/*.h)
CXX_TESTS := $(wildcard tests/*/*.cpp)
TEST_REPORT := benchmarks/results/test_all.json

.PHONY: help setup gpu-kit gpu-rehearsal demo demo-chat check unit unit-scripts engines slow-sample test test-triton test-wheel test-all \
  lint format sanitize bench docs clean

help: ## what each target does
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/:/' | column -t -s:

setup: $(STAMP) ## .venv with locked CPU requirements, extension built

$(STAMP): requirements/cpu.lock requirements/vllm-cpu-metadata/pyproject.toml pyproject.toml setup.py \
  scripts/install_lock.py $(SOURCES)
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python scripts/install_lock.py requirements/cpu.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation ./requirements/vllm-cpu-metadata
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

gpu-kit: setup ## everything of ours for a CUDA machine without network (docs/cuda.md)
	PYTHON=$$PWD/$(BIN)/python $(BIN)/python scripts/gpu_kit.py $(if $(PIECES),--pieces $(PIECES))

gpu-rehearsal: gpu-kit ## what the kit is for, on this CPU with a simulated device
	$(BIN)/python scripts/gpu_first.py --rehearse

demo: setup ## ask a small model that speaks, a quarter of its experts cached
	$(BIN)/python -m scripts.demo

demo-chat: setup ## talk to the demo's model in the terminal
	$(BIN)/python -m scripts.demo.chat

check: setup ## lint and all tests that start no engine (2 minutes on 2 idle cores)
	$(MAKE) --no-print-directory --jobs=3 --output-sync=target lint unit unit-scripts

# Side by side, so one thread each is enough; more would wait for each other. The second one
# imports vLLM.
unit unit-scripts: export OMP_NUM_THREADS := 1
NO_ENGINE := -m "not vllm and not slow and not gpu" --durations=10
WITH_VLLM := tests/integration tests/scripts

unit: setup
	$(BIN)/python -m pytest $(NO_ENGINE) $(WITH_VLLM:%=--ignore=%)

unit-scripts: setup
	$(BIN)/python -m pytest $(NO_ENGINE) $(WITH_VLLM)

engines: setup ## an engine for each feature: what test adds to check
	$(BIN)/python -m pytest -m "vllm and not slow and not gpu" --durations=20

slow-sample: setup ## the cells of test-all that .ci/slow_cells names
	$(BIN)/python -m pytest --durations=20 @.ci/slow_cells

test: check ## what a change must pass: check, and an engine for each feature (15 minutes)
	$(MAKE) --no-print-directory engines

test-triton: setup ## the Triton kernels, interpreted and compiled, with each supported Triton; no GPU (5 minutes)
	scripts/test_triton.sh

test-wheel: setup ## our wheel beside vLLM's for CUDA, and our hooks in its model runner V2; no GPU (4 minutes, then 2)
	scripts/test_wheel.sh

test-all: setup ## all architectures, capacities and modes (over an hour); writes $(TEST_REPORT)
	VMO_THOROUGH_TESTS=1 $(BIN)/python -m pytest -m "not gpu" --durations=20 --results $(TEST_REPORT)

lint: setup ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(CXX_TESTS)

format: setup ## rewrite sources the way lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES) $(CXX_TESTS)

sanitize: setup ## the C++ core under sanitizers: memory, leaks, undefined behaviour, races
	scripts/sanitize.sh

bench: setup ## all CPU benchmarks; JSON under benchmarks/results/
	scripts/bench.sh

docs: setup ## rewrite docs/options.md, docs/patches.md and the figures
	$(BIN)/python scripts/write_options.py
	$(BIN)/python scripts/write_patches.py
	$(BIN)/python scripts/draw_figures.py
	$(BIN)/python scripts/draw_measurements.py

clean: ## remove what setup and the tests made
	rm -rf $(VENV) build dist demo *.egg-info vllm_moe_offload/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
