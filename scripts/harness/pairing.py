"""Contestants that take turns within every round, and what their figures say."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import numpy as np


def orders(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """The order of every round: each name comes first in its turn."""
    for number in range(rounds):
        first = number % len(names)
        yield [*names[first:], *names[:first]]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def bootstrap_of_median(
    values: Sequence[float], resamples: int = 20_000, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the median, from a fixed seed."""
    rng = np.random.default_rng(0)
    data = np.asarray(values)
    medians = np.median(rng.choice(data, (resamples, data.size)), axis=1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(medians, [tail, 100 - tail])
    return float(low), float(high)
