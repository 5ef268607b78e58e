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


@dataclass(frozen=True, slots=True)
class Setting:
    """What is chosen for llama.cpp by trial.

    Attributes:
        threads: that compute.
        repack: whether weights may be copied into another layout.
    """

    threads: int
    repack: bool


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


def settings_of(share: float, cores: int) -> list[Setting]:
    """What is tried at a share; repacked weights cannot be dropped and read again."""
    repacks = (True, False) if share >= 1 else (False,)
    return [Setting(n, repack) for n in sorted({1, cores}) for repack in repacks]


def unlimited_bytes() -> int:
    """All memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
