"""The command line: replay and trace show."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scripts.synthetic_trace import synthetic_trace
from tests.trace.recordings import recorder, step
from vllm_moe_offload import cli
from vllm_moe_offload.trace.collection import ActivationCollection
from vllm_moe_offload.trace.inspect import adjacent_reuse, describe


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    trace = synthetic_trace(layers=3, experts=8, top_k=2, requests=3, tokens=12, seed=1)
    path = tmp_path / "trace.npz"
    np.savez(
        path,
        ids=trace.ids,
        starts=trace.starts,
        lens=trace.lens,
        num_experts=8,
        names=trace.names,
    )
    return path


@pytest.fixture
def collection_file(tmp_path: Path) -> Path:
    collection = ActivationCollection(2, 4, 5, "demo-model")
    for expert in range(3):
        table = np.zeros((2, 4))
        table[:, expert] = 5
        collection.add(table)
    path = tmp_path / "eam.msgpack"
    collection.save(path)
    return path


def test_replay_writes_json_and_a_plot(trace_file: Path, tmp_path: Path, capsys) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    status = cli.main(
        [
            "replay",
            str(trace_file),
            "--policy=lru,lrfu:half_life=32,eamc:entries=3,belady",
            "--capacity=0.25,0.5",
            "--concurrency=1,2",
            f"--json={out}",
            f"--plot={plot}",
        ]
    )
    assert status == 0
    results = json.loads(out.read_text())
    assert [(r["concurrency"], r["capacity"], r["policy"]) for r in results] == [
        (b, c, policy)
        for b in (1, 2)
        for c in (0.25, 0.5)
        for policy in ("lru", "lrfu:half_life=32", "eamc:entries=3", "belady")
    ]
    for result in results:
        assert {"hit_rate", "misses_per_token"} <= result.keys()
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "lrfu:half_life=32" in capsys.readouterr().out


def test_replay_prints_json_alone_for_a_dash(trace_file: Path, capsys) -> None:
    assert (
        cli.main(["replay", str(trace_file), "--policy=lfu", "--json=-", "--requests=1"]) == 0
    )
    assert [result["policy"] for result in json.loads(capsys.readouterr().out)] == ["lfu"]


def test_replay_by_the_device_has_a_policy_of_its_own(trace_file: Path, capsys) -> None:
    arguments = [
        "replay",
        str(trace_file),
        "--planner=device",
        "--capacity=0.25,0.5",
        "--json=-",
    ]
    assert cli.main(arguments) == 0
    results = json.loads(capsys.readouterr().out)
    assert [(r["policy"], r["capacity"], r["planner"]) for r in results] == [
        ("lrfu", 0.25, "device"),
        ("lrfu", 0.5, "device"),
    ]
    assert cli.main(["replay", str(trace_file), "--policy=lrfu", "--json=-"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["planner"] == "host"


def test_replay_by_the_device_of_a_servers_steps(capsys) -> None:
    recorded = Path(__file__).parents[2] / "benchmarks" / "traces" / "smollm2-upcycled-b1.npz"
    options = ["--planner=device", "--schedule=recorded", "--json=-"]
    assert cli.main(["replay", str(recorded), *options]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert "concurrency" not in result
    assert (result["policy"], result["planner"]) == ("lrfu", "device")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--planner=device", "--policy=lrfu,trace"],
            "policy must be lrfu or lrfu:half_life=STEPS with --planner device, got trace",
        ),
        (["--planner=device", "--policy=fifo"], "unknown policy 'fifo'; choose from lru"),
        (
            ["--planner=device", "--capacity=0.5,0.01"],
            "capacity must be at least 1/24, one expert, with --planner device, got 0.01",
        ),
        (["--planner=device", "--schedule=recorded"], "carries no schedule"),
        (["--policy=fifo"], "unknown policy 'fifo'; choose from lru"),
        (["--capacity=2"], "capacity must lie in (0, 1], got 2"),
        (["--capacity=half"], "--capacity=half: must be a number in (0, 1]"),
        (["--concurrency=0"], "concurrency must be at least 1, got 0"),
        (["--concurrency=1.5"], "--concurrency=1.5: must be an integer above 0"),
        (["--requests=7"], "requests must lie between 1 and the trace's 3, got 7"),
        (["--policy=,"], "--policy is empty"),
        (["--schedule=recorded"], "carries no schedule"),
    ],
)
def test_wrong_arguments_are_one_line(trace_file: Path, arguments, message, capsys) -> None:
    assert cli.main(["replay", str(trace_file), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("vllm-moe-offload: error: ")
    assert error.count("\n") == 1


def test_missing_and_foreign_files(tmp_path: Path, capsys) -> None:
    assert cli.main(["replay", str(tmp_path / "no.npz")]) == 2
    assert "no.npz" in capsys.readouterr().err
    (tmp_path / "x.npz").write_text("hello")
    assert cli.main(["replay", str(tmp_path / "x.npz")]) == 2
    assert "not an .npz routing trace" in capsys.readouterr().err
    assert cli.main(["trace", "show", str(tmp_path / "x.npz")]) == 2
    assert "damaged or no collection" in capsys.readouterr().err


def test_trace_show_of_a_routing_trace(trace_file: Path, tmp_path: Path, capsys) -> None:
    plot = tmp_path / "map.png"
    assert cli.main(["trace", "show", str(trace_file), "--json", f"--plot={plot}"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["kind"] == "routing trace"
    assert (summary["requests"], summary["layers"], summary["experts"]) == (3, 3, 8)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["trace", "show", str(trace_file)]) == 0
    assert "routing trace" in capsys.readouterr().out


def test_trace_show_of_a_collection(collection_file: Path, tmp_path: Path, capsys) -> None:
    plot = tmp_path / "map.png"
    assert cli.main(["trace", "show", str(collection_file), "--json", f"--plot={plot}"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["kind"] == "EAM collection"
    assert (summary["model"], summary["entries"]) == ("demo-model", 3)
    assert plot.exists()


def test_adjacent_reuse_by_hand() -> None:
    trace = synthetic_trace(layers=1, experts=4, top_k=2, requests=2, tokens=1, seed=0)
    ids = np.array([[[0, 1]], [[1, 2]], [[3, 2]], [[0, 1]]], np.uint8)
    by_hand = type(trace)(ids, np.array([0, 3]), np.array([3, 1]), 4)
    assert adjacent_reuse(by_hand) == pytest.approx(0.5)


def test_describe_tells_what_is_used(trace_file: Path) -> None:
    summary, maps = describe(trace_file)
    (share,) = maps.values()
    np.testing.assert_allclose(share.sum(axis=1), 1)
    assert summary["schedule"] == "none"


def test_help_lists_every_command(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert command.path[0] in text


def test_trace_finish_writes_what_a_server_could_not(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "trace.npz"
    target = recorder(path)
    step(target, ("a", 0, 3, True))
    with monkeypatch.context() as patch:
        patch.setattr("vllm_moe_offload.files.os.fsync", full_disk)
        with pytest.raises(OSError, match=f"trace finish {path}"):
            target.close()
    assert cli.main(["trace", "finish", str(path)]) == 0
    assert capsys.readouterr().out == (
        f"wrote the routing of 3 tokens of 1 requests to {path}\n"
    )
    assert cli.main(["replay", str(path), "--policy=lru", "--schedule=recorded"]) == 0
    assert cli.main(["trace", "finish", str(path)]) == 2
    assert "there is no recording" in capsys.readouterr().err
