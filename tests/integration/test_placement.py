"""Which part of the model a worker has, and what of it is on this machine."""

from types import SimpleNamespace

import pytest

from vllm_moe_offload.integration import placement
from vllm_moe_offload.rank import Rank


@pytest.mark.parametrize(
    ("tp", "local_rank", "first"),
    [(0, 0, 0), (1, 1, 0), (1, 0, 1), (3, 1, 2), (0, 2, 0)],
    ids=["first", "one machine", "another machine", "two on another", "of a later stage"],
)
def test_the_first_slice_of_a_machine(tp, local_rank, first, monkeypatch):
    group = SimpleNamespace(local_rank=local_rank)
    monkeypatch.setattr(placement, "get_world_group", lambda: group)
    assert placement.first_slice_here(Rank(tp=tp, tp_size=4)) == first


@pytest.mark.parametrize(("on_ray", "workers"), [(True, 1), (False, 4)])
def test_workers_of_this_machine(on_ray, workers):
    parallel = SimpleNamespace(
        use_ray=on_ray, assigned_physical_gpu_ids=[3], local_world_size=4
    )
    assert placement.ranks_here(SimpleNamespace(parallel_config=parallel)) == workers
