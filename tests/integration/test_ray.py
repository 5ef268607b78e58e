"""Several machines: tensor parallel over Ray nodes, and over two simulated hosts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration import clusters
from tests.integration.conftest import DRIVER, ENGINES, Job, assert_recorded, engine
from tests.integration.served import (
    ARGUMENTS,
    PROBE,
    PROMPTS,
    assert_equal_while_nothing_runs,
    complete,
    offload,
)

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

RAY = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}


def offloaded(model: Path, store_dir: Path, **extra: Any) -> Job:
    """A job on two Ray workers, with half of the experts cached; its counters are told."""
    offload = {"mode": "trace", "cache_gb": "50%", "store_dir": str(store_dir)}
    job = engine(
        model, eager=True, offload=offload, disable_log_stats=False, **{**RAY, **extra}
    )
    return {**job, "facts": False}


@pytest.fixture(scope="module")
def plain(
    demo_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Plain vLLM with two ranks of its own on this machine."""
    job = engine(demo_model("mixtral"), eager=True, tensor_parallel_size=2) | {"facts": False}
    return run_here(job, tmp_path_factory.mktemp("plain"))


def run_here(job: Job, directory: Path) -> dict[str, Any]:
    """An engine with two workers that vLLM starts itself, on this machine."""
    jobs, out = directory / "jobs.json", directory / "out.json"
    jobs.write_text(json.dumps([job]))
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(jobs), str(out)],
        env={**ENGINES, **clusters.two_cores()},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    (result,) = json.loads(out.read_text())
    assert "error" not in result, result
    return result


def assert_served(result: dict[str, Any], plain: dict[str, Any]) -> None:
    """The output is plain vLLM's, and experts were cached for it."""
    assert "error" not in result, result
    assert result["batches"] == plain["batches"]
    assert result["metrics"]["misses"] > 0


def test_two_ray_nodes(plain, demo_model, tmp_path):
    """Features: Ray on CPUs; two ranks that build their stores in one store_dir at once; a trace."""
    stores, trace = tmp_path / "stores", tmp_path / "routing.npz"
    job = offloaded(demo_model("mixtral"), stores)
    job["llm"]["additional_config"]["moe_offload"]["record_trace"] = str(trace)
    with clusters.ray_nodes({}, {}) as address:
        (result,) = clusters.run_on(address, [job], tmp_path)
    assert_served(result, plain)
    prompts = [prompt for batch in job["batches"] for prompt in batch]
    assert_recorded(trace, prompts, job["max_tokens"])
    assert sorted(path.parent.name for path in stores.glob("*/*/experts.bin")) == [
        "tp0of2",
        "tp1of2",
    ]


@pytest.fixture(scope="module")
def hosts() -> Iterator[clusters.Hosts]:
    with clusters.two_hosts() as found:
        yield found


def test_two_hosts(hosts, plain, demo_model, tmp_path):
    """Features: hosts that share no memory; each builds its own part of the store."""
    job = offloaded(demo_model("mixtral"), hosts.local / "stores")
    (result,) = hosts.run([job], tmp_path)
    assert_served(result, plain)
    needed = [told["hits"] + told["misses"] for told in result["metrics_by_rank"].values()]
    assert len(needed) == 2, "counters of the rank on host 2 are not there"
    assert needed[0] == needed[1] > 0, "slices of the same experts need alike, to the last step"
    for host, rank in ((1, "tp0of2"), (2, "tp1of2")):
        built = hosts.files(host, "stores/*/*/experts.bin")
        assert [Path(path).parent.name for path in built] == [rank]


@pytest.mark.parametrize(
    ("layout", "cache_gb"),
    [
        ({"tensor_parallel_size": 2, "enable_expert_parallel": True}, "60%"),
        ({"pipeline_parallel_size": 2, "enforce_eager": False}, "100%"),
    ],
    ids=["experts", "layers"],
)
def test_other_layouts_on_two_hosts(layout, cache_gb, hosts, demo_model, tmp_path):
    """Features: whole experts, and stages, on two hosts: as on workers that vLLM starts."""
    options = {"mode": "trace", "cache_gb": cache_gb, "store_dir": str(tmp_path / "stores")}
    job = engine(demo_model("mixtral"), eager=True, offload=options, disable_log_stats=False)
    job = {**job, "llm": {**job["llm"], **layout}, "facts": False}
    here = run_here(job, tmp_path)
    job["llm"]["distributed_executor_backend"] = "ray"
    (result,) = hosts.run([job], tmp_path)
    assert "error" not in result, result
    assert result["batches"] == here["batches"]
    needed = [
        [told["hits"] + told["misses"] for told in one["metrics_by_rank"].values()]
        for one in (result, here)
    ]
    assert needed[0] == needed[1]
    assert min(needed[0]) > 0


def test_a_rank_killed_on_another_host(hosts, demo_model, tmp_path):
    """Features: `vllm serve` over two hosts: metrics of both; who was killed; a restart serves."""
    model, stores = demo_model("mixtral"), hosts.local / "stores"
    options = offload(stores, "--moe-offload-config.cache_gb", "50%")
    layout = ["--tensor-parallel-size", "2", "--distributed-executor-backend", "ray"]
    arguments = [*ARGUMENTS, *PROBE, *options, *layout]
    with hosts.serve(model, tmp_path / "log", *arguments) as server, hosts.network(1):
        server.wait_healthy()
        expected = complete(server, PROMPTS[0])
        told = assert_equal_while_nothing_runs(server)
        assert told["0"]["hits_total"] + told["0"]["misses_total"] > 0
        hosts.call("run", "2", "pkill", "-KILL", "-f", "ray::RayWorkerProc")
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            complete(server, PROMPTS[1])
        server.process.wait(90)
        lines = server.log.splitlines()
    (summary,) = (line for line in lines if "MoE offload, all in all" in line)
    assert ", ended before: rank 1 (pid " in summary
    assert "MoE offload: the engine ended: rank 1 (pid " in lines[-1]

    with hosts.serve(model, tmp_path / "again", *arguments) as server, hosts.network(1):
        server.wait_healthy()
        assert complete(server, PROMPTS[0]) == expected
        os.killpg(server.process.pid, signal.SIGINT)
        server.process.wait(60)


def test_a_worker_on_another_node_says_why_it_does_not_start(hosts, demo_model, tmp_path):
    hosts.call("run", "2", "sh", "-c", f"echo > {hosts.local}/taken")
    job = offloaded(demo_model("mixtral"), hosts.local / "taken")
    (result,) = hosts.run([job], tmp_path)
    assert result["error"].startswith(
        "StartError: the engine did not start: on Ray node 10.77.0.2: StoreError: cannot create "
        f"{hosts.local}/taken for the expert store"
    )


def test_nodes_that_differ_are_refused(demo_model, tmp_path):
    older = tmp_path / "older" / "vllm_moe_offload"
    older.mkdir(parents=True)
    (older / "__init__.py").write_text('__version__ = "0.0.1"\n')
    path = f"{older.parent}:{ENGINES['PYTHONPATH']}"
    job = offloaded(demo_model("mixtral"), tmp_path / "stores")
    with clusters.ray_nodes({"VLLM_PLUGINS": ""}, {"PYTHONPATH": path}) as address:
        (result,) = clusters.run_on(address, [job], tmp_path)
    assert result["error"].startswith("OptionError: --moe-offload: Ray nodes do not run what")
    assert "has plugin: switched off by VLLM_PLUGINS='', here: installed" in result["error"]
    assert "has vllm-moe-offload: 0.0.1, here: " in result["error"]
    assert not list((tmp_path / "stores").glob("*")), "nothing was loaded"
