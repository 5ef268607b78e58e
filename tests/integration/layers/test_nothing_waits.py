"""Layer calls where the GPU plans: in a CUDA graph nothing waits for the device or makes a tensor."""

from types import SimpleNamespace

import pytest
import torch

from tests.device.in_a_graph import InAGraph
from vllm_moe_offload.integration import block_slots, triton_slots
from vllm_moe_offload.integration.layers import planned_on_device
from vllm_moe_offload.integration.layers.planned_on_device import (
    PlannedOnDevice,
    RecordedResident,
    RowsOfStep,
)

EXPERTS, TOP_K, TOKENS, HIDDEN = 8, 2, 16, 4


class Cache:
    """Launches nothing; what calls get lies there already."""

    num_experts = EXPERTS

    def __init__(self, num_slots=EXPERTS, *, fault=None):
        self.num_slots = num_slots
        self._map = torch.arange(EXPERTS + 1, dtype=torch.int32)
        self._renamed = torch.zeros(TOKENS * TOP_K, dtype=torch.int32)
        self._fault = fault
        self.calls = []

    def bring(self, layer, tokens):
        self.calls.append((layer, tokens))
        if self._fault is not None:
            self._fault(tokens)
        return self._map

    def rename(self, ids):
        return self._renamed[: ids.numel()].view(ids.shape)

    def note(self, layer, tokens):
        self.calls.append((layer, tokens))


@pytest.fixture
def call(monkeypatch):
    """One call of a layer, with vLLM's kernel left out; ids as the router's."""
    padding = torch.zeros(TOKENS, dtype=torch.bool)
    padding[-3:] = True
    context = SimpleNamespace(is_padding=padding)
    monkeypatch.setattr(planned_on_device, "get_forward_context", lambda: context)
    monkeypatch.setattr(triton_slots, "tuning_config", lambda *_: {"BLOCK_SIZE_M": 16})
    x = torch.zeros(TOKENS, HIDDEN)
    weights = torch.ones(TOKENS, TOP_K)
    ids = torch.zeros(TOKENS, TOP_K, dtype=torch.int32)

    def kernel(*, layer, x, topk_weights, topk_ids, **_):
        def aligned(topk_ids, *_, **__):
            return None, topk_ids.view(-1), None

        if block_slots.slot_map_in_force() is not None:
            triton_slots.prepare_expert_assignment(
                aligned, topk_ids, {}, TOKENS, TOP_K, EXPERTS, None
            )
        return x

    layer = SimpleNamespace(moe_layer=1, quant_method=SimpleNamespace(apply=kernel))

    def call(calls):
        with InAGraph():
            return calls.forward(layer, x, weights, ids)

    call.context, call.x = context, x
    return call


@pytest.fixture
def rows():
    return RowsOfStep(torch.zeros(TOKENS, dtype=torch.int32))


def test_planned_calls(call, rows):
    cache = Cache()
    calls = PlannedOnDevice(cache, rows, triton_slots.apply_on_slots)
    assert call(calls) is call.x
    ((layer, tokens),) = cache.calls
    assert layer == 1
    assert tokens.is_padding.tolist() == [False] * 13 + [True] * 3


def test_calls_without_padding(call, rows):
    """A drafter's forward context has none."""
    call.context.is_padding = None
    cache = Cache()
    call(PlannedOnDevice(cache, rows, triton_slots.apply_on_slots))
    ((_, tokens),) = cache.calls
    assert not tokens.is_padding.any()


def test_recorded_calls(call, rows):
    cache = Cache()
    assert call(RecordedResident(cache, rows)) is call.x
    assert len(cache.calls) == 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda tokens: tokens.ids[0, 0].item(), "waits"),
        (lambda tokens: int(tokens.is_padding.sum()), "sum makes a tensor"),
        (lambda tokens: tokens.ids.nonzero(), "waits"),
        (lambda tokens: torch.zeros(1), "zeros makes a tensor"),
        (lambda tokens: tokens.ids.clone(), "clone makes a tensor"),
        (lambda tokens: tokens.ids + 1, "add makes a tensor"),
        (lambda tokens: tokens.ids.to(torch.int64), "_to_copy makes a tensor"),
        (lambda tokens: tokens.weights[tokens.ids.view(-1).long()], "makes a tensor"),
    ],
)
def test_faults_are_caught(call, rows, fault, said):
    calls = PlannedOnDevice(Cache(fault=fault), rows, triton_slots.apply_on_slots)
    with pytest.raises(AssertionError, match=said):
        call(calls)


def test_ids_that_lie_apart_are_copied(call, rows):
    """The one tensor that a call may have to make: kernels read ids one after the other."""
    ids = torch.zeros(TOKENS, 2 * TOP_K, dtype=torch.int32)[:, ::2]
    assert rows.tokens(ids).ids.is_contiguous()
