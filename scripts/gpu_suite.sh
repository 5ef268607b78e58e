#!/usr/bin/env bash
# The proof on a CUDA machine: build, tests, benchmarks. Offline, part by part.
#
#   scripts/gpu_suite.sh --list                      the parts, numbered
#   scripts/gpu_suite.sh --part 1 [--part 5 ...]     some of them, in that order
#   scripts/gpu_suite.sh                             all of them
#
#   --results DIR    where gpu.json is (default: benchmarks/results); starts from the committed one
#   --work-dir DIR   models, stores and logs (default: build/bench); 50 GB free are enough
#   --limit SECONDS  of a part (default: 470)
#
# Needs stock vLLM and its requirements, either installed or in a folder on PYTHONPATH; PYTHON
# names the interpreter (default: python3). Nothing is installed and nothing is downloaded: the
# extension is built in place and the plugin is found by the egg-info in the project's root. What
# of them is there already, brought along perhaps, is kept. Without a repository VMO_COMMIT names
# the commit. Outside of --results and --work-dir nothing else is written.
# Every part is merged into gpu.json, failures too; what comes after a failure still runs.
# Exit status: 0 all steps of these parts passed; 1 one failed; 2 wrong arguments.
set -uo pipefail
self=$(realpath "$0")
cd "$(dirname "$self")/.." || exit 2
python=${PYTHON:-python3}
results=benchmarks/results
work=build/bench
limit=470
declare -a chosen=() failed=()

# What the others need comes first, then by importance.
parts=(
  "build"
  "tests"
  "smoke"
  "identity-1"
  "identity-2"
  "identity-3"
  "identity-4"
  "identity-5"
  "model:qwen3-30b-a3b"
  "bench:qwen3-30b-a3b-25"
  "bench:qwen3-30b-a3b-100"
  "bench:qwen3-30b-a3b-12.5"
  "bench:qwen3-30b-a3b-50"
  "misses:qwen3-30b-a3b"
  "model:mixtral-8x7b"
  "bench:mixtral-8x7b-25"
  "bench:mixtral-8x7b-100"
  "bench:mixtral-8x7b-12.5"
  "bench:mixtral-8x7b-50"
  "misses:mixtral-8x7b"
)

# A path that was given relative to where the suite was called from.
from_caller() { case $1 in /*) echo "$1" ;; *) echo "$OLDPWD/$1" ;; esac; }

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$self"; }

describe() {
  case $1 in
    build) echo "compile csrc (the CPU core), check the machine" ;;
    tests) echo "the kernels against their rule; pytest -m 'gpu and not vllm': slots, copies, memory" ;;
    smoke) echo "bench_gpu.py --quick: every contestant on tiny models" ;;
    identity-*) echo "pytest -m 'gpu and vllm', ${1#identity-} of 5: tokens of resident vLLM" ;;
    model:*) echo "write the checkpoint; the benchmark does it too, in its own time" ;;
    bench:*) echo "bench_gpu.py --parts ${1#bench:}" ;;
    misses:*) echo "the same with words of any topic, at four shares of the experts" ;;
  esac
}

list() {
  local number
  for number in "${!parts[@]}"; do
    printf '%3d  %-26s %s\n' $((number + 1)) "${parts[number]}" "$(describe "${parts[number]}")"
  done
  echo "At most $limit s a part."
}

# ---- what parts do; each in a bash of its own, under `timeout` -----------------------------

kept() { # pattern: whether something is there that a build would replace
  compgen -G "$1" >/dev/null || return 1
  echo "kept, not built: $(compgen -G "$1" | paste -sd ' ') (remove it to have it built)"
}

do_build() {
  set -e
  kept "vllm_moe_offload/_core*.so" || "$python" setup.py --quiet build_ext --inplace
  kept "*.egg-info" || "$python" setup.py --quiet egg_info
  "$python" scripts/gpu_check.py
}

pytest() { "$python" -m pytest -q -p no:cacheprovider "$@"; }

do_tests() {
  local status=0
  "$python" scripts/gpu_kernels.py || status=$?
  pytest -m "gpu and not vllm" tests/gpu && return "$status"
}

do_identity() { # which fifth
  local ids count
  ids=$(pytest --collect-only -m "gpu and vllm" tests/gpu | grep '::')
  mapfile -t ids <<<"$ids"
  count=${#ids[@]}
  if [ "$count" -lt 5 ]; then
    echo "only $count tests were collected: ${ids[*]}"
    return 1
  fi
  local begin=$(((count * ($1 - 1)) / 5)) end=$(((count * $1) / 5))
  pytest "${ids[@]:begin:end-begin}"
}

do_smoke() {
  "$python" scripts/bench_gpu.py --quick --parts tiny-qwen3-25 --work-dir "$work" \
    --time-limit-s $((limit - 20))
}

do_model() { # its name
  "$python" scripts/bench_gpu.py --prepare --parts "$1-25" --work-dir "$work"
}

do_bench() { # which part of the benchmark
  "$python" scripts/bench_gpu.py --parts "$1" --work-dir "$work" --results "$results" \
    --time-limit-s $((limit - 20))
}

do_misses() { # of which model; the first of these shares is worth most
  "$python" scripts/bench_gpu.py --parts "$1"-{25,all-but-one,50,12.5}-misses --resident-once \
    --work-dir "$work" --results "$results" --total-limit-s $((limit - 20))
}

run_inner() { # name of a part
  case $1 in
    build) do_build ;;
    tests) do_tests ;;
    smoke) do_smoke ;;
    identity-*) do_identity "${1#identity-}" ;;
    model:*) do_model "${1#model:}" ;;
    bench:*) do_bench "${1#bench:}" ;;
    misses:*) do_misses "${1#misses:}" ;;
  esac
}

# ---- around them ---------------------------------------------------------------------------

run_part() { # number
  local name=${parts[$1 - 1]} status began=$SECONDS
  local log=$logs/${name//:/-}.log
  echo
  echo "=== part $1: $name, at most $limit s"
  timeout --kill-after=15 "$limit" "$self" --results "$results" --work-dir "$work" --limit "$limit" \
    --inner "$name" 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  echo "=== part $1: $name: status $status, $((SECONDS - began)) s"
  [ "$status" -eq 0 ] || failed+=("part $1: $name (status $status)")
  if ! "$python" scripts/gpu_report.py --results "$results" record "$name" --status "$status" \
    --seconds $((SECONDS - began)) --log "$log" >"$logs/record.log" 2>&1; then
    echo "not recorded:"
    cat "$logs/record.log"
    failed+=("part $1: $name could not be recorded")
  fi
}

while [ $# -gt 0 ]; do
  case $1 in
    --list) list; exit 0 ;;
    --help | -h) usage; exit 0 ;;
    --part | --results | --work-dir | --limit | --inner)
      if [ $# -lt 2 ]; then
        echo "$1 needs a value" >&2
        exit 2
      fi
      case $1 in
        --part)
          if ! [[ $2 =~ ^[0-9]+$ ]] || [ "$2" -lt 1 ] || [ "$2" -gt ${#parts[@]} ]; then
            echo "--part $2: parts are 1 to ${#parts[@]}; see --list" >&2
            exit 2
          fi
          chosen+=("$2")
          ;;
        --results) results=$(from_caller "$2") ;;
        --work-dir) work=$(from_caller "$2") ;;
        --limit) limit=$2 ;;
        --inner) inner=$2 ;;
      esac
      shift 2
      ;;
    *)
      echo "unknown argument $1" >&2
      usage >&2
      exit 2
      ;;
  esac
done

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ -n "${inner:-}" ]; then
  run_inner "$inner"
  exit
fi
logs=$work/suite
mkdir -p "$logs" "$results"
[ ${#chosen[@]} -gt 0 ] || mapfile -t chosen < <(seq ${#parts[@]})
for number in "${chosen[@]}"; do
  run_part "$number"
done
echo
"$python" scripts/gpu_report.py --results "$results"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
