"""What `plan` takes for an expert's kernel form, against the code of vLLM that makes it.

Engines compare whole stores on a CPU (test_formats.py). Here vLLM's own functions run: on a CPU
its repacking operators, and for a GPU everything but Marlin's repacking, of which only the shape
matters here.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm._custom_ops as ops
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.model_executor.layers.fused_moe.oracle import int_wna16, mxfp4
from vllm.model_executor.layers.quantization.utils import marlin_utils_fp4

from vllm_moe_offload.integration import cpu_kernels
from vllm_moe_offload.plan.shapes import ExpertFormat, ExpertShape, kernel_form
from vllm_moe_offload.plan.shapes.kernel_form import GROUP_SIZES, Platform

EXPERTS = 2
BF16 = torch.bfloat16

kernels = pytest.mark.skipif(
    bool(cpu_kernels.missing()),
    reason=f"vLLM's kernels for quantised weights need {', '.join(cpu_kernels.missing())}",
)
group_sizes = st.sampled_from(GROUP_SIZES)
counts = st.integers(1, 6)


def rows_of(tensors: list[Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Element type and shape of one expert's rows; None is no tensor."""
    there = [tensor for tensor in tensors if tensor is not None]
    assert all(tensor.shape[0] == EXPERTS for tensor in there)
    return sorted((str(t.dtype).removeprefix("torch."), tuple(t.shape[1:])) for t in there)


def planned(
    known: ExpertFormat, platform: Platform, shape: ExpertShape
) -> list[tuple[str, tuple[int, ...]]]:
    """The same of what is planned for; the shapes of matrices aside, which no kernel reads."""
    layout = kernel_form(known, platform, shape)
    return sorted(
        (spec.dtype, spec.shape)
        for spec in layout.tensors
        if not spec.name.endswith("_weight_shape")
    )


def words(*shape: int) -> torch.Tensor:
    return torch.zeros(EXPERTS, *shape, dtype=torch.int32)


def scales(*shape: int) -> torch.Tensor:
    return torch.ones(EXPERTS, *shape, dtype=BF16)


def biases(hidden: int, width: int) -> list[torch.Tensor]:
    return [torch.zeros(EXPERTS, size, dtype=BF16) for size in (2 * width, hidden)]


# ---- CPU -------------------------------------------------------------------------------


@kernels
@settings(deadline=None, max_examples=20)
@given(group_sizes, counts, counts, st.sampled_from(["gptq", "awq"]))
def test_int4_on_a_cpu(group_size, hidden_groups, width_groups, method):
    hidden, width = hidden_groups * group_size, width_groups * group_size
    groups, inner = hidden // group_size, width // group_size
    if method == "awq":
        weights = words(hidden, width // 4), words(width, hidden // 8)
        algorithm = ops.CPUQuantAlgo.AWQ
    else:
        weights = words(hidden // 8, 2 * width), words(width // 8, hidden)
        algorithm = ops.CPUQuantAlgo.GPTQ
    made = cpu_moe.prepare_int4_moe_layer_for_cpu(
        *weights,
        scales(groups, 2 * width),
        scales(inner, hidden),
        quant_algo=algorithm,
        w13_zeros=words(groups, width // 4),
        w2_zeros=words(inner, hidden // 8),
    )
    known = ExpertFormat("int4", method, group_size, method == "awq")
    assert rows_of(list(made)) == planned(known, "cpu", ExpertShape(hidden, width))


@kernels
@settings(deadline=None, max_examples=20)
@given(counts, counts)
def test_int8_on_a_cpu(hidden_blocks, width_blocks):
    hidden, width = 32 * hidden_blocks, 32 * width_blocks
    packed = [
        torch.ops._C.convert_weight_packed(
            torch.zeros(EXPERTS, rows, columns, dtype=torch.int8)
        )
        for rows, columns in ((2 * width, hidden), (hidden, width))
    ]
    made = planned(ExpertFormat("int8"), "cpu", ExpertShape(hidden, width))
    assert rows_of(packed) == [row for row in made if row[0] == "int8"]


@kernels
@settings(deadline=None, max_examples=20)
@given(st.integers(1, 400), st.integers(1, 400))
def test_mxfp4_on_a_cpu(hidden, width):
    shape = ExpertShape(hidden, width, True, "swigluoai")
    hidden, width = mxfp4.mxfp4_round_up_hidden_size_and_intermediate_size(
        mxfp4.Mxfp4MoeBackend.CPU, hidden, width
    )
    made = mxfp4.convert_gpt_oss_weight_to_mxfp4_moe_kernel_format(
        mxfp4.Mxfp4MoeBackend.CPU, SimpleNamespace(), *mxfp4_tensors(hidden, width)
    )
    assert rows_of(list(made)) == planned(ExpertFormat("mxfp4"), "cpu", shape)


def mxfp4_tensors(hidden: int, width: int) -> list[torch.Tensor]:
    """As loaded: weights, scales, biases."""
    sizes = [(2 * width, hidden // 2), (hidden, width // 2)]
    sizes += [(2 * width, hidden // 32), (hidden, width // 32)]
    packed = [torch.full((EXPERTS, *size), 120, dtype=torch.uint8) for size in sizes]
    return [*packed, *biases(hidden, width)]


# ---- GPU -------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def marlin_repacks_nothing():
    """Its operators exist on GPUs alone; what they return is described in vllm/_custom_ops.py."""

    def repack(_: Any, size_k: int, size_n: int, num_bits: int, **__: Any) -> torch.Tensor:
        return torch.empty(size_k // 16, size_n * (num_bits // 2), dtype=torch.int32)

    def repack_experts(weights: torch.Tensor, *sizes: int, **named: Any) -> torch.Tensor:
        one = repack(None, *sizes, **named)
        return one.expand(weights.shape[0], *one.shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "gptq_marlin_moe_repack", repack_experts)
        patch.setattr(ops, "awq_marlin_moe_repack", repack_experts)
        patch.setattr(
            ops,
            "gptq_marlin_repack",
            lambda b_q_weight, **named: repack(
                b_q_weight, named["size_k"], named["size_n"], named["num_bits"]
            ),
        )
        yield


@settings(deadline=None, max_examples=20)
@given(
    group_size=group_sizes,
    hidden_tiles=st.integers(1, 4),
    width_groups=counts,
    method=st.sampled_from(["compressed-tensors", "gptq", "awq"]),
    has_biases=st.booleans(),
    has_zeros=st.booleans(),
)
def test_int4_on_a_gpu(
    *, group_size, hidden_tiles, width_groups, method, has_biases, has_zeros
):
    hidden, width = 128 * hidden_tiles, width_groups * group_size
    groups, inner = hidden // group_size, width // group_size
    has_zeros = method == "awq" or (method == "compressed-tensors" and has_zeros)
    layer = SimpleNamespace(intermediate_size_per_partition=width)
    added = biases(hidden, width) if has_biases else [None, None]
    keeps_zeros = has_zeros or method == "gptq"
    if method == "awq":
        made = int_wna16._process_awq_weights_marlin(
            layer,
            4,
            8,
            group_size,
            None,
            words(hidden, width // 4),
            words(width, hidden // 8),
            scales(groups, 2 * width),
            scales(inner, hidden),
            words(groups, width // 4),
            words(inner, hidden // 8),
            *added,
        )
    else:
        zeros = [words(width // 4, groups), words(hidden // 8, inner)]
        made = int_wna16._process_weights_marlin(
            layer,
            None,
            4,
            8,
            group_size,
            words(2 * width, hidden // 8),
            words(hidden, width // 8),
            scales(2 * width, groups),
            scales(hidden, inner),
            *(zeros if keeps_zeros else (None, None)),
            *added,
        )
    known = ExpertFormat("int4", method, group_size, has_zeros)
    shape = ExpertShape(hidden, width, has_biases)
    assert rows_of(list(made)) == planned(known, "cuda", shape)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 600), st.integers(1, 600))
def test_mxfp4_on_a_gpu(hidden, width):
    shape = ExpertShape(hidden, width, True, "swigluoai")
    hidden, width = mxfp4.mxfp4_round_up_hidden_size_and_intermediate_size(
        mxfp4.Mxfp4MoeBackend.MARLIN, hidden, width
    )
    made = marlin_utils_fp4.prepare_moe_mxfp4_layer_for_marlin(
        SimpleNamespace(params_dtype=BF16), *mxfp4_tensors(hidden, width)
    )
    assert rows_of(list(made)) == planned(ExpertFormat("mxfp4"), "cuda", shape)
