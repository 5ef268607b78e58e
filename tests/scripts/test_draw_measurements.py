"""docs/measured.md says what the reports say, and shows a figure for each idea."""

import re
from typing import Any

import pytest

from scripts.draw_measurements import (
    IDEAS,
    ROOT,
    draw_llamacpp,
    llamacpp_table,
    memory_bars,
    report,
    tables,
)

PAGE = (ROOT / "docs" / "measured.md").read_text()
SECTIONS = {
    match: section
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    for match in re.findall(r"\(figures/measured-(\w+)\.svg\)", section)
}


def test_every_idea_has_a_section_of_its_own() -> None:
    assert sorted(SECTIONS) == sorted(IDEAS)
    assert len(set(SECTIONS.values())) == len(IDEAS)


@pytest.mark.parametrize("name", IDEAS)
def test_a_section_has_the_reports_table_and_command(name: str) -> None:
    section = SECTIONS[name]
    assert tables()[name] in section, "run `scripts/draw_measurements.py --tables`"
    source = IDEAS[name][0]
    assert f"-> `{source}.json`" in section
    (script,) = re.findall(r"`(scripts/bench_\w+\.py)", section)
    assert (ROOT / script).is_file()


@pytest.mark.parametrize("name", IDEAS)
def test_a_figure_has_the_reports_numbers(name: str) -> None:
    figure = IDEAS[name][2](report(IDEAS[name][0]))
    shown = {text.get_text() for axes in figure.axes for text in axes.texts}
    drawn = (ROOT / "docs" / "figures" / f"measured-{name}.svg").read_text()
    assert len(shown) >= 2
    for text in shown:
        assert f">{text}<" in drawn, f"{text!r}: run `make docs`"


def test_bars_are_as_long_as_the_report_says() -> None:
    found = report("memory")
    lengths = {label: length for label, length, _, _ in memory_bars(found)}
    assert lengths["all experts"] == pytest.approx(found["expert_bytes"] / 2**30)
    assert lengths["limit of the memory cgroup"] == 4.5
    assert lengths["with the plugin"] < 3.5 < lengths["plain vLLM"] < 4.5


def test_the_readme_has_the_reports_numbers() -> None:
    text = " ".join((ROOT / "README.md").read_text().replace("**", "").split())
    memory, llamacpp, resident = map(report, ("memory", "llamacpp", "resident"))
    experts, limit = (
        f"{memory[name] / 2**30:.1f} GiB" for name in ("expert_bytes", "limit_bytes")
    )
    held = memory["build"]["cgroup"]["peak_anonymous_bytes"] / 2**30
    build = memory["build"]
    assert f"{experts} of experts under a memory limit of {limit}" in text
    assert f"serves {build['decode_tokens_per_s']:.0f} tokens/s in {held:.1f} GiB" in text
    assert f"{build['hit_rate']:.0%}".replace("%", " % hits") in text
    ours, theirs, all_ours, all_theirs = (
        f"{row['tokens_per_s']['median']:.0f}"
        for share in (0.36, 1.0)
        for contestant in ("trace", "llama.cpp")
        for row in llamacpp["summary"]
        if (row["format"], row["share"], row["contestant"]) == ("bf16", share, contestant)
    )
    assert f"{ours} tokens/s in bf16, against {theirs} for llama.cpp with mmap" in text
    assert f"with all of them in memory {all_ours} against {all_theirs}" in text
    begin, end = resident["confidence_interval_95"]
    assert f"{resident['medians']['ratio']:.2f} x plain vLLM's decode speed" in text
    assert f"{begin:.2f} to {end:.2f}, {len(resident['samples'])} rounds" in text


def contest(format_name: str, contestant: str, speed: float) -> dict[str, Any]:
    """A row of bench_llamacpp.py's summary."""
    row = {
        "format": format_name,
        "share": 0.36,
        "contestant": contestant,
        "tokens_per_s": {"median": speed, "min": speed - 1, "max": speed + 1},
        "read_mb_per_token": 10 * speed,
        "peak_anonymous_bytes": 2**30,
        "peak_page_cache_bytes": 2**29,
    }
    return row | ({"ratio": 2.5, "hit_rate": 0.875} if contestant == "trace" else {})


def test_llamacpp_is_beside_the_plugin() -> None:
    sides = (("trace", 20.0), ("llama.cpp", 8.0))
    rows = [contest(name, *side) for name in ("bf16", "int4") for side in sides]
    *_, bf16, int4 = llamacpp_table({"summary": rows}).splitlines()
    cells = "36% | 20.0 | 8.0 | 2.50 | 87.5% | 200 / 80 | 1.5 / 1.5 |"
    assert [bf16, int4] == [f"| bf16 | {cells}", f"| int4 / Q4_0 | {cells}"]
    left, right = draw_llamacpp({"summary": rows}).axes
    for axes in (left, right):
        assert [text.get_text() for text in axes.texts] == ["20.0", "8.0"]
