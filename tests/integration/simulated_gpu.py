"""The way of a GPU server, run on a CPU: everything of it but kernels, streams and drivers.

The pool is behind a :class:`~tests.device_double.SimulatedDevice`: copies are late and out of
order, and a kernel runs when the stream lets it. Layer calls go through DeviceCalls and a slot
map; only the last step, a kernel that takes one, is vLLM's CPU kernel with the map applied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.device_double import SimulatedDevice
from vllm_moe_offload.cache.planner import CacheShape
from vllm_moe_offload.cache.pool import SlotPool
from vllm_moe_offload.config import OffloadConfig
from vllm_moe_offload.integration import block_slots, formats, marlin_slots, startup
from vllm_moe_offload.integration.block_slots import SlotMap
from vllm_moe_offload.integration.device_calls import DeviceCalls
from vllm_moe_offload.integration.fast_memory import HostMemory
from vllm_moe_offload.runtime import OffloadRuntime
from vllm_moe_offload.store import ExpertStore
from vllm_moe_offload.transfer import DeviceTransfer, HostTier

CPU = torch.device("cpu")


class SimulatedGpu(HostMemory):
    """A FastMemory whose slots are filled by a simulated copy engine."""

    def __init__(self, vllm_config: Any, host_share: float) -> None:
        super().__init__(vllm_config)
        self._host_share = host_share

    def build(
        self, store: ExpertStore, shape: CacheShape, options: OffloadConfig
    ) -> tuple[SlotPool, DeviceTransfer]:
        pool = SlotPool(store.layout, shape.num_pool_slots, device=CPU)
        host = HostTier(store, int(self._host_share * store.num_layers * store.num_experts))
        host.fill()
        self.device = SimulatedDevice(store.layout, host.arena, shape.num_pool_slots)
        self.device.slots = {
            name: tensor.view(shape.num_pool_slots, -1).view(torch.uint8).numpy()
            for name, tensor in pool.tensors.items()
        }
        return pool, DeviceTransfer(host, self.device)

    def attach(self, layers: list[Any], runtime: OffloadRuntime) -> None:
        calls = DeviceCalls(runtime, CPU, layers[0].local_num_experts, self.apply_on_slots)
        for layer in layers:
            layer.calls = calls

    def most_prefetches(self, num_experts: int) -> int:
        return num_experts

    def apply_on_slots(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        slot_map: SlotMap,
    ) -> torch.Tensor:
        """In place of a kernel with blocks; Marlin's is simulated (``simulated_marlin.py``)."""
        if formats.format_of(layer).moe_backend == "marlin":
            return self._run(
                lambda: marlin_slots.apply_on_slots(layer, x, topk_weights, topk_ids, slot_map)
            )
        rows = slot_map.slot_of[topk_ids.long()].to(topk_ids.dtype)
        weights = torch.where(rows >= 0, topk_weights, torch.zeros_like(topk_weights))
        return self._run(lambda: block_slots.apply(layer, x, weights, rows.clamp(min=0)))

    def _run(self, kernel: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Queues a kernel, and lets the device go on until it has run."""
        results: list[torch.Tensor] = []
        self.device.launch(lambda: results.append(kernel()))
        while not results:
            assert self.device.step(), "the kernel waits for a copy that never comes"
        return results[0]


@contextlib.contextmanager
def simulated_gpu(host_share: float) -> Iterator[None]:
    """While open, engines that start in this process serve as on a GPU."""

    def fast_memory(vllm_config: Any) -> SimulatedGpu:
        return SimulatedGpu(vllm_config, host_share)

    before = startup.fast_memory
    startup.fast_memory = fast_memory
    try:
        yield
    finally:
        startup.fast_memory = before
