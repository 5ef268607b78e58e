"""What a GPU cannot do is refused by name; the rest is set up. No GPU is needed to decide."""

import importlib.util
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.config.kernel import KernelConfig
from vllm.model_executor.layers.fused_moe.experts import marlin_moe, triton_moe
from vllm.v1.worker.gpu_worker import Worker

from vllm_moe_offload.config import OffloadConfig, OptionError
from vllm_moe_offload.integration import formats, patches, supported, supported_gpu


def config(dtype=torch.bfloat16, moe_backend="auto", quantization=None):
    compilation = CompilationConfig(
        mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE
    )
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
    supported_gpu.prepare(allowed, capability)
    assert allowed.kernel_config.moe_backend == chosen


@pytest.mark.parametrize(("quantization", "warns"), [(None, False), ("awq", True)])
def test_what_was_never_run_is_said_at_the_start(quantization, warns, caplog, monkeypatch):
    monkeypatch.setattr(supported_gpu, "logger", logging.getLogger("seen"))
    supported_gpu.prepare(config(quantization=quantization), (9, 0))
    assert ("never run on a GPU" in caplog.text) is warns


def test_a_kernel_that_the_user_chose_stays():
    allowed = config(quantization="fp8", moe_backend="marlin")
    assert not list(supported_gpu.problems(allowed, (9, 0)))
    supported_gpu.prepare(allowed, (9, 0))
    assert allowed.kernel_config.moe_backend == "marlin"


def test_what_is_allowed_is_set_up():
    allowed = config()
    supported_gpu.prepare(allowed, (9, 0))
    assert allowed.compilation_config.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE
    assert not set(supported_gpu.MOE_OPS) & set(allowed.compilation_config.splitting_ops)
    assert problems() == list(supported_gpu.problems(allowed, (9, 0)))


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


def test_a_gpu_without_triton_is_refused_before_loading(monkeypatch):
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


@pytest.mark.parametrize("mode", list(CUDAGraphMode))
@pytest.mark.parametrize("breakable", ["0", "1"])
def test_any_graphs_of_vllm_stand(mode, breakable, monkeypatch):
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", breakable)
    asked = config()
    asked.compilation_config.cudagraph_mode = mode
    assert not list(supported_gpu.problems(asked, (9, 0)))
    supported_gpu.prepare(asked, (9, 0))
    assert asked.compilation_config.cudagraph_mode == mode


def test_inductors_partition_and_split_experts_are_refused():
    asked = config()
    asked.compilation_config.use_inductor_graph_partition = True
    asked.compilation_config.splitting_ops += ["vllm::moe_forward_shared"]
    partition, split = supported_gpu.problems(asked, (9, 0))
    assert partition.startswith("use_inductor_graph_partition=True")
    assert split.startswith("splitting_ops with vllm::moe_forward_shared")
    asked.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    assert not list(supported_gpu.problems(asked, (9, 0)))


def test_padding_must_be_told(monkeypatch):
    monkeypatch.setenv("VLLM_MOE_SKIP_PADDING", "0")
    (problem,) = problems()
    assert problem.startswith("VLLM_MOE_SKIP_PADDING=0")


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
