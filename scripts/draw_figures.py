"""Draws the figures of docs/how-it-works.md and the README as SVG (`make docs`).

    python scripts/draw_figures.py [--directory docs/figures] [--format svg]

They show what happens in which order and what lies where; nothing in them was measured. Text
and lines are of a grey and colours that read on white and on dark pages; there is no
background.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

ROOT = Path(__file__).resolve().parent.parent
INK = "#7d8590"
COLOURS = {
    "compute": "#2f81f7",
    "plan": "#8957e5",
    "demand": "#d1242f",
    "prefetch": "#2da44e",
    "stay": "#bf8700",
}
EMPTY = "#7d859055"


def _axes(width: float, height: float, right: float, top: float) -> tuple[Figure, Axes]:
    """A figure of ``width`` x ``height`` inches, drawn on in units up to ``right``, ``top``."""
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set_xlim(0, right)
    axes.set_ylim(0, top)
    axes.axis("off")
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.99)
    return figure, axes


def _text(
    axes: Axes, x: float, y: float, text: str, *, size: float = 9, align: str = "left"
) -> None:
    axes.text(x, y, text, color=INK, fontsize=size, ha=align, va="center")


def _box(
    axes: Axes, at: tuple[float, float], size: tuple[float, float], colour: str, text: str = ""
) -> None:
    axes.add_patch(Rectangle(at, *size, facecolor=colour, edgecolor="none"))
    x, y = at[0] + size[0] / 2, at[1] + size[1] / 2
    ink = INK if colour == EMPTY else "white"
    axes.text(x, y, text, color=ink, fontsize=8, ha="center", va="center")


def _arrow(axes: Axes, begin: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(
        FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=11, color=INK, lw=1.2)
    )


def draw_slots() -> Figure:
    """Store, slots, and how kernels are told where an expert lies."""
    figure, axes = _axes(8.6, 4.3, 86, 43)

    _text(axes, 2, 40.5, "Expert store: one file on a local disk, every expert once", size=10)
    cached = {(0, 1): 0, (0, 4): 3, (1, 0): 1, (1, 6): 4, (2, 4): 2, (2, 7): 5}
    layer_colours = (COLOURS["compute"], COLOURS["plan"], COLOURS["stay"])
    for layer in range(3):
        y = 33 - 5 * layer
        _text(axes, 2, y + 1.8, f"layer {layer}")
        for expert in range(8):
            here = (layer, expert) in cached
            colour = layer_colours[layer] if here else EMPTY
            _box(axes, (11 + 5 * expert, y), (4.4, 3.6), colour, f"{layer}.{expert}")
    _text(axes, 53.5, 34.8, "coloured: also cached", size=8.5)
    _text(axes, 53.5, 29.8, "grey: only on disk", size=8.5)
    _text(axes, 53.5, 24.8, "a record: the bytes that the", size=8.5)
    _text(axes, 53.5, 22.4, "kernel wants, read with O_DIRECT", size=8.5)

    _text(
        axes,
        2,
        16.8,
        "Slot pool in memory: slots are rows of one tensor, shared by all layers",
        size=10,
    )
    held = {slot: key for key, slot in cached.items()}
    for row in range(8):
        x = 11 + 5 * row
        if row in held:
            layer, expert = held[row]
            _box(axes, (x, 10.5), (4.4, 3.6), layer_colours[layer], f"{layer}.{expert}")
        else:
            axes.add_patch(
                Rectangle((x, 10.5), 4.4, 3.6, facecolor="none", edgecolor=INK, ls="--")
            )
        _text(axes, x + 2.2, 8.9, f"row {row}", size=7, align="center")
    _text(axes, 53.5, 12.3, "dashed: staging slots, for what is", size=8.5)
    _text(axes, 53.5, 9.9, "used once and not kept", size=8.5)

    _text(axes, 2, 4.2, "The router of layer 2 says  topk_ids = [4, 7].", size=9)
    _arrow(axes, (37, 4.2), (43, 4.2))
    _text(axes, 44, 4.2, "vLLM's kernel is given  [2, 5]: the slots of 2.4 and 2.7.", size=9)
    _text(
        axes, 2, 1.4, "weights[row] is what weights[expert] would be, so the output is.", size=9
    )
    return figure


def draw_layer_call() -> Figure:
    """Two layer calls as a timeline: what waits for what, and what is hidden."""
    figure, axes = _axes(8.6, 3.9, 86, 39)
    lanes = {"vLLM": 28, "plugin": 20, "disk": 12}
    for name, y in lanes.items():
        _text(axes, 1, y + 1.9, name, size=10)
        axes.plot([9, 85], [y - 0.8, y - 0.8], color=INK, lw=0.5, alpha=0.5)

    kernel, plan, disk = lanes["vLLM"], lanes["plugin"], lanes["disk"]
    _box(axes, (10, kernel), (9, 4), EMPTY, "router l")
    _box(axes, (19, plan), (4, 4), COLOURS["plan"], "plan")
    _box(axes, (23, disk), (12, 4), COLOURS["demand"], "demand reads")
    _box(axes, (23, plan), (8, 4), COLOURS["plan"], "scores, ask")
    _box(axes, (35, disk), (19, 4), COLOURS["prefetch"], "prefetch for l+1, l+2, l+3")
    _box(axes, (35, kernel), (15, 4), COLOURS["compute"], "experts of layer l")
    _box(axes, (50, plan), (4, 4), COLOURS["stay"], "stay?")
    _box(axes, (54, kernel), (9, 4), EMPTY, "router l+1")
    _box(axes, (63, plan), (4, 4), COLOURS["plan"], "plan")
    _box(axes, (67, kernel), (15, 4), COLOURS["compute"], "experts of layer l+1")
    _box(axes, (67, disk), (15, 4), COLOURS["prefetch"], "prefetch")

    axes.annotate(
        "",
        (23, 34.5),
        (35, 34.5),
        arrowprops={"arrowstyle": "<->", "color": COLOURS["demand"]},
    )
    _text(axes, 29, 36.6, "stalled: misses", size=8.5, align="center")
    axes.annotate(
        "",
        (35, 34.5),
        (54, 34.5),
        arrowprops={"arrowstyle": "<->", "color": COLOURS["prefetch"]},
    )
    _text(axes, 44.5, 36.6, "hidden behind computing", size=8.5, align="center")
    _text(axes, 74.5, 36.6, "all hits: no wait", size=8.5, align="center")
    _text(
        axes,
        9,
        7.6,
        "plan: who is there, who is missing, which row each gets. Demand reads go first;",
        size=8.5,
    )
    _text(
        axes,
        9,
        4.9,
        "scores, ask: the policy catches up, the next layers' routers are asked; the disk is busy.",
        size=8.5,
    )
    _text(
        axes,
        9,
        2.2,
        "stay?: misses compete with residents by fresh scores; the least valuable leave.",
        size=8.5,
    )
    return figure


def draw_scores() -> Figure:
    """What trace knows about an expert, and what becomes of it."""
    figure, axes = _axes(8.6, 4.0, 86, 40)
    knows = (
        "this request, its last 1, 4, 16, 200 tokens",
        "what follows what: successor model",
        "finished requests like it (trace_path)",
        "popularity over all requests",
        "layers until its next visit",
    )
    for index, text in enumerate(knows):
        y = 33.5 - 5.4 * index
        _box(axes, (1, y), (31, 4.2), COLOURS["compute"], text)
        end = (58.5, 17) if index == 4 else (39, 23.5)
        _arrow(axes, (32.3, y + 2.1), end)
    _box(axes, (39.5, 19.5), (14, 8), COLOURS["plan"], "weights, \nlearned online")
    _arrow(axes, (53.8, 23.5), (58.5, 23.5))
    _text(axes, 72.5, 37.5, "scores [layers, experts]", size=9.5, align="center")
    values = np.random.default_rng(3).beta(0.6, 2.2, (6, 10))
    for layer in range(6):
        for expert in range(10):
            shade = f"{COLOURS['stay']}{round(40 + 215 * values[layer, expert]):02x}"
            _box(axes, (59 + 2.7 * expert, 32 - 3.4 * layer), (2.5, 3.1), shade)
    _text(axes, 72.5, 12.6, "least score leaves first", size=8.5, align="center")

    _box(
        axes, (1, 3.2), (31, 4.2), COLOURS["prefetch"], "the next layers' routers, asked early"
    )
    _arrow(axes, (32.3, 5.3), (39, 5.3))
    _text(axes, 40, 5.3, "probability of .6 or more: kept if there, read if not", size=9)
    return figure


def draw_overview() -> Figure:
    """What lies where, and what moves: the README's picture."""
    figure, axes = _axes(8.6, 2.75, 86, 27.5)
    _text(axes, 14, 25.5, "local disk: expert store", size=10, align="center")
    for layer in range(4):
        for expert in range(8):
            _box(axes, (2 + 3 * expert, 19.4 - 3 * layer), (2.6, 2.6), EMPTY)
    _text(axes, 14, 7.6, "all experts, each once,", align="center")
    _text(axes, 14, 5.0, "in the kernel's own form", align="center")

    _text(axes, 50, 25.5, "memory: slots for experts", size=10, align="center")
    held = ("compute", "demand", *4 * ("compute",), "prefetch", "compute")
    for slot, colour in enumerate(held):
        at = (44 + 3 * (slot % 4), 17.9 - 3 * (slot // 4))
        _box(axes, at, (2.6, 2.6), COLOURS[colour])
    _text(axes, 50, 12.4, "beside vLLM's KV cache", align="center")
    _text(axes, 50, 7.6, "who stays: traces of what", align="center")
    _text(axes, 50, 5.0, "each request activates", align="center")

    for y, colour, text in (
        (19.2, COLOURS["demand"], "missing: read now"),
        (14.6, COLOURS["prefetch"], "expected: read ahead"),
    ):
        axes.add_patch(
            FancyArrowPatch(
                (27, y), (42.5, y), arrowstyle="-|>", mutation_scale=13, color=colour, lw=1.8
            )
        )
        _text(axes, 34.5, y + 1.7, text, size=8.5, align="center")

    _arrow(axes, (57, 17.7), (65, 17.7))
    _text(axes, 61, 19.4, "slot ids", size=8.5, align="center")
    _text(axes, 75.5, 25.5, "stock vLLM", size=10, align="center")
    _box(axes, (66, 15.3), (19, 5.2), COLOURS["plan"], "vLLM's own kernels")
    _text(axes, 75.5, 12.4, "weights[slot], not weights[expert]", size=8, align="center")
    _text(axes, 75.5, 7.6, "same tokens,", align="center")
    _text(axes, 75.5, 5.0, "bitwise same logprobs", align="center")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "overview": draw_overview,
    "slots": draw_slots,
    "layer-call": draw_layer_call,
    "scores": draw_scores,
}


def write(figures: Mapping[str, Callable[[], Figure]], description: str | None) -> None:
    """Draws ``figures`` into files of their names, as the command line says."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=ROOT / "docs" / "figures")
    parser.add_argument("--format", choices=["svg", "png"], default="svg")
    parser.add_argument(
        "--background", default="none", help="colour behind it, to look at (default: none)"
    )
    arguments = parser.parse_args()
    # Text stays text, and the same drawing gives the same file.
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "moe-offload"})
    plt.rcParams["font.family"] = ["sans-serif"]
    arguments.directory.mkdir(parents=True, exist_ok=True)
    for name, draw in figures.items():
        figure = draw()
        metadata = {"Date": None} if arguments.format == "svg" else {}
        figure.savefig(
            arguments.directory / f"{name}.{arguments.format}",
            dpi=110,
            facecolor=arguments.background,
            metadata=metadata,
        )
        plt.close(figure)


if __name__ == "__main__":
    write(FIGURES, __doc__)
