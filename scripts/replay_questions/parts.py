"""``trace`` without one of its parts, taken out from outside.

None of them needs a switch in the product: its constants and methods are replaced for as long as
a replay runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import numpy as np

from vllm_moe_offload.cache.planner import PlannerRules
from vllm_moe_offload.forecast import forecast
from vllm_moe_offload.forecast.forecast import CONSTANT, HALF_LIVES, POPULARITY, PRIOR, Forecast
from vllm_moe_offload.forecast.mixture import Mixture
from vllm_moe_offload.policy import TracePolicy, shadow
from vllm_moe_offload.trace.collection import ActivationCollection

Removal = Callable[[], AbstractContextManager[Any]]

COMPLETE = "complete"


@contextlib.contextmanager
def _forecasts_off(indices: Sequence[int]) -> Iterator[None]:
    """The forecasts of these indices count nothing, and the mixture does not fit them."""
    begin = Forecast.__init__

    def without(self: Forecast, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        self._factors[list(indices)] = 0.0

    with mock.patch.object(Forecast, "__init__", without):
        yield


def _histories(*half_lives: float) -> Removal:
    return lambda: _forecasts_off([HALF_LIVES.index(value) for value in half_lives])


@contextlib.contextmanager
def _popularity() -> Iterator[None]:
    # It also stands in for the history of a request that has none.
    stand_in = mock.patch.object(forecast, "LASTING", CONSTANT)
    with _forecasts_off(range(POPULARITY, PRIOR)), stand_in:
        yield


@contextlib.contextmanager
def _collection() -> Iterator[None]:
    empty = mock.patch.object(ActivationCollection, "add", return_value=-1)
    with _forecasts_off([PRIOR]), empty:
        yield


def _matching() -> AbstractContextManager[Any]:
    """The mean of the collection for every request, instead of the nearest entries."""
    none = (np.zeros(0, np.int64), np.zeros(0, np.float32))
    return mock.patch.object(ActivationCollection, "nearest", return_value=none)


@contextlib.contextmanager
def _distance() -> Iterator[None]:
    begin = TracePolicy.__init__

    def without(self: TracePolicy, layers: int, experts: int, **options: float) -> None:
        begin(self, layers, experts, **options)
        self._unvisited[...] = self._visited_factor = np.float32(1.0)
        self._decay = self._observer.decay = 1.0

    with mock.patch.object(TracePolicy, "__init__", without):
        yield


@contextlib.contextmanager
def _slow_and_popular() -> Iterator[None]:
    stand_in = mock.patch.object(forecast, "LASTING", CONSTANT)
    slow = HALF_LIVES.index(200.0)
    with _forecasts_off([slow, *range(POPULARITY, PRIOR)]), stand_in:
        yield


PARTS: dict[str, Removal] = {
    COMPLETE: contextlib.nullcontext,
    "successor model": lambda: mock.patch.object(forecast, "LARGEST_MODELLED", 0),
    "following within a step": lambda: mock.patch.object(Forecast, "follow", _nothing),
    "own history": _histories(*HALF_LIVES),
    "history of 1 token": _histories(1.0),
    "history of 4 tokens": _histories(4.0),
    "history of 16 tokens": _histories(16.0),
    "history of 200 tokens": _histories(200.0),
    "popularity": _popularity,
    "history of 200 tokens and popularity": _slow_and_popular,
    "collection of activation matrices": _collection,
    "matching with the collection": _matching,
    "learned weights (mixture)": lambda: mock.patch.object(Mixture, "fit", _nothing),
    "distance to the next visit": _distance,
    "fall-back and shadows": lambda: mock.patch.object(shadow, "LARGEST_SHADOWED", 0),
    "admission": lambda: mock.patch.object(TracePolicy, "rules", PlannerRules(admission=False)),
}
"""Name of a part to what takes it out. Without matching, every request gets the collection's
mean; without learned weights, the initial ones stay."""


@contextlib.contextmanager
def _together() -> Iterator[None]:
    going = ("history of 200 tokens", "matching with the collection", "fall-back and shadows")
    with contextlib.ExitStack() as stack:
        for part in going:
            stack.enter_context(PARTS[part]())
        yield


TOGETHER: dict[str, Removal] = {
    "histories of 16 and 200 tokens": _histories(16.0, 200.0),
    "histories of 4, 16 and 200 tokens": _histories(4.0, 16.0, 200.0),
    "history of 200 tokens, matching and shadows": _together,
}
"""Several parts at once: what each alone does not miss, two may not do without."""
REMOVALS = PARTS | TOGETHER


def _nothing(self: object, *args: object) -> None:
    """In place of a method that is left out."""
