"""What can be known of a start before a process is started: paths, checkpoint, sizes, disk room.

The worker finds the same out later, when the model is half loaded; messages are made in one place
each, and these checks only ask there earlier. What depends on the machine's memory at that
time (``cache_gb="auto"``), on the kernel or on files that are not downloaded yet is left to
the worker.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.distributed.utils import get_pp_indices

from vllm_moe_offload.cache.sizing import cache_slots, host_slots
from vllm_moe_offload.config import (
    KEEP_NOTHING,
    OffloadConfig,
    OptionError,
    parse_cache_size,
)
from vllm_moe_offload.integration import patching, recording
from vllm_moe_offload.integration.model_files import (
    CONFIG,
    check_dtype,
    files_here,
    is_directory,
    model_name,
    no_safetensors,
)
from vllm_moe_offload.plan.problems import model_problems
from vllm_moe_offload.plan.shapes import (
    ModelShape,
    ShapeError,
    kernel_form,
    refusals,
    shape_of_config,
)
from vllm_moe_offload.plan.shapes.checkpoint import (
    checkpoint_tensors,
    count_checkpoint,
    read_config,
)
from vllm_moe_offload.plan.shapes.kernel_form import Platform
from vllm_moe_offload.plan.split import Split, rank_shape
from vllm_moe_offload.rank import Rank
from vllm_moe_offload.store.checkpoint_header import TensorRange
from vllm_moe_offload.store.checkpoint_reader import expert_layer
from vllm_moe_offload.store.directory import prepare_directory
from vllm_moe_offload.store.errors import StoreError
from vllm_moe_offload.store.identity import checkpoint_fingerprint
from vllm_moe_offload.store.room import check_room
from vllm_moe_offload.store.shelf import ShelvedModel, shelved_models

Tensors = Sequence[tuple[str, TensorRange]]


def check(vllm_config: Any, options: OffloadConfig) -> None:
    """Checks a configuration that :mod:`supported` lets pass.

    Raises:
        OptionError: an option, or the model it names, cannot be served; says why.
    """
    check_paths(options)
    recording.check(vllm_config, options)
    directory = files_here(vllm_config)
    if directory is None:
        return
    tensors = _tensors(vllm_config, directory)
    shape = _shape(vllm_config, directory, tensors)
    if shape is None:
        return
    parts = _parts(vllm_config, shape)
    if any(_is_left_to_the_worker(part) for part in parts.values()):
        return
    _check_sizes(vllm_config, options, parts)
    _check_room(vllm_config, options, directory, parts)


def check_paths(options: OffloadConfig) -> None:
    """Raises OptionError unless there is a directory for every file that will be written."""
    store_dir = Path(options.store_dir)
    try:
        prepare_directory(store_dir, store_dir)
    except StoreError as error:
        raise OptionError(str(error)) from None
    for name in ("trace_path", "record_trace"):
        path = getattr(options, name)
        if path in (None, KEEP_NOTHING):
            continue
        parent = Path(path).absolute().parent
        if not parent.is_dir():
            reason = f"there is no directory {parent}"
        elif not os.access(parent, os.W_OK | os.X_OK):
            reason = f"{parent} is not writable"
        else:
            continue
        raise OptionError(f"moe-offload: {name}={path!r} is not possible: {reason}")


def _tensors(vllm_config: Any, directory: Path) -> Tensors:
    """Of the checkpoint's files; none where they are not read, or not downloaded yet."""
    load_format = vllm_config.load_config.load_format
    if getattr(load_format, "value", load_format) == "dummy":
        return ()
    is_local = is_directory(vllm_config.model_config)
    if not any(directory.glob("*.safetensors")):
        if is_local:
            raise no_safetensors(directory)
        return ()
    try:
        tensors = list(checkpoint_tensors(directory))
    except ShapeError as error:
        if is_local:
            raise OptionError(str(error)) from None
        return ()  # vLLM downloads the rest
    except (OSError, ValueError) as error:
        raise OptionError(str(error)) from None
    for name, where in tensors:
        if expert_layer(name) is not None:
            check_dtype(name, where)
    return tensors


def _shape(vllm_config: Any, directory: Path, tensors: Tensors) -> ModelShape | None:
    """The model's sizes; None for an unknown architecture, and for quantised experts that ``plan``
    does not know how to serve: vLLM may, and the worker says so if not.
    """
    path = directory / CONFIG
    try:
        shape = shape_of_config(read_config(path), str(path))
        shape = count_checkpoint(directory, shape, tensors).shape
    except (OSError, ShapeError):
        return None  # what `plan` cannot count may be served all the same
    if _is_left_to_the_worker(shape):
        return None
    if tensors:
        for problem in model_problems(shape):
            raise OptionError(f"{problem.text}: {problem.remedy}")
    return shape


def _is_left_to_the_worker(shape: ModelShape) -> bool:
    """Whether experts are quantised to what ``plan`` does not know how to serve."""
    return shape.is_quantized and (
        shape.format is None or any(refusals(shape.format, _platform(), shape.expert))
    )


def _platform() -> Platform:
    from vllm.platforms import current_platform

    return "cuda" if current_platform.is_cuda() else "cpu"


def _split(parallel: Any) -> Split:
    """How the server's ranks share the model."""
    ranks: int = parallel.tensor_parallel_size
    return Split(
        tensor_parallel=ranks,
        pipeline_parallel=parallel.pipeline_parallel_size,
        has_expert_parallel=bool(parallel.enable_expert_parallel) and ranks > 1,
    )


def _parts(vllm_config: Any, shape: ModelShape) -> dict[Rank, ModelShape]:
    """What each rank has of the model, by its place; ranks without experts are left out."""
    split = _split(vllm_config.parallel_config)
    stages = split.pipeline_parallel
    parts = {}
    for number in range(split.num_ranks):
        stage = split.stage(number)
        layers = None
        if envs.VLLM_PP_LAYER_PARTITION is not None:
            layers = range(*get_pp_indices(shape.num_layers, stage, stages))
        part = rank_shape(shape, split, number, layers)
        if part.total_experts:
            rank = Rank(
                pp=stage,
                pp_size=stages,
                tp=number % split.expert_slices,
                tp_size=split.expert_slices,
                ep=number % split.expert_ranks,
                ep_size=split.expert_ranks,
            )
            parts[rank] = part
    return parts


def _bytes(vllm_config: Any, part: ModelShape) -> tuple[int, int]:
    """Of one expert and of its record, as a rank has it."""
    if part.is_quantized and part.format is not None:
        layout = kernel_form(part.format, _platform(), part.expert)
        return layout.expert_bytes, layout.record_bytes
    element_bytes: int = vllm_config.model_config.dtype.itemsize
    expert_bytes = part.expert.parameters * element_bytes
    return expert_bytes, expert_bytes


def _check_sizes(
    vllm_config: Any, options: OffloadConfig, parts: Mapping[Rank, ModelShape]
) -> None:
    """Kernels may pad experts, so what just fits here may still be refused by the worker."""
    for part in dict.fromkeys(parts.values()):
        sizes = {"num_layers": len(part.moe_layers), "num_experts": part.num_experts}
        expert_bytes, record_bytes = _bytes(vllm_config, part)
        if parse_cache_size(options.cache_gb)[0] != "auto":
            cache_slots(
                options.cache_gb,
                expert_bytes=expert_bytes,
                top_k=part.top_k,
                auto_bytes=0,
                **sizes,
            )
        if _platform() == "cuda" and parse_cache_size(options.host_gb)[0] != "auto":
            host_slots(options.host_gb, record_bytes=record_bytes, auto_bytes=0, **sizes)


def _parts_here(
    parallel: Any, parts: Mapping[Rank, ModelShape]
) -> Mapping[Rank, ModelShape] | None:
    """Those of workers on this machine; None if only Ray knows where they will run."""
    if parallel.use_ray:
        return None
    split = replace(_split(parallel), nodes=parallel.nnodes)
    here = split.ranks_of_node(parallel.node_rank)
    return {rank: part for rank, part in parts.items() if _number(rank) in here}


def _number(rank: Rank) -> int:
    """Of a rank in the server, as :class:`Split` counts."""
    return rank.pp * rank.tp_size * rank.ep_size + rank.tp + rank.ep


def _check_room(
    vllm_config: Any,
    options: OffloadConfig,
    directory: Path,
    parts: Mapping[Rank, ModelShape],
) -> None:
    """Raises OptionError if the disk has no room for the stores that are to be built here."""
    here = _parts_here(vllm_config.parallel_config, parts)
    if not here:
        return
    store_bytes = sum(
        part.total_experts * _bytes(vllm_config, part)[1] for part in here.values()
    )
    store_dir = Path(options.store_dir)
    place = store_dir / model_name(str(vllm_config.model_config.model))
    try:
        check_room(place, store_bytes, store_dir)
    except StoreError:
        stores = [
            shelved for shelved in shelved_models(store_dir) if shelved.model == place.name
        ]
        if any(_is_built(here, directory, shelved) for shelved in stores):
            return
        unfinished = sum(shelved.nbytes for shelved in stores if shelved.is_leftover)
        try:
            check_room(place, store_bytes, store_dir, unfinished)
        except StoreError as error:
            raise OptionError(str(error)) from None


def _is_built(here: Mapping[Rank, ModelShape], directory: Path, shelved: ShelvedModel) -> bool:
    """Whether a start will probably open this store: its kernel is not known yet."""
    fitting = {
        part.identity.rank
        for part in shelved.parts
        if part.identity.vllm_version == patching.vllm_version()
    }
    return (
        not shelved.faults
        and here.keys() <= fitting
        and shelved.parts[0].identity.checkpoint == checkpoint_fingerprint(directory)
    )
