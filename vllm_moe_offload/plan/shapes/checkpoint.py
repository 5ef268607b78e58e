"""A local checkpoint's exact sizes, from the headers of its safetensors files."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_moe_offload.plan.shapes.base import SERVED_BYTES, ModelShape, ShapeError
from vllm_moe_offload.plan.shapes.config import shape_of_config
from vllm_moe_offload.store.checkpoint_header import TensorRange, tensor_ranges
from vllm_moe_offload.store.checkpoint_reader import DRAFTERS, expert_layer, layer_number

_INDEX = "model.safetensors.index.json"
_MOST_JSON_BYTES = 64 << 20
_UNQUANTISED = {"BF16", "F16", "F32"}
"""Element types whose elements are parameters."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory with a config.json.

    Attributes:
        shape: counted from the files' headers where there are files of experts that are served,
            else from config.json.
        is_counted: whether it was counted from the files.
        file_bytes: of all tensors in the files; 0 without files.
        expert_layers: decoder layers whose experts the files hold.
        expert_dtypes: element types of these, by safetensors' names.
    """

    shape: ModelShape
    is_counted: bool
    file_bytes: int
    expert_layers: tuple[int, ...]
    expert_dtypes: tuple[str, ...]


def read_config(path: Path) -> dict[str, Any]:
    """A config.json.

    Raises:
        ShapeError: it is not a JSON object.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size > _MOST_JSON_BYTES:
        raise ShapeError(f"{path} has {size} bytes, {_MOST_JSON_BYTES} at most are read")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ShapeError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ShapeError(f"{path} is not a config.json: it holds no JSON object")
    return config


def read_checkpoint(directory: Path) -> Checkpoint:
    """Sizes of the checkpoint in a directory; no tensor is read, no code is run.

    Raises:
        ShapeError: no config.json, or config and files contradict each other.
        OSError: a file cannot be read.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ShapeError(f"{directory} is no checkpoint: it has no config.json")
    shape = shape_of_config(read_config(path), str(path))
    return count_checkpoint(directory, shape, list(checkpoint_tensors(directory)))


def count_checkpoint(
    directory: Path, shape: ModelShape, tensors: Sequence[tuple[str, TensorRange]]
) -> Checkpoint:
    """What a checkpoint's tensors add to the shape that its config.json gives.

    Raises:
        ShapeError: they contradict each other.
    """
    if not tensors:
        return Checkpoint(shape, False, 0, (), ())
    layers: Counter[int] = Counter()
    dtypes = set()
    dense: list[tuple[str, TensorRange]] = []
    for name, where in tensors:
        if name.startswith(DRAFTERS):
            continue
        layer = expert_layer(name)
        if layer is not None:
            layers[layer] += math.prod(where.shape)
            dtypes.add(where.dtype)
        elif (layer_number(name) or 0) < shape.num_layers:
            dense.append((name, where))
    found = tuple(sorted(dtypes))
    if layers:
        shape = _with_dtypes(shape, directory, found)
    counted = shape.format is not None and bool(layers)
    if counted:
        shape = _recount(shape, directory, layers, dense)
    return Checkpoint(
        shape, counted, sum(where.nbytes for _, where in tensors), tuple(sorted(layers)), found
    )


def _with_dtypes(shape: ModelShape, directory: Path, dtypes: tuple[str, ...]) -> ModelShape:
    """The shape, where config.json and the experts' types agree on what they are."""
    is_packed = not set(dtypes) <= _UNQUANTISED
    if is_packed == shape.is_quantized:
        return shape
    if is_packed:
        refusal = f"tensors of {', '.join(dtypes)}, without a quantization_config"
        return replace(shape, format=None, refusal=refusal)
    raise ShapeError(
        f"{directory}: by config.json experts are quantised, the files hold experts of "
        f"{', '.join(dtypes)}"
    )


def checkpoint_tensors(directory: Path) -> Iterator[tuple[str, TensorRange]]:
    """All tensors of the files that the index names, or of all files without an index.

    Raises:
        ShapeError: the index is damaged, or files of it are missing.
        ValueError: a file is damaged, or no safetensors file.
        OSError: a file cannot be read.
    """
    index = directory / _INDEX
    files = sorted(directory.glob("*.safetensors"))
    if index.is_file():
        names = read_config(index).get("weight_map")
        if not isinstance(names, dict):
            raise ShapeError(f"{index} has no weight_map")
        wanted = {str(name) for name in names.values()}
        present = {path.name for path in files}
        if files and not wanted <= present:
            missing = sorted(wanted - present)
            raise ShapeError(
                f"{directory} is incomplete: {len(missing)} of {len(wanted)} files of {_INDEX} "
                f"are missing, such as {missing[0]}"
            )
        files = [path for path in files if path.name in wanted]
    for path in files:
        yield from tensor_ranges(path).items()


def _recount(
    shape: ModelShape,
    directory: Path,
    layers: Counter[int],
    dense: Sequence[tuple[str, TensorRange]],
) -> ModelShape:
    """The shape with what the files hold."""
    served = {layer: count for layer, count in layers.items() if layer < shape.num_layers}
    if tuple(sorted(served)) != shape.moe_layers:
        raise ShapeError(
            f"{directory}: by config.json layers {_listed(shape.moe_layers)} have experts, the "
            f"files hold experts of layers {_listed(sorted(served))}"
        )
    parameters = shape.dense_parameters
    if not shape.is_quantized:
        expected = shape.num_experts * shape.expert.parameters
        if set(served.values()) != {expected}:
            raise ShapeError(
                f"{directory}: {shape.num_experts} experts of {shape.expert.parameters:,} "
                f"parameters are {expected:,} elements a layer, the layers' expert tensors hold "
                f"{dict(sorted(served.items()))}"
            )
        parameters = sum(math.prod(where.shape) for _, where in dense)
    shape = _with_dense(
        shape, [(name, _served_bytes(where, shape.is_quantized)) for name, where in dense]
    )
    return replace(
        shape,
        dense_parameters=parameters,
        extra_expert_layers=tuple(sorted(layers.keys() - served.keys())),
    )


def _with_dense(shape: ModelShape, tensors: Sequence[tuple[str, int]]) -> ModelShape:
    """The shape with the bytes of dense tensors where they belong."""
    found: Counter[int | str] = Counter()
    for name, nbytes in tensors:
        found[_part(name)] += nbytes
    dense_bytes = found.total()
    layers = tuple(
        replace(
            layer,
            dense_bytes=found[index],
            whole_bytes=min(layer.whole_bytes, found[index]),
        )
        for index, layer in enumerate(shape.layers)
    )
    ends = replace(
        shape.ends,
        embedding_bytes=found["embedding"],
        head_bytes=found["head"],
        rest_bytes=found["rest"],
    )
    return replace(shape, dense_bytes=dense_bytes, layers=layers, ends=ends)


def _part(name: str) -> int | str:
    """The decoder layer that a dense tensor is in; or ``embedding``, ``head`` or ``rest``."""
    layer = layer_number(name)
    if layer is not None and "visual" not in name:
        return layer
    if "embed_tokens" in name:
        return "embedding"
    return "head" if name.startswith("lm_head") or ".lm_head." in name else "rest"


def _served_bytes(where: TensorRange, is_quantized: bool) -> int:
    """Of a dense tensor. vLLM casts weights in float32 down; scales stay what they are."""
    if where.dtype in _UNQUANTISED and not is_quantized:
        return math.prod(where.shape) * SERVED_BYTES
    return where.nbytes


def _listed(layers: Sequence[int]) -> str:
    if len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1:
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers)) or "none"
