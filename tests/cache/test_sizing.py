"""Bytes to rows, rows to slots and staging: always enough for one layer where possible."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.cache.host_memory import Headroom
from vllm_moe_offload.cache.planner import SCOPE_PER_LAYER
from vllm_moe_offload.cache.sizing import (
    auto_cache_bytes,
    auto_host_bytes,
    cache_shape,
    cache_slots,
    device_available_bytes,
    device_reserve_bytes,
    host_slots,
)
from vllm_moe_offload.config import GIB, OptionError
from vllm_moe_offload.policy import POLICIES

MODEL = {"num_layers": 4, "num_experts": 8, "top_k": 2}


def rows(cache_gb, expert_bytes=GIB // 4, auto_bytes=3 * GIB):
    return cache_slots(cache_gb, expert_bytes=expert_bytes, auto_bytes=auto_bytes, **MODEL)


def test_rows_of_each_kind_of_size():
    assert rows(2) == 8
    assert rows("50%") == 16
    assert rows("100%") == 32
    assert rows("auto") == 12
    assert rows(1000) == 32  # never more rows than experts


def test_too_little_names_the_minimum():
    with pytest.raises(OptionError) as caught:
        rows(0.25)
    message = str(caught.value)
    assert "cache_gb=0.25" in message
    assert "Minimum: 0.500 GiB" in message
    assert "2.000 GiB hold one layer" in message


def test_ranks_with_fewer_experts_than_a_token_uses_need_no_more_than_they_have():
    share = MODEL | {"num_experts": 1}
    assert cache_slots(0.25, expert_bytes=GIB // 4, auto_bytes=0, **share) == 1
    with pytest.raises(OptionError, match=r"but one token needs 1\. Minimum: 0\.250 GiB"):
        cache_slots(0.2, expert_bytes=GIB // 4, auto_bytes=0, **share)
    layers = share | {"num_layers": 40}
    assert cache_shape(32, rules=POLICIES["trace"].rules, **layers).num_staging_slots == 1


@given(
    num_layers=st.integers(1, 60),
    num_experts=st.integers(1, 256),
    share=st.floats(0, 1),
    policy=st.sampled_from(sorted(POLICIES)),
    data=st.data(),
)
def test_shape_uses_no_more_rows_and_fits_a_layer_if_it_can(
    num_layers, num_experts, share, policy, data
):
    top_k = data.draw(st.integers(1, num_experts))
    total = num_layers * num_experts
    count = max(top_k, int(share * total))
    rules = POLICIES[policy].rules
    shape = cache_shape(
        count, num_layers=num_layers, num_experts=num_experts, top_k=top_k, rules=rules
    )
    assert shape.num_pool_slots <= count
    assert shape.holds_everything == (count >= total)
    own = shape.num_slots
    if rules.scope == SCOPE_PER_LAYER:
        own //= num_layers
    reachable = own + shape.num_staging_slots
    if count >= num_experts:
        assert reachable >= num_experts or shape.holds_everything
    assert reachable >= min(top_k, count)


def test_auto_takes_everything_if_it_fits_beside_the_kv_cache():
    assert auto_cache_bytes(3 * GIB, 8 * GIB, None) == 3 * GIB
    assert auto_cache_bytes(30 * GIB, 8 * GIB, None) == 6 * GIB
    assert auto_cache_bytes(30 * GIB, 8 * GIB, GIB) == 7 * GIB
    assert auto_cache_bytes(30 * GIB, GIB, 2 * GIB) == 0


def test_host_rows_of_each_kind_of_size():
    sizes = {"record_bytes": GIB // 4, "num_layers": 4, "num_experts": 8}
    assert host_slots(2, auto_bytes=0, **sizes) == 8
    assert host_slots("50%", auto_bytes=0, **sizes) == 16
    assert host_slots("auto", auto_bytes=3 * GIB, **sizes) == 12
    assert host_slots("auto", auto_bytes=300 * GIB, **sizes) == 32
    with pytest.raises(OptionError) as caught:
        host_slots("auto", auto_bytes=GIB // 4, **sizes)
    assert "host_gb='auto' holds 1 of 32" in str(caught.value)
    assert "Minimum: 0.500 GiB; 8.000 GiB hold all" in str(caught.value)


def test_host_auto_leaves_the_system_its_share():
    def auto(available_bytes, total_bytes, num_ranks):
        return auto_host_bytes(Headroom(available_bytes, total_bytes, ""), num_ranks)

    assert auto(100 * GIB, 128 * GIB, 1) == 100 * GIB - 128 * GIB // 10
    assert auto(20 * GIB, 24 * GIB, 1) == 16 * GIB
    assert auto(20 * GIB, 24 * GIB, 2) == 8 * GIB
    assert auto(3 * GIB, 24 * GIB, 1) == 0


def test_what_a_device_has_for_experts_and_kv_cache():
    memory = {"total_bytes": 80 * GIB, "allocated_bytes": 10 * GIB, "utilization": 0.5}
    assert (
        device_available_bytes(free_bytes=69 * GIB, reserve_bytes=2 * GIB, **memory) == 28 * GIB
    )
    # Somebody else is on the device.
    assert (
        device_available_bytes(free_bytes=9 * GIB, reserve_bytes=2 * GIB, **memory) == 7 * GIB
    )
    assert device_available_bytes(free_bytes=GIB, reserve_bytes=2 * GIB, **memory) == 0


def test_the_reserve_of_a_device_grows_with_the_step():
    model = {"top_k": 8, "hidden_size": 2048, "intermediate_size": 768, "vocab_size": 150_000}

    def reserve(max_tokens, max_requests=256):
        return device_reserve_bytes(
            max_tokens=max_tokens, max_requests=max_requests, element_bytes=2, **model
        )

    # Triton's workspaces, [tokens, top_k, max(gate and up, hidden)] twice, are the most of it.
    workspaces = 8192 * 8 * (2048 + 2048) * 2
    assert workspaces + GIB < reserve(8192) < 2 * workspaces + 2 * GIB
    assert reserve(8192) < reserve(32768)
    assert reserve(8192, 8) < reserve(8192)
