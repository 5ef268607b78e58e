"""Writes a routing trace while serving (format: ``trace/routing.py``).

Steps are appended to nameless spool files beside the target, so memory stays bounded and a
killed server leaves nothing behind; closing turns the spool into the final ``.npz``,
atomically.
"""

from __future__ import annotations

import logging
import os
import tempfile
import zipfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.step import StepTokens
from vllm_moe_offload.trace.progress import RequestProgress
from vllm_moe_offload.trace.routing import id_dtype

logger = logging.getLogger("vllm.moe_offload")

_npy: Any = np.lib.format  # untyped in numpy's stubs
BLOCK_TOKENS = 4096
_TOKEN = np.dtype(
    [
        ("step", "<i8"),
        ("request", "<i4"),
        ("position", "<i8"),
        ("is_again", "?"),
        ("is_draft", "?"),
    ]
)


class TraceRecorder:
    """Spools the routing of every step to disk and writes the trace at :meth:`close`.

    One step: :meth:`begin_step`, :meth:`observe` per layer, :meth:`end_step`. A step that
    ends without all its layers (a failed read) is dropped. Where a drafter guesses tokens,
    :meth:`verify` before the next step says which of them count.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        num_layers: int,
        num_experts: int,
        top_k: int,
        num_slots: int,
        num_staging_slots: int,
        limit_bytes: int,
        layer_ids: npt.NDArray[np.integer[Any]] | None = None,
        own_experts: Sequence[int] | None = None,
    ) -> None:
        """Creates the spool files beside ``path``.

        Args:
            path: the ``.npz`` to write; an older one is replaced at close.
            num_layers, num_experts, top_k: shape of the routing.
            num_slots, num_staging_slots: of the server's cache, kept for the replay.
            limit_bytes: recording stops before the spool outgrows this.
            layer_ids: index of each MoE layer in the model; default 0, 1, ...
            own_experts: those that the server's cache is for, where other workers have the others.

        Raises:
            OSError: the directory cannot be written.
        """
        self._path = Path(path)
        self._dtype = np.dtype(id_dtype(num_experts))
        self._num_experts = num_experts
        self._slots = (num_slots, num_staging_slots)
        self._limit = limit_bytes
        self._layer_ids = np.arange(num_layers) if layer_ids is None else np.asarray(layer_ids)
        self._own_experts = own_experts
        self._shape = (num_layers, top_k)
        self._token_bytes = num_layers * top_k * self._dtype.itemsize + _TOKEN.itemsize
        self._ids_file = self._spool("ids")
        self._tokens_file = self._spool("tokens")
        self._names: list[str] = []  # and so on: of all requests so far
        self._progress: list[RequestProgress] = []
        self._end_steps: list[int] = []
        self._running: dict[str, int] = {}
        self._drafted: dict[str, tuple[int, npt.NDArray[np.int64]]] = {}  # first row, positions
        self._extra = array("q")  # rows that belong to no request's tokens after all
        self._step = -1
        self._tokens: StepTokens | None = None
        self._block: npt.NDArray[Any] = np.zeros((0, *self._shape), self._dtype)
        self._layers_seen = 0
        self._num_tokens = 0
        self._stopped = False
        self._closed = False

    def _spool(self, kind: str) -> Any:
        # Nameless and 0600: nobody else reads prompts' routing, nothing is left behind.
        return tempfile.TemporaryFile(
            dir=self._path.parent, prefix=f".{self._path.name}.{kind}."
        )

    @property
    def num_tokens(self) -> int:
        """Tokens recorded."""
        return self._num_tokens

    @property
    def is_recording(self) -> bool:
        """False once the limit was reached or the recorder was closed."""
        return not (self._stopped or self._closed)

    def begin_step(self, tokens: StepTokens) -> None:
        """A step for real requests begins; without an end it replaces the one before."""
        if not self.is_recording:
            return
        count = tokens.request_of_token.size
        if (self._num_tokens + count) * self._token_bytes > self._limit:
            self._stop(
                f"the trace would outgrow record_trace_limit_gb ({self._limit / 2**30:.3g} GiB)"
            )
            return
        self._tokens = tokens
        self._layers_seen = 0
        self._block = np.zeros((count, *self._shape), self._dtype)

    def _stop(self, reason: str) -> None:
        self._stopped = True
        logger.warning(
            "MoE offload: record_trace stopped after %d tokens, because %s; what was recorded "
            "is kept",
            self._num_tokens,
            reason,
        )

    def observe(self, layer: int, ids: npt.NDArray[np.integer[Any]]) -> None:
        """Layer ``layer`` routed the step's tokens; ids ``[tokens, top_k]``."""
        if self._tokens is not None:
            self._block[:, layer] = ids
            self._layers_seen += 1

    def end_step(self) -> None:
        """Spools the step."""
        tokens, self._tokens = self._tokens, None
        if tokens is None or self._layers_seen != self._shape[0]:
            return
        self._step += 1
        entries = np.zeros(tokens.request_of_token.size, _TOKEN)
        entries["step"] = self._step
        entries["position"] = tokens.positions
        indices = np.empty(len(tokens.requests), np.int32)
        entries["is_draft"] = tokens.is_drafted()
        lengths, num_drafted = tokens.lengths, tokens.num_drafted
        start = 0
        for place, name in enumerate(tokens.requests):
            end = start + int(lengths[place])
            if name not in self._running:
                self._running[name] = len(self._names)
                self._names.append(name)
                first = int(tokens.positions[start]) if end > start else 0
                self._progress.append(RequestProgress(first))
                self._end_steps.append(-1)
            indices[place] = index = self._running[name]
            certain = end
            if num_drafted is not None and num_drafted[place]:
                self._reject(name)  # nobody said anything of those before
                certain -= int(num_drafted[place])
                self._drafted[name] = self._num_tokens + certain, tokens.positions[certain:end]
            num_again, _ = self._progress[index].advance(
                tokens.positions[start:certain], bool(tokens.is_prefill[place])
            )
            entries["is_again"][start : start + num_again] = True
            start = end
        entries["request"] = indices[tokens.request_of_token]
        try:
            self._ids_file.write(self._block.tobytes())
            self._tokens_file.write(entries.tobytes())
        except OSError as error:
            # Serving must not die of a full disk that it only records to.
            self._stop(f"its spool in {self._path.parent} cannot be written ({error})")
            return
        self._num_tokens += entries.size

    def verify(self, ends: Mapping[str, int]) -> None:
        """Which drafted tokens turned out to be their requests' (see ``StepTokens.is_verified``);
        those of requests that are not named stay open until they are, or end."""
        for request in self._drafted.keys() & ends.keys():
            first_row, positions = self._drafted.pop(request)
            num_verified = int(np.searchsorted(positions, ends[request]))
            progress = self._progress[self._running[request]]
            num_again, _ = progress.advance(positions[:num_verified], False)
            self._extra.extend(range(first_row, first_row + num_again))
            self._extra.extend(range(first_row + num_verified, first_row + positions.size))

    def _reject(self, request: str) -> None:
        if request in self._drafted:
            first_row, positions = self._drafted.pop(request)
            self._extra.extend(range(first_row, first_row + positions.size))

    def end_request(self, request: str) -> None:
        """A request ended: the same name would be another request from now on."""
        self._reject(request)
        index = self._running.pop(request, None)
        if index is not None:
            self._end_steps[index] = self._step + 1

    def close(self) -> None:
        """Writes the trace; safe to call again.

        Raises:
            OSError: the trace cannot be written; an older one is left as it was.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self._num_tokens:
                self._write()
                logger.info(
                    "MoE offload: wrote the routing of %d tokens of %d requests to %s",
                    self._num_tokens,
                    len(self._names),
                    self._path,
                )
        finally:
            self._ids_file.close()
            self._tokens_file.close()

    def _write(self) -> None:
        self._tokens_file.seek(0)
        tokens = np.frombuffer(
            self._tokens_file.read(self._num_tokens * _TOKEN.itemsize), _TOKEN
        )
        for request in list(self._drafted):
            self._reject(request)
        is_own = ~tokens["is_again"]
        extra_rows = np.array(self._extra, np.int64)
        # The last step's rows may not be in the spool.
        is_own[extra_rows[extra_rows < is_own.size]] = False
        extra, own = np.flatnonzero(~is_own), np.flatnonzero(is_own)
        own = own[np.argsort(tokens["request"][own], kind="stable")]  # positions ascend already
        row_token = np.empty(tokens.size, np.int64)
        row_token[own] = np.arange(own.size)
        row_token[extra] = own.size + np.arange(extra.size)
        lens = np.bincount(tokens["request"][own], minlength=len(self._names))
        arrays: dict[str, npt.NDArray[Any]] = {
            "starts": (np.cumsum(lens) - lens).astype(np.int64),
            "lens": lens.astype(np.int64),
            "num_experts": np.asarray(self._num_experts, np.int64),
            "names": np.array(self._names, np.str_),
            "prefill_lens": np.array([one.num_prefill for one in self._progress], np.int64),
            "row_step": tokens["step"].astype(np.int64),
            "row_request": tokens["request"].astype(np.int32),
            "row_position": tokens["position"].astype(np.int64),
            "row_token": row_token,
            "first_positions": np.array([one.num_cached for one in self._progress], np.int64),
            "end_steps": np.array(self._end_steps, np.int64),
            "layer_ids": self._layer_ids.astype(np.int64),
            "slots": np.asarray(self._slots[0], np.int64),
            "staging_slots": np.asarray(self._slots[1], np.int64),
        }
        if tokens["is_draft"].any():
            arrays["row_is_draft"] = np.ascontiguousarray(tokens["is_draft"])
        if self._own_experts is not None:
            arrays["own_experts"] = np.asarray(self._own_experts, np.int64)
        descriptor, temporary = tempfile.mkstemp(  # 0600
            dir=self._path.parent, prefix=f".{self._path.name}."
        )
        try:
            with (
                os.fdopen(descriptor, "wb") as file,
                zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, allowZip64=True) as archive,
            ):
                for name, array in arrays.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        _npy.write_array(member, array, allow_pickle=False)
                self._write_ids(archive, "ids", own)
                self._write_ids(archive, "recomputed_ids", extra)
            os.replace(temporary, self._path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _write_ids(
        self, archive: zipfile.ZipFile, name: str, order: npt.NDArray[np.int64]
    ) -> None:
        """Copies tokens of the spool in the given order, a block at a time."""
        shape = (order.size, *self._shape)
        header = {
            "descr": _npy.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": shape,
        }
        with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            _npy.write_array_header_1_0(member, header)
            for block in self._blocks(order):
                member.write(block.tobytes())

    def _blocks(self, order: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[Any]]:
        if not order.size:
            return
        self._ids_file.flush()
        spool = np.memmap(
            self._ids_file, self._dtype, mode="r", shape=(self._num_tokens, *self._shape)
        )
        for start in range(0, order.size, BLOCK_TOKENS):
            yield spool[order[start : start + BLOCK_TOKENS]]
