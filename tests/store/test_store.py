"""The expert store: what is written is what opens, and nothing else opens."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.stores import MIXED, build, identity, layer_tensors, layout_of
from vllm_moe_offload.store import (
    BackgroundWriter,
    StoreBuilder,
    StoreError,
    StoreIdentity,
    checkpoint_fingerprint,
    open_store,
    store_lock,
)

REPOSITORY = Path(__file__).resolve().parents[2]


def place(store_dir: Path, **changes: object) -> tuple[Path, StoreIdentity]:
    which = identity(**changes)
    return which.directory(store_dir, "test/model"), which


def record_of(layout, tensors, expert: int) -> bytes:
    """What a record must hold, from its description in layout.py."""
    parts = [tensors[spec.name][expert].tobytes() for spec in (*layout.direct, *layout.tail)]
    return b"".join(parts).ljust(layout.record_bytes, b"\0")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def flip_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (value,) = file.read(1)
        file.seek(offset)
        file.write(bytes([value ^ 1]))


# ---- build and open ------------------------------------------------------------------------


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    sizes=st.lists(
        st.one_of(st.integers(1, 9000), st.sampled_from([4096, 12288])), min_size=1, max_size=5
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
    store.verify()


def test_records_larger_than_the_write_buffers(tmp_path):
    layout = layout_of(20 << 20, 12345)
    store = build(tmp_path, layout, num_layers=1, num_experts=3)
    store.verify()
    tensors = layer_tensors(layout, 3, 0)
    assert store.path.read_bytes() == b"".join(record_of(layout, tensors, e) for e in range(3))


def test_buffers_are_not_refilled_before_they_are_written(tmp_path, monkeypatch):
    real = os.pwrite

    def slow_pwrite(descriptor, view, offset):
        time.sleep(0.05)
        return real(descriptor, view, offset)

    monkeypatch.setattr(os, "pwrite", slow_pwrite)
    build(tmp_path, layout_of(12 << 20), num_layers=1, num_experts=7).verify()


def test_reopened_store_equals_the_built_one(tmp_path):
    built = build(tmp_path)
    assert open_store(built.directory, built.identity, MIXED) == built
    assert open_store(built.directory, None) == built
    assert (built.num_layers, built.num_experts, built.layout) == (3, 4, MIXED)


def test_missing_store_is_none(tmp_path):
    directory, which = place(tmp_path)
    assert open_store(directory, which) is None


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
    store.verify()
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
    assert mode_of(store.directory.with_name("rank0of1.lock")) == 0o600


def test_record_offset_outside_the_model_is_an_error(tmp_path):
    store = build(tmp_path)
    for layer, expert in ((3, 0), (0, 4), (-1, 0), (0, -1)):
        with pytest.raises(IndexError, match=f"expert {expert} of layer {layer}"):
            store.record_offset(layer, expert)


def test_verify_reports_progress(tmp_path):
    seen = []
    build(tmp_path).verify(lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 12) for i in range(12)]


# ---- identity ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint": "other"},
        {"load_format": "dummy"},
        {"dtype": "float16"},
        {"quantization": "fp8"},
        {"kernel": "CPUExperts:amx"},
        {"padded_shape": (64, 256)},
        {"tp_size": 2},
        {"vllm_version": "0.33.0"},
        {"format_version": 2},
    ],
)
def test_every_field_changes_the_key(change):
    assert identity(**change).key != identity().key


def test_ranks_lie_beside_each_other(tmp_path):
    first, _ = place(tmp_path, tp_rank=0, tp_size=2)
    second, _ = place(tmp_path, tp_rank=1, tp_size=2)
    assert first.parent == second.parent
    assert (first.name, second.name) == ("rank0of2", "rank1of2")
    assert first.parent.name == f"model-{identity(tp_size=2).key[:16]}"


@pytest.mark.parametrize("model", ["../..", "/", "a b/ü!x", "org/Mixtral-8x7B-v0.1", "x" * 300])
def test_any_model_name_gives_one_directory_below_store_dir(tmp_path, model):
    directory = identity().directory(tmp_path, model)
    assert directory.resolve().parent.parent == tmp_path.resolve()


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "mixtral"}')
    for shard in range(2):
        header = json.dumps({"w": {"dtype": "U8", "shape": [9 << 20], "data_offsets": [0, 1]}})
        body = np.random.default_rng(shard).integers(0, 256, 9 << 20, dtype=np.uint8)
        (path / f"model-{shard}.safetensors").write_bytes(
            len(header).to_bytes(8, "little") + header.encode() + body.tobytes()
        )
    return path


def test_copied_checkpoint_keeps_its_fingerprint(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    (copy / "README.md").write_text("not part of the model")
    assert checkpoint_fingerprint(copy) == checkpoint_fingerprint(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: (path / "config.json").write_text('{"model_type": "mixtra1"}'),
        lambda path: flip_byte(path / "model-1.safetensors", 12),  # in the header
        lambda path: flip_byte(path / "model-1.safetensors", (4 << 20) + 100),
        lambda path: flip_byte(path / "model-0.safetensors", (9 << 20) + 20),  # the end
        lambda path: os.truncate(path / "model-0.safetensors", 8 << 20),
        lambda path: (path / "model-0.safetensors").rename(path / "model-2.safetensors"),
        lambda path: (path / "model-0.safetensors").unlink(),
        lambda path: (path / "model-0.safetensors").write_bytes(b""),
    ],
)
def test_changed_checkpoint_gets_another_fingerprint(checkpoint, change):
    before = checkpoint_fingerprint(checkpoint)
    change(checkpoint)
    assert checkpoint_fingerprint(checkpoint) != before


def test_rewritten_weights_of_equal_size_are_noticed(checkpoint):
    before = checkpoint_fingerprint(checkpoint)
    path = checkpoint / "model-0.safetensors"
    content = bytearray(path.read_bytes())
    content[200:] = np.frombuffer(content[200:], np.uint8)[::-1].tobytes()
    path.write_bytes(content)
    assert checkpoint_fingerprint(checkpoint) != before


def test_fingerprint_of_what_is_no_checkpoint(tmp_path):
    with pytest.raises(StoreError, match="not a directory"):
        checkpoint_fingerprint(tmp_path / "org" / "model")
    with pytest.raises(StoreError, match=r"config\.json"):
        checkpoint_fingerprint(tmp_path)


# ---- damaged and foreign stores ------------------------------------------------------------


@pytest.mark.parametrize("change", [-1, 1, -4096])
def test_wrong_size_does_not_open(tmp_path, change):
    store = build(tmp_path)
    os.truncate(store.path, store.file_bytes + change)
    with pytest.raises(
        StoreError, match=rf"experts\.bin has .* bytes.*delete {store.directory}"
    ):
        open_store(store.directory, store.identity)


@pytest.mark.parametrize("name", ["experts.bin", "manifest.json"])
def test_missing_file_does_not_open(tmp_path, name):
    store = build(tmp_path)
    (store.directory / name).unlink()
    with pytest.raises(StoreError, match=rf"{name}.*delete"):
        open_store(store.directory, store.identity)


def test_store_of_another_model_does_not_open(tmp_path):
    store = build(tmp_path)
    directory, which = place(tmp_path, checkpoint="another")
    directory.parent.mkdir()
    shutil.copytree(store.directory, directory)
    with pytest.raises(StoreError, match=r"another model.*checkpoint: 'c0ffee', not 'another'"):
        open_store(directory, which)


def test_other_layout_does_not_open(tmp_path):
    store = build(tmp_path)
    with pytest.raises(StoreError, match="its experts hold"):
        open_store(store.directory, store.identity, layout_of(4096))


def edit(manifest: dict, **changes: object) -> str:
    return json.dumps(manifest | changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: "", "not a valid manifest"),
        (lambda m: json.dumps(m)[:-10], "not a valid manifest"),
        (lambda m: "[1]", "not a valid manifest"),
        (lambda m: edit(m, format="something else"), "not a valid manifest"),
        (lambda m: edit(m, format_version=99), "format version 99, this code reads"),
        (lambda m: edit(m, num_layers=4), "checksums"),
        (lambda m: edit(m, file_bytes=1), "says 1 bytes"),
        (lambda m: edit(m, checksums=[["xyz"] * 4] * 3), "not valid"),
        (lambda m: edit(m, layout=[]), "not valid"),
        (lambda m: edit(m, layout=[{"name": "t"}]), "not valid"),
        (lambda m: edit(m, surprise=1), "surprise"),
    ],
)
def test_damaged_manifest_does_not_open(tmp_path, damage, message):
    store = build(tmp_path)
    path = store.directory / "manifest.json"
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(StoreError, match=message) as caught:
        open_store(store.directory, store.identity)
    assert str(path) in str(caught.value)
    assert f"delete {store.directory}" in str(caught.value)


def test_verify_finds_flipped_bytes_and_names_the_experts(tmp_path):
    store = build(tmp_path)
    flip_byte(store.path, store.record_offset(1, 2) + 5)
    flip_byte(store.path, store.record_offset(2, 3) + MIXED.record_bytes - 1)  # padding
    with pytest.raises(StoreError, match=r"2 of 12 records .*\(1, 2\), \(2, 3\); delete"):
        store.verify()


def test_verify_finds_a_truncated_file(tmp_path):
    store = build(tmp_path)
    os.truncate(store.path, store.record_offset(2, 3) + 100)
    with pytest.raises(StoreError, match=r"1 of 12 records .*\(2, 3\)"):
        store.verify()


# ---- builds that fail ----------------------------------------------------------------------


def build_layers(directory: Path, which: StoreIdentity, layers: Iterable[int]) -> None:
    """Builds a store of three layers from these."""
    with StoreBuilder(directory, which, 3, 4) as builder:
        for layer in layers:
            builder.write_layer(layer, MIXED, layer_tensors(MIXED, 4, layer))
        builder.commit()


def leftovers(directory: Path) -> list[Path]:
    return list(directory.parent.glob("*.building-*"))


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
        builder.commit().verify()


def test_an_existing_store_is_not_overwritten(tmp_path):
    store = build(tmp_path)
    with pytest.raises(StoreError, match="exists already"):
        build(tmp_path)
    store.verify()


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
        build(disk, layout).verify()


def test_file_system_that_refuses_o_direct_at_the_first_write(tmp_path, monkeypatch):
    import fcntl

    real = os.pwrite

    def pwrite(descriptor, view, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, view, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    build(tmp_path).verify()


# ---- several processes ---------------------------------------------------------------------

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
from tests.stores import MIXED, identity, layer_tensors
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
store.verify()
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
        build(tmp_path).verify()
    assert not leftovers(directory)
    assert f"removing {left}" in caplog.text


def test_the_directory_of_a_living_builder_is_left_alone(tmp_path):
    directory, which = place(tmp_path)
    with StoreBuilder(directory, which, 1, 4) as first:
        first.write_layer(0, MIXED, layer_tensors(MIXED, 4, 0))
        (left,) = leftovers(directory)
        with StoreBuilder(directory, which, 1, 4):
            assert left in leftovers(directory)
        first.commit().verify()


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


# ---- store_dir -----------------------------------------------------------------------------


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


def test_store_of_another_user_does_not_open(tmp_path, monkeypatch):
    store = build(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(StoreError, match=r"belongs to user.*store_dir"):
        open_store(store.directory, store.identity)


def test_store_dir_that_is_not_writable(tmp_path, monkeypatch):
    directory, _ = place(tmp_path)
    if os.geteuid() == 0:  # root may write anywhere
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    else:
        tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="store_dir"), store_lock(directory):
        pass


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
