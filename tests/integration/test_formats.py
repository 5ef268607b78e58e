"""Quantised checkpoints: served from slots, with plain vLLM's tokens and bitwise its logprobs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scripts.demo_model import write_demo_model
from scripts.quantize import quantize
from tests.integration.conftest import engine
from tests.integration.test_engine import experts_of, flip_bytes
from tests.integration.test_identity import assert_identical, offload
from vllm_moe_offload.cache.layout import ExpertLayout, TensorSpec
from vllm_moe_offload.config import OptionError
from vllm_moe_offload.integration import cpu_kernels, expert_tensors, formats
from vllm_moe_offload.plan.shapes import FORMATS, ExpertShape, kernel_form, refusals
from vllm_moe_offload.plan.shapes.checkpoint import read_checkpoint
from vllm_moe_offload.plan.shapes.kernel_form import Platform
from vllm_moe_offload.store.expert_store import Manifest

ARCHS = {
    "int8": "qwen3_moe",
    "int4": "qwen3_moe",
    "gptq": "qwen3_moe",
    "awq": "qwen3_moe",
    "fp8": "qwen3_moe",
    "mxfp4": "gpt_oss",
}
LAYERS, EXPERTS = 4, 8
SHAPE = {"layers": LAYERS, "experts": EXPERTS, "top_k": 2, "hidden": 512, "intermediate": 256}
ALL_EXPERTS = LAYERS * EXPERTS

kernels = pytest.mark.skipif(
    bool(cpu_kernels.missing()),
    reason=f"vLLM's kernels for quantised weights need {', '.join(cpu_kernels.missing())}",
)
Quantised = Callable[[str], Path]


def models_in(root: Path) -> Quantised:
    """Directory of a tiny model in a format, below ``root``, written once."""

    def path(name: str) -> Path:
        arch, directory = ARCHS.get(name, "qwen3_moe"), root / name
        if not (root / arch).exists():
            write_demo_model(root / arch, arch, **SHAPE)
        if not directory.exists():
            quantize(root / arch, directory, name)
        return directory

    return path


@pytest.fixture(scope="session")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    """The models of this session."""
    return models_in(tmp_path_factory.mktemp("formats"))


def ours(**options: Any) -> dict[str, Any]:
    """A job's part: without AMX vLLM has to be told that AVX-512 will do, plain vLLM too."""
    return {"cpu_kernels": "vllm" if cpu_kernels.has_amx() else "avx512", **options}


def jobs_of(
    model: Path, capacities: list[str], *, store: Path, eager: bool = True, **options: Any
) -> list[dict[str, Any]]:
    """A plain engine, and offloaded ones at these capacities one after the other."""
    told = ours(**options)
    plain = engine(model, eager=eager)
    if told["cpu_kernels"] != "vllm":
        plain["cpu_kernels"] = told["cpu_kernels"]
    offloads = [offload(store, capacity, **told) for capacity in capacities]
    return [plain, *(engine(model, eager=eager, offload=each) for each in offloads)]


# ---- engines ---------------------------------------------------------------------------


def otherwise_slow(*fast: str) -> list[Any]:
    return [
        name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in ARCHS
    ]


@kernels
@pytest.mark.vllm
@pytest.mark.parametrize("name", otherwise_slow("int8", "int4", "fp8", "mxfp4"))
def test_first_and_second_start(name, quantised, store_dir, share_engines):
    """Features: each format; a store of it that an earlier start built; one layer of slots."""
    jobs = jobs_of(quantised(name), ["50%", "25%"], store=store_dir, verify=True)
    results = share_engines(jobs)
    assert_identical(results, [ALL_EXPERTS // 2, EXPERTS])
    assert all(result["facts"]["misses"] for result in results[1:])
    assert_as_planned(quantised(name), store_dir)


def assert_as_planned(model: Path, store_dir: Path, platform: Platform = "cpu") -> None:
    """The store's records hold the tensors that `plan` counts, by name, type and shape."""
    (manifest,) = store_dir.glob(f"{model.name}-*/whole/manifest.json")
    stored = ExpertLayout(
        Manifest.model_validate_json(manifest.read_text(), strict=True).layout
    )
    shape = read_checkpoint(model).shape
    planned = kernel_form(shape.format, platform, shape.expert)
    assert sorted(planned.tensors, key=str) == sorted(stored.tensors, key=str)
    assert planned.record_bytes == stored.record_bytes


@kernels
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHS)
def test_everything_fits(name, quantised, store_dir, share_engines):
    """Features: each format with a slot for every expert, twice."""
    jobs = jobs_of(quantised(name), ["100%", "100%"], store=store_dir)
    assert_identical(share_engines(jobs), [ALL_EXPERTS, ALL_EXPERTS])


@kernels
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHS)
def test_compiled(name, quantised, store_dir, share_engines):
    """Features: each format under torch.compile."""
    jobs = jobs_of(quantised(name), ["50%"], store=store_dir, eager=False)
    assert_identical(share_engines(jobs), [ALL_EXPERTS // 2])


@kernels
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHS)
def test_damage_costs_a_start(name, quantised, tmp_path, run_engines):
    """Features: each format, with flipped bytes, with a truncated record, and with the store of
    another quantisation in its place."""
    jobs = jobs_of(quantised(name), ["50%"], store=tmp_path, verify=True)
    run_engines(jobs[1:])
    flip_bytes(experts_of(tmp_path))
    plain, flipped, again = run_engines([*jobs, jobs[1]])
    assert "checksum" in flipped["trace"]
    assert again["batches"] == plain["batches"]
    size = experts_of(tmp_path).stat().st_size
    os.truncate(experts_of(tmp_path), size - 1)
    (truncated,) = run_engines(jobs[1:])
    assert truncated["batches"] == plain["batches"]
    assert experts_of(tmp_path).stat().st_size == size
    other = "int8" if name == "int4" else "int4"
    run_engines(jobs_of(quantised(other), ["50%"], store=tmp_path / "other")[1:])
    own = experts_of(tmp_path).parent
    shutil.rmtree(own)
    shutil.copytree(experts_of(tmp_path / "other").parent, own)
    (foreign,) = run_engines(jobs[1:])
    assert foreign["batches"] == plain["batches"]


@kernels
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4", "fp8"])
def test_without_amx(name, quantised, tmp_path, run_engines):
    """Features: `cpu_kernels`, both of its values, on a CPU that says that it has no AMX."""
    model = quantised(name)
    lifted = engine(model, eager=True) | {"cpu_kernels": "avx512"}
    refused = engine(model, eager=True, offload=offload(tmp_path, "50%"))
    served = engine(model, eager=True, offload=offload(tmp_path, "50%", cpu_kernels="avx512"))
    jobs = [job | {"without_amx": True} for job in (refused, lifted, served)]
    no, plain, yes = run_engines(jobs)
    assert "cpu_kernels=avx512" in no["error"]
    assert yes["batches"] == plain["batches"]


# ---- the table -------------------------------------------------------------------------


def layer_with(method: str, experts: str, *, is_monolithic: bool = False) -> Any:
    quant_method = type(method, (), {})()
    quant_method.experts_cls = type(experts, (), {})
    quant_method.is_monolithic = is_monolithic
    return SimpleNamespace(layer_name="model.layers.0.mlp.experts", quant_method=quant_method)


@pytest.mark.parametrize("known", [f for f in formats.FORMATS if f.platform == "cpu"])
def test_what_is_in_the_table_is_found(known):
    for experts in known.experts:
        assert formats.format_of(layer_with(known.method, experts)) is known


def test_the_table_names_classes_that_vllm_has():
    """A renamed class would be refused by a message that lists the old name."""
    import vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method as unquantized
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe, marlin_moe, triton_moe
    from vllm.model_executor.layers.quantization import (
        auto_awq,
        auto_gptq,
        fp8,
        modelopt,
        mxfp4,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as nvfp4,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_int8 as int8,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as wna16,
    )

    methods = {
        name
        for module in (
            unquantized,
            auto_awq,
            auto_gptq,
            fp8,
            modelopt,
            mxfp4,
            int8,
            nvfp4,
            wna16,
        )
        for name in vars(module)
    }
    experts = {*vars(cpu_moe), *vars(marlin_moe), *vars(triton_moe)}
    assert {known.method for known in formats.FORMATS} <= methods
    assert {name for known in formats.FORMATS for name in known.experts} <= experts


def test_every_format_can_be_asked_for():
    """A quantisation that vLLM does not know would never be refused, nor served."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    names = {name for known in formats.FORMATS for name in known.quantizations}
    assert names - {None} <= set(QUANTIZATION_METHODS)


@pytest.mark.parametrize(
    ("quantization", "capability", "backends"),
    [
        (None, (8, 0), ["triton"]),
        ("fp8", (9, 0), ["triton", "marlin"]),
        ("fp8", (8, 6), ["marlin"]),
        ("compressed-tensors", (12, 0), ["marlin"]),
        ("awq", (8, 6), ["marlin"]),
        ("gpt_oss_mxfp4", (9, 0), ["marlin"]),
        ("modelopt_fp4", (8, 9), ["marlin"]),
        ("bitsandbytes", (9, 0), []),
    ],
)
def test_the_kernel_that_a_gpu_is_asked_for(quantization, capability, backends):
    assert formats.moe_backends(quantization, capability) == backends


KINDS = {
    "UnquantizedFusedMoEMethod": "bf16",
    "CompressedTensorsW8A8Int8MoEMethod": "int8",
    "CompressedTensorsWNA16MoEMethod": "int4",
    "AutoGPTQMoEMethod": "int4",
    "AutoAWQMoEMethod": "int4",
    "Fp8MoEMethod": "fp8",
    "GptOssMxfp4MoEMethod": "mxfp4",
    "ModelOptNvFp4FusedMoE": "nvfp4",
    "CompressedTensorsW4A4Nvfp4MoEMethod": "nvfp4",
}
"""What `plan` calls the experts of each method."""


def test_plan_serves_what_the_table_has():
    shapes = (ExpertShape(256, 128), ExpertShape(256, 128, True, "swigluoai"))
    for platform in ("cpu", "cuda"):
        table = {KINDS[f.method] for f in formats.FORMATS if f.platform == platform}
        planned = {
            known.kind
            for known in FORMATS
            if not all(any(refusals(known, platform, shape)) for shape in shapes)
        }
        assert planned == table


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (layer_with("Fp8MoEMethod", "CPUExpertsFp8W8A8"), "would run on CPUExpertsFp8W8A8"),
        (layer_with("QuarkMoEMethod", "CPUExpertsInt8"), r"\(QuarkMoEMethod\); allowed: "),
        (
            layer_with("AutoAWQMoEMethod", "CPUExpertsInt4", is_monolithic=True),
            "does its own routing",
        ),
    ],
)
def test_what_is_not_in_the_table_is_refused_by_name(layer, message):
    with pytest.raises(OptionError, match=message) as caught:
        formats.format_of(layer)
    assert "model.layers.0.mlp.experts" in str(caught.value)


def test_a_quantisation_is_refused_with_what_is_allowed():
    assert not list(formats.problems(None))
    assert not list(formats.problems("fp8"))
    (problem,) = formats.problems("bitsandbytes")
    assert problem.startswith(
        "quantization='bitsandbytes': no kernel for such experts is known"
    )
    assert "allowed here: none, " in problem
    for name in ("auto_gptq", "awq", "compressed-tensors", "fp8", "gpt_oss_mxfp4"):
        assert name in problem


def test_a_layer_takes_the_form_of_its_store():
    """Parameters change type and shape, come and go; none of them takes memory."""
    layer = torch.nn.Module()
    for name, parameter in (
        ("w13_weight_packed", torch.zeros(4, 8, dtype=torch.int32)),
        ("w13_g_idx", torch.zeros(4, 0, dtype=torch.int32)),
        ("e_score_correction_bias", torch.zeros(4)),
    ):
        layer.register_parameter(name, torch.nn.Parameter(parameter, requires_grad=False))
    layout = ExpertLayout(
        (
            TensorSpec("w13_weight_packed", (2, 16), "uint8", 32),
            TensorSpec("w13_weight_zero_point", (3,), "int8", 3),
        )
    )
    known = next(f for f in formats.FORMATS if "w13_weight" in f.aliases)
    one_alias = SimpleNamespace(aliases={"w13_weight": "w13_weight_packed"})
    assert known.aliases["w13_weight"] == "w13_weight_packed"
    formats.take_stored_form(layer, layout, one_alias)
    assert dict.fromkeys(formats.expert_parameters(layer)) == dict.fromkeys(
        ["w13_weight_packed", "w13_weight_zero_point"]
    )
    assert layer.w13_weight is layer.w13_weight_packed
    assert layer.w13_weight_packed.dtype == torch.uint8
    assert layer.w13_weight_packed.shape == (0, 2, 16)
    assert layer.e_score_correction_bias.shape == (4,)


def test_parameters_without_a_byte_per_expert_are_not_stored():
    layer = torch.nn.Module()
    layer.local_num_experts, layer.layer_name = 4, "experts"
    layer.register_parameter("w", torch.nn.Parameter(torch.zeros(4, 8)))
    layer.register_parameter("g_idx", torch.nn.Parameter(torch.zeros(4, 0)))
    assert list(expert_tensors.expert_tensors(layer)) == ["w"]
