"""The generated models of the GPU benchmark on disk, and where their stores lie."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.demo_model import write_demo_model  # noqa: E402
from scripts.gpu_plan import Model  # noqa: E402

DISK_FACTOR = 1.06
"""Bytes on disk per byte of experts: dense weights, and a store's rounding."""


def _model_dir(work_dir: Path, model: Model) -> Path:
    sizes = "-".join(str(size) for size in asdict(model.shape).values())
    return work_dir / "models" / f"gpu-{model.name}-{sizes}"


def store_of(work_dir: Path, model: Model) -> Path:
    """Folder of the plugin's stores of a model."""
    return work_dir / "store" / _model_dir(work_dir, model).name


def ensure_model(work_dir: Path, model: Model, max_positions: int) -> Path:
    """The model below ``work_dir``, written if it is missing.

    If it and its store do not fit on the disk, other models of this benchmark are removed.
    """
    directory, store = _model_dir(work_dir, model), store_of(work_dir, model)
    has_model = (directory / "config.json").exists()
    missing = (not has_model) + (not store.exists())
    needed = int(missing * DISK_FACTOR * model.expert_bytes)
    work_dir.mkdir(parents=True, exist_ok=True)
    for kept in ("models", "store"):
        for other in sorted((work_dir / kept).glob("gpu-*")):
            if shutil.disk_usage(work_dir).free >= needed:
                break
            if other.name != directory.name:
                print(f"Removing {other} to make room", flush=True)
                shutil.rmtree(other)
    free = shutil.disk_usage(work_dir).free
    if free < needed:
        raise RuntimeError(
            f"{work_dir} has {free / 1e9:.1f} GB free; {model.name} and its store need "
            f"{needed / 1e9:.1f} GB: give a --work-dir with more room, or fewer --layers"
        )
    if not has_model:
        print(f"Writing {directory}", flush=True)
        write_demo_model(
            directory,
            model.arch,
            **asdict(model.shape),
            force=True,
            max_positions=max_positions,
            shared_noise=True,
            progress=sys.stderr.isatty(),
        )
    return directory
