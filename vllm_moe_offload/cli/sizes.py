"""Amounts on the command line: ``24GiB``, ``24GB``, ``64``."""

from __future__ import annotations

import math

from pydantic import ByteSize, TypeAdapter, ValidationError

from vllm_moe_offload.cli.command import UsageError
from vllm_moe_offload.config import GIB

_BYTES = TypeAdapter(ByteSize)


def parse_memory(option: str, text: str) -> int:
    """Bytes of ``24GiB`` (2**30), ``24GB`` (10**9) or ``24`` (GiB, like ``cache_gb``).

    Raises:
        UsageError: it is no positive size; names option and value.
    """
    try:
        amount = float(text) * GIB if _is_number(text) else float(_BYTES.validate_python(text))
    except ValidationError:
        amount = 0
    if not 1 <= amount < math.inf:
        raise UsageError(
            f"{option}={text}: must be a size such as 24GiB, 24GB or 24 (a number alone is GiB)"
        )
    return int(amount)


def parse_bandwidth(option: str, text: str) -> float:
    """GB/s, 1e9 bytes per second.

    Raises:
        UsageError: it is no positive number; names option and value.
    """
    if not _is_number(text) or not 0 < float(text) < math.inf:
        raise UsageError(f"{option}={text}: must be a number of GB/s above 0, such as 25")
    return float(text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
