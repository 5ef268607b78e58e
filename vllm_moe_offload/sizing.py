"""From bytes to rows: how large the pool is, and how it splits into slots and staging."""

from __future__ import annotations

from vllm_moe_offload.cache import CacheShape
from vllm_moe_offload.config import GIB, OptionError, parse_cache_size
from vllm_moe_offload.policy.base import SCOPE_PER_LAYER, PlannerRules

OVERLAPPED_LAYER_BYTES = 1 << 30
"""While a store is built, a larger layer is not packed before the last one is written: building
must not take more memory than serving."""


def cache_rows(
    cache_gb: float | str,
    *,
    expert_bytes: int,
    num_layers: int,
    num_experts: int,
    top_k: int,
    auto_bytes: int,
) -> int:
    """Rows of the pool that ``cache_gb`` pays for, at most one per expert.

    Args:
        cache_gb: the option.
        expert_bytes: bytes of one expert in fast memory.
        num_layers, num_experts: of the model; ``num_layers * num_experts`` experts.
        top_k: experts per token; fewer rows than that cannot serve one token.
        auto_bytes: what "auto" stands for here.

    Raises:
        OptionError: fewer rows than one token needs; says the minimum.
    """
    total = num_layers * num_experts
    kind, amount = parse_cache_size(cache_gb)
    if kind == "share":
        rows = int(amount * total + 1e-9)
    else:
        rows = int((auto_bytes if kind == "auto" else amount) // expert_bytes)
    if rows < top_k:
        minimum_gb = top_k * expert_bytes / GIB
        raise OptionError(
            f"moe-offload: cache_gb={cache_gb!r} holds {max(rows, 0)} of {total} experts of "
            f"{expert_bytes} bytes, but one token needs {top_k}. Minimum: "
            f"{minimum_gb:.3f} GiB; {num_experts * expert_bytes / GIB:.3f} GiB hold one layer "
            "(recommended at least: exact output)."
        )
    return min(rows, total)


def cache_shape(
    rows: int, *, num_layers: int, num_experts: int, top_k: int, rules: PlannerRules
) -> CacheShape:
    """Splits ``rows`` into cache slots and staging slots.

    Staging holds experts that are used once and not admitted. What doesn't fit there
    evicts the least valuable residents, so a few rows are enough: one token's worth. A
    policy that inserts every miss needs none. With equal shares per layer, staging is
    what a layer has beside its own share: with rows for one layer it must make every
    layer fit, or sums would have to be split.
    """
    total = num_layers * num_experts
    if rows >= total:
        return CacheShape(num_layers, num_experts, total)
    if rules.scope == SCOPE_PER_LAYER:
        share = 0
        if rows >= num_experts and num_layers > 1:
            share = min((rows - num_experts) // (num_layers - 1), rows // num_layers)
        slots = share * num_layers
        return CacheShape(num_layers, num_experts, slots, min(rows - slots, num_experts))
    staging = min(top_k, rows // 4) if rules.admission else 0
    return CacheShape(num_layers, num_experts, rows - staging, staging)


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
