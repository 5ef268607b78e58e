"""Who decides which experts lie on a GPU: nobody, the GPU itself, or the host."""

from __future__ import annotations

from enum import StrEnum

from vllm_moe_offload.device.rule import MAX_SLOTS


class Way(StrEnum):
    """One of three ways in which a worker on a GPU serves its experts; each in a few words."""

    RESIDENT = "all experts are on the GPU, as in vLLM"
    DEVICE = "the GPU plans"
    HOST = "the host plans"


def gpu_way(
    *,
    holds_everything: bool,
    quantization: str | None,
    expert_parallel: bool,
    pipeline_parallel: bool,
    drafter_has_experts: bool,
    tops_differ: bool = False,
    num_slots: int,
    num_host_slots: int,
    num_total: int,
) -> tuple[Way, str]:
    """The way of a worker on a GPU, and why the host has to plan, in a few words; else "".

    Args:
        holds_everything: whether there is a slot on the GPU for every expert.
        quantization: vLLM's name of it, None for bf16 and fp16.
        expert_parallel: whether workers divide the experts of a layer.
        pipeline_parallel: whether they divide the layers.
        drafter_has_experts: whether a drafter has experts in the same cache.
        tops_differ: whether tokens choose more experts in some layers than in others.
        num_slots: experts that fit on the GPU.
        num_host_slots: experts that fit into host memory.
        num_total: experts of the worker.
    """
    if holds_everything:
        return Way.RESIDENT, ""
    reasons = {
        f"experts are quantised ({quantization})": quantization is not None,
        "workers divide the experts of a layer": expert_parallel,
        "workers divide the layers": pipeline_parallel,
        "the drafter has experts of its own": drafter_has_experts,
        "layers differ in experts per token": tops_differ,
        f"host memory holds {num_host_slots} of {num_total} experts": num_host_slots
        < num_total,
        f"{num_slots} slots are more than the {MAX_SLOTS} that the GPU plans": (
            num_slots > MAX_SLOTS
        ),
    }
    why = next((reason for reason, holds in reasons.items() if holds), None)
    return (Way.DEVICE, "") if why is None else (Way.HOST, why)


def state_bytes(
    *, num_layers: int, num_experts: int, num_slots: int, max_tokens: int, top_k: int
) -> int:
    """Device memory beside the slots that planning there takes (``device/cache.py``).

    Args:
        num_layers, num_experts: of the worker.
        num_slots: on the GPU.
        max_tokens: of a step.
        top_k: experts per token.
    """
    log = 2 * max_tokens * num_layers * top_k
    per_token = 4 * max_tokens * (top_k + 1) + max_tokens  # names of blocks, votes, padding
    page_table = 8 * num_layers * num_experts  # slot and score
    per_slot = 8 * num_slots
    per_expert = 32 * num_experts + 4 * num_layers
    return log + per_token + page_table + per_slot + per_expert
