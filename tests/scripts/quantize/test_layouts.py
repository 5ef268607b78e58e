"""What each format writes for a weight: names, types, sizes, and values close to the weight's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scripts.quantize.fp8 import Fp8
from scripts.quantize.layout import QuantizeError
from scripts.quantize.mxfp4 import Mxfp4
from scripts.quantize.write import layout_of
from tests.examples import examples
from tests.scripts.quantize.reference import DEQUANTISERS, E2M1

MODULE = "model.layers.0.mlp.experts.0.up_proj"
FUSED = "model.layers.0.mlp.experts.gate_up_proj"
ROWS, COLUMNS, GROUP = 24, 128, 64

SIZES = st.tuples(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 3), st.floats(-5, 2))


def drawn(seed: int, rows: int, columns: int, exponent: float = 0.0) -> Tensor:
    """A random weight with an outlier and a row of zeros."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.empty(rows, columns).normal_(std=10**exponent, generator=rng)
    weight[0, 0] *= 50
    weight[-1] = 0
    return weight.bfloat16()


def kinds(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Type and shape of each, without the module's name."""
    return {
        name.removeprefix(MODULE): (tensor.dtype, list(tensor.shape))
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        (
            "int4",
            {
                ".weight_packed": (torch.int32, [ROWS, COLUMNS // 8]),
                ".weight_scale": (torch.bfloat16, [ROWS, COLUMNS // GROUP]),
                ".weight_shape": (torch.int64, [2]),
            },
        ),
        (
            "int8",
            {
                ".weight": (torch.int8, [ROWS, COLUMNS]),
                ".weight_scale": (torch.bfloat16, [ROWS, 1]),
            },
        ),
        (
            "gptq",
            {
                ".qweight": (torch.int32, [COLUMNS // 8, ROWS]),
                ".qzeros": (torch.int32, [COLUMNS // GROUP, ROWS // 8]),
                ".scales": (torch.bfloat16, [COLUMNS // GROUP, ROWS]),
                ".g_idx": (torch.int32, [COLUMNS]),
            },
        ),
        (
            "awq",
            {
                ".qweight": (torch.int32, [COLUMNS, ROWS // 8]),
                ".qzeros": (torch.int32, [COLUMNS // GROUP, ROWS // 8]),
                ".scales": (torch.bfloat16, [COLUMNS // GROUP, ROWS]),
            },
        ),
        (
            "fp8",
            {
                ".weight": (torch.float8_e4m3fn, [ROWS, COLUMNS]),
                ".weight_scale_inv": (torch.float32, [1, 1]),
            },
        ),
        (
            "nvfp4",
            {
                ".weight": (torch.uint8, [ROWS, COLUMNS // 2]),
                ".weight_scale": (torch.float8_e4m3fn, [ROWS, COLUMNS // 16]),
                ".weight_scale_2": (torch.float32, []),
                ".input_scale": (torch.float32, []),
            },
        ),
    ],
)
def test_names_types_and_sizes(
    format: str, expected: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    layout = layout_of(format, GROUP, None)
    tensors = layout.tensors(f"{MODULE}.weight", drawn(0, ROWS, COLUMNS, -2.0))
    assert kinds(tensors) == expected
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("format", ["int4", "int8", "gptq", "awq"])
@settings(max_examples=examples(30), deadline=None)
@given(sizes=SIZES, group=st.sampled_from((32, 64, 128)))
def test_integers_are_within_half_a_step(
    format: str, sizes: tuple[int, int, int, float], group: int
) -> None:
    seed, rows, groups, exponent = sizes
    weight = drawn(seed, 8 * rows, group * groups, exponent)
    stored = layout_of(format, group, None).tensors(f"{MODULE}.weight", weight)
    exact = weight.double().numpy()
    error = np.abs(DEQUANTISERS[format](stored, MODULE) - exact)
    parts = exact if format == "int8" else exact.reshape(len(exact), groups, group)
    error = error.reshape(parts.shape)
    if format == "awq":
        span, steps = parts.max(-1).clip(min=0) - parts.min(-1).clip(max=0), 15
    else:
        span, steps = np.abs(parts).max(-1), 127.5 if format == "int8" else 7.5
    step = span / steps
    # The scale is a bfloat16: the range's end is off by its rounding.
    end = span / 2**8
    assert (error <= (0.5 * step * (1 + 2**-8) + end)[..., None]).all()
    # And not only the ends: nearly all are within half a step alone.
    assert (error <= 0.51 * step[..., None]).mean() > 0.9


@settings(max_examples=examples(30), deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 300), st.integers(1, 300), st.floats(-5, 2))
def test_fp8_is_within_half_a_step(seed: int, rows: int, columns: int, exponent: float) -> None:
    weight = drawn(seed, rows, columns, exponent)
    stored = Fp8(False).tensors(f"{MODULE}.weight", weight)
    scale = stored[f"{MODULE}.weight_scale_inv"].double().numpy()
    assert scale.shape == (-(-rows // 128), -(-columns // 128))
    each = scale[np.ix_(np.arange(rows) // 128, np.arange(columns) // 128)]
    exact = weight.double().numpy()
    # Three bits of mantissa; below 2**-6 steps are those at 2**-6.
    power = np.floor(np.log2(np.maximum(np.abs(exact) / each, 2.0**-6)))
    error = np.abs(DEQUANTISERS["fp8"](stored, MODULE) - exact)
    assert (error <= 0.5001 * np.exp2(power - 3) * each).all()


@settings(max_examples=examples(30), deadline=None)
@given(SIZES)
def test_mxfp4_is_the_nearest_and_within_half_a_step(
    sizes: tuple[int, int, int, float],
) -> None:
    seed, outputs, blocks, exponent = sizes
    weight = torch.stack([drawn(seed + i, 32 * blocks, outputs, exponent) for i in range(2)])
    stored = Mxfp4(True).tensors(FUSED, weight)
    assert stored[f"{FUSED}_blocks"].shape == (2, outputs, blocks, 16)
    assert stored[f"{FUSED}_scales"].shape == (2, outputs, blocks)
    assert {tensor.dtype for tensor in stored.values()} == {torch.uint8}
    powers = np.exp2(stored[f"{FUSED}_scales"].numpy().astype(np.int64) - 127)
    scale = np.repeat(powers, 32, axis=2).swapaxes(1, 2)
    scaled = weight.double().numpy() / scale
    error = np.abs(DEQUANTISERS["mxfp4"](stored, FUSED) / scale - scaled)
    assert (error <= np.abs(scaled[..., None] - np.array(E2M1)).min(-1) + 1e-9).all()
    step = np.select([np.abs(scaled) < 2, np.abs(scaled) < 4], [0.5, 1.0], 2.0)
    assert (error <= step / 2).all()


def test_known_values_of_mxfp4() -> None:
    weight = torch.zeros(1, 32, 1)
    weight[0, :4, 0] = torch.tensor([6.0, -0.5, 3.0, 1.0])
    stored = Mxfp4(True).tensors(FUSED, weight.bfloat16())
    assert stored[f"{FUSED}_scales"].tolist() == [[[127]]]
    assert stored[f"{FUSED}_blocks"][0, 0, 0, :3].tolist() == [0x97, 0x25, 0x00]


@settings(max_examples=examples(30), deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 9), st.floats(-3, -2))
def test_nvfp4_is_within_half_a_step(
    seed: int, rows: int, blocks: int, exponent: float
) -> None:
    weight = drawn(seed, rows, 16 * blocks, exponent)
    stored = layout_of("nvfp4", GROUP, None).tensors(f"{MODULE}.weight", weight)
    exact = weight.double().numpy().reshape(rows, blocks, 16)
    error = np.abs(DEQUANTISERS["nvfp4"](stored, MODULE).reshape(exact.shape) - exact)
    # The largest step of e2m1 is a third of its largest value; scales have three bits of mantissa.
    most = np.abs(exact).max(-1, keepdims=True)
    assert (error <= most * (1 / 6 + 2**-4) + 2.0**-19).all()


def test_nvfp4_refuses_what_its_scale_cannot_hold() -> None:
    with pytest.raises(QuantizeError, match=r"up_proj.weight has a value of 5; .* allows 2.62"):
        layout_of("nvfp4", GROUP, None).tensors(f"{MODULE}.weight", torch.full((1, 16), 5.0))


@pytest.mark.parametrize(
    ("format", "shape", "says"),
    [
        ("int4", (64, 96), "its input size is 96; it must be a multiple of 64"),
        ("gptq", (60, 128), "its output size is 60; it must be a multiple of 8"),
        ("awq", (64, 100), "its input size is 100; it must be a multiple of 64"),
        ("mxfp4", (2, 48, 64), "its input size is 48; it must be a multiple of 32"),
        ("nvfp4", (64, 24), "its input size is 24; it must be a multiple of 16"),
        ("fp8", (64, 128), "its output size is 64; it must be a multiple of 128"),
    ],
)
def test_sizes_that_cannot_be_stored_are_refused(
    format: str, shape: tuple[int, ...], says: str
) -> None:
    with pytest.raises(QuantizeError, match=f"self_attn.k_proj.weight: {says}"):
        layout_of(format, 64, None).check("self_attn.k_proj.weight", shape)


def test_fp8_takes_any_size_of_a_module_that_stands_alone() -> None:
    Fp8(False).check("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", (576, 96))
