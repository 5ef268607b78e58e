"""The share of RAM that vLLM asks for: what there is, unless the user said otherwise."""

import logging

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.utils import cpu_resource_utils
from vllm.utils.cpu_resource_utils import MemoryNodeInfo

from vllm_moe_offload.config import GIB
from vllm_moe_offload.integration import host_share, plugin


@pytest.fixture(scope="module", autouse=True)
def registered():
    plugin.register()


@pytest.fixture
def memory(monkeypatch):
    """Sets what every memory node is said to have, in GiB."""

    def said(total, available):
        info = MemoryNodeInfo(total_memory=total * GIB, available_memory=available * GIB)
        monkeypatch.setattr(cpu_resource_utils, "get_memory_node_info", lambda node=0: info)
        monkeypatch.setattr(cpu_resource_utils, "get_visible_memory_node", lambda: [0])

    return said


def utilization(model, mode="trace", **overrides):
    args = EngineArgs(
        model=str(model),
        max_model_len=128,
        additional_config={"moe_offload": {"mode": mode}},
        **overrides,
    )
    return args.create_engine_config().cache_config.gpu_memory_utilization


def test_it_is_what_is_available_less_a_reserve(demo_model, memory, caplog, monkeypatch):
    memory(100, 52)
    monkeypatch.setattr(
        host_share, "logger", logging.getLogger("seen")
    )  # vLLM's do not propagate
    with caplog.at_level(logging.INFO, "seen"):
        assert utilization(demo_model("mixtral")) == 0.5
    (line,) = [text for text in caplog.messages if "gpu_memory_utilization" in text]
    assert "0.92 -> 0.5" in line
    assert "--gpu-memory-utilization" in line


def test_workers_of_one_node_share_it(demo_model, memory):
    memory(100, 98)
    model = demo_model("mixtral")
    assert utilization(model) == 0.92
    assert utilization(model, tensor_parallel_size=2) == 0.48


@pytest.mark.parametrize(
    "given",
    [
        {"gpu_memory_utilization": 0.9},
        {"kv_cache_memory_bytes": GIB},
        {"mode": "off"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_the_user_gave_stays(demo_model, memory, given):
    memory(100, 20)
    asked = given.get("gpu_memory_utilization", 0.92)
    assert utilization(demo_model("mixtral"), **given) == asked


@pytest.mark.parametrize(
    ("total", "available", "workers", "share"),
    [(24, 20, 1, 0.75), (1000, 1000, 1, 0.98), (1000, 1000, 4, 0.24), (16, 1, 1, 0.01)],
)
def test_shares(total, available, workers, share):
    assert host_share.share_of(total * GIB, available * GIB, workers) == share
