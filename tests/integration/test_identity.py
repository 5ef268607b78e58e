"""Offloaded output is plain vLLM's: same tokens, bitwise the same logprobs.

Engines are expensive, so plain ones share one process and offloaded ones another.
"""

import pytest

from tests.integration.conftest import ARCHS, EXPERTS, LAYERS, assert_recorded, engine

pytestmark = pytest.mark.vllm


def offload(store_dir, cache_gb, mode="trace", **options):
    return {"mode": mode, "cache_gb": cache_gb, "store_dir": str(store_dir), **options}


def assert_identical(results, expected_rows):
    plain, *offloaded = results
    assert "error" not in plain, plain
    for result, rows in zip(offloaded, expected_rows, strict=True):
        assert "error" not in result, result
        assert all(name.startswith("Offloaded") for name in result["facts"]["classes"])
        assert sum(result["facts"]["shape"]) == rows
        assert result["facts"]["hits"] + result["facts"]["misses"] > 0
        assert result["batches"] == plain["batches"]
    assert not any(name.startswith("Offloaded") for name in plain["facts"]["classes"])


def otherwise_slow(*fast):
    """All architectures, those that another cell has in `make test` marked slow."""
    slow = pytest.mark.slow
    return [arch if arch in fast else pytest.param(arch, marks=slow) for arch in ARCHS]


# `make test` has olmoe in test_engine.py, and qwen3_moe in test_simulated_gpu.py.
@pytest.mark.parametrize("arch", otherwise_slow("mixtral", "deepseek_v2", "gpt_oss"))
def test_eager_at_half_capacity(arch, demo_model, store_dir, share_engines, tmp_path):
    """Features: each architecture, in mode `trace`; recording a trace of it."""
    model, trace = demo_model(arch), tmp_path / "routing.npz"
    rows = num_experts(arch) // 2
    recorded = offload(store_dir, "50%", record_trace=str(trace))
    jobs = [engine(model, eager=True), engine(model, eager=True, offload=recorded)]
    results = share_engines(jobs)
    assert_identical(results, [rows])
    assert results[1]["facts"]["misses"] > 0
    prompts = [prompt for batch in jobs[1]["batches"] for prompt in batch]
    assert_recorded(trace, prompts, jobs[1]["max_tokens"])


@pytest.mark.parametrize("arch", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_compiled_with_one_layer_of_rows(arch, demo_model, store_dir, share_engines):
    """Features: torch.compile; the least capacity that takes no waves."""
    model = demo_model(arch)
    jobs = [
        engine(model, eager=False),
        engine(model, eager=False, offload=offload(store_dir, one_layer(arch))),
    ]
    assert_identical(share_engines(jobs), [EXPERTS])


@pytest.mark.slow
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_capacity(arch, eager, demo_model, store_dir, share_engines):
    model = demo_model(arch)
    total = num_experts(arch)
    sizes = {"100%": total, "50%": total // 2, one_layer(arch): EXPERTS}
    if total // 4 >= EXPERTS:
        sizes["25%"] = total // 4
    jobs = [engine(model, eager=eager)]
    jobs += [engine(model, eager=eager, offload=offload(store_dir, size)) for size in sizes]
    assert_identical(share_engines(jobs), list(sizes.values()))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lru", "lru-layer", "lfu", "lrfu"])
def test_every_mode(mode, demo_model, store_dir, share_engines):
    model = demo_model("mixtral")
    jobs = [
        engine(model, eager=True),
        engine(model, eager=True, offload=offload(store_dir, "50%", mode, verify=True)),
    ]
    assert_identical(share_engines(jobs), [num_experts("mixtral") // 2])


def num_experts(arch):
    """Routed experts of the tiny model; deepseek_v2's first layer is dense."""
    return EXPERTS * (LAYERS - (arch == "deepseek_v2"))


def one_layer(arch):
    """Share of all experts that is exactly one layer."""
    return f"{100 * EXPERTS / num_experts(arch):.12f}%"
