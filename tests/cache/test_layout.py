"""How the tensors of an expert lie in its record."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.stores import MIXED, layout_of
from vllm_moe_offload.cache.layout import (
    ALIGNMENT,
    ELEMENT_BYTES,
    ExpertLayout,
    TensorSpec,
    round_up,
)

row_bytes = st.one_of(
    st.integers(1, 50_000), st.integers(1, 8).map(lambda blocks: blocks * ALIGNMENT)
)


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 20))
def test_round_up_is_the_least_multiple(value, multiple):
    rounded = round_up(value, multiple)
    assert rounded % multiple == 0
    assert value <= rounded < value + multiple


def test_aligned_rows_are_direct_and_others_share_the_tail():
    assert [spec.name for spec in MIXED.direct] == ["t0", "t2"]
    assert [spec.name for spec in MIXED.tail] == ["t1", "t3", "t4"]
    assert MIXED.expert_bytes == 8192 + 100 + 4096 + 11520 + 1
    assert MIXED.tail_bytes == round_up(100 + 11520 + 1)
    assert MIXED.record_bytes == 8192 + 4096 + MIXED.tail_bytes


def test_no_tail_costs_no_bytes():
    layout = layout_of(4096, 8192)
    assert layout.tail == ()
    assert layout.tail_bytes == 0
    assert layout.record_bytes == layout.expert_bytes == 12288


def test_tail_only():
    layout = layout_of(1, 4095, 4097)
    assert layout.direct == ()
    assert layout.record_bytes == layout.tail_bytes == 3 * ALIGNMENT


def test_an_empty_tensor_is_not_direct():
    assert not TensorSpec("empty", (0,), "uint8", 0).is_direct


@given(st.lists(row_bytes, min_size=1, max_size=8))
def test_record_is_aligned_and_holds_everything(sizes):
    layout = layout_of(*sizes)
    assert layout.record_bytes % ALIGNMENT == 0
    assert layout.expert_bytes == sum(sizes)
    assert 0 <= layout.record_bytes - layout.expert_bytes < ALIGNMENT
    assert sorted((*layout.direct, *layout.tail), key=lambda s: s.name) == sorted(
        layout.tensors, key=lambda s: s.name
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name="),
        ({"name": "w.1"}, "name="),
        ({"dtype": "bfloat17"}, "dtype='bfloat17' is none of"),
        ({"shape": (-2, -3)}, "sizes at most, each from 0"),
        ({"shape": (1 << 60, 0)}, "sizes at most, each from 0"),
        ({"shape": (1,) * 9}, "8 sizes at most"),
        ({"nbytes": 11}, r"nbytes=11, but shape=\(2, 3\) of uint16 are 12"),
    ],
)
def test_a_tensor_that_contradicts_itself_is_refused(changes, message):
    fields = {"name": "w", "shape": (2, 3), "dtype": "uint16", "nbytes": 12}
    assert TensorSpec(**fields).nbytes == 12
    with pytest.raises(ValueError, match=message):
        TensorSpec(**fields | changes)


def test_element_types_are_torchs():
    for name, nbytes in ELEMENT_BYTES.items():
        assert getattr(torch, name).itemsize == nbytes


def test_names_must_be_distinct_and_present():
    spec = TensorSpec("w", (1,), "uint8", 1)
    with pytest.raises(ValueError, match="distinct"):
        ExpertLayout((spec, spec))
    with pytest.raises(ValueError, match="non-empty"):
        ExpertLayout(())
    with pytest.raises(ValueError, match="are empty"):
        ExpertLayout((TensorSpec("w", (0,), "uint8", 0),))
