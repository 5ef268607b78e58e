"""`make demo`: make a model, serve it with a cache of half its experts, chat with it.

Runs a real `vllm serve` and a real OpenAI client on loopback, prints a short table, stops
the server. Everything lies under demo/.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.demo_model import write_demo_model  # noqa: E402
from scripts.harness.server import Server  # noqa: E402

QUESTIONS = (
    "Tell me something about the sea.",
    "How do I bake bread?",
    "Write one line about winter.",
)
BEGINNINGS = ("Once upon a time", "The first law of", "In the garden there")
MAX_TOKENS = 48


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", default="50%", help="cache_gb of the server (default 50%%)")
    parser.add_argument("--eager", action="store_true", help="skip torch.compile")
    arguments = parser.parse_args()

    console = Console()
    directory = ROOT / "demo"
    directory.mkdir(exist_ok=True)
    model = directory / "mixtral"
    if not (model / "config.json").exists():
        console.print("[bold]1. A demo model[/bold] (Mixtral's architecture, planted topics)")
        write_demo_model(model, "mixtral")
    options = [
        "--moe-offload=trace",
        "--moe-offload-config.cache_gb",
        arguments.cache,
        "--moe-offload-config.store_dir",
        str(directory / "store"),
        "--served-model-name",
        "demo",
        "--max-model-len",
        "1024",
        "--kv-cache-memory-bytes",
        str(512 << 20),
    ]
    if arguments.eager:
        options.append("--enforce-eager")
    console.print(
        f"[bold]2. The server[/bold]: vllm serve {model.relative_to(ROOT)} {' '.join(options[:3])}"
    )
    with Server(model, options, log=directory / "server.log") as server:
        seconds = server.wait_healthy()
        console.print(f"   healthy after {seconds:.0f} s; log: demo/server.log")
        console.print("[bold]3. Requests[/bold] from an OpenAI client")
        tokens, elapsed = _talk(OpenAI(base_url=f"{server.url}/v1", api_key="none"), console)
        console.print(_table(server, tokens, elapsed))
    console.print("Server stopped.")


def _talk(client: OpenAI, console: Console) -> tuple[int, float]:
    """Sends all requests one after the other; generated tokens and seconds."""
    tokens = 0
    began = time.perf_counter()
    for question in QUESTIONS:
        chat = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": question}],
            max_tokens=MAX_TOKENS,
            temperature=0,
        )
        tokens += chat.usage.completion_tokens if chat.usage else 0
        console.print(
            f"   > {question}\n     {(chat.choices[0].message.content or '')[:100]!r}"
        )
    for beginning in BEGINNINGS:
        completion = client.completions.create(
            model="demo", prompt=beginning, max_tokens=MAX_TOKENS, temperature=0
        )
        tokens += completion.usage.completion_tokens if completion.usage else 0
        console.print(f"   > {beginning} ...\n     {completion.choices[0].text[:100]!r}")
    return tokens, time.perf_counter() - began


def _table(server: Server, tokens: int, seconds: float) -> Table:
    metrics = server.metrics()

    def counter(name: str) -> float:
        return metrics[f"vllm:moe_offload_{name}_total"]

    hits, misses = counter("hits"), counter("misses")
    plan = [
        line
        for line in server.log.splitlines()
        if "MoE offload (" in line or "cache_gb=" in line
    ]
    table = Table(title="What the expert cache did")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_row("generated tokens/s (one request at a time)", f"{tokens / seconds:.1f}")
    table.add_row("hit rate", f"{hits / max(hits + misses, 1):.1%}")
    table.add_row("experts read", f"{counter('read_bytes') / 1e9:.2f} GB")
    table.add_row("stalled on reads", f"{counter('stall_seconds'):.2f} s of {seconds:.1f} s")
    table.caption = "\n".join(line.split("MoE offload", 1)[1].strip(" :") for line in plan)
    return table


if __name__ == "__main__":
    main()
