"""Installs a lock, with the CPU build of the torch that it names. Called by `make setup`.

    .venv/bin/python scripts/install_lock.py requirements/cpu.lock

The lock is installed without dependencies, so torch's build matters: PyPI's is for CUDA and does
not import without CUDA's libraries. This needs nothing but pip.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""The PyTorch project's own builds for CPUs."""

PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps")

# Before the rest of the lock is there, torch cannot be imported. Its module of constants can.
BUILD = """
import importlib.util, pathlib, runpy
spec = importlib.util.find_spec("torch")
assert spec is not None, "torch is not installed"
version = runpy.run_path(str(pathlib.Path(spec.origin).with_name("version.py")))
gpu = version.get("cuda") or version.get("hip")
assert not gpu, f"torch {version['__version__']} is built for GPUs ({gpu})"
print(version["__version__"])
"""
IMPORT = "import torch; print(torch.__version__)"


class InstallError(Exception):
    """What went wrong, in one line."""


def locked_version(lock: Path) -> str:
    """Version of torch in a lock."""
    found = re.search(r"^torch==([^\s+]+)$", lock.read_text(), re.MULTILINE)
    if found is None:
        raise InstallError(f"{lock} has no line torch==VERSION")
    return found[1]


def sources(version: str) -> list[list[str]]:
    """Arguments of pip, in the order in which they are tried.

    Where pip finds the CPU build by itself (a mirror, a folder of wheels) that comes first.
    """
    soon = ("--timeout", "15", "--retries", "1")  # where the index cannot be reached
    build = f"torch=={version}+cpu"
    return [[build], [*soon, "--index-url", CPU_INDEX, build]]


def run(*command: str) -> str:
    """What a command printed. Raises InstallError with the last line of its errors."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise InstallError(lines[-1])
    return done.stdout.strip()


def check(program: str, version: str) -> None:
    """Raises InstallError unless the program, about the installed torch, prints ``version``."""
    found = run(sys.executable, "-c", program)
    if found.partition("+")[0] != version:
        raise InstallError(f"torch {found} is installed")


def install_torch(version: str) -> None:
    """Tries the sources until torch is the CPU build of ``version``."""
    failed = []
    for source in [[], *sources(version)]:
        try:
            if source:
                run(*PIP, *source)
            check(BUILD, version)
            return
        except InstallError as error:
            failed += [f"pip install {' '.join(source)}: {error}"] if source else []
    raise InstallError(
        f"no CPU build of torch {version} ({'; '.join(failed)}). Bring the wheel torch-{version}"
        f"+cpu of {CPU_INDEX} for this Python here and run `PIP_FIND_LINKS=<its folder> make setup`"
    )


def main() -> None:
    """See the module's docstring."""
    lock = Path(sys.argv[1])
    try:
        version = locked_version(lock)
        install_torch(version)
        run(*PIP, "-r", str(lock))
        check(IMPORT, version)
    except InstallError as error:
        raise SystemExit(f"install_lock.py: {error}") from None


if __name__ == "__main__":
    main()
