"""What the GPU benchmark runs: models, parts, workloads, and the contestants' options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scripts.demo_model import Shape, expert_bytes

GIB = 1 << 30
BACKENDS = ("eager", "inductor")
"""Of vLLM's compilation: Dynamo alone, or Inductor behind it."""
LONG_PROMPT_TOKENS = 32768
PLUGIN = ("trace", "lru")
VLLM_OFFLOADERS = ("cpu-offload-gb", "vllm-prefetch")
CONTESTANTS = ("resident", "trace", "cpu-offload-gb", "lru", "vllm-prefetch")
"""In order of importance: the time limit of a part takes the last ones first."""
ALL_BUT_ONE = "all-but-one"
"""A share: one expert has no slot, so everything of offloading runs, and nearly nothing is copied."""
RESIDENT_AUTO = "resident-auto"
"""Plain vLLM with the kernels that it chooses itself, where everything fits."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that are sent at once, and how often.

    Attributes:
        name: ``decode-<batch>``, ``decode-<batch>-any-topic`` or ``prefill-<tokens>``.
        batch: requests at once.
        prompt_tokens: of each of them.
        new_tokens: generated for each of them.
        repeats: times that count; those before them that warm up do not.
        any_topic: whether every word is chosen from all topics, as if at random. What a request
            needs then changes at every step; left to itself it keeps to a topic.
    """

    name: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    any_topic: bool = False

    @property
    def is_decode(self) -> bool:
        """Whether the time between tokens counts, rather than that until the first one."""
        return self.name.startswith("decode")


@dataclass(frozen=True, slots=True)
class Model:
    """A generated model; ``of_layers`` is what the released one has."""

    name: str
    arch: str
    shape: Shape
    of_layers: int

    @property
    def expert_bytes(self) -> int:
        """Of all experts."""
        return expert_bytes(self.arch, self.shape)

    @property
    def record_bytes(self) -> int:
        """Of one expert."""
        return self.expert_bytes // (self.shape.layers * self.shape.experts)

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {
            **asdict(self),
            "expert_bytes": self.expert_bytes,
            "record_bytes": self.record_bytes,
            "dtype": "bfloat16",
        }


MODELS = (
    Model("qwen3-30b-a3b", "qwen3_moe", Shape(16, 128, 8, 2048, 768), 48),
    Model("mixtral-8x7b", "mixtral", Shape(8, 8, 2, 4096, 14336), 32),
)
TINY_MODELS = (
    Model("tiny-qwen3", "qwen3_moe", Shape(8, 32, 4, 256, 128), 8),
    Model("tiny-mixtral", "mixtral", Shape(8, 8, 2, 256, 256), 8),
)
PART_SHARES = (25.0, 100.0, 12.5, 50.0)
"""Per cent, in order of importance."""
SWEEP_SHARES = ("25", ALL_BUT_ONE, "50", "12.5")
"""Of the parts that ask what misses cost, in order of importance."""


@dataclass(frozen=True, slots=True)
class Part:
    """What runs together and is compared.

    Attributes:
        share: per cent of the experts on the device.
        is_sweep: one of the parts that ask what misses cost.
        share_name: of the share, where it is no round number.
    """

    model: Model
    share: float
    is_sweep: bool = False
    share_name: str = ""

    @property
    def name(self) -> str:
        """``<model>-<per cent>``, of a sweep ``<model>-<per cent>-misses``."""
        share = self.share_name or f"{self.share:g}"
        return f"{self.model.name}-{share}{'-misses' if self.is_sweep else ''}"

    @property
    def contestants(self) -> tuple[str, ...]:
        """With everything on the device there is nothing to offload."""
        if self.is_sweep:
            return ("resident", "trace")
        return ("resident", "trace", RESIDENT_AUTO) if self.share == 100 else CONTESTANTS


def parts_of(models: Sequence[Model]) -> list[Part]:
    """All parts, by model, the most important ones first.

    By model, because a disk may not hold two of them with their stores.
    """
    return [Part(model, share) for model in models for share in PART_SHARES]


def sweep_of(models: Sequence[Model]) -> list[Part]:
    """Parts that ask what misses cost, by model, the most important ones first."""
    parts = []
    for model in models:
        total = model.shape.layers * model.shape.experts
        for name in SWEEP_SHARES:
            share = 100 * (total - 1) / total if name == ALL_BUT_ONE else float(name)
            parts.append(Part(model, share, is_sweep=True, share_name=name))
    return parts


def select_parts(names: Sequence[str] | None, parts: Sequence[Part]) -> list[Part]:
    """Parts by name, all if none is named.

    Raises:
        ValueError: a name that is no part; says which there are.
    """
    if not names:
        return list(parts)
    by_name = {part.name: part for part in parts}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ValueError(f"no such part: {', '.join(unknown)}; parts are {', '.join(by_name)}")
    return [by_name[name] for name in dict.fromkeys(names)]


# ---- what contestants are given --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sizes:
    """What all contestants of a run have in common.

    Attributes:
        workloads: in order of importance.
        kv_cache_bytes: of every contestant.
        chunk_tokens: most tokens of a forward pass; longer prompts are cut into chunks.
    """

    workloads: tuple[Workload, ...]
    kv_cache_bytes: int
    chunk_tokens: int

    @property
    def max_batch(self) -> int:
        """Most requests at once."""
        return max(workload.batch for workload in self.workloads)

    @property
    def max_tokens(self) -> int:
        """Longest request."""
        return max(workload.prompt_tokens + workload.new_tokens for workload in self.workloads)


FULL = Sizes(
    (
        Workload("decode-1", 1, 64, 65, 5),
        Workload(f"prefill-{LONG_PROMPT_TOKENS}", 1, LONG_PROMPT_TOKENS, 2, 3),
        Workload("decode-8", 8, 64, 33, 3),
        Workload("decode-32", 32, 64, 17, 3),
        Workload("prefill-4096", 1, 4096, 2, 3),
        Workload("decode-1-any-topic", 1, 64, 65, 3, any_topic=True),
        Workload("decode-8-any-topic", 8, 64, 33, 3, any_topic=True),
    ),
    kv_cache_bytes=4 * GIB,
    chunk_tokens=8192,
)
QUICK = Sizes(
    (
        Workload("decode-1", 1, 32, 9, 2),
        Workload("prefill-512", 1, 512, 2, 1),
        Workload("decode-4", 4, 32, 9, 1),
        Workload("decode-1-any-topic", 1, 32, 9, 1, any_topic=True),
    ),
    kv_cache_bytes=GIB // 4,
    chunk_tokens=256,
)


def with_workloads(sizes: Sizes, names: Sequence[str] | None) -> Sizes:
    """``sizes`` with these of its workloads, in the order asked for; all if none is named.

    Raises:
        ValueError: a name that is no workload; says which there are.
    """
    if not names:
        return sizes
    by_name = {workload.name: workload for workload in sizes.workloads}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ValueError(
            f"no such workload: {', '.join(unknown)}; workloads are {', '.join(by_name)}"
        )
    return replace(sizes, workloads=tuple(by_name[name] for name in dict.fromkeys(names)))


@dataclass(frozen=True, slots=True)
class EngineChoices:
    """What the user chose for the engines of all contestants alike.

    Attributes:
        device: ``cuda`` or ``cpu``.
        attention_backend: None: vLLM's choice.
        backend: of the compilation, one of :data:`BACKENDS`; None: vLLM's choice.
        enforce_eager: neither compilation nor graphs. Without a device that is the default.
        host_gb: of the plugin, as its option takes it; None: its default.
    """

    device: str = "cuda"
    attention_backend: str | None = None
    backend: str | None = None
    enforce_eager: bool = False
    host_gb: str | None = None

    def compilation(self, sizes: Sizes) -> dict[str, Any]:
        """Arguments of vLLM's ``LLM`` about compilation and graphs."""
        if self.enforce_eager or (self.device == "cpu" and self.backend is None):
            return {"enforce_eager": True}
        config: dict[str, Any] = {} if self.backend is None else {"backend": self.backend}
        if self.device == "cpu":
            # Of the mode that is the default, vLLM's CPU platform replaces the backend.
            config["mode"] = "DYNAMO_TRACE_ONCE"
        else:
            batches = sorted({workload.batch for workload in sizes.workloads})
            config["cudagraph_capture_sizes"] = batches
        return {"compilation_config": config}


def prefetch_groups(
    num_layers: int, share: float, prefetch_step: int = 1
) -> tuple[int, int] | None:
    """Group size and offloaded layers per group of vLLM's prefetch offloader.

    It keeps whole layers on the device and copies the others into ``prefetch_step`` buffers
    of a layer each, so that ``share`` of all layers pays for both. Of each group the last
    layers are offloaded. Returned are the numbers that use the memory best, in the smallest
    groups, which spread the copies best; None if not even the buffers fit.

    Args:
        num_layers: with experts.
        share: of the experts' bytes, in (0, 1).
    """
    room = int(share * num_layers + 1e-9) - prefetch_step
    if room < 0:
        return None
    best: tuple[int, int, int] | None = None
    for size in range(1, num_layers + 1):
        for offloaded in range(1, size + 1):
            resident = sum(layer % size < size - offloaded for layer in range(num_layers))
            if resident <= room and (best is None or resident > best[0]):
                best = (resident, size, offloaded)
    assert best is not None  # a group of one that is offloaded keeps nothing
    return best[1], best[2]


def engine_options(
    part: Part,
    contestant: str,
    sizes: Sizes,
    choices: EngineChoices = EngineChoices(),
) -> dict[str, Any] | str:
    """Arguments of vLLM's ``LLM`` (JSON), or why the contestant cannot run."""
    options: dict[str, Any] = {
        "max_model_len": sizes.max_tokens,
        "max_num_seqs": sizes.max_batch,
        "max_num_batched_tokens": sizes.chunk_tokens,
        "kv_cache_memory_bytes": sizes.kv_cache_bytes,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "seed": 0,
        **choices.compilation(sizes),
    }
    if choices.device != "cpu":
        if contestant != RESIDENT_AUTO:
            options["kernel_config"] = {"moe_backend": "triton"}
        if choices.attention_backend is not None:
            options["attention_backend"] = choices.attention_backend
    share = part.share / 100
    if contestant in (RESIDENT_AUTO, *VLLM_OFFLOADERS) and choices.device == "cpu":
        return "not on this platform"
    if contestant == "cpu-offload-gb":
        options["cpu_offload_gb"] = (1 - share) * part.model.expert_bytes / GIB
        options["cpu_offload_params"] = ["experts"]
    elif contestant == "vllm-prefetch":
        groups = prefetch_groups(part.model.shape.layers, share)
        if groups is None:
            return f"not possible: {part.share:g} % of the experts hold less than a layer"
        options["offload_group_size"], options["offload_num_in_group"] = groups
        options["offload_prefetch_step"] = 1
        options["offload_params"] = ["experts"]
    return options


def offload_options(
    part: Part, mode: str, store: Path, trace: Path, host_gb: str | None = None
) -> dict[str, Any]:
    """The plugin's options: ``share`` of the experts on the device, the rest in host memory.

    ``host_gb``: as the option takes it; None: its default.
    """
    options = {
        "mode": mode,
        "cache_gb": f"{part.share:.12g}%",
        "store_dir": str(store),
        "trace_path": str(trace),
    }
    return options if host_gb is None else options | {"host_gb": host_gb}


def with_layers(model: Model, layers: int | None) -> Model:
    """The model with another number of layers, if one is given."""
    if layers is None:
        return model
    return replace(model, shape=replace(model.shape, layers=layers))
