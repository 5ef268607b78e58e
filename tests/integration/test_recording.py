"""Whether a server can record what it is asked to, before anything is loaded, and in a worker."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_moe_offload.cache.planner import CacheShape
from vllm_moe_offload.config import OffloadConfig, OptionError
from vllm_moe_offload.integration import recording
from vllm_moe_offload.rank import Rank
from vllm_moe_offload.trace.recorder import TraceRecorder

LAYERS = [
    SimpleNamespace(
        global_num_experts=4,
        top_k=2,
        share=None,
        layer_name=f"model.layers.{number}.mlp.experts",
    )
    for number in (1, 3)
]


def options_for(path: Path) -> OffloadConfig:
    return OffloadConfig(mode="trace", record_trace=str(path))


def config_of(stages: int = 1) -> Any:
    return SimpleNamespace(parallel_config=SimpleNamespace(pipeline_parallel_size=stages))


def recorder(options: OffloadConfig, **rank: int) -> TraceRecorder | None:
    return recording.recorder(options, Rank(**rank), CacheShape(2, 4, 3, 2), LAYERS)


def test_the_first_worker_of_a_stage_records(tmp_path: Path) -> None:
    options = options_for(tmp_path / "trace.npz")
    assert recorder(options, tp=1, tp_size=2) is None
    assert recorder(options, ep=1, ep_size=2) is None
    assert recorder(OffloadConfig(mode="trace")) is None
    made = recorder(options, pp=1, pp_size=2, tp=0, tp_size=2)
    assert made is not None
    assert (tmp_path / "trace.pp1of2.npz.spool").is_dir()
    made.close()


def test_two_servers_do_not_record_to_one_file(tmp_path: Path) -> None:
    """Neither before a start, nor in a worker; with stages it is enough that one file is taken."""
    options = options_for(tmp_path / "trace.npz")
    for stages in (1, 2):
        recording.check(config_of(stages), options)
        made = recorder(options, pp=stages - 1, pp_size=stages)
        assert made is not None
        path = tmp_path / ("trace.npz" if stages == 1 else "trace.pp1of2.npz")
        line = (
            f"moe-offload: record_trace={options.record_trace!r} is not possible: another server "
            f"records to {path}; give another path"
        )
        with pytest.raises(OptionError) as early:
            recording.check(config_of(stages), options)
        with pytest.raises(OptionError) as late:
            recorder(options, pp=stages - 1, pp_size=stages)
        assert str(early.value) == str(late.value) == line
        made.close()
        recording.check(config_of(stages), options)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    (tmp_path / "trace.npz.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OptionError, match=r"record_trace=.* is not possible: .*npz\.lock"):
        recording.check(config_of(), options_for(path))
