"""Starts a worker whose GPU keeps all experts, or plans by itself which of them it keeps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from vllm_moe_offload.cache.planner import CacheShape
from vllm_moe_offload.cache.pool import SlotPool
from vllm_moe_offload.config import OffloadConfig
from vllm_moe_offload.device.arrivals import Event
from vllm_moe_offload.device.followers import Followers
from vllm_moe_offload.device.runtime import DeviceRuntime, PlannedCache
from vllm_moe_offload.integration.block_slots import ApplyOnSlots
from vllm_moe_offload.integration.experts import OffloadedExperts
from vllm_moe_offload.integration.fast_memory import FastMemory
from vllm_moe_offload.integration.layers.planned_on_device import (
    Cache,
    PlannedOnDevice,
    RecordedResident,
    RowsOfStep,
)
from vllm_moe_offload.metrics import Counters
from vllm_moe_offload.plan.ways import Way
from vllm_moe_offload.store import ExpertStore

logger = logging.getLogger("vllm.moe_offload")


class DeviceCache(Cache, PlannedCache, Protocol):
    """What is asked of a ``device.cache.DeviceCache`` here."""

    def attach(
        self, layout: Any, slots: dict[str, torch.Tensor], records: torch.Tensor
    ) -> None:
        """See ``device.cache.DeviceCache.attach``."""

    def warm_up(self, id_type: torch.dtype) -> None:
        """See ``device.cache.DeviceCache.warm_up``."""


class DeviceMemory(FastMemory, Protocol):
    """A :class:`FastMemory` whose device needs the host only between steps."""

    def pool(self, store: ExpertStore, num_slots: int, options: OffloadConfig) -> SlotPool:
        """Slots on the device, all zero."""

    def load_all(self, store: ExpertStore, pool: SlotPool, options: OffloadConfig) -> None:
        """Brings every expert into its slot, in store order; returns when all are there."""

    def records(
        self, store: ExpertStore, options: OffloadConfig
    ) -> tuple[torch.Tensor, Callable[[], None]]:
        """All records in host memory that the device reads: uint8 ``[experts, record bytes]`` with
        an address that holds there; and what gives it back."""

    def new_cache(
        self, *, num_layers: int, num_experts: int, num_slots: int, top_k: int
    ) -> DeviceCache:
        """On the device, for as many tokens as a step has at most."""

    def record_event(self) -> Event:
        """Marks where the device's stream is."""

    def kernel(self, layer: Any) -> ApplyOnSlots:
        """How the layer's experts are computed on slots."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be started.

    Attributes:
        way: resident, or planned by the device.
        shape: of model and pool; a pool on the device has no staging slots.
        layers: RoutedExperts, a drafter's behind the model's where all are resident.
        num_model_layers: of these, the model's.
    """

    way: Way
    shape: CacheShape
    layers: list[Any]
    num_model_layers: int


def start_on_device(
    memory: DeviceMemory,
    plan: Plan,
    *,
    options: OffloadConfig,
    store: ExpertStore,
    followers: Followers,
    published: Counters,
) -> DeviceRuntime:
    """Makes pool, cache and runtime, and points the layers' parameters at the pool."""
    shape, layers, top_k = plan.shape, plan.layers, plan.layers[0].top_k
    is_resident = plan.way is Way.RESIDENT
    pool = memory.pool(store, shape.num_pool_slots, options)
    cache: DeviceCache | None = None
    release: Callable[[], None] | None = None
    if not is_resident:
        records, release = memory.records(store, options)
        cache = memory.new_cache(
            num_layers=shape.num_layers,
            num_experts=shape.num_experts,
            num_slots=shape.num_pool_slots,
            top_k=top_k,
        )
        cache.attach(store.layout, pool.tensors, records)
        cache.warm_up(layers[0].quant_method.topk_indices_dtype or torch.int32)
    elif followers.wants_routing:
        cache = memory.new_cache(
            num_layers=plan.num_model_layers,
            num_experts=layers[0].global_num_experts,
            num_slots=1,
            top_k=top_k,
        )
    runtime = DeviceRuntime(
        cache,
        followers,
        num_layers=shape.num_layers,
        num_slots=shape.num_pool_slots,
        expert_bytes=store.layout.expert_bytes,
        is_resident=is_resident,
        record_event=memory.record_event,
        published=published,
        release=release,
    )
    if is_resident:
        memory.load_all(store, pool, options)
        _attach_resident(plan, pool, runtime, cache)
    else:
        assert cache is not None
        _attach_planned(memory, plan, pool, runtime, cache)
    return runtime


def _attach_planned(
    memory: DeviceMemory,
    plan: Plan,
    pool: SlotPool,
    runtime: DeviceRuntime,
    cache: DeviceCache,
) -> None:
    calls = PlannedOnDevice(cache, RowsOfStep(runtime.weights), memory.kernel(plan.layers[0]))
    for index, layer in enumerate(plan.layers):
        for name, tensor in pool.tensors.items():
            getattr(layer, name).data = tensor
        layer.moe_layer, layer.runtime, layer.calls = index, runtime, calls


def _attach_resident(
    plan: Plan, pool: SlotPool, runtime: DeviceRuntime, cache: DeviceCache | None
) -> None:
    """Layers see their own experts, in logical order, and are vLLM's own again."""
    recorded = None
    if cache is not None:
        recorded = RecordedResident(cache, RowsOfStep(runtime.weights))
    for index, layer in enumerate(plan.layers):
        begin = index * layer.local_num_experts
        for name, tensor in pool.tensors.items():
            getattr(layer, name).data = tensor[begin : begin + layer.local_num_experts]
        layer.moe_layer, layer.runtime = index, runtime
        if recorded is not None and index < plan.num_model_layers:
            layer.calls = recorded
        else:
            layer.forward_modular = super(OffloadedExperts, layer).forward_modular
