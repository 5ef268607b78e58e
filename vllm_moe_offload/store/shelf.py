"""What lies in a ``store_dir``: every model's store, finished or not, and what it takes."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_moe_offload.rank import NAME_PATTERN
from vllm_moe_offload.store.directory import delete, store_lock
from vllm_moe_offload.store.errors import StoreError
from vllm_moe_offload.store.expert_store import ExpertStore, open_store

logger = logging.getLogger("vllm.moe_offload")

_MODEL = re.compile(r"(?P<model>.+)-[0-9a-f]{16}")
_OLDER = "rank*of*"
"""What directories of parts are called in format version 1, which no start opens any more."""
_PARTS = re.compile(rf"{NAME_PATTERN.pattern}|rank\d+of\d+")


@dataclass(frozen=True, slots=True)
class ShelvedModel:
    """One model's store: a directory of its own, a part per rank.

    Attributes:
        directory: ``<store_dir>/<model>-<key>``.
        parts: what every rank's directory holds.
        faults: what is wrong with a rank's part, one line each.
        nbytes: disk space that the directory takes, unfinished builds included.
        built: seconds since the epoch of the newest part; 0 if there is none.
        is_older: whether there are parts of format version 1, which no start opens or deletes.
    """

    directory: Path
    parts: tuple[ExpertStore, ...]
    faults: tuple[str, ...]
    nbytes: int
    built: float
    is_older: bool = False

    @property
    def model(self) -> str:
        """Its name, as the directory has it."""
        return self.directory.name.rpartition("-")[0]

    @property
    def state(self) -> str:
        """``complete``, or what it is instead."""
        if self.faults:
            return self.faults[0]
        if not self.parts:
            return "not finished"
        if self.num_missing:
            return f"{len(self.parts)} of {len(self.parts) + self.num_missing} parts are here"
        return "complete, a drafter's" if self.is_drafter else "complete"

    @property
    def is_leftover(self) -> bool:
        """Whether nothing in it opens, and a start that wants its place will delete it."""
        return not self.parts and not self.is_older

    @property
    def is_drafter(self) -> bool:
        """Whether it holds experts of what drafts for the model."""
        return any(part.identity.is_drafter for part in self.parts)

    @property
    def num_missing(self) -> int:
        """Parts that are not here: other machines' workers have theirs there."""
        if not self.parts:
            return 0
        rank = self.parts[0].identity.rank
        # A drafter is in the last pipeline stage, and nowhere else.
        wanted = rank.num_parts // rank.pp_size if self.is_drafter else rank.num_parts
        return max(wanted - len(self.parts), 0)


def shelved_models(store_dir: Path) -> list[ShelvedModel]:
    """All stores below ``store_dir``, by name; none if there is no such directory."""
    if not store_dir.is_dir():
        return []
    return list(filter(None, map(_look_at, _directories(store_dir))))


def _directories(store_dir: Path) -> list[Path]:
    return [
        path
        for path in sorted(store_dir.iterdir())
        if _MODEL.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]


def _contents(directory: Path) -> Iterator[Path]:
    """What lies there, but for locks, which outlive what they guard (:func:`store_lock`)."""
    return (path for path in directory.iterdir() if path.suffix != ".lock")


def _look_at(directory: Path) -> ShelvedModel | None:
    """None if nothing is there. What cannot be read, or goes meanwhile, is a fault."""
    parts, faults, built = [], [], 0.0
    try:
        if not any(_contents(directory)):
            return None
        for path in sorted(directory.iterdir()):
            if not _PARTS.fullmatch(path.name):
                continue
            try:
                part = open_store(path, None)
            except StoreError as error:
                faults.append(str(error))
                continue
            if part is not None:
                parts.append(part)
                built = max(built, part.path.stat().st_mtime)
        nbytes = _disk_bytes(directory)
    except OSError as error:
        return ShelvedModel(directory, (), (f"cannot be read: {error}",), 0, 0.0)
    is_older = any(directory.glob(_OLDER))
    return ShelvedModel(directory, tuple(parts), tuple(faults), nbytes, built, is_older)


def _disk_bytes(directory: Path) -> int:
    return sum(
        os.lstat(os.path.join(folder, name)).st_blocks * 512
        for folder, _, names in os.walk(directory)
        for name in names
    )


def others_of(directory: Path) -> Iterator[ShelvedModel]:
    """Stores of the same model beside ``directory``, which is a model's: of another version of
    vLLM, kernel, format or checkpoint. A drafter's is none of them."""
    model = directory.name.rpartition("-")[0]
    for path in _directories(directory.parent):
        if path != directory and path.name.rpartition("-")[0] == model:
            shelved = _look_at(path)
            if shelved is not None and not shelved.is_drafter:
                yield shelved


def log_others(directory: Path) -> None:
    """Says what :func:`others_of` take, if there are any."""
    others = list(others_of(directory))
    if others:
        logger.info(
            "MoE offload: %d other store(s) of a model of this name take %.2f GiB in %s; "
            "`vllm-moe-offload store list` shows them, `store remove` deletes them",
            len(others),
            sum(other.nbytes for other in others) / 2**30,
            directory.parent,
        )


def remove(shelved: ShelvedModel) -> None:
    """Deletes a model's store, once nobody builds it. Servers that use it keep what they have
    open, until they end.

    Raises:
        StoreError: it cannot be deleted.
    """
    with contextlib.ExitStack() as locks:
        for lock in sorted(shelved.directory.glob("*.lock")):
            # Beside those of parts lies that of a server that keeps its activation matrices here.
            if _PARTS.fullmatch(lock.stem):
                locks.enter_context(store_lock(lock.with_suffix("")))
        for path in _contents(shelved.directory):
            delete(path)
