"""An environment of its own for llama-cpp-python, built from its sdist and kept."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

VERSION = "0.3.36"
CMAKE_ARGS = "-DGGML_NATIVE=ON"
"""For this machine's CPU, with every instruction set that it has."""
BUILD_JOBS = 2
_MARKER = "installed.json"
_UPDATE = re.compile(r"ggml-org/llama\.cpp@([0-9a-f]{7,40})")


class LlamaCppError(RuntimeError):
    """llama.cpp could not be installed or run; one line says what failed and where to look."""


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """An installed llama-cpp-python.

    Attributes:
        python: interpreter of its environment.
        source: the unpacked sdist.
        commit: of llama.cpp, as the sdist's changelog names it.
    """

    python: Path
    source: Path
    commit: str

    @property
    def vendored(self) -> Path:
        """llama.cpp's own tree in the sdist."""
        return self.source / "vendor" / "llama.cpp"

    def to_json(self) -> dict[str, str]:
        """What a report says of it."""
        return {
            "llama_cpp_python": VERSION,
            "llama_cpp_commit": self.commit,
            "cmake_args": CMAKE_ARGS,
        }


def install(directory: Path) -> LlamaCpp:
    """llama-cpp-python in ``directory``; downloaded and built only if it is not there yet.

    Raises:
        LlamaCppError: a step failed.
    """
    home = directory.absolute() / f"llama-cpp-python-{VERSION}"
    python = home / "environment" / "bin" / "python"
    source = home / f"llama_cpp_python-{VERSION}"
    marker = home / _MARKER
    wanted = {"version": VERSION, "cmake_args": CMAKE_ARGS}
    if not (marker.exists() and json.loads(marker.read_text()) == wanted):
        _build(home, python, source)
        marker.write_text(json.dumps(wanted) + "\n")
    return LlamaCpp(python, source, commit_of((source / "CHANGELOG.md").read_text()))


def _build(home: Path, python: Path, source: Path) -> None:
    for program in ("cc", "c++"):
        if shutil.which(program) is None:
            raise LlamaCppError(f"building llama.cpp needs a compiler: no {program} in PATH")
    shutil.rmtree(home, ignore_errors=True)  # what a build that was stopped left
    home.mkdir(parents=True)
    log = home / "log"
    log.mkdir()
    Console().print(f"Building llama-cpp-python {VERSION} (some minutes; logs in {log})")
    create = [sys.executable, "-m", "venv", str(home / "environment")]
    run_step("making the environment", create, log / "venv.log")
    # Without this, a wheel that was built for some other machine might come.
    download = ["download", "--no-binary", ":all:", "--no-deps", "--dest", str(home)]
    pip = [str(python), "-m", "pip"]
    run_step(
        f"downloading llama-cpp-python {VERSION}",
        [*pip, *download, f"llama-cpp-python=={VERSION}"],
        log / "download.log",
    )
    archive = home / f"{source.name}.tar.gz"
    if not archive.exists():
        raise LlamaCppError(f"pip downloaded no {archive.name}; see {log / 'download.log'}")
    with tarfile.open(archive) as files:
        files.extractall(home, filter="data")
    run_step(
        "building llama.cpp",
        [*pip, "install", str(archive)],
        log / "build.log",
        {"CMAKE_ARGS": CMAKE_ARGS, "CMAKE_BUILD_PARALLEL_LEVEL": str(BUILD_JOBS)},
    )


def commit_of(changelog: str) -> str:
    """The commit of llama.cpp that the newest release in the changelog came with.

    Raises:
        LlamaCppError: the changelog names none.
    """
    found = _UPDATE.search(changelog)
    if found is None:
        raise LlamaCppError("llama-cpp-python's CHANGELOG.md names no commit of llama.cpp")
    return found[1]


def run_step(
    what: str,
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Runs a command to its end, its output in ``log``.

    Raises:
        LlamaCppError: it failed; with the last line of its output.
    """
    with log.open("w") as output:
        done = subprocess.run(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
            check=False,
        )
    if done.returncode != 0:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise LlamaCppError(
            f"{what} failed with status {done.returncode}: {lines[-1].strip()} (see {log})"
        )
