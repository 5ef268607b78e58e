"""An engine in a process of its own, asked and answering in lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO


class EngineProcess:
    """A script with an engine in it; the parent's end.

    The script gets its arguments as JSON, answers once when it is ready, then once per line
    on stdin: JSON in one line each, to :func:`take_stdout`.

    Attributes:
        ready: what it answered when it was ready.
    """

    def __init__(
        self,
        name: str,
        script: Path,
        arguments: Mapping[str, Any],
        *,
        log: Path,
        environment: Mapping[str, str],
        python: Path = Path(sys.executable),
        prefix: Sequence[str] = (),
    ) -> None:
        """Starts it and waits until it is ready.

        Args:
            name: what messages call it.
            script: what is run.
            arguments: its only argument, as JSON.
            log: file for its stderr.
            environment: added to this process's.
            python: the interpreter.
            prefix: goes before the command (to enter a cgroup, say).

        Raises:
            RuntimeError: it ended first.
        """
        self.name = name
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [*prefix, python, script, json.dumps(arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | environment,
            )
        self.ready = self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended early; see {self._log}")
        return json.loads(line)

    def ask(self, line: str) -> Any:
        """Sends a line; the answer to it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(120)


def take_stdout() -> TextIO:
    """The script's end: stdout for answers alone; what else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers
