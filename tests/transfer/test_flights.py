"""The states of a flight: every way there is, and none besides."""

from __future__ import annotations

import itertools
import re

import pytest

from vllm_moe_offload.transfer import State, TransferError, flights
from vllm_moe_offload.transfer.flights import Flight, Flights, raise_for_errors

WAYS = {
    "WAITING": {"READING", "COPYING", "DROPPED"},
    "READING": {"WAITING", "LANDED", "FAILED", "UNWANTED", "DROPPED"},
    "UNWANTED": {"READING", "LANDED", "DROPPED"},
    "COPYING": {"LANDED"},
    "LANDED": set(),
    "FAILED": set(),
    "DROPPED": set(),
}
"""As the picture in flights.py has them."""


@pytest.mark.parametrize(("before", "after"), itertools.product(State, State))
def test_no_way_that_the_picture_does_not_have(before, after):
    flight = Flight(1, 2, 3, is_prefetch=True, state=before)
    if after.name in WAYS[before.name]:
        flight.enter(after)
        assert flight.state is after
        return
    with pytest.raises(
        RuntimeError, match=f"expert 2 of layer 1.*{before.name} to {after.name}"
    ):
        flight.enter(after)
    assert flight.state is before


def test_the_picture_shows_every_state():
    assert set(re.findall(r"[A-Z]{4,}", flights.__doc__)) == {state.name for state in State}


def test_what_ended_is_what_no_way_leads_out_of():
    for state in State:
        assert Flight(0, 0, 0, is_prefetch=False, state=state).has_ended == (
            not WAYS[state.name]
        )


def test_a_prefetch_is_reported_once_and_a_demand_never():
    register = Flights(Flight, 1, 4, 4)
    (demand,) = register.register([(0, 0, 0)], is_prefetch=False)
    (prefetch,) = register.register([(0, 1, 1)], is_prefetch=True)
    for flight in (demand, prefetch):
        flight.enter(State.READING)
        register.end(flight, State.LANDED)
    assert register.report() == [prefetch]
    assert register.report() == []
    with pytest.raises(ValueError, match="slot 1 is not in flight"):
        register.prefetch_into(1)
    with pytest.raises(ValueError, match="slot 0 is in flight for a demand"):
        register.prefetch_into(0)


def test_only_failures_are_errors():
    ends = [State.LANDED, State.FAILED, State.DROPPED, State.FAILED]
    several = [
        Flight(0, e, e, is_prefetch=False, state=state, error=f"no {e}")
        for e, state in enumerate(ends)
    ]
    raise_for_errors(several[::2])
    with pytest.raises(TransferError, match=r"^no 1 \(2 of 4 experts failed"):
        raise_for_errors(several)
