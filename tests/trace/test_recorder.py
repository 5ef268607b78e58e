"""Routing traces recorded while serving."""

from __future__ import annotations

import logging
import shutil
import stat
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.trace.recordings import LAYERS, TOP_K, ids_of, recorder, step
from vllm_moe_offload.files import FileInUse
from vllm_moe_offload.trace.finish import finish_trace
from vllm_moe_offload.trace.routing import TraceError, load_trace
from vllm_moe_offload.trace.spool import ROW, spool_of


def test_requests_come_back_whole_whatever_their_steps(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    target = recorder(path)
    step(target, ("a", 0, 3, True))
    step(target, ("a", 3, 1, True), ("b", 0, 2, True))
    step(target, ("b", 2, 1, False), ("a", 4, 1, False))
    target.end_request("a")
    step(target, ("b", 3, 1, False))
    target.close()
    trace = load_trace(path)
    assert trace.names == []
    assert trace.lens.tolist() == [5, 4]
    assert trace.prefill_lens.tolist() == [4, 2]
    for request, name in enumerate("ab"):
        for position in range(trace.lens[request]):
            row = trace.ids[trace.starts[request] + position]
            assert row.tolist() == ids_of(ord(name), position)
    schedule = trace.schedule
    assert schedule.row_step.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3]
    assert schedule.row_request.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 1]
    assert schedule.row_position.tolist() == [0, 1, 2, 3, 0, 1, 2, 4, 3]
    assert schedule.row_token.tolist() == [0, 1, 2, 3, 5, 6, 7, 4, 8]
    assert schedule.end_steps.tolist() == [3, -1]
    assert schedule.layer_ids.tolist() == [0, 1]
    assert (schedule.slots, schedule.staging_slots) == (5, 3)
    assert schedule.recomputed_ids.shape == (0, LAYERS, TOP_K)


def test_recomputed_positions_are_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    target = recorder(path)
    step(target, ("a", 0, 2, True))
    step(target, ("a", 2, 1, False))
    step(target, ("a", 0, 4, True), again=1)  # preempted, routed a little differently
    step(target, ("a", 4, 1, False))
    target.close()
    trace = load_trace(path)
    assert trace.lens.tolist() == [5]
    assert trace.prefill_lens.tolist() == [2]
    a = ord("a")
    assert trace.ids[:3].tolist() == [ids_of(a, position) for position in range(3)]
    assert trace.ids[3].tolist() == ids_of(a, 3, again=1)
    schedule = trace.schedule
    assert schedule.recomputed_ids.tolist() == [ids_of(a, p, again=1) for p in range(3)]
    assert schedule.row_token.tolist() == [0, 1, 2, 5, 6, 7, 3, 4]


def test_what_a_drafter_guessed_wrong_is_kept_apart(tmp_path: Path) -> None:
    """Of ``a`` one guess of three was right; all of ``b``'s, which ended within them."""
    path = tmp_path / "trace.npz"
    target = recorder(path)
    step(target, ("a", 0, 2, True), ("b", 0, 1, True))
    step(target, ("a", 2, 4, False), ("b", 1, 3, False), drafted=(3, 2), again=1)
    target.verify({"a": 4, "b": 3})
    target.end_request("b")
    step(target, ("a", 4, 2, False), drafted=(1,))
    target.close()  # nobody said what became of the last guess
    trace = load_trace(path)
    assert trace.lens.tolist() == [5, 3]
    assert trace.prefill_lens.tolist() == [2, 1]
    a, b = map(ord, "ab")
    schedule = trace.schedule
    assert trace.ids[:5].tolist() == [
        ids_of(a, position, again=int(position in (2, 3))) for position in range(5)
    ]
    assert schedule.recomputed_ids.tolist() == [
        ids_of(a, 4, again=1),
        ids_of(a, 5, again=1),
        ids_of(b, 3, again=1),
        ids_of(a, 5),
    ]
    assert schedule.row_position.tolist() == [0, 1, 0, 2, 3, 4, 5, 1, 2, 3, 4, 5]
    assert schedule.row_token.tolist() == [0, 1, 5, 2, 3, 8, 9, 6, 7, 10, 4, 11]
    assert np.flatnonzero(schedule.row_is_draft).tolist() == [4, 5, 6, 8, 9, 11]


def test_guesses_wait_while_their_request_pauses(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    target = recorder(path)
    step(target, ("a", 0, 1, True), ("b", 0, 1, True))
    step(target, ("a", 1, 3, False), ("b", 1, 1, False), drafted=(2, 0))
    target.verify({"b": 2})
    step(target, ("b", 2, 1, False))
    target.verify({"a": 4, "b": 3})
    step(target, ("a", 4, 1, False))
    target.close()
    assert load_trace(path).lens.tolist() == [5, 3]


def test_a_preempted_request_computes_its_guesses_again(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    target = recorder(path)
    step(target, ("a", 0, 2, True))
    step(target, ("a", 2, 3, False), drafted=(2,))  # both right, then preempted
    target.verify({"a": 0})
    step(target, ("a", 0, 6, True))
    target.close()
    trace = load_trace(path)
    assert trace.lens.tolist() == [6]
    assert trace.prefill_lens.tolist() == [2]
    assert len(trace.schedule.recomputed_ids) == 5


def test_cached_prefixes_leave_their_number(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    target = recorder(path)
    step(target, ("a", 16, 2, True))
    step(target, ("a", 18, 1, False))
    target.close()
    trace = load_trace(path)
    assert trace.schedule.first_positions.tolist() == [16]
    assert trace.lens.tolist() == [3]
    assert trace.prefill_lens.tolist() == [2]


def test_a_name_used_again_is_another_request(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    target = recorder(path)
    step(target, ("a", 0, 2, True))
    target.end_request("a")
    step(target, ("a", 0, 3, True))
    target.end_request("stranger")
    target.close()
    assert load_trace(path).lens.tolist() == [2, 3]


def test_a_step_that_broke_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    target = recorder(path)
    step(target, ("a", 0, 1, True))
    step(target, ("a", 1, 1, False), layers=1)
    step(target, ("a", 1, 1, False))
    target.close()
    trace = load_trace(path)
    assert trace.lens.tolist() == [2]
    assert trace.schedule.row_step.tolist() == [0, 1]


def test_the_limit_stops_recording_with_one_warning(tmp_path: Path, caplog) -> None:
    path = tmp_path / "trace.npz"
    row_bytes = LAYERS * TOP_K + ROW.itemsize
    target = recorder(path, limit_bytes=4 * row_bytes)
    with caplog.at_level(logging.WARNING, logger="vllm.moe_offload"):
        step(target, ("a", 0, 3, True))
        for position in range(3, 8):
            step(target, ("a", position, 1, False))
    assert not target.is_recording
    assert [record.getMessage() for record in caplog.records] == [
        "MoE offload: record_trace stopped after 4 tokens, because the trace would outgrow "
        f"record_trace_limit_gb ({4 * row_bytes / 2**30:.3g} GiB); what was recorded is kept"
    ]
    target.close()
    assert load_trace(path).lens.tolist() == [4]


def test_a_full_disk_stops_recording_not_serving(tmp_path: Path, caplog, monkeypatch) -> None:
    path = tmp_path / "trace.npz"
    target = recorder(path)
    step(target, ("a", 0, 1, True))

    def full_disk(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(target._spool, "_append", full_disk)
    step(target, ("a", 1, 1, False))
    assert "No space left on device" in caplog.text
    assert not target.is_recording


def test_files_are_private_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    target = recorder(path)
    step(target, ("a", 0, 1, True))
    (spool,) = tmp_path.glob("*.spool")
    assert stat.S_IMODE(spool.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in spool.iterdir()} == {0o600}
    target.close()
    target.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.npz"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_failed_write_leaves_the_old_trace_and_what_was_recorded(
    tmp_path: Path, monkeypatch
) -> None:
    path = tmp_path / "trace.npz"
    path.write_bytes(b"old")
    target = recorder(path)
    step(target, ("a", 0, 1, True))

    def failing(*_: object) -> None:
        raise OSError("disk on fire")

    with monkeypatch.context() as patch:
        patch.setattr("vllm_moe_offload.files.os.replace", failing)
        with pytest.raises(
            OSError, match=r"disk on fire; .* kept in .*trace\.npz\.spool: make"
        ):
            target.close()
    assert path.read_bytes() == b"old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "trace.npz",
        "trace.npz.spool",
    ]
    assert finish_trace(path) == (1, 1)
    assert load_trace(path).lens.tolist() == [1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.npz"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_full_disk_loses_nothing_that_was_recorded(small_disk: Path, tmp_path: Path) -> None:
    """Where the spool fills the disk there is no room for the trace beside it."""
    path = small_disk / "trace.npz"
    target = recorder(path, limit_bytes=1 << 30)
    position = 0
    while target.is_recording:
        step(target, ("a", position, 500, True))
        position += 500
    with pytest.raises(OSError, match="No space left on device") as error:
        target.close()
    assert "vllm-moe-offload trace finish" in str(error.value)
    assert [entry.name for entry in small_disk.iterdir()] == ["trace.npz.spool"]
    elsewhere = tmp_path / "trace.npz"
    shutil.copytree(spool_of(path), spool_of(elsewhere))
    assert finish_trace(elsewhere) == (target.num_tokens, 1)
    trace = load_trace(elsewhere)
    assert trace.lens.tolist() == [target.num_tokens]
    assert target.num_tokens > 10_000
    assert trace.ids[-1].tolist() == ids_of(ord("a"), target.num_tokens - 1)


def test_one_server_at_a_time_records_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    target = recorder(path)
    step(target, ("a", 0, 2, True))
    with pytest.raises(FileInUse):
        recorder(path)
    with pytest.raises(TraceError, match="is being recorded"):
        finish_trace(path)
    step(target, ("a", 2, 1, False))
    target.close()
    assert load_trace(path).lens.tolist() == [3]
    recorder(path).close()
    assert load_trace(path).lens.tolist() == [3]


def test_what_a_killed_server_left_makes_room_for_the_next(tmp_path: Path, caplog) -> None:
    path = tmp_path / "trace.npz"
    target = recorder(path)
    step(target, ("a", 0, 2, True))
    shutil.copytree(spool_of(path), tmp_path / "left")
    target.close()
    (tmp_path / "left").rename(spool_of(path))
    (tmp_path / ".trace.npz.12345678.new").touch()
    target = recorder(path)
    assert f"removed {spool_of(path)}" in caplog.text
    target.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.npz"]


def test_long_request_ids_are_not_kept(tmp_path: Path) -> None:
    """What clients call their requests may be long: in an array of numpy's all would be as long."""
    path = tmp_path / "trace.npz"
    target = recorder(path)
    step(target, *((f"{index:03}" + "x" * 100_000, 0, 1, True) for index in range(200)))
    target.close()
    assert load_trace(path).num_requests == 200
    with zipfile.ZipFile(path) as archive:
        assert sum(member.file_size for member in archive.infolist()) < 64 << 10


def test_an_empty_recording_writes_nothing(tmp_path: Path) -> None:
    recorder(tmp_path / "trace.npz").close()
    assert list(tmp_path.iterdir()) == []


def test_many_experts_take_wider_ids(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    target = recorder(path, num_experts=300)
    step(target, ("a", 0, 2, True))
    target.close()
    assert load_trace(path).ids.dtype == np.uint16
