"""Building a store: what is written, and what a build that fails leaves."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.stores import (
    MIXED,
    assert_intact,
    build,
    layer_tensors,
    layout_of,
    leftovers,
    place,
)
from vllm_moe_offload.store import (
    BackgroundWriter,
    StoreBuilder,
    StoreError,
    StoreIdentity,
    open_store,
)


def record_of(layout, tensors, expert: int) -> bytes:
    """What a record must hold, from its description in layout.py."""
    parts = [tensors[spec.name][expert].tobytes() for spec in (*layout.direct, *layout.tail)]
    return b"".join(parts).ljust(layout.record_bytes, b"\0")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---- what is written ---------------------------------------------------------------------


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    sizes=st.lists(
        st.one_of(st.integers(1, 9000), st.sampled_from([4096, 12288])), min_size=1, max_size=12
    ),
    num_layers=st.integers(1, 3),
    num_experts=st.integers(1, 5),
)
def test_file_holds_every_record(tmp_path, sizes, num_layers, num_experts):
    layout = layout_of(*sizes)
    shutil.rmtree(tmp_path)
    store = build(tmp_path, layout, num_layers, num_experts)
    content = store.path.read_bytes()
    assert len(content) == store.file_bytes == num_layers * num_experts * layout.record_bytes
    for layer in range(num_layers):
        tensors = layer_tensors(layout, num_experts, layer)
        for expert in range(num_experts):
            begin = store.record_offset(layer, expert)
            record = content[begin : begin + layout.record_bytes]
            assert begin % 4096 == 0
            assert record == record_of(layout, tensors, expert)
            assert store.checksum(layer, expert) == xxhash.xxh3_64_intdigest(record)
    assert_intact(store)


def test_records_larger_than_the_write_buffers(tmp_path):
    layout = layout_of(20 << 20, 12345)
    store = build(tmp_path, layout, num_layers=1, num_experts=3)
    assert_intact(store)
    tensors = layer_tensors(layout, 3, 0)
    assert store.path.read_bytes() == b"".join(record_of(layout, tensors, e) for e in range(3))


def test_buffers_are_not_refilled_before_they_are_written(tmp_path, monkeypatch):
    real = os.pwrite

    def slow_pwrite(descriptor, view, offset):
        time.sleep(0.05)
        return real(descriptor, view, offset)

    monkeypatch.setattr(os, "pwrite", slow_pwrite)
    assert_intact(build(tmp_path, layout_of(12 << 20), num_layers=1, num_experts=7))


def test_layers_may_come_in_any_order(tmp_path):
    directory, which = place(tmp_path)
    with StoreBuilder(directory, which, 3, 4) as builder:
        for layer in (2, 0, 1):
            builder.write_layer(layer, MIXED, layer_tensors(MIXED, 4, layer))
        shuffled = builder.commit()
    assert shuffled.path.read_bytes() == build(tmp_path / "other").path.read_bytes()


def test_arrays_may_change_once_write_layer_returned(tmp_path):
    directory, which = place(tmp_path)
    with StoreBuilder(directory, which, 3, 4) as builder:
        for layer in range(3):
            tensors = layer_tensors(MIXED, 4, layer)
            builder.write_layer(layer, MIXED, tensors)
            for array in tensors.values():
                array.fill(0)
        store = builder.commit()
    assert_intact(store)
    assert store.path.read_bytes() == build(tmp_path / "other").path.read_bytes()


def test_rows_need_not_be_contiguous(tmp_path):
    directory, which = place(tmp_path)
    tensors = {
        name: np.ascontiguousarray(array.T).T
        for name, array in layer_tensors(MIXED, 4, 0).items()
    }
    with StoreBuilder(directory, which, 1, 4) as builder:
        builder.write_layer(0, MIXED, tensors)
        store = builder.commit()
    expected = build(tmp_path / "other", num_layers=1)
    assert store.path.read_bytes() == expected.path.read_bytes()


def test_files_are_private(tmp_path):
    store = build(tmp_path / "new" / "store")
    assert mode_of(tmp_path / "new" / "store") == 0o700
    assert mode_of(store.directory.parent) == mode_of(store.directory) == 0o700
    assert mode_of(store.path) == mode_of(store.directory / "manifest.json") == 0o600
    assert mode_of(store.directory.with_name("whole.lock")) == 0o600


# ---- builds that fail --------------------------------------------------------------------


def build_layers(directory: Path, which: StoreIdentity, layers: Iterable[int]) -> None:
    """Builds a store of three layers from these."""
    with StoreBuilder(directory, which, 3, 4) as builder:
        for layer in layers:
            builder.write_layer(layer, MIXED, layer_tensors(MIXED, 4, layer))
        builder.commit()


def test_an_exception_leaves_nothing(tmp_path):
    directory, which = place(tmp_path)

    def build_and_fail():
        with StoreBuilder(directory, which, 3, 4) as builder:
            builder.write_layer(0, MIXED, layer_tensors(MIXED, 4, 0))
            raise RuntimeError("the model is broken")

    with pytest.raises(RuntimeError, match="model"):
        build_and_fail()
    assert open_store(directory, which) is None
    assert not leftovers(directory)


def test_a_store_without_all_layers_is_not_committed(tmp_path):
    directory, which = place(tmp_path)
    with pytest.raises(ValueError, match=r"layers \[1, 2\]"):
        build_layers(directory, which, [0])
    assert open_store(directory, which) is None
    assert not leftovers(directory)


def test_wrong_arguments_of_write_layer(tmp_path):
    directory, which = place(tmp_path)
    good = layer_tensors(MIXED, 4, 0)
    with StoreBuilder(directory, which, 2, 4) as builder:
        builder.write_layer(0, MIXED, good)
        for layer in (0, 2, -1):
            with pytest.raises(ValueError, match=f"layer {layer} is not"):
                builder.write_layer(layer, MIXED, good)
        with pytest.raises(ValueError, match="another layout"):
            builder.write_layer(1, layout_of(4096), layer_tensors(layout_of(4096), 4, 0))
        with pytest.raises(ValueError, match="are not those"):
            builder.write_layer(1, MIXED, {"t0": good["t0"]})
        with pytest.raises(ValueError, match="t1 must be uint8"):
            builder.write_layer(1, MIXED, good | {"t1": good["t1"].astype(np.float32)})
        with pytest.raises(ValueError, match="t1 must be uint8"):
            builder.write_layer(1, MIXED, good | {"t1": good["t1"][:2]})
        builder.write_layer(1, MIXED, good)
        assert_intact(builder.commit())


def test_an_existing_store_is_not_overwritten(tmp_path):
    store = build(tmp_path)
    with pytest.raises(StoreError, match="exists already"):
        build(tmp_path)
    assert_intact(store)


def test_not_enough_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    directory, which = place(tmp_path)
    status = os.statvfs(tmp_path)
    fields = list(status)
    fields[4] = 10  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(fields))
    with (
        pytest.raises(
            StoreError, match=r"No space left.* needs \d+ bytes.*are free.*store_dir"
        ),
        StoreBuilder(directory, which, 3, 4) as builder,
    ):
        builder.write_layer(0, MIXED, layer_tensors(MIXED, 4, 0))
    assert not leftovers(directory)


def test_a_disk_that_fills_up_meanwhile(tmp_path, monkeypatch):
    directory, which = place(tmp_path)
    written, real = [], os.pwrite

    def pwrite(descriptor, view, offset):
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(offset)
        return real(descriptor, view, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(StoreError, match=r"No space left.* needs \d+ bytes.*store_dir"):
        build_layers(directory, which, range(3))
    assert open_store(directory, which) is None
    assert not leftovers(directory)


def test_file_size_limit_is_an_error_that_names_the_store(tmp_path, monkeypatch):
    directory, which = place(tmp_path)

    def pwrite(descriptor, view, offset):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(StoreError, match=rf"{directory}.*File too large"):
        build_layers(directory, which, range(3))


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    path.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk takes root")
    if subprocess.run(options, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_real_full_disk(tmp_path):
    layout = layout_of(1 << 20)
    with small_disk(tmp_path / "disk", "24m") as disk:
        directory, which = place(disk)

        def build_while_somebody_fills_the_disk():
            with StoreBuilder(directory, which, 3, 4) as builder:
                builder.write_layer(0, layout, layer_tensors(layout, 4, 0))
                (disk / "log").write_bytes(bytes(15 << 20))
                for layer in (1, 2):
                    builder.write_layer(layer, layout, layer_tensors(layout, 4, layer))
                builder.commit()

        with pytest.raises(StoreError, match=r"No space left.*store_dir"):
            build_while_somebody_fills_the_disk()
        assert open_store(directory, which) is None
        assert not leftovers(directory)
        (disk / "log").unlink()
        assert_intact(build(disk, layout))


def test_file_system_that_refuses_o_direct_at_the_first_write(tmp_path, monkeypatch):
    real = os.pwrite

    def pwrite(descriptor, view, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, view, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert_intact(build(tmp_path))


# ---- in the background -------------------------------------------------------------------


def test_a_layer_that_fails_in_the_background_is_an_error_of_the_next_call(
    tmp_path,
) -> None:
    directory, which = place(tmp_path)
    with StoreBuilder(directory, which, 3, 4) as builder, BackgroundWriter(builder) as writer:
        writer.write_layer(0, MIXED, layer_tensors(MIXED, 4, 0))
        writer.write_layer(0, MIXED, layer_tensors(MIXED, 4, 0))  # written already
        with pytest.raises(ValueError, match="written already"):
            writer.write_layer(1, MIXED, layer_tensors(MIXED, 4, 1))
        writer.wait()  # said once
    assert not directory.exists()


def test_layers_written_in_the_background_are_the_same_store(tmp_path) -> None:
    wanted = build(tmp_path / "wanted", MIXED, 3, 4).path.read_bytes()
    directory, which = place(tmp_path)
    with StoreBuilder(directory, which, 3, 4) as builder, BackgroundWriter(builder) as writer:
        for layer in range(3):
            writer.write_layer(layer, MIXED, layer_tensors(MIXED, 4, layer))
        writer.wait()
        assert builder.commit().path.read_bytes() == wanted
