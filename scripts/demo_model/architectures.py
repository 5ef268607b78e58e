"""The architectures that can be written, and what vLLM asks of their sizes."""

from __future__ import annotations

from dataclasses import dataclass

BF16_BYTES = 2
ALIGNMENT = 32
"""vLLM's CPU kernel for unquantised experts wants both dimensions divisible by this."""
MAX_POSITIONS = 8192

# vLLM's CPU kernels for latent attention are compiled for a latent of 512 + 64.
MLA_RANK = 512
MLA_ROPE_DIM = 64
MLA_NOPE_DIM = 128
MLA_V_DIM = 128


class DemoModelError(ValueError):
    """What was asked for cannot be written; the message says why and what can."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. ``intermediate`` is the width of one routed expert."""

    layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int


@dataclass(frozen=True)
class Arch:
    """What distinguishes one architecture from another.

    Attributes:
        default: shape without any flags; about 0.3 GB of experts.
        class_name: the entry of ``architectures`` in config.json.
        dense_layers: leading layers without experts.
        renormalize: whether the weights of the chosen experts are scaled to sum to one.
        expert_names: checkpoint names of an expert's gate, up and down projection.
        moe_name: checkpoint name of the block that holds router and experts.
        act_rms: root mean square of the activation for unit normal input.
    """

    default: Shape
    class_name: str
    dense_layers: int = 0
    renormalize: bool = True
    expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    moe_name: str = "mlp"
    act_rms: float = 0.6


ARCHS: dict[str, Arch] = {
    "mixtral": Arch(
        Shape(layers=12, experts=16, top_k=2, hidden=512, intermediate=512),
        "MixtralForCausalLM",
        expert_names=("w1", "w3", "w2"),
        moe_name="block_sparse_moe",
    ),
    "qwen3_moe": Arch(
        Shape(layers=12, experts=64, top_k=8, hidden=512, intermediate=128),
        "Qwen3MoeForCausalLM",
    ),
    "deepseek_v2": Arch(
        Shape(layers=13, experts=64, top_k=6, hidden=512, intermediate=128),
        "DeepseekV2ForCausalLM",
        dense_layers=1,
        renormalize=False,
    ),
    "gpt_oss": Arch(
        Shape(layers=12, experts=32, top_k=4, hidden=512, intermediate=256),
        "GptOssForCausalLM",
        act_rms=1.0,
    ),
    "olmoe": Arch(
        Shape(layers=12, experts=64, top_k=8, hidden=512, intermediate=128),
        "OlmoeForCausalLM",
        renormalize=False,
    ),
}

SHARED_EXPERTS = 2
"""Shared experts of a DeepSeek layer, each as wide as a routed one."""


def expert_bytes(arch: str, shape: Shape) -> int:
    """Bytes of all routed experts, biases included, in bfloat16."""
    values = 3 * shape.hidden * shape.intermediate
    if arch == "gpt_oss":
        values += 2 * shape.intermediate + shape.hidden
    moe_layers = shape.layers - ARCHS[arch].dense_layers
    return BF16_BYTES * moe_layers * shape.experts * values


def check_shape(arch: str, shape: Shape) -> None:
    """Raise :class:`DemoModelError` unless vLLM can run ``shape`` as ``arch``."""
    for name in ("hidden", "intermediate"):
        value = getattr(shape, name)
        if value <= 0 or value % ALIGNMENT:
            raise DemoModelError(
                f"{name} is {value}; vLLM's CPU kernel needs a positive multiple of {ALIGNMENT}"
            )
    least_layers = ARCHS[arch].dense_layers + 1
    if shape.layers < least_layers:
        raise DemoModelError(
            f"layers is {shape.layers}; {arch} needs at least {least_layers}"
            + (" (the first is dense)" if least_layers > 1 else "")
        )
    if shape.experts < 2:
        raise DemoModelError(f"experts is {shape.experts}; at least 2 are needed")
    if not 1 <= shape.top_k <= shape.experts:
        raise DemoModelError(
            f"top-k is {shape.top_k}; it must lie between 1 and experts ({shape.experts})"
        )
