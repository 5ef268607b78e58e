#!/usr/bin/env bash
# Compiles csrc/cuda into one shared object, for all supported GPUs or for one (90: sm_90). No
# GPU is needed.
#   scripts/build_cuda.sh [OUT [ARCH]]     default: vllm_moe_offload/_cuda.so, all of them
# NVCC names the compiler; without it nvcc on the path, or that of NVIDIA's wheels if they are
# installed for PYTHON (default python3): stock vLLM brings them, as does
# requirements/cuda-compiler.lock.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-vllm_moe_offload/_cuda.so}
only=${2:-}

# Of the environment itself as well: pip builds in one that hides its packages from imports.
wheels=$("${PYTHON:-python3}" -c '
import os, sys, sysconfig
folders = (f"{path}/nvidia/cu13" for path in (*sys.path, sysconfig.get_path("purelib")))
print(next((folder for folder in folders if os.access(f"{folder}/bin/nvcc", os.X_OK)), ""))')
nvcc=${NVCC:-$(command -v nvcc || true)}
flags=()
if [[ -z $nvcc && -n $wheels ]]; then
  nvcc=$wheels/bin/nvcc
  flags+=(-I "$wheels/include" -L "$wheels/lib")
fi
if [[ -z $nvcc ]]; then
  echo "build_cuda.sh: no nvcc; put CUDA 13's on the path, name it in NVCC, or" \
    "pip install --no-deps -r requirements/cuda-compiler.lock" >&2
  exit 1
fi

for arch in ${only:-80 86 89 90 120}; do
  flags+=(-gencode "arch=compute_$arch,code=sm_$arch")
done
[[ -n $only ]] || flags+=(-gencode "arch=compute_120,code=compute_120") # what comes after sm_120
# The runtime is linked in and its symbols are hidden: whichever torch brings does not matter.
"$nvcc" -std=c++17 -O3 --shared -cudart static --threads 2 "${flags[@]}" \
  -Xcompiler -fPIC,-Wall,-Wextra,-fvisibility=hidden -Xlinker --exclude-libs,ALL \
  -o "$out.part" csrc/cuda/*.cpp csrc/cuda/*.cu
mv "$out.part" "$out"
echo "built $out with $("$nvcc" --version | sed -n 's/^Cuda compilation tools, //p')"
