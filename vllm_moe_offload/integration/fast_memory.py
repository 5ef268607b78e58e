"""Where cached experts lie, by vLLM's platform: RAM of a CPU server, or a GPU's memory."""

from __future__ import annotations

import os
from typing import Any, Protocol

import psutil
from vllm.platforms import current_platform

from vllm_moe_offload.cache.planner import CacheShape
from vllm_moe_offload.cache.pool import SlotPool
from vllm_moe_offload.config import GIB, OffloadConfig
from vllm_moe_offload.integration.affinity import io_cpus
from vllm_moe_offload.plan.ways import Way
from vllm_moe_offload.runtime import OffloadRuntime
from vllm_moe_offload.store import ExpertStore
from vllm_moe_offload.transfer import Transfer, TransferEngine
from vllm_moe_offload.transfer.prefetch import MOST_IN_FLIGHT


class FastMemory(Protocol):
    """What serving from one kind of memory takes.

    Attributes:
        kv_cache_bytes: the KV cache's size, None if the user did not fix it.
    """

    kv_cache_bytes: int | None

    def available_bytes(self, layer: Any) -> int:
        """What experts and KV cache may take together; ``layer``: one of the model's."""

    def build(
        self, store: ExpertStore, shape: CacheShape, options: OffloadConfig
    ) -> tuple[SlotPool, Transfer]:
        """Slots for a cache that the host plans, and what fills them."""

    def way(
        self,
        shape: CacheShape,
        store: ExpertStore,
        layers: list[Any],
        draft_layers: list[Any],
        options: OffloadConfig,
    ) -> tuple[Way, str]:
        """Who plans, and why, in a few words; what follows from it for vLLM's graphs is set.

        Args:
            shape: of model and pool, without staging.
            store, layers, draft_layers, options: see ``startup.start_runtime``.
        """

    def attach(self, layers: list[Any], runtime: OffloadRuntime) -> None:
        """Prepares the layers' calls, beyond their parameters."""

    def most_prefetches(self, num_experts: int) -> int:
        """Prefetches under way at a time, however fast the link; ``num_experts`` of a layer."""


def fast_memory(vllm_config: Any) -> FastMemory:
    """That of the platform that vLLM runs on."""
    if current_platform.is_cuda():
        from vllm_moe_offload.integration.gpu_memory import GpuMemory

        return GpuMemory(vllm_config)
    return HostMemory(vllm_config)


class HostMemory:
    """RAM: the CPU platform's."""

    def __init__(self, vllm_config: Any) -> None:
        self._vllm_config = vllm_config
        self.kv_cache_bytes = vllm_config.cache_config.kv_cache_memory_bytes

    def available_bytes(self, layer: Any) -> int:
        """vLLM's share of RAM less what is used.

        As vLLM's CPU worker computes it: ``gpu_memory_utilization`` of the machine's memory,
        less this process's resident set; never more than the system says is available.
        """
        del layer
        memory = psutil.virtual_memory()
        requested = memory.total * self._vllm_config.cache_config.gpu_memory_utilization
        resident = psutil.Process(os.getpid()).memory_info().rss
        return int(min(requested - resident, memory.available - GIB // 2))

    def build(
        self, store: ExpertStore, shape: CacheShape, options: OffloadConfig
    ) -> tuple[SlotPool, Transfer]:
        """See :meth:`FastMemory.build`."""
        # With a slot for every expert, all are read in a moment.
        pool = SlotPool(store.layout, shape.num_pool_slots, populate=not shape.holds_everything)
        transfer = TransferEngine(
            store,
            pool.destinations(),
            num_threads=options.io_threads,
            cpus=io_cpus(),
            verify=options.verify,
        )
        return pool, transfer

    def way(
        self,
        shape: CacheShape,
        store: ExpertStore,
        layers: list[Any],
        draft_layers: list[Any],
        options: OffloadConfig,
    ) -> tuple[Way, str]:
        """See :meth:`FastMemory.way`: on a CPU there is nobody else."""
        del shape, store, layers, draft_layers, options
        return Way.HOST, ""

    def attach(self, layers: list[Any], runtime: OffloadRuntime) -> None:
        """See :meth:`FastMemory.attach`: nothing, the op in ``experts.py`` serves them."""

    def most_prefetches(self, num_experts: int) -> int:
        """See :meth:`FastMemory.most_prefetches`."""
        del num_experts
        return MOST_IN_FLIGHT
