"""Counter files: what a worker writes is what an API server reads."""

import os
import stat

import pytest

from vllm_moe_offload.metrics import VALUES, CounterFile, hit_rate, read_counters

LABELS = {"model_name": "demo", "engine": "0", "rank": 0}


def test_values_travel(tmp_path):
    file = CounterFile(tmp_path / "rank0.counters", LABELS)
    file.values[:] = range(len(VALUES))
    (reading,) = read_counters(tmp_path)
    assert reading.labels == LABELS
    assert list(reading.values.values()) == list(range(len(VALUES)))
    file.values[0] = 30.0  # later writes show without reopening
    (reading,) = read_counters(tmp_path)
    assert reading.values["hits"] == 30.0
    assert reading.hit_rate == pytest.approx(30 / 31)


def test_files_are_private_and_complete(tmp_path):
    CounterFile(tmp_path / "rank0.counters", LABELS)
    CounterFile(tmp_path / "rank1.counters", {**LABELS, "rank": 1})
    assert sorted(os.listdir(tmp_path)) == ["rank0.counters", "rank1.counters"]
    assert stat.S_IMODE((tmp_path / "rank0.counters").stat().st_mode) == 0o600
    assert [reading.labels["rank"] for reading in read_counters(tmp_path)] == [0, 1]


def test_a_header_that_is_too_long_is_refused(tmp_path):
    with pytest.raises(ValueError, match="2048"):
        CounterFile(tmp_path / "rank0.counters", {"model_name": "x" * 3000})


def test_hit_rate_before_anything_ran():
    assert hit_rate(0, 0) == 1.0
