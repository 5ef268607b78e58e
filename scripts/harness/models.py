"""Demo models that benchmarks serve: written once below --work-dir, kept for the next one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from scripts.demo_model import write_demo_model

LLAMACPP_SHAPE = {"layers": 12, "experts": 16, "top_k": 2, "hidden": 1024, "intermediate": 2048}
QUICK_SHAPE = {"layers": 4, "experts": 8, "top_k": 2, "hidden": 256, "intermediate": 256}


def shape_of(args: argparse.Namespace) -> dict[str, int]:
    """The shape that is measured: that of llama.cpp's figures, 2.4 GB, but for a quick try."""
    return QUICK_SHAPE if args.quick else LLAMACPP_SHAPE


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
