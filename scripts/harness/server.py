"""A `vllm serve` process as scripts and tests use it: start, wait for /health, read, stop."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

HOST = "127.0.0.1"


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class ServerDied(RuntimeError):
    """The server ended before it answered; the message ends with its log."""


class Server:
    """``vllm serve MODEL ARGS...`` on loopback, in a process group of its own."""

    def __init__(
        self,
        model: Path | str,
        arguments: Sequence[str] = (),
        *,
        log: Path,
        environment: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        """Starts the process; ``prefix`` goes before the command (to enter a cgroup, say)."""
        self.port = free_port()
        self.log_path = log
        self._log = log.open("wb")
        command = [
            *prefix,
            str(Path(sys.executable).with_name("vllm")),
            "serve",
            str(model),
            "--host",
            HOST,
            "--port",
            str(self.port),
            *arguments,
        ]
        self.command = command
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            command,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )

    @property
    def url(self) -> str:
        """Base URL without path."""
        return f"http://{HOST}:{self.port}"

    @property
    def log(self) -> str:
        """What the server printed so far."""
        return self.log_path.read_text(errors="replace")

    def wait_healthy(self, timeout_s: float = 300) -> float:
        """Seconds from start until ``/health`` answered.

        Raises ServerDied if the process ends first, TimeoutError if it takes too long.
        """
        deadline = self.began + timeout_s
        while time.perf_counter() < deadline:
            if self.process.poll() is not None:
                raise ServerDied(
                    f"server ended with status {self.process.returncode}:\n{self.log[-6000:]}"
                )
            if self._answers():
                return time.perf_counter() - self.began
            time.sleep(0.1)
        raise TimeoutError(f"no /health within {timeout_s} s:\n{self.log[-6000:]}")

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def metrics(self) -> dict[str, float]:
        """Samples of ``/metrics`` by name, summed over labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        totals: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
        return totals

    def stop(self, timeout_s: float = 60) -> int:
        """SIGINT, as Ctrl-C; SIGKILL to the group if that doesn't end it. Exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        self._log.close()
        return self.process.returncode

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
