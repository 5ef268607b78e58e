"""Build of the C++ extension; everything else is declared in pyproject.toml.

Shared objects come out of ``csrc/``:

* ``_core``: planner and file reader behind a plain C ABI. No torch, no Python API;
  loaded with ctypes (``vllm_moe_offload/native.py``), also by replay and tests.
* ``_C``: the torch operators of the serving hot path (``csrc/bindings.cpp``).
* ``_cuda``: copies to CUDA devices (``csrc/cuda``), if nvcc is there. Everything but serving on
  a GPU works without it. ``VMO_CUDA=0`` leaves it out, ``VMO_CUDA=1`` makes it a must.

``VMO_SANITIZE=1`` builds ``_core`` with AddressSanitizer and UBSan (``make sanitize``).
"""

import os
import shutil
import subprocess
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


class BuildWithCuda(BuildExtension.with_options(use_ninja=False)):
    """The extensions, and the CUDA library beside them."""

    def run(self) -> None:
        super().run()
        wanted = os.environ.get("VMO_CUDA", "auto")
        if wanted not in {"0", "1", "auto"}:
            raise SystemExit(f"VMO_CUDA={wanted!r} is not 0, 1 or auto")
        found = os.environ.get("NVCC") or shutil.which("nvcc")
        if SANITIZE or wanted == "0" or (wanted == "auto" and not found):
            return
        core_path = self.get_ext_fullpath("vllm_moe_offload._core")
        target = Path(core_path).resolve().with_name("_cuda.so")
        script = Path(__file__).resolve().parent / "scripts" / "build_cuda.sh"
        built = subprocess.run([script, target], check=False)
        if built.returncode and wanted == "1":
            raise SystemExit("VMO_CUDA=1, but the CUDA library could not be built")
        if built.returncode:
            print("warning: no CUDA library; serving on a GPU will ask for `make cuda`")


setup(
    ext_modules=[core] if SANITIZE else [core, torch_ops],
    cmdclass={"build_ext": BuildWithCuda},
)
