"""The CUDA library where there is no device: it loads, and says what is missing."""

from __future__ import annotations

import pytest
import torch

from tests.stores import MIXED, aligned, build
from vllm_moe_offload.cache.pool import SlotPool
from vllm_moe_offload.transfer import cuda, cuda_library
from vllm_moe_offload.transfer.cuda import CudaCopier, cuda_transfer, tensor_slots
from vllm_moe_offload.transfer.cuda_library import CudaError

needs_library = pytest.mark.skipif(
    not cuda_library._PATH.exists(), reason="_cuda.so is not built (make cuda)"
)


class PoolOnNoDevice:
    """Of a device that no machine has; its slots are never written."""

    layout = MIXED
    num_slots = 4

    def __init__(self, device: str = "cuda:250") -> None:
        self.device = torch.device(device)

    def addresses(self) -> dict[str, int]:
        return {spec.name: 4096 * (i + 1) for i, spec in enumerate(MIXED.tensors)}


def arena_of(num_slots=3, nbytes=MIXED.record_bytes):
    return aligned(num_slots * nbytes).reshape(num_slots, nbytes)


@needs_library
def test_errors_name_call_code_and_message():
    with pytest.raises(CudaError, match=r"^cuda\w+ failed: cudaError\w+ \(\d+\): \w+"):
        CudaCopier(PoolOnNoDevice(), arena_of(), compute_stream=lambda: 0)


@needs_library
def test_arguments_are_checked_before_the_device_is_asked():
    library = cuda_library.cuda_library()
    tensors = tensor_slots(PoolOnNoDevice())
    arena = arena_of()

    def create(host_slots=3, device_slots=4, record_bytes=MIXED.record_bytes):
        handle = library.vmo_copier_create(
            0, arena.ctypes.data, record_bytes, host_slots, device_slots, tensors, len(tensors)
        )
        assert not handle
        return str(cuda_library.last_cuda_error())

    assert "got 0 in host memory and 4 on the device" in create(host_slots=0)
    assert "got 3 in host memory and -1 on the device" in create(device_slots=-1)
    assert "is not in a record of 8000" in create(record_bytes=8000)


def test_tensors_lie_in_record_order():
    slots = tensor_slots(PoolOnNoDevice())
    names = [spec.name for spec in (*MIXED.direct, *MIXED.tail)]
    assert names == ["t0", "t2", "t1", "t3", "t4"]
    assert [(r.record_offset, r.slot_bytes) for r in slots] == [
        (0, 8192),
        (8192, 4096),
        (12288, 100),
        (12388, 11520),
        (23908, 1),
    ]
    assert [r.slots for r in slots] == [4096, 3 * 4096, 2 * 4096, 4 * 4096, 5 * 4096]


def test_what_cannot_be_copied_is_refused():
    for pool, arena, options, message in [
        (PoolOnNoDevice("cpu"), arena_of(), {}, "the pool is on cpu, not on a CUDA device"),
        (PoolOnNoDevice(), arena_of(nbytes=4096), {}, "must be contiguous"),
        (PoolOnNoDevice(), arena_of(6)[::2], {}, "must be contiguous"),
        (PoolOnNoDevice(), arena_of(), {"engine": "dma"}, "'dma' is not one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            CudaCopier(pool, arena, compute_stream=lambda: 0, **options)


def test_a_library_that_is_not_built_is_said_before_anything_is_read(tmp_path, monkeypatch):
    store = build(tmp_path)
    monkeypatch.setattr(cuda_library, "_PATH", tmp_path / "_cuda.so")
    cuda_library.cuda_library.cache_clear()
    monkeypatch.setattr(cuda, "HostTier", None)
    with pytest.raises(ImportError, match=r"_cuda\.so is missing; build it: `VMO_CUDA"):
        cuda_transfer(store, PoolOnNoDevice(), host_slots=4, compute_stream=lambda: 0)
    (tmp_path / "_cuda.so").write_bytes(b"not a library")
    with pytest.raises(ImportError, match=r"cannot load .*_cuda\.so"):
        cuda_library.cuda_library()
    cuda_library.cuda_library.cache_clear()


def test_a_pool_on_a_device_has_addresses_and_no_bytes():
    pool = SlotPool(MIXED, 3, device=torch.device("cpu"))
    assert pool.addresses() == {name: t.data_ptr() for name, t in pool.tensors.items()}
    assert {n: tuple(t.shape) for n, t in pool.tensors.items()} == {
        spec.name: (3, *spec.shape) for spec in MIXED.tensors
    }
    assert not any(bool(tensor.any()) for tensor in pool.tensors.values())
    with pytest.raises(ValueError, match="only a copier can write"):
        pool.destinations()


def test_a_pool_in_ram_is_where_it_says():
    pool = SlotPool(MIXED, 3)
    assert pool.addresses() == {
        name: slots.ctypes.data for name, slots in pool.destinations().items()
    }
