"""llama.cpp in a cgroup, asked in turns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scripts.harness.cgroup import MemoryCgroup
from scripts.harness.engine import EngineProcess
from scripts.harness.page_cache import forget, read_ahead
from scripts.llamacpp.install import LlamaCpp
from scripts.llamacpp.limits import Setting

CONTESTANT = Path(__file__).with_name("contestant.py")
CONTEXT_TOKENS = 1024
"""As servers of the harness have."""


@contextmanager
def running(
    cgroup: MemoryCgroup, llamacpp: LlamaCpp, gguf: Path, setting: Setting, log: Path
) -> Iterator[EngineProcess]:
    """llama.cpp in a cgroup with a file mapped, ready for turns; the cgroup ends it after an error.

    Raises:
        RuntimeError: it ended, such as killed for want of memory; ``log`` says more.
    """
    forget(gguf)
    arguments = {"gguf": str(gguf), "context": CONTEXT_TOKENS} | asdict(setting)
    with read_ahead(gguf, setting.read_ahead_kib):  # it opens the file before it is ready
        process = EngineProcess(
            "llama.cpp",
            CONTESTANT,
            arguments,
            log=log,
            environment={},
            python=llamacpp.python,
            prefix=cgroup.prefix,
        )
    yield process
    process.close()  # not after an error: in the middle of a turn it hears nothing for minutes


def take_turn(
    process: EngineProcess, prompts: Sequence[Sequence[int]], tokens: int, temperature: float
) -> dict[str, Any]:
    """Prompts, as token ids, one after the other; figures of the turn, see :func:`turn_of`."""
    turn = {"prompts": prompts, "tokens": tokens, "temperature": temperature}
    return turn_of(process.ask(json.dumps(turn)))


def turn_of(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of a turn from llama.cpp's answers, one per request."""
    decoded = sum(len(answer["token_s"]) - 1 for answer in answers)
    decode_s = sum(answer["token_s"][-1] - answer["token_s"][0] for answer in answers)
    return {
        "decode_tokens_per_s": decoded / decode_s,
        "decode_s": decode_s,
        "request_s": [answer["token_s"][-1] for answer in answers],
        "tokens": sum(len(answer["token_s"]) for answer in answers),
        "engine_tokens_per_s": sum(answer["engine_decoded"] for answer in answers)
        / sum(answer["engine_decode_s"] for answer in answers),
        "read_bytes": sum(answer["read_bytes"] for answer in answers),
        "major_faults": sum(answer["major_faults"] for answer in answers),
        "texts": [answer["text"] for answer in answers],
    }
