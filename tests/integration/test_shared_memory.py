"""Which ranks share memory, as the ranks of a group find out together."""

import os
from types import SimpleNamespace

import pytest
import torch.distributed

from vllm_moe_offload.integration import shared_memory

HERE = shared_memory.memory_of_this_process()
OTHER_MACHINE = ("another boot id", HERE[1])
OTHER_CONTAINER = (HERE[0], HERE[1] + 1)


def share(monkeypatch, others, *, vllm_says):
    """The answer of rank 0; ``others``: what the other ranks see. And how often they were asked."""
    asked = []

    def all_gather_object(found, own, group):
        assert group == "the device group"
        asked.append(own)
        found[:] = [own, *others]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    communicator = SimpleNamespace(
        world_size=1 + len(others),
        device_group="the device group",
        ranks=[0],
        unique_name="tp:0",
    )
    answer = shared_memory._share_memory(lambda _: vllm_says, communicator)
    return answer, len(asked)


@pytest.mark.parametrize(
    ("others", "answer"),
    [
        ([HERE], True),
        ([HERE, HERE, HERE], True),
        ([OTHER_MACHINE], False),
        ([OTHER_CONTAINER], False),
        ([HERE, HERE, OTHER_CONTAINER], False),
    ],
)
def test_ranks_share_memory_on_one_machine_with_one_dev_shm(monkeypatch, others, answer):
    assert share(monkeypatch, others, vllm_says=True) == (answer, 1)


def test_no_rank_asks_what_vllm_has_answered_with_no(monkeypatch):
    """All ranks get that answer, or one would wait for the others."""
    assert share(monkeypatch, [HERE], vllm_says=False) == (False, 0)


def test_the_memory_is_that_of_this_machine():
    assert HERE[0]
    assert HERE[1] == os.stat("/dev/shm").st_dev
