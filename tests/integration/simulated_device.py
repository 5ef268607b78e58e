"""A worker whose device plans its cache, run on a CPU: everything of it but kernels and streams.

Layer calls go through ``PlannedOnDevice`` and the runtime of a device. The cache is the rule itself
(:class:`~tests.device.rule_cache.RuleCache`) and really copies records into slots, so a plan that
is wrong gives tokens that are wrong. vLLM's CPU kernel computes on the slots. As in a CUDA graph,
rows are padded, with rows that mean nothing and that the router gave experts like any other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.forward_context import get_forward_context

from tests.device.late import LateEvent, LateStream
from tests.device.rule_cache import RuleCache
from vllm_moe_offload.cache.planner import CacheShape
from vllm_moe_offload.cache.pool import SlotPool
from vllm_moe_offload.config import OffloadConfig
from vllm_moe_offload.integration import block_slots, requests, start_on_device, startup
from vllm_moe_offload.integration.block_slots import ApplyOnSlots, SlotMap
from vllm_moe_offload.integration.fast_memory import HostMemory
from vllm_moe_offload.integration.layers import planned_on_device
from vllm_moe_offload.plan.ways import Way
from vllm_moe_offload.store import ExpertStore
from vllm_moe_offload.transfer import HostTier

GRAPH_ROWS = 8
"""Rows of layer calls are multiples of it."""


class SimulatedDevice(HostMemory):
    """A DeviceMemory on a CPU; events are ``late`` by so many others."""

    def __init__(self, vllm_config: Any, late: int) -> None:
        super().__init__(vllm_config)
        self._stream = LateStream(late)

    def way(
        self,
        shape: CacheShape,
        store: ExpertStore,
        layers: list[Any],
        draft_layers: list[Any],
        options: OffloadConfig,
    ) -> tuple[Way, str]:
        return Way.RESIDENT if shape.holds_everything else Way.DEVICE, ""

    def pool(self, store: ExpertStore, num_slots: int, options: OffloadConfig) -> SlotPool:
        return SlotPool(store.layout, num_slots)

    def _host(self, store: ExpertStore) -> HostTier:
        host = HostTier(store, store.num_layers * store.num_experts)
        host.fill()
        host.close()
        return host

    def load_all(self, store: ExpertStore, pool: SlotPool, options: OffloadConfig) -> None:
        records = torch.from_numpy(self._host(store).arena)
        begin = 0
        for spec in (*store.layout.direct, *store.layout.tail):
            rows = pool.tensors[spec.name].view(pool.num_slots, -1).view(torch.uint8)
            rows.copy_(records[:, begin : begin + spec.nbytes])
            begin += spec.nbytes

    def records(
        self, store: ExpertStore, options: OffloadConfig
    ) -> tuple[torch.Tensor, Callable[[], None]]:
        return torch.from_numpy(self._host(store).arena), lambda: None

    def new_cache(
        self, *, num_layers: int, num_experts: int, num_slots: int, top_k: int
    ) -> RuleCache:
        return RuleCache(
            num_layers=num_layers,
            num_experts=num_experts,
            num_slots=num_slots,
            top_k=top_k,
            max_tokens=self._vllm_config.scheduler_config.max_num_batched_tokens + GRAPH_ROWS,
        )

    def record_event(self) -> LateEvent:
        return self._stream.record()

    def kernel(self, layer: Any) -> ApplyOnSlots:
        return kernel_on_slots


def kernel_on_slots(
    layer: Any,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    slot_map: SlotMap,
) -> torch.Tensor:
    """vLLM's CPU kernel with slots for ids. As on a GPU nothing but a wave may have an absent
    expert: a kernel would read before the weights."""
    if slot_map.is_wave:
        rows = slot_map.slot_of[topk_ids.long()]
        topk_weights = torch.where(rows >= 0, topk_weights, torch.zeros_like(topk_weights))
        rows = rows.clamp(min=0)
    else:
        rows = slot_map.of_blocks(topk_ids)
        assert bool((rows >= 0).all()), "an expert without a slot"
    return block_slots.apply(layer, x, topk_weights, rows.to(topk_ids.dtype))


class PaddedCalls(planned_on_device.PlannedOnDevice):
    """Layer calls of a captured graph: rows beyond the step's are there, and mean nothing. The router
    gave them experts that no token of the call asked for, as far as there are any."""

    def forward(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        num_tokens, num_rows = len(x), -(-len(x) // GRAPH_ROWS) * GRAPH_ROWS
        num_padded = num_rows - num_tokens
        asked = torch.bincount(topk_ids.flatten().long(), minlength=layer.global_num_experts)
        foreign = asked.argsort(stable=True)[: topk_ids.shape[1]].to(topk_ids.dtype)
        context = get_forward_context()
        before = context.is_padding
        context.is_padding = torch.arange(num_rows) >= num_tokens
        if before is not None:
            context.is_padding[:num_tokens] |= before[:num_tokens]
        try:
            out = super().forward(
                layer,
                torch.cat([x, torch.randn(num_padded, x.shape[1]).to(x.dtype)]),
                torch.cat([topk_weights, topk_weights[:1].expand(num_padded, -1)]),
                torch.cat([topk_ids, foreign.expand(num_padded, -1)]),
            )
        finally:
            context.is_padding = before
        return out[:num_tokens]


def opaque(runner: Any) -> Callable[..., Any]:
    """The operator that vLLM's compiled graphs call on a GPU; on a CPU they look into it."""
    if runner._shared_experts is None:
        return torch.ops.vllm.moe_forward
    return torch.ops.vllm.moe_forward_shared


@contextlib.contextmanager
def simulated_device(late: int) -> Iterator[None]:
    """While open, engines that start in this process serve as on a GPU that plans."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.v1.worker.cpu_worker import CPUWorker

    before = (
        startup.fast_memory,
        start_on_device.PlannedOnDevice,
        CPUWorker.compile_or_warm_up_model,
        MoERunner._select_forward,
    )
    startup.fast_memory = lambda vllm_config: SimulatedDevice(vllm_config, late)
    start_on_device.PlannedOnDevice = PaddedCalls

    def warm_up(self: Any, *args: Any, **kwargs: Any) -> Any:
        return requests.last_warm_up(before[2], self, *args, **kwargs)

    CPUWorker.compile_or_warm_up_model = warm_up
    MoERunner._select_forward = opaque
    try:
        yield
    finally:
        (
            startup.fast_memory,
            start_on_device.PlannedOnDevice,
            CPUWorker.compile_or_warm_up_model,
            MoERunner._select_forward,
        ) = before
