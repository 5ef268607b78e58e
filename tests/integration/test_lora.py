"""LoRA beside offloaded experts: modules that adapters may be of, and adapters of experts."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from vllm.config.lora import LoRAConfig
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.models.interfaces import SupportsLoRA

from tests.integration.conftest import LAYERS, EngineProcess, engine
from tests.integration.lora_on_cpu import write_adapter
from tests.integration.test_identity import assert_identical, num_experts, offload
from tests.integration.test_supported_gpu import Platform
from vllm_moe_offload.config import OptionError
from vllm_moe_offload.integration import lora, lora_adapters
from vllm_moe_offload.integration.experts import OffloadedExperts

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ARCH = "mixtral"


def problems(monkeypatch, targets, kind="cuda"):
    monkeypatch.setattr("vllm.platforms.current_platform", Platform(kind=kind))
    return list(lora.problems(LoRAConfig(target_modules=targets)))


def test_without_lora_there_is_no_problem(monkeypatch):
    monkeypatch.setattr("vllm.platforms.current_platform", Platform(kind="cuda"))
    assert list(lora.problems(None)) == []


@pytest.mark.parametrize(
    "targets",
    [ATTENTION, ["gate"], ["shared_expert.down_proj"], ["model.layers.0.self_attn.o_proj"]],
    ids=str,
)
def test_modules_outside_the_experts_are_allowed(targets, monkeypatch):
    assert problems(monkeypatch, targets) == []


@pytest.mark.parametrize(
    "experts",
    ["experts", "model.layers.3.mlp.experts", "experts.0.w1", "experts.routed_experts"],
)
def test_modules_of_experts_are_refused_by_name(experts, monkeypatch):
    (problem,) = problems(monkeypatch, [*ATTENTION, experts])
    assert problem.startswith(f"lora_target_modules=['{experts}']: adapters cannot apply")
    assert lora.EXAMPLE in problem


def test_all_modules_include_experts(monkeypatch):
    (problem,) = problems(monkeypatch, None)
    assert "without lora_target_modules" in problem
    assert lora.EXAMPLE in problem


def test_vllm_for_cpus_has_no_kernel(monkeypatch):
    (problem,) = problems(monkeypatch, ATTENTION, kind="cpu")
    assert "enable_lora=True" in problem


class Runner(MoERunner):
    """What vLLM would replace; never run."""

    def __init__(self):
        torch.nn.Module.__init__(self)


class Rows(OffloadedExperts, torch.nn.Module):
    """Offloaded experts, of a worker that serves."""

    def __init__(self, runtime):
        torch.nn.Module.__init__(self)
        self.runtime = runtime


class Model(torch.nn.Module, SupportsLoRA):
    """A mixture of experts whose own mapping counts more to its experts than names say."""

    is_3d_moe_weight = True
    packed_modules_mapping = {"experts": ["gate_up", "down"]}  # noqa: RUF012

    def __init__(self, runtime=None):
        super().__init__()
        self.attention = torch.nn.Linear(2, 2)
        self.experts = Runner()
        self.experts.rows = Rows(runtime)


def check(*targets):
    lora_adapters.check(Model(), LoRAConfig(target_modules=list(targets)))


def test_a_models_own_mapping_is_asked_too():
    check(*ATTENTION)
    lora_adapters.check(Model(), None)
    for target in ("experts", "gate_up"):
        with pytest.raises(OptionError, match=rf"\['{target}'\] selects experts, whose"):
            check(target)


def load(model, *modules):
    """An adapter with weights for ``modules``, through what workers load adapters with."""
    adapter = SimpleNamespace(loras=dict.fromkeys(modules))
    manager = SimpleNamespace(_adapter_manager=SimpleNamespace(model=model))
    request = SimpleNamespace(lora_name="tuned")
    assert lora_adapters.load_adapter(lambda *_: adapter, manager, request) is adapter


def test_an_adapter_of_experts_is_refused_where_they_are_offloaded():
    load(Model(), "attention", "experts.0.w1", "experts")  # a model without offload
    served = Model(runtime=object())
    load(served, "attention")
    for module in ("experts", "experts.base_layer", "experts.0.w1"):
        with pytest.raises(OptionError, match=rf"adapter 'tuned' has weights for {module}: "):
            load(served, "attention", module)


@pytest.mark.vllm
def test_adapters_of_attention_are_served(demo_model, store_dir, share_engines, tmp_path):
    """Feature: LoRA on modules outside the experts; an adapter of experts is refused when it comes.

    With vLLM's kernels for CPUs: see ``lora_on_cpu.py``.
    """
    model = demo_model(ARCH)
    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    attention = {
        "self_attn.q_proj": (heads * head, hidden),
        "self_attn.v_proj": (config["num_key_value_heads"] * head, hidden),
        "self_attn.o_proj": (hidden, heads * head),
    }
    expert = {"block_sparse_moe.experts.1.w1": (config["intermediate_size"], hidden)}
    tuned = write_adapter(tmp_path / "tuned", attention, range(LAYERS))
    of_experts = write_adapter(tmp_path / "of_experts", attention | expert, range(LAYERS))

    def job(adapter, **extra):
        options = {"enable_lora": True, "lora_target_modules": ATTENTION, **extra}
        job = engine(model, eager=True, **options)
        return job | {"lora_on_cpu": True, "adapter": str(adapter)}

    half = offload(store_dir, "50%")
    process = EngineProcess(tmp_path)
    plain, offloaded, refused = process.run(
        [job(tuned), job(tuned, offload=half), job(of_experts, offload=half)], may_fail=True
    )
    process.stop()
    (untuned,) = share_engines([engine(model, eager=True)])
    assert_identical([plain, offloaded], [num_experts(ARCH) // 2])
    assert plain["batches"] != untuned["batches"]
    assert "LoRA adapter 'adapter' has weights for" in refused["error"]
    assert "block_sparse_moe.experts.1.w1" in refused["error"]
