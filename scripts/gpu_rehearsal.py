"""The GPU sequence on a CPU, from the packed kit, in a folder with nothing else at hand.

Called by ``scripts/gpu_first.py --rehearse``; see there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.gpu_sequence import STEPS, TRITON_VARIABLE  # noqa: E402

PACKED_KIT = ROOT / "build" / "gpu-kit.tar.xz"
RESULTS = ROOT / "build" / "gpu-rehearsal"
COREUTILS = (
    *("basename", "cat", "chmod", "cp", "cut", "date", "df", "dirname", "du", "echo", "env"),
    *(
        "head",
        "id",
        "ln",
        "ls",
        "mkdir",
        "mktemp",
        "mv",
        "nproc",
        "pwd",
        "readlink",
        "realpath",
    ),
    *("rm", "rmdir", "seq", "sleep", "sort", "stat", "tail", "tee", "test", "timeout", "touch"),
    *("tr", "true", "uname", "wc", "whoami"),
)
VLLM_CPU_TOOLS = ("lscpu",)
"""vLLM's CPU platform cannot do without; its CUDA platform does not ask for it."""
KEPT_VARIABLES = ("LANG", "LC_ALL", "LD_LIBRARY_PATH")
"""Of this process; whatever else was set may be what makes it work here."""


def bare_path(folder: Path) -> Path:
    """A folder with coreutils and this Python, for PATH."""
    folder.mkdir()
    for name in (*COREUTILS, *VLLM_CPU_TOOLS):
        found = shutil.which(name)
        if found is not None:
            (folder / name).symlink_to(found)
    for name in ("python", "python3"):  # a symlink would leave its environment behind
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        program.chmod(0o700)
    return folder


def environment(folder: Path, kit: Path, log: Path) -> dict[str, str]:
    """Of the rehearsed processes."""
    home = folder / "home"
    home.mkdir()
    return {
        **{name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
        "PATH": str(bare_path(folder / "bin")),
        "HOME": str(home),
        "TMPDIR": str(folder),
        "PYTHONPATH": str(kit / "scripts" / "rehearsal"),
        "VMO_REHEARSAL_LOG": str(log),
        "VMO_REHEARSAL_CLONE": str(ROOT),
        # The environment that holds Python and vLLM may lie below the clone.
        "VMO_REHEARSAL_ALLOWED": os.pathsep.join({sys.prefix, sys.base_prefix}),
        **({TRITON_VARIABLE: str(brought[-1])} if (brought := tritons()) else {}),
    }


def tritons() -> list[Path]:
    """Folders with a Triton each, the newest last, if ``make test-triton`` has brought them."""
    given = os.environ.get(TRITON_VARIABLE)
    return [Path(given)] if given else sorted((Path(sys.prefix) / "triton").glob("[0-9]*"))


def problems(results: Path, log: Path) -> list[str]:
    """What the rehearsal must not end with."""
    found = []
    for name in STEPS:
        path = results / f"{name}.json"
        if not path.exists():
            found.append(f"{name}: no {path.name}")
            continue
        record = json.loads(path.read_text())
        if record["status"] != "passed":
            found.append(f"{name}: {record['status']}: {record['reason']}")
    if log.exists():
        found += list(dict.fromkeys(log.read_text().splitlines()))
    return found


def rehearse(packed: Path | None = None, results: Path | None = None) -> int:
    """Exit status 0 if every step passed and nothing was used that a bare machine lacks.

    Args:
        packed: the kit (default: what ``make gpu-kit`` made).
        results: receives the steps' JSON (default: build/gpu-rehearsal).
    """
    packed, results = packed or PACKED_KIT, (results or RESULTS).absolute()
    if not packed.exists():
        print(f"gpu_first: no kit at {packed}: run `make gpu-kit`", file=sys.stderr)
        return 2
    shutil.rmtree(results, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="gpu-rehearsal-") as name:
        folder = Path(name)
        with tarfile.open(packed) as archive:
            archive.extractall(folder, filter="data")
        (kit,) = (path for path in folder.iterdir() if path.is_dir())
        log, empty, written = folder / "offences.txt", folder / "empty", folder / "results"
        empty.mkdir()
        subprocess.run(
            [
                *(sys.executable, str(kit / "scripts" / "gpu_first.py"), "--device", "cpu"),
                *("--results", str(written), "--work-dir", str(folder / "work")),
            ],
            cwd=empty,
            env=environment(folder, kit, log),
            stdin=subprocess.DEVNULL,
            check=False,
        )
        found = problems(written, log)
        shutil.copytree(written, results)
    for problem in found:
        print(f"rehearsal: {problem}", file=sys.stderr)
    print(
        f"Rehearsal: {'as it should be' if not found else f'{len(found)} problems'}; {results}"
    )
    return int(bool(found))
