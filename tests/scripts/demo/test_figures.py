"""Figures of an answer are differences of two scrapes."""

from __future__ import annotations

import pytest
from rich.console import Console

from scripts.demo.figures import Figures, table

BEFORE = {"hits": 100, "misses": 50, "read_bytes": 1e9, "stall_seconds": 1.0}
AFTER = {"hits": 160, "misses": 90, "read_bytes": 3.5e9, "stall_seconds": 2.0}


def scrape(counters: dict[str, float]) -> dict[str, float]:
    return {f"vllm:moe_offload_{name}_total": value for name, value in counters.items()}


@pytest.fixture
def figures() -> Figures:
    return Figures.between(scrape(BEFORE), scrape(AFTER), tokens=80, seconds=4.0)


def test_they_count_what_came_between(figures: Figures) -> None:
    assert figures == Figures(80, 4.0, 60, 40, 2.5e9, 1.0)
    assert figures.tokens_per_s == 20
    assert figures.hit_rate == 0.6
    assert figures.stall_share == 0.25


def test_they_fit_into_a_line(figures: Figures) -> None:
    assert figures.line() == (
        "80 tokens, 20.0 tokens/s, 60% hits, 2.5 GB read, waited 25% of the time"
    )


def test_nothing_needed_is_nothing_missed() -> None:
    assert Figures(0, 1.0, 0, 0, 0.0, 0.0).hit_rate == 1.0


def test_several_answers_add_up(figures: Figures) -> None:
    other = Figures(20, 1.0, 0, 100, 0.5e9, 0.0)
    total = Figures.total(iter([figures, other]))
    assert total == Figures(100, 5.0, 60, 140, 3e9, 1.0)
    assert total.hit_rate == 0.3


def test_modes_stand_side_by_side(figures: Figures) -> None:
    console = Console(width=90)
    with console.capture() as capture:
        console.print(table({"trace": figures, "lru": Figures(80, 8.0, 50, 50, 5e9, 4.0)}))
    rows = [line for line in capture.get().splitlines() if "│" in line or "┃" in line]
    cells = [[cell.strip() for cell in row.replace("┃", "│").split("│")] for row in rows]
    assert [row[2:4] for row in cells] == [
        ["trace", "lru"],
        ["20.0", "10.0"],
        ["60.0%", "50.0%"],
        ["2.5 GB", "5.0 GB"],
        ["25.0%", "50.0%"],
    ]
