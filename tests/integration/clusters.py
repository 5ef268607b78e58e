"""Ray clusters for tests: nodes on this machine, and two simulated hosts."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scripts.harness.server import Server, free_port
from tests.integration.conftest import DRIVER, ENGINES, ROOT, Job
from vllm_moe_offload.integration.ray_platform import ENVIRONMENT

CLUSTER = ROOT / "scripts" / "cluster.sh"
RAY_PROGRAM = str(Path(sys.executable).with_name("ray"))
OBJECT_STORE_BYTES = 100_000_000
START_SECONDS = 120
CLONE_NEWNET = 0x40000000
FOR_RAY = {
    ENVIRONMENT: "1",
    "RAY_worker_niceness": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
}
"""Of nodes and drivers."""


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """For sockets: their paths have 107 bytes at most."""
    path = Path(tempfile.mkdtemp(prefix="vmo"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextlib.contextmanager
def ray_nodes(*nodes: Mapping[str, str]) -> Iterator[str]:
    """The address of a cluster of nodes on this machine, for one worker each.

    ``nodes``: what is set in the environment of each, beside what all have. The first is the head.
    """
    port = str(free_port())
    address = f"127.0.0.1:{port}"
    role = ["--head", "--port", port, "--include-dashboard=false"]
    with short_directory() as directory, contextlib.ExitStack() as stack:
        for number, changes in enumerate(
            nodes
        ):  # one after the other: not all their ports are ours
            log = directory / f"node{number}.log"
            stack.enter_context(_node(directory, log, changes, *role))
            role = ["--address", address]
        yield address


@contextlib.contextmanager
def _node(directory: Path, log: Path, changes: Mapping[str, str], *role: str) -> Iterator[None]:
    """A Ray node. With --block its processes are children, which it ends when it is told to."""
    options = ["--node-ip-address", "127.0.0.1", "--num-cpus", "1", "--num-gpus", "1"]
    options += ["--object-store-memory", str(OBJECT_STORE_BYTES), "--temp-dir", str(directory)]
    with log.open("w") as file:
        process = subprocess.Popen(
            [RAY_PROGRAM, "start", "--block", *role, *options],
            env={**ENGINES, **FOR_RAY, **changes},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(60)


def run_on(address: str, jobs: list[Job], directory: Path) -> list[dict[str, Any]]:
    """Results of the jobs (see engine_driver.py), in a process that finds a cluster there."""
    return _run([], {**ENGINES, **FOR_RAY, "RAY_ADDRESS": address}, jobs, directory)


class Hosts:
    """Two simulated hosts, with a Ray node each. See ``scripts/cluster.sh``.

    Attributes:
        directory: the cluster's own.
        local: a folder that is another one on each host.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.local = directory / "local"

    def call(self, command: str, *arguments: str) -> str:
        """What the script printed. Raises AssertionError if it failed."""
        done = subprocess.run(
            [str(CLUSTER), command, str(self.directory), *arguments],
            env={**ENGINES, **FOR_RAY, "RAY": RAY_PROGRAM},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, jobs: list[Job], directory: Path) -> list[dict[str, Any]]:
        """Results of the jobs in a process on host 1."""
        prefix = [str(CLUSTER), "run", str(self.directory), "1"]
        return _run(prefix, {**ENGINES, **FOR_RAY}, jobs, directory)

    def serve(self, model: Path, log: Path, *more: str) -> Server:
        """`vllm serve` on host 1; it is reached from within :meth:`network`."""
        return Server(
            model,
            more,
            log=log,
            environment={
                **ENGINES,
                **FOR_RAY,
                "VLLM_SERVER_DEV_MODE": "1",
                "VLLM_LOGGING_LEVEL": "INFO",
            },
            prefix=[str(CLUSTER), "run", str(self.directory), "1"],
        )

    @contextlib.contextmanager
    def network(self, host: int) -> Iterator[None]:
        """The calling thread has the network of a host: its loopback, its addresses."""
        inode = self.call("run", str(host), "stat", "-Lc", "%i", "/proc/self/ns/net").strip()
        (path, *_) = (
            path for path in Path("/proc").glob("[0-9]*/ns/net") if _inode(path) == int(inode)
        )
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        theirs = os.open(path, os.O_RDONLY)
        try:
            _enter(theirs)
            yield
        finally:
            _enter(own)
            os.close(own)
            os.close(theirs)

    def files(self, host: int, pattern: str) -> list[str]:
        """Paths of a host's own folder that fit a pattern, relative to it."""
        own = self.directory / f"host{host}"
        return sorted(str(path.relative_to(own)) for path in own.glob(pattern))


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:  # the process ended meanwhile
        return -1


def _enter(namespace: int) -> None:
    """setns(2), which Python has from 3.12 on."""
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Two hosts with Ray, ended with all that runs there."""
    with short_directory() as directory:
        hosts = Hosts(directory / "c")
        hosts.call("start")
        try:
            hosts.call("ray")
            yield hosts
        finally:
            hosts.call("stop")


def _run(
    prefix: list[str], environment: dict[str, str], jobs: list[Job], directory: Path
) -> list[dict[str, Any]]:
    paths = [directory / "jobs.json", directory / "out.json", directory / "log"]
    paths[0].write_text(json.dumps(jobs))
    with paths[2].open("w") as log:
        done = subprocess.run(
            [*prefix, sys.executable, str(DRIVER), *map(str, paths[:2])],
            env=environment,
            cwd=directory,  # Ray's workers look for modules where their driver is
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=400,
            check=False,
        )
    assert done.returncode == 0, paths[2].read_text()[-8000:]
    return json.loads(paths[1].read_text())


def two_cores() -> dict[str, str]:
    """A core for each of two workers; vLLM itself wants a memory node for each."""
    first, *_, last = sorted(os.sched_getaffinity(0))
    return {"VLLM_CPU_OMP_THREADS_BIND": f"{first}|{last}"}
