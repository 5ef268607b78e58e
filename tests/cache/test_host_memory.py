"""Host memory: pages where huge ones do not exist, what cgroups allow, what grows when touched."""

from __future__ import annotations

import errno
import mmap
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from tests.stores import MIXED, build
from vllm_moe_offload.cache import host_memory
from vllm_moe_offload.cache.host_memory import (
    PROBE_STEP_BYTES,
    PROBE_WAITS,
    Headroom,
    anonymous_region,
    cgroup_headrooms,
    populated_region,
    probe,
)
from vllm_moe_offload.cache.pool import SlotPool
from vllm_moe_offload.config import GIB
from vllm_moe_offload.store.direct_io import aligned_buffer
from vllm_moe_offload.transfer import HostTier

# ---- pages -----------------------------------------------------------------------------


class Region(mmap.mmap):
    """Memory of a kernel that refuses some advice."""

    refused: ClassVar[dict[int, int]] = {}
    advised: ClassVar[list[int]] = []

    def madvise(self, advice: int, *extent: int) -> None:
        type(self).advised.append(advice)
        if advice in self.refused:
            raise OSError(self.refused[advice], "refused")
        super().madvise(advice, *extent)


@pytest.fixture
def kernel(monkeypatch):
    """Lets a test say which advice the kernel refuses, and with which error."""
    monkeypatch.setattr(mmap, "mmap", Region)
    monkeypatch.setattr(Region, "advised", [])

    def refuse(**errors: int) -> None:
        monkeypatch.setattr(
            Region, "refused", {getattr(mmap, name): code for name, code in errors.items()}
        )

    return refuse


def everything_that_allocates(directory: Path):
    """All that holds experts in RAM."""
    yield aligned_buffer(1 << 20)
    yield SlotPool(MIXED, 3)
    tier = HostTier(build(directory), 4)
    tier.close()
    yield tier


def test_a_kernel_without_huge_pages(kernel, tmp_path):
    kernel(MADV_HUGEPAGE=errno.EINVAL)
    assert len(list(everything_that_allocates(tmp_path))) == 3
    assert mmap.MADV_HUGEPAGE in Region.advised


def test_a_python_without_the_constant(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert len(anonymous_region(1 << 20)) == 1 << 20


def test_other_errors_are_not_hidden(kernel):
    kernel(MADV_HUGEPAGE=errno.ENOMEM)
    with pytest.raises(OSError, match="refused"):
        anonymous_region(1 << 20)


@pytest.mark.parametrize("old_kernel", [False, True])
def test_populated_memory_is_zero_and_there(monkeypatch, old_kernel):
    if old_kernel:
        monkeypatch.setattr(host_memory, "_MADV_POPULATE_WRITE", 9999)
    region = populated_region(1 << 20)
    array = np.frombuffer(region, np.uint8)
    assert not array.any()
    assert pages_in_memory(array.ctypes.data)


def pages_in_memory(address: int) -> bool:
    """Whether the page is, as the kernel says."""
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(address // mmap.PAGESIZE * 8)
        return bool(int.from_bytes(file.read(8), "little") >> 63)


# ---- cgroups ---------------------------------------------------------------------------


def container(root: Path, own: str, groups: dict[str, dict[str, object]]) -> list[Headroom]:
    """What a process reads whose ``/proc/self/cgroup`` is ``own``; groups by their paths."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(own)
    for path, files in groups.items():
        (root / "groups" / path).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (root / "groups" / path / name).write_text(f"{content}\n")
    return list(cgroup_headrooms(root / "proc", root / "groups"))


def v2(limit: object, current: int = 0, inactive: int = 0) -> dict[str, object]:
    stat = f"anon 1\nfile 2\ninactive_file {inactive}"
    return {"memory.max": limit, "memory.current": current, "memory.stat": stat}


def figures(headrooms: list[Headroom]) -> list[tuple[int, int]]:
    return [(found.available_bytes, found.total_bytes) for found in headrooms]


def test_a_container_of_cgroup_v2(tmp_path):
    found = container(tmp_path, "0::/\n", {"": v2(1000, current=700, inactive=200)})
    assert figures(found) == [(500, 1000)]
    assert found[0].source == f"cgroup {tmp_path}/groups"


def test_the_groups_around_bind_too(tmp_path):
    groups = {"a/b": v2("max", 5), "a": v2(100, 30), "": v2(1000, 990)}
    assert figures(container(tmp_path, "0::/a/b\n", groups)) == [(70, 100), (10, 1000)]


def test_a_path_of_the_host_is_the_container_at_the_root(tmp_path):
    found = container(tmp_path, "0::/docker/c0ffee\n", {"": v2(1000, 10)})
    assert figures(found) == [(990, 1000)]


def test_cgroup_v1(tmp_path):
    files = {
        "memory.limit_in_bytes": 1000,
        "memory.usage_in_bytes": 700,
        "memory.stat": "inactive_file 1\ntotal_inactive_file 100",
    }
    own = "5:cpu,cpuacct:/x\n4:memory:/jobs/7\n0::/\n"
    assert figures(container(tmp_path, own, {"memory/jobs/7": files})) == [(400, 1000)]


def test_more_in_use_than_allowed_leaves_nothing(tmp_path):
    assert figures(container(tmp_path, "0::/\n", {"": v2(100, 170)})) == [(0, 100)]


@pytest.mark.parametrize("own", ["0::/\n", "1:cpu:/\n", ""])
def test_without_a_limit_nothing_is_said(tmp_path, own):
    assert container(tmp_path, own, {}) == []


def test_a_system_without_cgroups(tmp_path):
    assert list(cgroup_headrooms(tmp_path, tmp_path)) == []


def test_this_machine_can_be_read():
    assert all(found.available_bytes <= found.total_bytes for found in cgroup_headrooms())


# ---- touching --------------------------------------------------------------------------


class Machine:
    """RAM of ``most`` bytes, of which the system knows ``total`` at first.

    It is given more, ``growth`` at a time, when less than ``grows_below`` is available: at
    once, or after it was waited for.
    """

    def __init__(self, total, used=0, *, most=None, growth=GIB, grows_below=0, slow=False):
        self.total, self.used, self.most = total, used, most or total
        self.growth, self.grows_below, self.slow = growth, grows_below, slow
        self.touched = self.most_touched = self.waits = 0
        self.least_available = total - used

    def look(self):
        self.least_available = min(self.least_available, self.available)
        return Headroom(self.available, self.total, "machine")

    @property
    def available(self):
        return self.total - self.used - self.touched

    def wait(self):
        self.waits += 1
        self.grow()

    def grow(self):
        while self.available < self.grows_below and self.total < self.most:
            self.total = min(self.total + self.growth, self.most)

    def touch(self, nbytes):
        assert nbytes <= self.available, "the OOM killer would have come"
        self.touched += nbytes
        self.most_touched = max(self.most_touched, self.touched)
        if not self.slow:
            self.grow()
        return self.Region(self, nbytes)

    class Region:
        def __init__(self, machine, nbytes):
            self.machine, self.nbytes = machine, nbytes

        def close(self):
            self.machine.touched -= self.nbytes

    def probe(self, wanted, **options):
        return probe(wanted, self.look, self.wait, self.touch, **options)


def test_what_is_available_is_not_touched():
    machine = Machine(64 * GIB, 10 * GIB)
    assert machine.probe(40 * GIB).spare_bytes >= 40 * GIB
    assert machine.most_touched == 0


def test_a_machine_that_does_not_grow_has_what_it_said():
    machine = Machine(64 * GIB, 10 * GIB)
    before = machine.look()
    found = machine.probe(60 * GIB)
    assert found.spare_bytes == before.spare_bytes
    assert found.touched_bytes == machine.most_touched > 0
    assert machine.least_available >= before.reserve_bytes
    assert machine.touched == 0
    assert machine.waits == PROBE_WAITS


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("total_gib", [2, 8, 32])
def test_a_machine_that_grows_has_more_than_it_said(total_gib, slow):
    total = total_gib * GIB
    machine = Machine(
        total, GIB, most=128 * GIB, grows_below=min(total // 2, 5 * GIB), slow=slow
    )
    wanted = 40 * GIB
    assert machine.look().spare_bytes < wanted
    found = machine.probe(wanted)
    assert found.spare_bytes >= wanted
    assert machine.most_touched <= wanted + machine.look().reserve_bytes
    assert machine.touched == 0


def test_a_machine_that_stops_growing_keeps_its_reserve():
    machine = Machine(20 * GIB, GIB, most=24 * GIB, grows_below=5 * GIB)
    found = machine.probe(100 * GIB)
    assert found.spare_bytes == (24 - 1 - 4) * GIB
    assert machine.least_available >= 4 * GIB


def test_a_size_that_the_user_gave_goes_down_to_its_own_floor():
    machine = Machine(32 * GIB, GIB, most=128 * GIB, grows_below=2 * GIB)
    assert machine.probe(60 * GIB).spare_bytes < 60 * GIB
    machine = Machine(32 * GIB, GIB, most=128 * GIB, grows_below=2 * GIB)
    assert machine.probe(60 * GIB, floor_bytes=GIB // 2).spare_bytes >= 60 * GIB
    machine = Machine(32 * GIB, GIB)
    assert machine.probe(60 * GIB, floor_bytes=GIB // 2).touched_bytes > 30 * GIB
    assert machine.least_available >= GIB // 2


def test_too_little_for_a_single_step():
    machine = Machine(GIB, GIB - PROBE_STEP_BYTES // 2)
    assert machine.probe(10 * GIB).spare_bytes < 0
    assert machine.most_touched == 0


@pytest.mark.parametrize("error", [MemoryError, OSError])
def test_memory_that_is_refused_ends_the_probe(error):
    machine = Machine(64 * GIB)
    touch, steps = machine.touch, []

    def refuse_the_third(nbytes):
        steps.append(nbytes)
        if len(steps) == 3:
            raise error("refused")
        return touch(nbytes)

    machine.touch = refuse_the_third
    assert machine.probe(100 * GIB).touched_bytes == 2 * PROBE_STEP_BYTES
    assert machine.touched == 0


def test_real_memory_is_given_back():
    looks = [Headroom(GIB + PROBE_STEP_BYTES, 4 * GIB, ""), Headroom(0, 4 * GIB, "")]
    held = []

    def touch(nbytes):
        assert nbytes == PROBE_STEP_BYTES
        held.append(populated_region(1 << 20))
        return held[-1]

    found = probe(GIB, lambda: looks.pop(0) if len(looks) > 1 else looks[0], int, touch)
    assert found.touched_bytes == PROBE_STEP_BYTES
    assert [region.closed for region in held] == [True]
