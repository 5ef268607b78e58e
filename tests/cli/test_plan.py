"""``plan``: as a user meets it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from scripts.demo_model import write_demo_model
from scripts.quantize import quantize
from vllm_moe_offload import cli
from vllm_moe_offload.cli.command import UsageError
from vllm_moe_offload.cli.sizes import parse_memory
from vllm_moe_offload.config import GIB
from vllm_moe_offload.plan.shapes import MODEL_TYPES, known_models

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "sizing.md"
SIZES = {"layers": 3, "experts": 4, "top_k": 2, "hidden": 64, "intermediate": 32}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "demo model"
    write_demo_model(path, "mixtral", **SIZES)
    return path


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(known_models()["Qwen3-30B-A3B"].config))
    return path


def plan(capsys, *arguments: str) -> tuple[int, str]:
    status = cli.main(["plan", *map(str, arguments)])
    output = capsys.readouterr()
    assert not output.err
    return status, output.out


def figures(capsys, *arguments: str) -> tuple[int, dict]:
    status, text = plan(capsys, *arguments, "--json=-")
    return status, json.loads(text)


def serve_line(text: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith("    vllm serve "))
    return shlex.split(line)


def test_mixtral_has_256_experts_of_352_321_536_bytes(capsys):
    status, text = plan(capsys, "Mixtral-8x7B", "--host-memory=64GiB")
    assert status == 0
    assert "256 experts of 352,321,536 bytes (bf16)" in text
    assert "46.7 billion parameters, 32 MoE layers x 8 experts, 2 per token" in text
    assert "    hf download mistralai/Mixtral-8x7B-v0.1 --local-dir Mixtral-8x7B-v0.1" in text
    assert serve_line(text)[:4] == [
        "vllm",
        "serve",
        "./Mixtral-8x7B-v0.1",
        "--moe-offload=trace",
    ]
    assert "assumed to be an NVMe drive, 7 GB/s" in text


@pytest.mark.parametrize(
    ("model", "machine", "line", "way"),
    [
        (
            "Qwen3-30B-A3B",
            ["--device-memory=24", "--host-memory=64"],
            "The GPU plans its cache, inside vLLM's own CUDA graphs.",
            "device",
        ),
        (
            "Qwen3-30B-A3B",
            ["--device-memory=24", "--host-memory=32"],
            "The host plans the cache, without CUDA graphs: host memory holds ",
            "host",
        ),
        (
            "gpt-oss-120b",
            ["--device-memory=24", "--host-memory=96"],
            "The host plans the cache, without CUDA graphs: experts are quantised (mxfp4).",
            "host",
        ),
        (
            "Qwen3-30B-A3B",
            ["--device-memory=141", "--host-memory=64"],
            "Layer calls are vLLM's own, in its own CUDA graphs.",
            "resident",
        ),
        ("Qwen3-30B-A3B", ["--host-memory=64"], None, None),
    ],
)
def test_who_plans_is_said_and_why(capsys, model, machine, line, way):
    _, text = plan(capsys, model, *machine)
    said = [
        one for one in text.splitlines() if "plans" in one.split(" ")[:3] or "own CUDA" in one
    ]
    assert [one.startswith(line or "") for one in said] == [True] * (line is not None)
    assert ("what the GPU plans with" in text) is (way == "device")
    assert ("staging slots" in text) is (way in ("host", None))
    assert ("experts in host memory" in text) is (way in ("device", "host"))
    assert ("has not run on one yet" in text) is (way == "device")
    _, document = figures(capsys, model, *machine)
    assert document["fit"]["way"] == way


@pytest.mark.parametrize(
    ("model", "copies"), [("gpt-oss-20b", "*/*"), ("Mixtral-8x7B", "*.pt")], ids=str
)
def test_copies_of_the_weights_are_not_downloaded(model, copies, capsys):
    """gpt-oss has them in folders (original, metal), Mixtral beside its safetensors files."""
    _, text = plan(capsys, model, "--host-memory=64GiB")
    (line,) = (line for line in text.splitlines() if line.startswith("    hf download "))
    assert shlex.split(line)[-2:] == ["--exclude", copies]


REFUSED = {
    "MiniMax-M2.5": ("cpu",),
    "MiniMax-M2.7": ("cpu",),
}
"""Models with a router that a kernel is not made for."""


@pytest.mark.parametrize("name", known_models())
def test_every_name_in_the_table_gets_a_plan_or_a_reason(name, capsys):
    for machine in (["--device-memory=40GiB", "--host-memory=2000GiB"], ["--host-memory=900"]):
        status, document = figures(capsys, name, *machine)
        refused = document["machine"]["platform"] in REFUSED.get(name, ())
        assert document["works"] is not refused
        assert status == (1 if refused else 0)
        assert bool(document["commands"]) is not refused
        assert bool(document["problems"]) is refused
        here = document["machine"]["platform"]
        served = {row["experts_in"]: row["platform"] for row in document["model"]["formats"]}
        assert served["bf16"] == here
        if not refused:
            assert served[document["model"]["experts_in"]] == here


def test_gpt_oss_120b_is_served_from_slots_of_a_24_gib_gpu(capsys):
    arguments = ["gpt-oss-120b", "--device-memory", "24GiB", "--host-memory", "96GiB"]
    status, text = plan(capsys, *arguments)
    assert status == 0
    assert (
        "4,608 experts of 14,431,744 bytes (MXFP4, as vLLM's kernel on a GPU has them)" in text
    )
    assert "MXFP4 experts: not run on a GPU yet" in text
    (row,) = (line for line in text.splitlines() if line.startswith("│ MXFP4"))
    assert row.rstrip(" │").endswith("yes")
    assert text.splitlines()[-1].startswith("    vllm serve ./gpt-oss-120b --moe-offload=trace")
    assert "estimated" not in text  # its dense weights are bf16
    _, document = figures(capsys, *arguments)
    assert document["model"]["record_bytes"] == 14_434_304
    assert document["fit"]["has_run"] is False


@pytest.mark.parametrize(
    ("arguments", "way", "said"),
    [
        (["-tp=2"], "device", "The GPU plans its cache"),
        (["-tp=2", "--expert-parallel"], "host", "workers divide the experts of a layer."),
        (["-pp=2"], "host", "workers divide the layers."),
    ],
)
def test_who_plans_on_several_ranks(arguments, way, said, capsys):
    machine = ["Qwen3-30B-A3B", "--device-memory=16GiB", "--host-memory=96GiB"]
    _, text = plan(capsys, *machine, *arguments)
    assert said in text
    _, document = figures(capsys, *machine, *arguments)
    assert {kind["fit"]["way"] for kind in document["ranks"]} == {way}


def test_the_documents_have_the_lines_that_say_who_plans(capsys):
    said = re.findall(r"^\| `(.* CUDA graphs.*)` \|", DOCUMENT.read_text(), re.MULTILINE)
    assert len(said) == 3
    for line, model in zip(said, ("OLMoE-1B-7B", "Qwen3-30B-A3B", "gpt-oss-120b"), strict=True):
        _, text = plan(capsys, model, "--device-memory=24GiB", "--host-memory=96GiB")
        assert line in text.splitlines()


@pytest.mark.parametrize(
    ("memory", "slots", "tokens"),
    [("6.7GiB", "2 slots", "1 token"), ("8GiB", "6 slots", "3 tokens")],
)
def test_a_gpu_with_less_than_a_layer_has_graphs_of_few_tokens(memory, slots, tokens, capsys):
    arguments = ["Mixtral-8x7B", "--host-memory=128GiB"]
    _, text = plan(capsys, *arguments, f"--device-memory={memory}")
    assert slots in text
    assert f"CUDA graphs have {tokens} at most, whose experts always fit" in text
    _, text = plan(capsys, *arguments, "--device-memory=24GiB")
    assert "CUDA graphs have" not in text


def test_what_is_read_from_disk_is_not_told_where_nothing_is_read(capsys):
    _, text = plan(capsys, "OLMoE-1B-7B", "--device-memory=24GiB", "--host-memory=12GiB")
    assert "Layer calls are vLLM's own" in text
    assert "read from the store on disk" not in text


def test_a_cpu_plan_of_quantised_experts_says_how_to_do_without_amx(capsys):
    status, text = plan(capsys, "Qwen3-30B-A3B-FP8", "--host-memory=32")
    assert status == 0
    assert "add --moe-offload-config.cpu_kernels avx512" in text
    assert "Dense weights are estimated" in text
    assert "not run" not in text
    _, text = plan(capsys, "Qwen3-30B-A3B", "--host-memory=32")
    assert "cpu_kernels" not in text


def test_fp8_on_older_gpus_takes_a_little_more(capsys):
    arguments = ["Qwen3-30B-A3B-FP8", "--host-memory=64", "--device-memory=16"]
    status, text = plan(capsys, *arguments)
    assert status == 0
    assert "scales add 1.5 % to an expert" in text
    assert "fp8 experts: not run on a GPU yet" in text


def test_what_is_not_served_gets_its_reason_and_no_line(tmp_path, capsys):
    path = tmp_path / "config.json"
    other = {"quant_method": "torchao"}
    config = known_models()["Qwen3-30B-A3B"].config | {"quantization_config": other}
    path.write_text(json.dumps(config))
    status, text = plan(capsys, path, "--device-memory=24", "--host-memory=64")
    assert status == 1
    assert "It cannot work: the experts are quantised to what is not served" in text
    assert "vllm serve" not in text
    assert "9,437,184" in text  # what bf16 would take


def test_too_little_memory_says_what_would_do(capsys):
    status, text = plan(capsys, "Mixtral-8x7B", "--host-memory=4GiB")
    assert status == 1
    assert "vllm serve" not in text
    assert "What would: --host-memory 7.0" in text


def test_a_checkpoint_is_counted_from_its_files(checkpoint, capsys):
    status, text = plan(capsys, checkpoint, "--host-memory=8GiB")
    assert status == 0
    assert f"headers of the safetensors files in {checkpoint}" in text
    assert serve_line(text)[2] == str(checkpoint)  # quoted: it has a space
    assert "All experts fit" in text
    status, document = figures(capsys, checkpoint, "--host-memory=8GiB")
    assert document["model"]["counted_from_files"] is True
    assert document["model"]["experts"] == 12
    assert document["model"]["expert_bytes"] == 3 * 64 * 32 * 2


@pytest.mark.parametrize("format", ["int4", "fp8"])
def test_quantised_files_are_counted(format, tmp_path, capsys):
    write_demo_model(
        tmp_path / "plain", "qwen3_moe", **SIZES | {"hidden": 512, "intermediate": 256}
    )
    quantize(tmp_path / "plain", tmp_path / "quantised", format)
    status, text = plan(capsys, tmp_path / "quantised", "--host-memory=8GiB")
    assert status == 0
    assert "headers of the safetensors files" in text
    assert "estimated" not in text
    assert f"12 experts of {kernel_bytes(format):,} bytes ({format}" in text


def kernel_bytes(format: str) -> int:
    """Of an expert of 512 x 256 on a CPU, by hand."""
    weights = 3 * 512 * 256
    if format == "fp8":
        return weights + weights // 128**2 * 4
    blocks = weights // (32 * 128)  # a sum, a scale and a zero point for each of 32 outputs
    return weights // 2 + blocks * 32 * (4 + 4 + 1) + 2 * 4


def test_a_config_json_is_enough(config_file, capsys):
    status, text = plan(capsys, config_file, "--host-memory=64", "--device-memory=24")
    assert status == 0
    assert f"Sizes from: {config_file}" in text
    assert f"The weights must be in {config_file.parent}" in text
    assert "assumed to be PCIe 4 x16, 25 GB/s" in text


def test_json_has_all_figures_and_is_written_beside_the_tables(tmp_path, capsys):
    path = tmp_path / "plan.json"
    arguments = ["Qwen3-30B-A3B", "--host-memory=32GB", "--link-gbps=3.5", f"--json={path}"]
    status, text = plan(capsys, *arguments)
    assert status == 0
    document = json.loads(path.read_text())
    fitted = document["fit"]
    assert f"{fitted['cache_slots']:,} slots" in text
    assert serve_line(text) == shlex.split(document["commands"][-1])
    assert document["machine"]["host_bytes"] == 32 * 10**9
    assert document["machine"]["link_gbps"] == 3.5
    assert [bound["hit_rate"] for bound in fitted["bounds"]] == [
        0.0,
        0.5,
        0.7,
        0.8,
        0.9,
        0.95,
        0.99,
    ]
    for bound in fitted["bounds"]:
        assert bound["read_bytes_per_token"] == pytest.approx(
            bound["misses_per_token"] * document["model"]["record_bytes"]
        )
        assert bound["tokens_per_s"] == pytest.approx(3.5e9 / bound["read_bytes_per_token"])


def test_notes_say_what_is_not_certain(capsys):
    _, document = figures(capsys, "Phi-3.5-MoE", "--host-memory=40GiB", "--device-memory=8GiB")
    notes = " ".join(document["notes"])
    assert "has not been run with phimoe models yet" in notes
    assert "are read from the store on disk, at 7 GB/s" in notes
    assert "run in waves" in notes


TWO_NODES = ["--nodes=2", "--tensor-parallel-size=2", "--link-gbps=3.5"]


def test_two_nodes_have_a_row_each_and_a_line_with_their_options(capsys):
    status, text = plan(capsys, "Mixtral-8x7B", "--host-memory=32GiB", *TWO_NODES)
    assert status == 0
    assert "2 ranks, 1 of them on each of 2 nodes" in text
    assert "slices of everything, 176,160,768 bytes of each expert" in text
    assert re.search(r"│ 0-1 +│ 0-31 +│ 32 x 8 ", text)
    for node in range(2):
        assert re.search(
            rf"│ {node} +│ {node} +│ +29\.\d\d GiB │ +6\.62 GiB │ +42\.00 GiB │", text
        )
    assert "Ray must run on all of them" in text
    assert "Expert parallel" not in text
    assert serve_line(text)[-4:] == [
        "--tensor-parallel-size",
        "2",
        "--distributed-executor-backend",
        "ray",
    ]


def test_ranks_on_one_machine_need_no_ray(capsys):
    arguments = ["Mixtral-8x7B", "--host-memory=64GiB", "-tp=2", "--enable-expert-parallel"]
    status, text = plan(capsys, *arguments)
    assert status == 0
    assert "2 ranks, on one node" in text
    assert "whole experts, slices of the rest" in text
    assert "host memory, 92% of 64.00 GiB / 2 ranks" in text
    assert "The 2 ranks of a node share its host memory and its disk evenly." in text
    assert "slowest link's bytes are the mean over tokens of the most" in text
    assert "Ray" not in text
    assert serve_line(text)[-3:] == ["--tensor-parallel-size", "2", "--enable-expert-parallel"]


def test_json_of_several_ranks_has_each_kind_and_each_node(capsys):
    arguments = ["DeepSeek-V3", "--host-memory=400", "--device-memory=80", "--nodes=2"]
    status, document = figures(capsys, *arguments, "-tp=4", "-pp=2", "--expert-parallel")
    assert status == 0
    assert document["split"] == {
        "nodes": 2,
        "tensor_parallel": 4,
        "pipeline_parallel": 2,
        "has_expert_parallel": True,
    }
    assert [kind["ranks"] for kind in document["ranks"]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [kind["moe_layers"] for kind in document["ranks"]] == [28, 30]
    assert [node["ranks"] for node in document["nodes"]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for kind, node in zip(document["ranks"], document["nodes"], strict=True):
        assert kind["experts_per_layer"] == 64
        assert "bounds" not in kind["fit"]
        assert node["store_bytes"] == 4 * kind["store_bytes"]
    rates = [bound["tokens_per_s"] for bound in document["bounds"]]
    assert rates == sorted(rates)
    assert document["model"]["experts"] == 58 * 256


def test_several_ranks_with_too_little_memory_say_what_would_do(capsys):
    arguments = ["Mixtral-8x7B", "--host-memory=8GiB", "-tp=2"]
    status, text = plan(capsys, *arguments)
    assert status == 1
    assert "for one of 2 ranks" in text
    assert "vllm serve" not in text
    needed = max(
        float(found) for found in re.findall(r"What would: --host-memory ([\d.]+)", text)
    )
    status, text = plan(capsys, "Mixtral-8x7B", f"--host-memory={needed}", "-tp=2")
    assert status == 0
    _, document = figures(capsys, *arguments)
    assert not document["works"]
    assert document["bounds"] == []
    assert [kind["fit"] for kind in document["ranks"]] == [None]


def test_everything_fits_on_several_ranks(capsys):
    status, text = plan(capsys, "OLMoE-1B-7B", "--host-memory=64", "-tp=2", "-pp=2")
    assert status == 0
    assert "All experts fit: after the start nothing is read." in text
    assert "tokens/s at most" not in text
    assert "--moe-offload-config.cache_gb 100%" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Mixtral-9x9B", "--host-memory=8"], "MODEL=Mixtral-9x9B: neither a directory"),
        (["Mixtral-8x7B", "--host-memory=lots"], "--host-memory=lots: must be a size such as"),
        (["Mixtral-8x7B", "--host-memory=-3"], "--host-memory=-3: must be a size such as"),
        (["Mixtral-8x7B", "--host-memory=nan"], "--host-memory=nan: must be a size such as"),
        (
            ["Mixtral-8x7B", "--host-memory=8", "--device-memory=0"],
            "--device-memory=0: must be a size",
        ),
        (
            ["Mixtral-8x7B", "--host-memory=8", "--link-gbps=0"],
            "--link-gbps=0: must be a number of GB/s above 0",
        ),
        (
            ["Mixtral-8x7B", "--host-memory=8", "--disk-gbps=7"],
            "--disk-gbps goes with --device-memory",
        ),
        (["Mixtral-8x7B", "--host-memory=8", "--kv-tokens=0"], "--kv-tokens=0: must be 1"),
        (
            ["Mixtral-8x7B", "--host-memory=8", "-pp=-1"],
            "--pipeline-parallel-size=-1: must be 1",
        ),
        (
            ["Mixtral-8x7B", "--host-memory=8", "--nodes=2"],
            "--nodes=2: must divide the 1 ranks of --tensor-parallel-size=1 x "
            "--pipeline-parallel-size=1",
        ),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    assert cli.main(["plan", *arguments]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1
    assert not output.out


def test_dense_and_foreign_configs_are_one_line(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "llama"}')
    assert cli.main(["plan", str(path), "--host-memory=8"]) == 2
    assert "model_type='llama' is not known" in capsys.readouterr().err
    path.write_text("\x00")
    assert cli.main(["plan", str(path), "--host-memory=8"]) == 2
    assert "is not JSON" in capsys.readouterr().err
    assert cli.main(["plan", str(tmp_path / ".."), "--host-memory=8"]) == 2
    assert "it has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GiB", 24 * GIB),
        ("24GB", 24 * 10**9),
        ("24 gib", 24 * GIB),
        ("64", 64 * GIB),
        ("1.5", GIB * 3 // 2),
        ("512MiB", GIB // 2),
        ("1.5TiB", 1536 * GIB),
    ],
)
def test_sizes(text, nbytes):
    assert parse_memory("--host-memory", text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "24XB", "inf", "-1GiB", "1e400", "0"])
def test_sizes_that_are_none(text):
    with pytest.raises(UsageError, match=f"--host-memory={text}: must be a size"):
        parse_memory("--host-memory", text)


EXAMPLES = re.findall(
    r"^```\n\$ vllm-moe-offload (plan .*?)\n(.*?)^```",
    DOCUMENT.read_text(),
    re.MULTILINE | re.DOTALL,
)


def test_the_documents_have_examples_of_one_server_and_of_two():
    assert ["--nodes" in command for command, _ in EXAMPLES] == [False, True]


@pytest.mark.parametrize(("command", "printed"), EXAMPLES)
def test_the_examples_in_the_documents_are_what_the_command_prints(
    command, printed, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(shlex.split(command)) == 0
    assert capsys.readouterr().out == printed


def test_the_documents_list_every_architecture():
    text = " ".join(DOCUMENT.read_text().split())
    assert f"Architectures: {', '.join(MODEL_TYPES)}." in text
