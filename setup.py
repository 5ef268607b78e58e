"""Build of the C++ extension; everything else is declared in pyproject.toml.

Two shared objects come out of ``csrc/``:

* ``_core``: planner and file reader behind a plain C ABI. No torch, no Python API;
  loaded with ctypes (``vllm_moe_offload/native.py``), also by replay and tests.
* ``_C``: the torch operators of the serving hot path (``csrc/bindings.cpp``).

``VMO_SANITIZE=1`` builds ``_core`` with AddressSanitizer and UBSan (``make sanitize``).
"""

import os
from pathlib import Path

from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

CORE_SOURCES = [
    "csrc/planner.cpp",
    "csrc/lookahead.cpp",
    "csrc/serving.cpp",
    "csrc/follow.cpp",
    "csrc/file_reader.cpp",
    "csrc/c_api.cpp",
]
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))
# No fused multiply-add: scores must round alike on every machine, and as numpy rounds them.
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    "-ffp-contract=off",
]
SANITIZE = os.environ.get("VMO_SANITIZE") == "1"
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]

core = Extension(
    "vllm_moe_offload._core",
    sources=CORE_SOURCES,
    depends=HEADERS,
    include_dirs=["csrc"],
    language="c++",
    extra_compile_args=CXX_FLAGS + (SANITIZE_FLAGS if SANITIZE else []),
    extra_link_args=["-pthread"] + (SANITIZE_FLAGS if SANITIZE else []),
)
torch_ops = CppExtension(
    "vllm_moe_offload._C",
    sources=["csrc/bindings.cpp", *CORE_SOURCES],
    depends=HEADERS,
    include_dirs=["csrc"],
    extra_compile_args=CXX_FLAGS,
)

setup(
    ext_modules=[core] if SANITIZE else [core, torch_ops],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False)},
)
