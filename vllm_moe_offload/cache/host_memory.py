"""Host memory: anonymous pages, and how many bytes of it there are to be had.

What the system calls available is not the whole truth. In a container a cgroup may allow less,
and the RAM of some virtual machines starts small and grows as it is touched.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vllm_moe_offload.config import GIB

PROBE_STEP_BYTES = 256 << 20
PROBE_WAITS = 20
"""Times in a row that a probe waits for memory to grow before it takes it that it will not."""

_MADV_POPULATE_WRITE = 23  # linux/mman.h; not in Python's mmap yet


# ---- pages -----------------------------------------------------------------------------


def anonymous_region(nbytes: int) -> mmap.mmap:
    """Zeroed page-aligned memory, in huge pages where the kernel has them; untouched.

    Raises:
        OSError: the system refuses it.
    """
    region = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # None where Python's C library knows none
    if advice is not None:
        try:
            region.madvise(advice)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel without transparent huge pages
                raise
    return region


def populate(region: mmap.mmap) -> None:
    """Brings all pages of a region that holds zeros into memory.

    Raises:
        MemoryError: the system has no room for them.
    """
    try:
        region.madvise(_MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a kernel before 5.14
            raise MemoryError(f"cannot populate {len(region)} bytes: {error}") from error
        np.frombuffer(region, np.uint8).fill(0)


def populated_region(nbytes: int) -> mmap.mmap:
    """An anonymous region with all its pages in memory.

    Raises:
        OSError: the system refuses to map it.
        MemoryError: it has no room for the pages.
    """
    region = anonymous_region(nbytes)
    populate(region)
    return region


# ---- what is available -----------------------------------------------------------------


def host_reserve_bytes(total_bytes: int) -> int:
    """What experts leave to the system: a tenth of the RAM, 4 GiB at least.

    Page-locked memory is never given back to it, so something has to stay.
    """
    return max(total_bytes // 10, 4 * GIB)


@dataclass(frozen=True, slots=True)
class Headroom:
    """Host memory that may still be taken, as one source says.

    Attributes:
        available_bytes: without swapping.
        total_bytes: used and available.
        source: who says so, for a log line.
    """

    available_bytes: int
    total_bytes: int
    source: str

    @property
    def reserve_bytes(self) -> int:
        """See :func:`host_reserve_bytes`."""
        return host_reserve_bytes(self.total_bytes)

    @property
    def spare_bytes(self) -> int:
        """What is available beyond the reserve; negative if even that is broken."""
        return self.available_bytes - self.reserve_bytes


def cgroup_headrooms(
    proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> Iterator[Headroom]:
    """What the memory cgroups of this process, v2 and v1, and those around them allow.

    Pages of files that nothing used lately count as available, as in the system's own figure.

    Args:
        proc: where ``self/cgroup`` is.
        cgroups: where the controllers are mounted.
    """
    own = proc / "self" / "cgroup"
    if not own.exists():
        return
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            names = (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        own_group = root / path.lstrip("/")
        for group in (own_group, *own_group.parents):
            # The path is the host's where the container has a namespace of its own: what is
            # mounted here is then the container's group, at the root.
            headroom = _headroom_of(group, *names)
            if headroom is not None:
                yield headroom
            if group == root:
                break


def _headroom_of(
    group: Path, limit_name: str, usage_name: str, reclaimable: str
) -> Headroom | None:
    """Of one cgroup; None if it is not there or sets no limit."""
    limit, usage = _text(group / limit_name), _text(group / usage_name)
    if limit is None or usage is None or limit == "max":
        return None
    fields = dict(line.split() for line in (_text(group / "memory.stat") or "").splitlines())
    used = max(0, int(usage) - int(fields.get(reclaimable, 0)))
    return Headroom(max(0, int(limit) - used), int(limit), f"cgroup {group}")


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return None


# ---- what is there when it is touched --------------------------------------------------


@dataclass(frozen=True, slots=True)
class Probe:
    """What touching memory found out.

    Attributes:
        touched_bytes: taken, and given back.
        headroom: the last look, while they were taken.
    """

    touched_bytes: int
    headroom: Headroom

    @property
    def spare_bytes(self) -> int:
        """What experts may take."""
        return self.touched_bytes + self.headroom.spare_bytes


def probe(
    wanted_bytes: int,
    look: Callable[[], Headroom],
    wait: Callable[[], None],
    touch: Callable[[int], mmap.mmap] = populated_region,
    *,
    floor_bytes: int | None = None,
) -> Probe:
    """Touches memory, step by step, to find out whether ``wanted_bytes`` can be spared.

    Before every step it looks at what is available, so that nothing has to die for it. It
    ends when the bytes are there beside the reserve, or when a step would break the reserve
    and nothing grew. A machine whose RAM starts small gets a chance to grow: there a quarter
    of the most that was ever available stands for the reserve. On a machine that does not
    grow, what is touched is missed in what is available: the result is what it was before.

    Args:
        wanted_bytes: for experts.
        look: what is available now.
        wait: lets the machine a moment to grow.
        touch: maps and touches so many bytes; what it raises ends the probe.
        floor_bytes: stay available in any case; None: the reserve.
    """
    most_available = touched_bytes = waits = 0
    with contextlib.ExitStack() as regions:
        while True:
            now = look()
            found = Probe(touched_bytes, now)
            most_available = max(most_available, now.available_bytes)
            floor = min(now.reserve_bytes, most_available // 4)
            if floor_bytes is not None:
                floor = min(floor, floor_bytes)
            if found.spare_bytes >= wanted_bytes:
                return found
            if now.available_bytes - PROBE_STEP_BYTES < floor:
                if waits == PROBE_WAITS:
                    return found
                waits += 1
                wait()
                continue
            waits = 0
            try:
                regions.enter_context(contextlib.closing(touch(PROBE_STEP_BYTES)))
            except (OSError, MemoryError):
                return found
            touched_bytes += PROBE_STEP_BYTES
