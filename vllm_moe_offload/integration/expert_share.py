"""Expert parallelism: a rank has some of a layer's experts, whole ones.

Every rank sees all tokens and their routing, computes what its own experts give, and vLLM sums over
ranks. Everything below this module knows own experts alone, by their place among them; an id of
another rank's is ``NO_EXPERT`` there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm_moe_offload.native import NO_EXPERT

Apply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Experts on ``x [tokens, hidden]``, ``topk_weights`` and slots ``[tokens, top_k]``."""


class ExpertShare:
    """The experts of one layer that this rank has, as vLLM placed them.

    Attributes:
        num_experts: of the whole layer.
        experts: ids of the own ones in the model, by place.
    """

    def __init__(self, expert_map: torch.Tensor) -> None:
        """``expert_map``: vLLM's, int32 ``[num_experts]``: place of each own expert, else -1."""
        self._place_of = expert_map.to("cpu", torch.int32)
        self.num_experts = expert_map.numel()
        own = torch.nonzero(self._place_of >= 0).flatten()
        self.experts: list[int] = own[self._place_of[own].argsort()].tolist()

    @classmethod
    def of(cls, layer: Any) -> ExpertShare | None:
        """That of a RoutedExperts; None if it has all experts of its layer."""
        expert_map = layer.expert_map
        return None if expert_map is None else cls(expert_map)

    def own_ids(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """Places of own experts, ``NO_EXPERT`` for others and padding; in RAM, like ``topk_ids``."""
        places = self._place_of[topk_ids.clamp(min=0).long()].to(topk_ids.dtype)
        return places.masked_fill_(topk_ids == NO_EXPERT, NO_EXPERT)

    @staticmethod
    def apply(
        kernel: Apply,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        own_ids: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """What own experts give, by a kernel that knows of no others.

        Entries of others weigh nothing, and compute on an expert that the same token has here
        anyway: any other's output could be infinite, which no weight of 0 takes back.

        Args:
            kernel: computes all entries.
            x: ``[tokens, hidden]``.
            topk_weights: ``[tokens, top_k]``.
            own_ids: as :meth:`own_ids` gave them.
            slots: where own experts lie, like ``own_ids``; anything elsewhere.

        Returns:
            ``[tokens, hidden]``; zeros where a token has no own expert.
        """
        is_own = own_ids != NO_EXPERT
        has_own = is_own.any(dim=1, keepdim=True)
        if not has_own.any():
            return torch.zeros_like(x)
        first_own = is_own.to(torch.uint8).argmax(dim=1, keepdim=True)
        stand_in = slots.gather(1, first_own)
        some_slot = slots[is_own][:1].unsqueeze(0)
        stand_in = torch.where(has_own, stand_in, some_slot)
        out = kernel(
            x,
            topk_weights.masked_fill(~is_own, 0),
            torch.where(is_own, slots, stand_in),
        )
        return out.masked_fill_(~has_own, 0)
