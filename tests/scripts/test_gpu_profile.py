"""What a profile comes to; engine and profiler run in the rehearsal."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch.profiler import DeviceType

from scripts.gpu_profile import HostTimes, kernel_times


def event(name: str, us: float, device: DeviceType = DeviceType.CUDA) -> Any:
    return SimpleNamespace(name=name, device_time_total=us, device_type=device)


def test_kernels_are_summed_by_name_the_longest_first() -> None:
    events = [
        *(event("fused_moe_kernel", us) for us in (10.0, 30.0)),
        *(event("plan", us) for us in (2.0, 4.0)),
        event("aten::mm", 99.0, DeviceType.CPU),
    ]
    found = kernel_times(events, steps=2)
    assert found["busy_us_per_step"] == 23.0
    assert [row["kernel"] for row in found["longest"]] == ["fused_moe_kernel", "plan"]
    (plan,) = found["own"]
    assert (plan["us_per_step"], plan["calls_per_step"], plan["most_us"]) == (3.0, 1.0, 4.0)


def test_host_times_are_of_the_functions_that_are_wrapped() -> None:
    class Runtime:
        def step(self, value: int) -> int:
            return value + 1

    times = HostTimes()
    times._wrap(Runtime, "step")
    assert Runtime().step(1) == 2
    times.restart()
    assert times.rows(1) == []
    assert [Runtime().step(n) for n in range(4)] == [1, 2, 3, 4]
    (row,) = times.rows(steps=2)
    assert (row["function"], row["calls_per_step"]) == ("step", 2.0)
    assert row["us_per_step"] > 0
