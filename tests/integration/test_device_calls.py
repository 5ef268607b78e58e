"""Layer calls as on a GPU, on the CPU device: which rows the kernel is told to read."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.model_executor.layers.fused_moe import get_config

from tests.runtimes import EXPERTS, LAYERS, TOP_K, assert_slots_hold, decode_tokens, runtime_of
from tests.stores import MIXED, build
from vllm_moe_offload.forecast.lookahead import sampled_tokens
from vllm_moe_offload.integration import block_slots, device_calls, triton_slots
from vllm_moe_offload.integration.device_calls import DeviceCalls
from vllm_moe_offload.integration.expert_share import ExpertShare
from vllm_moe_offload.step import StepTokens

HIDDEN = 4


@pytest.fixture
def store(tmp_path):
    return build(tmp_path, MIXED, LAYERS, EXPERTS)


class Experts:
    """A layer that notes the slot map of every kernel call and sums what is in it."""

    def __init__(self, index):
        self.moe_layer = index
        self.local_num_experts = EXPERTS
        self.share = None
        self.maps = []
        self.waves = []
        self.check = lambda: None
        self.quant_method = SimpleNamespace(apply=self.apply)

    def apply(self, *, layer, x, topk_weights, topk_ids, **_):
        slot_map = block_slots.slot_map_in_force()
        self.maps.append(None if slot_map is None else slot_map.slot_of.clone())
        self.waves.append(slot_map is not None and slot_map.is_wave)
        if slot_map is not None:
            assert slot_map.slot_of.shape == (EXPERTS + 1,)
            assert slot_map.slot_of[-1] == -1, "the index -1 is no expert's"
        self.check()
        if slot_map is None:
            return x * topk_weights.sum(1, keepdim=True)
        ids = topk_ids if self.share is None else self.share.own_ids(topk_ids)
        present = slot_map.slot_of[ids.long()] >= 0
        return x * (topk_weights * present).sum(1, keepdim=True)


@pytest.fixture(autouse=True)
def no_tuning(monkeypatch):
    monkeypatch.setattr(triton_slots, "tuning_config", lambda *_: {"BLOCK_SIZE_M": 16})


class Model:
    """A runtime, its layers and its calls."""

    def __init__(self, store, slots, staging, mode="trace", **parts):
        self.store = store
        self.runtime = runtime_of(store, slots, staging, mode)
        for name, part in parts.items():
            setattr(self.runtime, name, part)
        self.layers = [Experts(index) for index in range(LAYERS)]
        self.calls = DeviceCalls(
            self.runtime, torch.device("cpu"), EXPERTS, triton_slots.apply_on_slots
        )

    def step(self, ids, rows=None):
        """One step in which every layer routes alike; checks results and rows."""
        tokens = ids.shape[0]
        self.runtime.begin_step(rows or decode_tokens([f"r{i}" for i in range(tokens)]))
        for layer in self.layers:
            self.call(layer, ids)

    def call(self, layer, ids):
        x = torch.arange(ids.shape[0] * HIDDEN, dtype=torch.float32).view(-1, HIDDEN)
        weights = torch.full(ids.shape, 1 / TOP_K)
        return self.calls.forward(layer, x, weights, ids), x


def ids_of(*tokens):
    return torch.tensor(tokens, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_map_names_rows_with_the_experts_bytes(store, dtype):
    model = Model(store, slots=10, staging=2)
    ids = ids_of([1, 5], [5, 2]).to(dtype)
    for layer in model.layers:

        def check(layer=layer):
            slot_map = block_slots.slot_map_in_force().slot_of
            used = ids.unique()
            assert slot_map.dtype == torch.int32
            assert (slot_map >= 0).nonzero().reshape(-1).tolist() == used.tolist()
            assert_slots_hold(
                model.runtime, store, layer.moe_layer, used, slot_map[used.long()]
            )

        layer.check = check
    for _ in range(3):
        model.step(ids)
    assert model.runtime.num_tokens == 6
    assert model.runtime.cache.count("hits") > 0
    assert all(len(layer.maps) == 3 for layer in model.layers)


def test_a_rank_plans_and_maps_its_own_experts_alone(store):
    """Expert parallel: this rank has every second expert of twice as many."""
    model = Model(store, slots=10, staging=2)
    expert_map = torch.full((2 * EXPERTS,), -1, dtype=torch.int32)
    expert_map[1::2] = torch.arange(EXPERTS, dtype=torch.int32)
    ids = ids_of([3, 11], [4, 5], [0, 2])  # the own ones are 1, 5 and 2 here
    for layer in model.layers:
        layer.share = ExpertShare(expert_map)
    model.step(ids)
    for layer in model.layers:
        (slot_map,) = layer.maps
        assert (slot_map >= 0).nonzero().reshape(-1).tolist() == [1, 2, 5]
    cache = model.runtime.cache
    assert cache.count("hits") + cache.count("misses") == 3 * LAYERS
    out, x = model.call(model.layers[0], ids)
    weighs = torch.tensor([[1.0], [0.5], [0.0]])
    torch.testing.assert_close(out, x * weighs)


def test_padding_of_a_graph_is_neither_planned_nor_mapped(store):
    model = Model(store, slots=10, staging=2)
    rows = decode_tokens(["a"])
    model.step(ids_of([1, 5], [7, 0], [7, 0]), rows)
    mapped = (model.layers[0].maps[0] >= 0).nonzero().reshape(-1)
    assert mapped.tolist() == [1, 5]
    assert model.runtime.num_tokens == 1


def test_padding_without_an_expert_stays_on_the_device(store):
    model = Model(store, slots=10, staging=2)
    model.runtime.begin_step(decode_tokens(["a"]))
    for layer in model.layers:
        out, x = model.call(layer, ids_of([1, 5], [-1, -1], [-1, -1]))
        torch.testing.assert_close(out[0], x[0])
        assert not out[1:].any()  # the double sums what has a row
        assert (layer.maps[0] >= 0).nonzero().reshape(-1).tolist() == [1, 5]
    assert model.runtime.num_tokens == 1


def test_dummy_runs_take_padding_without_an_expert(store):
    model = Model(store, slots=10, staging=2)
    with model.runtime.dummy_run():
        out, _ = model.call(model.layers[0], ids_of([-1, -1], [-1, -1]))
    assert not out.any()


def test_waves_cover_every_expert_once(store, monkeypatch):
    monkeypatch.setattr(device_calls, "UPLOADS", 2)  # more waves than maps under way
    model = Model(store, slots=2, staging=0, mode="lru")
    ids = torch.arange(EXPERTS, dtype=torch.int32).view(-1, TOP_K)
    model.runtime.begin_step(decode_tokens([f"r{i}" for i in range(len(ids))]))
    for layer in model.layers:
        out, x = model.call(layer, ids)
        torch.testing.assert_close(out, x)
        maps = torch.stack(layer.maps)[:, :-1]
        assert len(maps) == EXPERTS // 2
        assert ((maps >= 0).sum(0) == 1).all()
    assert model.runtime.num_step_tokens is None  # the step ended with its last layer


def test_dummy_runs_read_the_first_row_and_count_nothing(store):
    model = Model(store, slots=10, staging=2)
    before = model.runtime.read_bytes
    with model.runtime.dummy_run():
        with model.runtime.dummy_run():
            pass  # a dummy run of the warm-up; the warm-up is still on
        model.step(ids_of([1, 5], [6, 7]))
        model.runtime.end_request("r0")
    assert all(layer.maps[0].tolist() == [0] * EXPERTS + [-1] for layer in model.layers)
    assert model.runtime.read_bytes == before
    assert model.runtime.num_tokens == 0
    assert model.runtime.num_step_tokens is None


def test_an_error_in_the_kernel_leaves_no_plan_open(store):
    model = Model(store, slots=10, staging=2)
    original = model.layers[0].quant_method.apply

    def fail(**_):
        raise RuntimeError("kernel")

    model.layers[0].quant_method.apply = fail
    model.runtime.begin_step(decode_tokens(["a"]))
    with pytest.raises(RuntimeError, match="kernel"):
        model.call(model.layers[0], ids_of([1, 5]))
    assert get_config() is None  # what the call overrode does not outlive it
    model.layers[0].quant_method.apply = original
    model.step(ids_of([1, 5]))


class Looks:
    """A prefetcher that keeps what it was shown of the hidden states."""

    predictor = SimpleNamespace(native_handle=0)
    room = 1

    def __init__(self):
        self.seen = []

    def foresee(self, layer, hidden):
        self.seen.append((layer, hidden.clone(), hidden.stride(0)))
        return []

    def __getattr__(self, name):
        return lambda *_, **__: None


@pytest.mark.parametrize("tokens", [3, 64, 200])
def test_the_sampled_rows_of_hidden_are_there(store, tokens):
    looks = Looks()
    model = Model(store, slots=10, staging=2, prefetcher=looks)
    ids = ids_of([1, 5]).repeat(tokens, 1)
    rows = StepTokens.of_lengths(
        ["a"], np.array([tokens]), np.array([0]), np.array([True], np.bool_)
    )
    model.step(ids, rows)
    x = torch.arange(tokens * HIDDEN, dtype=torch.float32).view(-1, HIDDEN)
    sample = sampled_tokens(tokens)
    assert len(looks.seen) == LAYERS
    for _, hidden, stride in looks.seen:
        assert hidden.shape == x.shape
        assert stride == HIDDEN
        assert torch.equal(hidden[sample], x[sample])
