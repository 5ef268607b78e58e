"""Page-locking: what is asked of the driver, and what is said when it refuses. Needs no GPU."""

import platform
import resource

import numpy as np
import pytest
import torch

from vllm_moe_offload.transfer.page_lock import PageLocked, PageLockError, refusal


class Driver:
    """In place of torch.cuda.cudart()."""

    def __init__(self, error=0):
        self.error = error
        self.locked = {}

    def cudaHostRegister(self, address, nbytes, flags):
        if not self.error:
            self.locked[address] = (nbytes, flags)
        return self.error

    def cudaHostUnregister(self, address):
        del self.locked[address]
        return 0

    def cudaGetErrorString(self, error):
        return "out of memory"


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    return driver


def test_locks_the_whole_array_for_every_context_until_closed(driver):
    array = np.zeros(8192, np.uint8)
    locked = PageLocked(array)
    assert driver.locked == {array.ctypes.data: (8192, 3)}
    locked.close()
    locked.close()
    assert not driver.locked


def test_unlocks_when_nobody_holds_it(driver):
    locked = PageLocked(np.zeros(8192, np.uint8))
    del locked
    assert not driver.locked


def test_a_refusal_says_what_how_much_and_what_to_do(driver, monkeypatch):
    driver.error = 2
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**30, 2**30))
    with pytest.raises(PageLockError) as error:
        PageLocked(np.zeros(2**20, np.uint8))
    assert str(error.value) == (
        "cannot page-lock 0.00 GiB of host memory: out of memory; lower host_gb, or raise "
        "`ulimit -l` (now 1.00 GiB) or the cgroup's memory limit"
    )


def test_wsl2_has_a_remedy_of_its_own(monkeypatch):
    monkeypatch.setattr(platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    monkeypatch.delenv("VLLM_WSL2_ENABLE_PIN_MEMORY", raising=False)
    said = refusal(40 * 2**30, "out of memory")
    assert "40.00 GiB" in said
    assert "VLLM_WSL2_ENABLE_PIN_MEMORY=1 (now not set)" in said
    assert "\n" not in said
