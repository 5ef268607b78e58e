#!/usr/bin/env bash
# The C++ core's tests under AddressSanitizer and UBSan, on a build of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
VMO_SANITIZE=1 "$python" setup.py --quiet build_ext --build-lib "$build/lib" --build-temp "$build/tmp"
library=$build/lib/vllm_moe_offload/_core.so
# Python itself leaks at exit; what matters here are overflows, races on freed memory, UB.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export VMO_THOROUGH_TESTS=1
export VMO_STUB_FLAGS="-fsanitize=address,undefined -g"  # the CUDA copier, compiled for the CPU
VMO_CORE_LIBRARY=$library LD_PRELOAD=$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libstdc++.so) \
  "$python" -m pytest -q -p no:cacheprovider tests/transfer/test_file_reader.py tests/transfer/test_engine.py tests/transfer/test_contract.py \
  tests/cache/test_planner.py tests/cache/test_planner_reference.py tests/forecast tests/test_layer_calls.py tests/policy tests/transfer/test_cuda_copier.py
