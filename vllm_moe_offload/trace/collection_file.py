"""Where a server keeps its collection of activation matrices between starts."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from vllm_moe_offload.trace.collection import ActivationCollection, CollectionError

logger = logging.getLogger("vllm.moe_offload")

SAVE_DELAY_S = 10.0
"""Time from a change to its file: what is gathered meanwhile is written at once, and a
server that is killed loses no more than this."""


class CollectionFile:
    """One file, one collection, one writer.

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
        """``writes`` False: only :meth:`load` (another rank writes the same file)."""
        self.path = path
        self.collection = collection
        self._writes = writes
        self._delay_s = delay_s
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def load(self) -> ActivationCollection:
        """Replaces :attr:`collection` by the file's, if there is one; returns it.

        A file that is damaged, foreign or unreadable is left alone and a warning logged: the
        server then starts with an empty collection, and does not write over that file.
        """
        try:
            self.collection = ActivationCollection.load(
                self.path, self.collection.capacity, self.collection.fingerprint
            )
        except FileNotFoundError:
            pass
        except (CollectionError, OSError) as error:
            self._writes = False
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

    def changed(self) -> None:
        """The collection changed: it is saved soon, by another thread."""
        if not self._writes:
            return
        with self._lock:
            if self._timer is None:
                self._timer = threading.Timer(self._delay_s, self._save)
                self._timer.daemon = True
                self._timer.start()

    def close(self) -> None:
        """Saves what was not saved yet."""
        with self._lock:
            timer = self._timer
        if timer is not None:
            timer.cancel()
            timer.join()
            self._save()

    def _save(self) -> None:
        with self._lock:
            if self._timer is None:
                return  # saved already
            self._timer = None
        try:
            self.collection.save(self.path)
        except OSError as error:
            logger.warning("MoE offload: cannot save activation matrices: %s", error)
