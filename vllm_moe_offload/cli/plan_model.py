"""What MODEL stands for: a directory, a config.json, or a name of the table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllm_moe_offload.cli.command import UsageError
from vllm_moe_offload.plan.shapes import ModelShape, known_models, shape_of_config
from vllm_moe_offload.plan.shapes.known import find_known


@dataclass(frozen=True, slots=True)
class Model:
    """What MODEL stands for.

    Attributes:
        name: as shown.
        source: where its sizes are from.
        shape: its sizes.
        is_counted: whether they are from the weights' files.
        path: directory to serve.
        download: command that fetches it there; None if it is a local one.
        has_weights: whether they are there already.
    """

    name: str
    source: str
    shape: ModelShape
    is_counted: bool
    path: str
    download: str | None
    has_weights: bool


def find_model(text: str) -> Model:
    """What MODEL on a command line stands for.

    Raises:
        UsageError: nothing that is known.
        ShapeError: its config.json or its files cannot be understood.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        return _local_checkpoint(path)
    if path.is_file():
        from vllm_moe_offload.plan.shapes.checkpoint import read_config

        shape = shape_of_config(read_config(path), str(path))
        return Model(text, str(path), shape, False, str(path.parent), None, False)
    known = find_known(text)
    if known is None:
        raise UsageError(
            f"MODEL={text}: neither a directory, nor a config.json, nor one of "
            f"{', '.join(known_models())}"
        )
    shape = shape_of_config(known.config, known.source)
    directory = known.model_id.rpartition("/")[2]
    copies = "*/*" if shape.model_type == "gpt_oss" else "*.pt"  # of all weights, for others
    download = f"hf download {known.model_id} --local-dir {directory} --exclude '{copies}'"
    return Model(known.name, known.source, shape, False, f"./{directory}", download, False)


def _local_checkpoint(path: Path) -> Model:
    from vllm_moe_offload.plan.shapes.checkpoint import (
        read_checkpoint,  # torch, which takes a while
    )

    found = read_checkpoint(path)
    if found.is_counted:
        source = f"headers of the safetensors files in {path}"
    else:
        source = str(path / "config.json")
    has_weights = found.file_bytes > 0
    return Model(str(path), source, found.shape, found.is_counted, str(path), None, has_weights)
