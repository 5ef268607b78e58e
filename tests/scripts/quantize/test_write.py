"""A quantised checkpoint: its tensors, its config, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scripts.demo_model import DemoModelError, write_demo_model
from scripts.quantize import FORMATS, QuantizeError, quantize
from scripts.quantize.__main__ import main
from tests.scripts.demo_model.checkpoints import tensors_of
from tests.scripts.quantize.reference import MARKS, dequantised

SHAPE = {"layers": 2, "experts": 2, "top_k": 1, "hidden": 64, "intermediate": 64}
WIDE = SHAPE | {"hidden": 512, "intermediate": 128}
"""What fp8 needs: heads of keys and values together are a block wide."""
FIRST_MOE = 1
"""The first layer with experts in a DeepSeek model of two layers."""
KEPT = {
    "attention": [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj")],
    "router": ["mlp.gate"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models that are not quantised."""
    root = tmp_path_factory.mktemp("models")
    found = {arch: root / arch for arch in ("qwen3_moe", "gpt_oss", "deepseek_v2")}
    for arch, path in found.items():
        write_demo_model(path, arch, **SHAPE)
    write_demo_model(root / "wide", "qwen3_moe", **WIDE)
    return {**found, "wide": root / "wide"}


SOURCES = dict.fromkeys(FORMATS, "qwen3_moe") | {"fp8": "wide", "mxfp4": "gpt_oss"}


def written(
    models: dict[str, Path], out: Path, format: str, **choices: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All tensors, and config.json, of the demo model in ``format``."""
    model = models[SOURCES[format]]
    quantize(model, out, format, **{"group_size": 32} | choices)
    return tensors_of(out), json.loads((out / "config.json").read_text())


def linear_modules(layers: int, *ends: str) -> list[str]:
    return [f"model.layers.{layer}.{end}" for layer in range(layers) for end in ends]


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_quantised_stays(
    models: dict[str, Path], format: str, tmp_path: Path
) -> None:
    model = models[SOURCES[format]]
    stored, config = written(models, tmp_path / "out", format)
    before, after = tensors_of(model), dequantised(stored, format)
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert {name for name in before if ".experts." in name and "bias" not in name} <= changed
    others = changed - {name for name in before if ".experts." in name}
    assert {name for name in others if "self_attn" not in name} == set()
    assert bool(others) == (format == "fp8")
    for name in changed:
        rms = before[name].float().norm()
        assert (after[name].float() - before[name].float()).norm() < 0.2 * rms
    settings = config.pop("quantization_config")
    assert config == json.loads((model / "config.json").read_text())
    methods = ("compressed-tensors", "gptq", "awq", "fp8", "mxfp4", "modelopt")
    assert settings["quant_method"] in methods
    kept = {path.name for path in model.iterdir()} - {"config.json"}
    for name in kept:
        if not name.startswith("model"):
            assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == kept | {"config.json"}


def test_int4_says_what_compressed_tensors_says(
    models: dict[str, Path], tmp_path: Path
) -> None:
    _, config = written(models, tmp_path / "out", "int4")
    settings = config["quantization_config"]
    ignored = linear_modules(2, *KEPT["attention"], *KEPT["router"])
    assert sorted(settings["ignore"]) == sorted(["lm_head", *ignored])
    group = settings["config_groups"]["group_0"]
    assert settings["format"] == group["format"] == "pack-quantized"
    assert group["targets"] == ["Linear"]
    assert group["input_activations"] is None
    assert group["weights"] | {"num_bits": 4, "group_size": 32} == group["weights"]
    assert (group["weights"]["strategy"], group["weights"]["symmetric"]) == ("group", True)


def test_int8_quantises_activations_per_token(models: dict[str, Path], tmp_path: Path) -> None:
    _, config = written(models, tmp_path / "out", "int8")
    settings = config["quantization_config"]
    group = settings["config_groups"]["group_0"]
    assert settings["format"] == group["format"] == "int-quantized"
    assert (group["weights"]["num_bits"], group["weights"]["strategy"]) == (8, "channel")
    activations = group["input_activations"]
    assert (activations["strategy"], activations["dynamic"]) == ("token", True)


def test_others_say_what_vllm_reads(models: dict[str, Path], tmp_path: Path) -> None:
    settings = {
        format: written(models, tmp_path / format, format)[1]["quantization_config"]
        for format in ("gptq", "awq", "fp8", "mxfp4", "nvfp4")
    }
    assert settings["gptq"]["dynamic"].keys() == {
        *(rf"-:.*\.self_attn\.{part}_proj$" for part in "qkvo"),
        r"-:.*\.mlp\.gate$",
    }
    assert {**settings["gptq"], "dynamic": None} == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "dynamic": None,
    }
    ignored = linear_modules(2, *KEPT["attention"], *KEPT["router"])
    assert sorted(settings["awq"].pop("modules_to_not_convert")) == sorted(
        ["lm_head", *ignored]
    )
    assert settings["awq"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
    }
    routers = linear_modules(2, *KEPT["router"])
    assert sorted(settings["fp8"].pop("modules_to_not_convert")) == sorted(
        ["lm_head", *routers]
    )
    assert settings["fp8"] == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    }
    assert settings["mxfp4"]["quant_method"] == "mxfp4"
    assert settings["nvfp4"]["quant_method"] == "modelopt"
    assert settings["nvfp4"]["quant_algo"] == "NVFP4"
    assert sorted(settings["nvfp4"]["ignore"]) == sorted(["lm_head", *ignored])


@pytest.mark.slow
def test_compressed_tensors_reads_it(models: dict[str, Path], tmp_path: Path) -> None:
    """The library that vLLM reads such checkpoints with: its config, and its bits."""
    library = pytest.importorskip("compressed_tensors", reason="comes with vLLM")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationConfig

    stored, config = written(models, tmp_path / "out", "int4")
    parsed = QuantizationConfig.model_validate(config["quantization_config"])
    assert parsed.config_groups["group_0"].weights.group_size == 32
    assert library.__version__.startswith("0.")
    module = "model.layers.0.mlp.experts.1.up_proj"
    words, shape = stored[f"{module}.weight_packed"], stored[f"{module}.weight_shape"]
    values = unpack_from_int32(words, 4, torch.Size(shape.tolist())).float()
    scale = stored[f"{module}.weight_scale"].float().repeat_interleave(32, dim=1)
    expected = dequantised(stored, "int4")[f"{module}.weight"]
    torch.testing.assert_close((values * scale).bfloat16(), expected, rtol=0, atol=0)


def test_all_networks_if_asked(models: dict[str, Path], tmp_path: Path) -> None:
    quantize(models["deepseek_v2"], tmp_path / "out", "gptq", group_size=32, experts_only=False)
    stored = tensors_of(tmp_path / "out")
    quantised = {name.removesuffix(".g_idx") for name in stored if name.endswith(".g_idx")}
    moe = f"model.layers.{FIRST_MOE}.mlp"
    assert {
        "model.layers.0.mlp.up_proj",
        "model.layers.0.self_attn.kv_b_proj",
        f"{moe}.shared_experts.down_proj",
        f"{moe}.experts.0.gate_proj",
    } <= quantised
    assert {
        f"{moe}.gate.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
    } <= stored.keys()
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert list(settings["dynamic"]) == [r"-:.*\.mlp\.gate$"]


def test_shards_hold_every_tensor_once(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    stored, _ = written(models, out, "awq", max_shard_bytes=50_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {path.name for path in out.glob("*.safetensors")}
    assert len(files) > 3
    assert set(index["weight_map"].values()) == files
    assert index["weight_map"].keys() == stored.keys()
    sizes = sum(tensor.nbytes for tensor in stored.values())
    assert index["metadata"]["total_size"] == sizes
    # A module's parts lie together.
    parts = [
        file for name, file in index["weight_map"].items() if ".0.mlp.experts.1.up" in name
    ]
    assert len(parts) == 3
    assert len(set(parts)) == 1


def test_one_file_without_an_index_is_read(models: dict[str, Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_file(tensors_of(models["qwen3_moe"]), model / "model.safetensors")
    (model / "config.json").write_bytes((models["qwen3_moe"] / "config.json").read_bytes())
    quantize(model, tmp_path / "out", "int8")
    names = tensors_of(tmp_path / "out").keys()
    assert any(name.endswith(MARKS["int8"]) for name in names)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("qwen3_moe", "int3", 32), "format is 'int3'; known are int4, int8"),
        (("qwen3_moe", "int4", 48), "group-size is 48; it must be one of 32, 64"),
        (("qwen3_moe", "int4", 128), "input size is 64; it must be a multiple of 128"),
        (("qwen3_moe", "mxfp4", 32), "is a qwen3_moe model and format is 'mxfp4'"),
        (("qwen3_moe", "fp8", 32), "output size is 64; it must be a multiple of 128"),
        (("gpt_oss", "int4", 32), "is a gpt_oss model and format is 'int4'"),
    ],
)
def test_what_cannot_be_written_is_refused(
    models: dict[str, Path], asked: tuple[str, str, int], says: str, tmp_path: Path
) -> None:
    arch, format, group_size = asked
    with pytest.raises(QuantizeError, match=says):
        quantize(models[arch], tmp_path / "out", format, group_size=group_size)
    assert not (tmp_path / "out").exists()


def test_what_is_no_model_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    quantize(models["qwen3_moe"], tmp_path / "out", "int8")
    with pytest.raises(QuantizeError, match="is quantised already"):
        quantize(tmp_path / "out", tmp_path / "again", "int8")
    with pytest.raises(QuantizeError, match=r"has no config\.json"):
        quantize(tmp_path, tmp_path / "again", "int8")
    with pytest.raises(DemoModelError, match=r"is not empty.*--force"):
        quantize(models["qwen3_moe"], tmp_path / "out", "int8")
    with pytest.raises(QuantizeError, match="is MODEL itself"):
        quantize(models["qwen3_moe"], models["qwen3_moe"], "int8", force=True)
    quantize(models["qwen3_moe"], tmp_path / "out", "awq", group_size=32, force=True)
    assert not any(name.endswith(MARKS["int8"]) for name in tensors_of(tmp_path / "out"))


def test_command_line(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    choices = ["--format", "int4", "--group-size", "64", "--no-experts-only"]
    assert main([str(models["qwen3_moe"]), str(out), *choices]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: int4, 0.00")
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert sorted(settings["ignore"]) == sorted(["lm_head", *linear_modules(2, "mlp.gate")])
    with pytest.raises(SystemExit) as stop:
        main([str(models["qwen3_moe"]), str(out), "--format", "int8"])
    assert stop.value.code == 2
    assert "is not empty" in capsys.readouterr().err.splitlines()[-1]
