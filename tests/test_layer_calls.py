"""Layer calls: what the native path does equals what the policies do call by call."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch

from vllm_moe_offload.cache.planner import CacheShape, ExpertCache
from vllm_moe_offload.forecast.lookahead import RouterLookahead, Routers
from vllm_moe_offload.layer_calls import LayerCalls
from vllm_moe_offload.native import NO_EXPERT, NativeError
from vllm_moe_offload.policy import Policy, make_policy
from vllm_moe_offload.step import StepTokens
from vllm_moe_offload.transfer import Transfer
from vllm_moe_offload.transfer.prefetch import Prefetcher

LAYERS, EXPERTS, TOP_K = 4, 8, 2
POLICIES = ("lru", "lru-layer", "lfu", "lrfu", "lrfu:half_life=3", "trace")


def serve(policy: Policy, routings: list[np.ndarray], steps: list[StepTokens]) -> ExpertCache:
    """Serves steps ``[layers, tokens, top_k]``; reads take no time."""
    shape = CacheShape(LAYERS, EXPERTS, 12, EXPERTS)
    cache = ExpertCache(shape, policy.rules)
    policy.bind(cache)
    calls = LayerCalls(cache, policy, None)
    for step, of_step in zip(routings, steps, strict=True):
        calls.begin_step(of_step)
        for layer in range(LAYERS):
            ids = torch.from_numpy(step[layer])
            assert calls.plan(layer, ids, torch.empty_like(ids), None)
            policy.catch_up()
            for slot in cache.misses[1].tolist():
                cache.complete(slot, True)
            cache.finish()
        calls.end_step()
    return cache


class NoTransfer:
    """Stands in for a transfer that is never asked to read anything."""

    has_news = False


def workload(dtype: type) -> tuple[list[np.ndarray], list[StepTokens]]:
    """Twenty steps; two requests decode, a third one's prompt of five tokens joins once."""
    generator = np.random.default_rng(3)
    routings, steps = [], []
    for step in range(20):
        lengths = np.array([1, 1, 5] if step == 7 else [1, 1])
        names = ["a", "b", "c"][: len(lengths)]
        is_prefill = np.array([False, False, True])[: len(lengths)]
        first = np.full(len(lengths), step)
        steps.append(StepTokens.of_lengths(names, lengths, first, is_prefill))
        order = generator.random((LAYERS, int(lengths.sum()), EXPERTS)).argsort(axis=2)
        routings.append(np.ascontiguousarray(order[:, :, :TOP_K], dtype))
    return routings, steps


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("spec", POLICIES)
def test_native_observer_equals_observe(
    spec: str, dtype: type, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    routings, steps = workload(dtype)
    if padded:
        for routing in routings:
            routing[:, 0] = NO_EXPERT
            routing[1, 1, 0] = NO_EXPERT
    native = make_policy(spec, LAYERS, EXPERTS)
    assert native.native_observer(1, TOP_K), "this test would compare a path with itself"
    cache = serve(native, routings, steps)
    by_call = make_policy(spec, LAYERS, EXPERTS)
    monkeypatch.setattr(by_call, "native_observer", lambda num_tokens, top_k: 0)
    other = serve(by_call, routings, steps)
    np.testing.assert_array_equal(cache.scores, other.scores)
    np.testing.assert_array_equal(cache.page_table, other.page_table)
    assert cache.counters.tolist() == other.counters.tolist()
    if not spec.startswith("lru"):
        assert cache.scores.any()


@pytest.mark.parametrize("spec", ["lfu", "trace"])
def test_a_layer_call_of_another_size_than_its_step_is_refused(spec: str) -> None:
    policy = make_policy(spec, LAYERS, EXPERTS)
    cache = ExpertCache(CacheShape(LAYERS, EXPERTS, 12, EXPERTS), policy.rules)
    policy.bind(cache)
    calls = LayerCalls(cache, policy, None)
    one = np.ones(1, np.int64)
    calls.begin_step(StepTokens.of_lengths(["a"], one, 0 * one, np.zeros(1, np.bool_)))
    first = torch.zeros((1, TOP_K), dtype=torch.int32)
    assert calls.plan(0, first, torch.empty_like(first), None)
    cache.finish()
    wider = torch.zeros((1, TOP_K + 1), dtype=torch.int32)
    with pytest.raises(RuntimeError, match="layer 1 routed 3 ids, the step has 2"):
        calls.plan(1, wider, torch.empty_like(wider), None)


@pytest.mark.parametrize("by_call", [False, True])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("spec", [spec for spec in POLICIES if spec != "trace"])
def test_tokens_of_no_expert_count_nowhere(
    spec: str, dtype: type, by_call: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps with a request that routes nowhere, against the same in which it has no say."""
    routings, steps = workload(dtype)
    caches = []
    for marked in (True, False):
        policy = make_policy(spec, LAYERS, EXPERTS)
        if by_call:
            monkeypatch.setattr(policy, "native_observer", lambda num_tokens, top_k: 0)
        routed = [routing.copy() for routing in routings]
        weighed = [replace(step, weights=step.weights.copy()) for step in steps]
        for step, of_step in zip(routed, weighed, strict=True):
            if marked:
                step[:, 0] = NO_EXPERT
            else:  # chooses what the token behind it chooses, and has no say
                step[:, 0] = step[:, 1]
                of_step.weights[0] = 0.0
        caches.append(serve(policy, routed, weighed))
    with_them, without = caches
    np.testing.assert_array_equal(with_them.scores, without.scores)
    np.testing.assert_array_equal(with_them.page_table, without.page_table)
    np.testing.assert_array_equal(with_them.last_use, without.last_use)
    assert with_them.counters.tolist() == without.counters.tolist()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_no_expert_get_a_slot_that_is_needed_anyway(dtype: torch.dtype) -> None:
    calls, cache = calls_of(num_tokens=4)
    ids = torch.tensor([[-1, -1], [5, -1], [2, 5], [-1, 2], [7, 7]], dtype=dtype)
    slots = torch.full_like(ids, 99)
    assert calls.plan(0, ids, slots, None)
    assert cache.experts.tolist() == [2, 5]
    two, five = cache.slots.tolist()
    # Of the same token where it has one: what another token's expert makes of it may be infinite.
    expected = [[five, five], [five, five], [two, five], [two, two], [five, five]]
    assert slots.tolist() == expected
    cache.finish()
    assert calls.plan(1, torch.full_like(ids, -1), slots, None)
    assert not slots.any()
    assert cache.experts.size == 0


@pytest.mark.parametrize("spec", ["lfu", "trace"])
@pytest.mark.parametrize("by_call", [False, True])
def test_other_negative_ids_are_refused(
    spec: str, by_call: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, _ = calls_of(num_tokens=1, spec=spec)
    if by_call:
        monkeypatch.setattr(calls.policy, "native_observer", lambda num_tokens, top_k: 0)
    ids = torch.tensor([[-1, -2]])
    with pytest.raises(NativeError, match=r"expert id -2 .*outside \[0, 8\)"):
        calls.plan(0, ids, torch.empty_like(ids), None)


WRONG_IDS = {
    "dtype": torch.zeros((2, TOP_K), dtype=torch.int16),
    "shape": torch.zeros(2 * TOP_K, dtype=torch.int32),
    "strides": torch.zeros((TOP_K, 2), dtype=torch.int32).T,
    "device": torch.zeros((2, TOP_K), dtype=torch.int32, device="meta"),
}


@pytest.mark.parametrize("wrong", WRONG_IDS)
@pytest.mark.parametrize("with_request", [True, False])
def test_tensors_of_ids_are_checked(wrong: str, with_request: bool) -> None:
    calls, _ = calls_of(num_tokens=2)
    if not with_request:
        calls.tokens = None
    ids = WRONG_IDS[wrong]
    right = torch.zeros((2, TOP_K), dtype=torch.int32)
    form = re.escape(
        f"{ids.dtype} {list(ids.shape)}, strides {list(ids.stride())}, on {ids.device}"
    )
    with pytest.raises(
        ValueError, match=rf"topk_ids must be a contiguous CPU tensor .* int64, got {form}"
    ):
        calls.plan(0, ids, right, None)
    with pytest.raises(ValueError, match=rf"slot_ids must be like topk_ids, .*, got {form}"):
        calls.plan(0, right, ids, None)
    with pytest.raises(ValueError, match="slot_ids must be like topk_ids"):
        calls.plan(0, right, right.long(), None)
    assert calls.plan(0, right, torch.empty_like(right), None)


def test_fewer_ids_than_the_step_has_tokens_are_refused() -> None:
    calls, _ = calls_of(num_tokens=3)
    ids = torch.zeros((2, TOP_K), dtype=torch.int32)
    with pytest.raises(ValueError, match="topk_ids has 2 rows, fewer than the step's 3 tokens"):
        calls.plan(0, ids, torch.empty_like(ids), None)


@pytest.mark.parametrize(
    ("weights", "got"),
    [
        (np.ones(4), r"float64 \[4\], strides \[8\]"),
        (np.ones((2, 2), np.float32), r"float32 \[2, 2\], strides \[8, 4\]"),
        (np.ones(8, np.float32)[::2], r"float32 \[4\], strides \[8\]"),
    ],
    ids=["dtype", "shape", "strides"],
)
def test_weights_of_a_step_are_checked(weights: np.ndarray, got: str) -> None:
    calls, _ = calls_of(num_tokens=4)
    tokens = replace(tokens_of(4), weights=weights)
    with pytest.raises(ValueError, match=rf"contiguous float32 \[tokens\], got {got}"):
        calls.begin_step(tokens)


@pytest.mark.parametrize(
    "hidden",
    [
        torch.zeros((2, 16), dtype=torch.float64),
        torch.zeros(32),
        torch.zeros((1, 16)),
        torch.zeros((16, 2)).T,
        torch.zeros((2, 16), device="meta"),
    ],
    ids=["dtype", "shape", "rows", "strides", "device"],
)
def test_hidden_states_are_checked(hidden: torch.Tensor) -> None:
    calls, _ = calls_of(num_tokens=2, lookahead=True)
    ids = torch.zeros((2, TOP_K), dtype=torch.int32)
    with pytest.raises(
        ValueError, match=rf"hidden must be a CPU tensor \[2 tokens .* got {hidden.dtype}"
    ):
        calls.plan(0, ids, torch.empty_like(ids), hidden)
    assert calls.plan(0, ids, torch.empty_like(ids), torch.zeros((3, 16))[:2])


def tokens_of(num_tokens: int) -> StepTokens:
    one = np.ones(num_tokens, np.int64)
    names = [f"r{index}" for index in range(num_tokens)]
    return StepTokens.of_lengths(names, one, 0 * one, one < 0)


def calls_of(
    *, num_tokens: int, spec: str = "lru", lookahead: bool = False
) -> tuple[LayerCalls, ExpertCache]:
    """In a step of so many tokens; no expert is resident."""
    policy = make_policy("trace" if lookahead else spec, LAYERS, EXPERTS)
    cache = ExpertCache(CacheShape(LAYERS, EXPERTS, 12, EXPERTS), policy.rules)
    policy.bind(cache)
    prefetcher = None
    if lookahead:
        routers = Routers.of(torch.zeros(LAYERS, EXPERTS, 16))
        prefetcher = Prefetcher(
            cache, cast(Transfer, NoTransfer()), policy, RouterLookahead(routers, TOP_K, 1)
        )
    calls = LayerCalls(cache, policy, prefetcher)
    calls.begin_step(tokens_of(num_tokens))
    return calls, cache
