"""What `vllm-moe-offload` says to wrong arguments and files: a command line for each message."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.synthetic_trace import synthetic_trace
from vllm_moe_offload.plan.shapes import known_models
from vllm_moe_offload.trace.recorder import TraceRecorder

CommandLine = Callable[[Path], list[str]]
"""Makes files in an empty directory; gives the arguments."""

PLAN_MODEL = "Mixtral-8x7B"
MACHINE = "--host-memory=64"


def plan(*options: str) -> CommandLine:
    """A plan for a model of the table."""
    return lambda _: ["plan", PLAN_MODEL, MACHINE, *options]


def planned(
    model: str = PLAN_MODEL, options: Sequence[str] = (), **changes: Any
) -> CommandLine:
    """A plan for a config.json with fields changed, or left out (None)."""

    def command(directory: Path) -> list[str]:
        config = dict(known_models()[model].config) | changes
        path = directory / "config.json"
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return ["plan", str(path), MACHINE, *options]

    return command


def file(text: str) -> CommandLine:
    """A plan for a config.json of any content."""

    def command(directory: Path) -> list[str]:
        (directory / "config.json").write_text(text)
        return ["plan", str(directory / "config.json"), MACHINE]

    return command


def trace(directory: Path, **changes: Any) -> Path:
    """A small routing trace; fields changed, or left out (None)."""
    made = synthetic_trace(layers=3, experts=8, top_k=2, requests=3, tokens=12, seed=1)
    fields = {
        "ids": made.ids,
        "starts": made.starts,
        "lens": made.lens,
        "num_experts": 8,
        "names": made.names,
        **changes,
    }
    path = directory / "trace.npz"
    np.savez(path, **{name: value for name, value in fields.items() if value is not None})
    return path


def replay(*options: str, **changes: Any) -> CommandLine:
    """A replay of that trace."""
    return lambda directory: ["replay", str(trace(directory, **changes)), *options]


def text(directory: Path) -> list[str]:
    """A replay of what is no numpy file."""
    (directory / "x.npz").write_text("hello")
    return ["replay", str(directory / "x.npz")]


def zeros(directory: Path) -> list[str]:
    """A replay of a small file that unpacks to a large one."""
    path = directory / "trace.npz"
    np.savez_compressed(
        path,
        ids=np.zeros((80 << 20, 1, 1), np.uint8),
        starts=np.array([0]),
        lens=np.array([80 << 20]),
        num_experts=1,
    )
    return ["replay", str(path)]


_recorders: list[TraceRecorder] = []


def recording(directory: Path) -> list[str]:
    """The trace that a server of this process records."""
    path = directory / "trace.npz"
    options = {"num_layers": 1, "num_experts": 4, "top_k": 1, "limit_bytes": 1 << 20}
    _recorders.append(TraceRecorder(path, num_slots=2, num_staging_slots=1, **options))
    return ["trace", "finish", str(path)]


def damaged_recording(directory: Path) -> list[str]:
    """What is no recording, though it lies where one would."""
    (directory / "trace.npz.spool").mkdir()
    (directory / "trace.npz.spool" / "server.json").write_text("{}")
    return ["trace", "finish", str(directory / "trace.npz")]


def store(*arguments: str) -> CommandLine:
    """A command on an empty directory of stores."""
    return lambda directory: ["store", *arguments, "--store-dir", str(directory)]


PROGRAM: dict[str, CommandLine] = {
    # The store
    "there is no store ... in ...; there are: ...": store("verify", "mixtral"),
    # `vllm-moe-offload`
    "... is not an .npz routing trace: ...": text,
    "not a routing trace: it lacks ...": replay(lens=None),
    "its arrays take ... bytes of memory, and no routing is packed in ... bytes of that": zeros,
    "... must have shape [...], has ...": replay(starts=np.zeros((1, 3), np.int64)),
    "... must lie in [..., ...)": replay(num_experts=2),
    "there is no recording ... to make a trace of": lambda directory: [
        "trace",
        "finish",
        str(directory / "trace.npz"),
    ],
    "... is being recorded: the server that does so writes ... when it ends": recording,
    "... is damaged; the recording is lost": damaged_recording,
    "the trace carries no schedule: it was not written by record_trace; replay it with "
    "--schedule decode": replay("--schedule=recorded"),
    "concurrency must be at least 1, got ...": replay("--concurrency=0"),
    "requests must lie between 1 and the trace's ..., got ...": replay("--requests=7"),
    "capacity must lie in (0, 1], got ...": replay("--capacity=2"),
    "capacity must be at least 1/..., one expert, with --planner device, got ...": replay(
        "--planner=device", "--capacity=0.01"
    ),
    "policy must be lrfu or lrfu:half_life=STEPS with --planner device, got ...": replay(
        "--planner=device", "--policy=lru"
    ),
    "unknown policy ...; choose from ...": replay("--policy=fifo"),
    "policy ...: ... is not of the form key=number": replay("--policy=lrfu:half_life"),
    "policy ... takes no such parameter: ...": replay("--policy=lrfu:half=3"),
    "... is empty; give one or more values separated by commas": replay("--policy=,"),
    "...=...: must be ...": replay("--capacity=half"),
    "MODEL=...: neither a directory, nor a config.json, nor one of ...": lambda _: [
        "plan",
        "nothing",
        MACHINE,
    ],
    "--disk-gbps goes with --device-memory; on a CPU server the disk is the link: use "
    "--link-gbps": plan("--disk-gbps=7"),
    "...=...: must be 1 or more": plan("--nodes=0"),
    "--nodes=...: must divide the ... ranks of --tensor-parallel-size=... x "
    "--pipeline-parallel-size=...": plan("--nodes=2"),
    "--tensor-parallel-size=...: must divide the model's ... attention heads": plan("-tp=3"),
    "--tensor-parallel-size=...: must divide the model's ... key-value heads, or be a multiple of "
    "them": planned(num_attention_heads=12, num_key_value_heads=6, options=["-tp=4"]),
    "--tensor-parallel-size=...: must divide the expert width ..., or take whole experts with "
    "--expert-parallel": planned(intermediate_size=1001, options=["-tp=2"]),
    "--tensor-parallel-size=... with --expert-parallel: must be at most the ... experts of a "
    "layer": plan("-tp=16", "--expert-parallel"),
    "--expert-parallel goes with --tensor-parallel-size of 2 or more, whose ranks share the "
    "experts of a layer": plan("--expert-parallel"),
    "--pipeline-parallel-size=...: must be at most the model's ... layers": plan("-pp=33"),
    "--pipeline-parallel-size=...: stage ... would have layers ... to ..., none with routed "
    "experts, which is not planned for": planned("DeepSeek-V3", options=["-pp=30"]),
    "...=...: must be a size such as 24GiB, 24GB or 24 (a number alone is GiB)": plan(
        "--device-memory=lots"
    ),
    "...=...: must be a number of GB/s above 0, such as 25": plan("--link-gbps=0"),
    "... is not JSON: ...": file("{"),
    "... has ... bytes, ... at most are read": file(" " * (65 << 20)),
    "... is not a config.json: it holds no JSON object": file("[]"),
    "... is no checkpoint: it has no config.json": lambda directory: [
        "plan",
        str(directory),
        MACHINE,
    ],
    "...: model_type=... is not known; known are ...": planned(model_type="other"),
    "...: no layer has routed experts; there is nothing to offload": planned(
        "Qwen3-30B-A3B", mlp_only_layers=list(range(48))
    ),
    "...: ... experts per token, but a layer has ...": planned(num_experts_per_tok=9),
    "...: quantization_config=..., must be an object": planned(quantization_config="fp8"),
    "...: ...=..., must be an object": planned("Qwen3.5-35B-A3B", vision_config="none"),
    "...: ... is missing": planned(hidden_size=None),
    "...: ...=..., must be true or false": planned(tie_word_embeddings="yes"),
    "...: ...=..., must be a list of integers": planned(
        "Qwen3-30B-A3B", mlp_only_layers="none"
    ),
    "...: ...=..., must be an integer from ... to ...": planned(hidden_size=0),
    "...: layer_types must be a list of num_hidden_layers=... kinds": planned(
        "gpt-oss-20b", layer_types=["full_attention"]
    ),
}
"""By message, as the page has it. All end with status 2."""
