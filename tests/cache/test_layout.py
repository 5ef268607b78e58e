"""How the tensors of an expert lie in its record."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.stores import MIXED, layout_of
from vllm_moe_offload.cache.layout import ALIGNMENT, ExpertLayout, TensorSpec, round_up

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


@given(st.lists(row_bytes, min_size=1, max_size=8))
def test_json_round_trip(sizes):
    layout = layout_of(*sizes)
    assert ExpertLayout.from_json(layout.to_json()) == layout


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "w", "shape": [1], "dtype": "uint8"},
        {"name": "w", "shape": 1, "dtype": "uint8", "nbytes": 1},
        {"name": "w", "shape": [1], "dtype": "uint8", "nbytes": "many"},
        {},
    ],
)
def test_json_that_is_no_layout_is_refused(entry):
    with pytest.raises(ValueError):
        ExpertLayout.from_json([entry])


def test_names_must_be_distinct_and_present():
    spec = TensorSpec("w", (1,), "uint8", 1)
    with pytest.raises(ValueError, match="distinct"):
        ExpertLayout((spec, spec))
    with pytest.raises(ValueError, match="non-empty"):
        ExpertLayout(())
