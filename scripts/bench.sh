#!/usr/bin/env bash
# All CPU benchmarks, one after the other, then the table of bars. Called by `make bench`.
#
#   scripts/bench.sh [--quick] [--work-dir DIR] [--results DIR]
#
# Each writes its JSON under benchmarks/results/ (--quick: build/bench/results/). Those that
# drop the page cache or make a memory cgroup need root and are left out without it. Nothing
# else should run on the machine meanwhile. Needs 40 GB below --work-dir; bench_llamacpp.py also the
# model that its head names, and PyPI the first time.
# Exit status: 0 all ran and met their bars; 1 a bar was missed; 2 a benchmark did not run.
set -uo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
results=benchmarks/results
previous=
for argument in "$@"; do
  [ "$argument" = --quick ] && results=build/bench/results
done
for argument in "$@"; do
  [ "$previous" = --results ] && results=$argument
  case $argument in --results=*) results=${argument#--results=} ;; esac
  previous=$argument
done

declare -a failed=()
run() {
  echo
  echo "=== $*"
  local began=$SECONDS
  "$python" "$@" || failed+=("$* (status $?)")
  echo "=== took $((SECONDS - began)) s"
}

run scripts/bench_planner.py "$@"
run scripts/bench_reads.py "$@"
run scripts/bench_policy.py "$@"
run scripts/bench_scale.py "$@"
run scripts/bench_resident.py "$@"
run scripts/bench_llamacpp.py "$@"
run scripts/bench_prefetch.py "$@"
run scripts/bench_scrape.py "$@"
run scripts/bench_parallel.py "$@"
run scripts/bench_counters.py "$@"
run scripts/bench_start.py "$@"
run scripts/bench_memory.py "$@"

echo
"$python" scripts/bench_report.py --strict --results "$results"
status=$?
if [ ${#failed[@]} -gt 0 ]; then
  printf 'Did not run to the end: %s\n' "${failed[@]}"
  exit 2
fi
exit $status
