"""`vllm serve` on a tiny model, and what a client asks of it."""

from __future__ import annotations

import json
import os
import urllib.request
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from scripts.harness.server import Server
from tests.integration.conftest import EXPERTS, LAYERS, PREFILL_TOKENS, ROOT, SHAPE, prompt
from vllm_moe_offload import __version__

ARGUMENTS = [
    "--enforce-eager",
    "--max-model-len",
    "384",
    "--max-num-batched-tokens",
    str(PREFILL_TOKENS),
    "--kv-cache-memory-bytes",
    str(64 << 20),
    "--served-model-name",
    "demo",
]
PROBE = ["--worker-extension-cls", "tests.integration.worker_probe.WorkerProbe"]
PREFIX = "vllm:moe_offload_"
HALF_ROWS = LAYERS * EXPERTS // 2
HALF_BYTES = HALF_ROWS * 3 * SHAPE["hidden"] * SHAPE["intermediate"] * 2
"""Half of the experts: three matrices each, in bf16."""
PROMPTS = [prompt(seed, length) for seed, length in ((1, 5), (2, 60), (3, 300))]


def offload(store_dir: Path, *more: str) -> list[str]:
    """Arguments of a server that offloads."""
    return ["--moe-offload=trace", "--moe-offload-config.store_dir", str(store_dir), *more]


def post(server: Server, path: str, body: dict[str, Any]) -> Any:
    """The JSON that the server answers."""
    request = urllib.request.Request(
        f"{server.url}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def complete(server: Server, tokens: list[int], max_tokens: int = 16) -> tuple[str, Any]:
    """Generated text and exact logprobs of one greedy completion."""
    body = {
        "model": "demo",
        "prompt": tokens,
        "max_tokens": max_tokens,
        "temperature": 0,
        "logprobs": 5,
        "ignore_eos": True,
    }
    choice = post(server, "v1/completions", body)["choices"][0]
    return choice["text"], choice["logprobs"]


# ---- a server that tells what its workers count ------------------------------------------


def serve(model: Path, store_dir: Path, log: Path, *more: str, **environment: str) -> Server:
    """A server with the probe and room for half of the experts."""
    arguments = offload(store_dir, "--moe-offload-config.cache_gb", "50%")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return Server(
        model, [*ARGUMENTS, *arguments, *PROBE, *more], log=log, environment=environment
    )


def truth(server: Server) -> dict[str, dict[str, float]]:
    """What each worker says of itself, by rank."""
    results = post(server, "collective_rpc", {"method": "moe_offload_truth"})["results"]
    return {str(rank): told for rank, told in enumerate(results)}


def scrape(server: Server) -> dict[str, dict[str, float]]:
    """The plugin's samples by rank and name; fails if one appears twice."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found: dict[str, dict[str, float]] = {}
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
                assert labels.pop("part")
                assert labels.pop("way") == "host"
            assert labels == expected
    return found


def assert_equal_while_nothing_runs(
    server: Server, times: int = 1
) -> dict[str, dict[str, float]]:
    """A scrape between two equal answers of the workers must be equal to them."""
    for _ in range(times):
        for _ in range(20):
            before, scraped, after = truth(server), scrape(server), truth(server)
            if before == after:
                break
        assert before == after, "the server does not come to rest"
        assert scraped == before
    return before


def assert_nothing_is_counted_yet(server: Server, num_ranks: int = 1, times: int = 3) -> None:
    """Sizes are there before the first request; warm-up is not counted."""
    first = assert_equal_while_nothing_runs(server, times)
    assert sorted(first) == [str(rank) for rank in range(num_ranks)]
    for told in first.values():
        assert told["cache_bytes"] == HALF_BYTES / num_ranks
        assert told["slots"] == HALF_ROWS - 2  # the rest are staging slots
        assert told["hits_total"] == told["misses_total"] == told["resident_experts"] == 0
