"""Transfers of every kind over small stores, and what their slots hold."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.device_double import SimulatedDevice
from tests.stores import layer_tensors, slots_for
from tests.streams_double import LockedDouble, StreamsDouble
from vllm_moe_offload.store import ExpertStore
from vllm_moe_offload.transfer import DeviceTransfer, Flight, HostTier, TransferEngine
from vllm_moe_offload.transfer.torch_copier import TorchCopier

ALL = 10_000
"""Host slots: more than any store here has experts."""

NUM_SLOTS = 8

BY_STREAMS = "over a cache in host memory, by torch's streams"

HOST_SLOTS = {
    "into memory": 0,
    "over a cache in host memory": 6,
    BY_STREAMS: 6,
    "out of host memory": ALL,
}
"""Every kind of transfer, and how many host slots it has."""

expected_layer = functools.lru_cache(maxsize=8)(layer_tensors)


class Interrupted(BaseException):
    """Raised by a handler of signals, as KeyboardInterrupt is."""


def assert_holds(store, slots, slot: int, layer: int, expert: int) -> None:
    tensors = expected_layer(store.layout, store.num_experts, layer)
    for name, wanted in tensors.items():
        assert (slots[name][slot] == wanted[expert]).all(), (name, slot, layer, expert)


def assert_untouched(slots, slot: int) -> None:
    assert all((array[slot] == 0xEE).all() for array in slots.values())


def kernel(store, device, *requests) -> None:
    """Puts a kernel on the device that reads these slots; synchronise to have it checked."""

    def check():
        for layer, expert, slot in requests:
            assert_holds(store, device.slots, slot, layer, expert)

    device.launch(check)


def wait_for_prefetches(transfer, count: int) -> list[Flight]:
    ended: list[Flight] = []
    deadline = time.monotonic() + 20
    while len(ended) < count and time.monotonic() < deadline:
        transfer.prefetch([])
        if transfer.has_news:
            ended += transfer.poll()
        time.sleep(0.0005)
    return ended


def device_parts(store, host_slots=ALL, num_slots=NUM_SLOTS, seed=0, fill=None, **options):
    """A transfer onto a simulated device, the device, and the host tier."""
    host = HostTier(store, host_slots, **options)
    if fill or (fill is None and host.holds_everything):
        host.fill()
    device = SimulatedDevice(store.layout, host.arena, num_slots, seed)
    return DeviceTransfer(host, device), device, host


@dataclass
class Rig:
    """A transfer of some kind, and what can be seen of it.

    Attributes:
        slots: of the pool, filled with 0xEE at first.
        files: who reads the store's file.
    """

    store: ExpertStore
    transfer: Any
    slots: dict[str, np.ndarray]
    files: TransferEngine
    host: HostTier | None = None
    device: SimulatedDevice | StreamsDouble | None = None

    def assert_kernels_find(self, *requests: tuple[int, int, int]) -> None:
        """Those that are launched now."""
        if self.device is not None:
            kernel(self.store, self.device, *requests)
            self.device.synchronize()
        for layer, expert, slot in requests:
            assert_holds(self.store, self.slots, slot, layer, expert)

    def wait_until_begun(self, slot: int) -> None:
        """Until bytes of the first prefetch there is, into ``slot``, are being moved."""
        if self.host is None:
            while (self.slots["t0"][slot, :64] == 0xEE).all():
                time.sleep(0.0001)
        elif not self.host.holds_everything:  # else the device was given its copy already
            while not self.host.arena[:, :64].any():
                time.sleep(0.0001)

    def assert_untouched(self, *slots: int) -> None:
        if self.device is not None:
            self.device.synchronize()
        for slot in slots:
            assert_untouched(self.slots, slot)

    def assert_nothing_is_under_way(self) -> None:
        self.transfer.drain()
        assert not self.transfer.poll()
        assert not self.transfer.has_news
        if self.device is not None:
            self.device.synchronize()
            self.transfer.poll()
            assert self.host.slots.num_held == self._num_tickets() == 0

    def _num_tickets(self) -> int:
        """Tickets that were not released."""
        copier = self.transfer._copier
        if isinstance(copier, TorchCopier):
            return len(copier._tickets_in_use)
        return copier.num_tickets


def rig_of(kind: str, store: ExpertStore, num_slots: int = NUM_SLOTS, **options) -> Rig:
    """``options``: as of :class:`TransferEngine`."""
    if not HOST_SLOTS[kind]:
        slots = slots_for(store.layout, num_slots)
        engine = TransferEngine(store, slots, **options)
        return Rig(store, engine, slots, engine)
    if kind == BY_STREAMS:
        return _rig_by_streams(store, num_slots, **options)
    transfer, device, host = device_parts(store, HOST_SLOTS[kind], num_slots, **options)
    return Rig(store, transfer, device.slots, host.files, host, device)


def _rig_by_streams(store: ExpertStore, num_slots: int, **options) -> Rig:
    host = HostTier(store, HOST_SLOTS[BY_STREAMS], **options)
    streams = StreamsDouble()
    pool = streams.pool(store.layout, num_slots)
    copier = TorchCopier(pool, LockedDouble(host.arena), cuda=streams)
    return Rig(store, DeviceTransfer(host, copier), streams.slots, host.files, host, streams)
