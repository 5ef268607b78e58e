"""What a worker captures: as much as all that share its layers can."""

import logging
from types import SimpleNamespace

import pytest
import torch
from vllm.config import CompilationConfig, CUDAGraphMode

from vllm_moe_offload.integration import captures

FULL, NONE = CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.NONE


@pytest.fixture
def others(monkeypatch):
    """What the other worker of two says; None: there is none."""
    others = SimpleNamespace(say=None)

    def all_reduce(told, *, op, group):
        assert (op, group) == (torch.distributed.ReduceOp.MIN, "cpu group")
        assert told.device.type == "cpu"
        told.copy_(torch.minimum(told, torch.tensor(others.say)))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(
        captures,
        "get_tp_group",
        lambda: SimpleNamespace(world_size=1 + (others.say is not None), cpu_group="cpu group"),
    )
    return others


def config_of(mode=FULL, sizes=(1, 2, 4, 8), num_guesses=None):
    compilation = CompilationConfig(cudagraph_mode=mode)
    compilation.cudagraph_capture_sizes = list(sizes)
    compilation.max_cudagraph_capture_size = sizes[-1]
    speculative = None
    if num_guesses is not None:
        speculative = SimpleNamespace(num_speculative_tokens=num_guesses)
    return SimpleNamespace(compilation_config=compilation, speculative_config=speculative)


def agreed(config, why_host="", most_tokens=captures.EVERY_SIZE):
    captures.agree(config, why_host=why_host, most_tokens=most_tokens)
    compilation = config.compilation_config
    assert compilation.max_cudagraph_capture_size == compilation.cudagraph_capture_sizes[-1]
    return compilation.cudagraph_mode, compilation.cudagraph_capture_sizes


def test_vllms_choice_stands_where_nobody_is_in_the_way(others):
    assert agreed(config_of()) == (FULL, [1, 2, 4, 8])
    others.say = [1, captures.EVERY_SIZE]
    assert agreed(config_of()) == (FULL, [1, 2, 4, 8])


@pytest.mark.parametrize(
    ("sizes", "most", "kept"),
    [((1, 2, 4, 8), 5, [1, 2, 4]), ((1, 2, 4, 8), 8, [1, 2, 4, 8])],
)
def test_batches_that_need_no_waves(sizes, most, kept, others):
    assert agreed(config_of(sizes=sizes), most_tokens=most) == (FULL, kept)


@pytest.mark.parametrize(
    ("sizes", "most", "num_guesses"), [((4, 8), 3, None), ((1, 2, 4, 8), 4, 4)]
)
def test_no_size_is_left(sizes, most, num_guesses, others):
    """Also where the least that a request decodes at a time is more."""
    config = config_of(sizes=sizes, num_guesses=num_guesses)
    captures.agree(config, why_host="", most_tokens=most)
    assert config.compilation_config.cudagraph_mode == NONE


def test_guesses_that_fit_keep_graphs(others):
    assert agreed(config_of(num_guesses=3), most_tokens=4) == (FULL, [1, 2, 4])


@pytest.mark.parametrize("mode", [CUDAGraphMode.FULL, NONE])
def test_no_graph_waits_for_a_host_that_plans(mode, others, caplog, monkeypatch):
    monkeypatch.setattr(captures, "logger", logging.getLogger("seen"))
    config = config_of(mode)
    captures.agree(config, why_host="experts are quantised (fp8)", most_tokens=1)
    assert config.compilation_config.cudagraph_mode == NONE
    says = (
        "the host plans (experts are quantised (fp8)), so no CUDA graphs: cudagraph_mode FULL"
    )
    assert (says in caplog.text) is (mode == CUDAGraphMode.FULL)


def test_workers_do_what_each_of_them_can(others, caplog, monkeypatch):
    monkeypatch.setattr(captures, "logger", logging.getLogger("seen"))
    others.say = [1, 2]
    assert agreed(config_of(), most_tokens=5) == (FULL, [1, 2])
    others.say = [0, captures.EVERY_SIZE]
    assert agreed(config_of())[0] == NONE
    assert "the host plans (another worker has to)" in caplog.text
