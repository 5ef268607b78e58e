"""Counter files: what a worker writes is what an API server reads, whole, whoever ends when."""

import multiprocessing
import os
import stat
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.counter_workers import INFO, LABELS, count_and_wait, count_up, values_of
from tests.runtimes import EXPERTS, LAYERS, decode_tokens, ids_of, run_layer, runtime_of
from tests.stores import build, layout_of
from vllm_moe_offload.cache.planner import COUNTER_NAMES
from vllm_moe_offload.metrics import (
    COUNTERS,
    FILE_BYTES,
    GAUGES,
    VALUES,
    CounterFile,
    Counters,
    hit_rate,
    merge,
    merge_by_labels,
    read_counters,
)


def test_values_travel(tmp_path):
    file = CounterFile(tmp_path / "rank0.counters", LABELS, INFO)
    (reading,) = read_counters(tmp_path)
    assert set(reading.values.values()) == {0.0}  # there before anything is written
    file.write(range(len(VALUES)))
    (reading,) = read_counters(tmp_path)
    assert reading.labels == LABELS
    assert reading.infos == (INFO,)
    assert reading.is_running
    assert list(reading.values.values()) == list(range(len(VALUES)))
    file.write(values_of(hits=30, misses=1))  # later writes show without reopening
    (reading,) = read_counters(tmp_path)
    assert reading.values["hits"] == 30.0
    assert reading.hit_rate == pytest.approx(30 / 31)


def test_files_are_private_and_complete(tmp_path):
    files = [
        CounterFile(tmp_path / f"rank{rank}.counters", {**LABELS, "rank": str(rank)})
        for rank in range(2)
    ]
    assert sorted(os.listdir(tmp_path)) == ["rank0.counters", "rank1.counters"]
    for file in files:
        assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
        assert file.path.stat().st_size == FILE_BYTES
    assert [reading.labels["rank"] for reading in read_counters(tmp_path)] == ["0", "1"]


def test_a_header_that_is_too_long_is_refused(tmp_path):
    with pytest.raises(ValueError, match="2044"):
        CounterFile(tmp_path / "rank0.counters", {"model_name": "x" * 3000})
    assert not os.listdir(tmp_path)


def test_hit_rate_before_anything_ran():
    assert hit_rate(0, 0) == 1.0


# ---- whole snapshots -----------------------------------------------------------------------


def test_a_reading_belongs_together_while_the_worker_writes(tmp_path):
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    worker = context.Process(target=count_up, args=(tmp_path / "rank0.counters", stop))
    worker.start()
    try:
        seen = []
        while len(set(seen)) < 100:
            for reading in read_counters(tmp_path):
                (number,) = set(reading.values.values())  # all of one write
                seen.append(number)
    finally:
        stop.set()
        worker.join(60)
    assert seen == sorted(seen)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    written=st.integers(1, 5),
    damage=st.lists(st.integers(0, 1023), min_size=1, max_size=8, unique=True),
)
def test_a_write_that_was_cut_short_shows_what_was_before(tmp_path, written, damage):
    file = CounterFile(tmp_path / "rank0.counters", LABELS)
    for number in range(1, written + 1):
        file.write([float(number)] * len(VALUES))
    data = bytearray(file.path.read_bytes())
    # The creation wrote a snapshot, too: the last one is number written + 1.
    begin = 2048 + 1024 * ((written + 1) % 2)
    last = bytes(data[begin : begin + 1024])
    for offset in damage:
        data[begin + offset] ^= 0xFF
    file.path.write_bytes(data)
    (reading,) = read_counters(tmp_path)
    used = len(last.rstrip(b"\0"))
    expected = written - 1 if min(damage) < used else written
    assert set(reading.values.values()) == {float(expected)}
    file.close()
    file.path.unlink()


def test_a_damaged_file_is_left_out_with_one_warning(tmp_path, caplog):
    broken = CounterFile(tmp_path / "rank0.counters", LABELS)
    CounterFile(tmp_path / "rank1.counters", {**LABELS, "rank": "1"})
    broken.write(values_of(hits=1))
    with broken.path.open("r+b") as file:
        file.truncate(2048)
    for _ in range(3):
        assert [reading.labels["rank"] for reading in read_counters(tmp_path)] == ["1"]
    assert caplog.text.count("rank0.counters holds no whole counters") == 1


@settings(
    max_examples=400,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
    derandomize=True,
)
@given(
    changes=st.dictionaries(st.integers(0, 2047), st.integers(0, 255), min_size=1, max_size=5),
    length=st.sampled_from([FILE_BYTES, FILE_BYTES, 2048, 100, 0]),
)
def test_a_damaged_header_is_left_out(tmp_path, changes, length):
    """A scrape goes on, whatever the bytes are, and shows the other workers."""
    broken = CounterFile(tmp_path / "rank0.counters", LABELS, INFO)
    other = CounterFile(tmp_path / "rank1.counters", {**LABELS, "rank": "1"}, INFO)
    sound = broken.path.read_bytes()
    data = bytearray(sound)
    for offset, value in changes.items():
        data[offset] = value
    broken.path.write_bytes(data[:length])
    is_whole = data[:length] == sound
    readings = list(read_counters(tmp_path))
    assert [r.labels["rank"] for r in readings] == (["0", "1"] if is_whole else ["1"])
    for file in (broken, other):
        file.close()
        file.path.unlink()


@pytest.mark.parametrize("kind", ["pipe", "link", "directory"])
def test_what_is_no_counter_file_is_left_out(tmp_path, caplog, kind):
    """Nor is it waited for, or followed."""
    (tmp_path / "elsewhere").mkdir()
    file = CounterFile(tmp_path / "elsewhere" / "rank0.counters", LABELS)
    place = tmp_path / "rank0.counters"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "link":
        place.symlink_to(file.path)
    else:
        place.mkdir()
    for _ in range(2):
        assert list(read_counters(tmp_path)) == []
    assert caplog.text.count("rank0.counters holds no whole counters; left out") == 1


def test_readers_never_wait_long_for_last_figures(tmp_path, monkeypatch):
    """Nor if a worker's clock is ahead of theirs."""
    monkeypatch.setattr("vllm_moe_offload.metrics.SETTLE_SECONDS", 0.05)
    file = CounterFile(tmp_path / "rank0.counters", LABELS)
    file.write(values_of(hits=1), settling_since=time.monotonic() + 3600)
    began = time.monotonic()
    (reading,) = read_counters(tmp_path)
    assert time.monotonic() - began < 30
    assert reading.values["hits"] == 1


# ---- workers that end ----------------------------------------------------------------------


def test_a_killed_worker_keeps_its_counters_and_loses_its_gauges(tmp_path):
    context = multiprocessing.get_context("spawn")
    written = context.Event()
    worker = context.Process(
        target=count_and_wait, args=(tmp_path / "rank0of1-1.counters", written)
    )
    worker.start()
    assert written.wait(60)
    (reading,) = read_counters(tmp_path)
    assert reading.is_running
    worker.kill()
    worker.join()
    (reading,) = read_counters(tmp_path)
    assert not reading.is_running
    assert reading.values["hits"] == 10

    successor = CounterFile(tmp_path / "rank0of1-2.counters", LABELS, {"policy": "lru"})
    successor.write(values_of(hits=1, misses=1, slots=5, resident_experts=2))
    (merged,) = merge_by_labels(read_counters(tmp_path))
    assert merged.labels == LABELS
    assert merged.values["hits"] == 11  # never falls
    assert merged.values["misses"] == 5
    assert merged.values["slots"] == 5
    assert merged.values["resident_experts"] == 2
    assert merged.infos == ({"policy": "lru"},)

    successor.close()
    successor.close()
    last = merge(read_counters(tmp_path))  # what is said when all is over
    assert not last.is_running
    assert last.values["hits"] == 11


def test_what_a_worker_tells_others_is_in_its_memory_too(tmp_path):
    file = CounterFile(tmp_path / "rank0.counters", LABELS, INFO, "pid 7, host b")
    for counters in (file, Counters(LABELS, INFO, "pid 7, host b")):
        assert set(counters.values) == {0.0}
        counters.write(values_of(hits=3))
        assert counters.values == tuple(values_of(hits=3))
        assert (counters.labels, counters.info) == (LABELS, INFO)
        assert counters.worker == "pid 7, host b"
        counters.close()


def test_values_that_may_be_old_say_since_when(tmp_path):
    old = CounterFile(tmp_path / "remote.counters", LABELS, INFO, "pid 7, host b")
    new = CounterFile(tmp_path / "own.counters", LABELS, INFO, "pid 8, host a")
    old.write(values_of(hits=1), time.monotonic() - 30)
    own, remote = read_counters(tmp_path)
    assert own.age_seconds == 0
    assert 30 <= remote.age_seconds < 40
    assert remote.name == "rank 0 (pid 7, host b)"
    assert merge([own, remote]).age_seconds == remote.age_seconds
    assert merge([own, remote]).workers == ("pid 8, host a", "pid 7, host b")
    old.close()
    (own, remote) = read_counters(tmp_path)
    assert remote.age_seconds == 0  # nobody counts on
    assert merge([own, remote]).workers == ("pid 8, host a",)
    new.close()


def test_workers_of_different_labels_stay_apart(tmp_path):
    kept = []
    for engine in range(2):
        for rank in range(2):
            labels = {"model_name": "demo", "engine": str(engine), "rank": str(rank)}
            file = CounterFile(tmp_path / f"{engine}-{rank}.counters", labels, INFO)
            file.write(values_of(hits=10 * engine + rank, slots=3))
            kept.append(file)
    merged = merge_by_labels(read_counters(tmp_path))
    assert [(m.labels["engine"], m.labels["rank"], m.values["hits"]) for m in merged] == [
        ("0", "0", 0),
        ("0", "1", 1),
        ("1", "0", 10),
        ("1", "1", 11),
    ]
    everyone = merge(read_counters(tmp_path))
    assert everyone.values["slots"] == 12
    assert everyone.infos == (INFO,)


# ---- what the runtime writes ---------------------------------------------------------------


def expected_of(runtime):
    """The runtime's own figures, read where they arise."""
    shape = runtime.cache.shape
    resident = [
        (layer, expert)
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
        if runtime.cache.is_resident(layer, expert)
    ]
    return {
        **{name: float(runtime.cache.count(name)) for name in COUNTER_NAMES},
        "read_bytes": float(runtime.read_bytes),
        "stall_seconds": runtime.stall_ns / 1e9,
        "tokens": float(runtime.num_tokens),
        "slots": float(shape.num_slots),
        "resident_experts": float(len(resident)),
        "cache_bytes": float(sum(t.nbytes for t in runtime.pool.tensors.values())),
    }


@pytest.mark.parametrize("slots", [6, LAYERS * EXPERTS])
def test_the_runtime_publishes_from_its_start_to_its_end(tmp_path, slots):
    store = build(tmp_path / "store", layout_of(8192, 12), LAYERS, EXPERTS)
    everything = slots == LAYERS * EXPERTS
    file = CounterFile(tmp_path / "rank0.counters", LABELS)
    runtime = runtime_of(store, slots, 0 if everything else 2, "lrfu", published=file)

    def published():
        (reading,) = read_counters(tmp_path)
        return {name: reading.values[name] for name in expected_of(runtime)}

    before = published()
    assert before == expected_of(runtime)
    assert before["slots"] == slots
    assert before["cache_bytes"] > 0
    if everything:
        runtime.load_everything()
        assert published() == expected_of(runtime)
        assert published()["resident_experts"] == slots
    for step in range(6):
        runtime.begin_step(decode_tokens(["a"], step + 1))
        for layer in range(LAYERS):
            run_layer(runtime, store, layer, ids_of(step % EXPERTS, (step * 3 + layer + 1) % 8))
        assert published() == expected_of(runtime)
    after = published()
    assert after["hits"] + after["misses"] > 0
    if not everything:
        assert after["bypasses"] > 0  # lrfu does not admit everything
    runtime.close()
    (reading,) = read_counters(tmp_path)
    assert not reading.is_running
    assert reading.values["hits"] == after["hits"]


def test_counters_and_gauges_are_all_values():
    assert VALUES == COUNTERS + GAUGES
    assert len(set(VALUES)) == len(VALUES)
