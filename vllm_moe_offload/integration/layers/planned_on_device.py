"""Layer calls where the GPU plans its cache: two launches before vLLM's kernel, and nothing else.

The host knows shapes and nothing more, so a call may be captured in any of vLLM's CUDA graphs. In a
graph it makes no tensor, and it never waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from vllm.forward_context import get_forward_context

from vllm_moe_offload.device.tokens import LayerTokens
from vllm_moe_offload.integration import block_slots
from vllm_moe_offload.integration.block_slots import ApplyOnSlots, SlotMap


class Cache(Protocol):
    """What a layer call asks of a ``device.cache.DeviceCache``."""

    num_experts: int
    num_slots: int

    def bring(self, layer: int, tokens: LayerTokens) -> torch.Tensor:
        """See ``DeviceCache.bring``."""

    def waves(
        self, layer: int, tokens: LayerTokens
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See ``DeviceCache.waves``."""

    def rename(self, ids: torch.Tensor) -> torch.Tensor:
        """See ``DeviceCache.rename``."""

    def note(self, layer: int, tokens: LayerTokens) -> None:
        """See ``DeviceCache.note``."""


class RowsOfStep:
    """Which rows of a layer call are tokens, and what they count."""

    def __init__(self, weights: torch.Tensor) -> None:
        """``weights``: int32 ``[max_tokens]``, see ``DeviceRuntime``."""
        self._weights = weights
        self._nobody_pads = torch.zeros(len(weights), dtype=torch.bool, device=weights.device)

    def tokens(self, topk_ids: torch.Tensor) -> LayerTokens:
        """Of a call; ids ``[tokens, top_k]``.

        Padding is what vLLM says is padding: ids tell nothing, as some routers give padded rows
        experts like any other.
        """
        num_rows = topk_ids.shape[0]
        padding = get_forward_context().is_padding
        if padding is None:
            padding = self._nobody_pads
        return LayerTokens(topk_ids.contiguous(), padding[:num_rows], self._weights)


class PlannedOnDevice:
    """Serves the layer calls of one worker's model."""

    def __init__(self, cache: Cache, rows: RowsOfStep, apply_on_slots: ApplyOnSlots) -> None:
        """``apply_on_slots``: the layers' kernel."""
        self._cache = cache
        self._rows = rows
        self._apply_on_slots = apply_on_slots

    def forward(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        """One call of an offloaded layer, ``[tokens, hidden]``.

        Args:
            layer: the RoutedExperts.
            x: ``[tokens, hidden]``.
            topk_weights, topk_ids: ``[tokens, top_k]``, ids int32 or int64.
        """
        cache, tokens = self._cache, self._rows.tokens(topk_ids)
        if min(cache.num_experts, topk_ids.numel()) > cache.num_slots:
            return self._in_waves(layer, x, topk_weights, topk_ids, tokens)
        slot_of = cache.bring(layer.moe_layer, tokens)
        slot_map = SlotMap(cache.num_experts, slot_of, rename=cache.rename)
        return self._apply_on_slots(layer, x, topk_weights, topk_ids, slot_map)

    def _in_waves(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        tokens: LayerTokens,
    ) -> torch.Tensor:
        """Sum over subsets of the experts, in float32; experts outside a wave add nothing."""
        total = torch.zeros_like(x, dtype=torch.float32)
        for slot_of, in_wave in self._cache.waves(layer.moe_layer, tokens):
            present = torch.where(in_wave, slot_of, -1).to(torch.int32)
            slot_map = SlotMap(self._cache.num_experts, present, is_wave=True)
            total += self._apply_on_slots(layer, x, topk_weights, topk_ids, slot_map)
        return total.to(x.dtype)


class RecordedResident:
    """Layer calls of experts that are all resident, where somebody records their routing."""

    def __init__(self, cache: Cache, rows: RowsOfStep) -> None:
        """``cache``: for its log alone."""
        self._cache = cache
        self._rows = rows

    def forward(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        """See :meth:`PlannedOnDevice.forward`."""
        self._cache.note(layer.moe_layer, self._rows.tokens(topk_ids))
        return block_slots.apply(layer, x, topk_weights, topk_ids)
