"""Graphs split at the experts: vLLM's own configuration and splitter, on the CPU."""

import operator

import pytest
import torch
import vllm.model_executor.layers.fused_moe.runner.moe_runner  # noqa: F401  (the operators)
from vllm.compilation.backends import split_graph
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs

from vllm_moe_offload.integration import graphs, plugin


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    plugin.register()
    monkeypatch.delenv(graphs.BREAKABLE, raising=False)


def resolved(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE, **fields):
    """A CompilationConfig after vLLM filled in its defaults for CUDA."""
    config = CompilationConfig(
        mode=fields.pop("mode", CompilationMode.VLLM_COMPILE),
        cudagraph_mode=cudagraph_mode,
        **fields,
    )
    config.set_splitting_ops_for_v1("allgather_reducescatter", 1)
    return config


def test_a_vllm_config_is_split_at_attention_and_experts(demo_model):
    config = EngineArgs(
        model=str(demo_model("mixtral")),
        max_model_len=128,
        additional_config={"moe_offload": {"mode": "trace"}},
    ).create_engine_config()
    compilation = config.compilation_config
    untouched = list(compilation.splitting_ops)
    graphs.split_at_experts(compilation)
    assert compilation.splitting_ops == untouched  # the CPU platform captures nothing
    compilation.mode = CompilationMode.VLLM_COMPILE
    compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    compilation.splitting_ops = None
    compilation.set_splitting_ops_for_v1("allgather_reducescatter", 1)
    before = config.compute_hash()
    assert list(graphs.problems(compilation, None)) == []
    graphs.split_at_experts(compilation)
    assert set(graphs.MOE_OPS) < set(compilation.splitting_ops)
    assert compilation.splitting_ops_contain_attention()
    assert compilation.cudagraph_mode == CUDAGraphMode.PIECEWISE
    assert config.compute_hash() != before, "compiled graphs must not be shared"
    assert not set(graphs.MOE_OPS) & set(CompilationConfig._attention_ops)
    # A second pass over the configuration (workers, copies) keeps what was set.
    again = list(compilation.splitting_ops)
    compilation.set_splitting_ops_for_v1("allgather_reducescatter", 1)
    graphs.split_at_experts(compilation)
    assert compilation.splitting_ops == again


def graph_of(target, outputs):
    """router -> experts -> add, as Dynamo hands it to vLLM's backend."""
    graph = torch.fx.Graph()
    hidden = graph.placeholder("hidden")
    logits = graph.call_function(torch.sigmoid, (hidden,))
    experts = graph.call_function(target, (hidden, logits, hidden, None, "layers.0", 0))
    parts = [experts]
    if outputs == 2:
        parts = [graph.call_function(operator.getitem, (experts, i)) for i in range(2)]
    result = hidden
    for part in parts:
        result = graph.call_function(torch.add, (result, part))
    graph.output(result)
    return torch.fx.GraphModule({}, graph)


@pytest.mark.parametrize(
    ("name", "outputs"), [("moe_forward", 1), ("moe_forward_shared", 2)], ids=graphs.MOE_OPS
)
def test_the_moe_operator_is_a_piece_of_its_own(name, outputs):
    config = resolved()
    graphs.split_at_experts(config)
    module = graph_of(getattr(torch.ops.vllm, name), outputs)
    _, pieces = split_graph(module, config.splitting_ops)
    assert [piece.is_splitting_graph for piece in pieces] == [False, True, False]
    targets = [
        str(node.target)
        for node in pieces[1].graph.graph.nodes
        if node.op == "call_function" and node.target is not operator.getitem
    ]
    assert targets == [f"vllm.{name}"]


def only_problem(config, requested=None):
    (problem,) = graphs.problems(config, requested)
    return problem


def test_full_graphs_are_lowered_by_default_and_refused_by_request():
    assert list(graphs.problems(resolved(), None)) == []
    for mode in (CUDAGraphMode.FULL, CUDAGraphMode.FULL_DECODE_ONLY):
        problem = only_problem(resolved(mode), mode)
        assert f"cudagraph_mode={mode.name}" in problem
        assert "PIECEWISE" in problem
    assert list(graphs.problems(resolved(), CUDAGraphMode.PIECEWISE)) == []


def test_without_graphs_nothing_is_refused_or_changed():
    config = resolved(CUDAGraphMode.NONE, mode=CompilationMode.NONE)
    assert list(graphs.problems(config, CUDAGraphMode.FULL)) == []
    graphs.split_at_experts(config)
    assert config.splitting_ops == []
    assert graphs.StableOutputs.of(config) is None


def test_graphs_that_are_not_split_are_refused(monkeypatch):
    whole = resolved(CUDAGraphMode.FULL, mode=CompilationMode.NONE)
    assert "captures whole steps" in next(graphs.problems(whole, None))
    empty = resolved(CUDAGraphMode.FULL, splitting_ops=[])
    assert "splitting_ops=[]" in only_problem(empty)
    partition = resolved(use_inductor_graph_partition=True)
    assert "use_inductor_graph_partition" in only_problem(partition)
    monkeypatch.setenv(graphs.BREAKABLE, "1")
    assert graphs.BREAKABLE in only_problem(resolved())


@pytest.mark.parametrize("outputs", [1, 2])
def test_results_of_captured_sizes_keep_their_addresses(outputs):
    kept = graphs.StableOutputs(max_tokens=8)

    def call(tokens):
        parts = tuple(torch.rand(tokens, 4) for _ in range(outputs))
        given = parts if outputs == 2 else parts[0]
        result = kept.keep(given)
        assert type(result) is type(given)
        results = result if outputs == 2 else (result,)
        assert all(torch.equal(a, b) for a, b in zip(results, parts, strict=True))
        return [tensor.data_ptr() for tensor in results], given, result

    with torch.inference_mode():
        _, given, result = call(100)  # the profiling run: allocates, and passes through
    assert result is given
    first, *_ = call(3)
    assert len(set(first)) == outputs
    assert call(8)[0] == first
    assert call(1)[0] == first
