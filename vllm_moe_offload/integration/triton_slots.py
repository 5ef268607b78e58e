"""vLLM's Triton experts on slots of the slot pool, with nothing else changed.

The kernel reads ``weights[expert_ids[block]]``. Everything before that line must see the
model as plain vLLM has it: ids in ``[0, E)`` when tokens are put in blocks, and E when the tile
sizes are chosen. So tokens are aligned by their logical ids, exactly as plain vLLM does, and
only the experts of the blocks are renamed, by one gather from the layer's *slot map*.

An ``expert_map`` cannot do that: with one, ``moe_align_block_size`` counts tokens by the ids
*behind* the map in an array for E experts, and slots of a pool reach further. It would also
take the decode path without alignment away, on which plain vLLM serves small batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import override_config

_slots: tuple[int, torch.Tensor] | None = None


@contextlib.contextmanager
def slots(num_experts: int, slot_map: torch.Tensor) -> Iterator[None]:
    """While open, Triton experts compute on pool slots.

    Args:
        num_experts: E, of the model's layer.
        slot_map: int32 ``[E + 1]`` on the device, slot of each expert; blocks of one with -1
            are zeros in the output, and nothing is read for them. The last entry is always
            -1: it is what the index -1 finds, the expert of padding
            (``VLLM_MOE_SKIP_PADDING``) and of blocks that no token is in.
    """
    global _slots
    before = _slots
    _slots = (num_experts, slot_map)
    try:
        yield
    finally:
        _slots = before


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
    if _slots is None:
        return original(
            topk_ids, config, num_tokens, top_k_num, global_num_experts, expert_map, **options
        )
    if expert_map is not None:
        raise RuntimeError("expert parallelism and the slot pool rename experts both")
    num_experts, slot_map = _slots
    token_ids, expert_ids, num_padded = original(
        topk_ids, config, num_tokens, top_k_num, num_experts, None, **options
    )
    return token_ids, slot_map[expert_ids], num_padded


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
    slot_map: torch.Tensor,
) -> torch.Tensor:
    """The layer's experts on pool slots.

    Args:
        layer: a RoutedExperts whose parameters are the pool's.
        x: ``[tokens, hidden]``.
        topk_weights, topk_ids: ``[tokens, top_k]``; logical ids.
        slot_map: see :func:`slots`.
    """
    config = tuning_config(layer, x, topk_ids.shape[1])
    override = override_config(config)
    override.__enter__()
    try:
        with slots(layer.local_num_experts, slot_map):
            return apply(layer, x, topk_weights, topk_ids)
    finally:
        # In a with statement an error would skip vLLM's restoring: it has no finally.
        override.__exit__(None, None, None)


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
