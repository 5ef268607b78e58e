"""What fits: budgets add up, the remedy works, and the server would make the same slots."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vllm_moe_offload.cache.sizing import build_peak_bytes, cache_shape, cache_slots
from vllm_moe_offload.config import GIB, parse_options
from vllm_moe_offload.plan.fit import (
    BATCH_TOKENS,
    HIT_RATES,
    fit,
)
from vllm_moe_offload.plan.machine import UTILIZATION, Machine
from vllm_moe_offload.plan.problems import amount
from vllm_moe_offload.plan.shapes import (
    FORMATS,
    ExpertFormat,
    ExpertShape,
    ModelShape,
    kernel_form,
    known_models,
    refusals,
    shape_of_config,
)
from vllm_moe_offload.plan.shapes.kernel_form import GROUP_SIZES
from vllm_moe_offload.plan.split import Split
from vllm_moe_offload.plan.ways import Way
from vllm_moe_offload.policy import make_policy


def known(name: str, **changes: Any) -> ModelShape:
    model = known_models()[name]
    return shape_of_config(model.config | changes, model.source)


SHAPES = {name: known(name) for name in known_models()}
MIXTRAL = SHAPES["Mixtral-8x7B"]


def cpu(gib: float, link_gbps: float = 7.0, memory_gbps: float | None = None) -> Machine:
    return Machine(int(gib * GIB), None, link_gbps, memory_gbps=memory_gbps)


def gpu(device_gib: float, host_gib: float) -> Machine:
    return Machine(int(host_gib * GIB), int(device_gib * GIB), link_gbps=25.0, disk_gbps=7.0)


def option(result, name):
    options = result.serve_options()
    return options[options.index(name) + 1] if name in options else None


@given(
    name=st.sampled_from(sorted(SHAPES)),
    fast_gib=st.floats(1, 600),
    host_gib=st.floats(1, 600),
    has_gpu=st.booleans(),
    kv_tokens=st.none() | st.integers(1, 300_000),
)
def test_a_plan_that_works_is_within_its_memory_and_is_what_the_server_makes(
    name, fast_gib, host_gib, has_gpu, kv_tokens
):
    shape = SHAPES[name]
    machine = gpu(fast_gib, host_gib) if has_gpu else cpu(fast_gib)
    result = fit(shape, machine, kv_tokens)
    assume(not result.problems)
    expert_bytes = result.layout.expert_bytes
    used = shape.dense_bytes + machine.runtime_bytes + result.kv_bytes + result.cache_bytes
    used += result.planning_bytes
    assert used <= machine.fast_bytes + (1 << 21)  # cache_gb has three decimals
    # The server, given the options that the plan prints:
    cache_gb = option(result, "--moe-offload-config.cache_gb")
    options = parse_options({"mode": "trace", "cache_gb": cache_gb})
    sizes = {
        "num_layers": len(shape.moe_layers),
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
    }
    rows = cache_slots(options.cache_gb, expert_bytes=expert_bytes, auto_bytes=0, **sizes)
    rules = make_policy(options.mode, 1, 1).rules
    staged = cache_shape(rows, rules=rules, **sizes)
    assert result.cache.num_pool_slots == staged.num_pool_slots
    assert result.cache.num_staging_slots == (
        0 if result.way is Way.DEVICE else staged.num_staging_slots
    )
    # The KV cache holds what it must, and a request no longer than allowed.
    assert result.kv_tokens >= (kv_tokens or min(2048, shape.max_tokens))
    longest = option(result, "--max-model-len")
    if longest is None:
        assert result.kv_tokens >= shape.max_tokens
    elif longest != "auto":
        needed = int(longest) * shape.kv.bytes_per_token
        assert needed + shape.kv.bytes_per_request(BATCH_TOKENS) <= result.kv_bytes


@given(name=st.sampled_from(sorted(SHAPES)), has_gpu=st.booleans())
def test_with_the_least_memory_that_is_named_it_works_and_with_less_it_does_not(name, has_gpu):
    shape = SHAPES[name]
    assume(not any(refusals(shape.format, "cuda" if has_gpu else "cpu", shape.expert)))
    if has_gpu:
        least_gib = fit(shape, gpu(1, 2000)).least_fast_bytes / GIB
        assert not fit(shape, gpu(least_gib, 2000)).problems
        assert fit(shape, gpu(least_gib - 0.2, 2000)).problems
    else:
        nothing = fit(shape, cpu(1))
        build_gib = nothing.build_bytes / UTILIZATION / GIB
        least_gib = max(nothing.least_fast_bytes / GIB, build_gib + 1e-6)
        assert not fit(shape, cpu(least_gib)).problems
        assert fit(shape, cpu(least_gib - 0.2)).problems


def test_with_the_memory_for_exact_output_a_layer_fits():
    for shape in SHAPES.values():
        exact_gib = fit(shape, gpu(1, 2000)).exact_fast_bytes / GIB
        assert fit(shape, gpu(exact_gib, 2000)).is_exact


def test_problems_name_the_option_and_what_would_do():
    (problem, *_) = fit(MIXTRAL, cpu(4)).problems
    assert "3.68 GiB of fast memory (92% of --host-memory)" in problem.text
    assert problem.remedy.startswith("--host-memory 7.0")
    (problem,) = fit(MIXTRAL, gpu(4, 500)).problems
    assert "--device-memory" in problem.remedy
    assert "for exact output" in problem.remedy
    problems = fit(MIXTRAL, gpu(24, 5)).problems
    assert [problem.remedy.split()[0] for problem in problems] == ["--host-memory"]
    assert "build the store" in problems[0].text


@given(
    known_format=st.sampled_from(
        [*FORMATS, *(ExpertFormat("int4", "awq", size, True) for size in GROUP_SIZES)]
    ),
    has_gpu=st.booleans(),
    blocks=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_slots_and_store_are_counted_in_the_kernels_form(known_format, has_gpu, blocks):
    """Whatever tensors an expert has: two, or ten; whole pages, or scales of a few bytes."""
    is_gpt_oss = known_format.kind == "mxfp4"
    expert = ExpertShape(
        128 * blocks[0], 128 * blocks[1], is_gpt_oss, "swigluoai" if is_gpt_oss else "silu"
    )
    shape = replace(MIXTRAL, expert=expert, format=known_format)
    machine = gpu(24, 200) if has_gpu else cpu(64)
    assume(not any(refusals(known_format, machine.platform, expert)))
    layout = kernel_form(known_format, machine.platform, expert)
    result = fit(shape, machine)
    assume(not result.problems)
    assert result.layout == layout
    assert result.store_bytes == 32 * 8 * layout.record_bytes
    assert result.cache_bytes == result.cache.num_pool_slots * layout.expert_bytes
    assert result.bound(0.5).read_bytes_per_token == 32 * layout.record_bytes
    assert result.has_run is (known_format.kind == "bf16" or not has_gpu)


def test_gpt_oss_120b_on_24_gib():
    result = fit(known("gpt-oss-120b"), gpu(24, 96))
    assert not result.problems
    # Marlin pads 2880 to 3072 inputs and 2944 outputs; 4 bits, a scale for 32, biases.
    weights = 3 * 3072 * 2944
    assert result.expert_bytes == weights // 2 + weights // 32 + 2 * (2 * 2944 + 3072)
    assert result.layout.record_bytes == 14_434_304  # whole pages
    assert result.host_share == 1
    assert not result.has_run


def test_formats_that_are_not_served_are_refused_by_name():
    other = {"quant_method": "torchao"}
    result = fit(known("Qwen3-30B-A3B", quantization_config=other), gpu(24, 64))
    assert result.cache is None
    (problem,) = result.problems
    assert "quant_method='torchao', must be fp8 or compressed-tensors" in problem.text
    assert problem.remedy == "a checkpoint of the same model in a format of the table"


def test_what_is_served_elsewhere_says_where():
    int8 = replace(SHAPES["Qwen3-30B-A3B"], format=ExpertFormat("int8"))
    (problem,) = fit(int8, gpu(24, 64)).problems
    assert problem.text == (
        "not served: int8 experts on a GPU; served there are bf16, fp8, int4, mxfp4, nvfp4"
    )
    assert problem.remedy.startswith("a CPU, or a checkpoint")
    minimax = SHAPES["MiniMax-M2.7"]
    (problem,) = fit(minimax, cpu(400)).problems
    assert "chosen by a router of its own, must be by softmax or DeepSeek-V3's" in problem.text
    assert problem.remedy.startswith("a GPU, or a checkpoint")
    assert not fit(minimax, gpu(24, 400)).problems


@pytest.mark.parametrize(
    ("name", "layer"), [("DeepSeek-V3", 61), ("DeepSeek-R1", 61), ("GLM-4.5-Air", 46)]
)
def test_experts_of_layers_that_are_not_served_are_not_counted(name, layer):
    shape = known(name)
    assert shape.extra_expert_layers == (layer,)
    assert layer not in shape.moe_layers
    assert not fit(shape, cpu(4000)).problems


def test_everything_fits():
    result = fit(SHAPES["OLMoE-1B-7B"], cpu(64))
    assert result.cache.holds_everything
    assert option(result, "--moe-offload-config.cache_gb") == "100%"
    assert option(result, "--max-model-len") is None


def test_the_kv_cache_gets_a_quarter_or_what_is_asked_for():
    machine = cpu(64)
    available = machine.fast_bytes - MIXTRAL.dense_bytes - machine.runtime_bytes
    by_default = fit(MIXTRAL, machine)
    assert by_default.kv_bytes == pytest.approx(available / 4, rel=0.03)
    asked = fit(MIXTRAL, machine, kv_tokens=8192)
    assert asked.kv_bytes == (8192 + 128) * MIXTRAL.kv.bytes_per_token
    assert asked.cache.num_slots > by_default.cache.num_slots
    assert option(asked, "--max-model-len") == "8192"
    assert option(asked, "--kv-cache-memory-bytes") == str(asked.kv_bytes)


def test_a_gpu_sizes_its_kv_cache_itself():
    result = fit(MIXTRAL, gpu(24, 128), kv_tokens=4096)
    assert option(result, "--kv-cache-memory-bytes") is None
    assert option(result, "--max-model-len") == "auto"


def test_the_bound_by_hand():
    result = fit(MIXTRAL, cpu(64, link_gbps=10.0))
    bound = result.bound(0.9)
    assert bound.misses_per_token == pytest.approx(6.4)  # 32 layers, 2 of 8
    assert bound.read_bytes_per_token == pytest.approx(6.4 * 352_321_536)
    assert bound.tokens_per_s == pytest.approx(10e9 / (6.4 * 352_321_536))
    assert result.bound(1.0).tokens_per_s is None
    rates = [result.bound(rate).tokens_per_s for rate in HIT_RATES]
    assert rates == sorted(rates)


def test_reading_the_weights_bounds_too_where_asked_for():
    machine = cpu(64, link_gbps=10.0, memory_gbps=50.0)
    dense = MIXTRAL.dense_bytes - 32000 * 4096 * 2
    seconds = (dense + 64 * 352_321_536) / 50e9
    assert fit(MIXTRAL, machine).bound(1.0).tokens_per_s == pytest.approx(1 / seconds)


def test_what_host_memory_does_not_hold_comes_from_disk():
    plenty, scarce = fit(MIXTRAL, gpu(24, 128)), fit(MIXTRAL, gpu(24, 64))
    assert plenty.host_share == 1
    assert scarce.host_share == pytest.approx((64 * 0.92 - 4) / 84, rel=0.01)
    assert scarce.bound(0.5).tokens_per_s < plenty.bound(0.5).tokens_per_s
    misses = 32 * 352_321_536
    seconds = misses / 25e9 + misses * (1 - scarce.host_share) / 7e9
    assert scarce.bound(0.5).tokens_per_s == pytest.approx(1 / seconds)


def test_experts_that_are_all_on_the_gpu_take_no_host_memory():
    resident, planned = fit(MIXTRAL, gpu(141, 40)), fit(MIXTRAL, gpu(24, 128))
    assert resident.way is Way.RESIDENT
    assert (resident.host_expert_bytes, planned.host_expert_bytes) == (0, 84 * GIB)


def test_expert_parallelism_of_one_rank_divides_nothing():
    assert fit(MIXTRAL, gpu(24, 128), split=Split(has_expert_parallel=True)).way is Way.DEVICE


def test_building_takes_two_or_three_layers():
    assert build_peak_bytes(1 << 30) == 3 << 30
    assert build_peak_bytes((1 << 30) + 1) == 2 * ((1 << 30) + 1)


def test_amounts_are_readable():
    assert amount(3 * GIB) == "3.00 GiB"
    assert amount(1536 * 1024) == "1.5 MiB"
    assert amount(5000 * GIB) == "5,000.00 GiB"


@pytest.mark.parametrize(
    ("shape", "machine", "split", "way", "why"),
    [
        (MIXTRAL, cpu(64), Split(), None, ""),
        (MIXTRAL, gpu(24, 128), Split(), Way.DEVICE, ""),
        (MIXTRAL, gpu(141, 128), Split(), Way.RESIDENT, ""),
        (MIXTRAL, gpu(24, 64), Split(), Way.HOST, "host memory holds"),
        (
            known("gpt-oss-120b"),
            gpu(24, 96),
            Split(),
            Way.HOST,
            "experts are quantised (mxfp4)",
        ),
        (
            MIXTRAL,
            gpu(24, 256),
            Split(tensor_parallel=2, has_expert_parallel=True),
            Way.HOST,
            "workers divide the experts",
        ),
        (MIXTRAL, gpu(24, 256), Split(pipeline_parallel=2), Way.HOST, "divide the layers"),
    ],
)
def test_who_plans_a_gpus_cache(shape, machine, split, way, why):
    result = fit(shape, machine, split=split)
    assert not result.problems
    assert result.way is way
    assert why in result.why_host
    assert (way is Way.HOST) is bool(result.why_host)
    assert (result.planning_bytes > 0) is (way is Way.DEVICE)
    if way is Way.DEVICE:
        assert not result.cache.num_staging_slots
