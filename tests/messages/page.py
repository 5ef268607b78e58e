"""docs/troubleshooting.md as data: its messages, and whether a text is one of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md"
OTHERS = re.compile(r"\((vLLM|argparse|`make setup`)'s\)")
"""Marks a row whose message is not the package's."""


def rows() -> Iterator[tuple[str, bool]]:
    """The messages on the page, code in the first column of a table; whether it is the package's."""
    for line in PAGE.read_text().splitlines():
        if line.startswith("| `"):
            yield line.split("`")[1], not OTHERS.search(line)


def entries() -> list[str]:
    """The package's messages on the page."""
    return [entry for entry, is_ours in rows() if is_ours]


def fits(entry: str, text: str) -> bool:
    """Whether an entry's fixed parts stand in a message's text in this order."""
    at = 0
    for part in (part for part in entry.split("...") if part.strip()):
        at = text.find(part.strip(), at)
        if at < 0:
            return False
        at += len(part.strip())
    return True
