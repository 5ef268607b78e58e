"""Why a model cannot be served on a machine, and what would do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from vllm_moe_offload.config import GIB
from vllm_moe_offload.plan.machine import UTILIZATION, Machine
from vllm_moe_offload.plan.shapes.base import ModelShape
from vllm_moe_offload.plan.shapes.kernel_form import Platform, place, refusals


@dataclass(frozen=True, slots=True)
class Problem:
    """Why it cannot work, and what would."""

    text: str
    remedy: str


def amount(nbytes: float) -> str:
    """``12.34 GiB``, or ``12.3 MiB`` of small amounts."""
    if nbytes < GIB / 10:
        return f"{nbytes / (1 << 20):.1f} MiB"
    return f"{nbytes / GIB:,.2f} GiB"


def round_up_memory(served_bytes: int) -> int:
    """Memory of which a server takes so much, in tenths of a GiB."""
    return math.ceil(served_bytes / UTILIZATION / GIB * 10 + 1e-6) * GIB // 10


def model_problems(shape: ModelShape) -> Iterator[Problem]:
    """Why a checkpoint is not served on any machine."""
    if shape.format is None:
        yield Problem(
            f"the experts are quantised to what is not served: {shape.refusal}",
            "a checkpoint of the same model in a format of the table",
        )


def platform_problems(shape: ModelShape, machine: Machine) -> Iterator[Problem]:
    """Why its experts are not served on such a machine."""
    if shape.format is None:
        return
    for refusal in refusals(shape.format, machine.platform, shape.expert):
        elsewhere: Platform = "cpu" if machine.has_gpu else "cuda"
        remedy = "a checkpoint of the same model in a format of the table"
        if not any(refusals(shape.format, elsewhere, shape.expert)):
            remedy = f"a {place(elsewhere)}, or {remedy}"
        yield Problem(f"not served: {refusal}", remedy)


def memory_problems(machine: Machine, least: int, exact: int, build: int) -> Iterator[Problem]:
    """Why a machine has too little memory.

    Args:
        machine: the machine.
        least: bytes of fast memory without which a rank does not start.
        exact: bytes of fast memory with which a layer's experts fit.
        build: bytes of host memory while a rank builds its store.
    """
    option = "--device-memory" if machine.has_gpu else "--host-memory"
    if machine.fast_bytes < least:
        of_all = f"{UTILIZATION:.0%} of {option}{_for_one_of(machine.fast_ranks)}"
        yield Problem(
            f"{amount(machine.fast_bytes)} of fast memory ({of_all}) do not "
            "hold the dense weights, the KV cache, vLLM itself and the experts of one token in one "
            f"layer: {amount(least)}",
            f"{option} {amount(round_up_memory(least * machine.fast_ranks))} at least; "
            f"{amount(round_up_memory(exact * machine.fast_ranks))} for exact output (one layer's "
            "experts)",
        )
    if machine.store_memory_bytes < build:
        yield Problem(
            f"the first start takes {amount(build)} of host memory to build the store (two or three "
            f"layers at a time); {amount(machine.store_memory_bytes)} are there"
            f"{_for_one_of(machine.ranks)}",
            f"--host-memory {amount(round_up_memory(build * machine.ranks))} at least",
        )


def _for_one_of(ranks: int) -> str:
    return "" if ranks == 1 else f", for one of {ranks} ranks"
