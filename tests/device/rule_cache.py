"""The cache that a device plans, by the rule alone: what serving asks of it, without Triton."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from vllm_moe_offload.cache.layout import ExpertLayout
from vllm_moe_offload.device.rule import OnePool, Wave
from vllm_moe_offload.device.tokens import LayerTokens


class RuleCache:
    """A ``device.cache.DeviceCache`` on a CPU; the kernels' tests compare both, call by call.

    Attributes:
        num_calls_in_vain: layer calls so far that were for shapes only.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_experts: int,
        num_slots: int,
        top_k: int,
        max_tokens: int,
    ) -> None:
        self.num_layers, self.num_experts, self.num_slots = num_layers, num_experts, num_slots
        self.top_k = top_k
        self.pool = OnePool(num_layers, num_experts, num_slots)
        self.live = torch.zeros(1, dtype=torch.int32)
        self.log = torch.full((max_tokens, num_layers, top_k), -1, dtype=torch.int16)
        self.counters = torch.zeros(2, dtype=torch.int64)
        self.num_calls_in_vain = 0
        self._call_map = torch.zeros(num_experts + 1, dtype=torch.int32)
        self._in_wave = torch.zeros(num_experts + 1, dtype=torch.bool)

    @property
    def is_live(self) -> bool:
        return bool(self.live)

    def attach(
        self, layout: ExpertLayout, slots: Mapping[str, torch.Tensor], records: torch.Tensor
    ) -> None:
        """See ``DeviceCache.attach``."""
        self._records = records
        self._parts, begin = [], 0
        for spec in (*layout.direct, *layout.tail):
            rows = slots[spec.name].view(self.num_slots, -1).view(torch.uint8)
            self._parts.append((rows, slice(begin, begin + spec.nbytes)))
            begin += spec.nbytes

    def warm_up(self, id_type: torch.dtype) -> None:
        """There is nothing to compile."""

    def bring(self, layer: int, tokens: LayerTokens) -> torch.Tensor:
        """See ``DeviceCache.bring``."""
        self._observe(layer, tokens)
        return self._place(layer)

    def waves(
        self, layer: int, tokens: LayerTokens
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See ``DeviceCache.waves``: as many as the shapes may ask for."""
        self._observe(layer, tokens)
        most = min(self.num_experts, tokens.ids.numel())
        for _ in range(-(-most // self.num_slots)):
            yield self._place(layer), self._in_wave

    def rename(self, ids: torch.Tensor) -> torch.Tensor:
        """See ``DeviceCache.rename``."""
        known = (ids >= 0) & (ids < self.num_experts)
        return self._call_map[torch.where(known, ids, self.num_experts).long()]

    def note(self, layer: int, tokens: LayerTokens) -> None:
        """See ``DeviceCache.note``."""
        if self.is_live:
            ids = torch.where(tokens.is_padding[:, None], -1, tokens.ids)
            self.log[: len(ids), layer] = ids.to(torch.int16)

    def _observe(self, layer: int, tokens: LayerTokens) -> None:
        self.note(layer, tokens)
        if not self.is_live:
            self.num_calls_in_vain += 1
            return
        real = ~tokens.is_padding
        ids = tokens.ids[real].numpy()
        if tokens.expert_map is not None:
            ids = np.where(ids >= 0, tokens.expert_map.numpy()[ids], -1)
        self.pool.observe(layer, ids, tokens.weights[: len(real)][real].numpy())
        self.counters[:] = torch.tensor([self.pool.hits, self.pool.misses])

    def _place(self, layer: int) -> torch.Tensor:
        if not self.is_live:
            self._call_map.zero_()
            return self._call_map
        wave: Wave = self.pool.place(layer)
        for record, slot in wave.pairs.tolist():
            for rows, part in self._parts:
                rows[slot] = self._records[record, part]
        self._call_map[:] = torch.from_numpy(wave.call_map)
        self._in_wave[:] = torch.from_numpy(wave.in_wave)
        return self._call_map
