"""What a recording is on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trace.recordings import recorder
from vllm_moe_offload.trace.spool import spool_of


@pytest.mark.parametrize("what", ["link", "file", "others"])
def test_only_a_spool_is_removed(tmp_path: Path, what: str) -> None:
    path, other = tmp_path / "trace.npz", tmp_path / "other"
    other.mkdir()
    (other / "rows").touch()
    match what:
        case "link":
            spool_of(path).symlink_to(other)
        case "file":
            spool_of(path).touch()
        case "others":
            spool_of(path).mkdir()
            (spool_of(path) / "mine").touch()
    with pytest.raises(OSError, match=r"no directory of yours|not empty"):
        recorder(path)
    assert (other / "rows").exists()
    assert spool_of(path).exists()
    assert not (tmp_path / "trace.npz.lock").exists()
