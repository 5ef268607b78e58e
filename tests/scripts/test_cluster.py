"""scripts/cluster.sh: two hosts that are two, and nothing of them stays. Needs root, as they do."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.clusters import CLUSTER, short_directory

pytestmark = pytest.mark.slow


def call(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(CLUSTER), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def processes_of(directory: Path) -> list[str]:
    """Command lines that name the cluster's directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
        if str(directory) in line:
            found.append(line.replace("\0", " "))
    return found


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as parent:
        yield parent / "c"
        call("stop", parent / "c")


def test_hosts_have_their_own_of_everything(directory):
    assert call("start", directory).returncode == 0
    local = directory / "local"
    question = f"cat {local}/name; echo $TMPDIR $VLLM_HOST_IP; stat -c %d /dev/shm; ls /dev/shm"
    for host in ("1", "2"):
        said = call(
            "run", directory, host, "sh", "-c", f"echo {host} | tee {local}/name >/dev/shm/x"
        )
        assert said.returncode == 0, said.stderr
    one, two = (
        call("run", directory, host, "sh", "-c", question).stdout.split() for host in ("1", "2")
    )
    assert one[:3] == ["1", f"{local}/tmp", "10.77.0.1"]
    assert two[:3] == ["2", f"{local}/tmp", "10.77.0.2"]
    assert one[3] != two[3], "one /dev/shm"
    assert one[4:] == two[4:] == ["x"]
    assert not Path("/dev/shm/x").exists()


def test_the_hosts_reach_each_other(directory):
    call("start", directory)
    listen = (
        "import socket; s = socket.create_server(('10.77.0.2', 5000)); print(s.accept()[1][0])"
    )
    listener = subprocess.Popen(
        [str(CLUSTER), "run", str(directory), "2", "python3", "-c", listen],
        stdout=subprocess.PIPE,
        text=True,
    )
    connect = "import socket, sys, time\nfor _ in range(200):\n"
    connect += " try: socket.create_connection(('10.77.0.2', 5000)); sys.exit(0)\n"
    connect += " except OSError: time.sleep(.05)\nsys.exit(1)"
    assert call("run", directory, "1", "python3", "-c", connect).returncode == 0
    assert listener.communicate(timeout=20)[0] == "10.77.0.1\n"


def test_stop_ends_all_that_runs_there(directory):
    call("start", directory)
    quiet = f"'sleep 1000; : {directory}' >/dev/null 2>&1 &"
    left = call("run", directory, "2", "sh", "-c", f"sh -c {quiet} setsid sh -c {quiet}")
    assert left.returncode == 0, left.stderr
    assert len([line for line in processes_of(directory) if "sleep 1000" in line]) == 2
    assert call("stop", directory).returncode == 0
    assert not directory.exists()
    assert not processes_of(directory)
    assert call("stop", directory).returncode == 0, "twice is no error"


@pytest.mark.parametrize("delay_seconds", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_start_leaves_nothing(directory, end, delay_seconds):
    process = subprocess.Popen(
        [str(CLUSTER), "start", str(directory)], stderr=subprocess.DEVNULL
    )
    try:
        process.wait(delay_seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(end)
    status = process.wait(30)
    if end is signal.SIGKILL or status == 0:  # nothing could be done then, or it had started
        assert call("stop", directory).returncode == 0
    assert not directory.exists()
    for _ in range(50):  # a host that had hardly begun finds its directory gone
        if not processes_of(directory):
            return
        time.sleep(0.1)
    assert not processes_of(directory)


def test_what_is_missing_is_said_in_one_line(directory, tmp_path):
    for program in ("bash", "id", "realpath", "sed", "unshare", "nsenter"):
        found = subprocess.run(
            ["sh", "-c", f"command -v {program}"], capture_output=True, text=True, check=True
        )
        (tmp_path / program).symlink_to(found.stdout.strip())
    said = call("start", directory, PATH=str(tmp_path))
    assert said.returncode == 1
    assert said.stderr == "cluster.sh: needs the program ip\n"
    (tmp_path / "id").unlink()
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    said = call("start", directory, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert said.stderr == "cluster.sh: needs root, for network and mount namespaces\n"


def test_a_host_that_does_not_run_is_named(directory):
    said = call("run", directory, "1", "true")
    assert said.returncode == 1
    assert said.stderr.startswith(
        f"cluster.sh: host 1 of {directory} does not run; start it with"
    )


def test_a_directory_that_exists_is_left_alone(directory):
    directory.mkdir()
    (directory / "file").touch()
    assert "exists; choose another folder" in call("start", directory).stderr
    assert (directory / "file").exists()
    (directory / "file").unlink()
