#!/usr/bin/env bash
# Tests of the Triton kernels with every Triton of requirements/triton.txt; needs no GPU. Interpreted and
# compiled tests are two processes, because Triton chooses between the two when it is imported.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$PWD/.venv/bin/python
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export VMO_TRITON_TESTS=1 OMP_NUM_THREADS=1
export TRITON_CACHE_DIR=$scratch/cache  # or what an earlier run compiled would not be compiled

versions=$(sed -n 's/^triton==\([0-9.]*\).*/\1/p' requirements/triton.txt)
for version in $versions; do
  at=$PWD/.venv/triton/$version
  if [ ! -d "$at" ]; then
    "$python" -m pip install --quiet --no-deps --target "$scratch/$version" "triton==$version"
    mkdir -p "${at%/*}"
    mv "$scratch/$version" "$at"  # whole, or not there
  fi
  echo "Triton $version"
  export PYTHONPATH=$PWD:$at
  TRITON_INTERPRET=1 "$python" -m pytest -q tests/device/kernels >"$scratch/interpreted" 2>&1 &
  interpreted=$!
  status=0
  "$python" -m pytest -q -s tests/device/kernels || status=$?
  wait "$interpreted" || status=$?
  cat "$scratch/interpreted"
  [ "$status" = 0 ] || exit "$status"
done
