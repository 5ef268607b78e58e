"""Reading a checkpoint tensor by tensor, and writing one shard by shard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from scripts.demo_model.write import write_json
from scripts.quantize.layout import Sizes


class Source:
    """The safetensors files of a checkpoint; tensors are read when they are asked for."""

    def __init__(self, model: Path) -> None:
        self._files = sorted(model.glob("*.safetensors"))

    def shapes(self) -> dict[str, Sizes]:
        """Shape of every tensor, by name."""
        found: dict[str, Sizes] = {}
        for path in self._files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    found[name] = tuple(file.get_slice(name).get_shape())
        return found

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name, one at a time."""
        for path in self._files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name)


class Shards:
    """Safetensors files of at most ``max_bytes``, and their index; one is in memory at a time."""

    def __init__(self, out: Path, max_bytes: int) -> None:
        self._out, self._max_bytes = out, max_bytes
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = self._total_bytes = 0
        self._written: list[list[str]] = []

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Adds tensors that shall lie in one file."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._waiting and self._waiting_bytes + size > self._max_bytes:
            self._write()
        self._waiting |= tensors
        self._waiting_bytes += size
        self._total_bytes += size

    def finish(self) -> None:
        """Writes what is left, and the index."""
        self._write()
        location: dict[str, str] = {}
        for number, names in enumerate(self._written, start=1):
            file_name = f"model-{number:05d}-of-{len(self._written):05d}.safetensors"
            self._part(number).rename(self._out / file_name)
            location |= dict.fromkeys(names, file_name)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": location}
        write_json(self._out / "model.safetensors.index.json", index)

    def _part(self, number: int) -> Path:
        """A shard while it is not known how many there will be."""
        return self._out / f"model-{number:05d}.part"

    def _write(self) -> None:
        self._written.append(list(self._waiting))
        save_file(self._waiting, self._part(len(self._written)), metadata={"format": "pt"})
        self._waiting = {}
        self._waiting_bytes = 0
