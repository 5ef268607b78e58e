"""/metrics of a live server against what its workers count themselves."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.integration.conftest import BATCH
from tests.integration.served import (
    PROMPTS,
    assert_equal_while_nothing_runs,
    assert_nothing_is_counted_yet,
    complete,
    serve,
)

pytestmark = pytest.mark.vllm


def check(server, times=3):
    """Equal after each request, and after several at once."""
    for tokens in PROMPTS:
        complete(server, tokens)
        assert_equal_while_nothing_runs(server)
    with ThreadPoolExecutor(len(BATCH)) as pool:
        list(pool.map(lambda tokens: complete(server, tokens), BATCH))
    last = assert_equal_while_nothing_runs(server, times)
    for told in last.values():
        idle = {name for name, value in told.items() if value == 0}
        assert "counters_age_seconds" in idle
        # How a prefetch of the tiny model ends is a matter of microseconds.
        unsure = {f"prefetch_{end}_total" for end in ("useful", "late", "wasted")}
        no_drafter = {"draft_hits_total", "draft_misses_total"}
        assert idle <= {"counters_age_seconds"} | no_drafter | unsure
        assert no_drafter <= idle
    return last


def test_metrics_are_what_the_worker_counts(trace_server):
    """Feature: /metrics."""
    check(trace_server)


@pytest.mark.slow
def test_metrics_are_the_same_from_all_api_servers(demo_model, store_dir, tmp_path):
    more = ["--api-server-count", "4"]
    with serve(demo_model("mixtral"), store_dir, tmp_path / "log", *more) as server:
        server.wait_healthy()
        assert_nothing_is_counted_yet(server, times=12)  # whichever of the four answers
        check(server, times=12)
        assert server.log.count("Started server process") == 4


@pytest.mark.slow
def test_each_rank_has_its_own_metrics(demo_model, store_dir, tmp_path):
    more = ["--tensor-parallel-size", "2"]
    with serve(
        demo_model("mixtral"),
        store_dir,
        tmp_path / "log",
        *more,
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    ) as server:
        server.wait_healthy()
        assert_nothing_is_counted_yet(server, num_ranks=2)
        ranks = check(server)
    # Both see the same routing; when a prefetch arrives is a matter of each one's reader.
    needed = [told["hits_total"] + told["misses_total"] for told in ranks.values()]
    assert needed[0] == needed[1]
