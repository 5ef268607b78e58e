"""Several workers: slices of experts, experts of a layer, layers of the model.

Plain vLLM's own CPU kernel knows no experts of other ranks (it reads beyond its weights), so what
expert parallelism gives is compared with slices: a sum over ranks is split otherwise, and only
where two tokens are as good as equally likely may the other one be chosen.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.demo_model import write_demo_model
from tests.integration.conftest import (
    DRIVER,
    ENGINES,
    EXPERTS,
    SHAPE,
    EngineProcess,
    Job,
    Run,
    assert_recorded,
    engine,
)
from vllm_moe_offload.replay.run import replay_recorded
from vllm_moe_offload.store.shelf import shelved_models
from vllm_moe_offload.trace.routing import load_trace

pytestmark = pytest.mark.vllm

SEVERAL = {
    **ENGINES,
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    # `apply_model` sends a function to the workers.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}
LIKELY = math.log(0.01)
"""What is less likely is no candidate, and of large negative logits, where bfloat16 is coarse."""


@pytest.fixture(scope="module")
def run_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs engines of two workers, those that another test had already not again."""
    process = EngineProcess(tmp_path_factory.mktemp("workers"), SEVERAL)
    known: dict[str, dict[str, Any]] = {}

    def run(jobs: list[Job]) -> list[dict[str, Any]]:
        keys = [json.dumps(job, sort_keys=True) for job in jobs]
        new = [job for key, job in zip(keys, jobs, strict=True) if key not in known]
        results = process.run(new) if new else []
        for job, result in zip(new, results, strict=True):
            assert "error" not in result, result["trace"]
            known[json.dumps(job, sort_keys=True)] = result
        return [known[key] for key in keys]

    yield run
    process.stop()


@pytest.fixture
def stores(store_dir: Path) -> Path:
    return store_dir / "parallel"


def offload(store_dir: Path, cache_gb: str = "50%", **options: Any) -> dict[str, Any]:
    return {"mode": "trace", "cache_gb": cache_gb, "store_dir": str(store_dir), **options}


def slices(model: Path, **more: Any) -> Job:
    return engine(model, eager=True, tensor_parallel_size=2, **more)


def whole_experts(model: Path, **more: Any) -> Job:
    return slices(model, enable_expert_parallel=True, **more)


def moves(expected: dict[str, Any], got: dict[str, Any]) -> Iterator[tuple[list[float], float]]:
    """Of every generated token with the same tokens before it: how far logprobs of likely tokens
    differ, and, where another one was chosen, how far the expected one is from the next best."""
    for ours, theirs in zip(got["batches"], expected["batches"], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            chosen = zip(one["ids"], other["ids"], strict=True)
            tops = zip(one["logprobs"], other["logprobs"], strict=True)
            for (mine, its), (top, other_top) in zip(chosen, tops, strict=True):
                values = {token: float.fromhex(value) for token, value in other_top.items()}
                moved = [
                    abs(float.fromhex(top[token]) - values[token])
                    for token in top.keys() & values.keys()
                    if values[token] > LIKELY
                ]
                first, second, *_ = sorted(values.values(), reverse=True)
                yield moved, 0.0 if mine == its else first - second
                if mine != its:
                    break


def assert_same_up_to_ties(
    alone: dict[str, Any], sliced: dict[str, Any], got: dict[str, Any]
) -> None:
    """``got`` is as near to ``sliced`` as ``alone`` is: all of them split the same sums otherwise.

    The same tokens, up to a first place where the best two lie so close that what splitting moves
    can put one before the other.
    """
    split = [move for moved, _ in moves(sliced, alone) for move in moved]
    ours = [move for moved, _ in moves(sliced, got) for move in moved]
    assert len(ours) > len(split) / 2
    for share in (0.5, 0.95):
        assert np.quantile(ours, share) < 2 * np.quantile(split, share)
    assert max(ours) < 4 * max(
        split
    )  # logits are bfloat16: a step is twice as far where they double
    assert max(gap for _, gap in moves(sliced, got)) < 2 * max(split)


def needed_per_layer(trace: Path) -> int:
    """Distinct experts that layer calls needed, summed over calls, from what a server recorded."""
    routing = load_trace(trace)
    assert routing.schedule is not None
    routed, schedule = routing.routed, routing.schedule
    total = 0
    for step in np.unique(schedule.row_step):
        ids = routed[schedule.row_token[schedule.row_step == step]]
        total += sum(np.unique(ids[:, layer]).size for layer in range(routing.num_layers))
    return total


def counted(result: dict[str, Any]) -> list[int]:
    """Hits and misses of each worker."""
    return [rank["hits"] + rank["misses"] for rank in result["facts"]["ranks"]]


def prompts_of(job: Job) -> list[list[int]]:
    return [prompt for batch in job["batches"] for prompt in batch]


@pytest.fixture
def run_divided(share_engines: Run, run_workers: Run) -> Callable[[Path, Job], dict[str, Any]]:
    """Runs a job whose experts are divided, and compares it with plain vLLM's other layouts."""

    def run(model: Path, job: Job) -> dict[str, Any]:
        (alone,) = share_engines([engine(model, eager=True)])
        sliced, ours = run_workers([slices(model), job])
        assert_same_up_to_ties(alone, sliced, ours)
        return ours

    return run


# ---- slices ------------------------------------------------------------------------------


def test_slices_of_experts(demo_model, stores, run_workers):
    """Features: tensor parallel, bitwise plain vLLM's."""
    model = demo_model("mixtral")
    plain, ours = run_workers([slices(model), slices(model, offload=offload(stores))])
    assert ours["batches"] == plain["batches"]
    assert len(set(counted(ours))) == 1
    assert counted(ours)[0] > 0
    assert all(rank["experts"] == EXPERTS for rank in ours["facts"]["ranks"])


# ---- whole experts -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "arch",
    [
        "mixtral",
        pytest.param("deepseek_v2", marks=pytest.mark.slow),  # shared experts
        pytest.param("qwen3_moe", marks=pytest.mark.slow),
        pytest.param("olmoe", marks=pytest.mark.slow),
    ],
)
def test_experts_divided(arch, demo_model, stores, run_divided, tmp_path):
    """Features: expert parallel; a recorded trace has the routing of all experts."""
    model, trace = demo_model(arch), tmp_path / "routing.npz"
    divided = whole_experts(model, offload=offload(stores, record_trace=str(trace)))
    ours = run_divided(model, divided)
    ranks = ours["facts"]["ranks"]
    assert [rank["experts"] for rank in ranks] == [EXPERTS // 2] * 2
    assert sum(rank["prefetch_issued"] for rank in ranks) > 0
    assert sum(rank["misses"] for rank in ranks) > 0
    assert_recorded(trace, prompts_of(divided), divided["max_tokens"])
    assert sum(counted(ours)) == needed_per_layer(trace)


@pytest.mark.slow
def test_what_a_worker_recorded_replays_to_what_it_counted(
    demo_model, stores, run_workers, tmp_path
):
    """Features: replay of one rank of several."""
    trace = tmp_path / "routing.npz"
    options = offload(stores, mode="lrfu", record_trace=str(trace))
    (ours,) = run_workers([whole_experts(demo_model("mixtral"), offload=options)])
    first = ours["facts"]["ranks"][0]
    replayed = replay_recorded(load_trace(trace), "lrfu")
    assert (replayed.hits, replayed.misses) == (first["hits"], first["misses"])


@pytest.mark.slow
@pytest.mark.parametrize("cache_gb", ["100%", "20%"], ids=["everything fits", "waves"])
def test_experts_divided_in_every_size(cache_gb, demo_model, stores, run_divided):
    model = demo_model("mixtral")
    divided = whole_experts(model, offload=offload(stores, cache_gb))
    ours = run_divided(model, divided)
    if cache_gb == "100%":
        assert sum(rank["misses"] for rank in ours["facts"]["ranks"]) == 0


@pytest.mark.slow
def test_experts_dealt_out_in_turn(demo_model, stores, run_divided, tmp_path):
    """Features: round-robin placement, which vLLM has for models with groups of experts."""
    model = tmp_path / "deepseek_v2"
    shutil.copytree(demo_model("deepseek_v2"), model)
    config = json.loads((model / "config.json").read_text())
    groups = {"n_group": 2, "topk_group": 2, "topk_method": "group_limited_greedy"}
    (model / "config.json").write_text(json.dumps(config | groups))
    trace = tmp_path / "routing.npz"
    options = offload(stores, record_trace=str(trace))
    ours = run_divided(
        model, whole_experts(model, offload=options, expert_placement_strategy="round_robin")
    )
    schedule = load_trace(trace).schedule
    assert schedule is not None
    assert schedule.own_experts is not None
    assert schedule.own_experts.tolist() == list(range(0, EXPERTS, 2))
    assert sum(counted(ours)) == needed_per_layer(trace)


# ---- layers ------------------------------------------------------------------------------


@pytest.mark.slow
def test_layers_divided(stores, run_workers, tmp_path):
    """Features: pipeline parallel, bitwise plain vLLM's; a trace and a collection per stage."""
    model = tmp_path / "mixtral"
    write_demo_model(model, "mixtral", **{**SHAPE, "layers": 4})
    trace, collection = tmp_path / "routing.npz", tmp_path / "matrices.msgpack"
    options = offload(stores, "60%", record_trace=str(trace), trace_path=str(collection))
    job = engine(model, eager=False, pipeline_parallel_size=2)
    staged = engine(model, eager=False, pipeline_parallel_size=2, offload=options)
    plain, ours = run_workers([job, staged])
    assert ours["batches"] == plain["batches"]
    assert [rank["layers"] for rank in ours["facts"]["ranks"]] == [2, 2]
    assert all(rank["misses"] > 0 for rank in ours["facts"]["ranks"])
    for stage, layers in enumerate([[0, 1], [2, 3]]):
        part = tmp_path / f"routing.pp{stage}of2.npz"
        assert_recorded(part, prompts_of(staged), staged["max_tokens"])
        schedule = load_trace(part).schedule
        assert schedule is not None
        assert schedule.layer_ids.tolist() == layers
        assert needed_per_layer(part) == counted(ours)[stage]
        assert (tmp_path / f"matrices.pp{stage}of2.msgpack").exists()
    assert not trace.exists()


# ---- one store_dir -----------------------------------------------------------------------


@pytest.mark.slow
def test_two_servers_of_two_workers_build_one_store(demo_model, tmp_path):
    """Features: four builders in one store_dir, two for each part."""
    model, stores = demo_model("mixtral"), tmp_path / "stores"
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([slices(model, offload=offload(stores))]))
    outs = [tmp_path / f"out{server}.json" for server in range(2)]
    servers = [
        subprocess.Popen([sys.executable, str(DRIVER), str(jobs), str(out)], env=SEVERAL)
        for out in outs
    ]
    assert [server.wait(900) for server in servers] == [0, 0]
    first, second = (json.loads(out.read_text())[0] for out in outs)
    assert "error" not in first, first["trace"]
    assert first["batches"] == second["batches"]
    (shelved,) = shelved_models(stores)
    assert shelved.state == "complete"
    assert sorted(part.directory.name for part in shelved.parts) == ["tp0of2", "tp1of2"]
    assert not list(stores.glob("*/*.building-*"))


def test_another_token_is_no_tie():
    """What `assert_same_up_to_ties` lets pass is next to nothing."""

    def result(second: int, moved: float) -> dict[str, Any]:
        top = [{"1": (-0.1 - moved).hex(), "3": (-3.0).hex()}] * 2
        return {"batches": [[{"ids": [1, second], "logprobs": top}]]}

    alone, sliced = result(1, 0.02), result(1, 0.0)
    assert_same_up_to_ties(alone, sliced, result(1, 0.01))
    for wrong in (result(3, 0.01), result(1, 0.2)):
        with pytest.raises(AssertionError):
            assert_same_up_to_ties(alone, sliced, wrong)
