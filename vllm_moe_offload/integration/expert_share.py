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
        experts: ids of the own ones in the model, by place.
    """

    def __init__(self, expert_map: torch.Tensor) -> None:
        """``expert_map``: vLLM's, int32 ``[num_experts]``: place of each own expert, else -1."""
        places = expert_map.to("cpu", torch.int32)
        own = torch.nonzero(places >= 0).flatten()
        self.experts: list[int] = own[places[own].argsort()].tolist()
        # One entry more: what the index NO_EXPERT, which is -1, finds.
        self._place_of = torch.cat([places, places.new_tensor([NO_EXPERT])])

    @classmethod
    def of(cls, layer: Any) -> ExpertShare | None:
        """That of a RoutedExperts; None if it has all experts of its layer."""
        expert_map = layer.expert_map
        return None if expert_map is None else cls(expert_map)

    def own_ids(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """Places of own experts, ``NO_EXPERT`` for others and padding; in RAM, like ``topk_ids``."""
        return self._place_of[topk_ids].to(topk_ids.dtype)

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
        anyway: any other's output could be infinite, which a weight of 0 does not take back.

        Args:
            kernel: computes all entries.
            x: ``[tokens, hidden]``.
            topk_weights: ``[tokens, top_k]``.
            own_ids: as :meth:`own_ids` gave them.
            slots: where own experts lie, like ``own_ids``; for others, where one of the token's
                own ones lies (:meth:`~vllm_moe_offload.runtime.OffloadRuntime.begin_layer`).

        Returns:
            ``[tokens, hidden]``; zeros where a token has no own expert.
        """
        is_other = own_ids == NO_EXPERT
        has_none = is_other.all(dim=1, keepdim=True)
        if has_none.all():
            return torch.zeros_like(x)
        out = kernel(x, topk_weights.masked_fill(is_other, 0), slots)
        return out.masked_fill_(has_none, 0)
