"""How stock vLLM is changed: loudly, once, and only a vLLM that is known."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

SUPPORTED = ">=0.32,<0.34"
"""Versions of vLLM; those of the extras in ``pyproject.toml``."""


class UnsupportedVLLM(RuntimeError):
    """The installed vLLM is not one that the plugin's patches were written for."""


def vllm_version() -> str:
    """Version of the installed vLLM, whichever distribution it came in."""
    import vllm

    return str(vllm.__version__)


def check_version() -> None:
    """Raises UnsupportedVLLM unless vLLM is one of :data:`SUPPORTED`."""
    version = vllm_version()
    try:
        is_supported = Version(version) in SpecifierSet(SUPPORTED, prereleases=True)
    except InvalidVersion as error:
        raise UnsupportedVLLM(f"cannot read the version of vLLM: {version!r}") from error
    if not is_supported:
        own = importlib.metadata.version("vllm-moe-offload")
        raise UnsupportedVLLM(
            f"vllm-moe-offload {own} supports vllm{SUPPORTED}, but vLLM {version} is installed. "
            "Install a supported vLLM, or uninstall vllm-moe-offload."
        )


def require(owner: Any, name: str) -> Any:
    """Attribute ``name`` of ``owner``, or UnsupportedVLLM naming what is missing."""
    found = inspect.getattr_static(owner, name, None)
    if found is None:
        where = getattr(owner, "__qualname__", getattr(owner, "__name__", repr(owner)))
        raise UnsupportedVLLM(
            f"vLLM {vllm_version()} has no {where}.{name}, which vllm-moe-offload hooks into; "
            f"supported is vllm{SUPPORTED}"
        )
    return getattr(owner, name)


def wrap(
    owner: Any,
    name: str,
    wrapper: Callable[..., Any],
    kind: type | None = None,
) -> None:
    """Replaces ``owner.name`` by ``wrapper(original, ...)``; once, even if called again.

    Args:
        owner: class or module.
        name: attribute to replace.
        wrapper: called with the original first, then the call's own arguments (for a
            classmethod: original already bound to the class, then the class).
        kind: None for a plain function or method, else ``staticmethod`` or ``classmethod``.
    """
    original = require(owner, name)
    if getattr(original, "__moe_offload__", False):
        return
    static = inspect.getattr_static(owner, name)
    if kind is not None and not isinstance(static, kind):
        raise UnsupportedVLLM(
            f"{owner.__qualname__}.{name} of vLLM {vllm_version()} is not a {kind.__name__}"
        )
    if kind is classmethod:
        function = static.__func__

        @functools.wraps(function)
        def on_class(cls: Any, *args: Any, **kwargs: Any) -> Any:
            bound = functools.partial(function, cls)
            return wrapper(bound, cls, *args, **kwargs)

        on_class.__moe_offload__ = True  # type: ignore[attr-defined]
        setattr(owner, name, classmethod(on_class))
        return

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    replacement.__moe_offload__ = True  # type: ignore[attr-defined]
    setattr(owner, name, staticmethod(replacement) if kind is staticmethod else replacement)
