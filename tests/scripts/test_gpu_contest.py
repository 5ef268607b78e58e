"""A contestant's repeats: what warms up, what counts, what is noted. Engine and Triton are fakes."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from scripts import gpu_contest as contest
from scripts.gpu_plan import Workload
from vllm_moe_offload.device.runtime import DeviceRuntime

WORKLOAD = Workload("decode-2", batch=2, prompt_tokens=3, new_tokens=4, repeats=3)


class Engine:
    """Gives every request a token per step; the steps of some repeats compile kernels."""

    def __init__(self, compiles: dict[int, int], compilations: Any) -> None:
        self.compiles, self.compilations = compiles, compilations
        self.running: dict[str, int] = {}
        self.prompts: list[tuple[int, ...]] = []

    def add_request(self, name: str, prompt: dict[str, list[int]], _: Any) -> None:
        self.running[name] = 0
        self.prompts.append(tuple(prompt["prompt_token_ids"]))
        repeat = int(name.split("-")[2])
        self.compilations.count += self.compiles.pop(repeat, 0)

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def step(self) -> list[Any]:
        outputs = []
        for name in list(self.running):
            self.running[name] += 1
            ids = list(range(self.running[name]))
            outputs.append(
                SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=ids)])
            )
            if self.running[name] == WORKLOAD.new_tokens:
                del self.running[name]
        return outputs


@pytest.fixture
def findings(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the workload with compilations in some repeats; what was noted."""
    vllm = ModuleType("vllm")
    vllm.SamplingParams = lambda **_: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)

    def run(compiles: dict[int, int], deadline: float = float("inf")) -> list[dict[str, Any]]:
        compilations: Any = SimpleNamespace(count=7)
        engine = Engine(dict(compiles), compilations)
        words: dict[str, int] = {}
        tokenizer = SimpleNamespace(
            encode=lambda text: [words.setdefault(word, len(words)) for word in text.split()]
        )
        llm = SimpleNamespace(llm_engine=engine, get_tokenizer=lambda: tokenizer)
        noted: list[dict[str, Any]] = []
        contest.run_workload(
            llm,
            WORKLOAD,
            SimpleNamespace(read=lambda: lambda: None),  # type: ignore[arg-type]
            compilations,
            deadline=deadline,
            note=lambda kind, **finding: noted.append({"kind": kind, **finding}),
        )
        assert len(set(engine.prompts)) == len(engine.prompts)  # no repeat sees another's
        return noted

    return run


def outline(noted: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """Kind, repeat and what was compiled."""
    rows = []
    for finding in noted:
        found = finding.get("sample", finding)
        rows.append((finding["kind"], found["repeat"], found["compiled"]))
    return rows


def test_the_first_repeat_warms_up_whether_it_compiles_or_not(findings: Any) -> None:
    for compiled in (0, 5):
        assert outline(findings({0: compiled})) == [
            ("warm-up", 0, compiled),
            *[("sample", repeat, 0) for repeat in (1, 2, 3)],
        ]


def test_a_repeat_that_compiled_does_not_count_and_is_done_again(findings: Any) -> None:
    assert outline(findings({1: 2, 3: 1})) == [
        ("warm-up", 0, 0),
        ("warm-up", 1, 2),
        ("sample", 2, 0),
        ("warm-up", 3, 1),
        ("sample", 4, 0),
        ("sample", 5, 0),
    ]


def test_what_compiles_all_the_time_is_measured_in_the_end_and_says_so(findings: Any) -> None:
    noted = findings(dict.fromkeys(range(100), 4))
    warm_ups = contest.WARM_UPS + contest.MOST_EXTRA_WARM_UPS
    assert outline(noted) == [
        *[("warm-up", repeat, 4) for repeat in range(warm_ups)],
        *[("sample", warm_ups + repeat, 4) for repeat in range(WORKLOAD.repeats)],
    ]


def test_time_that_is_over_says_how_many_repeats_count(findings: Any) -> None:
    (short,) = findings({}, deadline=0.0)
    assert (short["kind"], short["measured"]) == ("short", 0)
    assert short["asked"]["repeats"] == 3


# ---- what is asked for -----------------------------------------------------------------


def test_words_of_any_topic_are_the_same_for_every_contestant() -> None:
    """With vLLM's own parameters, which it looks at again when a request is added."""
    pytest.importorskip("vllm")
    any_topic = replace(WORKLOAD, any_topic=True)
    assert contest.sampling_of(WORKLOAD, 0, 1).temperature == 0.0
    asked = [contest.sampling_of(any_topic, repeat, n) for repeat in (0, 1) for n in (0, 1)]
    assert {request.temperature for request in asked} == {contest.ANY_TOPIC_TEMPERATURE}
    assert [request.seed for request in asked] == [0, 1, 2, 3]
    assert asked[0].clone() == asked[0]  # as vLLM does with every request


# ---- counters --------------------------------------------------------------------------


class Runtime(DeviceRuntime):
    """With what the benchmark looks at, and nothing else."""

    def __init__(self, cache: Any, *, is_resident: bool) -> None:
        self._cache, self._is_resident = cache, is_resident
        self._num_steps, self._follow_ns = 7, 2_000_000_000


def counters_of(runtime: Any) -> contest.Counters:
    counters = contest.Counters.__new__(contest.Counters)
    counters.runtime = runtime
    return counters


def test_what_a_device_counts_is_what_it_had_counted_when_it_was_asked() -> None:
    cache = SimpleNamespace(counters=torch.tensor([5, 3]))
    counters = counters_of(Runtime(cache, is_resident=False))
    reading = counters.read()
    cache.counters += 100  # steps that were launched later
    counters.runtime._num_steps += 1
    expected = {"hits": 5, "misses": 3, "prefetch_useful": 0, "policy_s": 2.0, "steps": 7}
    assert reading() == expected
    assert counters.way == "device"


def test_who_plans_is_told() -> None:
    resident = counters_of(Runtime(None, is_resident=True))
    assert resident.way == "resident"
    assert resident.read()()["misses"] == 0  # type: ignore[index]
    assert counters_of(SimpleNamespace()).way == "host"
    assert counters_of(None).way is None
    assert counters_of(None).read()() is None


# ---- the counter of compilations -------------------------------------------------------


def fake_triton(monkeypatch: pytest.MonkeyPatch, runtime: Any) -> Any:
    """A module in the place of Triton."""
    triton = ModuleType("triton")
    if runtime is not None:
        triton.knobs = SimpleNamespace(runtime=runtime)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", triton)
    return runtime


def test_compilations_are_counted_and_hooks_before_are_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def before(**event: Any) -> str:
        seen.append(event)
        return "kept"

    runtime = fake_triton(monkeypatch, SimpleNamespace(jit_post_compile_hook=before))
    compilations = contest.Compilations()
    assert compilations.is_counted
    assert runtime.jit_post_compile_hook(fn="kernel") == "kept"
    assert runtime.jit_post_compile_hook(fn="kernel") == "kept"
    assert compilations.count == 2
    assert seen == [{"fn": "kernel"}] * 2


def test_a_triton_without_hooks_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = fake_triton(monkeypatch, SimpleNamespace(jit_post_compile_hook=None))
    compilations = contest.Compilations()
    assert runtime.jit_post_compile_hook(fn="kernel") is None
    assert compilations.count == 1


@pytest.mark.parametrize("runtime", [None, SimpleNamespace()])
def test_an_old_triton_cannot_tell(monkeypatch: pytest.MonkeyPatch, runtime: Any) -> None:
    fake_triton(monkeypatch, runtime)
    assert not contest.Compilations().is_counted


def test_without_triton_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    compilations = contest.Compilations()
    assert compilations.is_counted
    assert compilations.count == 0


# ---- memory ----------------------------------------------------------------------------


def test_host_memory_as_linux_tells_it() -> None:
    status = (
        "Name:\tpython\nVmHWM:\t 30 kB\nVmRSS:\t 20 kB\nRssAnon:\t 9 kB\nRssShmem:\t 1 kB\n"
    )
    assert contest.host_memory(status) == {
        "host_anonymous_bytes": 9 << 10,
        "host_shared_bytes": 1 << 10,
        "host_peak_bytes": 30 << 10,
        "host_resident_bytes": 20 << 10,
    }


def test_a_system_that_tells_less() -> None:
    found = contest.host_memory("Name:\tpython\nVmSize:\t 99 kB\nVmRSS:\t 20 kB\n")
    assert found.pop("host_resident_bytes") == 20 << 10
    assert set(found.values()) == {None}
