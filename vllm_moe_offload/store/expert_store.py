"""A finished store: opening it, and where its records lie."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_moe_offload.cache.layout import ExpertLayout
from vllm_moe_offload.store.errors import DamagedStore, StoreError
from vllm_moe_offload.store.identity import FORMAT_VERSION, StoreIdentity

MANIFEST_NAME = "manifest.json"
EXPERTS_NAME = "experts.bin"
CONDEMNED_NAME = "condemned.txt"
"""Lies beside them once a record was read that is not what was written; says which."""

logger = logging.getLogger("vllm.moe_offload")


class Manifest(BaseModel):
    """``manifest.json``: what the store holds and what it was built from.

    Attributes:
        format: tells the file from any other JSON.
        format_version: :data:`FORMAT_VERSION` of the code that wrote it.
        identity: what the store was built from.
        layout: tensors of one expert, :meth:`ExpertLayout.to_json`.
        num_layers, num_experts: MoE layers, and routed experts in each.
        file_bytes: size of ``experts.bin``.
        checksums: xxh3_64 of every record ``[num_layers][num_experts]``, 16 hex digits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["vllm-moe-offload expert store"] = "vllm-moe-offload expert store"
    format_version: int = FORMAT_VERSION
    identity: StoreIdentity
    layout: list[dict[str, Any]]
    num_layers: int
    num_experts: int
    file_bytes: int
    checksums: list[list[str]]


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
            descriptor = os.open(
                path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600
            )
            with os.fdopen(descriptor, "w") as file:
                file.write(f"expert {expert} of layer {layer}: {reason}\n")
        except OSError as error:
            logger.warning(
                "MoE offload: cannot note in %s that the store is damaged: %s; delete that "
                "directory to have the store built again",
                self.directory,
                error,
            )


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
    directory: Path, identity: StoreIdentity | None, layout: ExpertLayout | None = None
) -> ExpertStore | None:
    """The store in ``directory``; None if there is none yet.

    Args:
        directory: :meth:`StoreIdentity.directory`.
        identity: what the store must have been built from; None accepts any, for tools
            that look at a store without serving from it.
        layout: what the experts must look like, if the caller knows.

    Raises:
        DamagedStore: there is one, but cut, changed, condemned, or of something else.
        StoreError: it is another user's.
    """
    if not directory.exists():
        return None
    path = directory / MANIFEST_NAME
    _check_owner(directory)
    _check_condemned(directory / CONDEMNED_NAME)
    manifest = _read_manifest(path)
    if identity is not None and identity != manifest.identity:
        raise DamagedStore(
            f"{path} is of another model or build "
            f"({'; '.join(manifest.identity.differences(identity))})"
        )
    store = _store_of(directory, manifest)
    if layout is not None and layout != store.layout:
        raise DamagedStore(
            f"{path}: its experts hold {store.layout.to_json()}, not {layout.to_json()}"
        )
    _check_file(store)
    return store


def _check_owner(directory: Path) -> None:
    user = os.geteuid()
    for path in (directory, directory / MANIFEST_NAME, directory / EXPERTS_NAME):
        if path.exists() and user not in (0, path.stat().st_uid):
            raise StoreError(
                f"{path} belongs to user {path.stat().st_uid}, not to you (user {user}); set "
                "store_dir to a directory of your own"
            )


def _check_condemned(path: Path) -> None:
    if not path.exists():
        return
    try:
        reason = path.read_text(errors="replace").strip()
    except OSError as error:  # that it is there says enough
        reason = str(error)
    raise DamagedStore(f"{path.parent} holds a damaged record: {reason}")


def _read_manifest(path: Path) -> Manifest:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DamagedStore(f"cannot read {path}: {error}") from error
    try:
        # First of all: the fields of another version may be others.
        version = _ManifestVersion.model_validate_json(text).format_version
        if version == FORMAT_VERSION:
            return Manifest.model_validate_json(text)
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
        layout = ExpertLayout.from_json(manifest.layout)
        checksums = tuple(tuple(int(c, 16) for c in row) for row in manifest.checksums)
    except ValueError as error:
        raise DamagedStore(f"{path} is not valid ({error})") from error
    if [len(row) for row in checksums] != [manifest.num_experts] * manifest.num_layers:
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
        size = store.path.stat().st_size
    except OSError as error:
        raise DamagedStore(f"cannot read {store.path}: {error}") from error
    if size != store.file_bytes:
        raise DamagedStore(f"{store.path} has {size} bytes instead of {store.file_bytes}")
