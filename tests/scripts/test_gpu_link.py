"""What the link is measured with; the measuring itself runs in the rehearsal."""

from __future__ import annotations

import numpy as np
import pytest

from scripts import gpu_link
from scripts.gpu_link import Sizes, cells_of

RECORD = 9_437_184
OWN_PROGRAMS = 32


def test_the_plugins_own_launch_comes_first_and_alone_unless_all_is_asked_for() -> None:
    own = (96, 2119, OWN_PROGRAMS)
    assert cells_of(RECORD, 2119, Sizes(), OWN_PROGRAMS, sweep=False) == [own]
    cells = cells_of(RECORD, 2119, Sizes(), OWN_PROGRAMS, sweep=True)
    assert cells[0] == own
    assert len(cells) == len(set(cells)) == 7 * 5 * 2
    assert {span for _, span, _ in cells} == {2119, 113}


def test_records_that_are_large_come_a_few_at_once() -> None:
    assert cells_of(352_321_536, 6, Sizes(), OWN_PROGRAMS, sweep=False) == [(2, 6, 32)]
    assert cells_of(3 << 30, 2, Sizes(), OWN_PROGRAMS, sweep=False) == [(1, 2, 32)]


def test_a_round_is_filled_by_copies_of_any_size() -> None:
    sizes = Sizes(round_bytes=1000)
    assert [gpu_link.copies_in_a_round(10, n, sizes) for n in (1, 7, 200)] == [100, 14, 1]


def test_host_memory_is_whole_records_and_all_of_it_is_touched() -> None:
    host = gpu_link.HostRecords(4096, 10_000_000, "cpu")
    assert host.rows.shape == (10_000_000 // 4096, 4096)
    assert bool((host.rows == 1).all())
    assert host.told["bytes"] == host.rows.numel()
    host.close()
    assert "lock_s" not in host.told
    assert "unlock_s" not in host.told


def test_copies_are_timed_without_a_device() -> None:
    host = gpu_link.HostRecords(4096, 1 << 20, "cpu")
    rates = gpu_link.copy_engine_rates(host, gpu_link.ON_CPU, "cpu")
    assert len(rates) == gpu_link.ON_CPU.repeats
    assert np.isfinite(rates).all()
    assert min(rates) > 0


def test_records_of_a_store_are_pages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_link.py", "--record-bytes", "4097"])
    with pytest.raises(SystemExit) as ended:
        gpu_link.main()
    assert ended.value.code == 2
    assert "--record-bytes 4097: allowed are multiples of 4096" in capsys.readouterr().err
