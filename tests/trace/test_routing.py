"""Routing traces as files: what is read, and what is refused before it can do harm."""

from __future__ import annotations

import io
import resource
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.synthetic_trace import synthetic_trace
from tests.trace.mutations import mutated
from vllm_moe_offload.replay.run import replay, replay_recorded
from vllm_moe_offload.trace.inspect import describe
from vllm_moe_offload.trace.routing import TraceError, load_trace

EXPERTS = 4
Arrays = dict[str, Any]


def unscheduled() -> Arrays:
    """Two requests of two tokens, as a program may write them."""
    return {
        "ids": np.zeros((4, 2, 1), np.uint8),
        "starts": np.array([0, 2]),
        "lens": np.array([2, 2]),
        "num_experts": EXPERTS,
    }


def scheduled() -> Arrays:
    """The same as a server records it: in three steps, a guess was wrong."""
    return unscheduled() | {
        "prefill_lens": np.array([1, 2]),
        "row_step": np.array([0, 0, 1, 1, 2]),
        "row_request": np.array([0, 1, 0, 0, 1], np.int32),
        "row_position": np.array([0, 0, 1, 2, 1]),
        "row_token": np.array([0, 2, 1, 4, 3]),
        "row_is_draft": np.array([False, False, False, True, False]),
        "recomputed_ids": np.ones((1, 2, 1), np.uint8),
        "first_positions": np.array([0, 0]),
        "end_steps": np.array([2, -1]),
        "layer_ids": np.array([0, 1]),
        "slots": 3,
        "staging_slots": 2,
        "own_experts": np.array([0, 1, 2]),
    }


def save(path: Path, arrays: Arrays) -> Path:
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def test_a_trace_is_read(tmp_path: Path) -> None:
    names = {"names": np.array(["a", "b"]), "weights": np.ones((4, 2, 1), np.float16)}
    trace = load_trace(save(tmp_path / "trace.npz", scheduled() | names))
    assert trace.names == ["a", "b"]
    assert (trace.num_requests, trace.num_layers, trace.top_k) == (2, 2, 1)
    assert trace.schedule is not None
    assert trace.schedule.row_is_draft.tolist() == [False, False, False, True, False]
    assert trace.as_recorded().num_experts == 3
    assert load_trace(save(tmp_path / "trace.npz", unscheduled())).schedule is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lens": None}, "not a routing trace: it lacks lens"),
        ({"ids": np.zeros((4, 2), np.uint8)}, r"must have shape \[tokens, layers, k\]"),
        ({"ids": np.zeros((4, 2, 1))}, "ids must be integers, are float64"),
        ({"ids": np.full((4, 2, 1), 4, np.uint8)}, r"ids must lie in \[0, num_experts = 4\)"),
        ({"ids": np.full((4, 2, 1), -1, np.int8)}, r"ids must lie in \[0, num_experts = 4\)"),
        ({"ids": np.zeros((4, 0, 1), np.uint8)}, "not 0 layers of 4"),
        ({"ids": np.zeros((4, 2, 0), np.uint8)}, r"k must lie in \[1, num_experts = 4\], is 0"),
        ({"ids": np.zeros((4, 2, 5), np.uint8)}, r"k must lie in \[1, num_experts = 4\], is 5"),
        ({"num_experts": 0}, r"num_experts must lie in \[1, 65536\], is 0"),
        (
            {"num_experts": 2**60},
            r"num_experts must lie in \[1, 65536\], is 1152921504606846976",
        ),
        ({"num_experts": 4.0}, "num_experts must be integers, are float64"),
        ({"num_experts": np.array([4, 5])}, r"num_experts must have shape \[\]"),
        (
            {"ids": np.zeros((1, 2**17, 1), np.uint8), "num_experts": 64}
            | {"starts": np.array([0]), "lens": np.array([1])},
            "not 131072 layers of 64",
        ),
        ({"lens": np.array([2, 3])}, "lies outside the 4 tokens"),
        ({"lens": np.array([2])}, "lens has 1 requests, other arrays have 2"),
        ({"lens": np.array([2, 2**63 - 1])}, r"lens must lie in \[0, tokens \+ 1 = 5\)"),
        ({"starts": np.array([0, 2**64 - 1], np.uint64)}, r"starts must lie in \[0, tokens"),
        ({"starts": np.array([-1, 2])}, r"starts must lie in \[0, tokens"),
        ({"starts": np.array([0, 1])}, "requests must follow each other"),
        ({"starts": np.array(7)}, r"starts must have shape \[requests\], has \[\]"),
        ({"prefill_lens": np.array([1, 3])}, "prefill_lens must lie between 0 and lens"),
        ({"prefill_lens": np.array([1, -1])}, "prefill_lens must lie between 0 and lens"),
        ({"names": np.array(["a"])}, "names has 1 requests, other arrays have 2"),
        ({"names": np.array([1, 2])}, "names must be text, are int64"),
        (
            {"names": np.array([object()] * 2)},
            "names holds Python objects, which are never read",
        ),
        ({"weights": np.full((4, 2, 1), np.nan, np.float16)}, "weights must be finite"),
        ({"weights": np.ones((4, 2, 2), np.float16)}, "weights has 2 k, other arrays have 1"),
        ({"row_step": np.zeros(1, np.int64)}, "its schedule lacks row_request"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, changes: Arrays, message: str) -> None:
    path = save(tmp_path / "trace.npz", unscheduled() | changes)
    with pytest.raises(TraceError, match=message) as error:
        load_trace(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_step": np.array([0, 0, 2, 1, 1])}, "row_step must be ascending"),
        ({"row_step": np.array([-1, 0, 1, 1, 2])}, r"row_step must lie in \[0, "),
        ({"row_step": np.zeros(4, np.int64)}, "other arrays have 4"),
        (
            {"row_request": np.array([0, 1, 0, 0, 2])},
            r"row_request must lie in \[0, requests = 2",
        ),
        ({"row_request": np.array([0, 1, 0, 0, -1])}, "row_request must lie in"),
        ({"row_request": np.zeros(5)}, "row_request must be integers, are float64"),
        ({"row_token": np.array([0, 2, 1, 5, 3])}, "row_token must lie in"),
        ({"row_position": np.array([0, 0, 1, 3, 1])}, "row_position must ascend by 1"),
        ({"row_position": np.array([0, 0, 2**62, 2**62 + 1, 1])}, "row_position must lie in"),
        (
            {"row_step": np.zeros(5, np.int64), "row_request": np.array([0, 1, 0, 0, 1])},
            "a request's tokens of a step together",
        ),
        ({"row_is_draft": np.ones(5)}, "row_is_draft must be booleans"),
        ({"recomputed_ids": np.full((1, 2, 1), 9, np.uint8)}, "recomputed_ids must lie in"),
        ({"recomputed_ids": np.ones((1, 3, 1), np.uint8)}, "3 layers, other arrays have 2"),
        ({"first_positions": np.array([0, -7])}, "first_positions must lie in"),
        ({"first_positions": np.zeros(3, np.int64)}, "3 requests, other arrays have 2"),
        ({"end_steps": np.array([2, -2])}, r"end_steps must lie in \[-1, "),
        ({"layer_ids": np.array([0])}, "layer_ids has 1 layers, other arrays have 2"),
        ({"slots": -1}, "slots must lie in"),
        ({"slots": 2**60}, "slots must lie in"),
        ({"staging_slots": 2**60}, "staging_slots must lie in"),
        ({"own_experts": np.array([0, 4])}, "own_experts must lie in"),
        ({"own_experts": np.array([1, 1])}, "own_experts must be different"),
        ({"own_experts": np.zeros(0, np.int64)}, "own_experts must be different, and not none"),
    ],
)
def test_schedules_that_cannot_be_are_named(
    tmp_path: Path, changes: Arrays, message: str
) -> None:
    path = save(tmp_path / "trace.npz", scheduled() | changes)
    with pytest.raises(TraceError, match=message):
        load_trace(path)


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    path.write_text("hello")
    with pytest.raises(TraceError, match=r"not an \.npz routing trace: File is not a zip file"):
        load_trace(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(TraceError, match=r"not an \.npz routing trace"):
        load_trace(tmp_path / "array.npy")
    with pytest.raises(FileNotFoundError):
        load_trace(tmp_path / "missing.npz")
    with pytest.raises(OSError, match="no regular file"):
        load_trace(tmp_path)


# ---- files that say more than they hold -----------------------------------------------------


def header(dtype: str, *shape: int) -> bytes:
    """Of an .npy file."""
    file = io.BytesIO()
    fields = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue()


def write_members(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def members_of(arrays: Arrays) -> dict[str, bytes]:
    """Of an .npz with these arrays."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("|u1", (1 << 40, 2, 1)),
        ("|u1", (-4, -2, 1)),
        ("|u1", (1 << 70, 1 << 70, 1)),
        ("<U0", (1 << 40,)),
        ("|V2147483647", (4, 2, 1)),
    ],
)
def test_headers_that_say_more_than_there_is(
    tmp_path: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    members = members_of(unscheduled()) | {"ids.npy": header(dtype, *shape) + bytes(8)}
    path = write_members(tmp_path / "trace.npz", members)
    with pytest.raises(TraceError, match="ids says that it is"):
        load_trace(path)


def test_a_small_file_that_unpacks_to_more_than_there_is_is_refused(tmp_path: Path) -> None:
    """Its arrays are as large as they say; it is refused before memory is taken for them."""
    path = tmp_path / "trace.npz"
    tokens = 1 << 40
    members = members_of(unscheduled()) | {
        "lens.npy": members_of({"x": np.array([2, 2])})["x.npy"]
    }
    write_members(path, members | {"ids.npy": b""})
    start = header("|u1", tokens, 2, 1)
    _patch_size(path, "ids.npy", start, tokens * 2)
    code = f"""
from vllm_moe_offload.trace.routing import TraceError, load_trace
try:
    load_trace({str(path)!r})
except TraceError as error:
    print(error)
"""
    said = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)),
    )
    assert "its arrays take 2199023255" in said.stdout
    assert "half of what is available at most is read" in said.stdout


def test_a_small_file_of_nothing_but_zeros_is_refused(tmp_path: Path) -> None:
    """A thousand times its size, which there may well be memory for."""
    tokens = 80 << 20
    changes = {
        "ids": np.zeros((tokens, 1, 1), np.uint8),
        "starts": np.array([0]),
        "lens": np.array([tokens]),
    }
    path = tmp_path / "trace.npz"
    np.savez_compressed(path, **unscheduled() | changes)
    with pytest.raises(TraceError, match="no routing is packed in"):
        load_trace(path)
    tokens = 60 << 20
    changes = {"ids": np.zeros((tokens, 1, 1), np.uint8), "starts": np.array([0])}
    np.savez_compressed(path, **unscheduled() | changes | {"lens": np.array([tokens])})
    assert load_trace(path).lens.tolist() == [tokens]


def _patch_size(path: Path, member: str, start: bytes, nbytes: int) -> None:
    """Makes a member begin with ``start`` and say that ``nbytes`` follow."""
    with zipfile.ZipFile(path) as archive:
        others = {
            info.filename: archive.read(info)
            for info in archive.infolist()
            if info.filename != member
        }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in others.items():
            archive.writestr(name, content)
        archive.writestr(member, start)
        info = archive.getinfo(member)
        info.file_size = len(start) + nbytes


def test_arrays_that_no_trace_has_are_not_read(tmp_path: Path) -> None:
    members = members_of(unscheduled()) | {"more.npy": header("|u1", 3) + b"abc"}
    assert load_trace(write_members(tmp_path / "trace.npz", members)).num_requests == 2


# ---- accidents ------------------------------------------------------------------------------

EXTREMES = (0, 1, -1, 2, 255, 2**31 - 1, -(2**31), 2**53, 2**62, 2**63 - 1, -(2**63))
TYPES = ("u1", "i1", "u2", "i4", "u8", "f2", "f8", "?", "U3", "S2")


def mutated_arrays(arrays: Arrays, generator: np.random.Generator) -> Arrays:
    """One to three arrays changed: an entry, a length, a type, or left out."""
    arrays = {name: np.array(value) for name, value in arrays.items()}
    for _ in range(generator.integers(1, 4)):
        name = str(generator.choice(list(arrays)))
        array = arrays[name]
        match generator.integers(5):
            case 0 if array.size:
                wide = array.astype(np.int64).reshape(-1)
                wide[generator.integers(wide.size)] = generator.choice(EXTREMES)
                arrays[name] = wide.reshape(array.shape)
            case 1:
                with np.errstate(over="ignore"):
                    arrays[name] = array.astype(str(generator.choice(TYPES)))
            case 2:
                arrays[name] = (
                    array[..., None] if generator.random() < 0.5 else array.reshape(-1)
                )
            case 3 if array.ndim:
                arrays[name] = array[: generator.integers(len(array) + 1)]
            case _ if len(arrays) > 1 and generator.random() < 0.3:
                del arrays[name]
            case _:
                arrays[name] = generator.permutation(array.reshape(-1)).reshape(array.shape)
    return arrays


@pytest.mark.parametrize("kind", ["file", "member", "arrays"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore:Reading `.npy`:UserWarning")
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_whatever_changes_it_is_refused_or_of_use(tmp_path: Path, kind: str, seed: int) -> None:
    """The file's bytes, a member's (so that its checksum is right), or what arrays hold."""
    generator = np.random.default_rng(seed)
    path = save(tmp_path / "trace.npz", scheduled())
    whole, members = path.read_bytes(), members_of(scheduled())
    num_refused = 0
    for _ in range(300):
        if kind == "file":
            path.write_bytes(mutated(whole, generator))
        elif kind == "member":
            name = str(generator.choice(list(members)))
            changed = {name: mutated(members[name], generator)}
            write_members(path, members | changed)
        else:
            save(path, mutated_arrays(scheduled(), generator))
        try:
            trace = load_trace(path)
        except TraceError as error:
            num_refused += 1
            _assert_one_line(error, path)
            continue
        describe(path)
        if trace.num_requests:
            replay(trace, "lrfu", 0.5, 2)
        if trace.schedule is not None:
            replay_recorded(trace, "trace")
    assert num_refused > 100


def _assert_one_line(error: TraceError, path: Path) -> None:
    assert str(error).startswith(str(path))
    assert "\n" not in str(error)


def test_synthetic_traces_are_read_as_they_were_written(tmp_path: Path) -> None:
    made = synthetic_trace(layers=3, experts=8, top_k=2, requests=3, tokens=12, seed=1)
    fields = {"ids": made.ids, "starts": made.starts, "lens": made.lens, "names": made.names}
    read = load_trace(save(tmp_path / "trace.npz", fields | {"num_experts": 8}))
    assert (read.ids == made.ids).all()
    assert read.names == made.names
