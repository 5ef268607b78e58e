"""Writing a checkpoint: tokenizer, weights shard by shard, config last."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from scripts.demo_model.architectures import ARCHS, MAX_POSITIONS, DemoModelError, Shape
from scripts.demo_model.checkpoint import Checkpoint
from scripts.demo_model.config import config_of
from scripts.demo_model.seeded import generator
from scripts.demo_model.sizes import resolve_shape
from scripts.demo_model.tokenizer import CHAT_TEMPLATE, END, PAD, SPECIALS, train_tokenizer
from scripts.demo_model.weights import Weight

MAX_SHARD_BYTES = 1_000_000_000


def shards(weights: Sequence[Weight], max_bytes: int) -> list[list[Weight]]:
    """Split ``weights``, in order, into shards of at most ``max_bytes`` each.

    A tensor bigger than that gets a shard of its own.
    """
    groups: list[list[Weight]] = [[]]
    used = 0
    for weight in weights:
        if groups[-1] and used + weight.nbytes > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(weight)
        used += weight.nbytes
    return groups


def write_json(path: Path, data: object) -> None:
    """Write ``data`` as the Hugging Face hub's files are written."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def check_target(
    out: Path, needed: int, force: bool, smaller: str = "ask for less with --experts-gb"
) -> None:
    """Refuse an ``out`` that is a file, holds files, or has fewer than ``needed`` bytes.

    ``smaller`` tells the user how to need less.
    """
    if out.exists() and not out.is_dir():
        raise DemoModelError(f"{out} is a file; OUT must be a directory")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise DemoModelError(f"{out} is not empty; choose another directory or pass --force")
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DemoModelError(
            f"{existing} has {free / 1e9:.2f} GB free and the checkpoint needs "
            f"{needed / 1e9:.2f} GB; free some space or {smaller}"
        )


def clear_checkpoint(out: Path) -> None:
    """Remove an earlier checkpoint's files, config first: a torn rewrite must not load."""
    (out / "config.json").unlink(missing_ok=True)
    for path in (*out.glob("model-*-of-*.safetensors"), out / "model.safetensors.index.json"):
        path.unlink(missing_ok=True)


def write_tokenizer(out: Path, tokenizer: Tokenizer, max_positions: int) -> None:
    """The tokenizer's files, and the chat template."""
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": list(SPECIALS[2:]),
        "clean_up_tokenization_spaces": False,
    }
    write_json(out / "tokenizer_config.json", settings)
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def write_shards(
    out: Path, weights: Sequence[Weight], seed: int, max_bytes: int, progress: bool
) -> None:
    """Make and write the tensors shard by shard; only one shard is in memory at a time."""
    groups = shards(weights, max_bytes)
    total = sum(weight.nbytes for weight in weights)
    location: dict[str, str] = {}
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="weights", disable=not progress
    ) as bar:
        for number, group in enumerate(groups, start=1):
            file_name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            tensors: dict[str, Tensor] = {}
            for weight in group:
                made = weight.make(generator(seed, weight.name)).to(torch.bfloat16)
                if made.shape != weight.shape:
                    raise AssertionError(f"{weight.name}: {made.shape} != {weight.shape}")
                tensors[weight.name] = made.contiguous()
                location[weight.name] = file_name
                bar.update(weight.nbytes)
            save_file(tensors, out / file_name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": location}
    write_json(out / "model.safetensors.index.json", index)


def _check_choices(arch: str, max_positions: int, shared_noise: bool) -> None:
    """Refuse what an architecture cannot have; sizes are checked with the shape."""
    if arch not in ARCHS:
        raise DemoModelError(f"arch is {arch!r}; known are {', '.join(ARCHS)}")
    if max_positions != MAX_POSITIONS and arch in ("deepseek_v2", "gpt_oss"):
        raise DemoModelError(
            f"max_positions is {max_positions}; {arch} models are written with {MAX_POSITIONS}"
        )
    if shared_noise and arch == "gpt_oss":
        raise DemoModelError("shared_noise is not possible for gpt_oss: its experts are fused")


def write_demo_model(
    out: Path,
    arch: str,
    *,
    layers: int | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    hidden: int | None = None,
    intermediate: int | None = None,
    experts_gb: float | None = None,
    seed: int = 0,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    max_positions: int = MAX_POSITIONS,
    shared_noise: bool = False,
    progress: bool = False,
) -> Shape:
    """Write a demo checkpoint to the directory ``out`` and return its shape.

    Sizes left out come from ``experts_gb`` (1e9 bytes of expert weights) or the
    architecture's default. The same arguments give the same bytes.

    With ``shared_noise`` experts are windows of one block of random numbers instead of
    having their own: as different in effect, and written as fast as the disk takes them.
    ``max_positions`` can be changed where positions are rotated plainly.

    Raises:
        DemoModelError: the arguments, ``out`` or the free disk space do not allow it;
            nothing was written.
    """
    _check_choices(arch, max_positions, shared_noise)
    flags = {
        "layers": layers,
        "experts": experts,
        "top_k": top_k,
        "hidden": hidden,
        "intermediate": intermediate,
    }
    shape = resolve_shape(arch, experts_gb, flags)
    tokenizer = train_tokenizer(seed)
    checkpoint = Checkpoint(
        arch, shape, seed, tokenizer, max_positions=max_positions, shared_noise=shared_noise
    )
    weights = list(checkpoint.weights())
    total = sum(weight.nbytes for weight in weights)
    check_target(out, total + 16_000_000, force)
    out.mkdir(parents=True, exist_ok=True)
    clear_checkpoint(out)
    write_tokenizer(out, tokenizer, max_positions)
    write_shards(out, weights, seed, max_shard_bytes, progress)
    end = {"eos_token_id": checkpoint.vocabulary.end, "pad_token_id": checkpoint.pad}
    write_json(out / "generation_config.json", {"do_sample": True, **end})
    # Last: a directory without config.json is not a checkpoint.
    write_json(out / "config.json", config_of(checkpoint))
    return shape
