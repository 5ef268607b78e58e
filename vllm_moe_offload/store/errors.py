"""The store's errors."""

from __future__ import annotations

_MOST_CHARACTERS = 4000


class StoreError(RuntimeError):
    """The store cannot be built, opened or read; the message names file and remedy.

    It is one line that any terminal shows, whatever it quotes: what lies in a store's place may
    be anybody's.
    """

    def __init__(self, message: str) -> None:
        super().__init__(in_one_line(message))


class DamagedStore(StoreError):
    """What lies in a store's place is not what was built there: a start builds it again.

    A store is a cache of the checkpoint, so nothing is lost. The message names the file and
    what is wrong with it.
    """


def in_one_line(text: str) -> str:
    """``text`` with escapes for what is not printable, and its end left out if it is long."""
    if len(text) > _MOST_CHARACTERS:
        text = text[:_MOST_CHARACTERS] + "..."
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )
