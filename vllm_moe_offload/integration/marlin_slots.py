"""vLLM's Marlin experts (int4, MXFP4, NVFP4, and FP8 before SM89) on slots of the slot pool.

The kernel takes block experts as they come and checks nothing: -1 would read before the weights.
So no -1 ever reaches it. In a wave, tokens of absent experts are left out when blocks are formed, by
an ``expert_map`` that holds logical ids or -1, and the sum over a token's experts gets the same
map: it would add rows that nobody wrote. Where only padding has absent experts, its blocks stay, on
slot 0: how Marlin divides its work over the device, and so how it rounds, follows from their number.

Tile sizes follow from E, which vLLM reads off the weights' shape: the kernel gets views of the
pool's first E slots. It computes addresses from their beginning; all slots are within the pool.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from vllm_moe_offload.integration import block_slots
from vllm_moe_offload.integration.block_slots import SlotMap, on_slots, slot_map_in_force
from vllm_moe_offload.integration.patching import (
    UnsupportedVLLM,
    require,
    vllm_version,
    wrap,
)

ROWS_PER_EXPERT = (
    "w1",
    "w2",
    "bias1",
    "bias2",
    "w1_scale",
    "w2_scale",
    "global_scale1",
    "global_scale2",
    "w1_zeros",
    "w2_zeros",
)
"""Arguments of ``fused_marlin_moe`` that are indexed by expert."""


# --------------------------------------------------------------------------------------
# marlin_moe.fused_marlin_moe, .moe_align_block_size
# (model_executor/layers/fused_moe/experts/marlin_moe.py)
#   why: as for Triton's experts, blocks are formed from logical ids and renamed afterwards;
#     the kernel gets a view of E slots, and tokens of other waves are left out.
#   upstream: csrc/moe/marlin_moe_wna16 (expert_ids are used unchecked, E chooses the tiles).
#   remove when: FusedMoE takes a map from block experts to rows of the weights.
def install() -> None:
    """Has Marlin experts ask for the slot map.

    Raises:
        UnsupportedVLLM: ``fused_marlin_moe`` does not take what is changed in its calls.
    """
    from vllm.model_executor.layers.fused_moe.experts import marlin_moe

    known = inspect.signature(require(marlin_moe, "fused_marlin_moe")).parameters
    missing = [name for name in (*ROWS_PER_EXPERT, "expert_map") if name not in known]
    if missing:
        raise UnsupportedVLLM(
            f"fused_marlin_moe of vLLM {vllm_version()} takes no {', '.join(missing)}"
        )
    wrap(marlin_moe, "fused_marlin_moe", fused_marlin_moe)
    wrap(marlin_moe, "moe_align_block_size", moe_align_block_size)


def fused_marlin_moe(original: Any, **call: Any) -> torch.Tensor:
    """``fused_marlin_moe`` of vLLM, which MarlinExperts calls by keyword."""
    slot_map = slot_map_in_force()
    if slot_map is None:
        return original(**call)
    for name in ROWS_PER_EXPERT:
        tensor = call.get(name)
        if tensor is not None:
            call[name] = tensor[: slot_map.num_experts]
    if slot_map.is_wave:
        call["expert_map"] = slot_map.present(call.get("expert_map"))
    return original(**call)


def moe_align_block_size(
    original: Any, topk_ids: torch.Tensor, *args: Any, **options: Any
) -> tuple[torch.Tensor, ...]:
    """``moe_align_block_size`` as the Marlin experts call it: block experts are slots."""
    slot_map = slot_map_in_force()
    if slot_map is None:
        return original(topk_ids, *args, **options)
    token_ids, expert_ids, num_padded = original(topk_ids, *args, **options)
    return token_ids, slot_map.of_blocks(expert_ids).clamp_(min=0), num_padded


def apply_on_slots(
    layer: Any,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    slot_map: SlotMap,
) -> torch.Tensor:
    """See :class:`~vllm_moe_offload.integration.block_slots.ApplyOnSlots`."""
    with on_slots(slot_map):
        return block_slots.apply(layer, x, topk_weights, topk_ids)
