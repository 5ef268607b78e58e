"""Completions asked of a server, one at a time or as a turn that is measured."""

from __future__ import annotations

import http.client
import itertools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scripts.demo_model import TOPICS
from scripts.harness.server import HOST, Server
from scripts.harness.serving import SERVED_NAME

QUESTIONS = (
    "Explain how rain forms, step by step.",
    "Write a short story about a lighthouse keeper.",
    "What is the difference between a list and a tuple in Python?",
    "Give me three tips for a good night's sleep.",
    "Describe the life of a bee.",
    "How do I make pancakes?",
    "Write a function that reverses a string.",
    "Why is the sky blue?",
)
"""What a model that speaks is asked."""

Prompt = str | Sequence[int]
"""A text, or the ids of its tokens."""


def questions(count: int, number: int) -> list[str]:
    """The questions of turn ``number``: the next ``count`` of them, over and over."""
    return [QUESTIONS[(number * count + i) % len(QUESTIONS)] for i in range(count)]


def prompts(count: int, words: int = 24, seed: int = 0) -> list[str]:
    """Texts that keep to a topic each; the same ones at every call with the same seed."""
    rng = random.Random(seed)
    topics = list(itertools.islice(itertools.cycle(TOPICS.values()), count))
    return [" ".join(rng.choices(topic.split(), k=words)) for topic in topics]


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion as the client saw it: generated tokens, seconds with the prompt's."""

    text: str
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Turn:
    """Requests that a server answered one after the other.

    Attributes:
        answers: one per request.
        decode_s: from first to last token, summed, by the engine's own clock
            (``vllm:request_decode_time_seconds``): ``tokens - 1`` steps each. A client's
            clock sees several tokens arrive at once where the API server waits for a core.
        seconds: of all requests, by the client's clock.
    """

    answers: list[Answer]
    decode_s: float
    seconds: float

    @property
    def texts(self) -> list[str]:
        """What was generated."""
        return [answer.text for answer in self.answers]

    @property
    def tokens(self) -> int:
        """Generated tokens."""
        return sum(answer.tokens for answer in self.answers)

    @property
    def decode_speed(self) -> float:
        """Decoded tokens per second; prompts and HTTP don't count."""
        return (self.tokens - len(self.answers)) / self.decode_s

    @property
    def client_speed(self) -> float:
        """Tokens per second that the client got, prompts included."""
        return self.tokens / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Figures for a report."""
        return {
            "decode_tokens_per_s": self.decode_speed,
            "client_tokens_per_s": self.client_speed,
            "decode_s": self.decode_s,
            "request_s": [answer.seconds for answer in self.answers],
            "tokens": self.tokens,
        }


def ask(port: int, prompt: Prompt, max_tokens: int, temperature: float = 0.0) -> Answer:
    """A completion of exactly ``max_tokens`` tokens; greedy at temperature 0."""
    connection = http.client.HTTPConnection(HOST, port, timeout=900)
    body = {
        "model": SERVED_NAME,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": 0,
        "ignore_eos": True,
    }
    began = time.perf_counter()
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    content = response.read()
    seconds = time.perf_counter() - began
    connection.close()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {content[:2000]!r}")
    data = json.loads(content)
    tokens = data["usage"]["completion_tokens"]
    if tokens != max_tokens:
        raise RuntimeError(f"{tokens} tokens came instead of {max_tokens}")
    return Answer(data["choices"][0]["text"], tokens, seconds)


def take_turn(
    server: Server, requests: Sequence[Prompt], max_tokens: int, temperature: float = 0.0
) -> Turn:
    """Sends the requests one after the other; nobody else may send any meanwhile."""
    count_before, decode_before = _decode_time(server)
    began = time.perf_counter()
    answers = [ask(server.port, prompt, max_tokens, temperature) for prompt in requests]
    seconds = time.perf_counter() - began
    deadline = time.perf_counter() + 10
    while True:  # a request may be answered a moment before it is counted
        count, decode = _decode_time(server)
        if count - count_before >= len(requests):
            break
        if time.perf_counter() > deadline:
            raise RuntimeError(
                f"{count - count_before} of {len(requests)} requests were counted"
            )
        time.sleep(0.05)
    if count - count_before != len(requests):
        raise RuntimeError(f"{server.url} served somebody else, too")
    return Turn(answers, decode - decode_before, seconds)


def _decode_time(server: Server) -> tuple[float, float]:
    metrics = server.metrics()
    name = "vllm:request_decode_time_seconds"
    return metrics.get(f"{name}_count", 0.0), metrics.get(f"{name}_sum", 0.0)
