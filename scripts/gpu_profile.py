"""What a decode step of `trace` runs on the device, and how long our part of the host's work takes.

    python scripts/gpu_profile.py --parts qwen3-30b-a3b-25 --layers 16 --work-dir DIR

Requests come one at a time on the benchmark's model (scripts/gpu_models.py writes it), one for each
workload of one request: --steps decode steps with a clock around what the plugin does between layer
calls, then as many under torch.profiler. Each finding is a line of JSON (scripts/gpu_findings.py):
the steps' times, what the clock found, and the longest kernels, of graphs that are replayed, too.
Kernels are serial unless a graph branches, so what they sum to says how long the device was busy.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from scripts.engine_environment import compiler_environment  # noqa: E402
from scripts.gpu_contest import prompt_ids, sampling_of  # noqa: E402
from scripts.gpu_findings import note  # noqa: E402
from scripts.gpu_machine import machine  # noqa: E402
from scripts.gpu_models import ensure_model, store_of  # noqa: E402
from scripts.gpu_options import (  # noqa: E402
    add_plan_options,
    check_choices,
    check_device,
    choices_of,
    planned,
)
from scripts.gpu_plan import Workload, engine_options, offload_options  # noqa: E402

KERNELS = 25
"""How many of the longest are named."""
OWN_KERNELS = ("count", "plan", "gather", "rename")
"""Of ``vllm_moe_offload/device/kernels.py``."""


# ---- the host --------------------------------------------------------------------------


class HostTimes:
    """Times what the plugin does between layer calls, while it is installed.

    Attributes:
        ns: per function, of each of its calls since the last :meth:`restart`.
    """

    def __init__(self) -> None:
        self.ns: dict[str, list[int]] = defaultdict(list)

    def restart(self) -> None:
        """Forgets the times so far."""
        self.ns.clear()

    def install(self) -> None:
        """Wraps the runtime's functions; before an engine starts."""
        from vllm_moe_offload.device.runtime import DeviceRuntime

        for name in ("begin_step", "after_forward"):
            self._wrap(DeviceRuntime, name)

    def _wrap(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*args: Any) -> Any:
            began = time.perf_counter_ns()
            try:
                return original(*args)
            finally:
                self.ns[name].append(time.perf_counter_ns() - began)

        setattr(owner, name, call)

    def rows(self, steps: int) -> list[dict[str, Any]]:
        """Microseconds per step, and of one call."""
        return [
            {
                "function": name,
                "us_per_step": round(sum(times) / 1e3 / steps, 1),
                "calls_per_step": len(times) / steps,
                "median_us": round(statistics.median(times) / 1e3, 1),
                "most_us": round(max(times) / 1e3, 1),
            }
            for name, times in self.ns.items()
        ]


# ---- the device ------------------------------------------------------------------------


def kernel_times(events: Any, steps: int) -> dict[str, Any]:
    """Microseconds per step of what ran on the device: all of it, our own, and the longest."""
    from torch.profiler import DeviceType

    spent: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.device_type == DeviceType.CUDA:
            spent[event.name].append(event.device_time_total)
    rows = [
        {
            "kernel": name[:120],
            "us_per_step": round(sum(times) / steps, 1),
            "calls_per_step": round(len(times) / steps, 2),
            "median_us": round(statistics.median(times), 2),
            "most_us": round(max(times), 2),
        }
        for name, times in sorted(spent.items(), key=lambda item: -sum(item[1]))
    ]
    return {
        "busy_us_per_step": round(sum(map(sum, spent.values())) / steps, 1),
        "own": [row for row in rows if row["kernel"] in OWN_KERNELS],
        "longest": rows[:KERNELS],
    }


# ---- steps -----------------------------------------------------------------------------


def decode_steps(llm: Any, prompt: list[int], sampling: Any, name: str) -> Iterator[None]:
    """Generates for one request; yields after every step from the first token on."""
    engine = llm.llm_engine
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


def profile(
    llm: Any, workload: Workload, args: argparse.Namespace, host_times: HostTimes
) -> None:
    """Warms up, times steps without the profiler, then with it."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    prompt = prompt_ids(llm.get_tokenizer(), workload, 0)[0]
    warm_up, steps = 4, args.steps
    sampling = sampling_of(workload, 0, 0)
    sampling.max_tokens = warm_up + 2 * steps + 4
    running = decode_steps(llm, prompt, sampling, workload.name)
    timed(running, warm_up)
    host_times.restart()
    plain = timed(running, steps)
    name = workload.name
    note(f"{name}: steps", median_s=statistics.median(plain), steps_s=plain)
    note(f"{name}: host", rows=host_times.rows(steps))
    activities = [ProfilerActivity.CPU]
    if args.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch_profile(activities=activities) as profiler:
        watched = timed(running, steps)
    note(f"{name}: profiled steps", median_s=statistics.median(watched), steps_s=watched)
    note(f"{name}: device", **kernel_times(profiler.events(), steps))
    for _ in running:
        pass


def start(args: argparse.Namespace) -> tuple[Any, list[Workload]]:
    """The engine of the benchmark's contestant ``trace``, and its workloads of one request."""
    from vllm import LLM

    plan = planned(args)
    part = plan.parts[0]
    sizes = plan.sizes_of(part)
    workloads = [workload for workload in sizes.workloads if workload.batch == 1]
    options = engine_options(part, "trace", sizes, choices_of(args))
    assert isinstance(options, dict)  # a reason, for others than this one
    options["max_model_len"] += 4 * args.steps
    offload = offload_options(
        part,
        "trace",
        store_of(args.work_dir, part.model),
        args.work_dir / "profile.msgpack",
        args.host_gb,
    )
    model = ensure_model(args.work_dir, part.model, plan.max_positions)
    llm = LLM(str(model), **options, additional_config={"moe_offload": offload})
    return llm, [workload for workload in workloads if workload.is_decode]


def main() -> int:
    """Exit status 0 if all workloads of one request were profiled."""
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
    host_times = HostTimes()
    host_times.install()
    with machine(args.device):
        llm, workloads = start(args)
    note("started")
    for workload in workloads:
        profile(llm, workload, args, host_times)
    return 0


if __name__ == "__main__":
    sys.exit(main())
