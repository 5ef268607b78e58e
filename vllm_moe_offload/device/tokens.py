"""What a layer call tells the cache that the device plans."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LayerTokens:
    """Who computes in a layer call.

    Attributes:
        ids: int32 or int64 ``[tokens, top_k]``, contiguous; of all ranks' experts.
        is_padding: bool ``[tokens]``; ids of such rows may be any.
        weights: int32 ``[tokens]`` or more, votes in fixed point (``rule.fixed_point``).
        expert_map: int32 ``[experts of the model]``, this rank's expert or -1; None: all are here.
    """

    ids: torch.Tensor
    is_padding: torch.Tensor
    weights: torch.Tensor
    expert_map: torch.Tensor | None = None
