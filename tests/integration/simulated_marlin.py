"""vLLM's Marlin experts on a CPU: its Python as it is, with doubles for its CUDA operators.

The doubles keep the operators' shapes and what they index by what. Packing changes no byte, and
the product is with a matrix that depends on every byte of an expert, so that a wrong slot, a wrong
scale or a wrong bias gives other tokens. What a real kernel leaves unchecked is checked: experts of
blocks lie within the tensors behind the views, which all have the same number of experts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.library import Library
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe.experts import marlin_moe

from vllm_moe_offload.integration import formats, marlin_slots, patching


def packed(weight: torch.Tensor, size_k: int, size_n: int, num_bits: int) -> torch.Tensor:
    """``[..., size_k / 16, size_n * num_bits / 2]`` int32: the shape of Marlin's form."""
    return weight.reshape(*weight.shape[:-2], size_k // 16, size_n * num_bits // 2).contiguous()


def repack(weight: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """``gptq_marlin_moe_repack`` and ``awq_marlin_moe_repack``."""
    sizes = dict(zip(("size_k", "size_n", "num_bits"), args, strict=False)) | options
    return packed(weight, sizes["size_k"], sizes["size_n"], sizes["num_bits"])


def repack_one(b_q_weight: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """``gptq_marlin_repack``: of one expert; a permutation, if there is one, is empty."""
    options.pop("perm", None)
    sizes = [value for value in args if not isinstance(value, torch.Tensor)]
    return repack(b_q_weight, *sizes, **options)


def align(  # noqa: PLR0917 (vLLM's signature)
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_padded: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    *_: Any,
) -> None:
    """``moe_align_block_size``: absent experts (-1 in the map) and padding are in no block."""
    flat = topk_ids.reshape(-1).long()
    if expert_map is not None:
        flat = torch.where(flat >= 0, expert_map[flat.clamp(min=0)].long(), -1)
    assert int(flat.max()) < num_experts, "the kernel counts in an array of num_experts"
    token_ids.fill_(flat.numel())
    expert_ids.fill_(-1)
    begin = 0
    for expert in range(num_experts):
        tokens = (flat == expert).nonzero().reshape(-1)
        token_ids[begin : begin + tokens.numel()] = tokens.int()
        blocks = -(-tokens.numel() // block_size)
        expert_ids[begin // block_size : begin // block_size + blocks] = expert
        begin += blocks * block_size
    num_padded.fill_(begin)


def row(tensor: torch.Tensor, index: int) -> torch.Tensor:
    """``tensor[index]`` by its address, as a kernel finds it, beyond a view if need be."""
    stride = tensor.stride(0)
    offset = tensor.storage_offset() + index * stride
    return torch.as_strided(tensor, tensor.shape[1:], tensor.stride()[1:], offset)


def codes_of(words: torch.Tensor, num_bits: int) -> torch.Tensor:
    """The integers that are packed in a tensor, float32."""
    in_bytes = words.contiguous().view(torch.uint8).reshape(-1)
    if num_bits == 8:
        return in_bytes.float()
    return torch.stack([in_bytes & 15, in_bytes >> 4], 1).reshape(-1).float()


def matrix_of(
    size_k: int, size_n: int, num_bits: int, index: int, tensors: dict[str, Any]
) -> torch.Tensor:
    """float32 ``[size_k, size_n]``, of an expert's every byte."""
    codes = codes_of(row(tensors["weight"], index), num_bits).view(size_k, size_n)
    scales = row(tensors["scales"], index)  # [groups, size_n]
    assert scales.shape[1] == size_n
    per_group = size_k // scales.shape[0]
    if tensors["zeros"] is not None:
        zeros = codes_of(row(tensors["zeros"], index), num_bits).view(scales.shape)
        codes = codes - zeros.repeat_interleave(per_group, 0)
    else:
        codes = codes - 2 ** (num_bits - 1)
    as_bytes = scales.contiguous().view(torch.uint8).view(*scales.shape, -1).float()
    factors = 1 + as_bytes.sum(-1) / 1024
    dense = codes * factors.repeat_interleave(per_group, 0)
    if tensors["global_scale"] is not None:
        dense = dense * (1 + row(tensors["global_scale"], index).float().frac())
    return dense / dense.square().mean().sqrt() / size_k**0.5


def gemm(  # noqa: PLR0917 (vLLM's signature)
    a: torch.Tensor,
    c: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scales: torch.Tensor,
    a_scales: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    zeros: torch.Tensor | None,
    workspace: torch.Tensor,
    token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_padded: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    moe_block_size: int,
    top_k: int,
    mul_topk_weights: bool,
    b_q_type: Any,
    size_m: int,
    size_n: int,
    size_k: int,
    **_: Any,
) -> torch.Tensor:
    """``moe_wna16_marlin_gemm``."""
    assert a_scales is None
    del workspace
    tensors = {
        "weight": weight,
        "scales": scales,
        "zeros": zeros,
        "global_scale": global_scale,
        "bias": bias,
    }
    given = [tensor for tensor in tensors.values() if tensor is not None]
    assert len({tensor.shape[0] for tensor in given}) == 1, "E differs"
    rows = weight.untyped_storage().nbytes() // (weight.stride(0) * weight.element_size())
    c.fill_(float("nan"))  # what no block writes must not be read
    for block in range(int(num_padded) // moe_block_size):
        index = int(expert_ids[block])
        assert 0 <= index < rows, f"block {block} is of expert {index}"
        places = token_ids[block * moe_block_size : (block + 1) * moe_block_size].long()
        places = places[places < size_m * top_k]
        out = a[places // top_k].float() @ matrix_of(
            size_k, size_n, b_q_type.size_bits, index, tensors
        )
        if bias is not None:
            out += row(bias, index).float()
        if mul_topk_weights:
            out *= topk_weights.reshape(-1)[places, None]
        c[places] = out.to(c.dtype)
    return c


def moe_sum(
    rows: torch.Tensor,
    output: torch.Tensor,
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> None:
    """Sum over a token's experts, without absent ones if there is a map."""
    if expert_map is not None:
        assert topk_ids is not None
        ids = topk_ids.long()
        is_there = (ids >= 0) & (expert_map[ids.clamp(min=0)] >= 0)
        rows = torch.where(is_there[..., None], rows, 0)
    output.copy_(rows.float().sum(1))


def swigluoai_and_mul(
    out: torch.Tensor, x: torch.Tensor, alpha: float = 1.702, limit: float = 7.0
) -> None:
    """gpt-oss's activation: gate and up by turns, clamped."""
    gate = x[..., ::2].float().clamp(max=limit)
    up = x[..., 1::2].float().clamp(-limit, limit)
    out.copy_((up + 1) * gate * torch.sigmoid(alpha * gate))


@functools.cache
def with_gpt_oss_activation() -> Library:
    """vLLM's operator for it, which its builds for CPUs lack."""
    library = Library("_C", "FRAGMENT")
    library.define(
        "swigluoai_and_mul(Tensor! out, Tensor input, float alpha=1.702, float limit=7.0) -> ()"
    )
    library.impl("swigluoai_and_mul", swigluoai_and_mul, "CPU")
    return library


@contextlib.contextmanager
def marlin_operators() -> Iterator[None]:
    """While open, ``fused_marlin_moe`` and packing for it run on the CPU device."""
    doubles = {
        "gptq_marlin_moe_repack": repack,
        "awq_marlin_moe_repack": repack,
        "gptq_marlin_repack": repack_one,
        "moe_wna16_marlin_gemm": gemm,
        "moe_align_block_size": align,
        "moe_sum": moe_sum,
    }
    if not hasattr(torch.ops._C, "swigluoai_and_mul"):
        with_gpt_oss_activation()
    with contextlib.ExitStack() as stack:
        for name, double in doubles.items():
            patching.require(ops, name)
            stack.enter_context(mock.patch.object(ops, name, double))
        no_workspace = mock.patch.object(
            marlin_moe, "get_marlin_workspace", return_value=torch.empty(0)
        )
        stack.enter_context(no_workspace)
        yield


@contextlib.contextmanager
def simulated_marlin() -> Iterator[None]:
    """While open, engines of this process with ``moe_backend="marlin"`` run on a CPU."""
    on_cuda = [known for known in formats.FORMATS if known.platform == "cuda"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(marlin_operators())
        for owner, name, value in (
            (
                marlin_moe.MarlinExpertsBase,
                "_supports_current_device",
                staticmethod(lambda: True),
            ),
            (marlin_moe, "fused_marlin_moe", marlin_moe.fused_marlin_moe),
            (marlin_moe, "moe_align_block_size", marlin_moe.moe_align_block_size),
            (formats, "formats_here", lambda: on_cuda),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        marlin_slots.install()
        yield
