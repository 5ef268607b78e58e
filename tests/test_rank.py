"""Names of a worker's part of the model: no two workers of a server share one."""

from itertools import product
from pathlib import Path

import pytest

from vllm_moe_offload.rank import NAME_PATTERN, Rank

SIZES = list(product([1, 2], [1, 3], [1, 2]))


def ranks(pp_size: int, tp_size: int, ep_size: int) -> list[Rank]:
    return [
        Rank(pp=pp, pp_size=pp_size, tp=tp, tp_size=tp_size, ep=ep, ep_size=ep_size)
        for pp, tp, ep in product(range(pp_size), range(tp_size), range(ep_size))
    ]


@pytest.mark.parametrize("sizes", SIZES)
def test_every_worker_has_a_name_of_its_own(sizes):
    all_of_them = ranks(*sizes)
    names = [rank.name for rank in all_of_them]
    assert len(set(names)) == len(names) == all_of_them[0].num_parts
    assert all(NAME_PATTERN.fullmatch(name) for name in names)
    assert [rank.is_first for rank in all_of_them].count(True) == 1


def test_a_name_has_what_is_divided_and_no_more():
    assert Rank().name == "whole"
    assert Rank(pp=1, pp_size=2, ep=3, ep_size=4).name == "pp1of2-ep3of4"


@pytest.mark.parametrize("name", ["rank0of1", "tp0of2-", "whole-tp0of2", "tp0of2.lock", "tp0"])
def test_other_names_are_none(name):
    assert not NAME_PATTERN.fullmatch(name)


@pytest.mark.parametrize("first_slice", [0, 1])
@pytest.mark.parametrize("sizes", SIZES)
def test_one_worker_of_a_machine_writes_each_file_of_traces(sizes, first_slice):
    """That is the first slice there; the others read what it writes."""
    path = Path("traces") / "routing.npz"
    here = [rank for rank in ranks(*sizes) if rank.tp >= first_slice]
    files = {rank: rank.trace_file(path, first_slice=first_slice) for rank in here}
    written = [file for rank, file in files.items() if rank.tp == first_slice]
    assert len(set(written)) == len(written)
    assert set(files.values()) == set(written)
    if sizes[1] > 1:
        elsewhere = {rank.trace_file(path) for rank in ranks(*sizes)}
        assert first_slice == 0 or elsewhere.isdisjoint(written)


def test_files_of_parts_have_the_part_before_the_suffix():
    path = Path("a.b") / "routing.v1.npz"
    assert Rank(tp=1, tp_size=2).trace_file(path) == path
    part = Rank(pp=1, pp_size=2, tp=1, tp_size=2).trace_file(path)
    assert part == Path("a.b") / "routing.v1.pp1of2.npz"
