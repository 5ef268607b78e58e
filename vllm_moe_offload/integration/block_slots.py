"""Experts of a GPU kernel on slots: which map is in force while the kernel is called.

vLLM's GPU kernels read ``weights[expert_ids[block]]``, where a block is a tile of tokens of one
expert. Everything before that must see the model as plain vLLM has it: ids in ``[0, E)`` when
tokens are put in blocks, and E when tile sizes are chosen. So tokens are aligned by their logical
ids, exactly as plain vLLM does, and only the experts of the blocks are renamed, by one gather from
the layer call's *slot map*. With expert parallelism E is the worker's number of experts, and vLLM's
``expert_map`` names the experts of blocks by their place among those, -1 for other workers'. How each
kernel is told is in ``triton_slots.py``, ``marlin_slots.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True, slots=True)
class SlotMap:
    """Where a layer call's experts lie.

    Attributes:
        num_experts: E, of the layer as this worker has it.
        slot_of: int32 ``[E + 1]`` on the device, slot of each expert, -1 for one that is absent.
            The last entry is what the index -1 finds, the expert of padding
            (``VLLM_MOE_SKIP_PADDING``) and of blocks that no token is in: -1, or where a device
            plans a valid slot.
        is_wave: absent experts are another call's; tokens get nothing from them. Otherwise only
            tokens that are thrown away (padding of a CUDA graph) have absent experts.
        rename: see :meth:`of_blocks`; None: a gather by torch. Whoever gives one has no absent
            experts: all have a slot.
    """

    num_experts: int
    slot_of: torch.Tensor
    is_wave: bool = False
    rename: Callable[[torch.Tensor], torch.Tensor] | None = None

    def of_blocks(self, expert_ids: torch.Tensor) -> torch.Tensor:
        """int32 like ``expert_ids``: the slots of the experts of blocks."""
        if self.rename is not None:
            return self.rename(expert_ids)
        return self.slot_of[expert_ids]

    def present(self, expert_map: torch.Tensor | None) -> torch.Tensor:
        """int32: an expert's own place, or -1 if it is absent.

        Args:
            expert_map: vLLM's, of the model's experts to places here or -1; None: these are the
                same, and the result is ``[E]``.
        """
        places = expert_map
        if places is None:
            places = torch.arange(
                self.num_experts, dtype=torch.int32, device=self.slot_of.device
            )
        return torch.where(self.slot_of[places] >= 0, places, -1).to(torch.int32)


class ApplyOnSlots(Protocol):
    """The layer's experts on pool slots, by one of vLLM's kernels."""

    def __call__(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        slot_map: SlotMap,
    ) -> torch.Tensor:
        """``[tokens, hidden]``.

        Args:
            layer: a RoutedExperts whose parameters are the pool's.
            x: ``[tokens, hidden]``.
            topk_weights, topk_ids: ``[tokens, top_k]``; logical ids.
            slot_map: where the experts are.
        """


_in_force: SlotMap | None = None


@contextlib.contextmanager
def on_slots(slot_map: SlotMap) -> Iterator[None]:
    """While open, vLLM's kernels compute on pool slots."""
    global _in_force
    before = _in_force
    _in_force = slot_map
    try:
        yield
    finally:
        _in_force = before


def slot_map_in_force() -> SlotMap | None:
    """That of the layer call that runs now; None: the kernel computes on the layer's own rows."""
    return _in_force


def apply(
    layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    """The layer's experts on its own parameters, as plain vLLM calls them."""
    return layer.quant_method.apply(
        layer=layer,
        x=x,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        shared_experts=None,
        shared_experts_input=None,
    )
