"""What a machine is that may serve from a GPU: driver, memory, compilers, disks. In seconds.

    python scripts/gpu_probe.py [--touch-gb 12] [--touch-s 3]

Prints a line of JSON per finding (scripts/gpu_findings.py). Imports neither torch nor vLLM. Memory
is looked at before, while and after some of it is touched: a virtual machine's may grow as it is
used, and what is said to be available at first is then too little.
"""

from __future__ import annotations

import argparse
import importlib.util
import mmap
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.gpu_findings import note  # noqa: E402

PACKAGES = (
    "torch",
    "triton",
    "vllm",
    "vllm-moe-offload",
    "transformers",
    "numpy",
    "pydantic",
    "pytest",
)
MODULES = (
    "numpy",
    "pydantic",
    "rich",
    "tqdm",
    "msgpack",
    "xxhash",
    "prometheus_client",
    "psutil",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "vllm",
    "pytest",
    "hypothesis",
)
"""What plugin, tests and benchmarks import."""
TOOLS = (
    "ncu",
    "nvidia-smi",
    "gcc",
    "g++",
    "git",
    "patch",
)
GPU_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "memory.free",
    "pcie.link.gen.current",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "compute_cap",
)
STEP_BYTES = 256 << 20
GIB = 1 << 30


def gpu() -> dict[str, object]:
    """What ``nvidia-smi`` says of the first GPU; why not, where it says nothing."""
    if shutil.which("nvidia-smi") is None:
        return {"missing": "nvidia-smi is not on PATH"}
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
        timeout=5,
    )
    if done.returncode or not done.stdout.strip():
        return {"missing": f"nvidia-smi: {(done.stderr or done.stdout).strip()[:200]}"}
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    return {"fields": dict(zip(GPU_FIELDS, values, strict=False))}


def memory() -> dict[str, int]:
    """Bytes, as /proc/meminfo has them."""
    wanted = {"MemTotal", "MemFree", "MemAvailable", "HugePages_Total", "AnonHugePages"}
    found = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in wanted:
            number, _, unit = value.strip().partition(" ")
            found[name] = int(number) * (1024 if unit == "kB" else 1)
    return found


def touch(most_bytes: int, most_s: float) -> dict[str, object]:
    """Memory before, while and after up to ``most_bytes`` of it are touched.

    Stops after ``most_s`` seconds, or where less than a tenth of the RAM would be left.
    """
    before = memory()
    size = min(most_bytes, before["MemAvailable"] - before["MemTotal"] // 10)
    if size < STEP_BYTES:
        return {"before": before, "touched_bytes": 0}
    began = time.perf_counter()
    touched = 0
    with mmap.mmap(-1, size) as area:
        try:
            area.madvise(mmap.MADV_HUGEPAGE)
            advice = "taken"
        except OSError as error:
            advice = f"refused: {error.strerror}"
        page = b"\1"
        while touched + STEP_BYTES <= size and time.perf_counter() - began < most_s:
            for place in range(touched, touched + STEP_BYTES, mmap.PAGESIZE):
                area[place : place + 1] = page
            touched += STEP_BYTES
        seconds = time.perf_counter() - began
        full = memory()
    return {
        "before": before,
        "touched_bytes": touched,
        "touched_in_s": round(seconds, 3),
        "madvise_hugepage": advice,
        "when_touched": full,
        "after": memory(),
    }


def limits() -> dict[str, object]:
    """What bounds this process's memory beside the machine."""
    found: dict[str, object] = {
        "locked_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "user_id": os.getuid(),
    }
    for name in ("memory.max", "memory.current"):
        path = Path("/sys/fs/cgroup") / name
        if path.exists():
            found[name] = path.read_text().strip()
    return found


def disks() -> dict[str, object]:
    """Room and file system of the places that could hold models and stores."""
    mounts = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        mounts[place] = kind
    found: dict[str, object] = {}
    for place in ("/", "/tmp", "/dev/shm", str(Path.cwd())):
        path = Path(place)
        if not path.exists():
            continue
        mount = next(p for p in (path, *path.parents) if str(p) in mounts)
        usage = shutil.disk_usage(path)
        found["here" if place == str(Path.cwd()) else place] = {
            "file_system": mounts[str(mount)],
            "free_bytes": usage.free,
            "total_bytes": usage.total,
        }
    return found


def software() -> dict[str, object]:
    """Versions of what is installed, and modules that are not."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    names = {point.name for point in entry_points(group="vllm.general_plugins")}
    return {
        "versions": versions,
        "missing_modules": [name for name in MODULES if importlib.util.find_spec(name) is None],
        "plugin_found": "moe_offload" in names,
    }


def hugepages() -> dict[str, str | None]:
    """How the kernel gives huge pages."""
    folder = Path("/sys/kernel/mm/transparent_hugepage")
    return {
        name: (folder / name).read_text().strip() if (folder / name).exists() else None
        for name in ("enabled", "defrag", "shmem_enabled")
    }


def network() -> dict[str, object]:
    """Whether anything beyond this machine could be reached."""
    routes = Path("/proc/net/route")
    lines = routes.read_text().splitlines()[1:] if routes.exists() else []
    return {"default_route": any(line.split()[1] == "00000000" for line in lines)}


def main() -> int:
    """Exit status 0: whatever is missing is a finding."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--touch-gb", type=float, default=12, help="memory to touch at most")
    parser.add_argument("--touch-s", type=float, default=3, help="seconds to touch it for")
    args = parser.parse_args()
    note("gpu", **gpu())
    note(
        "machine",
        kernel=platform.release(),
        machine=platform.machine(),
        cores=os.cpu_count(),
        cores_allowed=len(os.sched_getaffinity(0)),
    )
    note("tools", **{name: shutil.which(name) for name in TOOLS})
    note("software", **software())
    note("disks", **disks())
    note("hugepages", **hugepages())
    note("network", **network())
    note("limits", **limits())
    note("memory", **touch(int(args.touch_gb * GIB), args.touch_s))
    return 0


if __name__ == "__main__":
    sys.exit(main())
