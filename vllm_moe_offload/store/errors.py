"""The store's errors."""

from __future__ import annotations


class StoreError(RuntimeError):
    """The store cannot be built, opened or read; the message names file and remedy."""


class DamagedStore(StoreError):
    """What lies in a store's place is not what was built there: a start builds it again.

    A store is a cache of the checkpoint, so nothing is lost. The message names the file and
    what is wrong with it.
    """
