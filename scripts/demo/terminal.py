"""What demo and chat have in common: their options, and what they print before the first question."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from scripts.demo.model import ROOT, Model, get_model
from scripts.demo.serving import CACHE, START_SECONDS
from scripts.harness.server import Server

ABOUT = {
    True: "SmolLM2-135M-Instruct made sparse: 30 layers x 16 experts, 2 of them for a token. "
    "Each expert is the dense network with a little noise, so it speaks as that small model does: "
    "English, and often wrong. Wrong answers are the model's, not the cache's.",
    False: "A planted model: its words mean nothing. Its routing prefers some experts for some "
    "topics, as trained models do.",
}


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what demo and chat have in common."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=ROOT / "demo",
        help="of models, store and logs (default: demo)",
    )
    parser.add_argument(
        "--planted", action="store_true", help="serve the planted model: no network needed"
    )
    return parser


def plain(console: Console, text: str) -> None:
    """Prints text that is none of ours: no markup, no colours."""
    console.print(text, markup=False, highlight=False)


def model_of(args: argparse.Namespace, console: Console) -> Model:
    """The model to serve, and one paragraph on what it is."""
    args.directory.mkdir(parents=True, exist_ok=True)
    model = get_model(args.directory, lambda line: plain(console, line), planted=args.planted)
    console.print(Padding(Text(ABOUT[model.speaks], style="dim"), (0, 0, 1, 0)))
    return model


def wait(server: Server, console: Console, mode: str) -> None:
    """Until the server answers; then says how much of the model it holds."""
    model, log = (os.path.relpath(path) for path in (server.command[2], server.log_path))
    plain(
        console, f"vllm serve {model} --moe-offload={mode}, {CACHE} of its experts cached ..."
    )
    seconds = server.wait_healthy(START_SECONDS)
    metrics = server.metrics()
    plain(
        console,
        f"ready after {seconds:.0f} s: room for {metrics['vllm:moe_offload_slots']:.0f} experts "
        f"({metrics['vllm:moe_offload_cache_bytes'] / 1e9:.1f} GB); log: {log}\n",
    )
