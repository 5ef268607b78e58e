"""What is read ahead, in which order, and what is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.runtimes import (
    EXPERTS,
    LAYERS,
    Foresight,
    decode_tokens,
    ids_of,
    run_layer,
    runtime_of,
)
from tests.stores import build, layout_of
from vllm_moe_offload.forecast.predictor import LIKELY
from vllm_moe_offload.transfer import State
from vllm_moe_offload.transfer.prefetch import MOST_IN_FLIGHT, Prefetcher


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build(tmp_path_factory.mktemp("prefetch"), layout_of(8192, 12), LAYERS, EXPERTS)


@pytest.fixture
def serving(store, monkeypatch):
    """A runtime, what it foresees, and a list of the prefetches issued."""
    foresight = Foresight()
    runtime = runtime_of(store, 12, 2, predictor=foresight)
    issued: list[tuple[int, int]] = []
    transfer = runtime.prefetcher._transfer
    original = transfer.prefetch

    def prefetch(requests: list) -> int:
        issued.extend((layer, expert) for layer, expert, _ in requests)
        return original(requests)

    monkeypatch.setattr(transfer, "prefetch", prefetch)
    runtime.begin_step(decode_tokens(["a"]))
    yield runtime, foresight, issued
    runtime.close()


def test_the_nearest_layer_and_the_most_likely_first(serving, store) -> None:
    runtime, foresight, issued = serving
    runtime.prefetcher.measured(read_ns=1, compute_ns=100)
    foresight.likely[1, [2, 3]] = [0.7, 0.9]
    foresight.likely[2, 4] = 1.0
    run_layer(runtime, store, 0, ids_of(0, 1))
    assert issued == [(1, 3), (1, 2), (2, 4)]


def test_what_is_unlikely_is_not_read(serving, store) -> None:
    runtime, foresight, issued = serving
    foresight.likely[...] = LIKELY - 0.01
    run_layer(runtime, store, 0, ids_of(0, 1))
    assert issued == []


def test_the_budget_follows_from_measured_times(serving, store) -> None:
    runtime, foresight, issued = serving
    foresight.likely[1] = 0.9
    run_layer(runtime, store, 0, ids_of(0, 1))
    assert len(issued) == 1  # nothing was measured yet
    runtime.prefetcher.settle()
    for read_ns, compute_ns, most in ((10, 35, 5), (10, 1e6, MOST_IN_FLIGHT), (1e6, 10, 2)):
        prefetcher = Prefetcher(
            runtime.cache, runtime.prefetcher._transfer, runtime.policy, foresight
        )
        prefetcher.measured(read_ns=read_ns, compute_ns=compute_ns)
        assert prefetcher._budget() == most


def test_only_reads_count_against_the_budget(serving, store) -> None:
    """The reference implementation counts experts that are resident as well."""
    runtime, foresight, issued = serving
    run_layer(runtime, store, 0, ids_of(0, 1))
    run_layer(runtime, store, 1, ids_of(2, 3))
    run_layer(runtime, store, 2, ids_of(0, 1))
    run_layer(runtime, store, 3, ids_of(0, 1))
    foresight.likely[1, [2, 3]] = 0.95
    foresight.likely[1, [4, 5]] = 0.9
    runtime.prefetcher.measured(read_ns=100, compute_ns=1)
    runtime.begin_step(decode_tokens(["a"], 2))
    run_layer(runtime, store, 0, ids_of(0, 1))
    assert issued == [(1, 4), (1, 5)]


def test_no_expert_is_read_twice(serving, store) -> None:
    runtime, foresight, issued = serving
    runtime.prefetcher.measured(read_ns=1, compute_ns=100)
    foresight.likely[2, 5] = 0.9
    run_layer(runtime, store, 0, ids_of(0, 1))
    run_layer(runtime, store, 1, ids_of(0, 1))
    run_layer(runtime, store, 2, ids_of(5, 6))
    assert issued == [(2, 5)]
    assert runtime.cache.count("prefetch_useful") + runtime.cache.count("prefetch_late") == 1


def test_a_failed_prefetch_is_a_warning_and_the_need_reads_again(
    serving, store, monkeypatch, caplog
) -> None:
    runtime, foresight, _ = serving
    foresight.likely[1, 4] = 0.9
    run_layer(runtime, store, 0, ids_of(0, 1))
    transfer = runtime.prefetcher._transfer
    transfer.drain()
    ended = transfer.poll()
    failed = [replace(flight, state=State.FAILED, error="bad sector") for flight in ended]
    monkeypatch.setattr(transfer, "poll", lambda: failed)
    monkeypatch.setattr(type(transfer), "has_news", True)
    runtime.prefetcher.collect()
    assert "bad sector" in caplog.text
    assert not runtime.cache.is_resident(1, 4)
    monkeypatch.undo()
    run_layer(runtime, store, 1, ids_of(4, 5))


def test_drops_what_its_layer_did_not_need(serving, store) -> None:
    runtime, foresight, _ = serving
    runtime.prefetcher.measured(read_ns=1, compute_ns=100)
    foresight.likely[1, 4:] = 0.9
    run_layer(runtime, store, 0, ids_of(0, 1))
    run_layer(runtime, store, 1, ids_of(0, 1))
    runtime.prefetcher.settle()
    assert not runtime.prefetcher._flights
    resident = np.argwhere(runtime.cache.page_table >= 0)
    for layer, expert in resident.tolist():
        assert runtime.cache.is_resident(layer, expert)
    assert runtime.cache.page_table.shape == (LAYERS, EXPERTS)


def test_dropping_all_leaves_no_slot_in_flight(serving, store) -> None:
    runtime, foresight, issued = serving
    prefetcher, cache = runtime.prefetcher, runtime.cache
    prefetcher.measured(read_ns=1, compute_ns=100)
    foresight.likely[1, 2:] = 0.9
    run_layer(runtime, store, 0, ids_of(0, 1))
    assert len(issued) > 2
    prefetcher.drop_all()
    assert not prefetcher._flights
    assert not runtime._transfer.has_news
    # What was cut short is absent, what was not has its bytes: a need finds both out.
    for first in range(2, EXPERTS, 2):
        run_layer(runtime, store, 1, ids_of(first, first + 1))
    assert cache.count("prefetch_late") == 0
