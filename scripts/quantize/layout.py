"""What one family of checkpoints has of its own, and which tensors it quantises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Last part of the names of linear modules that choose experts; no tool quantises them."""
SUFFIX = ".weight"

Config = dict[str, object]
Sizes = tuple[int, ...]


class QuantizeError(ValueError):
    """What was asked for cannot be written; the message says why and what can."""


def is_linear(name: str, shape: Sizes) -> bool:
    """Whether a tensor is the weight of a linear module, by its name."""
    return len(shape) == 2 and name.endswith(SUFFIX) and "embed_tokens" not in name


class Layout(ABC):
    """How a format stores a linear module's weight.

    Attributes:
        experts_only: quantise routed experts alone, not attention, nor dense and shared
            networks.
    """

    def __init__(self, experts_only: bool) -> None:
        self.experts_only = experts_only

    def converts(self, name: str, shape: Sizes) -> bool:
        """Whether this tensor is one that is quantised."""
        if not is_linear(name, shape):
            return False
        last = name.removesuffix(SUFFIX).rsplit(".", 1)[-1]
        if last in ROUTERS or last == "lm_head":
            return False
        return ".experts." in name or not self.experts_only

    @abstractmethod
    def check(self, name: str, shape: Sizes) -> None:
        """Raises QuantizeError unless a tensor of ``shape`` can be stored."""

    @abstractmethod
    def tensors(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """What is stored in place of ``weight``, by name.

        Args:
            name: of the tensor, such as ``model.layers.0.mlp.experts.3.up_proj.weight``.
            weight: ``[out, in]``, of any floating type.
        """

    @abstractmethod
    def config(self, kept: Sequence[str]) -> Config:
        """``quantization_config``; ``kept``: names of the linear modules that stay as they are."""


class GroupedLayout(Layout):
    """A format with one scale per output and group of inputs.

    Attributes:
        group_size: inputs that share a scale.
        outputs_per_word: the number of outputs must be a multiple of it.
    """

    outputs_per_word: ClassVar[int] = 1

    def __init__(self, experts_only: bool, group_size: int) -> None:
        super().__init__(experts_only)
        self.group_size = group_size

    def check(self, name: str, shape: Sizes) -> None:
        """See :class:`Layout`."""
        require_multiple(name, "output size", shape[0], self.outputs_per_word)
        require_multiple(name, "input size", shape[1], self.group_size)


def require_multiple(name: str, what: str, size: int, of: int) -> None:
    """Raises QuantizeError unless ``size`` is a multiple of ``of``."""
    if size % of:
        raise QuantizeError(f"{name}: its {what} is {size}; it must be a multiple of {of}")
