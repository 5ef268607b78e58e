"""Situations that a test cannot make on the machine: called in the process of one command."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace


def without_core() -> None:
    """The native library was not built."""
    exists = Path.exists

    def without(path: Path) -> bool:
        return path.name != "_core.so" and exists(path)

    Path.exists = without  # type: ignore[method-assign, assignment]


def older_vllm() -> None:
    """A vLLM that is not supported."""
    import vllm

    vllm.__version__ = "0.31.0"


def unversioned_vllm() -> None:
    """A vLLM built from a checkout without tags."""
    import vllm

    vllm.__version__ = "main"


def vllm_without_a_hook() -> None:
    """A vLLM that lost a function which is patched."""
    from vllm.v1.engine import utils

    del utils.wait_for_engine_startup


def vllm_with_another_hook() -> None:
    """A vLLM in which a classmethod is none any more."""
    from vllm.engine.arg_utils import EngineArgs

    EngineArgs.from_cli_args = EngineArgs.from_cli_args.__func__


def another_user() -> None:
    """Somebody else than the owner of what there is."""
    os.geteuid = lambda: 12345


def nothing_writable() -> None:
    """Directories that may only be read."""
    os.access = lambda path, mode, **_: not mode & os.W_OK  # type: ignore[assignment]


def nothing_but_stores_writable() -> None:
    """Directories that may only be read, but for the store's."""
    os.access = lambda path, mode, **_: Path(path).name == "stores"  # type: ignore[assignment]


def full_disk() -> None:
    """A file system with one block left."""
    os.statvfs = lambda path: SimpleNamespace(f_bavail=1, f_frsize=4096)  # type: ignore[assignment]


def without_ray() -> None:
    """A machine where only vLLM was installed."""
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *more: (  # type: ignore[assignment]
        None if name == "ray" else find_spec(name, *more)
    )
