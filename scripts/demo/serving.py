"""The demo's server, and how it is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import BadRequestError, OpenAI

from scripts.demo.figures import Figures
from scripts.demo.model import Model
from scripts.harness.server import Server

CACHE = "25%"
NAME = "demo"
MAX_CONTEXT_TOKENS = 2048
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
START_SECONDS = 600
REPETITION_PENALTY = 1.1
"""Without it so small a model says the same sentence over and over."""


class Refused(ValueError):
    """The server does not take the conversation, most likely because it is too long."""


def options(mode: str, store: Path) -> list[str]:
    """Arguments after ``vllm serve MODEL``."""
    return [
        f"--moe-offload={mode}",
        *("--moe-offload-config.cache_gb", CACHE),
        *("--moe-offload-config.store_dir", str(store)),
        *("--served-model-name", NAME),
        *("--max-model-len", str(MAX_CONTEXT_TOKENS)),
        *("--max-num-seqs", "4"),
        *("--kv-cache-memory-bytes", str(512 << 20)),
        "--enforce-eager",  # compiling takes longer than all the answers
    ]


def serve(model: Model, mode: str) -> Server:
    """A server that was started and not waited for. Servers of all modes share a store."""
    directory = model.path.parent
    arguments = options(mode, directory / "store")
    log = directory / f"server-{mode}.log"
    return Server(model.path, arguments, log=log, environment=ENVIRONMENT)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said, whether ``max_tokens`` cut it off, and what it cost."""

    text: str
    was_cut: bool
    figures: Figures


def ask(
    server: Server,
    messages: Sequence[dict[str, str]],
    max_tokens: int,
    show: Callable[[str], None] = lambda piece: None,
) -> Answer:
    """One greedy answer of the chat endpoint; nobody else may ask meanwhile.

    Args:
        server: that answers ``/health``.
        messages: of the conversation, the question last.
        max_tokens: of the answer.
        show: gets each piece of the answer as it comes.

    Raises:
        Refused: the server does not take these messages; its own words.
    """
    client: Any = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    before = server.metrics()
    began = time.perf_counter()
    try:
        stream = client.chat.completions.create(
            model=NAME,
            messages=list(messages),
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"repetition_penalty": REPETITION_PENALTY},
        )
    except BadRequestError as error:
        raise Refused(error.message) from error
    pieces: list[str] = []
    tokens, reason = 0, None
    for chunk in stream:
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            if choice.delta.content:
                pieces.append(choice.delta.content)
                show(choice.delta.content)
    seconds = time.perf_counter() - began
    figures = Figures.between(before, server.metrics(), tokens=tokens, seconds=seconds)
    return Answer("".join(pieces).strip(), reason == "length", figures)
