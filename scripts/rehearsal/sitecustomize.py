"""Watches a process of the rehearsal: does it look where a bare machine has nothing?

Python imports this file at start where its folder is on PYTHONPATH (scripts/gpu_rehearsal.py). What a
process opens, runs or connects to is compared with what a CUDA machine without clone, network, git
and compilers has; each offence is a line in the file that the rehearsal reads. Nothing is prevented:
whether code copes with a refusal is not the question here.
"""

import atexit
import os
import sys
import traceback
from typing import Any

LOG = os.environ.get("VMO_REHEARSAL_LOG", "")
CLONE = os.environ.get("VMO_REHEARSAL_CLONE", "")
ALLOWED = tuple(filter(None, os.environ.get("VMO_REHEARSAL_ALLOWED", "").split(os.pathsep)))
"""Below the clone, but no part of it: the environment that holds Python and vLLM."""
ABSENT = {
    "git",
    "nvcc",
    "ptxas",
    "gcc",
    "g++",
    "cc",
    "c++",
    "clang",
    "clang++",
    "patch",
    "make",
}

LOCAL = ("127.", "::1", "localhost")


def in_clone(path: object) -> bool:
    """Whether a path, of whatever type, is the clone's."""
    try:
        text = os.path.abspath(os.fsdecode(path))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False  # a file descriptor
    inside = text == CLONE or text.startswith(CLONE + os.sep)
    return inside and not text.startswith(ALLOWED)


def offence(event: str, arguments: tuple[Any, ...]) -> str | None:
    """What about an audit event is not possible on a bare machine."""
    if event in ("open", "ctypes.dlopen", "os.listdir", "os.scandir", "os.chdir"):
        return f"looks at {arguments[0]!r}" if in_clone(arguments[0]) else None
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn"):
        name = os.path.basename(os.fsdecode(arguments[0]))
        return f"runs {name}" if name in ABSENT else None
    if event == "socket.connect":
        address = arguments[1]
        if isinstance(address, tuple) and not str(address[0]).startswith(
            ("127.", "::1", "localhost")
        ):
            return f"connects to {address[0]}"
    return None


def note(what: str, where: str) -> None:
    """A line for the rehearsal; the file is opened for each, as processes may be killed."""
    handle = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(
            handle,
            f"{os.path.basename(sys.argv[0]) if sys.argv else '-'}: {what}: {where}\n".encode(),
        )
    finally:
        os.close(handle)


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """The audit hook."""
    what = offence(event, arguments)
    if what is not None:
        frames = traceback.extract_stack()[:-1]
        callers = [f for f in frames if not f.filename.startswith("<frozen")][-3:]
        note(what, " < ".join(f"{f.filename}:{f.lineno}" for f in reversed(callers)))


def check_libraries() -> None:
    """Native code opens files without Python's knowing: libraries of the clone."""
    with open("/proc/self/maps") as maps:
        paths = {
            line.split(None, 5)[5].strip()
            for line in maps
            if line.count(" ") > 5 and "/" in line
        }
    for path in sorted(paths):
        if in_clone(path):
            note(f"has {path!r} mapped", "-")


if LOG and CLONE:
    sys.addaudithook(watch)
    atexit.register(check_libraries)
