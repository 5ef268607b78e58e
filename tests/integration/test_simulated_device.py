"""A GPU that plans its cache, on a CPU by its rule: plain vLLM's output, and figures that fit."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from scripts.demo_model import write_demo_model
from tests.integration import simulated_device
from tests.integration.conftest import (
    EXPERTS,
    SHAPE,
    assert_begins_alike,
    assert_recorded,
    engine,
)
from tests.integration.test_identity import assert_identical, num_experts, offload, one_layer
from vllm_moe_offload.integration.block_slots import SlotMap
from vllm_moe_offload.integration.layers import planned_on_device
from vllm_moe_offload.replay.one_pool import replay_one_pool_recorded
from vllm_moe_offload.trace.collection import ActivationCollection
from vllm_moe_offload.trace.routing import load_trace

pytestmark = pytest.mark.vllm

NGRAMS = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}


def on_device(model, late=1, eager=True, **options):
    """A job of ``engine`` where routing and counters arrive so many events late."""
    return {**engine(model, eager=eager, **options), "simulated_device": late}


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory):
    """A quarter of its experts is more than a layer has."""
    directory = tmp_path_factory.mktemp("deep") / "qwen3_moe"
    write_demo_model(directory, "qwen3_moe", **{**SHAPE, "layers": 6})
    return directory


def test_half_a_quarter_and_one_layer(deep_model, store_dir, share_engines):
    """Features: a GPU that plans, at three capacities; qwen3_moe; prompts in chunks; logs late by
    none, one and two; metrics."""
    model, total = deep_model, 6 * EXPERTS
    sizes = {"50%": total // 2, "25%": total // 4, f"{100 / 6:.12f}%": EXPERTS}
    jobs = [engine(model, eager=True)]
    for late, size in enumerate(sizes):
        jobs.append(
            on_device(model, late, offload=offload(store_dir, size), disable_log_stats=False)
        )
    results = share_engines(jobs)
    assert_identical(results, list(sizes.values()))
    misses = [result["facts"]["misses"] for result in results[1:]]
    assert 0 < misses[0] < misses[1] < misses[2]
    for before, result in pairwise(results[1:]):
        # Counters of a process go on where the engine before has ended.
        for name in ("hits", "misses", "read_bytes"):
            grown = figures_of(result)[name] - figures_of(before)[name]
            assert grown == result["facts"][name] > 0, name
        assert figures_of(result)["slots"] == result["facts"]["shape"][0]


def figures_of(result):
    """On /metrics, of the one rank that there is."""
    return result["metrics_by_rank"]["0"]


def test_compiled(demo_model, store_dir, share_engines, tmp_path):
    """Features: a GPU that plans, in vLLM's operator of a compiled model; a warm-up that computes.

    The plain engine has that operator too, which a CPU otherwise does without. A replay begins with
    an empty pool, as serving does only if warm-up has left nothing in it.
    """
    model, trace = demo_model("mixtral"), tmp_path / "routing.npz"
    recorded = offload(store_dir, one_layer("mixtral"), "lrfu", record_trace=str(trace))
    jobs = [
        on_device(model, eager=False),
        on_device(model, eager=False, offload=recorded),
    ]
    results = share_engines(jobs)
    assert_identical(results, [EXPERTS])
    assert results[1]["facts"]["calls_in_vain"] > 0
    assert_counted(results[1]["facts"], load_trace(trace))


def test_all_experts_are_vllms_own_affair(demo_model, store_dir, share_engines, tmp_path):
    """Features: everything fits on a GPU; routing is seen where it is recorded, and nowhere else."""
    model, trace = demo_model("deepseek_v2"), tmp_path / "routing.npz"
    jobs = [
        engine(model, eager=True),
        on_device(model, offload=offload(store_dir, "100%")),
        on_device(model, offload=offload(store_dir, "100%", record_trace=str(trace))),
    ]
    plain, resident, recorded = share_engines(jobs)
    for result in (resident, recorded):
        assert "error" not in result, result
        assert result["batches"] == plain["batches"]
        assert result["facts"]["hits"] + result["facts"]["misses"] == 0
        assert result["facts"]["shape"] == [num_experts("deepseek_v2"), 0]
        assert result["facts"]["calls"] > 0
    assert_recorded(trace, prompts_of(jobs[2]), jobs[2]["max_tokens"])


def test_figures_matrices_and_trace_are_exact(mtp_model, store_dir, share_engines, tmp_path):
    """Features: what a GPU that plans counts and records, and the way planned on the host does; a
    router that chooses from groups; preemption; mode trace."""
    model = mtp_model("deepseek_v3")
    crowded = {"num_gpu_blocks_override": 8}
    kept = {name: str(tmp_path / f"{name}.msgpack") for name in ("device", "host")}
    traces = {name: str(tmp_path / f"{name}.npz") for name in ("device", "host")}

    def kept_as(name):
        return offload(store_dir, "50%", trace_path=kept[name], record_trace=traces[name])

    jobs = [
        engine(model, eager=True, **crowded),
        on_device(model, 2, offload=kept_as("device"), **crowded),
        engine(model, eager=True, offload=kept_as("host"), **crowded),
    ]
    for job in jobs:
        job["max_tokens"] = 40  # more than the blocks hold: requests push each other out
    results = share_engines(jobs)
    assert_identical(results, [num_experts("deepseek_v2") // 2] * 2)
    assert_recorded(traces["device"], prompts_of(jobs[1]), jobs[1]["max_tokens"])
    device, host = (load_trace(traces[name]) for name in ("device", "host"))
    assert device.schedule.recomputed_ids.size > 0, "no request was preempted"
    assert routing_of(device) == routing_of(host)
    assert_counted(results[1]["facts"], device)
    assert matrices_of(kept["device"]) == matrices_of(kept["host"])
    assert len(matrices_of(kept["device"])) > 1


def test_guesses_count_once_they_are_known(demo_model, store_dir, share_engines, tmp_path):
    """Features: n-gram speculation where a GPU plans; wrong guesses are in no trace and no matrix,
    however late their routing comes."""
    model = demo_model("qwen3_moe")
    kept = {name: str(tmp_path / f"{name}.msgpack") for name in ("device", "host")}
    traces = {name: str(tmp_path / f"{name}.npz") for name in ("device", "host")}
    options = {
        name: {
            "offload": offload(
                store_dir, "50%", trace_path=kept[name], record_trace=traces[name]
            ),
            "speculative_config": NGRAMS,
        }
        for name in kept
    }
    jobs = [
        engine(model, eager=True, speculative_config=NGRAMS),
        on_device(model, 2, **options["device"]),
        engine(model, eager=True, **options["host"]),
    ]
    for job in jobs:
        job["max_tokens"] = 24
    results = share_engines(jobs)
    assert_identical(results, [num_experts("qwen3_moe") // 2] * 2)
    guessed = results[1]["speculation"]
    assert 0 < guessed["accepted_tokens"] < guessed["draft_tokens"]
    device, host = (load_trace(traces[name]) for name in ("device", "host"))
    assert routing_of(device) == routing_of(host)
    assert_counted(results[1]["facts"], device)
    assert matrices_of(kept["device"]) == matrices_of(kept["host"])


def assert_counted(facts, trace):
    """What a worker counted is what a replay of its recorded trace counts."""
    replayed = replay_one_pool_recorded(trace, "lrfu")
    assert (facts["hits"], facts["misses"]) == (replayed.hits, replayed.misses)


def routing_of(trace):
    """All of a recorded trace but the sizes of the cache."""
    arrays = [trace.ids, trace.starts, trace.lens, trace.prefill_lens]
    names = (
        *("row_step", "row_request", "row_position", "row_token", "recomputed_ids"),
        *("first_positions", "end_steps", "layer_ids"),
    )
    arrays += [getattr(trace.schedule, name) for name in names]
    return [array.tolist() for array in arrays]


def matrices_of(path):
    collection = ActivationCollection.load(path)
    entries = map(collection.entry, range(len(collection)))
    return sorted((entry.keys.tolist(), entry.counts.tolist()) for entry in entries)


def test_waves(demo_model, store_dir, share_engines):
    """Features: a GPU that plans and has fewer slots than a layer has experts."""
    model = demo_model("mixtral")
    share = f"{100 * 3 / num_experts('mixtral'):.12f}%"
    plain, waves = share_engines(
        [
            engine(model, eager=True, dtype="float32"),
            on_device(model, offload=offload(store_dir, share, "lru"), dtype="float32"),
        ]
    )
    assert "error" not in waves, waves
    assert waves["facts"]["shape"] == [3, 0]
    for mine, theirs in zip(waves["batches"], plain["batches"], strict=True):
        assert_begins_alike(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["mixtral", "olmoe", "gpt_oss", "deepseek_v2"])
def test_every_architecture(arch, demo_model, store_dir, share_engines):
    model, total = demo_model(arch), num_experts(arch)
    jobs = [engine(model, eager=True)]
    sizes = {"50%": total // 2, one_layer(arch): EXPERTS}
    jobs += [on_device(model, offload=offload(store_dir, size)) for size in sizes]
    assert_identical(share_engines(jobs), list(sizes.values()))


def prompts_of(job):
    return [prompt for batch in job["batches"] for prompt in batch]


# What the simulation itself would not let pass.


def test_an_expert_without_a_slot_stops_the_kernel(monkeypatch):
    seen = []
    monkeypatch.setattr(
        simulated_device.block_slots, "apply", lambda *args: seen.append(args[2:])
    )
    weights, ids = torch.ones(1, 2), torch.tensor([[0, 1]], dtype=torch.int32)
    slot_of = torch.tensor([2, -1, 0], dtype=torch.int32)
    with pytest.raises(AssertionError, match="an expert without a slot"):
        simulated_device.kernel_on_slots(None, None, weights, ids, SlotMap(2, slot_of))
    assert not seen
    wave = SlotMap(2, slot_of, is_wave=True)
    simulated_device.kernel_on_slots(None, None, weights, ids, wave)
    ((of_wave, slots),) = seen
    assert (of_wave.tolist(), slots.tolist()) == ([[1, 0]], [[2, 0]])


def test_padded_rows_have_experts_that_nobody_asked_for(monkeypatch):
    context = SimpleNamespace(is_padding=None)
    for module in (simulated_device, planned_on_device):
        monkeypatch.setattr(module, "get_forward_context", lambda: context)
    calls = []

    class Cache:
        num_experts = num_slots = EXPERTS

        def bring(self, layer, tokens):
            calls.append(tokens)

        def rename(self, ids):
            return ids

    padded = simulated_device.PaddedCalls(
        Cache(),
        planned_on_device.RowsOfStep(torch.zeros(16, dtype=torch.int32)),
        lambda layer, x, *_: x,
    )
    x, ids = torch.ones(3, 4), torch.tensor([[0, 2], [2, 1], [4, 3]], dtype=torch.int32)
    layer = SimpleNamespace(moe_layer=0, global_num_experts=EXPERTS)
    assert torch.equal(padded.forward(layer, x, torch.ones(3, 2), ids), x)
    (tokens,) = calls
    assert tokens.is_padding.tolist() == [False] * 3 + [True] * 5
    assert tokens.ids[:3].tolist() == ids.tolist()
    assert not set(tokens.ids[3:].flatten().tolist()) & set(ids.flatten().tolist())
    assert context.is_padding is None
