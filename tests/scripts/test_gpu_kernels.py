"""Which calls the kernels are tried with on a GPU; the trying itself is in the rehearsal."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scripts import gpu_kernels
from tests.device.kernels.harness import random_steps
from vllm_moe_offload.device.rule import MAX_SLOTS, VOTE_ONE


def test_a_gpu_goes_every_way_through_the_kernels() -> None:
    shapes = gpu_kernels.shapes("cuda")
    assert all(shape.num_slots <= MAX_SLOTS for shape in shapes)
    assert {shape.num_slots >= shape.num_experts for shape in shapes} == {True, False}
    assert {shape.expert_map is None for shape in shapes} == {True, False}
    assert {shape.padding for shape in shapes} == {"experts", "-1"}
    assert {shape.dtype for shape in shapes} == {np.int32, np.int64}
    assert {shape.kind for shape in shapes} == {"routed", "any"}
    are_counted = set()
    for shape in shapes:
        for _, layers in random_steps(shape, 0, 5, shape.num_routed):
            are_counted |= {ids.size >= 2 * shape.num_experts for ids, _, _ in layers}
    assert are_counted == {True, False}


@pytest.mark.parametrize("num_experts", [1, 6, 8, 24, 128])
def test_a_call_needs_the_experts_that_it_is_to_need(num_experts: int) -> None:
    tokens = gpu_kernels.call_of(range(num_experts), "cpu")
    assert torch.unique(tokens.ids).tolist() == list(range(num_experts))
    assert tokens.ids.shape == (len(tokens.weights), gpu_kernels.TOP_K)
    assert not tokens.is_padding.any()
    assert int(tokens.weights.long().sum()) <= VOTE_ONE


def test_without_triton_nothing_is_claimed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["gpu_kernels.py", "--device", "cpu"])
    assert gpu_kernels.main() == 0
    assert "not rehearsed: Triton is missing" in capsys.readouterr().out
