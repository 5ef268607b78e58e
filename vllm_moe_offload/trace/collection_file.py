"""Where a server keeps its collection of activation matrices between starts."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from vllm_moe_offload.files import FileInUse, FileLock, remove_unfinished
from vllm_moe_offload.trace.collection import ActivationCollection, CollectionError

logger = logging.getLogger("vllm.moe_offload")

SAVE_DELAY_S = 10.0
"""Time from a change to its file: what is gathered meanwhile is written at once, and a
server that is killed loses no more than this."""


class CollectionFile:
    """One file, one collection, one writer: of several servers the first, as long as it runs.

    Attributes:
        path: the file, written atomically and readable by its owner only.
        collection: what it keeps.
    """

    def __init__(
        self,
        path: Path,
        collection: ActivationCollection,
        *,
        writes: bool = True,
        delay_s: float = SAVE_DELAY_S,
    ) -> None:
        """Touches nothing yet.

        Args:
            path: the file.
            collection: what is kept there; empty, of the model that is served.
            writes: False: only :meth:`load` (another rank writes the same file).
            delay_s: time from a change until it is saved.
        """
        self.path = path
        self.collection = collection
        self._may_write = writes
        self._writer: FileLock | None = None
        self._delay_s = delay_s
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def load(self) -> ActivationCollection:
        """Replaces :attr:`collection` by the file's, if there is one; returns it.

        From now on this server keeps what it collects in the file, unless another one does. A
        file that is damaged, foreign or unreadable is left alone and a warning logged: the
        server then starts with an empty collection, and does not write over that file.
        """
        if self._may_write:
            self._become_writer()
        own = self.collection
        try:
            self.collection = ActivationCollection.load(
                self.path, own.capacity, own.fingerprint, (own.num_layers, own.num_experts)
            )
        except FileNotFoundError:
            pass
        except (CollectionError, OSError) as error:
            self._release()
            logger.warning(
                "MoE offload: starting without the activation matrices of earlier requests, and "
                "not keeping this server's: %s",
                error,
            )
        else:
            logger.info(
                "MoE offload: %d activation matrices of earlier requests from %s",
                len(self.collection),
                self.path,
            )
        return self.collection

    def _become_writer(self) -> None:
        try:
            self._writer = FileLock(self.path)
            remove_unfinished(self.path)
        except FileInUse:
            logger.warning(
                "MoE offload: another server keeps its activation matrices in %s; this one starts "
                "with them and keeps none of its own (set another trace_path to keep them)",
                self.path,
            )
        except OSError as error:
            self._release()
            _warn(error)

    def _release(self) -> None:
        if self._writer is not None:
            self._writer.release()
            self._writer = None

    def changed(self) -> None:
        """The collection changed: it is saved soon, by another thread."""
        if self._writer is None:
            return
        with self._lock:
            if self._timer is None:
                self._timer = threading.Timer(self._delay_s, self._save)
                self._timer.daemon = True
                self._timer.start()

    def close(self) -> None:
        """Saves what was not saved yet; another server may keep its own here afterwards."""
        with self._lock:
            timer = self._timer
        try:
            if timer is not None:
                timer.cancel()
                timer.join()
                self._save()
        finally:
            self._release()

    def _save(self) -> None:
        with self._lock:
            if self._timer is None:
                return  # saved already
            self._timer = None
        try:
            self.collection.save(self.path)
        except OSError as error:
            _warn(error)


def _warn(error: OSError) -> None:
    logger.warning("MoE offload: cannot save activation matrices: %s", error)
