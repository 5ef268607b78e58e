"""Shapes for a number of gigabytes, and for what the command line leaves open."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from scripts.demo_model.architectures import (
    ALIGNMENT,
    ARCHS,
    DemoModelError,
    Shape,
    check_shape,
    expert_bytes,
)

_CHOICES: dict[str, Sequence[int]] = {
    "layers": range(2, 49),
    "experts": (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256),
    "hidden": (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096),
}
_WIDTHS = (*range(32, 1024, 32), *range(1024, 14337, 128))
_RELUCTANCE = {"layers": 1.0, "experts": 1.0, "hidden": 4.0, "intermediate": 4.0}
_SIZE_TOLERANCE = 0.05


def fit_shape(arch: str, gigabytes: float, fixed: dict[str, int]) -> Shape:
    """Shape with about ``gigabytes`` (1e9 bytes) of experts, near the default's proportions.

    Layers and experts change first, dimensions half as readily.

    Args:
        fixed: fields of :class:`Shape` that must keep the given value.

    Raises:
        DemoModelError: no shape with the fixed fields comes close to the size.
    """
    if not (math.isfinite(gigabytes) and gigabytes > 0):
        raise DemoModelError(f"experts-gb is {gigabytes}; it must be a positive number of GB")
    default = replace(ARCHS[arch].default, **fixed)

    def miss(shape: Shape) -> float:
        return abs(expert_bytes(arch, shape) / (gigabytes * 1e9) - 1)

    def cost(shape: Shape) -> float:
        stretch = [
            math.log(getattr(shape, name) / getattr(default, name)) ** 2 * reluctance
            for name, reluctance in _RELUCTANCE.items()
        ]
        return miss(shape) + sum(stretch)

    candidates = list(_candidates(arch, gigabytes, default, fixed))
    near = [shape for shape in candidates if miss(shape) <= _SIZE_TOLERANCE]
    if not near:
        held = ", ".join(f"{k}={v}" for k, v in fixed.items()) or "every shape considered"
        sizes = [expert_bytes(arch, shape) / 1e9 for shape in candidates]
        raise DemoModelError(
            f"experts-gb is {gigabytes:g}; with {held} no {arch} model comes within "
            f"{_SIZE_TOLERANCE:.0%} of it (the nearest has "
            f"{min(sizes, key=lambda size: abs(size - gigabytes)):.3g} GB)"
        )
    return min(near, key=cost)


def _candidates(
    arch: str, gigabytes: float, default: Shape, fixed: dict[str, int]
) -> Iterator[Shape]:
    """Shapes around ``gigabytes``: all layers, experts and hidden sizes, two widths each."""
    free = [name for name in _CHOICES if name not in fixed]
    for values in product(*(_CHOICES[name] for name in free)):
        shape = replace(default, **dict(zip(free, values, strict=True)))
        if shape.top_k > shape.experts or shape.layers <= ARCHS[arch].dense_layers:
            continue
        if "intermediate" in fixed:
            yield shape
            continue
        one = expert_bytes(arch, replace(shape, intermediate=ALIGNMENT)) / ALIGNMENT
        above = bisect_left(_WIDTHS, gigabytes * 1e9 / one)
        for width in _WIDTHS[max(above - 1, 0) : above + 1]:
            yield replace(shape, intermediate=width)


def resolve_shape(arch: str, gigabytes: float | None, flags: dict[str, int | None]) -> Shape:
    """Shape from the command line: explicit flags win, then the size, then the default."""
    fixed = {name: value for name, value in flags.items() if value is not None}
    default = ARCHS[arch].default
    if "experts" in fixed and "top_k" not in fixed:
        fixed["top_k"] = max(1, min(default.top_k, fixed["experts"]))
    shape = replace(default, **fixed)
    if gigabytes is not None and "experts" not in fixed:
        shape = replace(shape, experts=max(shape.experts, shape.top_k))
    # Before the size: an impossible flag is reported as such, not as an unreachable size.
    check_shape(arch, shape)
    return shape if gigabytes is None else fit_shape(arch, gigabytes, fixed)
