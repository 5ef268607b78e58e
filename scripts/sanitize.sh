#!/usr/bin/env bash
# The C++ core's tests under AddressSanitizer, LeakSanitizer and UBSan, and its file reader under
# ThreadSanitizer, on builds of their own.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

# ---- races: a program of its own, as Python and torch are not built for ThreadSanitizer ----
g++ -std=c++17 -O1 -g -Wall -Wextra -fsanitize=thread -pthread -Icsrc csrc/file_reader.cpp \
  tests/transfer/file_reader_race.cpp -o "$build/race"
fixed=(setarch -R)  # g++ 12 knows no addresses as random as those of newer kernels
"${fixed[@]}" true 2>/dev/null || fixed=()  # some containers do not allow it
TSAN_OPTIONS=halt_on_error=1 "${fixed[@]}" "$build/race" "$build/file"
echo "no races in the file reader"

# ---- memory, leaks and undefined behaviour: the tests ----
VMO_SANITIZE=1 "$python" setup.py --quiet build_ext --build-lib "$build/lib" --build-temp "$build/tmp"
library=$build/lib/vllm_moe_offload/_core.so
# Whole stacks, past libraries without frame pointers: where they lead to the core, the leak is ours.
export ASAN_OPTIONS=detect_leaks=1:fast_unwind_on_malloc=0:malloc_context_size=20:log_path=$build/report
export LSAN_OPTIONS=exitcode=0:max_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export VMO_THOROUGH_TESTS=1
export VMO_STUB_FLAGS="-fsanitize=address,undefined -g"  # the CUDA copier, compiled for the CPU
preload=$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libstdc++.so)

# Leaks of the core. Python, numpy and torch leave memory at exit, too, and all calls come from
# Python: a suppression, which goes by any frame of a stack, would pass over ours as well.
leaks() {
  awk -v RS= -v ORS='\n\n' '/leak of/ && /csrc\/|_core\.so/' "$build"/report.* 2>/dev/null
}

# A planner that nobody frees must be found, or this machine cannot find leaks.
LD_PRELOAD=$preload "$python" -c "import ctypes
view = ctypes.create_string_buffer(4096)
ctypes.CDLL('$library').vmo_planner_create(1, 1, 1, 0, 0, 0, 1, view)"
if [[ -z $(leaks) ]]; then
  echo "LeakSanitizer does not find a leak that is there; does something trace this process?" >&2
  exit 1
fi
rm "$build"/report.*

VMO_CORE_LIBRARY=$library LD_PRELOAD=$preload "$python" -m pytest -q -p no:cacheprovider \
  tests/transfer/test_file_reader.py tests/transfer/test_engine.py tests/transfer/test_contract.py \
  tests/cache/test_planner.py tests/cache/test_planner_reference.py tests/forecast \
  tests/test_layer_calls.py tests/policy tests/transfer/test_cuda_copier.py || {
  status=$?
  grep -l "ERROR: AddressSanitizer" "$build"/report.* 2>/dev/null | xargs -r cat >&2
  exit $status
}
if [[ -n $(leaks) ]]; then
  leaks >&2
  exit 1
fi
echo "no leaks in the core"
