"""What vLLM's kernels make of one routed expert: its tensors, by format and platform.

Slots, the store's records and host memory hold experts in this form, not in the checkpoint's:
kernels pad sizes to their tiles, keep scales in other types, and add sums and zero points. Each
function names the file of vLLM that it restates; nothing of vLLM is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from vllm_moe_offload.cache.layout import ELEMENT_BYTES, ExpertLayout, TensorSpec, round_up

Platform = Literal["cpu", "cuda"]
Kind = Literal["bf16", "fp8", "int8", "int4", "mxfp4", "nvfp4"]

GROUP_SIZES = (32, 64, 128)
"""Inputs that share a scale in int4, as vLLM's kernels for it take them."""
FP8_BLOCK = 128
"""Rows and columns that share a scale in fp8."""
MXFP4_BLOCK = 32
"""Inputs that share a scale in MXFP4."""
NVFP4_BLOCK = 16
"""Inputs that share a scale in NVFP4."""

_WORD_VALUES = 8
"""Values of 4 bits in an int32."""


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """One routed expert, as its config.json describes it.

    Its matrices are gate and up, ``[width, hidden]`` each, and down, ``[hidden, width]``.

    Attributes:
        hidden: elements of the hidden state.
        width: elements between up and down.
        has_biases: one for each of the three.
        activation: ``silu``, or ``swigluoai`` of gpt-oss.
        routing: how experts are chosen: ``softmax``; ``grouped_sigmoid`` with a bias, of
            DeepSeek-V3; ``other``. Some kernels are made for some of them.
    """

    hidden: int
    width: int
    has_biases: bool = False
    activation: Literal["silu", "swigluoai"] = "silu"
    routing: Literal["softmax", "grouped_sigmoid", "other"] = "softmax"

    @property
    def weights(self) -> int:
        """Elements of its matrices."""
        return 3 * self.hidden * self.width

    @property
    def biases(self) -> int:
        """Elements of its biases."""
        return 2 * self.width + self.hidden if self.has_biases else 0

    @property
    def parameters(self) -> int:
        """Both."""
        return self.weights + self.biases


@dataclass(frozen=True, slots=True)
class ExpertFormat:
    """How a checkpoint stores routed experts.

    Attributes:
        kind: ``bf16`` stands for fp16 as well.
        method: of int4 and NVFP4, who packed it: ``compressed-tensors``, ``gptq``, ``awq`` or
            ``modelopt``.
        group_size: of int4, inputs that share a scale; one of :data:`GROUP_SIZES`.
        has_zero_points: of int4, whether the checkpoint has them.
    """

    kind: Kind
    method: str = ""
    group_size: int = 0
    has_zero_points: bool = False

    @property
    def name(self) -> str:
        """For people."""
        if self.kind == "int4":
            return f"int4, groups of {self.group_size}"
        return self.kind.upper() if self.kind in ("mxfp4", "nvfp4") else self.kind


BF16 = ExpertFormat("bf16")
FORMATS = (
    BF16,
    ExpertFormat("fp8"),
    ExpertFormat("int8"),
    ExpertFormat("int4", "compressed-tensors", 128),
    ExpertFormat("mxfp4"),
    ExpertFormat("nvfp4", "modelopt"),
)
"""One of each kind, as most checkpoints of it are."""


def kernel_form(known: ExpertFormat, platform: Platform, shape: ExpertShape) -> ExpertLayout:
    """Tensors of one expert as its slot and its record hold them.

    Args:
        known: a format that is served there (:func:`refusals` finds nothing).
        platform: where it is served.
        shape: the expert.

    Raises:
        KeyError: the format is never served on that platform.
    """
    tensors = _KERNELS[known.kind, platform].form(known, shape)
    return ExpertLayout(tuple(_spec(*tensor) for tensor in tensors))


def refusals(known: ExpertFormat, platform: Platform, shape: ExpertShape) -> Iterator[str]:
    """Why experts of a format are not served on a platform; nothing if they are."""
    kernel = _KERNELS.get((known.kind, platform))
    if kernel is None:
        here = ", ".join(kind for kind, where in _KERNELS if where == platform)
        yield f"{known.name} experts on a {place(platform)}; served there are {here}"
        return
    here = f"{known.name} experts on a {place(platform)}"
    if shape.activation not in kernel.activations:
        yield f"{here}: activation={shape.activation}, must be {_or(kernel.activations)}"
    if shape.routing not in kernel.routings:
        known_ways = _or(tuple(_WAYS[routing] for routing in kernel.routings))
        yield f"{here}: chosen by {_WAYS[shape.routing]}, must be by {known_ways}"
    for what, value, multiple in (
        ("hidden size", shape.hidden, kernel.hidden),
        ("expert width", shape.width, kernel.width),
    ):
        divisor = math.lcm(multiple, known.group_size or 1)
        if value % divisor:
            yield f"{here}: {what} {value}, must be a multiple of {divisor}"
    if known.method == "compressed-tensors" and platform == "cpu":
        if known.has_zero_points:
            yield f"{here}: symmetric=False, must be True"
        if known.group_size == GROUP_SIZES[0]:
            yield f"{here}: group_size={known.group_size}, must be {_or(GROUP_SIZES[1:])}"


_WAYS = {
    "softmax": "softmax",
    "grouped_sigmoid": "DeepSeek-V3's router",
    "other": "a router of its own",
}


def _or(values: tuple[object, ...]) -> str:
    return " or ".join(map(str, values))


def place(platform: Platform) -> str:
    """For people: ``CPU`` or ``GPU``."""
    return "CPU" if platform == "cpu" else "GPU"


_Tensor = tuple[str, str, tuple[int, ...]]
"""Parameter's name, element type, shape of one expert's row."""


def _spec(name: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(name, shape, dtype, math.prod(shape) * ELEMENT_BYTES[dtype])


def _biases(shape: ExpertShape, dtype: str, hidden: int, width: int) -> list[_Tensor]:
    if not shape.has_biases:
        return []
    return [("w13_bias", dtype, (2 * width,)), ("w2_bias", dtype, (hidden,))]


def _bf16(known: ExpertFormat, shape: ExpertShape) -> list[_Tensor]:
    """vllm/model_executor/layers/fused_moe/unquantized_fused_moe_method.py, ``create_weights``."""
    del known
    hidden, width = shape.hidden, shape.width
    return [
        ("w13_weight", "bfloat16", (2 * width, hidden)),
        ("w2_weight", "bfloat16", (hidden, width)),
        *_biases(shape, "bfloat16", hidden, width),
    ]


def _fp8(known: ExpertFormat, shape: ExpertShape) -> list[_Tensor]:
    """vllm/model_executor/layers/quantization/fp8.py, ``Fp8MoEMethod.create_weights``.

    Triton's kernel reads that, and the CPU's order of it takes the same bytes.
    """
    del known
    hidden, width = shape.hidden, shape.width
    rows, columns = -(-width // FP8_BLOCK), -(-hidden // FP8_BLOCK)
    return [
        ("w13_weight", "float8_e4m3fn", (2 * width, hidden)),
        ("w2_weight", "float8_e4m3fn", (hidden, width)),
        ("w13_weight_scale_inv", "float32", (2 * rows, columns)),
        ("w2_weight_scale_inv", "float32", (columns, rows)),
        *_biases(shape, "bfloat16", hidden, width),
    ]


def _int8_cpu(known: ExpertFormat, shape: ExpertShape) -> list[_Tensor]:
    """.../compressed_tensors_moe/compressed_tensors_moe_w8a8_int8.py, ``create_weights``, and
    ``CPUExpertsInt8`` in .../fused_moe/experts/cpu_moe.py: its order of the weights holds an
    int32 sum for each row beside it."""
    del known
    hidden, width, total = shape.hidden, shape.width, ELEMENT_BYTES["int32"]
    return [
        ("w13_weight", "int8", (2 * width, hidden + total)),
        ("w2_weight", "int8", (hidden, width + total)),
        ("w13_weight_scale", "float32", (2 * width, 1)),
        ("w2_weight_scale", "float32", (hidden, 1)),
        *_biases(shape, "bfloat16", hidden, width),
    ]


def _int4_cpu(known: ExpertFormat, shape: ExpertShape) -> list[_Tensor]:
    """``prepare_int4_moe_layer_for_cpu`` in .../fused_moe/experts/cpu_moe.py: blocks of 32 outputs
    by a group of inputs, an int32 sum for each output behind every block; scales in float32, and
    zero points also where the checkpoint has none."""
    outputs, inputs = 32, known.group_size
    block = outputs * inputs // 2 + outputs * ELEMENT_BYTES["int32"]
    names = _INT4_NAMES[known.method]
    weights, scales, zeros = [], [], []
    for matrix, rows, columns in _matrices(shape.hidden, shape.width):
        blocks = (rows // outputs, columns // inputs)
        weights.append((f"{matrix}_{names.weight}", "uint8", (*blocks, block)))
        scales.append((f"{matrix}_{names.scale}", "float32", (*blocks, outputs)))
        zeros.append((f"{matrix}_{names.zeros}", "int8", (*blocks, outputs)))
    return [
        *weights,
        *scales,
        *zeros,
        *_weight_shapes(known),
        *_biases(shape, "float32", shape.hidden, shape.width),
    ]


def _mxfp4_cpu(known: ExpertFormat, shape: ExpertShape) -> list[_Tensor]:
    """``mxfp4_round_up_hidden_size_and_intermediate_size`` and
    ``convert_gpt_oss_weight_to_mxfp4_moe_kernel_format`` in .../fused_moe/oracle/mxfp4.py, CPU."""
    del known
    hidden, width = round_up(shape.hidden, 32), round_up(shape.width, 32)
    tensors: list[_Tensor] = []
    for matrix, rows, columns in _matrices(hidden, width):
        tensors.append((f"{matrix}_weight", "uint8", (rows, columns // 2)))
        tensors.append((f"{matrix}_weight_scale", "uint8", (rows, columns // MXFP4_BLOCK)))
    return [*tensors, *_biases(shape, "float32", hidden, width)]


def _int4_cuda(known: ExpertFormat, shape: ExpertShape) -> list[_Tensor]:
    """``_process_weights_marlin`` and ``_process_awq_weights_marlin`` in
    .../fused_moe/oracle/int_wna16.py: widths padded to Marlin's tiles and whole groups. Layers of
    GPTQ keep their zero points, which symmetric kernels do not read."""
    width = round_up(shape.width, math.lcm(64, known.group_size))
    names = _INT4_NAMES[known.method]
    weights, scales, zeros = [], [], []
    for matrix, rows, columns in _matrices(shape.hidden, width):
        groups = columns // known.group_size
        weights.append((f"{matrix}_{names.weight}", "int32", _marlin(rows, columns)))
        scales.append((f"{matrix}_{names.scale}", "bfloat16", (groups, rows)))
        zeros.append((f"{matrix}_{names.zeros}", "int32", (groups, rows // _WORD_VALUES)))
    keeps_zeros = known.has_zero_points or known.method == "gptq"
    return [
        *weights,
        *scales,
        *(zeros if keeps_zeros else ()),
        *_weight_shapes(known),
        *_biases(shape, "bfloat16", shape.hidden, width),
    ]


def _mxfp4_cuda(known: ExpertFormat, shape: ExpertShape) -> list[_Tensor]:
    """``mxfp4_round_up_hidden_size_and_intermediate_size`` in .../fused_moe/oracle/mxfp4.py and
    ``prepare_moe_mxfp4_layer_for_marlin`` in .../quantization/utils/marlin_utils_fp4.py."""
    del known
    hidden, width = round_up(shape.hidden, 256), round_up(shape.width, 128)
    tensors: list[_Tensor] = []
    for matrix, rows, columns in _matrices(hidden, width):
        tensors.append((f"{matrix}_weight", "int32", _marlin(rows, columns)))
        scales = (columns // MXFP4_BLOCK, rows)
        tensors.append((f"{matrix}_weight_scale", "float8_e8m0fnu", scales))
    return [*tensors, *_biases(shape, "bfloat16", hidden, width)]


def _nvfp4_cuda(known: ExpertFormat, shape: ExpertShape) -> list[_Tensor]:
    """``prepare_nvfp4_moe_layer_for_marlin`` in .../quantization/utils/marlin_utils_fp4.py."""
    width = round_up(shape.width, 64 if shape.hidden % 128 == 0 else 128)
    tensors: list[_Tensor] = []
    for matrix, rows, columns in _matrices(shape.hidden, width):
        tensors.append((f"{matrix}_weight", "int32", _marlin(rows, columns)))
        scales = (columns // NVFP4_BLOCK, rows)
        tensors.append((f"{matrix}_weight_scale", "float8_e4m3fn", scales))
        tensors.append((f"{matrix}_weight_scale_2", "float32", ()))
    if known.method == "compressed-tensors":  # read from the checkpoint, and kept by the layer
        for matrix, shards in (("w13", (2,)), ("w2", ())):
            tensors.append((f"{matrix}_weight_global_scale", "float32", shards))
            tensors.append((f"{matrix}_input_global_scale", "float32", shards))
    return [*tensors, *_biases(shape, "bfloat16", shape.hidden, width)]


def _matrices(hidden: int, width: int) -> tuple[tuple[str, int, int], ...]:
    """Name, outputs and inputs of gate and up as one, and of down."""
    return (("w13", 2 * width, hidden), ("w2", hidden, width))


def _marlin(outputs: int, inputs: int) -> tuple[int, int]:
    """Shape of 4-bit weights in Marlin's order, in int32: tiles of 16 inputs.

    ``gptq_marlin_moe_repack`` in vllm/_custom_ops.py.
    """
    return inputs // 16, outputs * 16 // _WORD_VALUES


def _weight_shapes(known: ExpertFormat) -> list[_Tensor]:
    """Two numbers for each matrix, which compressed-tensors keeps (.../compressed_tensors_moe/
    compressed_tensors_moe_wna16.py, ``create_weights``)."""
    if known.method != "compressed-tensors":
        return []
    return [(f"{matrix}_weight_shape", "bfloat16", (2,)) for matrix in ("w13", "w2")]


@dataclass(frozen=True, slots=True)
class _Int4Names:
    """Of a layer's parameters, behind ``w13_`` and ``w2_``."""

    weight: str
    scale: str
    zeros: str


_Q = _Int4Names("qweight", "scales", "qzeros")
_INT4_NAMES = {
    "compressed-tensors": _Int4Names("weight_packed", "weight_scale", "weight_zero_point"),
    "gptq": _Q,
    "awq": _Q,
}


@dataclass(frozen=True, slots=True)
class _Kernel:
    """What a kernel makes of an expert, and asks for.

    Attributes:
        form: its tensors.
        hidden, width: sizes must be multiples of these.
        activations, routings: that it has.
    """

    form: Callable[[ExpertFormat, ExpertShape], list[_Tensor]]
    hidden: int = 1
    width: int = 1
    activations: tuple[str, ...] = ("silu", "swigluoai")
    routings: tuple[str, ...] = ("softmax", "grouped_sigmoid", "other")


_SILU, _SOFTMAX = ("silu",), ("softmax",)
_KERNELS: dict[tuple[Kind, Platform], _Kernel] = {
    ("bf16", "cpu"): _Kernel(_bf16),
    ("fp8", "cpu"): _Kernel(_fp8, 32, FP8_BLOCK, _SILU, ("softmax", "grouped_sigmoid")),
    ("int8", "cpu"): _Kernel(_int8_cpu, 32, 32, _SILU, _SOFTMAX),
    ("int4", "cpu"): _Kernel(_int4_cpu, 32, 32, _SILU, _SOFTMAX),
    ("mxfp4", "cpu"): _Kernel(_mxfp4_cpu, MXFP4_BLOCK, MXFP4_BLOCK, ("swigluoai",), _SOFTMAX),
    ("bf16", "cuda"): _Kernel(_bf16),
    ("fp8", "cuda"): _Kernel(_fp8, 1, FP8_BLOCK),
    ("int4", "cuda"): _Kernel(_int4_cuda, 128, 1),
    ("mxfp4", "cuda"): _Kernel(_mxfp4_cuda, MXFP4_BLOCK, MXFP4_BLOCK, ("swigluoai",)),
    ("nvfp4", "cuda"): _Kernel(_nvfp4_cuda, 64, NVFP4_BLOCK, _SILU),
}
"""What is served, as ``integration/formats.py`` lists it. What kernels ask for is from
``CPUExperts*`` in .../fused_moe/experts/cpu_moe.py, ``check_moe_marlin_supports_config`` in
.../quantization/utils/marlin_utils.py and ``validate_fp8_block_shape_moe`` in
.../quantization/utils/fp8_utils.py; MXFP4 is gpt-oss's alone (.../quantization/mxfp4.py)."""
