"""A worker's hooks, where no engine is needed."""

from types import SimpleNamespace

import pytest

from vllm_moe_offload.integration import requests


class DeviceError(RuntimeError):
    """As torch raises for whoever asks a device that has failed."""


def runner_of(error):
    def close():
        raise ExceptionGroup("the expert cache did not close", [error])

    return SimpleNamespace(_moe_offload_runtime=SimpleNamespace(close=close))


def test_vllm_ends_its_own_parts_whatever_ours_say():
    ended = []
    runner = runner_of(DeviceError("an illegal memory access"))
    with pytest.raises(ExceptionGroup):
        requests.shutdown(ended.append, runner)
    assert ended == [runner]


def test_a_file_that_cannot_be_written_is_no_error_of_the_end():
    ended = []
    requests.shutdown(ended.append, runner_of(OSError("disk is full")))
    assert len(ended) == 1
