"""LoRA beside experts on a CPU, which vLLM has no expert kernel for.

With LoRA on, vLLM chooses kernels that could give experts adapters, and has such for GPUs only. Where
adapters are of other modules nothing of such a kernel is used: here experts are computed as ever, and
what is under test is the rest, which is vLLM's own.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

RANK = 8


@contextlib.contextmanager
def lora_on_cpu() -> Iterator[None]:
    """While open, models are built with LoRA and with vLLM's expert kernels for CPUs."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    from vllm_moe_offload.integration import lora

    original = FusedMoEConfig.__init__

    def without_lora(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "is_lora_enabled": False})

    with (
        patch.object(FusedMoEConfig, "__init__", without_lora),
        patch.object(lora, "problems", lambda _: ()),
    ):
        yield


def write_adapter(out: Path, shapes: dict[str, tuple[int, int]], layers: Sequence[int]) -> Path:
    """An adapter as PEFT saves one, large enough to change what is generated.

    Args:
        out: its directory.
        shapes: outputs and inputs of each module, by its name in a decoder layer.
        layers: decoder layers that it is for.
    """
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in layers:
        for module, (outputs, inputs) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            for kind, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
                values = torch.randn(shape, generator=random) / 4
                tensors[f"{name}.lora_{kind}.weight"] = values
    out.mkdir(parents=True)
    save_file(tensors, out / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in shapes})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets}
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out
