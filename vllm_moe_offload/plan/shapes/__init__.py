"""What a Mixture-of-Experts model is made of: counted from its config.json or its files."""

from vllm_moe_offload.plan.shapes.architectures import MODEL_TYPES
from vllm_moe_offload.plan.shapes.base import KvShape, ModelShape, ShapeError
from vllm_moe_offload.plan.shapes.config import shape_of_config
from vllm_moe_offload.plan.shapes.kernel_form import (
    FORMATS,
    ExpertFormat,
    ExpertShape,
    kernel_form,
    refusals,
)
from vllm_moe_offload.plan.shapes.known import KnownModel, known_models

__all__ = [
    "FORMATS",
    "MODEL_TYPES",
    "ExpertFormat",
    "ExpertShape",
    "KnownModel",
    "KvShape",
    "ModelShape",
    "ShapeError",
    "kernel_form",
    "known_models",
    "refusals",
    "shape_of_config",
]
