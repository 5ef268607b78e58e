"""The ablation takes parts out from outside, counts what a replay counts, and tells it right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scripts.replay_questions import ablation
from scripts.replay_questions.parts import COMPLETE, PARTS, REMOVALS
from scripts.replay_questions.workloads import Cell, Run, alone, cut, matrices, remembering
from scripts.replay_questions.young import replay_counted
from scripts.synthetic_trace import synthetic_trace
from vllm_moe_offload.forecast.forecast import CONSTANT, POPULARITY, PRIOR, VALUE
from vllm_moe_offload.policy import Policy, TracePolicy
from vllm_moe_offload.replay.run import decode_schedule, replay, replay_recorded
from vllm_moe_offload.replay.run import recorded_schedule as recorded
from vllm_moe_offload.trace.routing import RoutingTrace, load_trace

ROOT = Path(__file__).resolve().parents[2]
REPORTS = ("replay_ablation", "replay_together")
TRACES = sorted((ROOT / "benchmarks" / "traces").glob("*.npz"))


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return synthetic_trace(layers=4, experts=16, requests=8, tokens=40, topics=2)


def policy_after(trace: RoutingTrace, b: int = 2) -> TracePolicy:
    """The policy at the end of a replay; what it was is only seen from inside."""
    made: list[Policy] = []
    replay_counted(trace, decode_schedule(trace, b), "trace", 0.25, made.append)
    (policy,) = made
    assert isinstance(policy, TracePolicy)
    return policy


@pytest.mark.parametrize("name", ["lru", "lru-layer", "lfu", "lrfu", "trace"])
def test_hits_are_those_of_a_replay(trace: RoutingTrace, name: str) -> None:
    counted = replay_counted(trace, decode_schedule(trace, 3), name, 0.25)
    result = replay(trace, name, 0.25, 3)
    assert int(counted.hits.sum()) == result.hits
    assert int((counted.needs - counted.hits).sum()) == result.misses


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_hits_are_those_of_a_recorded_replay(path: Path) -> None:
    trace = load_trace(path)
    assert trace.num_requests == 40
    assert trace.schedule is not None
    # No staging slots stand for as many as are needed, as in all figures of the ablation.
    unbounded = replace(trace, schedule=replace(trace.schedule, staging_slots=0))
    counted = replay_counted(trace, recorded(trace), "lrfu", 0.5)
    result = replay_recorded(unbounded, "lrfu", capacity=0.5)
    assert int(counted.hits.sum()) == result.hits


def test_first_tokens_are_counted_apart(trace: RoutingTrace) -> None:
    counted = replay_counted(trace, decode_schedule(trace, 1), "lru", 0.25)
    young = sum(min(int(length), 16) for length in trace.lens)
    assert counted.young_needs == young * trace.num_layers * trace.top_k
    steps = np.concatenate([np.arange(length) < 16 for length in trace.lens])
    assert counted.young_hits == int(counted.hits[steps].sum())


def outcome(trace: RoutingTrace) -> tuple[list[int], list[float]]:
    """Hits per step and last forecasts of ``trace``."""
    made: list[Policy] = []
    counted = replay_counted(trace, decode_schedule(trace, 2), "trace", 0.25, made.append)
    (policy,) = made
    assert isinstance(policy, TracePolicy)
    return counted.hits.tolist(), policy.forecast.scores.reshape(-1).tolist()


@pytest.fixture(scope="module")
def longer() -> RoutingTrace:
    """Enough of a trace for every part to show in it."""
    return synthetic_trace(layers=6, experts=24, requests=8, tokens=60, topics=2)


@pytest.fixture(scope="module")
def whole(longer: RoutingTrace) -> tuple[list[int], list[float]]:
    return outcome(longer)


@pytest.mark.parametrize("part", REMOVALS)
def test_a_part_is_out_while_it_is_out(
    longer: RoutingTrace, whole: tuple[list[int], list[float]], part: str
) -> None:
    with REMOVALS[part]():
        without = outcome(longer)
    assert (without == whole) == (part == COMPLETE)


def test_what_was_out_is_back(
    longer: RoutingTrace, whole: tuple[list[int], list[float]]
) -> None:
    for removal in REMOVALS.values():
        with removal():
            pass
    assert outcome(longer) == whole


@pytest.mark.parametrize(
    ("part", "forecasts"),
    [
        ("own history", range(POPULARITY)),
        ("history of 4 tokens", [1]),
        ("histories of 4 and 16 tokens", [1, 2]),
        ("popularity", range(POPULARITY, PRIOR)),
        ("collection of activation matrices", [PRIOR]),
    ],
)
def test_a_forecast_that_is_out_weighs_nothing(
    trace: RoutingTrace, part: str, forecasts: Iterator[int]
) -> None:
    with REMOVALS[part]():
        weights = policy_after(trace).forecast._mixture.weights
    assert not weights[list(forecasts)].any()
    assert weights[[VALUE, CONSTANT]].any()


def test_other_parts_are_out_as_well(trace: RoutingTrace) -> None:
    with PARTS["successor model"]():
        assert policy_after(trace).forecast.model is None
    with PARTS["collection of activation matrices"]():
        assert not len(policy_after(trace).forecast.collection)
    whole = policy_after(trace)
    assert whole.forecast.model is not None
    assert len(whole.forecast.collection)


def test_a_restarted_server_remembers(trace: RoutingTrace) -> None:
    known = list(matrices(trace, slice(4, None)))
    assert [counts.sum() for counts in known] == [
        length * trace.num_layers * trace.top_k for length in trace.lens[4:]
    ]
    policies: list[Policy] = []

    def prepare(policy: Policy) -> None:
        remembering(known)(policy)
        policies.append(policy)

    schedule = alone(decode_schedule(trace, 1, 4), 2)
    counted = replay_counted(trace, schedule, "trace", 0.25, prepare)
    assert counted.hits.size == trace.lens[2]
    (policy,) = policies
    assert isinstance(policy, TracePolicy)
    assert len(policy.forecast.collection) == len(known)


def test_requests_are_cut(trace: RoutingTrace) -> None:
    short = cut(trace, slice(1, 4), 10)
    assert short.num_requests == 3
    assert short.lens.tolist() == [10, 10, 10]
    assert short.names == trace.names[1:4]


def test_every_cell_is_saved_and_summed_up(trace: RoutingTrace) -> None:
    saved: list[tuple[int, int]] = []
    runs = [Run(trace, decode_schedule(trace, 2), first_step=5)]
    cells = [Cell("a", "one", 0.25, runs, has_young=True), Cell("a", "two", 0.5, runs)]
    parts = [COMPLETE, "successor model"]
    ablation.ablation(
        cells, parts, lambda rows, summary: saved.append((len(rows), len(summary)))
    )
    assert saved == [(4, 4), (6, 4)]


def rows_of(part: str, *margins: float) -> list[dict[str, object]]:
    common = {"workload": "w", "tokens": "all tokens", "part": part}
    return [common | {"cell": i, "margin": margin} for i, margin in enumerate(margins)]


def test_a_part_matters_where_it_moves_the_worst_margin() -> None:
    rows = [
        *rows_of(COMPLETE, 0.010, 0.030),
        *rows_of("mean only", 0.0095, 0.010),
        *rows_of("needed", 0.006, 0.030),
        *rows_of("harmful", 0.020, 0.030),
    ]
    found = {row["part"]: row for row in ablation.summary(rows)}
    assert [found[part]["matters"] for part in ("mean only", "needed", "harmful")] == [
        False,
        True,
        True,
    ]
    assert found["needed"]["worst_change"] == pytest.approx(-0.004)
    assert found["mean only"]["mean_change"] == pytest.approx(-0.01025)
    lines = ablation.markdown(list(found.values())).splitlines()
    verdicts = [line.split("|")[-2].strip() for line in lines if line.startswith("| without")]
    assert verdicts == ["no", "yes", "costs"]


@pytest.mark.parametrize("report", REPORTS)
def test_the_documents_tables_are_those_of_the_reports(report: str) -> None:
    path = ROOT / "benchmarks" / "results" / f"{report}.json"
    tables = ablation.markdown(json.loads(path.read_text())["summary"])
    document = (ROOT / "docs" / "policies.md").read_text()
    assert all(table in document for table in tables.split("\n\n"))
