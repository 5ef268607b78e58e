"""Runtimes over small stores, with predictions at will, for the tests of runtime and prefetch."""

from __future__ import annotations

import numpy as np
import torch

from scripts.harness.foretold import Foretold
from tests.stores import layer_tensors
from vllm_moe_offload.cache.planner import CacheShape, ExpertCache
from vllm_moe_offload.cache.pool import SlotPool
from vllm_moe_offload.native import NO_EXPERT
from vllm_moe_offload.policy.drafter import make_policies
from vllm_moe_offload.runtime import OffloadRuntime
from vllm_moe_offload.step import StepTokens
from vllm_moe_offload.store import ExpertStore
from vllm_moe_offload.transfer import TransferEngine
from vllm_moe_offload.transfer.prefetch import Prefetcher

LAYERS, EXPERTS, TOP_K = 4, 8, 2


class Foresight(Foretold):
    """Predicts whatever the test says."""

    depth = 2

    def __init__(self) -> None:
        self.likely = np.zeros((LAYERS, EXPERTS), np.float32)

    def told(self, layer: int, ahead: int) -> list[tuple[int, float]] | None:
        if layer + ahead >= LAYERS:
            return None
        likely = self.likely[layer + ahead]
        order = np.argsort(-likely, kind="stable").tolist()
        return [(expert, float(likely[expert])) for expert in order]


def runtime_of(
    store: ExpertStore,
    slots: int,
    staging: int,
    mode: str = "trace",
    predictor=None,
    *,
    published=None,
    num_draft_layers: int = 0,
) -> OffloadRuntime:
    """Of the store's layers the last ``num_draft_layers`` are a drafter's."""
    policy, draft_policy = make_policies(
        mode, store.num_layers - num_draft_layers, num_draft_layers, store.num_experts, 2.0
    )
    shape = CacheShape(store.num_layers, store.num_experts, slots, staging)
    cache = ExpertCache(shape, policy.rules)
    pool = SlotPool(store.layout, shape.num_pool_slots)
    transfer = TransferEngine(store, pool.destinations())
    prefetcher = Prefetcher(cache, transfer, policy, predictor) if predictor else None
    return OffloadRuntime(
        cache=cache,
        pool=pool,
        transfer=transfer,
        policy=policy,
        prefetcher=prefetcher,
        draft_policy=draft_policy,
        num_draft_layers=num_draft_layers,
        published=published,
    )


def decode_tokens(requests: list[str], position: int = 1) -> StepTokens:
    count = len(requests)
    return StepTokens.of_lengths(
        requests,
        np.ones(count, np.int64),
        np.full(count, position),
        np.zeros(count, np.bool_),
    )


def assert_slots_hold(runtime: OffloadRuntime, store, layer: int, ids, slots) -> None:
    wanted = layer_tensors(store.layout, store.num_experts, layer)
    ids, slots = ids[ids != NO_EXPERT], slots[ids != NO_EXPERT]
    for name, tensor in wanted.items():
        have = runtime.pool.destinations()[name]
        for expert, slot in zip(ids.reshape(-1), slots.reshape(-1), strict=True):
            assert (have[int(slot)] == tensor[int(expert)]).all(), (name, layer, expert, slot)


def run_layer(runtime: OffloadRuntime, store, layer: int, ids: torch.Tensor) -> None:
    """One layer call as the integration makes it; checks every byte the kernel would read."""
    slots = runtime.begin_layer(layer, ids)
    if slots is not None:
        if runtime.cache.shape.holds_everything:  # ids pass through, of no expert too
            slots = slots + layer * EXPERTS  # the layer sees only its own slots
        assert_slots_hold(runtime, store, layer, ids, slots)
        runtime.end_layer(layer)
        return
    covered = torch.zeros_like(ids, dtype=torch.bool)
    for wave_slots, in_wave in runtime.waves(layer, ids):
        assert not bool((covered & in_wave).any())
        assert_slots_hold(runtime, store, layer, ids[in_wave], wave_slots[in_wave])
        covered |= in_wave
        assert bool((wave_slots >= 0).all())
    assert torch.equal(covered, ids != NO_EXPERT)


def ids_of(*experts: int) -> torch.Tensor:
    return torch.tensor([experts], dtype=torch.int32)
