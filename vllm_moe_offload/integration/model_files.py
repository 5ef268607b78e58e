"""Where a model's files lie, and what they must be: a directory, or a snapshot of the hub's cache,
as vLLM finds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache

from vllm_moe_offload.config import OptionError
from vllm_moe_offload.store.checkpoint_header import TensorRange
from vllm_moe_offload.store.checkpoint_reader import DTYPES

CONFIG = "config.json"


def is_directory(model_config: Any) -> bool:
    """Whether the model is given as a directory; else it is a hub's name for it.

    With ``HF_HUB_OFFLINE`` vLLM replaces names by the cache's directories.
    """
    return Path(model_config.model).is_dir()


def files_here(vllm_config: Any) -> Path | None:
    """The directory of the model's files as far as they are on this machine; None if none is.

    Asks no hub: of a name this is the snapshot that the cache has of its revision.
    """
    model = vllm_config.model_config
    if is_directory(model):
        return Path(model.model)
    found = try_to_load_from_cache(
        model.model,
        CONFIG,
        cache_dir=vllm_config.load_config.download_dir,
        revision=model.revision,
    )
    return Path(found).parent if isinstance(found, str) else None


def with_config(vllm_config: Any, model: Any, weights: Path | None = None) -> Path:
    """The directory of a model's files, its config.json among them.

    vLLM downloads weights to ``download_dir`` and the config.json to the hub's own cache.

    Args:
        vllm_config: the server's.
        model: the ModelConfig, of the server's model or of its drafter.
        weights: where its weights are; None if none are used.
    """
    directory = Path(model.model) if weights is None else weights
    if is_directory(model) or (directory / CONFIG).is_file():
        return directory
    found = hf_hub_download(
        model.model,
        CONFIG,
        cache_dir=vllm_config.load_config.download_dir,
        revision=model.revision,
    )
    return Path(found).parent if weights is None else weights


def model_name(model: str) -> str:
    """What people call a model: the same for a hub's name and for the cache's directory of it."""
    path = Path(model)
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return path.name


def no_safetensors(folder: Path | str) -> OptionError:
    """What is raised where there are none."""
    return OptionError(
        f"--moe-offload: {folder} holds no safetensors files; convert the checkpoint "
        "(pickled weights are neither safe nor seekable)"
    )


def check_dtype(name: str, where: TensorRange) -> None:
    """Raises OptionError unless a routed expert's tensor is of a type that can be offloaded."""
    if where.dtype not in DTYPES:
        raise OptionError(
            f"--moe-offload: {name} in {where.path} is {where.dtype}; experts must be one of "
            f"{', '.join(DTYPES)}. Use --moe-offload=off"
        )
