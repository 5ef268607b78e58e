"""What a worker is made of whose GPU plans, or keeps all experts; on doubles of device and layers."""

from types import SimpleNamespace

import pytest
import torch

from tests.device.late import LateStream
from tests.stores import MIXED, build
from vllm_moe_offload.cache.planner import CacheShape
from vllm_moe_offload.cache.pool import SlotPool
from vllm_moe_offload.config import OffloadConfig
from vllm_moe_offload.device.followers import Followers
from vllm_moe_offload.integration.experts import OffloadedExperts
from vllm_moe_offload.integration.layers.planned_on_device import (
    PlannedOnDevice,
    RecordedResident,
)
from vllm_moe_offload.integration.start_on_device import Plan, start_on_device
from vllm_moe_offload.metrics import Counters
from vllm_moe_offload.plan.ways import Way

LAYERS, EXPERTS, TOP_K, TOKENS = 3, 4, 2, 8


@pytest.fixture
def store(tmp_path):
    return build(tmp_path, MIXED, LAYERS, EXPERTS)


class VLLMsExperts(torch.nn.Module):
    """In place of RoutedExperts."""

    def forward_modular(self, x, **_):
        return x


class Layer(OffloadedExperts, VLLMsExperts):
    def __init__(self, store):
        VLLMsExperts.__init__(self)
        self.layer_name = "model.layers.0.mlp.experts"
        self.top_k, self.local_num_experts, self.global_num_experts = TOP_K, EXPERTS, EXPERTS
        self.quant_method = SimpleNamespace(topk_indices_dtype=None)
        for spec in store.layout.tensors:
            empty = torch.empty((0, *spec.shape), dtype=getattr(torch, spec.dtype))
            self.register_parameter(spec.name, torch.nn.Parameter(empty, requires_grad=False))


class Memory:
    """A DeviceMemory that notes what it is asked for."""

    def __init__(self):
        self.stream = LateStream(0)
        self.caches, self.loaded, self.released = [], [], 0

    def pool(self, store, num_slots, options):
        return SlotPool(store.layout, num_slots)

    def load_all(self, store, pool, options):
        self.loaded.append(pool)

    def records(self, store, options):
        def release():
            self.released += 1

        return torch.zeros(1, dtype=torch.uint8), release

    def new_cache(self, **sizes):
        cache = SimpleNamespace(
            **sizes,
            live=torch.zeros(1, dtype=torch.int32),
            log=torch.zeros(TOKENS, sizes["num_layers"], sizes["top_k"], dtype=torch.int16),
            counters=torch.zeros(2, dtype=torch.int64),
            attached=[],
            warmed=[],
        )
        cache.attach = lambda *parts: cache.attached.append(parts)
        cache.warm_up = cache.warmed.append
        self.caches.append(cache)
        return cache

    def record_event(self):
        return self.stream.record()

    def kernel(self, layer):
        return lambda *_: None


class Recorder:
    """Looks at routing."""

    def close(self):
        pass


def start(store, way, num_slots, followers=None):
    memory, layers = Memory(), [Layer(store) for _ in range(LAYERS)]
    runtime = start_on_device(
        memory,
        Plan(way, CacheShape(LAYERS, EXPERTS, num_slots), layers, LAYERS),
        options=OffloadConfig(mode="lrfu"),
        store=store,
        followers=followers or Followers(),
        published=Counters({}),
    )
    return memory, layers, runtime


def test_device_plans(store):
    memory, layers, runtime = start(store, Way.DEVICE, num_slots=5)
    (cache,) = memory.caches
    assert (cache.num_layers, cache.num_experts, cache.num_slots) == (LAYERS, EXPERTS, 5)
    ((layout, slots, _),) = cache.attached
    assert layout is store.layout
    assert cache.warmed == [torch.int32]
    for index, layer in enumerate(layers):
        assert (layer.moe_layer, layer.runtime) == (index, runtime)
        assert isinstance(layer.calls, PlannedOnDevice)
        for name, tensor in slots.items():
            assert getattr(layer, name).data_ptr() == tensor.data_ptr()
            assert len(getattr(layer, name)) == 5
    assert not memory.loaded
    runtime.close()
    assert memory.released == 1


def test_resident_experts_are_served_by_vllm_itself(store):
    memory, layers, _ = start(store, Way.RESIDENT, num_slots=LAYERS * EXPERTS)
    (pool,) = memory.loaded
    assert not memory.caches
    x = torch.ones(1)
    for index, layer in enumerate(layers):
        assert layer.calls is None
        assert layer.forward_modular.__func__ is VLLMsExperts.forward_modular
        assert layer.forward_modular(x) is x
        for name, tensor in pool.tensors.items():
            rows = getattr(layer, name)
            assert rows.data_ptr() == tensor[index * EXPERTS].data_ptr()
            assert len(rows) == EXPERTS


def test_resident_experts_whose_routing_is_recorded_are_logged(store):
    followers = Followers(recorder=Recorder())
    memory, layers, runtime = start(store, Way.RESIDENT, LAYERS * EXPERTS, followers)
    (cache,) = memory.caches
    assert (cache.num_layers, cache.num_slots) == (LAYERS, 1)
    assert not cache.attached
    assert all(isinstance(layer.calls, RecordedResident) for layer in layers)
    runtime.go_live()
    assert cache.live.item() == 1
