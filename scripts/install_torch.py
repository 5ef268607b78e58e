"""Installs the CPU build of the torch that a lock names. Called by `make setup`.

    .venv/bin/python scripts/install_torch.py requirements/cpu.lock

The lock's other packages are installed without dependencies, so the build matters: PyPI's is for
CUDA and does not import without CUDA's libraries. It needs nothing but pip.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""The PyTorch project's own builds for CPUs."""

PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps")

PROBE = """
import torch
assert torch.version.cuda is None and torch.version.hip is None, "it is built for a GPU"
print(torch.__version__)
"""


def locked_version(lock: Path) -> str:
    """Version of torch in a lock. Raises SystemExit if it names none."""
    found = re.search(r"^torch==([^\s+]+)$", lock.read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit(f"install_torch.py: {lock} has no line torch==VERSION")
    return found[1]


def sources(version: str) -> list[list[str]]:
    """Arguments of pip, in the order in which they are tried.

    Where pip finds the CPU build by itself (a mirror, a folder of wheels) that comes first. The
    last one is for machines whose index has a CPU build under the plain version.
    """
    return [
        [f"torch=={version}+cpu"],
        # A machine that cannot reach the index shall say so soon.
        [
            *("--timeout", "15", "--retries", "1"),
            "--index-url",
            CPU_INDEX,
            f"torch=={version}+cpu",
        ],
        [f"torch=={version}"],
    ]


def problem(version: str) -> str | None:
    """What is wrong with the torch that is installed; None if it is the CPU build of ``version``."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        return (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
    found = done.stdout.strip()
    return None if found.partition("+")[0] == version else f"its version is {found}"


def install(version: str) -> str | None:
    """Tries the sources until torch is the CPU build of ``version``; else the last problem."""
    found = problem(version)
    for source in sources(version):
        if found is None:
            break
        done = subprocess.run([*PIP, *source], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found = problem(version)
        else:
            found = (done.stderr.strip() or f"pip: exit status {done.returncode}").splitlines()[
                -1
            ]
            print(f"install_torch.py: pip install {' '.join(source)}: {found}", file=sys.stderr)
    return found


def main() -> None:
    """See the module's docstring."""
    version = locked_version(Path(sys.argv[1]))
    found = install(version)
    if found is not None:
        raise SystemExit(
            f"install_torch.py: no CPU build of torch {version} ({found}). Bring the wheel "
            f"torch-{version}+cpu of {CPU_INDEX} for this Python here and run "
            "`PIP_FIND_LINKS=<its folder> make setup`."
        )


if __name__ == "__main__":
    main()
