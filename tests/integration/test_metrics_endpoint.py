"""/metrics of a live server against what its workers count themselves."""

import json
import os
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from scripts.harness.server import Server
from tests.integration.conftest import BATCH, EXPERTS, LAYERS, SHAPE, prompt
from tests.integration.test_server import ARGUMENTS, complete
from vllm_moe_offload import __version__

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[2]
PROBE = ["--worker-extension-cls", "tests.integration.worker_probe.WorkerProbe"]
PREFIX = "vllm:moe_offload_"
HALF_ROWS = LAYERS * EXPERTS // 2
HALF_BYTES = HALF_ROWS * 3 * SHAPE["hidden"] * SHAPE["intermediate"] * 2
"""Half of the experts: three matrices each, in bf16."""


def serve(model, store_dir, log, *more, **environment):
    """A server that tells what its workers count, with room for half of the experts."""
    options = {"store_dir": str(store_dir), "cache_gb": "50%"}
    arguments = ["--moe-offload=trace", "--moe-offload-config", json.dumps(options)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return Server(
        model, [*ARGUMENTS, *arguments, *PROBE, *more], log=log, environment=environment
    )


def truth(server):
    """What each worker says of itself, by rank."""
    request = urllib.request.Request(
        f"{server.url}/collective_rpc",
        json.dumps({"method": "moe_offload_truth"}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return {str(rank): told for rank, told in enumerate(json.load(answer)["results"])}


def scrape(server):
    """The plugin's samples by rank and name; fails if one appears twice."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.startswith(PREFIX):
                continue
            labels = dict(sample.labels)
            of_rank = found.setdefault(labels.pop("rank"), {})
            name = sample.name.removeprefix(PREFIX)
            assert name not in of_rank, f"{sample.name} twice for one worker"
            of_rank[name] = sample.value
            expected = {"model_name": "demo", "engine": "0"}
            if name == "policy_info":
                expected |= {"policy": "trace", "prefetch": "on", "version": __version__}
            assert labels == expected
    return found


def assert_equal_while_nothing_runs(server, times=1):
    """A scrape between two equal answers of the workers must be equal to them."""
    for _ in range(times):
        for _ in range(20):
            before, scraped, after = truth(server), scrape(server), truth(server)
            if before == after:
                break
        assert before == after, "the server does not come to rest"
        assert scraped == before
    return before


def check(server, num_ranks=1, times=3):
    server.wait_healthy()
    # Sizes are there before the first request; warm-up is not counted.
    first = assert_equal_while_nothing_runs(server, times)
    assert sorted(first) == [str(rank) for rank in range(num_ranks)]
    for told in first.values():
        assert told["cache_bytes"] == HALF_BYTES / num_ranks
        assert told["slots"] == HALF_ROWS - 2  # the rest are staging slots
        assert told["hits_total"] == told["misses_total"] == told["resident_experts"] == 0
    for seed, length in ((1, 5), (2, 60), (3, 300)):
        complete(server, prompt(seed, length))
        assert_equal_while_nothing_runs(server)
    with ThreadPoolExecutor(len(BATCH)) as pool:
        list(pool.map(lambda tokens: complete(server, tokens), BATCH))
    last = assert_equal_while_nothing_runs(server, times)
    for told in last.values():
        idle = {name for name, value in told.items() if value == 0}
        # How a prefetch of the tiny model ends is a matter of microseconds.
        assert idle <= {f"prefetch_{end}_total" for end in ("useful", "late", "wasted")}
    return last


def test_metrics_are_what_the_worker_counts(demo_model, store_dir, tmp_path):
    with serve(demo_model("mixtral"), store_dir, tmp_path / "log") as server:
        check(server)


@pytest.mark.slow
def test_metrics_are_the_same_from_all_api_servers(demo_model, store_dir, tmp_path):
    more = ["--api-server-count", "4"]
    with serve(demo_model("mixtral"), store_dir, tmp_path / "log", *more) as server:
        check(server, times=12)  # whichever of the four answers
        assert server.log.count("Started server process") == 4


@pytest.mark.slow
def test_each_rank_has_its_own_metrics(demo_model, store_dir, tmp_path):
    more = ["--tensor-parallel-size", "2"]
    with serve(
        demo_model("mixtral"),
        store_dir,
        tmp_path / "log",
        *more,
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    ) as server:
        ranks = check(server, num_ranks=2)
    # Both see the same routing; when a prefetch arrives is a matter of each one's reader.
    needed = [told["hits_total"] + told["misses_total"] for told in ranks.values()]
    assert needed[0] == needed[1]
