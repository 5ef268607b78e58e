"""What a GPU cannot do is refused by name; the rest is set up. No GPU is needed to decide."""

import dataclasses
import importlib.util
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
import vllm.model_executor.layers.fused_moe.runner.moe_runner  # noqa: F401  (operators)
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.config.kernel import KernelConfig
from vllm.model_executor.layers.fused_moe.experts import marlin_moe, triton_moe
from vllm.v1.worker.gpu_worker import Worker

from vllm_moe_offload.config import OffloadConfig, OptionError
from vllm_moe_offload.integration import formats, patches, supported, supported_gpu

OPTIONS = OffloadConfig(mode="trace")
BREAKABLE, SKIP_PADDING = "VLLM_USE_BREAKABLE_CUDAGRAPH", "VLLM_MOE_SKIP_PADDING"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv(BREAKABLE, raising=False)
    monkeypatch.delenv(SKIP_PADDING, raising=False)


def config(dtype=torch.bfloat16, moe_backend="auto", quantization=None, **compilation_fields):
    """``compilation_fields``: of CompilationConfig; vLLM's defaults on CUDA for the others."""
    defaults = {
        "mode": CompilationMode.VLLM_COMPILE,
        "cudagraph_mode": CUDAGraphMode.FULL_AND_PIECEWISE,
    }
    compilation = CompilationConfig(**{**defaults, **compilation_fields})
    compilation.set_splitting_ops_for_v1("allgather_reducescatter", 1)
    return SimpleNamespace(
        model_config=SimpleNamespace(dtype=dtype, quantization=quantization),
        kernel_config=KernelConfig(moe_backend=moe_backend),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        compilation_config=compilation,
    )


def problems(capability=(9, 0), **fields):
    return list(supported_gpu.problems(config(**fields), capability))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0)])
def test_ampere_and_later_are_allowed(capability):
    assert problems(capability) == []
    assert problems(capability, dtype=torch.float16) == []


@pytest.mark.parametrize(
    ("fields", "fragments"),
    [
        ({"capability": (7, 5)}, ["compute capability 7.5", "8.0"]),
        ({"capability": None}, ["compute capability unknown"]),
        ({"dtype": torch.float32}, ["dtype=torch.float32", "torch.bfloat16"]),
        ({"moe_backend": "flashinfer_trtllm"}, ["moe_backend='flashinfer_trtllm'", "triton"]),
        ({"moe_backend": "batched_triton"}, ["moe_backend='batched_triton'"]),
        (
            {"moe_backend": "triton", "quantization": "awq"},
            ["moe_backend='triton'", "quantization='awq'", "allowed: auto, marlin"],
        ),
        (
            {"use_inductor_graph_partition": True},
            ["use_inductor_graph_partition=True", "allowed: False"],
        ),
        (
            {"splitting_ops": ["vllm::unified_attention", "vllm::moe_forward"]},
            ["splitting_ops names vllm::moe_forward:", "leave the option out"],
        ),
        (
            {"splitting_ops": ["vllm::moe_forward_shared"]},
            ["splitting_ops names vllm::moe_forward_shared:"],
        ),
    ],
    ids=str,
)
def test_refused_by_name(fields, fragments):
    (problem,) = problems(**fields)
    assert all(fragment in problem for fragment in fragments)


@pytest.mark.parametrize(
    ("quantization", "capability", "chosen"),
    [
        (None, (9, 0), "triton"),
        ("fp8", (9, 0), "triton"),
        ("fp8", (8, 6), "marlin"),
        ("gpt_oss_mxfp4", (9, 0), "marlin"),
    ],
)
def test_the_kernel_is_chosen_by_format_and_device(quantization, capability, chosen):
    allowed = config(quantization=quantization)
    supported_gpu.prepare(allowed, OPTIONS, capability)
    assert allowed.kernel_config.moe_backend == chosen


@pytest.mark.parametrize(("quantization", "warns"), [(None, False), ("awq", True)])
def test_what_was_never_run_is_said_at_the_start(quantization, warns, caplog, monkeypatch):
    monkeypatch.setattr(supported_gpu, "logger", logging.getLogger("seen"))
    supported_gpu.prepare(config(quantization=quantization), OPTIONS, (9, 0))
    assert ("never run on a GPU" in caplog.text) is warns


def test_a_kernel_that_the_user_chose_stays():
    allowed = config(quantization="fp8", moe_backend="marlin")
    assert not list(supported_gpu.problems(allowed, (9, 0)))
    supported_gpu.prepare(allowed, OPTIONS, (9, 0))
    assert allowed.kernel_config.moe_backend == "marlin"


@pytest.mark.parametrize("mode", CUDAGraphMode, ids=lambda mode: mode.name)
@pytest.mark.parametrize("compilation", [CompilationMode.NONE, CompilationMode.VLLM_COMPILE])
def test_vllms_own_graphs_are_allowed_and_stay(mode, compilation, monkeypatch):
    monkeypatch.setenv(BREAKABLE, "1")
    allowed = config(mode=compilation, cudagraph_mode=mode)
    before = dataclasses.asdict(allowed.compilation_config)
    assert list(supported_gpu.problems(allowed, (9, 0))) == []
    supported_gpu.prepare(allowed, OPTIONS, (9, 0))
    assert dataclasses.asdict(allowed.compilation_config) == before


@pytest.mark.parametrize(
    "fields", [{"use_inductor_graph_partition": True}, {"splitting_ops": ["vllm::moe_forward"]}]
)
def test_what_only_graphs_cannot_do_is_allowed_without_them(fields):
    assert problems(cudagraph_mode=CUDAGraphMode.NONE, **fields) == []


def test_padding_must_be_told(monkeypatch):
    monkeypatch.setenv(SKIP_PADDING, "0")
    (problem,) = problems()
    assert problem.startswith("VLLM_MOE_SKIP_PADDING=0: ")
    assert "allowed: 1" in problem
    monkeypatch.setenv(SKIP_PADDING, "1")
    assert problems() == []


def test_the_operators_of_experts_are_vllms():
    for name in supported_gpu.MOE_OPS:
        namespace, operator = name.split("::")
        assert hasattr(getattr(torch.ops, namespace), operator)


@pytest.mark.parametrize(
    ("stages", "cache_gb", "captures"),
    [(1, "50%", True), (2, "50%", False), (2, "auto", False), (2, "100%", True)],
)
def test_pipeline_stages_capture_together_or_not_at_all(stages, cache_gb, captures):
    asked = config()
    asked.parallel_config.pipeline_parallel_size = stages
    supported_gpu.prepare(asked, OffloadConfig(mode="trace", cache_gb=cache_gb), (9, 0))
    mode = asked.compilation_config.cudagraph_mode
    assert mode == (CUDAGraphMode.FULL_AND_PIECEWISE if captures else CUDAGraphMode.NONE)


class Platform(SimpleNamespace):
    device_name = "accelerator"

    def is_cpu(self):
        return self.kind == "cpu"

    def is_cuda(self):
        return self.kind == "cuda"

    def get_device_capability(self):
        return (7, 0)


def platform_problems(monkeypatch, kind, **options):
    monkeypatch.setattr("vllm.platforms.current_platform", Platform(kind=kind))
    return list(supported._platform_problems(config(), OffloadConfig(**options)))


def test_platforms(monkeypatch):
    assert platform_problems(monkeypatch, "cpu") == []
    (problem,) = platform_problems(monkeypatch, "rocm")
    assert "'accelerator'" in problem
    assert "ROCm" in problem


def test_a_gpu_is_asked_for_its_capability_and_for_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    capability, triton = platform_problems(monkeypatch, "cuda", host_gb=4)
    assert "7.0" in capability
    assert "pip install triton" in triton


@pytest.mark.parametrize(("cc", "asked"), [(None, ["gcc", "clang"]), ("icx", ["icx"])])
def test_triton_needs_a_c_compiler(cc, asked, monkeypatch):
    if cc is None:
        monkeypatch.delenv("CC", raising=False)
    else:
        monkeypatch.setenv("CC", cc)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    there = []
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    (problem,) = supported_gpu.triton_problems()
    assert all(name in problem for name in asked)
    assert "CC" in problem
    there.append(asked[-1])
    assert not list(supported_gpu.triton_problems())


def test_host_gb_is_refused_without_a_gpu(monkeypatch):
    (problem,) = platform_problems(monkeypatch, "cpu", host_gb="50%")
    assert "host_gb='50%'" in problem
    assert "cache_gb" in problem


class FlashInferExperts:
    """Takes [up; gate] weights: another order."""


class TritonExperts:
    """Known."""


def test_kernels_that_are_not_known_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(formats, "current_platform", Platform(kind="cuda"))

    def layer(kernel, is_monolithic=False):
        fields = {"experts_cls": kernel, "is_monolithic": is_monolithic}
        method = type("UnquantizedFusedMoEMethod", (), fields)()
        return SimpleNamespace(layer_name="layers.0", quant_method=method)

    assert formats.format_of(layer(TritonExperts)).moe_backend == "triton"
    with pytest.raises(
        OptionError, match=r"FlashInferExperts.*allowed: MarlinExperts, TritonExperts"
    ):
        formats.format_of(layer(FlashInferExperts))
    with pytest.raises(OptionError, match="monolithic"):
        formats.format_of(layer(FlashInferExperts, is_monolithic=True))


def test_quantisations_without_a_kernel_are_refused_on_a_gpu(monkeypatch):
    monkeypatch.setattr(formats, "current_platform", Platform(kind="cuda"))
    assert list(formats.problems("fp8")) == list(formats.problems(None)) == []
    (problem,) = formats.problems("bitsandbytes")
    assert problem.startswith(
        "quantization='bitsandbytes': no kernel for such experts is known to compute on cache "
        "slots; allowed here: none, auto_awq"
    )


def test_what_is_patched_on_a_gpu_exists_in_this_vllm(monkeypatch):
    owners = (
        (triton_moe, "_prepare_expert_assignment"),
        (marlin_moe, "fused_marlin_moe"),
        (marlin_moe, "moe_align_block_size"),
        (Worker, "determine_available_memory"),
        (Worker, "compile_or_warm_up_model"),
    )
    for owner, name in owners:  # vLLM's own again afterwards
        monkeypatch.setattr(owner, name, vars(owner)[name])
    before = [(vars(owner).copy(), owner) for owner in (triton_moe, marlin_moe, Worker)]
    patches.install_cuda_patches()
    patches.install_cuda_patches()  # once, even if called again
    for owner, name in owners:
        wrapped = getattr(owner, name)
        assert wrapped.__moe_offload__, name
        assert not getattr(wrapped.__wrapped__, "__moe_offload__", False), name
    # Nothing else was changed, so nothing stays.
    changed = {
        (owner, name)
        for attributes, owner in before
        for name, value in vars(owner).items()
        if attributes.get(name) is not value
    }
    assert changed == set(owners)
