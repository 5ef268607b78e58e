"""Where decode steps of `trace` spend their time, layer by layer: host and device.

    python scripts/gpu_profile.py --parts qwen3-30b-a3b-25 --layers 8 --work-dir DIR

One request at a time on the benchmark's model (scripts/gpu_models.py writes it): --steps decode steps
with a clock around the parts of each layer call, then as many under torch.profiler, which makes the
host about twice as slow. Each finding is a line of JSON (scripts/gpu_findings.py): the steps' times,
what the clock found, then a table with a row per layer and part of a layer call. Host time is that of
the calling thread; device time is that of the kernels and copies which the part launched. Parts lie
within their layer call: do not add them to it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from scripts.engine_environment import compiler_environment  # noqa: E402
from scripts.gpu_findings import note  # noqa: E402

PREFIX = "moe_offload/"
WHOLE = "layer call"
KERNELS = 15
"""How many of the longest are named."""


# ---- ranges ----------------------------------------------------------------------------


class Ranges:
    """Names what runs inside a layer call for the profiler, and times it, while it is installed.

    Attributes:
        host_ns: per part, of each of its calls since the last :meth:`restart`.
    """

    def __init__(self) -> None:
        self._layer: int | None = None
        self.host_ns: dict[str, list[int]] = defaultdict(list)

    def restart(self) -> None:
        """Forgets the times so far."""
        self.host_ns.clear()

    @contextlib.contextmanager
    def _range(self, part: str) -> Iterator[None]:
        from torch.profiler import record_function

        began = time.perf_counter_ns()
        try:
            with record_function(f"{PREFIX}{self._layer}/{part}"):
                yield
        finally:
            self.host_ns[part].append(time.perf_counter_ns() - began)

    def install(self) -> None:
        """Wraps the parts of a layer call in ranges, on a GPU and on a CPU."""
        from vllm_moe_offload.integration import block_slots
        from vllm_moe_offload.integration.device_calls import DeviceCalls
        from vllm_moe_offload.integration.experts import OffloadedExperts
        from vllm_moe_offload.runtime import OffloadRuntime

        self._wrap_call(DeviceCalls, "forward", lambda args: args[1].moe_layer)
        self._wrap_call(OffloadedExperts, "forward_offloaded", lambda args: args[0].moe_layer)
        for owner, name, part in (
            (DeviceCalls, "_bring", "ids to the host"),
            (OffloadRuntime, "begin_layer", "plan, begin copies, look ahead"),
            (DeviceCalls, "_upload_plan", "slot map to the device"),
            (block_slots, "apply", "experts"),
            (OffloadedExperts, "_apply", "experts"),
            (OffloadRuntime, "end_layer", "finish"),
        ):
            self._wrap_part(owner, name, part)

    def _wrap_call(self, owner: Any, name: str, layer_of: Callable[[Any], int]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*args: Any) -> Any:
            self._layer = layer_of(args)
            try:
                with self._range(WHOLE):
                    return original(*args)
            finally:
                self._layer = None

        setattr(owner, name, call)

    def _wrap_part(self, owner: Any, name: str, part: str) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*args: Any) -> Any:
            if self._layer is None:
                return original(*args)
            with self._range(part):
                return original(*args)

        setattr(owner, name, call)


def table(events: Any, steps: int) -> list[dict[str, Any]]:
    """Microseconds per step of each layer and part, from a profiler's events.

    Events on the device's own time line are left out: what a range launched is in the
    ``device_time_total`` of the host's event already.
    """
    from torch.profiler import DeviceType

    host: dict[tuple[int, str], float] = defaultdict(float)
    device: dict[tuple[int, str], float] = defaultdict(float)
    for event in events:
        if event.device_type != DeviceType.CPU or not event.name.startswith(PREFIX):
            continue
        layer, part = event.name.removeprefix(PREFIX).split("/", 1)
        host[int(layer), part] += event.cpu_time_total
        device[int(layer), part] += event.device_time_total
    order = list(dict.fromkeys(part for _, part in host))
    return [
        {
            "layer": layer,
            "part": part,
            "host_us": round(host[layer, part] / steps, 1),
            "device_us": round(device[layer, part] / steps, 1),
        }
        for layer, part in sorted(host, key=lambda key: (key[0], order.index(key[1])))
    ]


def host_times(ranges: Ranges, steps: int) -> list[dict[str, Any]]:
    """Microseconds of each part, without the profiler: per step, and of one call.

    What is done once per step lies in the last layer's calls: there the greatest tells more than
    the median.
    """
    return [
        {
            "part": part,
            "us_per_step": round(sum(times) / 1e3 / steps, 1),
            "calls_per_step": len(times) / steps,
            "median_us": round(statistics.median(times) / 1e3, 1),
            "most_us": round(max(times) / 1e3, 1),
        }
        for part, times in ranges.host_ns.items()
    ]


def longest_kernels(events: Any, steps: int) -> list[dict[str, Any]]:
    """What ran on the device for longest, all layers together."""
    from torch.profiler import DeviceType

    spent: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.name.startswith(PREFIX):
            spent[event.name].append(event.device_time_total)
    longest = sorted(spent.items(), key=lambda item: -sum(item[1]))[:KERNELS]
    return [
        {"kernel": name[:120], "us": round(sum(times) / steps, 1), "calls": len(times) / steps}
        for name, times in longest
    ]


# ---- steps -----------------------------------------------------------------------------


def decode_steps(llm: Any, prompt: list[int], tokens: int, name: str) -> Iterator[None]:
    """Generates for one request; yields after every step from the first token on."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    sampling = SamplingParams(
        temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
    )
    engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
    generated = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            generated = len(output.outputs[0].token_ids)
        if generated:
            yield


def timed(steps: Iterator[None], count: int) -> list[float]:
    """Seconds of each of the next ``count`` steps."""
    found = []
    for _ in range(count):
        began = time.perf_counter()
        next(steps)
        found.append(time.perf_counter() - began)
    return found


def profile(llm: Any, prompt: list[int], steps: int, device: str, ranges: Ranges) -> None:
    """Warms up, times steps without the profiler, then with it."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    warm_up = 4
    running = decode_steps(llm, prompt, warm_up + 2 * steps + 4, "profiled")
    timed(running, warm_up)
    ranges.restart()
    plain = timed(running, steps)
    note("steps without the profiler", median_s=statistics.median(plain), steps_s=plain)
    note("host times without the profiler", rows=host_times(ranges, steps))
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch_profile(activities=activities) as profiler:
        watched = timed(running, steps)
    note("steps with the profiler", median_s=statistics.median(watched), steps_s=watched)
    events = profiler.events()
    note("layers", rows=table(events, steps))
    note("kernels", rows=longest_kernels(events, steps))
    for _ in running:
        pass


def start(args: argparse.Namespace) -> tuple[Any, list[int]]:
    """The engine of the benchmark's contestant ``trace``, and a prompt."""
    from vllm import LLM

    from scripts.gpu_contest import prompt_ids
    from scripts.gpu_models import ensure_model, store_of
    from scripts.gpu_options import choices_of, planned
    from scripts.gpu_plan import engine_options, offload_options

    plan = planned(args)
    part, workload = plan.parts[0], plan.sizes.workloads[0]
    options = engine_options(part, "trace", plan.sizes, choices_of(args))
    assert isinstance(options, dict)  # a reason, for others than this one
    options["max_model_len"] = max(
        options["max_model_len"], workload.prompt_tokens + 4 * args.steps
    )
    offload = offload_options(
        part,
        "trace",
        store_of(args.work_dir, part.model),
        args.work_dir / "profile.msgpack",
        args.host_gb,
    )
    model = ensure_model(args.work_dir, part.model, plan.max_positions)
    llm = LLM(str(model), **options, additional_config={"moe_offload": offload})
    return llm, prompt_ids(llm.get_tokenizer(), workload, 0)[0]


def machine(device: str) -> contextlib.AbstractContextManager[None]:
    """Without a GPU the way of one is served all the same, through a simulated copy engine."""
    if device == "cuda":
        return contextlib.nullcontext()
    from tests.integration.simulated_gpu import simulated_gpu

    simulated: contextlib.AbstractContextManager[None] = simulated_gpu(1.0)
    return simulated


def main() -> int:
    """Exit status 0 if there is a table."""
    from scripts.gpu_options import add_plan_options, check_choices, check_device

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="decode steps to profile")
    add_plan_options(parser)
    args = parser.parse_args()
    try:
        check_device(args.device)
        check_choices(args)
    except ValueError as error:
        parser.error(str(error))
    os.environ.update(compiler_environment(args.backend))
    with machine(args.device):
        ranges = Ranges()
        ranges.install()
        llm, prompt = start(args)
        note("started")
        profile(llm, prompt, args.steps, args.device, ranges)
    return 0


if __name__ == "__main__":
    sys.exit(main())
