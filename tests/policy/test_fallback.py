"""Who rules: evidence, the price of a change, and shadows that count what replay counts."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.synthetic_trace import synthetic_trace
from tests.policy.test_policies import rows_of
from vllm_moe_offload.cache.planner import PLAN_INSTANT, CacheShape, ExpertCache
from vllm_moe_offload.policy import TracePolicy
from vllm_moe_offload.policy.fallback import Fallback
from vllm_moe_offload.policy.shadow import PLAIN_POLICIES, bind_policy
from vllm_moe_offload.replay.run import replay
from vllm_moe_offload.replay.schedule import decode_schedule

IDS = np.zeros((2, 1, 1), np.int32)
VOTES = np.zeros((2, 10), np.float32)


class FakeShadow:
    """Hits as told; holds ``held`` of 20 experts."""

    def __init__(self, name: str, held: slice) -> None:
        self.name = name
        self.scores = np.zeros((2, 10), np.float32)
        self.resident = np.zeros((2, 10), np.bool_)
        self.resident.reshape(-1)[held] = True
        self.hits = 0
        self.driven = 0

    def drive(self, first_layer: int, ids: np.ndarray, votes: np.ndarray) -> None:
        self.driven += len(ids)

    def drive_with(self, ids: np.ndarray, gain: np.ndarray, decay: float) -> None:
        self.driven += len(ids)


@pytest.fixture
def own() -> FakeShadow:
    return FakeShadow("own", slice(0, 8))


@pytest.fixture
def rival() -> FakeShadow:
    return FakeShadow("lfu", slice(4, 12))


def run(fallback: Fallback, own: FakeShadow, rival: FakeShadow, leads: list[int]) -> None:
    for lead in leads:
        own.hits += 100
        rival.hits += 100 + lead
        fallback.end_step(IDS, VOTES, VOTES, 1.0)
        fallback.change()


def test_a_lead_that_is_chance_changes_nothing(own: FakeShadow, rival: FakeShadow) -> None:
    fallback = Fallback(own, [rival])
    leads = np.random.default_rng(0).normal(0, 5, 2000).astype(int).tolist()
    run(fallback, own, rival, leads)
    assert fallback.switches <= 1


def test_a_steady_lead_wins_once_it_has_paid_for_the_change(
    own: FakeShadow, rival: FakeShadow
) -> None:
    fallback = Fallback(own, [rival])
    run(fallback, own, rival, [1] * 4)
    assert fallback.winner is None  # the caches differ by four experts
    run(fallback, own, rival, [1])
    assert fallback.winner is rival


def test_the_rule_comes_back(own: FakeShadow, rival: FakeShadow) -> None:
    fallback = Fallback(own, [rival])
    run(fallback, own, rival, [2] * 10)
    assert fallback.winner is rival
    run(fallback, own, rival, [-2] * 60)
    assert fallback.winner is None
    assert fallback.switches == 2


def test_the_cache_follows_the_winner_call_by_call(own: FakeShadow, rival: FakeShadow) -> None:
    fallback = Fallback(own, [rival])
    run(fallback, own, rival, [2] * 10)
    before = rival.driven
    scores = np.full((2, 10), 7, np.float32)
    fallback.lead(1, IDS, VOTES[1], scores)
    assert rival.driven == before + 1
    np.testing.assert_array_equal(scores, rival.resident)
    run(fallback, own, rival, [0])
    assert rival.driven == before + 1  # not again at the step's end


@pytest.mark.parametrize("concurrency", [1, 4])
def test_shadows_count_what_their_policies_count(concurrency: int) -> None:
    trace = synthetic_trace(layers=4, experts=16, top_k=3, requests=6, tokens=40, seed=8)
    policy = TracePolicy(4, 16)
    cache = ExpertCache(CacheShape(4, 16, 16), policy.rules, unbounded_staging=True)
    bind_policy(policy, cache)
    schedule = decode_schedule(trace, concurrency)
    for step in range(schedule.num_steps):
        for request in schedule.ended[step]:
            policy.end_request(str(request))
        tokens = schedule.tokens(step)
        places = schedule.row_token[schedule.offsets[step] : schedule.offsets[step + 1]]
        ids = np.ascontiguousarray(trace.ids[places].transpose(1, 0, 2), dtype=np.int32)
        policy.begin_step(tokens)
        policy.catch_up()
        for layer, layer_ids in enumerate(ids):
            votes = np.zeros(16, np.float32)
            np.add.at(votes, layer_ids, tokens.weights[:, None])
            policy.observe(layer, layer_ids, votes)
            cache.plan(layer, layer_ids, PLAN_INSTANT)
            cache.finish()
        policy.end_step()
    policy.end_request(tokens.requests[0])  # no longer puts the last step off
    fallback = policy._fallback
    assert fallback is not None
    assert fallback.switches == 0
    own, *plain = fallback._shadows
    assert own.hits == cache.count("hits")
    for name, shadow in zip(PLAIN_POLICIES, plain, strict=True):
        assert shadow.name == name
        assert shadow.hits == replay(trace, name, 0.25, concurrency).hits


def test_a_step_that_broke_off_is_not_counted() -> None:
    policy = TracePolicy(4, 16)
    cache = ExpertCache(CacheShape(4, 16, 16), policy.rules, unbounded_staging=True)
    bind_policy(policy, cache)
    policy.begin_step(rows_of(["a"], [1]))
    policy.catch_up()
    policy.observe(0, np.array([[1, 2]], np.int32), np.zeros(16, np.float32))
    policy.end_step()
    assert policy._fallback is not None
    assert [shadow.hits for shadow in policy._fallback._shadows] == [0] * 5
    assert not policy.forecast.requests.tokens.any()
