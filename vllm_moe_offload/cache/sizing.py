"""From bytes to slots: how large the pool is, and how it splits into slots and staging."""

from __future__ import annotations

from vllm_moe_offload.cache.host_memory import Headroom
from vllm_moe_offload.cache.planner import SCOPE_PER_LAYER, CacheShape, PlannerRules
from vllm_moe_offload.config import GIB, OptionError, parse_cache_size

OVERLAPPED_LAYER_BYTES = 1 << 30
"""While a store is built, a larger layer is not packed before the last one is written: building
must not take more memory than serving."""


def cache_slots(
    cache_gb: float | str,
    *,
    expert_bytes: int,
    num_layers: int,
    num_experts: int,
    top_k: int,
    auto_bytes: int,
) -> int:
    """Slots of the pool that ``cache_gb`` pays for, at most one per expert.

    Args:
        cache_gb: the option.
        expert_bytes: bytes of one expert in fast memory.
        num_layers, num_experts: that this rank has; ``num_layers * num_experts`` experts.
        top_k: experts per token; fewer slots than a rank can be asked for of one layer cannot
            serve one token.
        auto_bytes: what "auto" stands for here.

    Raises:
        OptionError: fewer slots than one token needs; says the minimum.
    """
    total = num_layers * num_experts
    needed = min(top_k, num_experts)  # expert-parallel ranks may have fewer than a token uses
    kind, amount = parse_cache_size(cache_gb)
    if kind == "share":
        slots = int(amount * total + 1e-9)
    else:
        slots = int((auto_bytes if kind == "auto" else amount) // expert_bytes)
    if slots < needed:
        minimum_gb = needed * expert_bytes / GIB
        raise OptionError(
            f"moe-offload: cache_gb={cache_gb!r} holds {max(slots, 0)} of {total} experts of "
            f"{expert_bytes} bytes, but one token needs {needed}. Minimum: "
            f"{minimum_gb:.3f} GiB; {num_experts * expert_bytes / GIB:.3f} GiB hold one layer "
            "(recommended at least: exact output)."
        )
    return min(slots, total)


def cache_shape(
    num_pool_slots: int, *, num_layers: int, num_experts: int, top_k: int, rules: PlannerRules
) -> CacheShape:
    """Splits ``num_pool_slots`` into cache slots and staging slots.

    Staging holds experts that are used once and not admitted. What doesn't fit there
    evicts the least valuable residents, so a few are enough: one token's worth. A
    policy that inserts every miss needs none. With equal shares per layer, staging is
    what a layer has beside its own share: with slots for one layer it must make every
    layer fit, or sums would have to be split.
    """
    total = num_layers * num_experts
    if num_pool_slots >= total:
        return CacheShape(num_layers, num_experts, total)
    if rules.scope == SCOPE_PER_LAYER:
        share = 0
        if num_pool_slots >= num_experts and num_layers > 1:
            share = min(
                (num_pool_slots - num_experts) // (num_layers - 1), num_pool_slots // num_layers
            )
        slots = share * num_layers
        return CacheShape(
            num_layers, num_experts, slots, min(num_pool_slots - slots, num_experts)
        )
    needed = min(top_k, num_experts)
    staging = min(needed, num_pool_slots // 4) if rules.admission else 0
    return CacheShape(num_layers, num_experts, num_pool_slots - staging, staging)


def auto_cache_bytes(
    all_experts_bytes: int, available_bytes: int, kv_cache_bytes: int | None
) -> int:
    """What ``cache_gb="auto"`` stands for.

    Args:
        all_experts_bytes: of the model.
        available_bytes: memory that is left for experts and KV cache together.
        kv_cache_bytes: the KV cache's size if the user fixed it.

    Everything, if it fits beside the KV cache (one that was not fixed gets a quarter of
    what is available); otherwise all that the KV cache leaves.
    """
    kv_share = available_bytes // 4 if kv_cache_bytes is None else kv_cache_bytes
    return max(0, min(all_experts_bytes, available_bytes - kv_share))


def build_peak_bytes(layer_bytes: int) -> int:
    """Memory for experts while a store is built: a layer as loaded, packed, and being written.

    Args:
        layer_bytes: of one layer's experts.
    """
    return (2 if layer_bytes > OVERLAPPED_LAYER_BYTES else 3) * layer_bytes


def device_available_bytes(
    *,
    total_bytes: int,
    free_bytes: int,
    allocated_bytes: int,
    utilization: float,
    reserve_bytes: int,
) -> int:
    """What pool and KV cache may take of a GPU together.

    Args:
        total_bytes, free_bytes: of the device, as the driver says.
        allocated_bytes: what this process holds: the dense weights.
        utilization: vLLM's ``gpu_memory_utilization``.
        reserve_bytes: see :func:`device_reserve_bytes`.
    """
    granted = int(total_bytes * utilization) - allocated_bytes
    return max(0, min(granted, free_bytes) - reserve_bytes)


def device_reserve_bytes(
    *,
    max_tokens: int,
    max_requests: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    vocab_size: int,
    element_bytes: int,
) -> int:
    """Device memory that activations and CUDA graphs will take, before vLLM measured it.

    The pool must be there when vLLM profiles, or its bytes would be given to the KV cache a
    second time; so this is an estimate, for ``cache_gb="auto"`` alone, and on the safe side.
    It has the two workspaces of the Triton experts, a few copies of the hidden states, logits
    in float32 twice, and 1 GiB for graphs and libraries.

    Args:
        max_tokens: of a step (``max_num_batched_tokens``).
        max_requests: of a step (``max_num_seqs``).
        top_k, hidden_size, intermediate_size, vocab_size: of the model, on this rank.
        element_bytes: of an activation.
    """
    widest = max(intermediate_size, hidden_size) + max(2 * intermediate_size, hidden_size)
    workspaces = max_tokens * top_k * widest * element_bytes
    hidden = 8 * max_tokens * hidden_size * element_bytes
    logits = 2 * 4 * max_requests * vocab_size
    return GIB + workspaces + hidden + logits


MIN_HOST_SLOTS = 2
"""Of the host tier: one that a prefetch may hold, and one that it may not."""


def host_slots(
    host_gb: float | str,
    *,
    record_bytes: int,
    num_layers: int,
    num_experts: int,
    auto_bytes: int,
) -> int:
    """Experts that ``host_gb`` has room for in host memory, at most all.

    Args:
        host_gb: the option.
        record_bytes: of one expert there.
        num_layers, num_experts: of the model.
        auto_bytes: what the system can spare.

    Raises:
        OptionError: room for fewer than :data:`MIN_HOST_SLOTS`; says the minimum.
    """
    total = num_layers * num_experts
    kind, amount = parse_cache_size(host_gb)
    if kind == "share":
        slots = int(amount * total + 1e-9)
    else:
        slots = int((auto_bytes if kind == "auto" else amount) // record_bytes)
    if slots < MIN_HOST_SLOTS:
        raise OptionError(
            f"moe-offload: host_gb={host_gb!r} holds {max(slots, 0)} of {total} experts of "
            f"{record_bytes} bytes in host memory. Minimum: "
            f"{MIN_HOST_SLOTS * record_bytes / GIB:.3f} GiB; {total * record_bytes / GIB:.3f} GiB "
            "hold all (recommended: nothing is read from disk then)."
        )
    return min(slots, total)


def auto_host_bytes(headroom: Headroom, num_ranks: int) -> int:
    """What ``host_gb="auto"`` has for one rank: what can be spared, divided by the ranks.

    Args:
        headroom: of the host's memory.
        num_ranks: of this server on this host; they share it.
    """
    return max(0, headroom.spare_bytes) // num_ranks
