"""Demo models that benchmarks serve: written once below --work-dir, kept for the next one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from scripts.demo_model import write_demo_model
from scripts.quantize import quantize

MIXTRAL_SHAPE = {"layers": 12, "experts": 16, "top_k": 2, "hidden": 1024, "intermediate": 2048}
GROUP_SIZE = 64
"""Of quantised experts: the 576 inputs of the upcycled model's divide by it."""
QUICK_SHAPE = {"layers": 4, "experts": 8, "top_k": 2, "hidden": 256, "intermediate": 256}


def shape_of(args: argparse.Namespace) -> dict[str, int]:
    """The shape that is measured, 2.4 GB of experts, but for a quick try."""
    return QUICK_SHAPE if args.quick else MIXTRAL_SHAPE


def ensure_model(directory: Path, shape: Mapping[str, int], arch: str = "mixtral") -> Path:
    """The demo model of that shape below ``directory``, written if it is missing."""
    sizes = "-".join(str(size) for size in shape.values())
    model = directory / "models" / f"{arch}-{sizes}"
    if not (model / "config.json").exists():
        Console().print(f"Writing {model}")
        write_demo_model(
            model,
            arch,
            layers=shape["layers"],
            experts=shape["experts"],
            top_k=shape["top_k"],
            hidden=shape["hidden"],
            intermediate=shape["intermediate"],
            force=True,
            progress=sys.stderr.isatty(),
        )
    return model


def ensure_quantised(model: Path, name: str) -> Path:
    """The copy of a bf16 checkpoint in the format ``name``, beside it, written if missing."""
    directory = model.with_name(f"{model.name}-{name}")
    if not (directory / "config.json").exists():
        Console().print(f"Writing {directory.name}")
        quantize(model, directory, name, group_size=GROUP_SIZE)
    return directory
