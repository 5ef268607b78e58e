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
# Stacks of leaks are whole, past libraries without frame pointers: where they lead to the core, the
# leak is ours. They are looked for when the tests are over and not at exit, where leaks of others
# would take the place of the tests' exit status.
export ASAN_OPTIONS=log_path=$build/report:leak_check_at_exit=0:fast_unwind_on_malloc=0:malloc_context_size=20
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export VMO_THOROUGH_TESTS=1
preload=$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libstdc++.so)

# Runs Python statements with the core in $VMO_CORE_LIBRARY, then looks for leaks. ASan's errors go
# to a file, too; UBSan has none.
sanitized() {
  local status=0
  VMO_CORE_LIBRARY=$library LD_PRELOAD=$preload "$python" -c "import ctypes, gc, os, sys
$1
gc.collect()
ctypes.CDLL(None).__lsan_do_recoverable_leak_check()" "${@:2}" || status=$?
  if ((status != 0)); then
    awk '/LeakSanitizer/ { exit } { print }' "$build"/report.* >&2 2>/dev/null || true
    exit "$status"
  fi
}

# Leaks of the core. Python, numpy and torch have leaks, too, and all calls come from Python: a
# suppression, which goes by any frame of a stack, would pass over ours as well.
leaks() {
  awk -v RS= -v ORS='\n\n' '/leak of/ && /csrc\/|_core\.so/' "$build"/report.*
}

# A planner that nobody frees must be found, or this machine cannot find leaks.
sanitized "view = ctypes.create_string_buffer(4096)
ctypes.CDLL(os.environ['VMO_CORE_LIBRARY']).vmo_planner_create(1, 1, 1, 0, 0, 0, 1, view)"
if [[ -z $(leaks) ]]; then
  echo "LeakSanitizer does not find a leak that is there; does something trace this process?" >&2
  exit 1
fi
rm "$build"/report.*

# What the core prints when it ends the process must not wait for pytest to show it.
sanitized "import pytest
status = pytest.main(sys.argv[1:])
if status: sys.exit(status)" -q -p no:cacheprovider --capture=sys \
  tests/transfer/test_file_reader.py tests/transfer/test_engine.py tests/transfer/test_contract.py \
  tests/cache/test_planner.py tests/cache/test_planner_reference.py tests/forecast \
  tests/test_layer_calls.py tests/policy
if [[ -n $(leaks) ]]; then
  leaks >&2
  exit 1
fi
echo "no leaks in the core"
