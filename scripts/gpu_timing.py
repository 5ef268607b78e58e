"""Device time of what is launched, in a captured CUDA graph; without a GPU, of plain calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

Launch = Callable[[], object]

WARM_UPS = 2
HEAD_START_CYCLES = 20_000_000
"""Some ten milliseconds, in which the host launches what is to begin together."""


def call_times_s(launches: Sequence[Launch], device: str, repeats: int) -> list[float]:
    """Seconds of one of ``launches``, on average over all of them; a value per repeat.

    On a GPU all are captured in one graph, one after the other, and a repeat replays it: the host is
    not in what is measured.
    """
    if device != "cuda":
        return [seconds / len(launches) for seconds in _plain_s(launches, repeats)]
    for launch in launches[:WARM_UPS]:  # compiles, which a capture does not allow
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return [seconds / len(launches) for seconds in _replays_s(graph, repeats)]


def _plain_s(launches: Sequence[Launch], repeats: int) -> list[float]:
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        for launch in launches:
            launch()
        found.append(time.perf_counter() - began)
    return found


def _replays_s(graph: torch.cuda.CUDAGraph, repeats: int) -> list[float]:
    for _ in range(WARM_UPS):
        graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found = []
    for _ in range(repeats):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(float(begin.elapsed_time(end)) / 1e3)
    return found


def side_by_side_s(works: Sequence[Launch]) -> list[float]:
    """Seconds of each of ``works`` on a stream of its own, all begun at once. A GPU only."""
    streams = [torch.cuda.Stream() for _ in works]
    begin = torch.cuda.Event(enable_timing=True)
    ends = [torch.cuda.Event(enable_timing=True) for _ in works]
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START_CYCLES)
    begin.record()
    for stream, work, end in zip(streams, works, ends, strict=True):
        stream.wait_event(begin)
        with torch.cuda.stream(stream):
            work()
            end.record(stream)
    torch.cuda.synchronize()
    return [float(begin.elapsed_time(end)) / 1e3 for end in ends]
