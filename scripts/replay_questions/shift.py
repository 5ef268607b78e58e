"""Hit rates around a change of workload."""

from __future__ import annotations

import numpy as np

from scripts.harness.report import Bar
from scripts.replay_questions.cells import NEVER_LOSES_BY, PLAIN, Row, log
from scripts.synthetic_trace import synthetic_trace
from vllm_moe_offload.replay.run import replay
from vllm_moe_offload.trace.routing import RoutingTrace

SHIFT_REQUESTS = 24
SHIFT_TOKENS = 60
SHIFT_CONCURRENCY = 2
SHIFT_CAPACITY = 0.25
RECOVERED = 0.95
"""Share of the gain from the first requests of a new workload to its last ones at which a
policy counts as recovered."""


def shifted_trace(seed: int) -> tuple[RoutingTrace, int]:
    """Requests of one workload, then as many of another; and the first token of those."""
    before, after = (
        synthetic_trace(
            layers=6,
            requests=SHIFT_REQUESTS,
            tokens=SHIFT_TOKENS,
            topics=2,
            seed=2 * seed + part,
        )
        for part in (0, 1)
    )
    starts = np.concatenate([before.starts, after.starts + len(before.ids)])
    both = RoutingTrace(
        ids=np.concatenate([before.ids, after.ids]),
        starts=starts,
        lens=np.concatenate([before.lens, after.lens]),
        num_experts=before.num_experts,
    )
    return both, len(before.ids)


def shift(seeds: int) -> list[Row]:
    """Hit rates around a change of workload: every expert's popularity is drawn anew.

    ``before`` is that of the last ten requests of the old workload, ``right_after`` that of
    the new one's first ten steps, ``after`` those of each pair of its requests in turn.
    ``recovered_after_requests``: requests of the new workload until a pair reached
    :data:`RECOVERED` of what the second half of them reach.
    """
    found = []
    for seed in range(seeds):
        trace, first = shifted_trace(seed)
        for policy in (*PLAIN, "trace"):
            found.append({"policy": policy, "seed": seed, **recovery(trace, first, policy)})
            log(f"shift: {found[-1]}")
    return found


def recovery(trace: RoutingTrace, first: int, policy: str) -> Row:
    """Hit rates of one policy; ``first``: the first token of the new workload."""
    pair = SHIFT_CONCURRENCY * SHIFT_TOKENS  # tokens
    timeline: list[tuple[int, int]] = [(0, 0)]
    replay(trace, policy, SHIFT_CAPACITY, SHIFT_CONCURRENCY, timeline=timeline)
    totals = np.array(timeline)

    def rate(begin: int, end: int) -> float:
        """Hit rate of the steps that compute the tokens ``[begin, end)``."""
        steps = np.array([begin, end]) // SHIFT_CONCURRENCY
        low, high = totals[np.minimum(steps, len(totals) - 1)]
        return float((high - low)[0] / max((high - low).sum(), 1))

    after = [rate(at, at + pair) for at in range(first, len(trace.ids) - pair, pair)]
    settled = float(np.mean(after[len(after) // 2 :]))
    recovered = next(i for i, value in enumerate(after) if value >= RECOVERED * settled)
    return {
        "before": rate(first - 5 * pair, first),
        "right_after": rate(first, first + 10 * SHIFT_CONCURRENCY),
        "after": after,
        "settled": settled,
        "recovered_after_requests": SHIFT_CONCURRENCY * (recovered + 1),
    }


def bars_of(rows: list[Row]) -> list[Bar]:
    """``trace`` recovers within tens of requests, and to no less than the best plain policy."""
    mine = [row for row in rows if row["policy"] == "trace"]
    slowest = max(row["recovered_after_requests"] for row in mine)
    margins = [
        row["settled"]
        - max(
            other["settled"] for other in rows if other["seed"] == row["seed"] and other != row
        )
        for row in mine
    ]
    return [
        Bar("shift: requests until recovered, slowest", slowest, 20, at_least=False),
        Bar("shift: settled, trace - best plain, worst", min(margins), -NEVER_LOSES_BY),
    ]
