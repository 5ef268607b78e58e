"""How `plan` shares layers and experts, against vLLM's own functions."""

from __future__ import annotations

import pytest
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

from vllm_moe_offload.plan.split import local_experts, stage_layers


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5, 8, 16])
def test_layers_of_a_stage_are_vllms(stages):
    for layers in range(stages, 100):
        for stage in range(stages):
            span = stage_layers(layers, stage, stages)
            assert (span.start, span.stop) == get_pp_indices(layers, stage, stages)


@pytest.mark.parametrize("placement", ["linear", "round_robin"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 16])
def test_experts_of_a_rank_are_vllms(ranks, placement):
    for experts in range(ranks, 140, 7):
        for rank in range(ranks):
            count, expert_map, _ = determine_expert_map(ranks, rank, experts, placement)
            assert local_experts(experts, rank, ranks) == count
            assert expert_map is None or int((expert_map >= 0).sum()) == count
