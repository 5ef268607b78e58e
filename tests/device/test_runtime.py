"""What the runtime of a device tells its followers and other processes, however late copies are."""

import numpy as np
import pytest
import torch

from tests.device.late import LateStream
from vllm_moe_offload.device.followers import Followers
from vllm_moe_offload.device.rule import fixed_point
from vllm_moe_offload.device.runtime import LOGS, DeviceRuntime
from vllm_moe_offload.metrics import VALUES, Counters
from vllm_moe_offload.policy.trace import TracePolicy
from vllm_moe_offload.step import StepTokens
from vllm_moe_offload.trace.recorder import TraceRecorder
from vllm_moe_offload.trace.routing import load_trace

LAYERS, EXPERTS, TOP_K, SLOTS, TOKENS = 3, 8, 2, 10, 32


class Device:
    """Tensors that a step of the device leaves, and when the host sees copies of them."""

    def __init__(self, late: int = 0):
        self.live = torch.zeros(1, dtype=torch.int32)
        self.log = torch.full((TOKENS, LAYERS, TOP_K), -1, dtype=torch.int16)
        self.counters = torch.zeros(2, dtype=torch.int64)
        self.stream = LateStream(late)

    def run(self, ids, hits, misses):
        """A step computes: ids ``[tokens, layers, top_k]``."""
        self.log[: len(ids)] = torch.from_numpy(ids)
        self.counters += torch.tensor([hits, misses])


def runtime_of(device, followers=None, **options):
    settings = {"num_layers": LAYERS, "num_slots": SLOTS, "expert_bytes": 100}
    return DeviceRuntime(
        device,
        Followers() if followers is None else followers,
        **settings,
        is_resident=options.pop("is_resident", False),
        record_event=device.stream.record if device is not None else None,
        **options,
    )


def step_of(requests, lengths, positions, is_prefill=None):
    flags = np.zeros(len(requests), bool) if is_prefill is None else np.array(is_prefill)
    return StepTokens.of_lengths(requests, np.array(lengths), np.array(positions), flags)


def random_ids(generator, num_tokens):
    return np.stack(
        [
            [generator.permutation(EXPERTS)[:TOP_K] for _ in range(LAYERS)]
            for _ in range(num_tokens)
        ]
    ).astype(np.int16)


def serve(runtime, device):
    """Two requests, of which the first ends when the second goes on: as a scheduler would."""
    generator = np.random.default_rng(3)
    runtime.go_live()
    for number in range(8):
        if number == 5:
            runtime.end_request("a")
        if number < 5:
            lengths = [4, 2] if number == 0 else [1, 1]
            positions = [0, 0] if number == 0 else [3 + number, 1 + number]
            tokens = step_of(["a", "b"], lengths, positions, [number == 0] * 2)
        else:
            tokens = step_of(["b"], [1], [1 + number])
        runtime.begin_step(tokens)
        ids = random_ids(generator, tokens.request_of_token.size)
        device.run(ids, hits=2, misses=3)
        runtime.after_forward()
    runtime.end_request("b")
    runtime.after_forward()  # nothing is scheduled any more


@pytest.mark.parametrize("late", [0, 1, 2, 7])
def test_matrices_and_trace_do_not_depend_on_when_logs_arrive(tmp_path, late):
    def kept(late, name):
        device, policy = Device(late), TracePolicy(LAYERS, EXPERTS)
        recorder = TraceRecorder(
            tmp_path / name,
            num_layers=LAYERS,
            num_experts=EXPERTS,
            top_k=TOP_K,
            num_slots=SLOTS,
            num_staging_slots=0,
            limit_bytes=1 << 20,
        )
        runtime = runtime_of(device, Followers(policy, None, recorder))
        serve(runtime, device)
        runtime.close()
        return policy.forecast.collection.mean(), load_trace(tmp_path / name)

    mean, trace = kept(late, "late.npz")
    expected_mean, expected_trace = kept(0, "prompt.npz")
    assert np.array_equal(mean, expected_mean)
    assert mean.any()
    assert np.array_equal(trace.ids, expected_trace.ids)
    assert trace.lens.tolist() == [8, 9]


def test_counters_are_shown_at_the_end_of_requests_and_when_nothing_is_left():
    device, published = Device(late=1), Counters({})
    runtime = runtime_of(device, published=published)
    shown = dict(zip(VALUES, published.values, strict=True))
    assert (shown["slots"], shown["cache_bytes"], shown["hits"]) == (SLOTS, SLOTS * 100, 0)
    serve(runtime, device)
    shown = dict(zip(VALUES, published.values, strict=True))
    assert shown["hits"] == 8 * 2
    assert shown["misses"] == 8 * 3
    assert shown["read_bytes"] == 8 * 3 * 100
    assert shown["resident_experts"] == SLOTS
    assert shown["evictions"] == 8 * 3 - SLOTS
    assert shown["calls"] == 8 * LAYERS
    assert shown["tokens"] == 6 + 8 + 3


def test_host_does_not_wait_while_there_is_something_to_compute():
    device = Device(late=LOGS - 1)
    runtime = runtime_of(device, Followers(TracePolicy(LAYERS, EXPERTS)))
    for number in range(10):
        runtime.begin_step(step_of(["a"], [1], [number]))
        runtime.after_forward()
    assert device.stream.num_waits == 0


def test_a_log_is_never_overwritten_before_it_was_looked_at():
    device, policy = Device(late=LOGS + 4), TracePolicy(LAYERS, EXPERTS)
    runtime = runtime_of(device, Followers(policy))
    for number in range(10):
        runtime.begin_step(step_of(["a"], [1], [number]))
        device.run(np.full((1, LAYERS, TOP_K), number % EXPERTS, np.int16), 0, 0)
        runtime.after_forward()
    assert device.stream.num_waits > 0, "there are as many logs as at the start"
    runtime.end_request("a")
    runtime.close()
    counts = policy.forecast.collection.mean()
    assert np.array_equal(counts > 0, np.ones((LAYERS, EXPERTS), bool))


def test_votes_go_to_the_device_before_the_step():
    device = Device()
    runtime = runtime_of(device)
    tokens = step_of(["a", "b"], [3, 1], [0, 4])
    runtime.begin_step(tokens)
    assert runtime.weights[:4].tolist() == fixed_point(tokens.weights).tolist()
    runtime.begin_step(step_of(["b"], [1], [5]))
    assert runtime.weights[0] == fixed_point(np.ones(1, np.float32))[0]


def test_dummy_runs_are_nobodys():
    device, policy = Device(), TracePolicy(LAYERS, EXPERTS)
    runtime = runtime_of(device, Followers(policy))
    with runtime.dummy_run():
        runtime.begin_step(step_of(["_dummy_req_0"], [1], [0]))
        runtime.after_forward()
        runtime.verify({})
        runtime.end_request("_dummy_req_0")
    assert runtime.num_tokens == 0
    assert device.live.item() == 0
    runtime.go_live()
    assert device.live.item() == 1


def test_a_step_that_failed_is_left_out():
    device = Device()
    runtime = runtime_of(device)
    runtime.begin_step(step_of(["a"], [1], [0]))  # and its forward pass raises
    runtime.begin_step(step_of(["b"], [1], [0]))
    runtime.after_forward()
    assert runtime.num_tokens == 1


def test_resident_experts_are_all_there_and_count_steps():
    published = Counters({})
    runtime = runtime_of(None, is_resident=True, published=published)
    runtime.begin_step(step_of(["a"], [2], [0]))
    runtime.after_forward()
    runtime.end_request("a")
    runtime.after_forward()
    shown = dict(zip(VALUES, published.values, strict=True))
    assert (shown["resident_experts"], shown["hits"], shown["misses"]) == (SLOTS, 0, 0)
    assert (shown["calls"], shown["tokens"]) == (LAYERS, 2)


def test_closes_each_part_and_tells_all_errors():
    class Refuses:
        def close(self):
            raise OSError("disk is full")

    released = []
    device = Device()
    followers = Followers()
    followers.closers = lambda: [Refuses().close, Refuses().close]
    runtime = runtime_of(device, followers, release=lambda: released.append(1))
    with pytest.raises(ExceptionGroup) as group:
        runtime.close()
    assert [str(error) for error in group.value.exceptions] == ["disk is full"] * 2
    assert released == [1]
    runtime.close()
    assert released == [1]


def test_unverified_guesses_are_no_tokens():
    device = Device()
    runtime = runtime_of(device)
    tokens = StepTokens.of_lengths(
        ["a"], np.array([3]), np.array([5]), np.zeros(1, bool), np.array([2], np.int32)
    )
    runtime.begin_step(tokens)
    runtime.after_forward()
    runtime.verify({"a": 7})  # of two guesses at 6 and 7 the first was right
    runtime.after_forward()
    assert runtime.num_tokens == 2
