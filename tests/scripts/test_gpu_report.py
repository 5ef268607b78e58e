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
from scripts.gpu_bars import SWEPT, bars_of  # noqa: E402
from scripts.gpu_plan import SWEEP_SHARES  # noqa: E402

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
        "link": None if link is None else {"bytes_per_s": link, "gather_bytes_per_s": link / 2},
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


def test_a_serial_step_computes_and_copies_one_after_the_other() -> None:
    """40 misses a step of 10 bytes at the gather's 50 bytes/s: 8 s; and .1 s of computing."""
    trace = decode(9.0, misses=160, counters=counters(160, hits=480))
    rows = list(figures.summary_rows(part(25, resident=decode(0.1), trace=trace)))
    row = next(row for row in rows if row["contestant"] == "trace")
    assert row["misses_per_step"] == 40
    assert row["serial_s"] == pytest.approx(8.1)
    assert row["of_serial"] == pytest.approx(0.9)


def test_steps_are_those_that_the_counters_saw() -> None:
    seen = counters(160) | {"steps": 8}
    found = part(25, resident=decode(0.1), trace=decode(9.0, misses=160, counters=seen))
    row = next(row for row in figures.summary_rows(found) if row["contestant"] == "trace")
    assert row["misses_per_step"] == 20


def test_bars_compare_contestants_of_one_part() -> None:
    main = part(
        25,
        resident=decode(0.19),
        trace=decode(0.2, misses=4),
        cpu_offload_gb=decode(0.7),
    )
    found = bars(main)
    assert one(found, "/ cpu-offload-gb").measured == pytest.approx(3.5)
    assert not one(found, "/ cpu-offload-gb").met
    assert one(found, "on one topic").measured == pytest.approx(0.95)
    assert one(found, "on one topic").met


def test_contestants_of_different_parts_are_not_compared() -> None:
    found = bars(
        part(25, resident=decode(0.1), trace=decode(0.2, misses=4)),
        part(50, cpu_offload_gb=decode(9.0)),
    )
    assert one(found, "/ cpu-offload-gb").measured is None


@pytest.mark.parametrize(
    "words", ["any topic", "on one topic", "cpu-offload", "everything fits", "prompt of 4096"]
)
def test_what_was_not_measured_misses_its_bar(words: str) -> None:
    bar = one(bars(part(25)), words)
    assert bar.measured is None
    assert not bar.met


def swept(share: str, step_s: float) -> dict[str, Any]:
    """A part of the sweep: a resident step of .1 s, and no misses."""
    misses = decode(step_s, misses=0, counters=counters(0))["decode-1"]
    found = part(
        1,
        resident={name: decode(0.1)["decode-1"] for name in SWEPT},
        trace=dict.fromkeys(SWEPT, misses),
    )
    return found | {"name": f"m-{share}-misses"}


def test_the_bar_of_misses_needs_every_share_and_batch() -> None:
    shares = [swept(share, 0.1) for share in SWEEP_SHARES[1:]] + [swept(SWEEP_SHARES[0], 0.125)]
    assert one(bars(*shares), "any topic").measured == pytest.approx(0.8)
    del shares[2]["contestants"]["trace"]["workloads"][SWEPT[1]]
    assert one(bars(*shares), "any topic").measured is None
    assert one(bars(*shares[:2]), "any topic").measured is None


def test_everything_fits_at_every_batch_that_was_measured() -> None:
    fits = part(
        100,
        resident={name: decode(0.1)["decode-1"] for name in ("decode-1", "decode-8")},
        trace={"decode-1": decode(0.1)["decode-1"], "decode-8": decode(0.2)["decode-1"]},
    )
    assert one(bars(fits), "everything fits").measured == pytest.approx(0.5)
    del fits["contestants"]["trace"]["workloads"]["decode-8"]
    assert one(bars(fits), "everything fits").measured == pytest.approx(1.0)


def test_tokens_are_compared_request_by_request() -> None:
    resident = {"decode-2": [sample(tokens=[[1, 2], [3, 4]]), sample(2, tokens=[[5], [6]])]}
    lru = {"decode-2": [sample(2, tokens=[[5], [7]])]}
    trace = {"decode-2": [sample(tokens=[[1, 2], [3, 4]])]}
    found = part(25, resident=resident, trace=trace, lru=lru)
    assert figures.same_tokens(
        found["contestants"]["lru"], found["contestants"]["resident"]
    ) == (1, 2)
    assert one(bars(found), "tokens of resident").measured == pytest.approx(3 / 4)


def test_a_failed_step_misses_its_bar() -> None:
    found = bars(steps={"tests": {"status": 0}, "smoke": {"status": 86}})
    assert one(found, "tests: exit").met
    assert not one(found, "smoke").met
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
    assert any("everything fits" in bar["name"] for bar in written["bars"])


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
