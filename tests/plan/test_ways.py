"""Who plans: the first reason that the host has to is told, and nothing else changes the way."""

from typing import Any

import pytest

from vllm_moe_offload.device.rule import MAX_SLOTS
from vllm_moe_offload.plan.ways import Way, gpu_way, state_bytes

PLANNED: dict[str, Any] = {
    "holds_everything": False,
    "quantization": None,
    "expert_parallel": False,
    "pipeline_parallel": False,
    "drafter_has_experts": False,
    "num_slots": MAX_SLOTS,
    "num_host_slots": 40_000,
    "num_total": 40_000,
}
REASONS = [
    ({"quantization": "fp8"}, "experts are quantised (fp8)"),
    ({"expert_parallel": True}, "workers divide the experts of a layer"),
    ({"pipeline_parallel": True}, "workers divide the layers"),
    ({"drafter_has_experts": True}, "the drafter has experts of its own"),
    ({"num_host_slots": 39_999}, "host memory holds 39999 of 40000 experts"),
    ({"num_slots": MAX_SLOTS + 1}, "16385 slots are more than the 16384 that the GPU plans"),
]


def test_a_gpu_plans_what_it_can():
    assert gpu_way(**PLANNED) == (Way.DEVICE, "")


@pytest.mark.parametrize(("change", "why"), REASONS)
def test_each_reason_alone_makes_the_host_plan(change, why):
    assert gpu_way(**PLANNED | change) == (Way.HOST, why)


def test_one_reason_is_told_where_there_are_several():
    changes = PLANNED
    for change, why in reversed(REASONS):
        changes = changes | change
        assert gpu_way(**changes) == (Way.HOST, why)


def test_where_all_experts_fit_nobody_plans():
    changes = PLANNED | {"holds_everything": True}
    for change, _ in REASONS:
        changes = changes | change
    assert gpu_way(**changes) == (Way.RESIDENT, "")


def test_the_log_is_most_of_the_state():
    """What of it is exact, tests of the kernels compare with the tensors that there are."""
    sizes = {"num_layers": 48, "num_experts": 128, "num_slots": 1536, "top_k": 8}
    one, two = (state_bytes(max_tokens=tokens, **sizes) for tokens in (8192, 16384))
    assert two - one == 8192 * (2 * 48 * 8 + 4 * (8 + 1) + 1)
    assert two - one > 0.95 * one
