"""How much memory llama.cpp gets, and what is tried at that."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scripts.llamacpp.install import LlamaCppError
from scripts.llamacpp.weights import GgufSizes

WHOLE = 0.98
"""Of a file's bytes in a cgroup's page cache: then the whole of it was charged there."""
USUAL_READ_AHEAD_KIB = 128
"""What Linux gives a disk where nobody changes it. More is read for every page that is missing, and
where memory is short most of that is dropped before it is used."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is chosen for llama.cpp by trial.

    Attributes:
        threads: that compute.
        repack: whether weights may be copied into another layout.
        read_ahead_kib: of the mapped file, KiB; None: as the disk has it.
    """

    threads: int
    repack: bool
    read_ahead_kib: int | None = None


def besides_experts(figures: Mapping[str, Any], sizes: GgufSizes) -> int:
    """Bytes that llama.cpp takes besides experts, from a run without a limit.

    Args:
        figures: of the cgroup that it ran in, with the whole file in its page cache.
        sizes: of that file.

    Raises:
        LlamaCppError: part of the file was not charged to the cgroup, so this is unknown.
    """
    cached = figures["peak_page_cache_bytes"]
    if cached < WHOLE * sizes.file_bytes:
        raise LlamaCppError(
            f"{cached} bytes of page cache were charged to llama.cpp's cgroup, less than the "
            f"{sizes.file_bytes} bytes of the file: does another process have it mapped?"
        )
    return int(figures["max_usage_bytes"]) - sizes.expert_bytes


def limit_of(share: float, besides: int, sizes: GgufSizes, unlimited: int) -> int:
    """The cgroup's limit, bytes, for ``share`` of the experts in memory."""
    return unlimited if share >= 1 else besides + int(share * sizes.expert_bytes)


def settings_of(share: float) -> list[Setting]:
    """What is tried at a share with one thread.

    Where everything fits, whether to repack. Where not, how much to read ahead (repacked weights
    could not be dropped and read again).
    """
    if share >= 1:
        return [Setting(1, repack=repack) for repack in (True, False)]
    return [
        Setting(1, repack=False, read_ahead_kib=kib) for kib in (None, USUAL_READ_AHEAD_KIB)
    ]


def unlimited_bytes() -> int:
    """All memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
