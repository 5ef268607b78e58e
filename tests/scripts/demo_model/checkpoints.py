"""What tests ask of a written checkpoint, and the size that they write."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from scripts.demo_model import ARCHS

TWO_ARCHS = [
    arch if arch in {"mixtral", "gpt_oss"} else pytest.param(arch, marks=pytest.mark.slow)
    for arch in ARCHS
]
"""All of them in `make test-all`, else one with experts each for itself and the fused one."""

TINY = {"layers": 2, "experts": 4, "top_k": 2, "hidden": 64, "intermediate": 32}


def tensors_of(model: Path) -> dict[str, torch.Tensor]:
    """All tensors in the shards of ``model``."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return found


def digests(model: Path) -> dict[str, str]:
    """Hash of every file of ``model``, by name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in model.iterdir()
    }


def experts_of(tensors: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Tensors of the routed experts: what they are -> one tensor for each expert."""
    groups: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, marker, rest = name.partition(".experts.")
        if not marker:
            continue
        expert, _, kind = rest.partition(".")
        if expert.isdigit():
            groups.setdefault(f"{prefix}.{kind}", []).append(tensor)
        else:
            groups[name] = list(tensor)
    return groups
