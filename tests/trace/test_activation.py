"""Activation matrices of running requests."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_moe_offload.step import StepTokens
from vllm_moe_offload.trace.activation import ExpertTracer

LAYERS, EXPERTS = 2, 5


def rows_of(*parts: tuple[str, int, int, bool]) -> StepTokens:
    """Parts are (request, first position, tokens, is prefill)."""
    names, first, lengths, prefill = zip(*parts, strict=True)
    return StepTokens.of_lengths(
        list(names), np.array(lengths), np.array(first), np.array(prefill, np.bool_)
    )


@pytest.fixture(params=["per layer", "per step"])
def run(request: pytest.FixtureRequest):
    """Feeds one step, in either of the two ways."""

    def feed(tracer: ExpertTracer, tokens: StepTokens, ids: list) -> None:
        table = np.array(ids, np.int32)
        tracer.begin_step(tokens)
        if request.param == "per step":
            tracer.observe_step(table)
        else:
            for layer, layer_ids in enumerate(table):
                tracer.observe(layer, layer_ids)

    return feed


def test_prefill_and_decode_are_counted_apart(run) -> None:
    tracer = ExpertTracer(LAYERS, EXPERTS)
    run(tracer, rows_of(("a", 0, 2, True)), [[[0, 1], [0, 2]], [[3, 4], [3, 1]]])
    run(tracer, rows_of(("a", 2, 1, False)), [[[4, 1]], [[0, 1]]])
    activation = tracer.get("a")
    assert activation.prefill.tolist() == [[2, 1, 1, 0, 0], [0, 1, 0, 2, 1]]
    assert activation.decode.tolist() == [[0, 1, 0, 0, 1], [1, 1, 0, 0, 0]]
    done = activation.progress
    assert (done.num_prefill, done.num_decode, done.high_water) == (2, 1, 3)
    assert activation.counts.sum() == 3 * 2 * 2


def test_every_request_of_a_batch_has_its_own(run) -> None:
    tracer = ExpertTracer(LAYERS, EXPERTS)
    rows = rows_of(("a", 5, 1, False), ("b", 0, 2, True), ("c", 9, 1, False))
    layer = [[0], [1], [1], [2]]
    run(tracer, rows, [layer, layer])
    assert tracer.get("a").decode[0].tolist() == [1, 0, 0, 0, 0]
    assert tracer.get("b").prefill[1].tolist() == [0, 2, 0, 0, 0]
    assert tracer.get("c").decode[1].tolist() == [0, 0, 1, 0, 0]


def test_what_is_computed_again_is_not_counted_again(run) -> None:
    tracer = ExpertTracer(LAYERS, EXPERTS)
    run(tracer, rows_of(("a", 0, 2, True)), [[[0], [1]]] * 2)
    run(tracer, rows_of(("a", 2, 1, False)), [[[2]]] * 2)
    # Preempted: three old positions again, and one new one.
    run(tracer, rows_of(("a", 0, 4, True)), [[[0], [1], [2], [3]]] * 2)
    activation = tracer.get("a")
    assert activation.counts.tolist() == [[1, 1, 1, 1, 0]] * 2
    done = activation.progress
    assert (done.num_prefill, done.num_decode) == (2, 2)


def test_ids_of_no_expert_count_nowhere(run) -> None:
    tracer = ExpertTracer(LAYERS, EXPERTS)
    run(
        tracer,
        rows_of(("a", 0, 2, True), ("b", 0, 1, False)),
        [[[-1, 1], [0, 1], [-1, -1]]] * 2,
    )
    run(tracer, rows_of(("a", 1, 2, True)), [[[2, 2], [-1, 3]]] * 2)  # the first one again
    assert tracer.get("a").prefill.tolist() == [[1, 2, 0, 1, 0]] * 2
    assert not tracer.get("b").counts.any()


def test_positions_from_the_prefix_cache_are_absent_and_known(run) -> None:
    tracer = ExpertTracer(LAYERS, EXPERTS)
    run(tracer, rows_of(("a", 48, 1, True)), [[[0]]] * 2)
    activation = tracer.get("a")
    assert activation.progress.num_cached == 48
    assert activation.counts.sum() == 2


def test_finished_requests_leave() -> None:
    tracer = ExpertTracer(LAYERS, EXPERTS)
    tracer.begin_step(rows_of(("a", 0, 1, False), ("b", 0, 1, False)))
    assert len(tracer) == 2
    assert tracer.end_request("a") is not None
    assert tracer.end_request("a") is None
    assert tracer.get("a") is None
    assert len(tracer) == 1
