"""Will it fit? What a machine's memory holds of a model, and how fast its link lets it be.

Slots, staging and minimum come from the functions that the server uses (``cache/sizing.py``), so a
plan says what a start with its options makes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from vllm_moe_offload.cache.layout import ExpertLayout
from vllm_moe_offload.cache.planner import CacheShape
from vllm_moe_offload.cache.sizing import (
    auto_cache_bytes,
    build_peak_bytes,
    cache_shape,
    cache_slots,
)
from vllm_moe_offload.config import GIB
from vllm_moe_offload.device.rule import MAX_SLOTS
from vllm_moe_offload.plan.machine import (
    CPU_RUNTIME_BYTES,
    HOST_RUNTIME_BYTES,
    Machine,
)
from vllm_moe_offload.plan.problems import (
    Problem,
    amount,
    memory_problems,
    model_problems,
    platform_problems,
    round_up_memory,
)
from vllm_moe_offload.plan.shapes.base import ModelShape
from vllm_moe_offload.plan.shapes.kernel_form import (
    BF16,
    ExpertFormat,
    Kind,
    Platform,
    kernel_form,
    refusals,
)
from vllm_moe_offload.plan.split import Split
from vllm_moe_offload.plan.ways import Way, gpu_way, state_bytes
from vllm_moe_offload.policy import TracePolicy

__all__ = ["Bound", "Fit", "amount", "fit", "with_shared_options"]

KV_BLOCK_TOKENS = 128
"""vLLM's block on CPU; smaller on CUDA."""
BATCH_TOKENS = 8192
"""Tokens in flight at most; what sliding-window layers hold beside their window."""
LEAST_KV_TOKENS = 2048
"""A KV cache for fewer tokens is not worth starting for."""
MOST_KV_REQUESTS = 32
"""Of full length; memory beyond that is left alone."""

ONE_RANK = Split()

HIT_RATES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
RUN_MODEL_TYPES = frozenset({"mixtral", "qwen3_moe", "deepseek_v2", "olmoe", "gpt_oss"})
"""Architectures with which the plugin has been run."""
RUN_FORMATS: dict[Platform, frozenset[Kind]] = {
    "cpu": frozenset({"bf16", "fp8", "int8", "int4", "mxfp4"}),
    "cuda": frozenset({"bf16"}),
}
"""Kinds of experts with which it has been run on each platform."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What the link allows at a hit rate, one request at a time.

    Attributes:
        hit_rate: share of the experts used that lie in fast memory.
        misses_per_token: experts that have to be read.
        read_bytes_per_token: their bytes.
        tokens_per_s: upper bound; None if nothing is read and computing is left out.
    """

    hit_rate: float
    misses_per_token: float
    read_bytes_per_token: float
    tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class Fit:
    """A model on a machine.

    Attributes:
        shape, machine: of what.
        split: how ranks share the model, of which this is one.
        format: of the experts planned for: the model's; bf16 where that is not served there.
        layout: one of them, as its slot and its record hold it.
        kv_bytes: KV cache.
        kv_tokens: tokens of one request that it holds.
        cache_gb: the option that makes the cache.
        cache: slots and staging slots; None where there is a problem.
        way: with a GPU, who decides what lies there; None without one, or where there is a problem.
        why_host: why the host does; empty if it does not.
        build_bytes: memory that the first start takes while it builds the store.
        least_fast_bytes: fast memory with which it starts at all.
        exact_fast_bytes: fast memory with which a whole layer's experts fit: exact output.
        problems: why it cannot work; empty if it can.
    """

    shape: ModelShape
    machine: Machine
    split: Split
    format: ExpertFormat
    layout: ExpertLayout
    kv_bytes: int
    kv_tokens: int
    cache_gb: str
    cache: CacheShape | None
    way: Way | None
    why_host: str
    build_bytes: int
    least_fast_bytes: int
    exact_fast_bytes: int
    problems: tuple[Problem, ...]

    @property
    def expert_bytes(self) -> int:
        """Of one expert in a slot."""
        return self.layout.expert_bytes

    @property
    def store_bytes(self) -> int:
        """Records of all experts: on disk, and in host memory below a GPU that does not hold all."""
        return self.shape.total_experts * self.layout.record_bytes

    @property
    def host_expert_bytes(self) -> int:
        """With a GPU, experts that host memory holds: none of them if the GPU holds all."""
        if self.way is Way.RESIDENT:
            return 0
        return min(self.store_bytes, self.machine.host_expert_bytes)

    @property
    def cache_bytes(self) -> int:
        """Of all slots, staging included."""
        return 0 if self.cache is None else self.cache.num_pool_slots * self.expert_bytes

    @property
    def planning_bytes(self) -> int:
        """On a GPU that plans by itself, what that takes beside the slots."""
        if self.way is not Way.DEVICE or self.cache is None:
            return 0
        return _planning_bytes(self.shape, self.cache.num_slots)

    @property
    def cached_share(self) -> float:
        """Of all experts, those with a slot that is not for staging."""
        return 0.0 if self.cache is None else self.cache.num_slots / self.shape.total_experts

    @property
    def has_run(self) -> bool:
        """Whether such experts were ever served on such a machine."""
        return self.format.kind in RUN_FORMATS[self.machine.platform]

    @property
    def is_exact(self) -> bool:
        """Whether a whole layer's experts fit at once, so that no sum is split."""
        return self.cache is not None and self.cache.num_pool_slots >= self.shape.num_experts

    @property
    def host_share(self) -> float:
        """With a GPU, the share of all experts that host memory holds."""
        return self.host_expert_bytes / self.store_bytes

    def bound(self, hit_rate: float) -> Bound:
        """What the link allows: a token takes its misses' bytes / bandwidth at least.

        With a GPU, misses that host memory does not hold come over the disk as well, in
        proportion. ``memory_gbps`` adds the time to read each weight used once.
        """
        shape, machine = self.shape, self.machine
        used = len(shape.moe_layers) * shape.top_k
        misses = (1 - hit_rate) * used
        read_bytes = misses * self.layout.record_bytes  # a slot takes up to 4 KiB less
        seconds = read_bytes / (machine.link_gbps * 1e9)
        if machine.has_gpu:
            seconds += read_bytes * (1 - self.host_share) / (machine.disk_gbps * 1e9)
        if machine.memory_gbps is not None:
            active = shape.dense_bytes - shape.lookup_bytes + used * self.expert_bytes
            seconds += active / (machine.memory_gbps * 1e9)
        return Bound(hit_rate, misses, read_bytes, 1 / seconds if seconds else None)

    def serve_options(self) -> list[str]:
        """Options of ``vllm serve`` that make this plan."""
        options = [
            "--moe-offload=trace",
            "--moe-offload-config.cache_gb",
            self.cache_gb,
        ]
        if not self.machine.has_gpu:
            options += ["--kv-cache-memory-bytes", str(self.kv_bytes)]
        if self.kv_tokens < self.shape.max_tokens:
            # vLLM knows best what layers of several kinds take, and what a GPU has left.
            kv = self.shape.kv
            is_plain = not (kv.window_per_token or kv.state_per_request)
            fits = self.kv_tokens // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS
            is_known = is_plain and not self.machine.has_gpu
            options += ["--max-model-len", str(fits) if is_known else "auto"]
        return options


def with_shared_options(result: Fit, cache_gb: str, kv_tokens: int) -> Fit:
    """A fit that works, with options that are the same for all ranks of a server.

    Args:
        result: of one rank.
        cache_gb: no more than its own, unless that is 100%.
        kv_tokens: no more than its own.
    """
    shape = result.shape
    cached = _cached(shape, result.layout, result.machine, result.split, cache_gb)
    return replace(
        result,
        cache_gb=cache_gb,
        cache=cached.cache,
        way=cached.way,
        why_host=cached.why_host,
        kv_bytes=_kv_bytes(shape, kv_tokens),
        kv_tokens=kv_tokens,
    )


def fit(
    shape: ModelShape,
    machine: Machine,
    kv_tokens: int | None = None,
    split: Split = ONE_RANK,
) -> Fit:
    """How a model fits on a machine.

    Args:
        shape: the model, or what a rank has of it.
        machine: the machine.
        kv_tokens: tokens that the KV cache must hold; by default it gets a quarter of what
            experts and KV cache share, and all that the experts leave.
        split: how ranks share the model.
    """
    known = _format_served(shape, machine)
    layout = kernel_form(known, machine.platform, shape.expert)
    planning_bytes = 0
    if machine.has_gpu and _way(shape, layout, machine, split, shape.top_k)[0] is Way.DEVICE:
        planning_bytes = _planning_bytes(shape, min(shape.total_experts, MAX_SLOTS))
    runtime_bytes = machine.runtime_bytes + planning_bytes
    available = machine.fast_bytes - shape.dense_bytes - runtime_bytes
    layer_bytes = shape.num_experts * layout.expert_bytes
    all_bytes = shape.total_experts * layout.expert_bytes
    least_kv_tokens = kv_tokens or min(LEAST_KV_TOKENS, shape.max_tokens)
    least_kv_bytes = _kv_bytes(shape, least_kv_tokens)
    kv_bytes = least_kv_bytes
    if kv_tokens is None:
        # As auto does, but not at the expense of a whole layer.
        quarter = min(available // 4, available - layer_bytes, _most_kv_bytes(shape))
        kv_bytes = max(least_kv_bytes, quarter)
    room = auto_cache_bytes(all_bytes, available, kv_bytes)
    fixed = shape.dense_bytes + runtime_bytes + least_kv_bytes
    least = fixed + shape.top_k * layout.expert_bytes
    exact = fixed + layer_bytes
    build = build_peak_bytes(layer_bytes)
    build += HOST_RUNTIME_BYTES if machine.has_gpu else shape.dense_bytes + CPU_RUNTIME_BYTES
    problems = [*model_problems(shape), *platform_problems(shape, machine)]
    if not problems:
        problems += memory_problems(machine, least, exact, build)
    cached: Cached | None = None
    cache_gb = ""
    if not problems:
        cache_gb = _cache_gb(shape, layout.expert_bytes, room, all_bytes)
        cached = _cached(shape, layout, machine, split, cache_gb)
        used = cached.cache.num_pool_slots * layout.expert_bytes
        if kv_tokens is None:
            spare = min(available - used, _most_kv_bytes(shape))
            kv_bytes = max(least_kv_bytes, spare - spare % (1 << 20))
    return Fit(
        shape=shape,
        machine=machine,
        split=split,
        format=known,
        layout=layout,
        kv_bytes=kv_bytes,
        kv_tokens=_kv_tokens(shape, kv_bytes),
        cache_gb=cache_gb,
        cache=None if cached is None else cached.cache,
        way=None if cached is None else cached.way,
        why_host="" if cached is None else cached.why_host,
        build_bytes=build,
        least_fast_bytes=round_up_memory(least * machine.fast_ranks),
        exact_fast_bytes=round_up_memory(exact * machine.fast_ranks),
        problems=tuple(problems),
    )


def _format_served(shape: ModelShape, machine: Machine) -> ExpertFormat:
    """The model's format, or bf16 where it is not served."""
    if shape.format is None or any(refusals(shape.format, machine.platform, shape.expert)):
        return BF16
    return shape.format


def _cache_gb(shape: ModelShape, expert_bytes: int, room_bytes: int, all_bytes: int) -> str:
    """The ``cache_gb`` that fills ``room_bytes``."""
    if room_bytes >= all_bytes:
        return "100%"
    slots = max(room_bytes // expert_bytes, shape.top_k)
    # Up, or the last slot would be lost; by less than one expert.
    digits = 3 if expert_bytes > GIB / 10**3 else 6
    gib = math.ceil(slots * expert_bytes / GIB * 10**digits) / 10**digits
    return f"{gib:.{digits}f}"


@dataclass(frozen=True, slots=True)
class Cached:
    """What a server makes of its options: see :class:`Fit`."""

    cache: CacheShape
    way: Way | None
    why_host: str


def _cached(
    shape: ModelShape, layout: ExpertLayout, machine: Machine, split: Split, cache_gb: str
) -> Cached:
    sizes = _sizes(shape)
    slots = cache_slots(cache_gb, expert_bytes=layout.expert_bytes, auto_bytes=0, **sizes)
    staged = cache_shape(slots, rules=TracePolicy.rules, **sizes)
    if not machine.has_gpu:
        return Cached(staged, None, "")
    way, why_host = _way(shape, layout, machine, split, slots)
    if way is Way.DEVICE:
        staged = CacheShape(sizes["num_layers"], sizes["num_experts"], slots)
    return Cached(staged, way, why_host)


def _way(
    shape: ModelShape, layout: ExpertLayout, machine: Machine, split: Split, num_slots: int
) -> tuple[Way, str]:
    kind = _format_served(shape, machine).kind
    return gpu_way(
        holds_everything=num_slots >= shape.total_experts,
        quantization=None if kind == "bf16" else kind,
        expert_parallel=split.expert_ranks > 1,
        pipeline_parallel=split.pipeline_parallel > 1,
        drafter_has_experts=False,
        num_slots=num_slots,
        num_host_slots=machine.host_expert_bytes // layout.record_bytes,
        num_total=shape.total_experts,
    )


def _planning_bytes(shape: ModelShape, num_slots: int) -> int:
    sizes = _sizes(shape)
    return state_bytes(num_slots=num_slots, max_tokens=BATCH_TOKENS, **sizes)


def _sizes(shape: ModelShape) -> dict[str, int]:
    return {
        "num_layers": len(shape.moe_layers),
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
    }


def _kv_bytes(shape: ModelShape, tokens: int) -> int:
    """A KV cache for one request of so many tokens, whole blocks."""
    blocks = -(-tokens // KV_BLOCK_TOKENS) + 1
    per_token = shape.kv.bytes_per_token
    return shape.kv.bytes_per_request(BATCH_TOKENS) + blocks * KV_BLOCK_TOKENS * per_token


def _kv_tokens(shape: ModelShape, kv_bytes: int) -> int:
    if not shape.kv.bytes_per_token:  # a stage whose layers all have a window or a state
        return MOST_KV_REQUESTS * shape.max_tokens
    for_tokens = kv_bytes - shape.kv.bytes_per_request(BATCH_TOKENS)
    return max(0, for_tokens // shape.kv.bytes_per_token - KV_BLOCK_TOKENS)


def _most_kv_bytes(shape: ModelShape) -> int:
    return MOST_KV_REQUESTS * _kv_bytes(shape, shape.max_tokens)
