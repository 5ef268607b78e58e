"""``trace`` without one part at a time."""

from __future__ import annotations

from unittest import mock

from scripts.replay_questions.cells import Row, measure, requests_at
from vllm_moe_offload.cache.planner import PlannerRules
from vllm_moe_offload.policy import TracePolicy
from vllm_moe_offload.trace.routing import RoutingTrace

ABLATION_CELLS = ((1, 0.25), (4, 0.25), (8, 0.25))
ABLATION = {
    "complete": "trace",
    "without the successor model": "trace:value=0",
    "without own history": "trace:history=0",
    "without the slow history": "trace:slow_history=0",
    "without popularity": "trace:popularity=0",
    "without the collection's prior": "trace:prior=0",
    "without the distance to the next visit": "trace:distance_weight=0",
    "without shadows": "trace:fallback=0",
    "without following within a step": "trace:follow=0",
}


def ablation(trace: RoutingTrace, quick: bool) -> list[Row]:
    """``trace`` without one part at a time."""
    rows = []
    for b, capacity in ABLATION_CELLS:
        requests = requests_at(trace, b, quick)
        for part, spec in ABLATION.items():
            rows.append({"part": part, **measure(trace, spec, capacity, b, requests)})
        with mock.patch.object(TracePolicy, "rules", PlannerRules(admission=False)):
            measured = measure(trace, "trace", capacity, b, requests)
        rows.append({"part": "without admission", **measured})
    return rows
