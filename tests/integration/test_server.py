"""`vllm serve` as users run it: HTTP, /metrics, the log, a recorded trace."""

import json

import pytest

from scripts.harness.server import Server, ServerDied
from tests.integration.conftest import assert_recorded, prompt
from tests.integration.served import ARGUMENTS, PROMPTS, complete, serve
from vllm_moe_offload.replay.run import replay_recorded
from vllm_moe_offload.trace.collection import ActivationCollection
from vllm_moe_offload.trace.routing import load_trace

pytestmark = pytest.mark.vllm


def test_answers_are_plain_vllms_and_counted(demo_model, trace_server, tmp_path):
    """Features: serving over HTTP in mode `trace`; no metrics of ours without offload."""
    with Server(demo_model("mixtral"), ARGUMENTS, log=tmp_path / "plain.log") as server:
        server.wait_healthy()
        expected = [complete(server, tokens) for tokens in PROMPTS]
        assert not [name for name in server.metrics() if "moe_offload" in name]

    before = trace_server.metrics()
    assert [complete(trace_server, tokens) for tokens in PROMPTS] == expected
    after = trace_server.metrics()
    for name in ("hits", "misses", "read_bytes", "stall_seconds", "prefetch_issued"):
        assert (
            after[f"vllm:moe_offload_{name}_total"] > before[f"vllm:moe_offload_{name}_total"]
        )
    assert "cache_gb=50% -> " in trace_server.log
    assert "; all of them: --moe-offload-config.cache_gb 0.003" in trace_server.log


@pytest.mark.parametrize(
    "mode",
    [
        "lrfu",
        pytest.param("lru", marks=pytest.mark.slow),
        pytest.param("lfu", marks=pytest.mark.slow),
    ],
)
def test_replay_gives_what_the_server_counted(demo_model, store_dir, tmp_path, mode):
    """Features: recording a server's trace, replay of it, mode `lrfu`, the log's last line."""
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
        log = server.log
    assert "MoE offload, all in all: hit rate" in log
    assert_recorded(trace, PROMPTS, max_tokens=16)
    counted = [after[f"vllm:moe_offload_{name}_total"] for name in ("hits", "misses")]
    # Replay drives the same cache and policy objects.
    replayed = replay_recorded(load_trace(trace), mode)
    assert [replayed.hits, replayed.misses] == counted
    assert replayed.misses > 0


def test_a_wrong_option_ends_the_server_at_once(demo_model, tmp_path):
    """Feature: options that are refused before anything is loaded."""
    arguments = [*ARGUMENTS, "--moe-offload=trace", "--moe-offload-config.cachegb", "1"]
    with (
        Server(demo_model("mixtral"), arguments, log=tmp_path / "log") as server,
        pytest.raises(ServerDied, match="unknown option 'cachegb'; allowed: mode, cache_gb"),
    ):
        server.wait_healthy()


def test_two_servers_share_a_store(demo_model, tmp_path):
    """Features: the first one keeps its activation matrices and its trace; the second one, which
    ends later, changes neither, and a third that would record the same is refused."""
    model, stores, trace = demo_model("mixtral"), tmp_path / "stores", tmp_path / "a.npz"
    records = ["--moe-offload-config.record_trace", str(trace)]
    patient = ["--shutdown-timeout", "60"]
    with serve(model, stores, tmp_path / "first", *records) as first:
        first.wait_healthy()
        with serve(model, stores, tmp_path / "second", *patient) as second:
            second.wait_healthy()
            (kept,) = stores.glob("*/activations.msgpack.lock")
            kept = kept.with_suffix("")
            assert f"another server keeps its activation matrices in {kept}" in second.log
            with (
                serve(model, stores, tmp_path / "third", *records) as third,
                pytest.raises(ServerDied, match=f"another server records to {trace}; give"),
            ):
                third.wait_healthy()
            for server, count in ((first, 7), (second, 2)):
                for seed in range(count):
                    complete(server, prompt(seed, 20))
            first.stop()
            assert "another server" not in first.log
            assert len(ActivationCollection.load(kept)) == 7
            second.stop()
    assert len(ActivationCollection.load(kept)) == 7
    assert load_trace(trace).num_requests == 7
    assert [path.name for path in tmp_path.glob("a.npz*")] == ["a.npz"]
