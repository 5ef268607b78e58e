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

from vllm_moe_offload.cache.planner import PlannerRules
from vllm_moe_offload.forecast import forecast
from vllm_moe_offload.forecast.forecast import (
    CONSTANT,
    HALF_LIVES,
    LASTING,
    POPULARITY,
    PRIOR,
    Forecast,
)
from vllm_moe_offload.forecast.mixture import Mixture
from vllm_moe_offload.policy import TracePolicy, trace
from vllm_moe_offload.trace.collection import ActivationCollection

Removal = Callable[[], AbstractContextManager[Any]]

COMPLETE = "complete"


@contextlib.contextmanager
def _forecasts_off(indices: Sequence[int]) -> Iterator[None]:
    """The forecasts of these indices count nothing, and the mixture does not fit them."""
    begin = Forecast.__init__

    def without(self: Forecast, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        self._active[list(indices)] = False

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


@contextlib.contextmanager
def _slow_popularity() -> Iterator[None]:
    with mock.patch.object(forecast, "LASTING", LASTING - 1), _forecasts_off([LASTING]):
        yield


PARTS: dict[str, Removal] = {
    COMPLETE: contextlib.nullcontext,
    "successor model": lambda: mock.patch.object(forecast, "LARGEST_MODELLED", 0),
    "following within a step": lambda: mock.patch.object(Forecast, "follow", _nothing),
    "own history": _histories(*HALF_LIVES),
    "history of 1 token": _histories(1.0),
    "history of 4 tokens": _histories(4.0),
    "history of 16 tokens": _histories(16.0),
    "popularity": _popularity,
    "collection of activation matrices": _collection,
    "learned weights (mixture)": lambda: mock.patch.object(Mixture, "fit", _nothing),
    "distance to the next visit": lambda: mock.patch.object(trace, "DISTANCE_WEIGHT", 0.0),
    "admission": lambda: mock.patch.object(TracePolicy, "rules", PlannerRules(admission=False)),
}
"""Name of a part to what takes it out. Without learned weights, the initial ones stay."""

TOGETHER: dict[str, Removal] = {
    "histories of 4 and 16 tokens": _histories(4.0, 16.0),
    "popularity of 1000 steps": _slow_popularity,
}
"""Several parts at once, and halves of one: what each alone does not miss, two may not do
without."""
REMOVALS = PARTS | TOGETHER


def _nothing(self: object, *args: object) -> None:
    """In place of a method that is left out."""
