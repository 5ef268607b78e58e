"""Draws the figures of docs/measured.md from the reports of the benchmarks (`make docs`).

    python scripts/draw_measurements.py [--directory docs/figures] [--format svg]
    python scripts/draw_measurements.py --tables     prints the tables of that page instead

A figure and a table for each idea, both from the same JSON under benchmarks/results; a test
compares the tables with the page's. Long because it is one page's worth of them, side by side: each
stands alone, over the few helpers at its top.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from scripts.draw_figures import COLOURS, INK, write  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
OURS, OTHERS, BOUND, BAD = COLOURS["compute"], INK, COLOURS["prefetch"], COLOURS["demand"]
GIB = 2**30

Report = dict[str, Any]
Bar = tuple[str, float, str, str]
"""Label, length, colour, and what stands at its end."""


def report(name: str) -> Report:
    """``benchmarks/results/<name>.json``."""
    found: Report = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def _markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _panels(number: int, height: float, left: float = 0.2) -> tuple[Figure, list[Axes]]:
    """Axes side by side, in the ink of the page, without frames."""
    figure, grid = plt.subplots(1, number, figsize=(8.6, height), squeeze=False)
    figure.subplots_adjust(left, 0.2, 0.95, 0.88, wspace=0.45)
    for axes in grid[0]:
        axes.tick_params(colors=INK, labelsize=8.5, length=0)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        for side in axes.spines.values():
            side.set_visible(False)
    return figure, list(grid[0])


def _bars(axes: Axes, bars: Sequence[Bar], unit: str, title: str = "") -> None:
    """Horizontal bars, the first on top, each with its figure at its end."""
    places = range(len(bars), 0, -1)
    widths = [width for _, width, _, _ in bars]
    axes.barh(places, widths, color=[colour for _, _, colour, _ in bars], height=0.62)
    axes.set_yticks(list(places), [label for label, _, _, _ in bars])
    axes.set_xlim(0, 1.3 * max(widths))
    axes.set_xticks([])
    axes.set_xlabel(unit, fontsize=8.5)
    axes.set_title(title, color=INK, fontsize=9.5, loc="left")
    for place, (_, width, _, text) in zip(places, bars, strict=True):
        at = width + 0.02 * max(widths)
        axes.text(at, place, text, color=INK, fontsize=8.5, va="center")


def _same_scale(grid: Sequence[Axes]) -> None:
    """Makes bars of different axes comparable."""
    upper = max(axes.get_xlim()[1] for axes in grid)
    for axes in grid:
        axes.set_xlim(0, upper)


def memory_bars(found: Report) -> list[Bar]:
    """GiB: what has to fit, what plain vLLM took until it was killed, what the plugin took."""
    plain, held = (found[run]["cgroup"]["peak_anonymous_bytes"] for run in ("plain", "build"))
    values = (
        ("all experts", found["expert_bytes"], OTHERS, ""),
        ("limit of the memory cgroup", found["limit_bytes"], OTHERS, ""),
        ("plain vLLM", plain, BAD, ", killed by the kernel"),
        ("with the plugin", held, OURS, ""),
    )
    return [
        (name, size / GIB, ink, f"{size / GIB:.2f}{end}") for name, size, ink, end in values
    ]


def memory_table(found: Report) -> str:
    """What ran and how it ended."""
    rows: list[Sequence[object]] = [
        ("plain vLLM", f"killed after {found['plain']['seconds']:.0f} s", "", "")
    ]
    for run, name in (("build", "first start, builds the store"), ("reopen", "second start")):
        case = found[run]
        held = case["cgroup"]["peak_anonymous_bytes"] / GIB
        served = f"serves, {case['decode_tokens_per_s']:.1f} tokens/s"
        rows.append((f"plugin, {name}", served, f"{case['hit_rate']:.1%}", f"{held:.2f} GiB"))
    return _markdown(("server", "outcome", "hits", "memory held at most"), rows)


def draw_memory(found: Report) -> Figure:
    """A model larger than the memory that a server may take."""
    figure, (axes,) = _panels(1, 2.1, left=0.25)
    _bars(axes, memory_bars(found), "GiB")
    return figure


SIDES = {"trace": ("this plugin", OURS), "llama.cpp": ("llama.cpp", OTHERS)}
FORMATS = {"bf16": "bf16", "int4": "int4 / Q4_0"}
"""As the plugin and llama.cpp have them."""


def _sides(found: Report) -> dict[tuple[str, float], dict[str, Report]]:
    """Rows of the summary by format and share, and then by contestant."""
    by_case: dict[tuple[str, float], dict[str, Report]] = {}
    for row in found["summary"]:
        by_case.setdefault((row["format"], row["share"]), {})[row["contestant"]] = row
    return by_case


def llamacpp_table(found: Report) -> str:
    """Decode speed by share of the experts in memory, and what each side read and took."""
    rows = []
    for (name, share), sides in _sides(found).items():
        both = [sides[side] for side in SIDES]
        rows.append(
            (
                FORMATS[name],
                f"{share:.0%}",
                *(f"{row['tokens_per_s']['median']:.1f}" for row in both),
                f"{both[0]['ratio']:.2f}",
                f"{both[0]['hit_rate']:.1%}",
                " / ".join(f"{row['read_mb_per_token']:.0f}" for row in both),
                " / ".join(
                    f"{(row['peak_anonymous_bytes'] + row['peak_page_cache_bytes']) / GIB:.1f}"
                    for row in both
                ),
            )
        )
    head = (
        "format",
        "experts in memory",
        "plugin, tokens/s",
        "llama.cpp, tokens/s",
        "ratio",
        "plugin's hits",
        "MB read per token, plugin / llama.cpp",
        "GiB in all, plugin / llama.cpp",
    )
    return _markdown(head, rows)


def draw_llamacpp(found: Report) -> Figure:
    """Tokens/s by share, a group of two bars for each."""
    figure, grid = _panels(2, 2.6, left=0.17)
    by_case = _sides(found)
    for axes, (name, title) in zip(grid, FORMATS.items(), strict=True):
        bars = []
        for (of_format, share), sides in by_case.items():
            if of_format == name:
                for side, (label, colour) in SIDES.items():
                    speed = sides[side]["tokens_per_s"]["median"]
                    bars.append((f"{share:.0%}, {label}", speed, colour, f"{speed:.1f}"))
        _bars(axes, bars, "tokens/s", title)
    return figure


def formats_table(found: Report) -> str:
    """The same bytes for experts, spent on bf16 or on int4."""
    rows = [
        (
            f"{row['share']:.0%} of bf16's",
            row["format"],
            f"{row['cached']:.0%}",
            f"{row['tokens_per_s']['median']:.1f}",
            f"{row['hit_rate']:.1%}",
            f"{row['read_mb_per_token']:.1f}",
        )
        for row in found["summary"]
    ]
    head = ("bytes for experts", "format", "experts cached", "tokens/s", "hits", "MB/token")
    return _markdown(head, rows)


def draw_formats(found: Report) -> Figure:
    """Tokens/s by the bytes that experts have, a group of two bars for each."""
    figure, (axes,) = _panels(1, 2.0, left=0.17)
    bars = []
    for row in found["summary"]:
        speed = row["tokens_per_s"]["median"]
        colour = OURS if row["format"] == "int4" else OTHERS
        bars.append((f"{row['share']:.0%}, {row['format']}", speed, colour, f"{speed:.1f}"))
    _bars(axes, bars, "tokens/s", "the same bytes, in shares of the bf16 experts'")
    return figure


CONTESTANTS = {
    "lru": ("lru", OTHERS),
    "lrfu": ("lrfu", OTHERS),
    "trace without prefetch": ("trace, prefetch off", OURS),
    "trace": ("trace", OURS),
    "oracle": ("oracle", BOUND),
}


def prefetch_table(found: Report) -> str:
    """Stalls, speed and reads, at both numbers of requests."""
    rows = []
    for case in found["summary"]:
        for key, (name, _) in CONTESTANTS.items():
            one = case["contestants"][key]
            needed = one["prefetch_useful"] + one["prefetch_late"]
            ahead = f"{needed} / {one['prefetch_wasted']}" if one["prefetch_issued"] else ""
            rows.append(
                (
                    case["concurrency"],
                    name,
                    f"{one['stall_ms_per_token']:.1f}",
                    f"{one['tokens_per_s']:.1f}",
                    f"{one['hit_rate']:.1%}",
                    ahead,
                )
            )
    head = ("B", "policy", "stalled, ms/token", "tokens/s", "hits", "read ahead: needed / not")
    return _markdown(head, rows)


def draw_prefetch(found: Report) -> Figure:
    """Time stalled on reads."""
    figure, grid = _panels(2, 2.3, left=0.16)
    for axes, case in zip(grid, found["summary"], strict=True):
        bars = []
        for key, (name, colour) in CONTESTANTS.items():
            value = case["contestants"][key]["stall_ms_per_token"]
            bars.append((name, value, colour, f"{value:.1f}"))
        _bars(axes, bars, "stalled on reads, ms per token", f"B={case['concurrency']}")
    _same_scale(grid)
    return figure


POLICIES = ("lru", "lru-layer", "lfu", "lrfu", "eamc", "trace", "belady")


def _hit_rates(found: Report, capacity: float) -> dict[int, dict[str, float]]:
    rates: dict[int, dict[str, float]] = {}
    for sample in found["samples"]:
        if sample["capacity"] == capacity:
            at = rates.setdefault(sample["concurrency"], {})
            at[sample["policy"]] = sample["hit_rate"]
    return rates


def hits_table(found: Report) -> str:
    """Hit rates of all policies with a quarter cached."""
    rates = _hit_rates(found, 0.25)
    rows = [(b, *(f"{at[name]:.3f}" for name in POLICIES)) for b, at in rates.items()]
    return _markdown(("B", *POLICIES), rows)


def draw_hits(found: Report) -> Figure:
    """The same as bars, for one and for eight requests."""
    figure, grid = _panels(2, 2.7, left=0.1)
    inks = {"trace": OURS, "belady": BOUND}
    for axes, b in zip(grid, (1, 8), strict=True):
        at = _hit_rates(found, 0.25)[b]
        bars = [
            (name, at[name], inks.get(name, OTHERS), f"{at[name]:.3f}") for name in POLICIES
        ]
        _bars(axes, bars, "hit rate, a quarter cached", f"B={b}")
    _same_scale(grid)
    return figure


def resident_table(found: Report) -> str:
    """Medians, their ratio and its interval."""
    low, high = found["confidence_interval_95"]
    rows = [
        (
            len(found["samples"]),
            f"{found['medians']['plain']['median']:.1f}",
            f"{found['medians']['offload']['median']:.1f}",
            f"{found['medians']['ratio']:.3f}",
            f"{low:.3f} to {high:.3f}",
        )
    ]
    head = (
        "rounds",
        "plain vLLM, tokens/s",
        "plugin, tokens/s",
        "median ratio",
        "95 % interval",
    )
    return _markdown(head, rows)


def draw_resident(found: Report) -> Figure:
    """The ratio of every round."""
    figure, (axes,) = _panels(1, 1.9, left=0.06)
    ratios = sorted(found["ratios"])
    axes.scatter(ratios, [1] * len(ratios), s=28, color=OURS, alpha=0.55, edgecolors="none")
    low, high = found["confidence_interval_95"]
    middle = found["medians"]["ratio"]
    axes.plot([low, high], [0.55, 0.55], color=OURS, lw=3)
    said = f"median {middle:.3f}, 95 % interval"
    axes.text(low - 0.003, 0.55, said, color=INK, fontsize=8.5, va="center", ha="right")
    axes.axvline(1, color=INK, lw=0.8)
    axes.text(1.002, 1.45, "as fast as plain vLLM", color=INK, fontsize=8.5, va="center")
    axes.set_ylim(0.3, 1.65)
    axes.set_yticks([])
    axes.set_xlabel("decode speed of a round, plugin / plain vLLM", fontsize=8.5)
    return figure


def _starts(found: Report) -> dict[str, float]:
    names = found["second_start"][0]["seconds"]
    runs = [start["seconds"] for start in found["second_start"]]
    return {name: statistics.median(run[name] for run in runs) for name in names}


def _builds(found: Report) -> dict[str, float]:
    keys = {"build_s": "building it", "raw_read_s": "raw read", "raw_write_s": "raw write"}
    first = found["first_start"]
    return {
        name: statistics.median(start[key] for start in first) for key, name in keys.items()
    }


def start_table(found: Report) -> str:
    """Seconds to ``/health``, and of building the store."""
    starts, builds = _starts(found), _builds(found)
    rows = [
        *((f"second start, {name}", f"{seconds:.1f}") for name, seconds in starts.items()),
        *(
            (f"first start, store: {name}", f"{seconds:.1f}")
            for name, seconds in builds.items()
        ),
    ]
    return _markdown(("what", "seconds"), rows)


def draw_start(found: Report) -> Figure:
    """Second starts beside plain vLLM's, and the store's building beside the raw disk."""
    figure, grid = _panels(2, 1.9, left=0.14)
    starts = [
        (name, seconds, OTHERS if name == "plain" else OURS, f"{seconds:.1f}")
        for name, seconds in _starts(found).items()
    ]
    _bars(grid[0], starts, "s to /health", "second start")
    inks = {"building it": OURS}
    builds = [
        (name, seconds, inks.get(name, OTHERS), f"{seconds:.1f}")
        for name, seconds in _builds(found).items()
    ]
    _bars(grid[1], builds, "s", "first start: the store, 2.4 GB")
    return figure


def reads_table(found: Report) -> str:
    """GB/s of the plugin's reader and of a raw one; and what checking costs a server."""
    rows = []
    for case in found["cases"]:
        speed = case["median_bytes_per_s"]
        ours, raw = speed["engine"] / 1e9, max(speed["whole"], speed["split"]) / 1e9
        row = (
            case["record"],
            case["batch"],
            f"{ours:.2f}",
            f"{raw:.2f}",
            f"{case['ratio']:.2f}",
            f"{speed['checked'] / 1e9:.2f}",
        )
        rows.append(row)
    head = (
        "record",
        "records at a time",
        "plugin, GB/s",
        "raw O_DIRECT, GB/s",
        "ratio",
        "plugin, checked, GB/s",
    )
    return f"{_markdown(head, rows)}\n\n{_checks_table(found['serving'])}"


def _checks_table(serving: Report) -> str:
    """A server from an empty cache on, by when it checks records."""
    rows = []
    for name, arm in serving["summary"]["arms"].items():
        middle = {key: figure["median"] for key, figure in arm.items()}
        row = (
            name,
            f"{middle['first_round_s']:.1f}",
            f"{middle['first_round_stall_s']:.2f}",
            f"{middle['first_round_stall_s_more']:+.2f}",
            f"{middle['tokens_per_s']:.1f}",
            f"{middle['tokens_per_s_ratio']:.2f}",
        )
        rows.append(row)
    head = (
        "checked at",
        "first round, s",
        "of it stalled, s",
        "more than never, s",
        "then tokens/s",
        "of never",
    )
    return _markdown(head, rows)


def draw_reads(found: Report) -> Figure:
    """The ratio, by size and number of records."""
    figure, grid = _panels(2, 1.9, left=0.12)
    for axes, record in zip(grid, ("12.6 MB", "1.6 MB"), strict=True):
        bars = [
            (f"{case['batch']} at a time", case["ratio"], OURS, f"{case['ratio']:.2f}")
            for case in found["cases"]
            if case["record"] == record
        ]
        _bars(axes, bars, "share of a raw read's speed", f"records of {record}")
    _same_scale(grid)
    return figure


def _planning(found: Report, tokens: int) -> dict[str, float]:
    """us per layer, the worse of both cache sizes."""
    worst: dict[str, float] = {}
    for case in found["cases"]:
        if case["tokens"] == tokens:
            name = case["policy"]
            worst[name] = max(worst.get(name, 0), case["total_us"])
    return worst


def planner_table(found: Report) -> str:
    """Planning per layer at one and at 32 tokens, and what is due once a step."""
    layers = found["parameters"]["layers"]
    due: dict[tuple[str, int], float] = {}
    for case in found["cases"]:
        key = (case["policy"], case["tokens"])
        due[key] = max(due.get(key, 0), layers * case["learning_mean_us"] / 1000)
    one, many = _planning(found, 1), _planning(found, 32)
    rows = [
        (
            f"`{name}`",
            f"{one[name]:.1f}",
            f"{many[name]:.1f}",
            f"{due[name, 1]:.1f}",
            f"{due[name, 32]:.1f}",
        )
        for name in one
    ]
    head = (
        "policy",
        "us per layer, B=1",
        "B=32",
        "ms once a step, B=1",
        "B=32",
    )
    return _markdown(head, rows)


def draw_planner(found: Report) -> Figure:
    """Planning per layer."""
    figure, grid = _panels(2, 2.2, left=0.1)
    for axes, tokens in zip(grid, (1, 32), strict=True):
        bars = [
            (name, value, OURS if name == "trace" else OTHERS, f"{value:.1f}")
            for name, value in _planning(found, tokens).items()
        ]
        _bars(axes, bars, "us per layer, all hits", f"B={tokens}")
    _same_scale(grid)
    return figure


IDEAS: dict[str, tuple[str, Callable[[Report], str], Callable[[Report], Figure]]] = {
    "memory": ("memory", memory_table, draw_memory),
    "llamacpp": ("llamacpp", llamacpp_table, draw_llamacpp),
    "formats": ("formats", formats_table, draw_formats),
    "prefetch": ("prefetch", prefetch_table, draw_prefetch),
    "hits": ("replay_table", hits_table, draw_hits),
    "resident": ("resident", resident_table, draw_resident),
    "start": ("start", start_table, draw_start),
    "reads": ("reads", reads_table, draw_reads),
    "planner": ("planner", planner_table, draw_planner),
}
"""By name of the figure: the report, and what is made of it."""


def tables() -> dict[str, str]:
    """The page's table of each idea, as Markdown."""
    return {name: table(report(source)) for name, (source, table, _) in IDEAS.items()}


def main() -> None:
    """See the module's docstring."""
    if sys.argv[1:] == ["--tables"]:
        for name, table in tables().items():
            print(f"{name}\n\n{table}\n")
        return
    figures = {
        f"measured-{name}": partial(draw, report(source))
        for name, (source, _, draw) in IDEAS.items()
    }
    write(figures, __doc__)


if __name__ == "__main__":
    main()
