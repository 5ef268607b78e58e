"""vLLM's benchmarks with patches/ applied to the installed vLLM, as users run them.

The installed vLLM is patched only while a client runs and is put back whatever happens.
"""

import contextlib
import importlib.util
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from scripts import apply_patches
from scripts.apply_patches import State
from scripts.harness.server import Server
from tests.integration.conftest import EXPERTS, LAYERS, TOP_K
from tests.integration.served import ARGUMENTS, offload

FIGURES = {
    "moe_offload_hit_rate",
    "moe_offload_hits",
    "moe_offload_misses",
    "moe_offload_read_gb",
    "moe_offload_stall_share",
    "moe_offload_stall_seconds",
}
TITLE = "MoE Expert Cache"


@contextlib.contextmanager
def patched_vllm():
    """The installed vLLM with the patches; afterwards it is what it was."""
    installation = apply_patches.open_installation(apply_patches.find_site())
    found = installation.state()
    if found is not State.STOCK:
        warnings.warn(
            f"the benchmarks of the installed vLLM were {found!s} before this test: by you, or "
            "by tests that were killed (scripts/apply_patches.py revert)",
            stacklevel=3,
        )
    try:
        apply_patches.change(installation, State.PATCHED)
        yield
    finally:
        if found is not State.PATCHED:
            apply_patches.change(installation, State.STOCK)


def bench(*arguments):
    """What ``vllm bench`` printed."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("vllm")), "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return done.stdout


def bench_serve(server, model, result, *more):
    """Printed table and result JSON of eight random requests, two at a time."""
    output = bench(
        "serve",
        *("--base-url", server.url, "--model", "demo", "--tokenizer", str(model)),
        *("--dataset-name", "random", "--random-input-len", "40", "--random-output-len", "8"),
        *("--num-prompts", "8", "--max-concurrency", "2", "--temperature", "0"),
        *(
            "--save-result",
            "--result-dir",
            str(result.parent),
            "--result-filename",
            result.name,
        ),
        *more,
    )
    return output, json.loads(result.read_text())


def printed(output):
    """The figures of the added section, by label."""
    section = output.split(f"{TITLE}-")[1].splitlines()[1:4]
    return {label: float(value) for label, value in (line.split(":") for line in section)}


def check_figures(output, result):
    """Table and JSON say the same, and nothing impossible."""
    assert set(result) >= FIGURES
    hits, misses = result["moe_offload_hits"], result["moe_offload_misses"]
    assert hits > 0
    assert result["moe_offload_hit_rate"] == hits / (hits + misses)
    assert 0 <= result["moe_offload_stall_share"] < 1
    assert printed(output) == {
        "Expert hit rate (%)": pytest.approx(100 * result["moe_offload_hit_rate"], abs=0.01),
        "Experts read (GB)": pytest.approx(result["moe_offload_read_gb"], abs=0.01),
        "Stalled on expert reads (%)": pytest.approx(
            100 * result["moe_offload_stall_share"], abs=0.01
        ),
    }


# ---- vllm bench serve ------------------------------------------------------------------


@pytest.mark.vllm
def test_serve_reports_what_the_server_counted(demo_model, trace_server, tmp_path):
    """Feature: `vllm bench serve` with figures of the server's experts."""
    server, model = trace_server, demo_model("mixtral")
    before = server.metrics()
    with patched_vllm():
        output, result = bench_serve(server, model, tmp_path / "result.json")
        between = server.metrics()
        _, warmed = bench_serve(server, model, tmp_path / "warmed.json", "--num-warmups", "4")
    after = server.metrics()

    def counted(name, first=before, second=between):
        return second[f"vllm:moe_offload_{name}"] - first[f"vllm:moe_offload_{name}"]

    assert result["completed"] == 8
    assert result["mean_ttft_ms"] > 0
    assert "Mean TTFT (ms):" in output
    check_figures(output, result)
    assert result["moe_offload_misses"] > 0
    assert result["moe_offload_hits"] == counted("hits_total")
    assert result["moe_offload_misses"] == counted("misses_total")
    assert result["moe_offload_read_gb"] * 1e9 == pytest.approx(counted("read_bytes_total"))
    stall_seconds = result["moe_offload_stall_seconds"]
    assert stall_seconds == pytest.approx(counted("stall_seconds_total"))
    assert result["moe_offload_stall_share"] == stall_seconds / result["duration"]
    # Of the second run the server counted the warm-up requests too; the client does not.
    needed = warmed["moe_offload_hits"] + warmed["moe_offload_misses"]
    assert needed < counted("hits_total", between, after) + counted(
        "misses_total", between, after
    )


@pytest.mark.vllm
@pytest.mark.slow
def test_serve_without_offload_is_stock(demo_model, tmp_path):
    model = demo_model("mixtral")
    with Server(model, ARGUMENTS, log=tmp_path / "log") as server:
        server.wait_healthy()
        stock_output, stock = bench_serve(server, model, tmp_path / "stock.json")
        with patched_vllm():
            output, result = bench_serve(server, model, tmp_path / "patched.json")

    def labels(text):
        table = text[text.index("Serving Benchmark Result") :]
        return [line.split(":")[0] for line in table.splitlines()]

    assert list(result) == list(stock)
    assert labels(output) == labels(stock_output)


# ---- vllm bench latency, throughput ----------------------------------------------------

ENGINE = ["--enforce-eager", "--max-model-len", "384", "--kv-cache-memory-bytes", "67108864"]
OUTPUT_TOKENS = 8


def check_lookups(result, requests):
    """Experts needed by ``requests`` one after the other, as the warm-up's would not fit in.

    A request is one prefill, of up to all experts of a layer, and decode steps of top-k each.
    """
    needed = result["moe_offload_hits"] + result["moe_offload_misses"]
    decode = (OUTPUT_TOKENS - 1) * TOP_K
    assert needed >= requests * LAYERS * (decode + TOP_K)
    assert needed <= requests * LAYERS * (decode + EXPERTS)


@pytest.mark.vllm
def test_latency_reports_what_the_measured_iterations_did(demo_model, store_dir, tmp_path):
    """Feature: `vllm bench latency` with figures of the engine's experts."""
    path = tmp_path / "result.json"
    with patched_vllm():
        output = bench(
            *("latency", "--model", str(demo_model("mixtral")), *ENGINE, *offload(store_dir)),
            *("--moe-offload-config.cache_gb", "50%"),
            # It draws token ids below 10000: more than the demo model's tokenizer has.
            *("--load-format", "dummy", "--hf-overrides", '{"vocab_size": 10000}'),
            *("--skip-tokenizer-init", "--disable-detokenize"),
            *("--input-len", "16", "--output-len", str(OUTPUT_TOKENS), "--batch-size", "1"),
            *("--num-iters-warmup", "3", "--num-iters", "2", "--output-json", str(path)),
        )
    result = json.loads(path.read_text())
    check_figures(output, result)
    check_lookups(result, requests=2)
    stall_seconds = result["moe_offload_stall_seconds"]
    assert result["moe_offload_stall_share"] == stall_seconds / sum(result["latencies"])


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["--async-engine"], ["--backend", "vllm-chat"]])
def test_throughput_reports_what_the_measured_requests_did(
    demo_model, store_dir, tmp_path, how
):
    path = tmp_path / "result.json"
    with patched_vllm():
        output = bench(
            *("throughput", "--model", str(demo_model("mixtral")), *ENGINE),
            *(*offload(store_dir), "--moe-offload-config.cache_gb", "50%", *how),
            *("--dataset-name", "random", "--random-input-len", "16"),
            *("--random-output-len", str(OUTPUT_TOKENS), "--num-prompts", "1"),
            *("--num-warmups", "3", "--output-json", str(path)),
        )
    result = json.loads(path.read_text())
    check_figures(output, result)
    check_lookups(result, requests=1)
    stall_seconds = result["moe_offload_stall_seconds"]
    assert result["moe_offload_stall_share"] == stall_seconds / result["elapsed_time"]


# ---- the figures themselves ------------------------------------------------------------


@pytest.fixture(scope="module")
def patched_serve(tmp_path_factory):
    """The patched ``vllm.benchmarks.serve``, from a copy beside the installed vLLM."""
    site = tmp_path_factory.mktemp("site")
    (site / "vllm/benchmarks").mkdir(parents=True)
    installed = apply_patches.find_site() / "vllm"
    names = [f"benchmarks/{name}.py" for name in apply_patches.BENCHMARKS]
    for name in ("_version.py", *names):
        shutil.copy(installed / name, site / "vllm" / name)
    apply_patches.change(apply_patches.open_installation(site), State.PATCHED)
    spec = importlib.util.spec_from_file_location(
        "patched_serve", site / "vllm/benchmarks/serve.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["patched_serve"] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["patched_serve"]


TWO_RANKS = """\
# HELP vllm:moe_offload_hits_total Distinct experts of layer calls that were resident.
# TYPE vllm:moe_offload_hits_total counter
vllm:moe_offload_hits_total{engine="0",model_name="a model",rank="0"} 90.0
vllm:moe_offload_hits_total{engine="0",model_name="a model",rank="1"} 90.0
vllm:moe_offload_misses_total{engine="0",model_name="a model",rank="0"} 10.0
vllm:moe_offload_misses_total{engine="0",model_name="a model",rank="1"} 10.0
vllm:moe_offload_read_bytes_total{engine="0",model_name="a model",rank="0"} 1.5e+09
vllm:moe_offload_read_bytes_total{engine="0",model_name="a model",rank="1"} 1.5e+09
vllm:moe_offload_stall_seconds_total{engine="0",model_name="a model",rank="0"} 1.0
vllm:moe_offload_stall_seconds_total{engine="0",model_name="a model",rank="1"} 2.0
vllm:moe_offload_slots{engine="0",model_name="a model",rank="0"} 12.0
vllm:generation_tokens_total{engine="0",model_name="a model"} 7.0
"""


def test_workers_are_summed_and_their_stalls_averaged(patched_serve):
    parse = patched_serve.parse_moe_offload_metrics
    before = parse(
        "\n".join(
            line.rsplit(" ", 1)[0] + " 0.0" if line.startswith("vllm:") else line
            for line in TWO_RANKS.splitlines()
        )
    )
    stats = patched_serve.calculate_moe_offload_stats(before, parse(TWO_RANKS), 10.0)
    assert stats == {
        "moe_offload_hit_rate": 0.9,
        "moe_offload_hits": 180,
        "moe_offload_misses": 20,
        "moe_offload_read_gb": 3.0,
        "moe_offload_stall_share": 0.15,
        "moe_offload_stall_seconds": 1.5,
    }


@pytest.mark.parametrize("text", ["", "<html>no metrics</html>", TWO_RANKS.splitlines()[-1]])
def test_a_server_without_offload_has_no_figures(patched_serve, capsys, text):
    metrics = patched_serve.parse_moe_offload_metrics(text)
    assert metrics is None
    stats = patched_serve.calculate_moe_offload_stats(metrics, metrics, 1.0)
    patched_serve.print_moe_offload_stats(stats)
    assert stats == {}
    assert capsys.readouterr().out == ""


def test_a_run_that_needed_no_experts_has_no_hit_rate(patched_serve):
    metrics = patched_serve.parse_moe_offload_metrics(TWO_RANKS)
    assert patched_serve.calculate_moe_offload_stats(metrics, metrics, 1.0) == {}
