"""Writes a routing trace while serving (format: ``trace/routing.py``).

Steps are appended to a spool on disk (``trace/spool.py``), so memory stays bounded whatever is
recorded; closing makes the trace of it. Nothing names a request: what clients call theirs may be
long, and is nobody's business.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.files import FileLock, remove_unfinished
from vllm_moe_offload.step import StepTokens
from vllm_moe_offload.trace.finish import write_trace
from vllm_moe_offload.trace.progress import RequestProgress
from vllm_moe_offload.trace.spool import ROW, Server, SpoolWriter, remove_spool, spool_of

logger = logging.getLogger("vllm.moe_offload")


@dataclass(slots=True)
class _Running:
    """A request that may go on: its number in the trace, and how far it has come.

    Attributes:
        guesses: first row and positions of its last drafted tokens, until they are verified.
    """

    number: int
    progress: RequestProgress
    guesses: tuple[int, npt.NDArray[np.int64]] | None = None


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
        """Creates the spool beside ``path``; what a server left there that was killed is removed.

        Args:
            path: the ``.npz`` to write; an older one is replaced at close.
            num_layers, num_experts, top_k: shape of the routing.
            num_slots, num_staging_slots: of the server's cache, kept for the replay.
            limit_bytes: recording stops before the spool outgrows this.
            layer_ids: index of each MoE layer in the model; default 0, 1, ...
            own_experts: those that the server's cache is for, where other workers have the others.

        Raises:
            FileInUse: another server records to ``path``.
            OSError: the directory cannot be written.
        """
        self._path = Path(path)
        self._limit = limit_bytes
        self._server = Server(
            num_experts=num_experts,
            top_k=top_k,
            layer_ids=range(num_layers) if layer_ids is None else layer_ids.tolist(),
            num_slots=num_slots,
            num_staging_slots=num_staging_slots,
            own_experts=own_experts,
        )
        self._lock = FileLock(self._path)
        try:
            self._spool = self._new_spool()
        except OSError:
            self._lock.release()
            raise
        self._num_requests = 0
        self._running: dict[str, _Running] = {}
        self._step = -1
        self._tokens: StepTokens | None = None
        self._block: npt.NDArray[Any] = np.zeros((0, *self._server.row_shape), np.uint8)
        self._layers_seen = 0
        self._stopped = False
        self._closed = False

    def _new_spool(self) -> SpoolWriter:
        remove_unfinished(self._path)
        directory = spool_of(self._path)
        if remove_spool(directory):
            logger.warning(
                "MoE offload: removed %s, what an earlier server recorded and wrote no trace of",
                directory,
            )
        return SpoolWriter(directory, self._server)

    @property
    def num_tokens(self) -> int:
        """Tokens recorded."""
        return self._spool.num_rows

    @property
    def is_recording(self) -> bool:
        """False once the limit was reached or the recorder was closed."""
        return not (self._stopped or self._closed)

    def begin_step(self, tokens: StepTokens) -> None:
        """A step for real requests begins; without an end it replaces the one before."""
        if not self.is_recording:
            return
        count = tokens.request_of_token.size
        if self._spool.nbytes + count * self._server.row_bytes > self._limit:
            self._stop(
                f"the trace would outgrow record_trace_limit_gb ({self._limit / 2**30:.3g} GiB)"
            )
            return
        self._tokens = tokens
        self._layers_seen = 0
        self._block = np.zeros((count, *self._server.row_shape), self._server.id_type)

    def _stop(self, reason: str) -> None:
        self._stopped = True
        logger.warning(
            "MoE offload: record_trace stopped after %d tokens, because %s; what was recorded "
            "is kept",
            self.num_tokens,
            reason,
        )

    def observe(self, layer: int, ids: npt.NDArray[np.integer[Any]]) -> None:
        """Layer ``layer`` routed the step's tokens; ids ``[tokens, top_k]``."""
        if self._tokens is not None:
            self._block[:, layer] = ids
            self._layers_seen += 1

    def observe_step(self, ids: npt.NDArray[np.integer[Any]]) -> None:
        """All layers routed the step's tokens; ids ``[tokens, layers, top_k]``."""
        if self._tokens is not None:
            self._block[...] = ids
            self._layers_seen = ids.shape[1]

    def end_step(self) -> None:
        """Spools the step."""
        tokens, self._tokens = self._tokens, None
        if tokens is None or self._layers_seen != len(self._server.layer_ids):
            return
        self._step += 1
        rows = np.zeros(tokens.request_of_token.size, ROW)
        rows["step"] = self._step
        rows["position"] = tokens.positions
        rows["is_draft"] = tokens.is_drafted()
        ends = np.cumsum(tokens.lengths).tolist()
        for place, (name, start, end) in enumerate(
            zip(tokens.requests, [0, *ends[:-1]], ends, strict=True)
        ):
            num_drafted = 0 if tokens.num_drafted is None else int(tokens.num_drafted[place])
            own = rows[start:end]
            self._advance(name, own, num_drafted, bool(tokens.is_prefill[place]), start)
        try:
            self._spool.add_rows(rows, self._block)
        except OSError as error:
            self._stop_spooling(error)

    def _advance(
        self,
        name: str,
        rows: npt.NDArray[Any],
        num_drafted: int,
        is_prefill: bool,
        start: int,
    ) -> None:
        """A request computes ``rows``, ``start`` of the step's on; fills in what they are to it."""
        running = self._running.get(name)
        if running is None:
            first = int(rows["position"][0]) if rows.size else 0
            running = _Running(self._num_requests, RequestProgress(first))
            self._running[name] = running
            self._num_requests += 1
        certain = rows[: rows.size - num_drafted]
        if num_drafted:
            guessed = rows["position"][certain.size :].copy()
            running.guesses = self.num_tokens + start + certain.size, guessed
        num_again, is_prompt = running.progress.advance(certain["position"], is_prefill)
        rows["request"] = running.number
        certain["is_again"][:num_again] = True
        certain["is_prompt"] = is_prompt

    def _stop_spooling(self, error: OSError) -> None:
        # Serving must not die of a full disk that it only records to.
        self._stop(f"{self._spool.directory} cannot be written ({error})")

    def verify(self, ends: Mapping[str, int]) -> None:
        """Which drafted tokens turned out to be their requests' (see ``StepTokens.is_verified``);
        those of requests that are not named stay open until they are, or end."""
        for name in self._running.keys() & ends.keys():
            running = self._running[name]
            if running.guesses is None:
                continue
            first_row, positions = running.guesses
            running.guesses = None
            num_verified = int(np.searchsorted(positions, ends[name]))
            num_again, _ = running.progress.advance(positions[:num_verified], False)
            if self.is_recording and num_verified > num_again:
                try:
                    self._spool.add_verified(first_row + num_again, num_verified - num_again)
                except OSError as error:
                    self._stop_spooling(error)

    def end_request(self, request: str) -> None:
        """A request ended: the same name would be another request from now on."""
        running = self._running.pop(request, None)
        if running is not None and self.is_recording:
            try:
                self._spool.add_end(running.number, self._step + 1)
            except OSError as error:
                self._stop_spooling(error)

    def close(self) -> None:
        """Writes the trace and removes the spool; safe to call again.

        Raises:
            OSError: the trace cannot be written; an older one is left as it was, and the spool
                stays.
        """
        if self._closed:
            return
        self._closed = True
        self._spool.close()
        try:
            if self._spool.num_rows:
                self._write()
            remove_spool(self._spool.directory)
        finally:
            self._lock.release()

    def _write(self) -> None:
        try:
            num_tokens, num_requests = write_trace(self._spool.directory, self._path)
        except OSError as error:
            raise OSError(
                f"cannot write the recorded trace {self._path}: {error}; what was recorded is kept "
                f"in {self._spool.directory}: make room, then run `vllm-moe-offload trace finish "
                f"{self._path}`"
            ) from error
        logger.info(
            "MoE offload: wrote the routing of %d tokens of %d requests to %s",
            num_tokens,
            num_requests,
            self._path,
        )
