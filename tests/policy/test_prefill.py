"""A neighbour's long prompt does not flush what a decoding request uses."""

from __future__ import annotations

import pytest

from scripts.replay_questions import prefill
from scripts.synthetic_trace import synthetic_trace


@pytest.fixture
def lost(monkeypatch) -> dict[str, float]:
    """Hit rate that a request loses to a neighbour's prompt, by policy."""
    monkeypatch.setattr(prefill, "PREFILL_AT", 60)
    monkeypatch.setattr(prefill, "PREFILL_SEEN", 8)
    monkeypatch.setattr(prefill, "PREFILL_TOKENS", 128)
    trace = synthetic_trace(layers=6, experts=32, top_k=2, requests=8, tokens=90, seed=3)
    rows = prefill.prefill(trace, 8)
    return {row["policy"]: row["before"] - row["after"] for row in rows}


def test_decode_keeps_its_experts(lost: dict[str, float]) -> None:
    assert lost["trace"] < 0.05
    assert lost["lru"] > lost["trace"] + 0.1  # what there is to lose
