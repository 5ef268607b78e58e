"""`vllm serve` as users run it: HTTP, /metrics, the log, a recorded trace."""

import json
import urllib.request

import numpy as np
import pytest

from scripts.harness.server import Server, ServerDied
from tests.integration.conftest import PREFILL_TOKENS, prompt
from vllm_moe_offload.replay.run import replay_recorded
from vllm_moe_offload.trace.routing import load_trace

pytestmark = pytest.mark.vllm

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


def complete(server, tokens, max_tokens=16):
    """Generated text and exact logprobs of one greedy completion."""
    body = {
        "model": "demo",
        "prompt": tokens,
        "max_tokens": max_tokens,
        "temperature": 0,
        "logprobs": 5,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        choice = json.load(answer)["choices"][0]
    return choice["text"], choice["logprobs"]


def offload(store_dir, *more):
    return ["--moe-offload=trace", "--moe-offload-config.store_dir", str(store_dir), *more]


PROMPTS = [prompt(seed, length) for seed, length in ((1, 5), (2, 60), (3, 300))]


def test_requests_metrics_log_and_trace(demo_model, store_dir, tmp_path):
    model = demo_model("mixtral")
    with Server(model, ARGUMENTS, log=tmp_path / "plain.log") as server:
        server.wait_healthy()
        expected = [complete(server, tokens) for tokens in PROMPTS]
        assert not [name for name in server.metrics() if "moe_offload" in name]

    trace = tmp_path / "routing.npz"
    arguments = [
        *ARGUMENTS,
        *offload(store_dir, "--moe-offload-config.cache_gb", "50%"),
        "--moe-offload-config.record_trace",
        str(trace),
    ]
    with Server(model, arguments, log=tmp_path / "offload.log") as server:
        server.wait_healthy()
        before = server.metrics()
        assert before["vllm:moe_offload_hits_total"] == 0  # warm-up runs do not count
        assert [complete(server, tokens) for tokens in PROMPTS] == expected
        after = server.metrics()
        assert after["vllm:moe_offload_hits_total"] > 0
        assert after["vllm:moe_offload_misses_total"] > 0
        assert after["vllm:moe_offload_read_bytes_total"] > 0
        assert after["vllm:moe_offload_stall_seconds_total"] > 0
        assert after["vllm:moe_offload_prefetch_issued_total"] > 0
        server.stop()
        log = server.log
    assert "cache_gb=50%" in log
    assert "MoE offload, all in all: hit rate" in log

    with np.load(trace, allow_pickle=False) as recorded:
        computed = [len(tokens) + 15 for tokens in PROMPTS]  # the last token is never an input
        assert sorted(recorded["lens"].tolist()) == sorted(computed)
        assert sorted(recorded["prefill_lens"].tolist()) == sorted(map(len, PROMPTS))
        assert recorded["ids"].shape[0] == sum(computed)


@pytest.mark.parametrize(
    "mode",
    [
        "lrfu",
        pytest.param("lru", marks=pytest.mark.slow),
        pytest.param("lfu", marks=pytest.mark.slow),
    ],
)
def test_replay_gives_what_the_server_counted(demo_model, store_dir, tmp_path, mode):
    trace = tmp_path / "routing.npz"
    arguments = [
        *ARGUMENTS,
        f"--moe-offload={mode}",
        "--moe-offload-config",
        json.dumps(
            {"store_dir": str(store_dir), "cache_gb": "50%", "record_trace": str(trace)}
        ),
    ]
    with Server(demo_model("mixtral"), arguments, log=tmp_path / "log") as server:
        server.wait_healthy()
        for tokens in PROMPTS:
            complete(server, tokens)
        after = server.metrics()
        server.stop()
    counted = [after[f"vllm:moe_offload_{name}_total"] for name in ("hits", "misses")]
    # Replay drives the same cache and policy objects.
    replayed = replay_recorded(load_trace(trace), mode)
    assert [replayed.hits, replayed.misses] == counted
    assert replayed.misses > 0


def test_a_wrong_option_ends_the_server_at_once(demo_model, tmp_path):
    arguments = [*ARGUMENTS, "--moe-offload=trace", "--moe-offload-config.cachegb", "1"]
    with (
        Server(demo_model("mixtral"), arguments, log=tmp_path / "log") as server,
        pytest.raises(ServerDied, match="unknown option 'cachegb'; allowed: mode, cache_gb"),
    ):
        server.wait_healthy()
