"""Calls are made in order, none before what it needs has arrived."""

from tests.device.late import LateStream
from vllm_moe_offload.device.arrivals import Arrivals


def test_calls_wait_for_their_event_and_for_those_before():
    stream, arrivals, made = LateStream(late=1), Arrivals(), []
    arrivals.after(stream.record(), lambda: made.append("first step"))
    arrivals.then(lambda: made.append("end of a request"))
    arrivals.take_in()
    assert made == []
    arrivals.after(stream.record(), lambda: made.append("second step"))
    arrivals.take_in()
    assert made == ["first step", "end of a request"]
    assert (len(arrivals), stream.num_waits) == (1, 0)


def test_what_needs_no_copy_is_not_put_off():
    arrivals, made = Arrivals(), []
    arrivals.then(lambda: made.append(1))
    arrivals.take_in()
    assert made == [1]


def test_waiting_makes_all_calls():
    stream, arrivals, made = LateStream(late=3), Arrivals(), []
    for number in range(3):
        arrivals.after(stream.record(), lambda number=number: made.append(number))
    arrivals.wait_for_all()
    assert (made, stream.num_waits) == ([0, 1, 2], 3)
