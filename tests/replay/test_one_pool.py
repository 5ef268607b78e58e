"""Replay by the device's rule: counts against the rule told in loops, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.synthetic_trace import synthetic_trace
from tests.device.test_rule import Call, Told
from vllm_moe_offload.replay.one_pool import (
    half_life_of,
    pool_slots,
    replay_one_pool,
    replay_one_pool_recorded,
)
from vllm_moe_offload.replay.schedule import (
    ReplayError,
    Schedule,
    decode_schedule,
    recorded_schedule,
)
from vllm_moe_offload.trace.routing import RecordedSchedule, RoutingTrace


def told_counts(trace: RoutingTrace, schedule: Schedule, slots: int) -> tuple[int, int]:
    """Hits and misses, layer call by layer call; votes in fixed point by Python's integers."""
    told = Told(trace.num_layers, trace.num_experts, slots)
    for step in range(schedule.num_steps):
        tokens = schedule.tokens(step)
        weights = [int(float(weight) * 2**30) for weight in tokens.weights]
        for layer, ids in enumerate(schedule.ids(trace.routed, step)):
            for _ in told.call(Call(layer, ids.tolist(), weights)):
                pass
    return told.hits, told.misses


@pytest.mark.parametrize("concurrency", [1, 3, 4])
@pytest.mark.parametrize("capacity", [0.03, 0.1, 0.25, 0.6, 1.0])
def test_counts_what_the_rule_says(capacity: float, concurrency: int) -> None:
    """The least of these is one slot: every expert is a wave."""
    trace = synthetic_trace(layers=3, experts=12, top_k=3, requests=4, tokens=20, seed=3)
    result = replay_one_pool(trace, "lrfu", capacity, concurrency)
    expected = told_counts(trace, decode_schedule(trace, concurrency), int(capacity * 36))
    assert (result.hits, result.misses) == expected
    assert result.planner == "device"
    assert result.as_dict()["planner"] == "device"


def test_only_the_first_requests() -> None:
    trace = synthetic_trace(layers=2, experts=8, requests=3, tokens=6, seed=1)
    done: list[int] = []
    result = replay_one_pool(trace, "lrfu", 0.5, 2, num_requests=2, progress=done.append)
    assert sum(done) == result.tokens == trace.lens[:2].sum()


def recorded_trace(slots: int, staging: int) -> RoutingTrace:
    """Of 2 layers x 6 experts; a prompt of four tokens beside another request's decode."""
    ids = np.random.default_rng(2).integers(0, 3, (12, 2, 2))
    ids[..., 1] += 3
    return RoutingTrace(
        ids=ids.astype(np.uint8),
        starts=np.array([0, 5]),
        lens=np.array([5, 7]),
        num_experts=6,
        prefill_lens=np.array([1, 4]),
        schedule=RecordedSchedule(
            row_step=np.array([0, 1, 2, 2, 2, 2, 2, 3, 3, 4, 4, 5]),
            row_request=np.array([0, 0, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1], np.int32),
            row_position=np.array([0, 1, 2, 0, 1, 2, 3, 3, 4, 4, 5, 6]),
            row_token=np.array([0, 1, 2, 5, 6, 7, 8, 3, 9, 4, 10, 11]),
            recomputed_ids=np.zeros((0, 2, 2), np.uint8),
            first_positions=np.zeros(2, np.int64),
            end_steps=np.array([5, 6]),
            layer_ids=np.arange(2),
            slots=slots,
            staging_slots=staging,
        ),
    )


@pytest.mark.parametrize(("slots", "staging"), [(3, 2), (5, 0), (2, 1)])
def test_the_pool_of_a_server_has_all_of_its_slots(slots: int, staging: int) -> None:
    trace = recorded_trace(slots, staging)
    done: list[int] = []
    result = replay_one_pool_recorded(trace, "lrfu", progress=done.append)
    expected = told_counts(trace, recorded_schedule(trace), slots + staging)
    assert (result.hits, result.misses) == expected
    assert result.capacity == (slots + staging) / 12
    assert result.concurrency is None
    assert sum(done) == 12


def test_a_half_life_changes_what_is_kept() -> None:
    assert half_life_of("lrfu", 2, 4) == 8
    assert half_life_of("lrfu:half_life=32", 2, 4) == 32
    trace = synthetic_trace(layers=3, experts=12, top_k=3, requests=4, tokens=40, seed=3)
    short, long = (
        replay_one_pool(trace, f"lrfu:half_life={steps}", 0.3, 1).hits for steps in (1, 64)
    )
    assert short != long


@pytest.mark.parametrize("policy", ["lru", "trace", "eamc:entries=3"])
def test_another_policy_is_refused(policy: str) -> None:
    message = f"policy must be lrfu or lrfu:half_life=STEPS with --planner device, got {policy}"
    with pytest.raises(ReplayError, match=f"^{message}$"):
        half_life_of(policy, 2, 4)


def test_a_pool_holds_an_expert() -> None:
    assert pool_slots(0.25, 3, 7) == 5
    with pytest.raises(
        ReplayError, match=r"capacity must be at least 1/21, one expert, .* 0.01"
    ):
        pool_slots(0.01, 3, 7)
    with pytest.raises(ReplayError, match=r"capacity must lie in \(0, 1\], got 2"):
        pool_slots(2, 3, 7)
