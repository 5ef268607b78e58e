"""The benchmarks' harness: rounds in turn, engines in processes of their own, bars, raw reads."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.harness import page_cache
from scripts.harness.completions import QUESTIONS, questions
from scripts.harness.engine import EngineProcess
from scripts.harness.options import QUICK_RESULTS, RESULTS, results_of
from scripts.harness.pairing import bootstrap_of_median, orders, spread
from scripts.harness.report import Bar, write_report
from scripts.harness.serving import kernel_options
from scripts.raw_reader import Part, split_evenly

ECHO = """
import json, os, sys
sys.path.insert(0, {root!r})
from scripts.harness.engine import take_stdout
answers = take_stdout()
print("what a library prints")
ready = {{"arguments": json.loads(sys.argv[1]), "where": os.environ.get("WHERE")}}
print(json.dumps(ready), file=answers, flush=True)
for line in sys.stdin:
    if line.strip() == "die":
        sys.exit("dead")
    print(json.dumps({{"heard": line.strip()}}), file=answers, flush=True)
"""


def test_every_name_comes_first_in_its_turn() -> None:
    assert list(orders(["a", "b", "c"], 4)) == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]


def test_interval_holds_the_median_and_narrows_with_samples() -> None:
    rng = np.random.default_rng(1)
    few, many = rng.normal(10, 1, 8).tolist(), rng.normal(10, 1, 800).tolist()
    widths = []
    for values in (few, many):
        low, high = bootstrap_of_median(values)
        assert low <= spread(values)["median"] <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 3
    assert bootstrap_of_median(few) == bootstrap_of_median(few)


def echo_in(directory: Path, **options: Any) -> EngineProcess:
    """A script that answers what it is asked."""
    script = directory / "echo.py"
    script.write_text(ECHO.format(root=str(Path(__file__).resolve().parents[2])))
    log = directory / "echo.log"
    return EngineProcess("echo", script, {"a": 1}, log=log, environment={}, **options)


@pytest.fixture
def echo(tmp_path: Path) -> EngineProcess:
    """See :func:`echo_in`."""
    return echo_in(tmp_path)


def test_engine_runs_behind_a_prefix_in_the_python_that_is_named(tmp_path: Path) -> None:
    python = tmp_path / "another-python"
    python.symlink_to(sys.executable)
    echo = echo_in(tmp_path, prefix=["env", "WHERE=inside"], python=python)
    assert echo.ready == {"arguments": {"a": 1}, "where": "inside"}
    echo.close()
    python.unlink()
    with pytest.raises(RuntimeError, match="ended early"):
        echo_in(tmp_path, prefix=["env"], python=python)


def test_engine_answers_each_line_whatever_libraries_print(
    echo: EngineProcess, tmp_path: Path
) -> None:
    assert [echo.ask("one"), echo.ask("two")] == [{"heard": "one"}, {"heard": "two"}]
    echo.close()
    assert "what a library prints" in (tmp_path / "echo.log").read_text()


def test_engine_that_ends_early_is_named_with_its_log(echo: EngineProcess) -> None:
    with pytest.raises(RuntimeError, match=r"echo ended early; see .*echo\.log"):
        echo.ask("die")
    echo.close()


def cached_pages(file: Path) -> int:
    """How many of the file's pages the page cache holds; only looks, where even a read that must
    not wait (RWF_NOWAIT) has the kernel read the page, and the next one finds it."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        content = np.frombuffer(mapped, np.uint8)
        resident = np.zeros(-(-content.size // mmap.PAGESIZE), np.uint8)
        found = libc.mincore(
            ctypes.c_void_p(content.ctypes.data),
            ctypes.c_size_t(content.size),
            ctypes.c_void_p(resident.ctypes.data),
        )
        del content  # a mapping that is looked at cannot be closed
        assert found == 0, os.strerror(ctypes.get_errno())
    return int((resident & 1).sum())


def test_a_file_that_is_forgotten_has_to_be_read_again(tmp_path: Path) -> None:
    kind = subprocess.check_output(["stat", "-f", "-c", "%T", tmp_path], text=True).strip()
    if kind in {"tmpfs", "ramfs"}:
        pytest.skip(f"{tmp_path} is on {kind}, which has files in memory and nowhere else")
    file = tmp_path / "weights"
    file.write_bytes(bytes(1 << 20))
    assert cached_pages(file) == (1 << 20) // mmap.PAGESIZE
    page_cache.forget(file)
    assert cached_pages(file) == 0


def test_read_ahead_is_set_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = tmp_path / "read_ahead_kb"
    setting.write_text("8192\n")
    monkeypatch.setattr(page_cache, "read_ahead_of", lambda path: setting)
    with contextlib.suppress(KeyError), page_cache.read_ahead(tmp_path, 128):
        assert setting.read_text() == "128\n"
        raise KeyError
    assert setting.read_text() == "8192\n"
    with page_cache.read_ahead(tmp_path, None):
        assert setting.read_text() == "8192\n"
    monkeypatch.setattr(page_cache, "read_ahead_of", lambda path: None)
    with (
        pytest.raises(RuntimeError, match="no single disk"),
        page_cache.read_ahead(tmp_path, 1),
    ):
        pass


def test_quantised_experts_need_an_option_without_amx() -> None:
    assert kernel_options({"avx512f", "amx_tile"}) == []
    assert kernel_options({"avx512f"}) == ["--moe-offload-config.cpu_kernels", "avx512"]


def test_turns_ask_all_questions_before_one_comes_again() -> None:
    asked = [text for number in range(4) for text in questions(2, number)]
    assert asked == list(QUESTIONS)
    assert questions(2, 4) == questions(2, 0)
    assert questions(3, 2) == [*QUESTIONS[6:], QUESTIONS[0]]


def test_quick_reports_do_not_replace_measurements(tmp_path: Path) -> None:
    assert results_of(Namespace(results=None, quick=False)) == RESULTS
    assert results_of(Namespace(results=None, quick=True)) == QUICK_RESULTS
    assert results_of(Namespace(results=tmp_path, quick=True)) == tmp_path


def test_report_says_which_bars_were_met(tmp_path: Path) -> None:
    bars = [
        Bar("fast", 2.0, 1.0),
        Bar("small", 2.0, 1.0, at_least=False),
        Bar("unknown", None, 1.0),
    ]
    path = write_report(
        "tried",
        {"samples": [np.float64(1.5), 2]},
        bars=bars,
        work_dir=tmp_path,
        results=tmp_path,
    )
    report = json.loads(path.read_text())
    assert [bar["met"] for bar in report["bars"]] == [True, False, False]
    assert report["benchmark"] == "tried"
    assert report["samples"] == [1.5, 2]
    assert {"date", "command", "hardware", "versions", "git"} <= report.keys()


def test_split_parts_cover_the_record_in_aligned_pieces() -> None:
    whole = Part(8192, 4096 * 10, 4096 * 7)
    pieces = list(split_evenly(whole, 3))
    assert len(pieces) == 3
    assert sum(piece.length for piece in pieces) == whole.length
    offset = 0
    for piece in pieces:
        assert piece.offset == whole.offset + offset
        assert piece.target == whole.target + offset
        assert piece.offset % 4096 == 0
        offset += piece.length
