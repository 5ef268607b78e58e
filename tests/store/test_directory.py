"""Directories of stores: several processes, killed ones, and who may use ``store_dir``."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stores import MIXED, assert_intact, build, layer_tensors, leftovers, place
from vllm_moe_offload.store import StoreBuilder, StoreError, open_store, store_lock

REPOSITORY = Path(__file__).resolve().parents[2]


# ---- several processes -------------------------------------------------------------------


BUILD_AND_STALL = """
import sys, time
from pathlib import Path
from tests.stores import MIXED, identity, layer_tensors
from vllm_moe_offload.store import StoreBuilder, store_lock
directory = identity().directory(Path(sys.argv[1]), "test/model")
with store_lock(directory), StoreBuilder(directory, identity(), 3, 4) as builder:
    builder.write_layer(0, MIXED, layer_tensors(MIXED, 4, 0))
    print("ready", flush=True)
    time.sleep(600)
"""


BUILD_ONCE = """
import logging, sys, time
from pathlib import Path
from tests.stores import MIXED, assert_intact, identity, layer_tensors
from vllm_moe_offload.store import StoreBuilder, open_store, store_lock
logging.basicConfig(level=logging.INFO)
directory = identity().directory(Path(sys.argv[1]), "test/model")
print("ready", flush=True)
sys.stdin.readline()
with store_lock(directory):
    store = open_store(directory, identity())
    print("opened" if store else "built", flush=True)
    if store is None:
        time.sleep(0.3)
        with StoreBuilder(directory, identity(), 3, 4) as builder:
            for layer in range(3):
                builder.write_layer(layer, MIXED, layer_tensors(MIXED, 4, layer))
            store = builder.commit()
assert_intact(store)
"""


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def test_a_killed_builder_leaves_nothing_that_opens(tmp_path, caplog):
    directory, which = place(tmp_path)
    process = start(BUILD_AND_STALL, str(tmp_path))
    assert leftovers(directory)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert open_store(directory, which) is None
    (left,) = leftovers(directory)
    with caplog.at_level(logging.INFO, "vllm.moe_offload"):
        assert_intact(build(tmp_path))
    assert not leftovers(directory)
    assert f"removing {left}" in caplog.text


def test_the_directory_of_a_living_builder_is_left_alone(tmp_path):
    directory, which = place(tmp_path)
    with StoreBuilder(directory, which, 1, 4) as first:
        first.write_layer(0, MIXED, layer_tensors(MIXED, 4, 0))
        (left,) = leftovers(directory)
        with StoreBuilder(directory, which, 1, 4):
            assert left in leftovers(directory)
        assert_intact(first.commit())


def test_two_processes_build_once(tmp_path):
    processes = [start(BUILD_ONCE, str(tmp_path)) for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted(out.strip() for out, _ in outputs) == ["built", "opened"]
    waiter = next(err for out, err in outputs if out.strip() == "opened")
    assert "waiting for another process" in waiter


# ---- store_dir ---------------------------------------------------------------------------


def test_store_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    directory, _ = place(tmp_path / "file")
    with pytest.raises(StoreError, match="store_dir"), store_lock(directory):
        pass


def test_store_dir_of_another_user(tmp_path, monkeypatch):
    directory, which = place(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(StoreError, match=r"belongs to user.*store_dir"), store_lock(directory):
        pass
    with pytest.raises(StoreError, match="store_dir"), StoreBuilder(directory, which, 1, 1):
        pass


def test_store_dir_that_is_not_writable(tmp_path, monkeypatch):
    directory, _ = place(tmp_path)
    if os.geteuid() == 0:  # root may write anywhere
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    else:
        tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="store_dir"), store_lock(directory):
        pass
