"""Our hooks in each supported vLLM's model runner V2: whose rows are whose, and which nobody's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm.v1.worker.gpu.model_runner as v2
import vllm.v1.worker.gpu_model_runner as v1
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context

from tests.device.late import LateStream
from tests.device.rule_cache import RuleCache
from tests.wheel.v2_runner import (
    MAX_TOKENS,
    Model,
    Request,
    Scheduler,
    Share,
    capture,
    install_doubles,
    made_runner,
    positions_of,
)
from vllm_moe_offload.cache.layout import ExpertLayout, TensorSpec
from vllm_moe_offload.device.followers import Followers
from vllm_moe_offload.device.runtime import DeviceRuntime
from vllm_moe_offload.integration import patches, requests
from vllm_moe_offload.integration.layers.planned_on_device import PlannedOnDevice, RowsOfStep
from vllm_moe_offload.policy.trace import TracePolicy
from vllm_moe_offload.step import StepTokens
from vllm_moe_offload.trace.recorder import TraceRecorder
from vllm_moe_offload.trace.routing import RecordedSchedule, load_trace

LAYERS, EXPERTS, TOP_K, SLOTS = 3, 8, 2, 10
MODES = (
    CUDAGraphMode.NONE,
    CUDAGraphMode.PIECEWISE,
    CUDAGraphMode.FULL,
    CUDAGraphMode.FULL_DECODE_ONLY,
    CUDAGraphMode.FULL_AND_PIECEWISE,
)


@pytest.fixture(autouse=True)
def _hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's runners with our hooks in them; afterwards vLLM's own again."""
    install_doubles(monkeypatch)
    for runner in (v1.GPUModelRunner, v2.GPUModelRunner):
        for name, method in list(vars(runner).items()):
            if callable(method):
                monkeypatch.setattr(runner, name, method)
    patches.install_runner_patches()


class Told:
    """A runtime that remembers what it is told, in order."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.is_dummy = False

    def begin_step(self, tokens: StepTokens) -> None:
        self.events.append(tokens)

    def after_forward(self) -> None:
        self.events.append("after")

    def end_request(self, request: str) -> None:
        self.events.append(request)

    def dummy_run(self) -> Any:
        return DeviceRuntime.dummy_run(self)

    def take(self) -> list[Any]:
        events, self.events = self.events, []
        return events


def serving(mode: CUDAGraphMode, runtime: Any, model: Model) -> Scheduler:
    """A scheduler over a runner that is warm: graphs are captured, and nothing was for real."""
    runner = made_runner(model, mode)
    runner._moe_offload_runtime = runtime
    worker = SimpleNamespace(model_runner=runner)
    requests.warm_up(lambda _: capture(runner), worker)
    return Scheduler(runner)


def steps_of(scheduler: Scheduler) -> Iterator[dict[str, Share]]:
    """Chunks of prompts, decoding of 1, 3 and 5, both in one step, a preemption, ends."""
    one, two, three, four, five = (Request(number, 3 + number) for number in range(1, 6))
    yield scheduler.step((one, 3))
    yield scheduler.step((one, 1), (two, 5))
    yield scheduler.step((one, 1), (two, 1), (three, 6))
    yield scheduler.step((one, 1), (two, 1), (three, 1))
    scheduler.preempt(two)
    yield scheduler.step((three, 1), (one, 1), (four, 4))
    yield scheduler.step((two, two.prompt_len), (four, 3), (five, 8))
    yield scheduler.step((five, 1), (four, 1), (three, 1), (two, 1), (one, 1))
    scheduler.finish(one)
    yield scheduler.step((five, 1), (four, 1), (two, 1))
    scheduler.finish(three)
    yield scheduler.step((two, 1))
    for request in (two, four, five):
        scheduler.finish(request)
    yield scheduler.step()


def shares_of(tokens: StepTokens) -> dict[str, Share]:
    """What a runtime was told, request by request."""
    shares = {}
    for number, name in enumerate(tokens.requests):
        positions = tokens.positions[tokens.request_of_token == number]
        assert positions.tolist() == list(range(positions[0], positions[-1] + 1))
        shares[name] = Share(int(positions[0]), len(positions), bool(tokens.is_prefill[number]))
    return shares


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_a_runtime_is_told_whose_the_rows_are(mode: CUDAGraphMode) -> None:
    rows: list[list[int]] = []
    model, told = Model(lambda ids: rows.append(ids.tolist())), Told()
    scheduler = serving(mode, told, model)
    num_padded, ended = 0, []
    for expected in steps_of(scheduler):
        *before, after = told.take()
        assert after == "after"
        ended += [event for event in before if isinstance(event, str)]
        if not expected:
            assert before == ended[-len(before) :], "no step without tokens"
            continue
        tokens = before[-1]
        assert shares_of(tokens) == expected
        num_tokens = tokens.request_of_token.size
        numbers, positions = positions_of(rows[-1][:num_tokens])
        assert tokens.positions.tolist() == positions.tolist()
        assert [tokens.requests[row] for row in tokens.request_of_token] == [
            f"request-{number}" for number in numbers
        ]
        assert model.padding[-1] == [row >= num_tokens for row in range(len(rows[-1]))]
        num_padded += len(rows[-1]) - num_tokens
    assert (num_padded > 0) == (mode != CUDAGraphMode.NONE)
    assert ended[:2] == ["request-1", "request-3"]
    assert sorted(ended[2:]) == ["request-2", "request-4", "request-5"]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_warm_up_is_nobodys_and_all_padding(mode: CUDAGraphMode) -> None:
    model, told = Model(lambda _: None), Told()
    runner = serving(mode, told, model).runner
    assert bool(model.padding) == (mode != CUDAGraphMode.NONE)
    runner._dummy_run(5)
    assert all(all(padding) for padding in model.padding)
    assert len(model.padding[-1]) >= 5
    assert not any(isinstance(event, StepTokens) for event in told.take())


def test_profiling_routes_for_real() -> None:
    """So state that layer calls keep must not move before a runtime goes live."""
    model = Model(lambda _: None)
    runner = made_runner(model, CUDAGraphMode.NONE)
    runner._moe_offload_runtime = Told()
    runner._dummy_run(MAX_TOKENS, skip_attn=True, is_profile=True)
    assert model.padding == [[False] * MAX_TOKENS]


def test_without_skipped_padding_nothing_says_what_is_padding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Why ``VLLM_MOE_SKIP_PADDING=0`` is refused: what warm-up left stays."""
    monkeypatch.setenv("VLLM_MOE_SKIP_PADDING", "0")
    model = Model(lambda _: None)
    scheduler = serving(CUDAGraphMode.FULL, Told(), model)
    scheduler.step((Request(1, 3), 3))
    assert model.padding[-1] == [True] * 4


class Experts:
    """Offloaded layers on a device that plans, whose experts compute nothing."""

    def __init__(self, late: int, trace: Path) -> None:
        self.cache = RuleCache(
            num_layers=LAYERS,
            num_experts=EXPERTS,
            num_slots=SLOTS,
            top_k=TOP_K,
            max_tokens=MAX_TOKENS,
        )
        layout = ExpertLayout((TensorSpec("w", (4,), "uint8", 4),))
        records = torch.arange(LAYERS * EXPERTS, dtype=torch.uint8)[:, None].repeat(1, 4)
        self._records, self._slots = records, torch.zeros(SLOTS, 4, dtype=torch.uint8)
        self.cache.attach(layout, {"w": self._slots}, records)
        self.policy, self.stream = TracePolicy(LAYERS, EXPERTS), LateStream(late)
        recorder = TraceRecorder(
            trace,
            num_layers=LAYERS,
            num_experts=EXPERTS,
            top_k=TOP_K,
            num_slots=SLOTS,
            num_staging_slots=0,
            limit_bytes=1 << 20,
        )
        self.runtime = DeviceRuntime(
            self.cache,
            Followers(self.policy, None, recorder),
            num_layers=LAYERS,
            num_slots=SLOTS,
            expert_bytes=4,
            is_resident=False,
            record_event=self.stream.record,
        )
        self._calls = PlannedOnDevice(
            self.cache, RowsOfStep(self.runtime.weights), self._check_slots
        )

    def run(self, token_ids: torch.Tensor) -> None:
        for layer in range(LAYERS):
            ids = torch.from_numpy(routed(token_ids.numpy(), layer))
            x = torch.zeros(len(ids), 1)
            self._calls.forward(SimpleNamespace(moe_layer=layer), x, torch.ones(ids.shape), ids)

    def _check_slots(
        self, layer: Any, x: torch.Tensor, _: Any, ids: torch.Tensor, slot_map: Any
    ) -> torch.Tensor:
        """Each live token's experts lie where the call is told that they lie."""
        if self.cache.is_live:
            real = ~self._padding()
            slots = slot_map.of_blocks(ids)[real].long()
            expected = self._records[layer.moe_layer * EXPERTS + ids[real].long()]
            assert torch.equal(self._slots[slots], expected)
        return x

    @staticmethod
    def _padding() -> torch.Tensor:
        return get_forward_context().is_padding


def routed(token_ids: np.ndarray, layer: int) -> np.ndarray:
    """Experts of tokens, ``[tokens, TOP_K]``; padded rows get some as well."""
    first = (token_ids * 5 + layer * 3) % EXPERTS
    return np.stack([first, (first + 1 + token_ids % (EXPERTS - 1)) % EXPERTS], 1).astype(
        np.int32
    )


def served(mode: CUDAGraphMode, late: int, trace: Path) -> Experts:
    """What is left of the steps, once all has arrived."""
    experts = Experts(late, trace)
    scheduler = serving(mode, experts.runtime, Model(experts.run))
    assert experts.cache.pool.misses == 0
    experts.runtime.go_live()
    for _ in steps_of(scheduler):
        pass
    experts.runtime.close()
    return experts


def test_requests_that_warm_up_makes_up_move_nothing(tmp_path: Path) -> None:
    """``v1/worker/gpu/warmup.py`` has them served as if somebody had sent them."""
    experts = Experts(0, tmp_path / "trace.npz")
    model = Model(experts.run)
    scheduler = serving(CUDAGraphMode.NONE, experts.runtime, model)
    worker = SimpleNamespace(model_runner=scheduler.runner)
    requests.warm_up(lambda _: scheduler.step((Request(1, 3), 3)), worker)
    assert model.padding == [[False] * 3]
    assert (experts.cache.pool.hits, experts.cache.pool.misses) == (0, 0)
    experts.runtime.close()
    assert experts.runtime.num_tokens == 0
    assert not (experts.cache.log >= 0).any()


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_matrices_and_trace_are_those_of_a_device_that_is_never_late(
    mode: CUDAGraphMode, late: int, tmp_path: Path
) -> None:
    late_one = served(mode, late, tmp_path / "late.npz")
    prompt = served(CUDAGraphMode.NONE, 0, tmp_path / "prompt.npz")
    expected = prompt.policy.forecast.collection.mean()
    assert expected.any()
    assert np.array_equal(late_one.policy.forecast.collection.mean(), expected)
    assert late_one.cache.pool.hits == prompt.cache.pool.hits > 0
    assert late_one.cache.pool.misses == prompt.cache.pool.misses > 0
    trace, as_expected = load_trace(tmp_path / "late.npz"), load_trace(tmp_path / "prompt.npz")
    for field in dataclasses.fields(RecordedSchedule):
        assert np.array_equal(
            getattr(trace.schedule, field.name), getattr(as_expected.schedule, field.name)
        ), field.name
    assert len(trace.lens) == 5
    for number, (start, length) in enumerate(zip(trace.starts, trace.lens, strict=True), 1):
        tokens = np.array([Request(number, 1).token(it) for it in range(length)])
        by_layer = np.stack([routed(tokens, layer) for layer in range(LAYERS)], 1)
        assert np.array_equal(trace.ids[start : start + length], by_layer), number
