"""A torchvision that can be imported and does nothing.

vLLM imports the package for most models that see, whether or not images come;
``requirements/cpu.lock`` leaves it out (its builds for CUDA break ``import transformers`` on a CPU
torch). Text needs nothing of it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAMES = (
    "torchvision",
    "torchvision.io",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)


class Double(ModuleType):
    """Has a class of every name that is asked for."""

    __path__: list[str] = []  # noqa: RUF012 (of a package)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextlib.contextmanager
def torchvision_double() -> Iterator[None]:
    """While open, ``import torchvision`` finds the double. To be opened after vLLM was imported."""
    modules = {name: Double(name) for name in NAMES}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    sys.modules.update(modules)
    try:
        yield
    finally:  # what was imported meanwhile stays: vLLM registers operators once
        for name in NAMES:
            del sys.modules[name]
