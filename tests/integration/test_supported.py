"""What is refused before anything is loaded, on vLLM's own configuration of a model that is served.

Whatever a command line can provoke on a CPU is in ``tests/messages/serve.py``, too.
"""

from __future__ import annotations

import copy
import operator
from types import SimpleNamespace

import pytest
from vllm import envs
from vllm.config import CompilationMode
from vllm.config.lora import LoRAConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_moe_offload.config import OffloadConfig, OptionError
from vllm_moe_offload.integration import supported

ADAPTIVE = SimpleNamespace(method="ngram", enable_adaptive_verification=True)
"""As vLLM has it for a drafter that is refused by its method, too."""
OPTIONS = OffloadConfig(mode="trace")


def drafter(method: str = "ngram", load_format: str = "auto") -> SimpleNamespace:
    """As much of a SpeculativeConfig as is looked at."""
    return SimpleNamespace(
        method=method, draft_load_config=SimpleNamespace(load_format=load_format)
    )


@pytest.fixture(scope="module")
def served(demo_model):
    """A VllmConfig that nothing is wrong with."""
    return EngineArgs(
        model=str(demo_model("mixtral")), max_model_len=128
    ).create_engine_config()


@pytest.fixture
def changed(served):
    """Sets fields, by their path, in a copy of the configuration; vLLM has each of them."""

    def change(fields):
        config = copy.copy(served)
        for path, value in fields.items():
            part, _, name = path.rpartition(".")
            first = part.partition(".")[0]
            if first:
                setattr(config, first, copy.deepcopy(getattr(config, first)))
            owner = operator.attrgetter(part)(config) if part else config
            assert hasattr(owner, name), path
            setattr(owner, name, value)
        return config

    return change


def test_what_is_served_has_no_problem(served):
    supported.check(served, OPTIONS)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (
            {"parallel_config.data_parallel_size": 2},
            "data_parallel_size=2: ranks would compute each other's tokens",
        ),
        (
            {"parallel_config.prefill_context_parallel_size": 2},
            "prefill_context_parallel_size=2: ranks would compute each other's tokens",
        ),
        (
            {"parallel_config.decode_context_parallel_size": 4},
            "decode_context_parallel_size=4: it takes several GPUs",
        ),
        (
            {"parallel_config.enable_eplb": True},
            "enable_eplb=True: experts would move between ranks",
        ),
        (
            {"parallel_config.enable_elastic_ep": True},
            "enable_elastic_ep=True: experts would move between ranks",
        ),
        (
            {"parallel_config.enable_dbo": True},
            "enable_dbo=True, ubatch_size=0: parts of a batch",
        ),
        (
            {"parallel_config.ubatch_size": 2},
            "enable_dbo=False, ubatch_size=2: parts of a batch",
        ),
        (
            {
                "parallel_config.pipeline_parallel_size": 2,
                "compilation_config.mode": CompilationMode.NONE,
            },
            "pipeline_parallel_size=2 with enforce_eager=True",
        ),
        (
            {"model_config.quantization": "experts_int8"},
            "quantization='experts_int8': no kernel",
        ),
        ({"model_config.enable_sleep_mode": True}, "enable_sleep_mode=True: sleep of level 2"),
        (
            {"model_config.enable_cumem_allocator": True},
            "enable_cumem_allocator=True: its memory can be put to sleep without sleep mode",
        ),
        (
            {"cache_config.kv_sharing_fast_prefill": True},
            "kv_sharing_fast_prefill=True: later layers would compute some of a step's tokens",
        ),
        (
            {"speculative_config": ADAPTIVE},
            "speculative_config.enable_adaptive_verification=True: how many guesses a step has",
        ),
        ({"lora_config": LoRAConfig()}, "enable_lora=True: vLLM has no kernel for CPUs"),
        (
            {"load_config.load_format": "fastsafetensors"},
            "load_format='fastsafetensors': stores are built",
        ),
        (
            {"speculative_config": drafter(load_format="fastsafetensors")},
            "speculative_config.draft_load_config.load_format='fastsafetensors': the model's",
        ),
        (
            {"speculative_config": drafter(method="dflash")},
            "speculative_config.method='dflash': what such a drafter does",
        ),
        (
            {"offload_config.uva.cpu_offload_gb": 1.0},
            "cpu_offload_gb=1.0: vLLM's own offloader",
        ),
        (
            {"offload_config.prefetch.offload_group_size": 2},
            "offload_group_size=2: vLLM's prefetch offloader",
        ),
        (
            {"weight_transfer_config": SimpleNamespace()},
            "weight_transfer_config: weights cannot",
        ),
    ],
    ids=lambda value: next(iter(value)).rpartition(".")[2] if isinstance(value, dict) else "",
)
def test_refused_by_name(fields, problem, changed):
    """Features: what does not go with offload, each by its own reason."""
    with pytest.raises(OptionError) as caught:
        supported.check(changed(fields), OPTIONS)
    head, _, problems = str(caught.value).partition("use --moe-offload=off: ")
    assert "--moe-offload=trace is not possible here" in head
    assert problems.startswith(problem)


def test_everything_in_the_way_is_named_at_once(changed):
    fields = {
        "parallel_config.data_parallel_size": 2,
        "model_config.enable_sleep_mode": True,
        "model_config.enable_cumem_allocator": True,  # as vLLM sets it with sleep mode
        "load_config.load_format": "tensorizer",
    }
    with pytest.raises(OptionError) as caught:
        supported.check(changed(fields), OPTIONS)
    message = str(caught.value)
    assert all(
        name in message for name in ("data_parallel_size", "enable_sleep", "'tensorizer'")
    )
    assert "enable_cumem_allocator" not in message


@pytest.mark.parametrize(
    "fields",
    [
        {"parallel_config.tensor_parallel_size": 2},
        {
            "parallel_config.tensor_parallel_size": 2,
            "parallel_config.enable_expert_parallel": True,
        },
        {"parallel_config.pipeline_parallel_size": 2},
        {"parallel_config.ubatch_size": 1},
        {"load_config.load_format": "dummy"},
        {"speculative_config": drafter()},
    ],
    ids=str,
)
def test_allowed(fields, changed):
    supported.check(changed(fields), OPTIONS)


def test_a_vllm_without_the_older_executor_on_ray_has_no_variable_to_ask(changed, monkeypatch):
    monkeypatch.delitem(envs.environment_variables, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND")
    config = changed({"parallel_config.distributed_executor_backend": "ray"})
    with pytest.raises(OptionError) as caught:
        supported.check(config, OPTIONS)
    assert "distributed_executor_backend='ray' on a CPU" in str(caught.value)
