"""Four bits of floating point (e2m1), two values a byte."""

from __future__ import annotations

import torch
from torch import Tensor

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What three bits stand for; the fourth, the highest, is the sign."""
LARGEST = MAGNITUDES[-1]


def nearest(values: Tensor) -> Tensor:
    """uint8 ``[..., n / 2]`` of ``[..., n]``: the nearest values that there are, the first of two
    in the low bits."""
    known = torch.tensor(MAGNITUDES)
    code = torch.bucketize(values.abs(), (known[1:] + known[:-1]) / 2)
    code = (code + 8 * (values < 0)).to(torch.uint8)
    return code[..., 0::2] | (code[..., 1::2] << 4)
