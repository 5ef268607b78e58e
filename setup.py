"""Build of the native libraries; everything else is declared in pyproject.toml.

Shared objects come out of ``csrc/``, none of which knows torch or Python:

* ``_core.so``: planner, layer calls, lookahead and file reader behind a plain C ABI, loaded with
  ctypes (``vllm_moe_offload/native.py``).
* ``_cuda.so``: copies to CUDA devices (``csrc/cuda``), if nvcc is there: in ``NVCC``, on the path,
  or among NVIDIA's wheels in the environment (``scripts/build_cuda.sh``). Everything but serving on
  a GPU works without it. ``VMO_CUDA=0`` leaves it out, ``VMO_CUDA=1`` makes it a must.

``VMO_SANITIZE=1`` builds ``_core.so`` with AddressSanitizer and UBSan (``make sanitize``).
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

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
SANITIZE_FLAGS = [
    # The last two are not part of "undefined": a float that no integer can hold, and x / 0.0.
    "-fsanitize=address,undefined,float-cast-overflow,float-divide-by-zero",
    "-fno-omit-frame-pointer",
    "-g",
]

core = Extension(
    "vllm_moe_offload._core",
    sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
    depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
    include_dirs=["csrc"],
    language="c++",
    extra_compile_args=CXX_FLAGS + (SANITIZE_FLAGS if SANITIZE else []),
    extra_link_args=["-pthread"] + (SANITIZE_FLAGS if SANITIZE else []),
)


class BuildLibraries(build_ext):
    """The core as a plain shared library, and the CUDA library beside it."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without the tag of a Python version, as any can load it."""
        return os.path.join(*fullname.split(".")) + ".so"

    def get_libraries(self, ext: Extension) -> list[str]:
        """Without libpython, also where Python's own extensions are linked with it."""
        return ext.libraries

    def run(self) -> None:
        super().run()
        wanted = os.environ.get("VMO_CUDA", "auto")
        if wanted not in {"0", "1", "auto"}:
            raise SystemExit(f"VMO_CUDA={wanted!r} is not 0, 1 or auto")
        if SANITIZE or wanted == "0":
            return
        target = Path(self.get_ext_fullpath(core.name)).resolve().with_name("_cuda.so")
        script = Path(__file__).resolve().parent / "scripts" / "build_cuda.sh"
        environment = {**os.environ, "PYTHON": sys.executable}
        built = subprocess.run([script, target], check=False, env=environment)
        if built.returncode and wanted == "1":
            raise SystemExit("VMO_CUDA=1, but the CUDA library could not be built")
        if built.returncode:
            print("warning: no CUDA library; serving on a GPU will say what to do")


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(
    ext_modules=[core],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
)
