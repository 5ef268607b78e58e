"""Rounding to integers of a few bits, and eight of four bits in an int32."""

from __future__ import annotations

import torch
from torch import Tensor

PER_WORD = 8
"""Values of four bits in an int32."""


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """``[out, in]`` as float32 ``[out, groups, group_size]``."""
    return weight.float().reshape(weight.shape[0], -1, group_size)


def symmetric(groups: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Nearest multiples of one step per group, the largest at half a step from the range's end.

    Args:
        groups: float32 ``[out, groups, group_size]``.
        bits: of a value.
        dtype: of the scales.

    Returns:
        Values, int32 like ``groups`` from ``-2**(bits-1)``; scales ``[out, groups]``, by which
        they are to be multiplied.
    """
    high = 2 ** (bits - 1) - 1
    scale = usable(groups.abs().amax(dim=-1) / (high + 0.5), dtype)
    values = (groups / scale.float()[..., None]).round().clamp(-high - 1, high)
    return values.int(), scale


def asymmetric(groups: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`symmetric`, where the range is the group's own, zero included.

    Returns:
        Values, int32 like ``groups`` from 0; zero points, int32 ``[out, groups]``, to be taken
        off; scales.
    """
    top = 2**bits - 1
    low, high = groups.amin(dim=-1).clamp(max=0), groups.amax(dim=-1).clamp(min=0)
    scale = usable((high - low) / top, dtype)
    step = scale.float()
    zero = (-low / step).round().clamp(0, top)
    values = ((groups / step[..., None]).round() + zero[..., None]).clamp(0, top)
    return values.int(), zero.int(), scale


def usable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in ``dtype`` that can be divided by: a group of zeros has any."""
    rounded = scale.to(dtype)
    return rounded.masked_fill(rounded == 0, 1)


def packed(values: Tensor, dim: int, order: tuple[int, ...] = tuple(range(PER_WORD))) -> Tensor:
    """Eight neighbours in an int32, the first of ``order`` in the lowest four bits.

    Args:
        values: integers from 0 to 15, with a multiple of 8 along ``dim``.
        dim: the dimension that gets eight times shorter.
        order: which of eight neighbours lies at each place of a word.
    """
    last = values.int().movedim(dim, -1)
    eights = last.reshape(*last.shape[:-1], -1, PER_WORD)
    words = eights[..., order[0]].clone()
    for place, which in enumerate(order[1:], start=1):
        words |= eights[..., which] << 4 * place
    return words.movedim(-1, dim).contiguous()
