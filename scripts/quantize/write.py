"""From a checkpoint to a quantised one: tokenizer, weights shard by shard, config last."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scripts.demo_model.write import MAX_SHARD_BYTES, check_target, clear_checkpoint, write_json
from scripts.quantize.awq import Awq
from scripts.quantize.compressed_tensors import IntQuantized, PackQuantized
from scripts.quantize.fp8 import Fp8
from scripts.quantize.gptq import Gptq
from scripts.quantize.layout import SUFFIX, Layout, QuantizeError, Sizes, is_linear
from scripts.quantize.mxfp4 import Mxfp4
from scripts.quantize.nvfp4 import Nvfp4
from scripts.quantize.shards import Shards, Source

FORMATS = ("int4", "int8", "gptq", "awq", "fp8", "mxfp4", "nvfp4")
GROUP_SIZES = (32, 64, 128)
FUSED_MODEL = "gpt_oss"
"""The one type of model whose experts lie in one tensor a layer."""


def layout_of(format: str, group_size: int, experts_only: bool | None) -> Layout:
    """The layout of a format; ``experts_only`` None: as most checkpoints of it are.

    Raises:
        QuantizeError: there is no such format or group size.
    """
    if format not in FORMATS:
        raise QuantizeError(f"format is {format!r}; known are {', '.join(FORMATS)}")
    if group_size not in GROUP_SIZES:
        raise QuantizeError(
            f"group-size is {group_size}; it must be one of {', '.join(map(str, GROUP_SIZES))}"
        )
    only = format != "fp8" if experts_only is None else experts_only
    grouped: dict[str, Callable[[bool, int], Layout]] = {
        "int4": PackQuantized,
        "gptq": Gptq,
        "awq": Awq,
    }
    if format in grouped:
        return grouped[format](only, group_size)
    plain: dict[str, Callable[[bool], Layout]] = {
        "int8": IntQuantized,
        "fp8": Fp8,
        "mxfp4": Mxfp4,
        "nvfp4": Nvfp4,
    }
    return plain[format](only)


def quantize(
    model: Path,
    out: Path,
    format: str,
    *,
    group_size: int = 128,
    experts_only: bool | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    force: bool = False,
) -> None:
    """Writes ``model``, quantised, to the directory ``out``.

    Args:
        model: directory of a checkpoint in safetensors that is not quantised.
        out: directory; created if it is missing.
        format: one of ``FORMATS``; ``mxfp4`` is for gpt_oss, and nothing else is.
        group_size: inputs that share a scale: 32, 64 or 128; for int4, gptq and awq.
        experts_only: leave attention and all other networks as they are; None: for all
            formats but fp8.
        max_shard_bytes: of a file, and about what is in memory.
        force: replace a checkpoint that is in ``out``.

    Raises:
        QuantizeError: the model or an argument does not allow it; nothing was written.
        DemoModelError: ``out`` does not; nothing was written.
    """
    layout = layout_of(format, group_size, experts_only)
    config = _read_config(model, format)
    source = Source(model)
    shapes = source.shapes()
    _check(layout, shapes, model)
    if out.resolve() == model.resolve():
        raise QuantizeError(f"{out} is MODEL itself; OUT must be another directory")
    check_target(out, 0, force)
    out.mkdir(parents=True, exist_ok=True)
    clear_checkpoint(out)
    _copy_others(model, out)
    shards = Shards(out, max_shard_bytes)
    for name, tensor in source.tensors():
        converts = layout.converts(name, shapes[name])
        shards.add(layout.tensors(name, tensor) if converts else {name: tensor})
    shards.finish()
    kept = [
        name.removesuffix(SUFFIX)
        for name, shape in shapes.items()
        if is_linear(name, shape) and not layout.converts(name, shape)
    ]
    # Last: a directory without config.json is not a checkpoint.
    write_json(out / "config.json", config | {"quantization_config": layout.config(kept)})


def _read_config(model: Path, format: str) -> dict[str, Any]:
    path = model / "config.json"
    if not path.is_file():
        raise QuantizeError(f"{model} has no config.json; MODEL must be a checkpoint")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise QuantizeError(f"{model} is quantised already; MODEL must not be")
    kind = config["model_type"]
    if (format == "mxfp4") != (kind == FUSED_MODEL):
        raise QuantizeError(
            f"{model} is a {kind} model and format is {format!r}; mxfp4 is for "
            f"{FUSED_MODEL}, and the others are for all other models"
        )
    return config


def _check(layout: Layout, shapes: Mapping[str, Sizes], model: Path) -> None:
    """Before anything is written: there is something to quantise, and all of it can be."""
    chosen = {name: shape for name, shape in shapes.items() if layout.converts(name, shape)}
    if not chosen:
        raise QuantizeError(f"{model} has no tensors that this format quantises")
    for name, shape in chosen.items():
        layout.check(name, shape)


def _copy_others(model: Path, out: Path) -> None:
    """Copies the tokenizer and all other files that are neither weights nor config."""
    for path in model.iterdir():
        weights = path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json")
        if path.is_file() and not weights and path.name != "config.json":
            shutil.copyfile(path, out / path.name)
