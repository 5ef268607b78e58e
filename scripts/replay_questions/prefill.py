"""Decode hit rates of a request around the long prompt of a neighbour."""

from __future__ import annotations

import numpy as np

from scripts.harness.report import Bar
from scripts.replay_questions.cells import PLAIN, Row, log
from vllm_moe_offload.replay.run import replay_step, unstaged
from vllm_moe_offload.step import StepTokens
from vllm_moe_offload.trace.routing import RoutingTrace

PREFILL_AT, PREFILL_SEEN, PREFILL_TOKENS = 96, 16, 512
"""A neighbour's prompt of so many tokens after so many tokens of a request; hit rates of the
so many tokens before and after it."""
PREFILL_MAY_COST = 0.05


def prefill(trace: RoutingTrace, pairs: int) -> list[Row]:
    """Decode hit rates of a request around the prefill of a neighbour, per policy.

    A request decodes :data:`PREFILL_AT` tokens; then another one reads a prompt of
    :data:`PREFILL_TOKENS` tokens (routed as other requests' tokens are) in one step, and ends;
    the first goes on. A quarter of all experts is cached.
    """
    rows = []
    for policy in (*PLAIN, "trace"):
        hits = np.zeros((2, 2), np.int64)  # before, after: hits, needs
        for pair in range(pairs):
            hits += _around_prefill(trace, policy, pair)
        before, after = (hits[:, 0] / hits[:, 1]).tolist()
        rows.append({"policy": policy, "pairs": pairs, "before": before, "after": after})
        log(f"prefill {policy}: {before:.3f} before, {after:.3f} after")
    return rows


def _around_prefill(trace: RoutingTrace, name: str, pair: int) -> np.ndarray:
    """Hits and needs of ``a``'s decode steps just before and just after, ``[2, 2]``."""
    policy, cache = unstaged(trace, name, 0.25)
    policy.bind(cache)
    long_enough = np.flatnonzero(trace.lens >= PREFILL_AT + PREFILL_SEEN)
    mine = int(trace.starts[long_enough[pair % long_enough.size]])
    generator = np.random.default_rng(pair)
    prompt = generator.integers(0, trace.ids.shape[0] - PREFILL_TOKENS)
    found = np.zeros((2, 2), np.int64)

    def step(places: np.ndarray, tokens: StepTokens) -> tuple[int, int]:
        ids = np.ascontiguousarray(trace.ids[places].transpose(1, 0, 2), np.int32)
        before = cache.count("hits"), cache.count("misses")
        replay_step(policy, cache, tokens, ids)
        hits = cache.count("hits") - before[0]
        return hits, hits + cache.count("misses") - before[1]

    def tokens_of(names: list[str], lengths: list[int], first: list[int]) -> StepTokens:
        is_prefill = np.array([name == "b" for name in names])
        return StepTokens.of_lengths(names, np.array(lengths), np.array(first), is_prefill)

    for position in range(PREFILL_AT):
        counted = step(np.array([mine + position]), tokens_of(["a"], [1], [position]))
        if position >= PREFILL_AT - PREFILL_SEEN:
            found[0] += counted
    tokens = np.append(mine + PREFILL_AT, prompt + np.arange(PREFILL_TOKENS))
    step(tokens, tokens_of(["a", "b"], [1, PREFILL_TOKENS], [PREFILL_AT, 0]))
    policy.end_request("b")
    for position in range(PREFILL_AT + 1, PREFILL_AT + PREFILL_SEEN):
        found[1] += step(np.array([mine + position]), tokens_of(["a"], [1], [position]))
    return found


def bars_of(rows: list[Row]) -> list[Bar]:
    """Decode keeps its experts under ``trace``."""
    lost = {row["policy"]: row["before"] - row["after"] for row in rows}
    name = "prefill: decode hit rate lost to a neighbour's prompt, trace"
    return [Bar(name, lost["trace"], PREFILL_MAY_COST, at_least=False)]
