"""A finished store: opening it, and where its records lie."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from vllm_moe_offload.cache.layout import ExpertLayout, TensorSpec
from vllm_moe_offload.store.errors import DamagedStore
from vllm_moe_offload.store.identity import FORMAT_VERSION, StoreIdentity
from vllm_moe_offload.store.own_files import check_owner, check_writers, read_regular

MANIFEST_NAME = "manifest.json"
EXPERTS_NAME = "experts.bin"
CONDEMNED_NAME = "condemned.txt"
"""Lies beside them once a record was read that is not what was written; says which."""

_MANIFEST_BYTES = 64 << 20
"""What is read of a manifest; one takes 24 bytes a record."""
_CONDEMNED_BYTES = 4096

logger = logging.getLogger("vllm.moe_offload")


class Manifest(BaseModel):
    """``manifest.json``: what the store holds and what it was built from.

    Attributes:
        format: tells the file from any other JSON.
        format_version: :data:`FORMAT_VERSION` of the code that wrote it.
        identity: what the store was built from.
        layout: tensors of one expert.
        num_layers, num_experts: MoE layers, and routed experts in each.
        file_bytes: size of ``experts.bin``.
        checksums: xxh3_64 of every record ``[num_layers][num_experts]``, 16 hex digits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal["vllm-moe-offload expert store"] = "vllm-moe-offload expert store"
    format_version: int = FORMAT_VERSION
    identity: StoreIdentity
    layout: tuple[TensorSpec, ...]
    num_layers: PositiveInt
    num_experts: PositiveInt
    file_bytes: PositiveInt
    checksums: tuple[tuple[Annotated[str, Field(pattern="^[0-9a-f]{16}$")], ...], ...]


class _ManifestVersion(BaseModel):
    format_version: int


@dataclass(frozen=True)
class ExpertStore:
    """An opened store. Holds no file open; the reads are the transfer engine's.

    Attributes:
        directory: holds ``experts.bin`` and ``manifest.json``.
        identity: what it was built from.
        layout: tensors of one expert and their place in a record.
        num_layers: MoE layers.
        num_experts: routed experts per layer.
        checksums: xxh3_64 of every record ``[num_layers][num_experts]``.
        joins: the stores that this one is made of (:func:`joined`); empty: it is one of its own.
    """

    directory: Path
    identity: StoreIdentity
    layout: ExpertLayout
    num_layers: int
    num_experts: int
    checksums: tuple[tuple[int, ...], ...]
    joins: tuple[ExpertStore, ...] = ()

    @cached_property
    def path(self) -> Path:
        """The file of all records, or the first one's of several stores."""
        return self.directory / EXPERTS_NAME

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """The files of all records, one behind the other."""
        return tuple(store.path for store in self.joins) or (self.path,)

    @cached_property
    def file_bytes(self) -> int:
        """Size of the files of all records."""
        return self.num_layers * self.num_experts * self._record_bytes

    @cached_property
    def _record_bytes(self) -> int:
        return self.layout.record_bytes

    def record_offset(self, layer: int, expert: int) -> int:
        """Bytes before the record of ``(layer, expert)`` in all files; a multiple of 4 KiB.

        Raises:
            IndexError: there is no such layer or expert.
        """
        if not (0 <= layer < self.num_layers and 0 <= expert < self.num_experts):
            raise IndexError(
                f"expert {expert} of layer {layer} is not in {self.path}, which holds "
                f"{self.num_layers} layers of {self.num_experts} experts"
            )
        return (layer * self.num_experts + expert) * self._record_bytes

    def checksum(self, layer: int, expert: int) -> int:
        """xxh3_64 of the record, padding included."""
        return self.checksums[layer][expert]

    def store_of(self, layer: int) -> tuple[ExpertStore, int]:
        """The store that has the records of ``layer``, and the layer's number there."""
        for store in self.joins:
            if layer < store.num_layers:
                return store, layer
            layer -= store.num_layers
        return self, layer

    def condemn(self, layer: int, expert: int, reason: str) -> None:
        """Has the next start build the store again, because a record is damaged: that of an expert.

        ``reason``: one line. Where it cannot be noted that is logged: the caller has an error
        to raise that matters more.
        """
        store, layer = self.store_of(layer)
        if store is not self:
            store.condemn(layer, expert, reason)
            return
        path = self.directory / CONDEMNED_NAME
        try:
            _write_note(path, f"expert {expert} of layer {layer}: {reason}\n")
        except OSError as error:
            logger.warning(
                "MoE offload: cannot note in %s that the store is damaged: %s; delete that "
                "directory to have the store built again",
                self.directory,
                error,
            )


def _write_note(path: Path, text: str) -> None:
    """Writes a file of our own; what else lies there, or has another name as well, stays."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "w") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise OSError(f"{path} is not a file of its own")
        file.truncate()
        file.write(text)


def joined(*stores: ExpertStore) -> ExpertStore:
    """Several stores as one: the layers of the first, then those of the next.

    Raises:
        ValueError: they hold experts of different form, or different numbers per layer.
    """
    first = stores[0]
    if len(stores) == 1:
        return first
    for store in stores[1:]:
        if (store.layout, store.num_experts) != (first.layout, first.num_experts):
            raise ValueError(f"{store.path} and {first.path} hold experts of different form")
    return replace(
        first,
        num_layers=sum(store.num_layers for store in stores),
        checksums=tuple(row for store in stores for row in store.checksums),
        joins=stores,
    )


def open_store(
    directory: Path,
    identity: StoreIdentity | None,
    layout: ExpertLayout | None = None,
    *,
    num_layers: int | None = None,
    num_experts: int | None = None,
) -> ExpertStore | None:
    """The store in ``directory``; None if there is none yet.

    Args:
        directory: :meth:`StoreIdentity.directory`.
        identity: what the store must have been built from; None accepts any, for tools
            that look at a store without serving from it.
        layout: what the experts must look like, if the caller knows.
        num_layers, num_experts: what it must hold, likewise. They are no part of the identity,
            and ``--hf-overrides`` changes them without changing the checkpoint.

    Raises:
        DamagedStore: there is one, but cut, changed, condemned, or of something else.
        StoreError: it is another user's, or every user may write to it.
    """
    if not os.path.lexists(directory):
        return None
    path = directory / MANIFEST_NAME
    _check_own(directory)
    _check_condemned(directory / CONDEMNED_NAME)
    manifest = _read_manifest(path)
    if identity is not None and identity != manifest.identity:
        raise DamagedStore(
            f"{path} is of another model or build "
            f"({'; '.join(manifest.identity.differences(identity))})"
        )
    store = _store_of(directory, manifest)
    for name, wanted, found in (
        ("layers", num_layers, store.num_layers),
        ("experts per layer", num_experts, store.num_experts),
    ):
        if wanted not in (None, found):
            raise DamagedStore(f"{path} is of a model with {found} {name}, not {wanted}")
    if layout is not None and layout != store.layout:
        raise DamagedStore(f"{path}: its experts hold {store.layout}, not {layout}")
    _check_file(store)
    return store


def _check_own(directory: Path) -> None:
    """Raises unless what is there of a store is what it should be, and ours."""
    is_kind: Callable[[int], bool]
    for path, kind, is_kind in (
        (directory.parent, "a directory", stat.S_ISDIR),
        (directory, "a directory", stat.S_ISDIR),
        (directory / MANIFEST_NAME, "a regular file", stat.S_ISREG),
        (directory / EXPERTS_NAME, "a regular file", stat.S_ISREG),
    ):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # whoever reads it says so
        check_owner(path, status, directory.parent.parent)
        if not is_kind(status.st_mode):
            raise DamagedStore(f"{path} is not {kind}; links are not followed")
        check_writers(path, status, directory.parent)


def _check_condemned(path: Path) -> None:
    if not os.path.lexists(path):
        return
    try:
        text = read_regular(path, _CONDEMNED_BYTES).decode(errors="replace")
        reason = text.partition("\n")[0].strip()
    except OSError as error:  # that it is there says enough
        reason = str(error)
    raise DamagedStore(f"{path.parent} holds a damaged record: {reason}")


def _read_manifest(path: Path) -> Manifest:
    try:
        text = read_regular(path, _MANIFEST_BYTES)
    except OSError as error:
        raise DamagedStore(f"cannot read {path}: {error}") from error
    try:
        # First of all: the fields of another version may be others.
        version = _ManifestVersion.model_validate_json(text, strict=True).format_version
        if version == FORMAT_VERSION:
            return Manifest.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise DamagedStore(
            f"{path} is not a valid manifest ({where}: {first['msg']})"
        ) from error
    raise DamagedStore(f"{path} has format version {version}, this code reads {FORMAT_VERSION}")


def _store_of(directory: Path, manifest: Manifest) -> ExpertStore:
    path = directory / MANIFEST_NAME
    try:
        layout = ExpertLayout(manifest.layout)
    except ValueError as error:
        raise DamagedStore(f"{path} is not valid ({error})") from error
    checksums = tuple(tuple(int(c, 16) for c in row) for row in manifest.checksums)
    rows = len(checksums), *{len(row) for row in checksums}
    if rows != (manifest.num_layers, manifest.num_experts):
        raise DamagedStore(
            f"{path} does not list checksums of {manifest.num_layers} x "
            f"{manifest.num_experts} records"
        )
    store = ExpertStore(
        directory,
        manifest.identity,
        layout,
        manifest.num_layers,
        manifest.num_experts,
        checksums,
    )
    if store.file_bytes != manifest.file_bytes:
        raise DamagedStore(
            f"{path} says {manifest.file_bytes} bytes, but its layout needs {store.file_bytes}"
        )
    return store


def _check_file(store: ExpertStore) -> None:
    try:
        size = store.path.lstat().st_size
    except OSError as error:
        raise DamagedStore(f"cannot read {store.path}: {error}") from error
    if size != store.file_bytes:
        raise DamagedStore(f"{store.path} has {size} bytes instead of {store.file_bytes}")
