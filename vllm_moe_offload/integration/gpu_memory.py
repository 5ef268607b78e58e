"""A GPU's memory: pool there, experts page-locked in host memory below it, the store below that."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

from vllm_moe_offload.cache.headroom import host_headroom
from vllm_moe_offload.cache.host_memory import probe
from vllm_moe_offload.cache.planner import CacheShape
from vllm_moe_offload.cache.pool import SlotPool
from vllm_moe_offload.cache.sizing import (
    auto_host_bytes,
    device_available_bytes,
    device_reserve_bytes,
    host_slots,
)
from vllm_moe_offload.config import GIB, OffloadConfig, OptionError, parse_cache_size
from vllm_moe_offload.device.arrivals import Event
from vllm_moe_offload.integration import captures
from vllm_moe_offload.integration.affinity import io_cpus
from vllm_moe_offload.integration.block_slots import ApplyOnSlots
from vllm_moe_offload.integration.device_calls import DeviceCalls
from vllm_moe_offload.integration.formats import format_of
from vllm_moe_offload.integration.placement import ranks_here
from vllm_moe_offload.plan.ways import Way, gpu_way
from vllm_moe_offload.runtime import OffloadRuntime
from vllm_moe_offload.store import ExpertStore
from vllm_moe_offload.transfer import Transfer
from vllm_moe_offload.transfer.cuda import cuda_transfer, filled_host_tier
from vllm_moe_offload.transfer.page_lock import PageLockError

if TYPE_CHECKING:
    from vllm_moe_offload.device.cache import DeviceCache

logger = logging.getLogger("vllm.moe_offload")


class GpuMemory:
    """See :class:`~vllm_moe_offload.integration.fast_memory.FastMemory`."""

    def __init__(self, vllm_config: Any) -> None:
        self._vllm_config = vllm_config
        self.kv_cache_bytes = vllm_config.cache_config.kv_cache_memory_bytes
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._num_host_slots = 0

    def available_bytes(self, layer: Any) -> int:
        """Of ``gpu_memory_utilization``: less the dense weights and an estimate of activations."""
        config = self._vllm_config
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        allocated = torch.cuda.memory_allocated(self.device)
        utilization = config.cache_config.gpu_memory_utilization
        kv_bytes = self.kv_cache_bytes
        reserve = device_reserve_bytes(
            max_tokens=config.scheduler_config.max_num_batched_tokens,
            max_requests=config.scheduler_config.max_num_seqs,
            top_k=layer.top_k,
            hidden_size=layer.hidden_size,
            intermediate_size=layer.intermediate_size_per_partition,
            vocab_size=config.model_config.get_vocab_size(),
            element_bytes=layer.params_dtype.itemsize,
        )
        available = device_available_bytes(
            total_bytes=total,
            free_bytes=free,
            allocated_bytes=allocated,
            utilization=utilization,
            reserve_bytes=reserve,
        )
        logger.info(
            "MoE offload: GPU memory %.2f GiB x gpu_memory_utilization %.2f, less %.2f GiB of "
            "other weights and %.2f GiB kept for activations and graphs (%.2f GiB are free) "
            "leaves %.2f GiB: %s for the KV cache, the rest for experts if there are as many",
            total / GIB,
            utilization,
            allocated / GIB,
            reserve / GIB,
            free / GIB,
            available / GIB,
            "a quarter" if kv_bytes is None else f"{kv_bytes / GIB:.2f} GiB",
        )
        return available

    def way(
        self,
        shape: CacheShape,
        store: ExpertStore,
        layers: list[Any],
        draft_layers: list[Any],
        options: OffloadConfig,
    ) -> tuple[Way, str]:
        """See :meth:`FastMemory.way`; what vLLM captures follows from it."""
        config = self._vllm_config
        if not shape.holds_everything:
            self._num_host_slots = self._host_slots(store, options)
        way, why = gpu_way(
            holds_everything=shape.holds_everything,
            quantization=config.model_config.quantization,
            expert_parallel=layers[0].share is not None,
            pipeline_parallel=config.parallel_config.pipeline_parallel_size > 1,
            drafter_has_experts=bool(draft_layers),
            tops_differ=len({layer.top_k for layer in layers}) > 1,
            num_slots=shape.num_pool_slots,
            num_host_slots=self._num_host_slots,
            num_total=store.num_layers * store.num_experts,
        )
        most_tokens = captures.EVERY_SIZE
        if shape.num_pool_slots < shape.num_experts:
            most_tokens = shape.num_pool_slots // layers[0].top_k
        captures.agree(config, why_host=why, most_tokens=most_tokens)
        return way, why

    # ---- the host plans --------------------------------------------------------------

    def build(
        self, store: ExpertStore, shape: CacheShape, options: OffloadConfig
    ) -> tuple[SlotPool, Transfer]:
        """See :meth:`FastMemory.build`; the host tier is filled when this returns."""
        pool = self.pool(store, shape.num_pool_slots, options)
        with self._progress() as progress:
            transfer = cuda_transfer(
                store,
                pool,
                host_slots=self._num_host_slots,
                num_threads=options.io_threads,
                cpus=io_cpus(),
                verify=options.verify,
                progress=progress,
            )
        return pool, transfer

    def attach(self, layers: list[Any], runtime: OffloadRuntime) -> None:
        """Layer calls go through one :class:`DeviceCalls`."""
        kernel = self.kernel(layers[0])
        calls = DeviceCalls(runtime, self.device, layers[0].local_num_experts, kernel)
        for layer in layers:
            layer.calls = calls

    def most_prefetches(self, num_experts: int) -> int:
        """See :meth:`FastMemory.most_prefetches`.

        A layer: while one computes on a long prompt, the next is streamed in.
        """
        return num_experts

    # ---- the device plans, or keeps everything: see DeviceMemory ---------------------------

    def pool(self, store: ExpertStore, num_slots: int, options: OffloadConfig) -> SlotPool:
        """See :meth:`DeviceMemory.pool`."""
        try:
            return SlotPool(store.layout, num_slots, device=self.device)
        except torch.OutOfMemoryError as error:
            free, _ = torch.cuda.mem_get_info(self.device)
            raise OptionError(
                f"moe-offload: cache_gb={options.cache_gb!r} needs "
                f"{num_slots * store.layout.expert_bytes / GIB:.2f} GiB of GPU memory, "
                f"but {free / GIB:.2f} GiB are free; lower it: {error}"
            ) from error

    def load_all(self, store: ExpertStore, pool: SlotPool, options: OffloadConfig) -> None:
        """See :meth:`DeviceMemory.load_all`: a layer at a time through host memory."""
        transfer = cuda_transfer(
            store,
            pool,
            host_slots=store.num_experts,
            num_threads=options.io_threads,
            cpus=io_cpus(),
            verify=options.verify,
        )
        try:
            with self._progress() as progress:
                for layer in range(store.num_layers):
                    first = layer * store.num_experts
                    transfer.read([(layer, e, first + e) for e in range(store.num_experts)])
                    progress(first + store.num_experts, store.num_layers * store.num_experts)
        finally:
            transfer.close()
        # The model will run on another stream than loading did.
        torch.cuda.synchronize(self.device)

    def records(
        self, store: ExpertStore, options: OffloadConfig
    ) -> tuple[torch.Tensor, Callable[[], None]]:
        """See :meth:`DeviceMemory.records`."""
        with self._progress() as progress:
            host, locked = filled_host_tier(
                store,
                self._num_host_slots,
                num_threads=options.io_threads,
                cpus=io_cpus(),
                verify=options.verify,
                progress=progress,
            )
        host.close()  # nothing is read from the file any more
        on_host = torch.from_numpy(host.arena)
        if (
            not on_host.is_pinned()
        ):  # else vLLM's function would copy all of it, and view the copy
            raise PageLockError(
                f"CUDA does not know {host.arena.nbytes / GIB:.2f} GiB of host memory as page-locked "
                "after it locked them, so the GPU cannot read them; lower host_gb, and the host plans"
            )
        on_device = get_accelerator_view_from_cpu_tensor(on_host)

        def release() -> None:
            torch.cuda.synchronize(self.device)
            locked.close()

        return on_device, release

    def new_cache(
        self, *, num_layers: int, num_experts: int, num_slots: int, top_k: int
    ) -> DeviceCache:
        """See :meth:`DeviceMemory.new_cache`."""
        from vllm_moe_offload.device.cache import DeviceCache

        return DeviceCache(
            num_layers=num_layers,
            num_experts=num_experts,
            num_slots=num_slots,
            top_k=top_k,
            max_tokens=self._vllm_config.scheduler_config.max_num_batched_tokens,
            device=self.device,
        )

    def record_event(self) -> Event:
        """See :meth:`DeviceMemory.record_event`."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def kernel(self, layer: Any) -> ApplyOnSlots:
        """See :meth:`DeviceMemory.kernel`."""
        kernel = format_of(layer).apply_on_slots
        if kernel is None:
            raise RuntimeError(f"{layer.layer_name} has experts of another platform")
        return kernel

    # ---- host memory -----------------------------------------------------------------

    @contextlib.contextmanager
    def _progress(self) -> Iterator[Callable[[int, int], None]]:
        with tqdm(
            desc="Reading experts into host memory",
            unit="expert",
            disable=not self._vllm_config.load_config.use_tqdm_on_load,
        ) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield progress

    def _host_slots(self, store: ExpertStore, options: OffloadConfig) -> int:
        total = store.num_layers * store.num_experts
        record_bytes = store.layout.record_bytes
        ranks = ranks_here(self._vllm_config)
        is_auto = parse_cache_size(options.host_gb)[0] == "auto"
        auto_bytes = spare_host_bytes(total * record_bytes, ranks) if is_auto else 0
        slots = host_slots(
            options.host_gb,
            record_bytes=record_bytes,
            num_layers=store.num_layers,
            num_experts=store.num_experts,
            auto_bytes=auto_bytes,
        )
        if not is_auto and slots * record_bytes > host_headroom().available_bytes:
            # RAM that grows has to before: Linux refuses a mapping of more than there is.
            spare_host_bytes(slots * record_bytes, ranks, floor_bytes=EXPLICIT_FLOOR_BYTES)
        logger.info(
            "MoE offload: host_gb=%s -> %.2f GiB: %d of %d experts page-locked in host memory%s",
            options.host_gb,
            slots * record_bytes / GIB,
            slots,
            total,
            "" if slots == total else "; the others are read from the store when they are used",
        )
        return slots


EXPLICIT_FLOOR_BYTES = GIB // 2
"""Stays available while RAM is made to grow for a size that the user gave."""
PROBE_WAIT_S = 0.1
"""A moment for a virtual machine to be given more memory."""


def spare_host_bytes(
    wanted_bytes: int, num_ranks: int, *, floor_bytes: int | None = None
) -> int:
    """What host memory has for the experts of one rank; the log says how that came about.

    Memory is touched to find out only if too little of it is said to be available. Ranks would
    take each other's probes for memory in use, so several of them believe what is said.

    Args:
        wanted_bytes: by a rank.
        num_ranks: of this server on this host.
        floor_bytes: see :func:`~vllm_moe_offload.cache.host_memory.probe`.
    """
    headroom = host_headroom()
    spare_bytes = auto_host_bytes(headroom, num_ranks)
    how = ""
    if spare_bytes < wanted_bytes and num_ranks == 1:
        probed = probe(wanted_bytes, host_headroom, _wait, floor_bytes=floor_bytes)
        headroom = probed.headroom
        spare_bytes = max(0, probed.spare_bytes)
        how = f" after {probed.touched_bytes / GIB:.2f} GiB were touched, to see if it grows"
    logger.info(
        "MoE offload: host memory: %.2f GiB of %.2f GiB available, says %s%s; %.2f GiB stay "
        "for the system: %.2f GiB for experts at most, %.2f GiB wanted",
        headroom.available_bytes / GIB,
        headroom.total_bytes / GIB,
        headroom.source,
        how,
        headroom.reserve_bytes / GIB,
        spare_bytes / GIB,
        wanted_bytes / GIB,
    )
    return spare_bytes


def _wait() -> None:
    time.sleep(PROBE_WAIT_S)
