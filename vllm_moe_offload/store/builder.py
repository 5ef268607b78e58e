"""Builds a store layer by layer, so that no more than one layer is in memory."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from vllm_moe_offload.cache.layout import ExpertLayout
from vllm_moe_offload.files import sync_directory
from vllm_moe_offload.store.direct_io import Bytes, DirectWriter, io_threads
from vllm_moe_offload.store.directory import building_directory
from vllm_moe_offload.store.errors import StoreError
from vllm_moe_offload.store.expert_store import (
    EXPERTS_NAME,
    MANIFEST_NAME,
    ExpertStore,
    Manifest,
    open_store,
)
from vllm_moe_offload.store.identity import StoreIdentity
from vllm_moe_offload.store.room import check_room, no_room


class StoreBuilder:
    """Writes a store beside its final place and moves it there when it is complete.

    A context manager: leaving it without :meth:`commit`, by exception or not, removes all
    that was written. What a killed process leaves does not open and is removed by the next
    builder. Use it under :func:`store_lock`.
    """

    def __init__(
        self,
        directory: Path,
        identity: StoreIdentity,
        num_layers: int,
        num_experts: int,
        *,
        cpus: Sequence[int] = (),
    ) -> None:
        """Touches nothing yet.

        Args:
            directory: final place, :meth:`StoreIdentity.directory`.
            identity: what the store is built from.
            num_layers: MoE layers, each to be written once.
            num_experts: routed experts per layer.
            cpus: cores for its threads; empty: where the calling thread may run.
        """
        self.cpus = cpus
        self._directory = directory
        self._identity = identity
        self._num_layers = num_layers
        self._num_experts = num_experts
        self._layout: ExpertLayout | None = None
        self._checksums: dict[int, list[str]] = {}
        self._cleanup = contextlib.ExitStack()
        self._building: Path | None = None
        self._writer: DirectWriter | None = None

    def __enter__(self) -> StoreBuilder:
        """Creates directory and file. Raises StoreError if that or the final place fails."""
        if os.path.lexists(self._directory):
            raise StoreError(
                f"{self._directory} exists already; open it, or delete it to build again"
            )
        with contextlib.ExitStack() as cleanup:
            self._building = cleanup.enter_context(building_directory(self._directory))
            self._writer = self._create(self._building / EXPERTS_NAME)
            cleanup.callback(self._writer.close)
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._building = self._writer = None
        self._cleanup.close()

    def write_layer(
        self, layer: int, layout: ExpertLayout, tensors: Mapping[str, npt.NDArray[np.uint8]]
    ) -> None:
        """Writes the records of one layer; its arrays are not used after the return.

        Args:
            layer: index among the MoE layers; any order, each once.
            layout: tensors of one expert; the same for all layers.
            tensors: each of them, uint8 ``[num_experts, nbytes]``.

        Raises:
            StoreError: disk full or not writable; names path, bytes and remedy.
            ValueError: layer, layout or an array is not what the store holds.
        """
        writer = self._open_writer()
        if self._layout is None:
            self._layout = layout
            self._check_space(layout)
        self._check_layer(layer, layout, tensors)
        checksums = []
        try:
            writer.seek(layer * self._num_experts * layout.record_bytes)
            for expert in range(self._num_experts):
                checksums.append(_write_record(writer, layout, tensors, expert))
        except OSError as error:
            raise self._write_error(error) from error
        self._checksums[layer] = checksums

    def commit(self) -> ExpertStore:
        """Makes the store the one that opens: data first, manifest, then one rename.

        Raises:
            StoreError: the disk is full, or another process put a store there meanwhile.
            ValueError: a layer is missing.
        """
        writer, layout, building = self._open_writer(), self._layout, self._building
        missing = sorted(set(range(self._num_layers)) - set(self._checksums))
        if missing or layout is None or building is None:
            raise ValueError(f"cannot commit a store without its layers {missing}")
        manifest = Manifest(
            identity=self._identity,
            layout=layout.tensors,
            num_layers=self._num_layers,
            num_experts=self._num_experts,
            file_bytes=self._file_bytes(layout),
            checksums=tuple(tuple(self._checksums[layer]) for layer in range(self._num_layers)),
        )
        try:
            writer.finish()
            _write_synced(building / MANIFEST_NAME, manifest.model_dump_json(indent=1))
            building.rename(self._directory)
            sync_directory(self._directory.parent)
        except OSError as error:
            raise self._write_error(error) from error
        store = open_store(self._directory, self._identity, layout)
        if store is None:
            raise StoreError(f"{self._directory} vanished right after it was built")
        return store

    def _open_writer(self) -> DirectWriter:
        if self._writer is None:
            raise ValueError("a StoreBuilder works only inside its `with` block")
        return self._writer

    def _create(self, path: Path) -> DirectWriter:
        try:
            return DirectWriter(path, self.cpus)
        except OSError as error:
            raise self._write_error(error) from error

    def _file_bytes(self, layout: ExpertLayout) -> int:
        return self._num_layers * self._num_experts * layout.record_bytes

    def _check_space(self, layout: ExpertLayout) -> None:
        check_room(self._directory, self._file_bytes(layout), self._directory.parent)

    def _write_error(self, error: OSError) -> StoreError:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return StoreError(
                f"cannot write the expert store {self._directory}: {error}; set store_dir to a "
                "directory that can be written"
            )
        needed = None if self._layout is None else self._file_bytes(self._layout)
        return StoreError(no_room(self._directory, error, needed, self._directory.parent))

    def _check_layer(
        self, layer: int, layout: ExpertLayout, tensors: Mapping[str, npt.NDArray[np.uint8]]
    ) -> None:
        if not 0 <= layer < self._num_layers or layer in self._checksums:
            raise ValueError(
                f"layer {layer} is not one of {self._num_layers}, or written already"
            )
        if layout != self._layout:
            raise ValueError(f"layer {layer} has another layout than the layers before it")
        if tensors.keys() != {spec.name for spec in layout.tensors}:
            raise ValueError(
                f"layer {layer}: tensors {sorted(tensors)} are not those of {layout}"
            )
        for spec in layout.tensors:
            array = tensors[spec.name]
            if array.dtype != np.uint8 or array.shape != (self._num_experts, spec.nbytes):
                raise ValueError(
                    f"layer {layer}: {spec.name} must be uint8 "
                    f"[{self._num_experts}, {spec.nbytes}], got {array.dtype} {array.shape}"
                )


class BackgroundWriter:
    """Writes a builder's layers in a thread, one at a time, while the next is prepared.

    A context manager; leaving it waits for the layer under way.
    """

    def __init__(self, builder: StoreBuilder) -> None:
        """``builder``: must be entered, and stay so until this is left."""
        self._builder = builder
        self._thread = io_threads(1, "vmo-store-layers", builder.cpus)
        self._layer: Future[None] | None = None

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def write_layer(
        self, layer: int, layout: ExpertLayout, tensors: Mapping[str, npt.NDArray[np.uint8]]
    ) -> None:
        """See :meth:`StoreBuilder.write_layer`; the arrays must not change until :meth:`wait`.

        Raises:
            StoreError, ValueError: of the layer before.
        """
        self.wait()
        self._layer = self._thread.submit(self._builder.write_layer, layer, layout, tensors)

    def wait(self) -> None:
        """Waits for the layer under way.

        Raises:
            StoreError, ValueError: of that layer, once.
        """
        layer, self._layer = self._layer, None
        if layer is not None:
            layer.result()


def _write_record(
    writer: DirectWriter,
    layout: ExpertLayout,
    tensors: Mapping[str, npt.NDArray[np.uint8]],
    expert: int,
) -> str:
    """Appends one record; returns its checksum, 16 hex digits."""
    digest = xxhash.xxh3_64()
    parts: list[Bytes] = [tensors[spec.name][expert] for spec in (*layout.direct, *layout.tail)]
    padding = layout.record_bytes - layout.expert_bytes
    for part in (*parts, np.zeros(padding, np.uint8)):
        contiguous = np.ascontiguousarray(part)
        digest.update(contiguous.data)
        writer.write(contiguous)
    return str(digest.hexdigest())


def _write_synced(path: Path, text: str) -> None:
    """Writes ``path`` (0600) so that it is either complete on disk or absent."""
    temporary = path.with_name(f"{path.name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_directory(path.parent)
