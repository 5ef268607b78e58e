"""Build of the native library; everything else is declared in pyproject.toml.

One shared object comes out of ``csrc/``, which knows neither torch nor Python: ``_core.so``, with
planner, layer calls, lookahead and file reader behind a plain C ABI, loaded with ctypes
(``vllm_moe_offload/native.py``). Nothing is compiled for GPUs: Triton does that where they are.

``VMO_SANITIZE=1`` builds it with AddressSanitizer and UBSan (``make sanitize``).
"""

import os
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


class BuildLibrary(build_ext):
    """The core as a plain shared library."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without the tag of a Python version, as any can load it."""
        return os.path.join(*fullname.split(".")) + ".so"

    def get_libraries(self, ext: Extension) -> list[str]:
        """Without libpython, also where Python's own extensions are linked with it."""
        return ext.libraries


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(
    ext_modules=[core],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
