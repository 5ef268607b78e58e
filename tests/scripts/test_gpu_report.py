"""Bounds, ratios and bars come from what was measured together, and from nothing else."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts import gpu_figures as figures  # noqa: E402
from scripts import gpu_report as report  # noqa: E402
from scripts.gpu_bars import DECODE_BATCHES, bars_of  # noqa: E402

RECORD = 10
EXPERTS = 1000 * RECORD


def sample(repeat: int = 1, **figures: Any) -> dict[str, Any]:
    """A sample as contestants write it."""
    return {"repeat": repeat, "prefill_s": 1.0, "steps": 4, "tokens": [[1, 2]]} | figures


def counters(misses: int, useful: int = 0, hits: int = 0) -> dict[str, int]:
    """What the plugin counted in a sample."""
    return {"hits": hits, "misses": misses, "prefetch_useful": useful, "prefetch_wasted": 99}


def part(share: float, link: float | None = 100.0, **contestants: Any) -> dict[str, Any]:
    """A part of model ``m``: contestant -> workload -> samples."""
    return {
        "name": f"m-{share:g}",
        "model": {"name": "m", "expert_bytes": EXPERTS, "record_bytes": RECORD},
        "share": share,
        "device": "cuda",
        "date": "",
        "parameters": {"chunk_tokens": 8192},
        "link": None if link is None else {"bytes_per_s": link},
        "contestants": {
            name.replace("_", "-"): {"status": "measured", "reason": "", "workloads": workloads}
            for name, workloads in contestants.items()
        },
    }


def decode(step_s: float, misses: int | None = None, **more: Any) -> dict[str, Any]:
    """``decode-1`` with one sample of four steps."""
    crossing = None if misses is None else misses * RECORD
    return {"decode-1": [sample(step_s=step_s, crossing_bytes=crossing, **more)]}


def bars(*parts: dict[str, Any], steps: dict[str, Any] | None = None) -> dict[str, Any]:
    """Bars by the first words of their names."""
    found = bars_of({"steps": steps or {}, "parts": {p["name"]: p for p in parts}})
    return {bar.name: bar for bar in found}


def one(found: dict[str, Any], words: str) -> Any:
    """The bar whose name contains ``words``."""
    matching = [bar for name, bar in found.items() if words in name]
    assert len(matching) == 1, (words, list(found))
    return matching[0]


# ---- bounds ----------------------------------------------------------------------------


def test_a_step_is_bound_by_computing_or_by_the_link() -> None:
    assert figures.decode_bound_s(0.5, 10, 100) == 0.5
    assert figures.decode_bound_s(0.05, 10, 100) == pytest.approx(0.1)


def test_a_prompt_streams_what_is_not_resident_once_per_chunk() -> None:
    bound = figures.stream_bound_s(
        0.1,
        expert_bytes=1000,
        resident_share=0.25,
        chunks=4,
        crossing_bytes=1e9,
        bandwidth_bytes_per_s=100,
    )
    assert bound == pytest.approx(4 * 750 / 100)


def test_a_prompt_that_left_experts_out_has_a_lower_bound() -> None:
    bound = figures.stream_bound_s(
        0.1,
        expert_bytes=1000,
        resident_share=0.25,
        chunks=4,
        crossing_bytes=500,
        bandwidth_bytes_per_s=100,
    )
    assert bound == pytest.approx(5.0)


@pytest.mark.parametrize(("tokens", "chunks"), [(1, 1), (8192, 1), (8193, 2), (32768, 4)])
def test_chunks(tokens: int, chunks: int) -> None:
    assert figures.chunks_of(tokens, 8192) == chunks


def test_wasted_prefetches_do_not_ease_the_bound() -> None:
    assert figures.crossing_bytes({"counters": counters(3, useful=2)}, RECORD) == 5 * RECORD


def test_without_counters_nothing_is_known_to_have_crossed() -> None:
    assert figures.crossing_bytes({"counters": None}, RECORD) is None


def test_summary_gives_bound_and_hit_rate() -> None:
    trace = decode(0.5, misses=160, counters=counters(160, hits=480))
    rows = list(figures.summary_rows(part(25, resident=decode(0.1), trace=trace)))
    row = next(row for row in rows if row["contestant"] == "trace")
    # 160 records of 10 bytes in 4 steps at 100 bytes/s: 4 s a step.
    assert row["bound_s"] == pytest.approx(4.0)
    assert row["of_bound"] == pytest.approx(8.0)
    assert row["hit_rate"] == pytest.approx(0.75)
    assert row["of_resident"] == pytest.approx(0.2)


def test_without_a_measured_link_there_is_no_bound() -> None:
    found = part(25, link=None, resident=decode(0.1), trace=decode(0.5, misses=1))
    assert {row["of_bound"] for row in figures.summary_rows(found)} == {None}


# ---- bars ------------------------------------------------------------------------------


def test_bars_compare_contestants_of_one_part() -> None:
    main = part(
        25,
        resident=decode(0.1),
        trace=decode(0.2, misses=4),
        cpu_offload_gb=decode(1.2),
        vllm_prefetch=decode(0.5),
    )
    found = bars(main)
    assert one(found, "trace / cpu-offload-gb").measured == pytest.approx(6.0)
    assert one(found, "trace / cpu-offload-gb").met
    assert not one(found, "trace / vllm-prefetch").met


def test_contestants_of_different_parts_are_not_compared() -> None:
    found = bars(
        part(25, resident=decode(0.1), trace=decode(0.2, misses=4)),
        part(50, cpu_offload_gb=decode(9.0)),
    )
    assert one(found, "trace / cpu-offload-gb").measured is None


@pytest.mark.parametrize(
    "words",
    [
        "achieved / bound",
        "vLLM with the same kernels",
        "prefill of 32K",
        "host memory",
        "tokens of",
    ],
)
def test_what_was_not_measured_misses_its_bar(words: str) -> None:
    bar = one(bars(part(25)), words)
    assert bar.measured is None
    assert not bar.met


def test_the_bound_bar_needs_every_share_and_batch() -> None:
    workloads = [f"decode-{batch}" for batch in DECODE_BATCHES]

    def full(share: float, step_s: float) -> dict[str, Any]:
        resident = {name: decode(0.1)["decode-1"] for name in workloads}
        trace = {name: decode(step_s, misses=0)["decode-1"] for name in workloads}
        return part(share, resident=resident, trace=trace)

    shares = [full(12.5, 0.11), full(25, 0.125), full(50, 0.1)]
    assert one(bars(*shares), "achieved / bound, the least").measured == pytest.approx(0.8)
    del shares[2]["contestants"]["trace"]["workloads"]["decode-32"]
    assert one(bars(*shares), "achieved / bound, the least").measured is None


def test_tokens_are_compared_request_by_request() -> None:
    resident = {"decode-2": [sample(tokens=[[1, 2], [3, 4]]), sample(2, tokens=[[5], [6]])]}
    lru = {"decode-2": [sample(2, tokens=[[5], [7]])]}
    trace = {"decode-2": [sample(tokens=[[1, 2], [3, 4]])]}
    found = part(25, resident=resident, trace=trace, lru=lru)
    assert figures.same_tokens(
        found["contestants"]["lru"], found["contestants"]["resident"]
    ) == (1, 2)
    assert one(bars(found), "tokens of resident").measured == pytest.approx(3 / 4)


def test_host_memory_is_what_the_plugin_holds_beyond_resident_vllm() -> None:
    found = part(25, resident=decode(0.1), trace=decode(0.2, misses=4))
    found["contestants"]["resident"]["memory"] = {"host_anonymous_bytes": 500}
    found["contestants"]["trace"]["memory"] = {"host_anonymous_bytes": 500 + 1.04 * EXPERTS}
    assert one(bars(found), "host memory").measured == pytest.approx(1.04)
    found["contestants"]["trace"]["memory"]["host_anonymous_bytes"] = None  # gVisor tells none
    assert one(bars(found), "host memory").measured is None
    found["contestants"]["trace"]["memory"]["host_anonymous_bytes"] = 500
    assert one(bars(found), "host memory").measured == 0
    found["device"] = "cpu"
    assert one(bars(found), "host memory").measured is None


def test_a_failed_step_misses_its_bar() -> None:
    found = bars(steps={"memcheck": {"status": 0}, "racecheck": {"status": 86}})
    assert one(found, "memcheck").met
    assert not one(found, "racecheck").met
    assert one(found, "build").measured is None


# ---- merging ---------------------------------------------------------------------------


def test_a_new_part_replaces_the_old_one_whole_and_leaves_others() -> None:
    old = {
        "steps": {"build": {"status": 1}},
        "parts": {"m-25": part(25, trace=decode(9.0), lru=decode(9.0)), "m-50": part(50)},
    }
    before = copy.deepcopy(old)
    new = {"parts": {"m-25": part(25, trace=decode(1.0))}}
    merged = report.merge(old, new)
    assert merged["parts"] == {"m-25": new["parts"]["m-25"], "m-50": old["parts"]["m-50"]}
    assert merged["steps"] == old["steps"]
    assert old == before


def test_parts_meet_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "nothing committed")
    for share in (25, 50):
        new = part(share, resident=decode(0.1), trace=decode(0.2, misses=4))
        report.save({"parts": {new["name"]: new}}, results=tmp_path, work_dir=tmp_path)
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert set(written["parts"]) == {"m-25", "m-50"}
    assert {row["part"] for row in written["summary"]} == {"m-25", "m-50"}
    assert any("achieved / bound" in bar["name"] for bar in written["bars"])


def test_the_suite_notes_how_a_part_ended(tmp_path: Path) -> None:
    log = tmp_path / "tests.log"
    log.write_text("x" * 10_000 + "the end")
    command = [sys.executable, str(ROOT / "scripts" / "gpu_report.py"), "--results", tmp_path]
    options = ["record", "tests", "--status", "86", "--seconds", "2.5", "--log", log]
    subprocess.run([*command, *options], check=True, capture_output=True)
    step = json.loads((tmp_path / "gpu.json").read_text())["steps"]["tests"]
    assert (step["status"], step["seconds"]) == (86, 2.5)
    assert step["log_tail"].endswith("the end")
    assert len(step["log_tail"]) == report.TAIL_CHARACTERS
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "tests: exit status 0" in shown
