"""Layer calls: what the native path does equals what the policies do call by call."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_moe_offload.cache import CacheShape, ExpertCache
from vllm_moe_offload.layer_calls import LayerCalls
from vllm_moe_offload.policy import Policy, StepRows, make_policy
from vllm_moe_offload.shadow import bind_policy

LAYERS, EXPERTS, TOP_K = 4, 8, 2
POLICIES = ("lru", "lru-layer", "lfu", "lrfu", "lrfu:half_life=3", "trace")


def serve(policy: Policy, routings: list[np.ndarray], rows: list[StepRows]) -> ExpertCache:
    """Serves steps ``[layers, tokens, top_k]``; reads take no time."""
    shape = CacheShape(LAYERS, EXPERTS, 12, EXPERTS)
    cache = ExpertCache(shape, policy.rules)
    bind_policy(policy, cache)
    calls = LayerCalls(cache, policy, None)
    for step, of_step in zip(routings, rows, strict=True):
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


def workload(dtype: type) -> tuple[list[np.ndarray], list[StepRows]]:
    """Twenty steps; two requests decode, a third one's prompt of five tokens joins once."""
    generator = np.random.default_rng(3)
    routings, steps = [], []
    for step in range(20):
        lengths = np.array([1, 1, 5] if step == 7 else [1, 1])
        names = ["a", "b", "c"][: len(lengths)]
        is_prefill = np.array([False, False, True])[: len(lengths)]
        first = np.full(len(lengths), step)
        steps.append(StepRows.of_lengths(names, lengths, first, is_prefill))
        order = generator.random((LAYERS, int(lengths.sum()), EXPERTS)).argsort(axis=2)
        routings.append(np.ascontiguousarray(order[:, :, :TOP_K], dtype))
    return routings, steps


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("spec", POLICIES)
def test_native_observer_equals_observe(
    spec: str, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    routings, rows = workload(dtype)
    native = make_policy(spec, LAYERS, EXPERTS)
    assert native.native_observer(1, TOP_K), "this test would compare a path with itself"
    cache = serve(native, routings, rows)
    by_call = make_policy(spec, LAYERS, EXPERTS)
    monkeypatch.setattr(by_call, "native_observer", lambda num_rows, top_k: 0)
    other = serve(by_call, routings, rows)
    np.testing.assert_array_equal(cache.scores, other.scores)
    np.testing.assert_array_equal(cache.page_table, other.page_table)
    assert cache.counters.tolist() == other.counters.tolist()
    if not spec.startswith("lru"):
        assert cache.scores.any()


@pytest.mark.parametrize("spec", ["lfu", "trace"])
def test_a_layer_call_of_another_size_than_its_step_is_refused(spec: str) -> None:
    policy = make_policy(spec, LAYERS, EXPERTS)
    cache = ExpertCache(CacheShape(LAYERS, EXPERTS, 12, EXPERTS), policy.rules)
    bind_policy(policy, cache)
    calls = LayerCalls(cache, policy, None)
    one = np.ones(1, np.int64)
    calls.begin_step(StepRows.of_lengths(["a"], one, 0 * one, np.zeros(1, np.bool_)))
    first = torch.zeros((1, TOP_K), dtype=torch.int32)
    assert calls.plan(0, first, torch.empty_like(first), None)
    cache.finish()
    wider = torch.zeros((1, TOP_K + 1), dtype=torch.int32)
    with pytest.raises(RuntimeError, match="layer 1 routed 3 ids, the step has 2"):
        calls.plan(1, wider, torch.empty_like(wider), None)
