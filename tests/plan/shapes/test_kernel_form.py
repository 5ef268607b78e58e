"""Experts as kernels have them: what is served gets a record that holds everything."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.cache.layout import ALIGNMENT, ExpertLayout
from vllm_moe_offload.plan.shapes import (
    FORMATS,
    ExpertFormat,
    ExpertShape,
    kernel_form,
    refusals,
)
from vllm_moe_offload.plan.shapes.kernel_form import BF16, GROUP_SIZES, Platform, place

BITS = {"bf16": 16, "fp8": 8, "int8": 8, "int4": 4, "mxfp4": 4, "nvfp4": 4}
INT4 = [
    ExpertFormat("int4", method, group_size, has_zero_points)
    for method, zero_points in (
        ("compressed-tensors", (False, True)),
        ("gptq", (False,)),
        ("awq", (True,)),
    )
    for has_zero_points in zero_points
    for group_size in GROUP_SIZES
]
NVFP4 = [ExpertFormat("nvfp4", method) for method in ("compressed-tensors", "modelopt")]
EVERY = [known for known in FORMATS if known.kind not in ("int4", "nvfp4")] + INT4 + NVFP4

UNITS = {
    "bf16": (1, 1),
    "fp8": (32, 128),
    "int8": (32, 32),
    "mxfp4": (32, 32),
    "nvfp4": (64, 16),
}
"""What hidden size and width are multiples of where a kind is served; of int4 see below."""

formats = st.sampled_from(EVERY)
platforms = st.sampled_from(["cpu", "cuda"])
shapes = st.builds(
    ExpertShape,
    hidden=st.integers(1, 5000),
    width=st.integers(1, 5000),
    has_biases=st.booleans(),
    activation=st.sampled_from(["silu", "swigluoai"]),
    routing=st.sampled_from(["softmax", "grouped_sigmoid", "other"]),
)


def shape_for(known: ExpertFormat, hidden: int, width: int, has_biases: bool) -> ExpertShape:
    """An expert of about so many units that kernels for ``known`` take."""
    units = UNITS.get(known.kind, (128, known.group_size))
    activation = "swigluoai" if known.kind == "mxfp4" else "silu"
    return ExpertShape(hidden * units[0], width * units[1], has_biases, activation)


def is_served(known: ExpertFormat, platform: Platform) -> bool:
    return not any(refusals(known, platform, shape_for(known, 8, 8, False)))


SERVED = [
    (known, where) for known in EVERY for where in ("cpu", "cuda") if is_served(known, where)
]
served = st.sampled_from(SERVED)
counts = st.integers(1, 100)


def test_every_format_is_served_somewhere_and_most_everywhere():
    assert {known for known, _ in SERVED} == set(EVERY)
    assert (
        len(SERVED) == 2 * len(EVERY) - 1 - 2 - 4
    )  # int8; NVFP4; compressed-tensors: 32, zero points


def weight_bytes(layout: ExpertLayout) -> int:
    """Of the two largest tensors; all others are there to read them by."""
    return sum(sorted(spec.nbytes for spec in layout.tensors)[-2:])


@given(served, counts, counts, st.booleans())
def test_what_is_served_is_held_whole(where, hidden, width, has_biases):
    known, platform = where
    shape = shape_for(known, hidden, width, has_biases)
    assert not any(refusals(known, platform, shape))
    layout = kernel_form(known, platform, shape)
    assert layout.record_bytes % ALIGNMENT == 0
    assert 0 <= layout.record_bytes - layout.expert_bytes < ALIGNMENT
    assert all(all(size > 0 for size in spec.shape) for spec in layout.tensors)
    assert weight_bytes(layout) * 8 >= shape.weights * BITS[known.kind]
    biases = [spec for spec in layout.tensors if spec.name.endswith("bias")]
    assert sum(math.prod(spec.shape) for spec in biases) >= shape.biases
    assert len(biases) == 2 * has_biases
    # Pads are of a tile each, and scales are small beside what they scale.
    padded = 3 * (shape.hidden + 256) * (shape.width + 128)
    assert layout.expert_bytes <= padded * (BITS[known.kind] / 8 + 0.3) + (1 << 16)


@given(served, counts, counts, st.integers(1, 4), st.integers(1, 4))
def test_a_larger_expert_takes_no_less(where, hidden, width, more_hidden, more_width):
    known, platform = where
    small, large = (
        kernel_form(known, platform, shape_for(known, *units, False))
        for units in ((hidden, width), (hidden * more_hidden, width * more_width))
    )
    assert [spec.name for spec in small.tensors] == [spec.name for spec in large.tensors]
    assert large.expert_bytes >= small.expert_bytes


@given(
    st.sampled_from([known for known in EVERY if known.kind in {"int4", "mxfp4"}]),
    counts,
    counts,
)
def test_whole_tiles_are_not_padded_on_a_gpu(known, hidden, width):
    shape = ExpertShape(256 * hidden, 128 * width)
    layout = kernel_form(known, "cuda", shape)
    assert weight_bytes(layout) * 8 == shape.weights * 4


@pytest.mark.parametrize(
    ("known", "share"),
    [
        (ExpertFormat("int4", "gptq", 32), 0.390625),
        (ExpertFormat("int4", "gptq", 64), 0.3203125),
        (ExpertFormat("int4", "compressed-tensors", 64), 0.3203125),
        (ExpertFormat("int4", "awq", 128, True), 0.28515625),
    ],
)
def test_int4_on_a_cpu_is_more_than_four_bits(known, share):
    shape = ExpertShape(2048, 768)
    bf16 = kernel_form(BF16, "cpu", shape).expert_bytes
    assert kernel_form(known, "cpu", shape).expert_bytes / bf16 == pytest.approx(
        share, abs=1e-6
    )


def test_an_expert_may_have_ten_tensors():
    layout = kernel_form(INT4[0], "cpu", ExpertShape(512, 256))
    assert len(layout.tensors) == 8
    assert len({spec.dtype for spec in layout.tensors}) == 4
    biased = ExpertShape(2944, 2944, True, "swigluoai")
    assert len(kernel_form(INT4[3], "cuda", biased).tensors) == 10


@pytest.mark.parametrize(
    ("known", "platform", "shape", "message"),
    [
        (
            ExpertFormat("int8"),
            "cuda",
            ExpertShape(512, 256),
            "int8 experts on a GPU; served there are bf16, fp8, int4, mxfp4, nvfp4",
        ),
        (
            ExpertFormat("fp8"),
            "cpu",
            ExpertShape(512, 200),
            "fp8 experts on a CPU: expert width 200, must be a multiple of 128",
        ),
        (
            ExpertFormat("int4", "awq", 128, True),
            "cuda",
            ExpertShape(2880, 2880),
            "int4, groups of 128 experts on a GPU: hidden size 2880, must be a multiple of 128",
        ),
        (
            ExpertFormat("int4", "compressed-tensors", 32),
            "cpu",
            ExpertShape(512, 256),
            "int4, groups of 32 experts on a CPU: group_size=32, must be 64 or 128",
        ),
        (
            ExpertFormat("int4", "compressed-tensors", 128, True),
            "cpu",
            ExpertShape(512, 256),
            "int4, groups of 128 experts on a CPU: symmetric=False, must be True",
        ),
        (
            ExpertFormat("mxfp4"),
            "cuda",
            ExpertShape(512, 256),
            "MXFP4 experts on a GPU: activation=silu, must be swigluoai",
        ),
        (
            ExpertFormat("int8"),
            "cpu",
            ExpertShape(512, 256, routing="grouped_sigmoid"),
            "int8 experts on a CPU: chosen by DeepSeek-V3's router, must be by softmax",
        ),
    ],
)
def test_what_is_not_served_names_the_value_and_what_is_allowed(
    known, platform, shape, message
):
    assert message in list(refusals(known, platform, shape))


@given(formats, platforms, shapes)
def test_refusals_name_format_and_platform(known, platform, shape):
    for refusal in refusals(known, platform, shape):
        assert refusal.startswith(f"{known.name} experts on a {place(platform)}")


@given(shapes)
def test_unquantised_experts_are_served_everywhere_and_padded_nowhere(shape):
    for platform in ("cpu", "cuda"):
        assert not any(refusals(BF16, platform, shape))
        layout = kernel_form(BF16, platform, shape)
        assert layout.expert_bytes == 2 * shape.parameters
        assert sum(math.prod(spec.shape) for spec in layout.tensors) == shape.parameters
