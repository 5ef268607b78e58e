"""JSON documents with one value replaced: what a damaged or hostile file may hold."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 24, 50_000_000, 2**31, 2**63, 2**64, 10**30, 10**400, 1.5,
    1e300, float("inf"), float("nan"), "", "F32", "F4", "fp8", "0" * 16, "\ud800", "a\nb\0\x1b",
    [], [0], [1, 2], [[1]], ["x"], {}, {"a": 1},
)  # fmt: skip
"""Every kind that JSON has, sizes that no machine has, and a few that fit."""


def places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document, the way to it as keys; the whole first."""
    inner: list[tuple[Any, object]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


def replaced(document: Any, place: Sequence[Any], value: object) -> Any:
    """A copy with ``value`` at a place, which is not the whole."""
    result = owner = copy.deepcopy(document)
    *way, last = place
    for key in way:
        owner = owner[key]
    owner[last] = copy.deepcopy(value)
    return result


def mutations(document: Any) -> Iterator[Any]:
    """Copies of a document, each with one of :data:`VALUES` at one place."""
    for place in places(document)[1:]:
        for value in VALUES:
            yield replaced(document, place, value)


def mutated(document: Any, random_: random.Random) -> Any:
    """A copy with one or two values replaced."""
    for _ in range(random_.randint(1, 2)):
        there = places(document)[1:]
        if there:
            document = replaced(document, random_.choice(there), random_.choice(VALUES))
    return document
