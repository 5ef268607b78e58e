"""The store's error."""

from __future__ import annotations


class StoreError(RuntimeError):
    """The store cannot be built, opened or read; the message names file and remedy."""
