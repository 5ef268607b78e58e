"""Traces of recordings that were broken off."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.trace.recordings import LAYERS, TOP_K, recorder, step
from vllm_moe_offload.trace.finish import finish_trace
from vllm_moe_offload.trace.routing import TraceError, load_trace
from vllm_moe_offload.trace.spool import ROW, spool_of


def test_of_a_killed_server_a_trace_can_be_made(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    target = recorder(path)
    step(target, ("a", 0, 2, True), ("b", 0, 1, True))
    step(target, ("a", 2, 3, False), ("b", 1, 3, False), drafted=(2, 2))
    target.verify({"a": 4})
    target.end_request("a")
    copy = tmp_path / "killed.npz"
    shutil.copytree(spool_of(path), spool_of(copy))
    assert finish_trace(copy) == (9, 2)
    trace = load_trace(copy)
    assert trace.lens.tolist() == [4, 2]
    assert trace.prefill_lens.tolist() == [2, 1]
    assert trace.schedule.end_steps.tolist() == [2, -1]
    target.close()
    assert load_trace(path).lens.tolist() == [4, 2]


def test_of_a_step_that_was_cut_short_the_whole_rows_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    target = recorder(path)
    step(target, ("a", 0, 3, True))
    step(target, ("a", 3, 2, True))
    copy = spool_of(tmp_path / "cut.npz")
    shutil.copytree(spool_of(path), copy)
    os.truncate(copy / "ids", 4 * LAYERS * TOP_K + 1)
    os.truncate(copy / "rows", 5 * ROW.itemsize - 1)
    assert finish_trace(tmp_path / "cut.npz") == (4, 1)
    assert load_trace(tmp_path / "cut.npz").lens.tolist() == [4]
    target.close()


def test_there_is_nothing_to_finish(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"there is no recording .*trace\.npz\.spool"):
        finish_trace(tmp_path / "trace.npz")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("server.json", b"{}"),
        ("server.json", b"no JSON"),
        ("rows", b"\xff" * ROW.itemsize),
        ("rows", b"\x7f" * ROW.itemsize),
    ],
)
def test_a_damaged_spool_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / "trace.npz"
    target = recorder(path)
    step(target, ("a", 0, 1, True))
    copy = tmp_path / "copy.npz"
    shutil.copytree(spool_of(path), spool_of(copy))
    (spool_of(copy) / name).write_bytes(content)
    with pytest.raises(TraceError, match=f"{name} is damaged"):
        finish_trace(copy)
    target.close()
