"""What a store was built from: two stores are interchangeable exactly if this is equal."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from vllm_moe_offload.rank import Rank
from vllm_moe_offload.store.errors import StoreError

FORMAT_VERSION = 2
"""Raised whenever records or manifest change in a way that older code would misread."""

_SAMPLE_BYTES = 4096
_SAMPLE_STRIDE_BYTES = 4 << 20
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_SAMPLING_THREADS = 8


class StoreIdentity(BaseModel):
    """Everything that the bytes of a store depend on.

    Attributes:
        checkpoint: :func:`checkpoint_fingerprint` of the model.
        load_format: vLLM's load format (``dummy`` weights are not the checkpoint's).
        dtype: element type of the weights, without ``torch.``.
        quantization: name of the quantisation, ``none`` without.
        kernel: class of the experts' kernel and the instruction set it packs for; records
            hold bytes in that kernel's form.
        padded_shape: sizes of the weights after padding.
        rank: which part of the model this is; of it only the sizes are part of :attr:`key`, parts
            of one model lie beside each other.
        stages: first decoder layer of every pipeline stage; of a drafter, whose layers are numbered
            behind the model's, the number of its first one.
        expert_placement: vLLM's rule that says which experts a rank has.
        vllm_version: version that packed the weights.
        format_version: of the store's files.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str
    load_format: str
    dtype: str
    quantization: str
    kernel: str
    padded_shape: tuple[int, ...]
    rank: Rank
    stages: Annotated[tuple[int, ...], Field(min_length=1)]
    expert_placement: str
    vllm_version: str
    format_version: int = FORMAT_VERSION

    @property
    def is_drafter(self) -> bool:
        """Whether these are experts of what drafts for a model, not the model's."""
        return self.stages[0] > 0

    @property
    def key(self) -> str:
        """Hex digest of all fields, the same for all ranks of a server."""
        text = self.model_dump_json(exclude={"rank": {"pp", "tp", "ep"}})
        return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()

    def directory(self, store_dir: Path, model: str) -> Path:
        """``<store_dir>/<model>-<key>/<rank's name>``; ``model`` is for people to read."""
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name).strip("-.")[:64] or "model"
        return store_dir / f"{name}-{self.key[:16]}" / self.rank.name

    def differences(self, other: StoreIdentity) -> list[str]:
        """``field: own value, not other's value`` for every field that differs."""
        mine, theirs = self.model_dump(), other.model_dump()
        return [
            f"{name}: {value!r}, not {theirs[name]!r}"
            for name, value in mine.items()
            if value != theirs[name]
        ]


def checkpoint_fingerprint(model_dir: Path) -> str:
    """Hex digest that tells checkpoints apart without reading all their bytes.

    Covers ``config.json`` and, of every ``*.safetensors`` file, name, size, header and
    4 KiB of content every 4 MiB and at the end (0.1 % of the file: two samples or so in
    every expert). Times are left out, so a copied or freshly downloaded model keeps its
    fingerprint and its store; weights changed in place get a new one, unless the change
    spares every sample: after editing a few elements by hand, delete the store.

    Raises:
        StoreError: not a directory, without ``config.json``, or a file cannot be read.
    """
    if not model_dir.is_dir():
        raise StoreError(
            f"{model_dir} is not a directory: the expert store is keyed by the checkpoint's "
            "files; pass the local path of the model"
        )
    digest = hashlib.blake2b(digest_size=32)
    files = sorted(path for path in model_dir.glob("*.safetensors") if path.is_file())
    try:
        _feed(digest, (model_dir / "config.json").read_bytes())
        with ThreadPoolExecutor(_SAMPLING_THREADS) as pool:
            for path, content in zip(files, pool.map(_file_fingerprint, files), strict=True):
                _feed(digest, os.fsencode(path.name))
                _feed(digest, content)
    except OSError as error:
        raise StoreError(
            f"cannot fingerprint the checkpoint in {model_dir}: {error}; check that the model "
            "is complete and readable"
        ) from error
    return digest.hexdigest()


def _feed(digest: hashlib.blake2b, data: bytes) -> None:
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)


def _file_fingerprint(path: Path) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        digest.update(size.to_bytes(8, "little"))
        # Without this every sample would read 128 KiB ahead.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        for offset, length in _samples(descriptor, size):
            _feed(digest, os.pread(descriptor, length, offset))
    finally:
        os.close(descriptor)
    return digest.digest()


def _samples(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the parts of a safetensors file that enter its fingerprint."""
    header_bytes = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    yield 0, min(8 + header_bytes, size, _MAX_HEADER_BYTES)
    for offset in range(0, size, _SAMPLE_STRIDE_BYTES):
        yield offset, _SAMPLE_BYTES
    yield max(0, size - _SAMPLE_BYTES), _SAMPLE_BYTES
