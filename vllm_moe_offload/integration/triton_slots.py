"""vLLM's Triton experts on slots of the slot pool, with nothing else changed.

An ``expert_map`` cannot rename blocks to slots: with one, ``moe_align_block_size`` counts tokens by
the ids *behind* the map in an array for E experts, and slots of a pool reach further. It would also
take the decode path without alignment away, on which plain vLLM serves small batches. Where vLLM has
one itself, for expert parallelism, it is left in place and slots are named behind it. Blocks of the
expert -1 are zeros in the kernel's output, and nothing is read for them.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import override_config

from vllm_moe_offload.integration import block_slots
from vllm_moe_offload.integration.block_slots import SlotMap, on_slots, slot_map_in_force


def prepare_expert_assignment(  # noqa: PLR0917 (vLLM's signature)
    original: Any,
    topk_ids: torch.Tensor,
    config: dict[str, Any],
    num_tokens: int,
    top_k_num: int,
    global_num_experts: int,
    expert_map: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """``_prepare_expert_assignment`` of vLLM: blocks of tokens, and the expert of each.

    Without alignment blocks are the ids themselves, -1 for padding; with it, padding is in no
    block, and behind the last block that is used vLLM's kernel leaves -1 (0 in some versions),
    never garbage: the gather stays inside the map.
    """
    slot_map = slot_map_in_force()
    if slot_map is None:
        return original(
            topk_ids, config, num_tokens, top_k_num, global_num_experts, expert_map, **options
        )
    if expert_map is None:
        global_num_experts = slot_map.num_experts
    elif slot_map.is_wave:
        expert_map = slot_map.present(expert_map)
        # The sum over a token's experts asks vLLM's own map, so the rows of all blocks are written.
        options["ignore_invalid_experts"] = False
    token_ids, expert_ids, num_padded = original(
        topk_ids, config, num_tokens, top_k_num, global_num_experts, expert_map, **options
    )
    return token_ids, slot_map.of_blocks(expert_ids), num_padded


def tuning_config(layer: Any, x: torch.Tensor, top_k: int) -> dict[str, int]:
    """Tile sizes that plain vLLM would choose for this call.

    They follow from the number of experts among others, which vLLM reads off the weights'
    shape. Taken from the pool's slots, results would depend on the size of the cache.
    """
    from vllm.model_executor.layers.fused_moe.fused_moe import try_get_optimal_moe_config

    experts = layer.quant_method.moe_kernel.fused_experts
    return try_get_optimal_moe_config(
        (layer.local_num_experts, *layer.w13_weight.shape[1:]),
        (layer.local_num_experts, *layer.w2_weight.shape[1:]),
        top_k,
        experts.quant_config.config_name(x.dtype),
        x.shape[0],
        block_shape=experts.block_shape,
    )


def apply_on_slots(
    layer: Any,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    slot_map: SlotMap,
) -> torch.Tensor:
    """See :class:`~vllm_moe_offload.integration.block_slots.ApplyOnSlots`."""
    config = tuning_config(layer, x, topk_ids.shape[1])
    override = override_config(config)
    override.__enter__()
    try:
        with on_slots(slot_map):
            return block_slots.apply(layer, x, topk_weights, topk_ids)
    finally:
        # In a with statement an error would skip vLLM's restoring: it has no finally.
        override.__exit__(None, None, None)
