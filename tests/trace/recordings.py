"""Recorders, and steps of servers that tell who they are of."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vllm_moe_offload.step import StepTokens
from vllm_moe_offload.trace.recorder import TraceRecorder

LAYERS, EXPERTS, TOP_K = 2, 8, 2


def recorder(path: Path, **changes: int) -> TraceRecorder:
    options = {
        "num_layers": LAYERS,
        "num_experts": EXPERTS,
        "top_k": TOP_K,
        "num_slots": 5,
        "num_staging_slots": 3,
        "limit_bytes": 1 << 20,
    }
    return TraceRecorder(path, **(options | changes))


def ids_of(request: int, position: int, again: int = 0) -> list[list[int]]:
    """A routing that tells who it is: ``[layers, top_k]``."""
    return [
        [
            (request + position + layer) % EXPERTS,
            (request + position + layer + 1 + again) % EXPERTS,
        ]
        for layer in range(LAYERS)
    ]


def step(
    target: TraceRecorder,
    *parts: tuple[str, int, int, bool],
    again: int = 0,
    layers: int = LAYERS,
    drafted: tuple[int, ...] | None = None,
) -> None:
    """Parts are (request, first position, tokens, is prefill)."""
    names, first, lengths, prefill = zip(*parts, strict=True)
    num_drafted = None if drafted is None else np.array(drafted, np.int32)
    tokens = StepTokens.of_lengths(
        list(names), np.array(lengths), np.array(first), np.array(prefill), num_drafted
    )
    table = np.array(
        [
            ids_of(ord(names[request][0]), int(position), again)
            for request, position in zip(tokens.request_of_token, tokens.positions, strict=True)
        ],
        np.int32,
    ).transpose(1, 0, 2)
    target.begin_step(tokens)
    for layer in range(layers):
        target.observe(layer, table[layer])
    if layers == LAYERS:
        target.end_step()
