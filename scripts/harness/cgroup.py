"""Memory cgroups: a limit on memory for a server, and what it took."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from rich.console import Console

CGROUPS = Path("/sys/fs/cgroup")


class MemoryCgroup(ABC):
    """A cgroup with a limit on memory and no swap; a context manager that removes it.

    Attributes:
        path: its directory.
    """

    peaks: dict[str, int]

    def __init__(self, path: Path, limit_bytes: int) -> None:
        """Nothing is created yet."""
        self.path = path
        self.limit_bytes = limit_bytes
        self.peaks = {}
        self._sampling = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemoryCgroup:
        """Creates it. Raises OSError if the system does not let us."""
        self.path.mkdir()
        try:
            self._limit()
        except BaseException:
            self.path.rmdir()
            raise
        self._sampler.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._sampling.set()
        self._sampler.join()
        self.kill_all()
        for _ in range(50):
            with contextlib.suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(0.2)
        Console().print(f"[red]{self.path} could not be removed; rmdir it by hand[/red]")

    @property
    def prefix(self) -> list[str]:
        """Goes before a command that is to run inside."""
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs")]

    def kill_all(self) -> None:
        """Ends whatever still runs inside."""
        for _ in range(100):
            pids = (self.path / "cgroup.procs").read_text().split()
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.1)

    def reset(self) -> None:
        """Forgets the peaks so far."""
        self.peaks = {}
        self._reset_peak()

    def figures(self) -> dict[str, Any]:
        """Peaks since :meth:`reset`, and how often processes were killed in all.

        ``max_usage`` is the kernel's and counts the page cache, which it takes back when it
        needs to; ``anonymous`` (sampled) is what processes hold.
        """
        return {
            "limit_bytes": self.limit_bytes,
            "max_usage_bytes": self._max_usage(),
            "peak_anonymous_bytes": self.peaks.get("anonymous", 0),
            "peak_page_cache_bytes": self.peaks.get("page_cache", 0),
            "oom_kills": self.oom_kills,
        }

    def _read(self, name: str) -> str:
        return (self.path / name).read_text()

    def _write(self, name: str, value: int) -> None:
        (self.path / name).write_text(f"{value}\n")

    def _table(self, name: str) -> dict[str, int]:
        rows = (line.split() for line in self._read(name).splitlines())
        return {row[0]: int(row[1]) for row in rows if len(row) == 2}

    def _sample(self) -> None:
        while not self._sampling.wait(0.1):
            with contextlib.suppress(OSError):
                for name, value in self._usage().items():
                    self.peaks[name] = max(self.peaks.get(name, 0), value)

    @property
    @abstractmethod
    def oom_kills(self) -> int:
        """Processes that the kernel killed in it for want of memory."""

    @abstractmethod
    def _limit(self) -> None: ...

    @abstractmethod
    def _reset_peak(self) -> None: ...

    @abstractmethod
    def _max_usage(self) -> int | None: ...

    @abstractmethod
    def _usage(self) -> dict[str, int]: ...


class CgroupV1(MemoryCgroup):
    """Below /sys/fs/cgroup/memory."""

    def _limit(self) -> None:
        self._write("memory.limit_in_bytes", self.limit_bytes)
        self._write("memory.swappiness", 0)
        if (self.path / "memory.memsw.limit_in_bytes").exists():
            self._write("memory.memsw.limit_in_bytes", self.limit_bytes)

    @property
    def oom_kills(self) -> int:
        """See :class:`MemoryCgroup`."""
        return self._table("memory.oom_control").get("oom_kill", 0)

    def _reset_peak(self) -> None:
        self._write("memory.max_usage_in_bytes", 0)

    def _max_usage(self) -> int:
        return int(self._read("memory.max_usage_in_bytes"))

    def _usage(self) -> dict[str, int]:
        stat = self._table("memory.stat")
        return {"anonymous": stat["total_rss"], "page_cache": stat["total_cache"]}


class CgroupV2(MemoryCgroup):
    """Below /sys/fs/cgroup, where the memory controller is handed down."""

    def _limit(self) -> None:
        self._write("memory.max", self.limit_bytes)
        if (self.path / "memory.swap.max").exists():
            self._write("memory.swap.max", 0)

    @property
    def oom_kills(self) -> int:
        """See :class:`MemoryCgroup`."""
        return self._table("memory.events").get("oom_kill", 0)

    def _reset_peak(self) -> None:
        """Kernels before 6.12 cannot; the sampled peak stands in."""

    def _max_usage(self) -> int | None:
        return self.peaks.get("all")

    def _usage(self) -> dict[str, int]:
        stat = self._table("memory.stat")
        current = int(self._read("memory.current"))
        return {"anonymous": stat["anon"], "page_cache": stat["file"], "all": current}


def memory_cgroup(limit_bytes: int) -> MemoryCgroup:
    """One of whichever version the system has. Raises RuntimeError if it has none."""
    name = f"vllm-moe-offload-{os.getpid()}"
    if (CGROUPS / "memory" / "cgroup.procs").exists():
        return CgroupV1(CGROUPS / "memory" / name, limit_bytes)
    handed_down = CGROUPS / "cgroup.subtree_control"
    if handed_down.exists():
        if "memory" not in handed_down.read_text().split():
            handed_down.write_text("+memory")
        return CgroupV2(CGROUPS / name, limit_bytes)
    raise RuntimeError(f"no memory controller below {CGROUPS}")


def kernel_log_of_kills() -> list[str]:
    """The kernel's lines about killed processes, oldest first."""
    done = subprocess.run(["dmesg"], capture_output=True, text=True, check=False)
    wanted = re.compile(r"Memory cgroup out of memory|oom-kill:")
    return [line for line in done.stdout.splitlines() if wanted.search(line)]
