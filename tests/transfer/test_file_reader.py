"""The C++ file reader through its C ABI: bytes, priorities, cancellation, errors."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.file_reads import (
    BLOCK,
    CONTENT_BYTES,
    DEMAND,
    FILE_BYTES,
    MIB,
    PLUG_BYTES,
    PREFETCH,
    Reader,
    Request,
    plug,
)
from tests.forks import in_a_fork
from tests.stores import aligned
from vllm_moe_offload.native import (
    Extent,
    NativeError,
    Read,
    check,
    core,
)


@pytest.fixture(scope="module")
def content() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, CONTENT_BYTES, dtype=np.uint8)


@pytest.fixture(scope="module")
def file(content: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "experts.bin"
    path.write_bytes(content.tobytes())
    os.truncate(path, FILE_BYTES)
    return path


def reader_threads() -> list[Path]:
    return [
        task
        for task in Path("/proc/self/task").iterdir()
        if (task / "comm").read_text().strip() == "vmo-reader"
    ]


def status_of(task: Path) -> dict[str, str]:
    lines = (task / "status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


# ---- bytes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_bytes_land_where_they_belong(file, content, direct, threads):
    sizes = [BLOCK, 3 * BLOCK, MIB - BLOCK, MIB, MIB + BLOCK, 5 * MIB + 3 * BLOCK, 20 * MIB]
    with Reader(file, direct, threads) as reader:
        requests, offset = [], 0
        for tag, size in enumerate(sizes):
            requests.append(Request(tag, offset, [aligned(size)]))
            offset += size
        reader.submit(*requests)
        ended = reader.wait_all()
    assert sorted(ended) == [(tag, 0, size) for tag, size in enumerate(sizes)]
    for request in requests:
        (part,) = request.parts
        assert (part == content[request.offset : request.offset + part.size]).all()


@pytest.mark.parametrize("direct", [True, False])
def test_extents_of_one_request_are_consecutive_in_the_file(file, content, direct):
    parts = [aligned(size) for size in (BLOCK, 2 * MIB, BLOCK, 700 * BLOCK, 3 * BLOCK)]
    with Reader(file, direct) as reader:
        reader.submit(Request(9, 5 * BLOCK, parts))
        assert reader.wait_all() == [(9, 0, sum(part.size for part in parts))]
    together = np.concatenate(parts)
    assert (together == content[5 * BLOCK : 5 * BLOCK + together.size]).all()


@pytest.mark.parametrize(("direct", "size"), [(True, BLOCK), (False, 100)])
def test_more_extents_than_one_system_call_takes(file, content, direct, size):
    parts = [aligned(size) for _ in range(3000)]
    with Reader(file, direct, threads=2) as reader:
        reader.submit(Request(0, 0, parts))
        assert reader.wait_all() == [(0, 0, 3000 * size)]
    assert (np.concatenate(parts) == content[: 3000 * size]).all()


@pytest.mark.parametrize("direct", [True, False])
def test_files_lie_one_behind_the_other(tmp_path, content, direct):
    paths, sizes, begin = [], [5 * BLOCK, 2 * MIB, BLOCK], 0
    for number, size in enumerate(sizes):
        paths.append(tmp_path / f"{number}.bin")
        paths[-1].write_bytes(content[begin : begin + size].tobytes())
        begin += size
    parts = [aligned(size) for size in (5 * BLOCK, MIB, MIB, BLOCK)]
    with Reader(paths, direct) as reader:
        assert core.vmo_reader_file_bytes(reader.handle) == begin
        offsets = np.cumsum([0, *(part.size for part in parts)]).tolist()
        for tag, part in enumerate(parts):
            reader.submit(Request(tag, offsets[tag], [part]))
        reader.submit(Request(9, begin, [aligned(BLOCK)]))
        ended = sorted(reader.wait_all())
    assert ended == [*((tag, 0, part.size) for tag, part in enumerate(parts)), (9, -1, 0)]
    assert (np.concatenate(parts) == content[:begin]).all()


def test_of_several_files_the_missing_one_is_named(file, tmp_path):
    with (
        pytest.raises(NativeError, match=r"cannot open .*/none"),
        Reader([file, tmp_path / "none"]),
    ):
        pass


def test_without_o_direct_nothing_needs_to_be_aligned(file, content):
    whole = np.zeros(3 * MIB, np.uint8)
    parts = [whole[1:8], whole[100 : 2 * MIB], whole[2 * MIB + 1 :]]
    with Reader(file, direct=False) as reader:
        reader.submit(Request(0, 12345, parts))
        assert [error for _, error, _ in reader.wait_all()] == [0]
    together = np.concatenate(parts)
    assert (together == content[12345 : 12345 + together.size]).all()
    assert whole[0] == whole[8] == whole[2 * MIB] == 0


def test_file_bytes(file):
    with Reader(file) as reader:
        assert core.vmo_reader_file_bytes(reader.handle) == FILE_BYTES


# ---- priorities ----------------------------------------------------------------------------


def test_no_prefetch_begins_while_a_demand_waits(file):
    with Reader(file, threads=1) as reader:
        requests = [
            Request(tag, tag * MIB, [aligned(MIB)], PREFETCH if tag % 2 else DEMAND)
            for tag in range(20)
        ]
        reader.submit(*requests)
        order = [tag for tag, _, _ in reader.wait_all()]
    assert order == [*range(0, 20, 2), *range(1, 20, 2)]


def test_a_demand_overtakes_the_rest_of_a_prefetch(file):
    with Reader(file, threads=1) as reader:
        reader.submit(plug(0, PREFETCH))
        reader.submit(Request(1, 0, [aligned(BLOCK)]))
        assert [tag for tag, _, _ in reader.wait_all()] == [1, 0]


def test_promoted_prefetch_goes_first(file):
    with Reader(file, threads=1) as reader:
        reader.submit(
            plug(0),
            *(Request(tag, 0, [aligned(BLOCK)], PREFETCH) for tag in range(1, 6)),
        )
        assert reader.promote(4) == 1
        assert reader.promote(4) == 0  # a demand by now
        assert reader.promote(99) == 0
        assert [tag for tag, _, _ in reader.wait_all()] == [0, 4, 1, 2, 3, 5]


def test_prefetch_works_with_any_number_of_threads(file):
    for threads in (1, 2, 3):
        with Reader(file, threads=threads) as reader:
            reader.submit(*(Request(t, 0, [aligned(MIB)], PREFETCH) for t in range(6)))
            assert sorted(tag for tag, _, _ in reader.wait_all()) == list(range(6))


# ---- dropping ------------------------------------------------------------------------------


def test_a_dropped_read_is_not_reported_and_writes_nothing(file):
    with Reader(file, threads=1) as reader:
        target = aligned(BLOCK)
        reader.submit(
            plug(0),
            Request(1, 0, [target], PREFETCH),
            Request(2, 0, [aligned(BLOCK)]),
        )
        assert reader.drop(1) == 1
        assert reader.drop(1) == 0
        assert reader.drop(2) == 1
        assert [tag for tag, _, _ in reader.wait_all()] == [0]
        assert not target.any()
        reader.submit(Request(1, 0, [target]))  # the tag is free again
        assert [tag for tag, _, _ in reader.wait_all()] == [1]


def test_what_ended_cannot_be_dropped(file):
    with Reader(file) as reader:
        reader.submit(Request(0, 0, [aligned(BLOCK)]))
        while not reader.num_ended.value:
            pass
        assert reader.drop(0) == 0
        assert reader.wait() == [(0, 0, BLOCK)]
        assert reader.drop(0) == 0


@pytest.mark.parametrize("priority", [DEMAND, PREFETCH])
def test_of_a_dropped_read_that_began_no_more_is_read(file, priority):
    with Reader(file, threads=1) as reader:
        request = plug(0, priority)
        target = request.parts[0]
        target.fill(0xEE)
        reader.submit(request)
        while target[0] == 0xEE:
            time.sleep(0.0001)
        assert reader.drop(0) == 0
        ((tag, error, count),) = reader.wait_all()
        assert tag == 0
        if error:  # the disk may have been faster
            assert error == errno.ECANCELED
            assert count < PLUG_BYTES
            before = target.copy()
            time.sleep(0.01)
            np.testing.assert_array_equal(target, before)
        else:
            assert count == PLUG_BYTES
        assert reader.drop(0) == 0
        reader.submit(Request(0, 0, [aligned(BLOCK)]))
        assert reader.wait_all() == [(0, 0, BLOCK)]


def test_close_drops_what_is_queued(file):
    before = len(os.listdir("/proc/self/fd"))
    targets = [aligned(MIB) for _ in range(200)]
    with Reader(file, threads=2) as reader:
        reader.submit(*(Request(t, 0, [part]) for t, part in enumerate(targets)))
    assert not reader_threads()
    assert len(os.listdir("/proc/self/fd")) == before
    copies = [part.copy() for part in targets]
    time.sleep(0.05)
    assert all((a == b).all() for a, b in zip(copies, targets, strict=True))


# ---- waiting -------------------------------------------------------------------------------


def test_wait_does_not_block_when_nothing_is_in_flight(file):
    with Reader(file) as reader:
        assert reader.wait(timeout_ms=-1) == []


def test_capacity_limits_one_wait(file):
    with Reader(file) as reader:
        reader.submit(*(Request(t, 0, [aligned(BLOCK)]) for t in range(10)))
        seen = []
        while batch := reader.wait(capacity=3):
            assert len(batch) <= 3
            seen += [tag for tag, _, _ in batch]
        assert sorted(seen) == list(range(10))


def test_wait_for_several(file):
    with Reader(file, threads=2) as reader:
        reader.submit(*(Request(t, 0, [aligned(MIB)]) for t in range(10)))
        assert len(reader.wait(min_count=4)) >= 4
        reader.submit(*(Request(t, 0, [aligned(MIB)]) for t in range(10, 12)))
        rest = reader.wait(min_count=100)
        assert sorted(tag for tag, _, _ in rest)[-2:] == [10, 11]  # all that were left
        assert reader.wait(min_count=2) == []


def test_a_wait_for_several_gives_what_is_there_after_its_time(file):
    with Reader(file, threads=1) as reader:
        reader.submit(Request(0, 0, [aligned(BLOCK)]), plug(1))
        ended = []
        while not ended:
            ended = reader.wait(timeout_ms=1, min_count=2)
        assert ended == [(0, 0, BLOCK)]


def test_several_waiters(file):
    with Reader(file, threads=2) as reader, ThreadPoolExecutor(2) as waiters:
        reader.submit(*(Request(t, 0, [aligned(MIB)]) for t in range(40)))
        batches = list(waiters.map(lambda n: reader.wait(min_count=n), (5, 3)))
        tags = [tag for batch in batches for tag, _, _ in batch]
        tags += [tag for tag, _, _ in reader.wait_all()]
        assert sorted(tags) == list(range(40))


def test_idle_threads_sleep(file):
    with Reader(file, threads=8):
        began = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - began < 0.1


# ---- threads -------------------------------------------------------------------------------


def test_threads_run_on_the_cores_given(file):
    cpu = max(os.sched_getaffinity(0))
    with Reader(file, threads=3, cpus=[cpu]):
        tasks = reader_threads()
        assert len(tasks) == 3
        assert {status_of(task)["Cpus_allowed_list"] for task in tasks} == {str(cpu)}


def test_threads_do_not_run_signal_handlers(file):
    with Reader(file, threads=1):
        (task,) = reader_threads()
        assert int(status_of(task)["SigBlk"], 16) & 1 << 1  # SIGINT


@pytest.mark.parametrize("cpus", [[-1], [100_000]])
def test_impossible_cores_are_refused(file, cpus):
    with pytest.raises(NativeError, match=r"cpu|bind"), Reader(file, cpus=cpus):
        pass
    assert not reader_threads()


# ---- errors --------------------------------------------------------------------------------


def test_file_that_is_missing_or_not_a_file_is_named(tmp_path):
    with (
        pytest.raises(NativeError, match=r"none\.bin.*No such file"),
        Reader(tmp_path / "none.bin"),
    ):
        pass
    with pytest.raises(NativeError, match="not a regular file"), Reader(tmp_path, direct=False):
        pass


def test_refused_o_direct_is_an_error():
    with pytest.raises(NativeError, match="O_DIRECT"), Reader(Path("/proc/self/status")):
        pass


def test_no_threads_is_an_error(file):
    with pytest.raises(NativeError, match="at least 1 thread"), Reader(file, threads=0):
        pass


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: Request(1, 512, [aligned(BLOCK)]), "multiples of 4096"),
        (lambda: Request(1, 0, [aligned(2 * BLOCK)[100 : 100 + BLOCK]]), "multiples of 4096"),
        (lambda: Request(1, 0, [aligned(BLOCK + 512)]), "multiples of 4096"),
        (lambda: Request(1, 0, [aligned(BLOCK), aligned(0)]), "empty"),
        (lambda: Request(1, 0, []), "no extents"),
        (lambda: Request(1, 0, [aligned(BLOCK)], 2), "priority"),
        (lambda: Request(1, 1 << 63, [aligned(BLOCK)]), "largest file offset"),
        (lambda: Request(0, 0, [aligned(BLOCK)]), "tag 0 is in use"),
    ],
)
def test_an_impossible_request_queues_nothing(file, bad, message):
    with Reader(file) as reader:
        with pytest.raises(NativeError, match=message):
            reader.submit(Request(0, 0, [aligned(BLOCK)]), bad())
        assert reader.wait() == []


def test_tag_is_in_use_until_its_end_was_taken(file):
    with Reader(file) as reader:
        reader.submit(Request(0, 0, [aligned(BLOCK)]))
        with pytest.raises(NativeError, match="in use"):
            reader.submit(Request(0, 0, [aligned(BLOCK)]))
        assert len(reader.wait_all()) == 1
        reader.submit(Request(0, 0, [aligned(BLOCK)]))
        assert len(reader.wait_all()) == 1


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("kept", [0, BLOCK, 100, 2 * MIB + 700])
def test_a_file_that_ends_too_early_is_an_error(tmp_path, content, direct, kept):
    path = tmp_path / "short.bin"
    path.write_bytes(content[: 4 * MIB].tobytes())
    with Reader(path, direct) as reader:
        os.truncate(path, kept)
        reader.submit(Request(5, 0, [aligned(4 * MIB)]))
        ((tag, error, arrived),) = reader.wait_all()
    assert (tag, error) == (5, -1)
    assert arrived <= kept


def test_one_failed_read_does_not_hurt_others(tmp_path, content):
    path = tmp_path / "short.bin"
    path.write_bytes(content[: 4 * MIB].tobytes())
    good = aligned(MIB)
    with Reader(path) as reader:
        reader.submit(Request(0, 8 * MIB, [aligned(8 * MIB)]), Request(1, 0, [good]))
        assert sorted(reader.wait_all()) == [(0, -1, 0), (1, 0, MIB)]
    assert (good == content[:MIB]).all()


def test_unwritable_destination_is_an_errno(file):
    with Reader(file) as reader:
        extents = (Extent * 1)(Extent(BLOCK, BLOCK))  # nothing is mapped there
        read = Read(0, extents, 1, DEMAND, 3)
        check(core.vmo_reader_submit(reader.handle, ctypes.byref(read), 1))
        ((tag, error, _),) = reader.wait_all()
    assert (tag, os.strerror(error)) == (3, "Bad address")


# ---- fork ----------------------------------------------------------------------------------


def forked_calls(reader: Reader) -> None:
    """What needs the threads says that they are elsewhere."""
    calls = [
        lambda: reader.submit(Request(8000, 0, [aligned(BLOCK)])),
        reader.wait,
        lambda: reader.promote(0),
        lambda: reader.drop(0),
    ]
    for call in calls:
        with pytest.raises(NativeError, match=f"of process {os.getppid()} .* forked from it"):
            call()


def forked_close(reader: Reader) -> None:
    before = len(os.listdir("/proc/self/fd"))
    core.vmo_reader_close(reader.handle)
    assert len(os.listdir("/proc/self/fd")) == before - 1


@pytest.mark.parametrize("body", [forked_calls, forked_close])
def test_a_forked_process_gets_errors_and_can_close(file, content, body):
    with Reader(file) as reader:
        in_a_fork(lambda: body(reader))
        target = aligned(BLOCK)
        reader.submit(Request(0, 0, [target]))
        assert reader.wait_all() == [(0, 0, BLOCK)]
    assert (target == content[:BLOCK]).all()


@pytest.mark.parametrize("body", [forked_calls, forked_close])
def test_a_process_that_is_forked_while_threads_read_and_wait(file, body):
    """They are in the midst of anything then, and what one of them locked stays locked."""
    with Reader(file, threads=4) as reader, ThreadPoolExecutor(1) as waiter:
        reader.submit(*(Request(tag, 0, [aligned(MIB)]) for tag in range(200)), plug(200))
        waiting = waiter.submit(lambda: reader.wait(min_count=16))
        for _ in range(5):
            in_a_fork(lambda: body(reader))
        ended = waiting.result() + reader.wait_all()
        assert sorted(tag for tag, _, _ in ended) == list(range(201))


# ---- any order of operations -----------------------------------------------------------------

operations = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"), st.integers(0, 30), st.integers(1, 600), st.sampled_from([0, 1])
        ),
        st.tuples(st.just("drop"), st.integers(0, 40)),
        st.tuples(st.just("promote"), st.integers(0, 40)),
        st.tuples(st.just("wait"), st.sampled_from([0, 1])),
    ),
    max_size=40,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(operations=operations, threads=st.integers(1, 5), direct=st.booleans())
def test_every_read_ends_once_or_is_dropped(file, content, operations, threads, direct):
    pending: dict[int, Request] = {}
    ended: list[int] = []
    dropped: set[int] = set()  # after they began

    def note(batch):
        for tag, error, arrived in batch:
            (part,) = pending.pop(tag).parts  # KeyError: reported twice, or after its drop
            begin = tag % 50 * BLOCK
            ended.append(tag)
            if error == errno.ECANCELED:
                assert tag in dropped
                continue
            assert (error, arrived) == (0, part.size)
            assert (part == content[begin : begin + part.size]).all()

    tag = 0
    with Reader(file, direct, threads) as reader:
        for name, *arguments in operations:
            if name == "submit":
                _, blocks, priority = arguments
                begin = tag % 50 * BLOCK
                pending[tag] = Request(tag, begin, [aligned(blocks * BLOCK)], priority)
                reader.submit(pending[tag])
                tag += 1
            elif name == "drop":
                if reader.drop(arguments[0]):
                    (part,) = pending.pop(arguments[0]).parts
                    assert not part.any()
                elif arguments[0] in pending:
                    dropped.add(arguments[0])
            elif name == "promote":
                if reader.promote(arguments[0]):
                    assert pending[arguments[0]].priority == PREFETCH
                    pending[arguments[0]].priority = DEMAND
            else:
                note(reader.wait(timeout_ms=arguments[0]))
        note(reader.wait_all())
        assert not pending
    assert len(set(ended)) == len(ended)
