"""PageLocked over a driver that notes what it is asked: once for all, and once back."""

from __future__ import annotations

import enum
import gc
import platform
import resource

import pytest
import torch

from tests.stores import aligned
from vllm_moe_offload.transfer.page_lock import PageLocked, PageLockError


class Code(enum.IntEnum):
    success = 0
    out_of_memory = 2


class Driver:
    """In the place of ``torch.cuda.cudart()``."""

    def __init__(self):
        self.calls = []
        self.answer = Code.success

    def cudaHostRegister(self, address, nbytes, flags):
        self.calls.append(("register", address, nbytes, flags))
        return self.answer

    def cudaHostUnregister(self, address):
        self.calls.append(("unregister", address))
        return self.answer

    def cudaGetErrorString(self, code):
        return str(Code(code).name).replace("_", " ")


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    return driver


def test_all_is_locked_at_once_portable_and_mapped_and_unlocked_once(driver):
    arena = aligned(8192).reshape(2, 4096)
    locked = PageLocked(arena)
    assert locked.arena is arena
    address = arena.ctypes.data
    assert driver.calls == [("register", address, 8192, 1 | 2)]
    locked.close()
    locked.close()
    assert driver.calls[1:] == [("unregister", address)]


def test_what_is_forgotten_is_unlocked(driver):
    locked = PageLocked(aligned(4096))
    del locked
    gc.collect()
    assert [call for call, *_ in driver.calls] == ["register", "unregister"]


def refused(driver):
    driver.answer = Code.out_of_memory
    with pytest.raises(PageLockError) as caught:
        PageLocked(aligned(3 << 20))
    assert [call for call, *_ in driver.calls] == ["register"]  # nothing to unlock
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(
        "cannot page-lock 0.00 GiB of host memory for experts: cudaHostRegister: out of memory "
        "(2); "
    )
    return message


@pytest.mark.parametrize(
    ("limit_bytes", "said"), [(8 << 20, "8192 KiB"), (resource.RLIM_INFINITY, "unlimited")]
)
def test_a_limit_that_is_reached_is_named_with_the_remedy(
    driver, monkeypatch, limit_bytes, said
):
    monkeypatch.setattr(platform, "release", lambda: "6.1.0")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit_bytes, limit_bytes))
    message = refused(driver)
    assert f"lower host_gb, or raise ulimit -l (now {said})" in message
    assert "cgroup" in message
    assert "WSL" not in message


def test_wsl_is_named(driver, monkeypatch):
    monkeypatch.setattr(platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    message = refused(driver)
    assert "WSL2 limits page-locked memory: lower host_gb" in message
    assert "VLLM_WSL2_ENABLE_PIN_MEMORY=1" in message


def test_a_driver_that_does_not_unlock_is_told(driver):
    locked = PageLocked(aligned(4096))
    driver.answer = Code.out_of_memory
    with pytest.raises(RuntimeError, match=r"cudaHostUnregister: out of memory \(2\)"):
        locked.close()
