"""What /metrics shows of the workers' files; and that dashboard and document know all of it."""

import json
import re
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from scripts.show_dashboard import queries
from vllm_moe_offload.integration.endpoint import (
    OVERDUE_SECONDS,
    OffloadCollector,
    warn_of_overdue,
)
from vllm_moe_offload.metrics import GAUGES, VALUES, CounterFile, read_counters

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "examples" / "grafana-dashboard.json").read_text())
DOCUMENT = (ROOT / "docs" / "metrics.md").read_text()
NAME = re.compile(r"vllm:moe_offload_[a-z_]+")

METRICS = {
    f"vllm:moe_offload_{name}"
    for name in (
        "hits_total",
        "misses_total",
        "draft_hits_total",
        "draft_misses_total",
        "bypasses_total",
        "read_bytes_total",
        "prefetch_issued_total",
        "prefetch_useful_total",
        "prefetch_late_total",
        "prefetch_wasted_total",
        "stall_seconds_total",
        "slots",
        "resident_experts",
        "cache_bytes",
        "up",
        "counters_age_seconds",
        "policy_info",
    )
}
STATES = {f"vllm:moe_offload_{name}" for name in ("up", "counters_age_seconds", "policy_info")}
"""What is no value of a counter file."""


def worker(directory, rank, policy="trace", name=None, **values):
    """A worker's file; it runs as long as the result is kept and open."""
    file = CounterFile(
        directory / f"{name or rank}.counters",
        {"model_name": "demo", "engine": "0", "rank": str(rank)},
        {
            "policy": policy,
            "prefetch": "off",
            "version": "1.2",
            "part": "tp0of1",
            "way": "host",
        },
    )
    file.write([values.get(value, 0) for value in VALUES])
    return file


def scrape(directory):
    """Samples by name and labels, as they arrive at Prometheus; none may appear twice."""
    registry = CollectorRegistry()
    registry.register(OffloadCollector(directory))
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        assert family.documentation
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def of(samples, name, rank=0):
    """The one value of a metric of a rank."""
    (value,) = (
        value
        for (found, labels), value in samples.items()
        if found == f"vllm:moe_offload_{name}" and dict(labels)["rank"] == str(rank)
    )
    return value


def test_every_value_arrives_under_its_own_name(tmp_path):
    values = {name: 1000.5 + index for index, name in enumerate(VALUES)}
    kept = worker(tmp_path, 0, **values)
    samples = scrape(tmp_path)
    assert {name for name, _ in samples} == METRICS
    for name in METRICS - STATES:
        short = name.removeprefix("vllm:moe_offload_")
        assert of(samples, short) == values[short.removesuffix("_total")]
        assert short.endswith("_total") == (short not in GAUGES)
    (labels,) = (dict(labels) for name, labels in samples if name.endswith("policy_info"))
    assert labels == {
        "model_name": "demo",
        "engine": "0",
        "rank": "0",
        "policy": "trace",
        "prefetch": "off",
        "version": "1.2",
        "part": "tp0of1",
        "way": "host",
    }
    kept.close()


def test_ranks_are_series_of_their_own(tmp_path):
    kept = [worker(tmp_path, rank, hits=10 + rank) for rank in range(2)]
    samples = scrape(tmp_path)
    assert [of(samples, "hits_total", rank) for rank in range(2)] == [10, 11]
    assert len(samples) == 2 * len(METRICS)
    assert len(kept) == 2


def test_a_restarted_worker_is_one_series(tmp_path):
    worker(tmp_path, 0, "lru", name="first", hits=10, slots=4).close()
    second = worker(tmp_path, 0, "trace", name="second", hits=1, slots=6)
    samples = scrape(tmp_path)
    assert of(samples, "hits_total") == 11
    assert of(samples, "slots") == 6
    assert {dict(labels).get("policy") for _, labels in samples} == {None, "trace"}
    second.close()


def test_a_worker_is_up_until_it_ends(tmp_path):
    first, second = (worker(tmp_path, rank) for rank in range(2))
    samples = scrape(tmp_path)
    assert [of(samples, "up", rank) for rank in range(2)] == [1, 1]
    second.close()
    samples = scrape(tmp_path)
    assert [of(samples, "up", rank) for rank in range(2)] == [1, 0]
    first.close()


def test_figures_that_do_not_arrive_have_an_age_and_are_named_once(tmp_path, caplog):
    kept = worker(tmp_path, 0)
    remote = CounterFile(
        tmp_path / "remote1.counters",
        {"model_name": "demo", "engine": "0", "rank": "1"},
        {
            "policy": "trace",
            "prefetch": "off",
            "version": "1.2",
            "part": "tp1of2",
            "way": "host",
        },
        "pid 7, host b",
    )
    known = frozenset()
    for age, warnings in ((OVERDUE_SECONDS / 2, 0), (12.5, 1), (14, 1), (0, 1), (99, 2)):
        remote.write([0.0] * len(VALUES), time.monotonic() - age if age else 0.0)
        samples = scrape(tmp_path)
        assert of(samples, "counters_age_seconds", 0) == 0
        assert of(samples, "counters_age_seconds", 1) == pytest.approx(age, abs=0.4)
        known = warn_of_overdue(list(read_counters(tmp_path)), known)
        assert known == ({"rank 1 (pid 7, host b)"} if age > OVERDUE_SECONDS else set())
        assert len(caplog.records) == warnings
    assert caplog.records[0].getMessage() == (
        "MoE offload: no counters of rank 1 (pid 7, host b) for 12 s; what is shown of it is "
        "that old"
    )
    remote.close()
    assert of(scrape(tmp_path), "counters_age_seconds", 1) == 0  # it is down, not late
    kept.close()


def test_without_workers_there_are_families_and_no_samples(tmp_path):
    assert scrape(tmp_path) == {}
    assert len(list(OffloadCollector(tmp_path).collect())) == len(METRICS)
    assert len(list(OffloadCollector(tmp_path / "gone").collect())) == len(METRICS)


@pytest.mark.parametrize("where", ["dashboard", "document"])
def test_what_is_shown_and_explained_is_what_is_exported(where):
    text = DOCUMENT if where == "document" else json.dumps(DASHBOARD["panels"])
    assert set(NAME.findall(text)) == METRICS


def test_the_table_of_the_document_has_a_row_for_each_metric():
    rows = re.findall(r"^\| `(vllm:moe_offload_[a-z_]+)` \| (\w+) \|", DOCUMENT, re.MULTILINE)
    assert {name for name, _ in rows} == METRICS
    assert len(rows) == len(METRICS)
    for name, kind in rows:
        assert kind == ("counter" if name.endswith("_total") else "gauge")


def test_the_dashboard_asks_by_its_variables():
    names = [variable["name"] for variable in DASHBOARD["templating"]["list"]]
    assert {"datasource", "model_name", "engine", "rank"} <= set(names)
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            # Every selector of a metric of ours restricts all of its labels.
            selectors = re.findall(r"vllm:moe_offload_[a-z_]+(\{[^}]*\})?", target["expr"])
            assert selectors
            for selector in selectors:
                for label in ("model_name", "engine", "rank"):
                    assert f'{label}=~"${label}"' in selector
    filled = [expression for *_, expression in queries(DASHBOARD)]
    assert not [expression for expression in filled if "$" in expression]
