"""Shards, bounded memory, and what is refused before anything is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from scripts.demo_model import DemoModelError, write, write_demo_model
from tests.scripts.demo_model.checkpoints import TINY, digests, tensors_of

ROOT = Path(__file__).resolve().parents[3]


def test_sharding_does_not_change_the_weights(tiny: dict[str, Path], tmp_path: Path) -> None:
    write_demo_model(tmp_path, "mixtral", max_shard_bytes=100_000, **TINY)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[-1].name == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    for path in shards:
        with safe_open(path, framework="pt") as shard:
            names = list(shard.keys())
            size = sum(shard.get_tensor(name).nbytes for name in names)
        assert size <= 100_000 or len(names) == 1
    mine, theirs = tensors_of(tmp_path), tensors_of(tiny["mixtral"])
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.slow
def test_memory_is_bounded_by_a_shard(tmp_path: Path) -> None:
    program = (
        "import resource, sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from scripts.demo_model import write_demo_model\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        f"write_demo_model(Path({str(tmp_path / 'small')!r}), 'gpt_oss', experts_gb=0.02)\n"
        "before = peak()\n"
        f"write_demo_model(Path({str(tmp_path / 'big')!r}), 'gpt_oss', experts_gb=1.0,"
        " max_shard_bytes=50_000_000)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) < 300_000_000


def test_occupied_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DemoModelError, match=r"is not empty.*--force"):
        write_demo_model(tmp_path, "mixtral", **TINY)
    with pytest.raises(DemoModelError, match="is a file; OUT must be a directory"):
        write_demo_model(tmp_path / "notes.txt", "mixtral", **TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_force_replaces_a_checkpoint_only(tiny: dict[str, Path], tmp_path: Path) -> None:
    write_demo_model(tmp_path, "olmoe", max_shard_bytes=100_000, **TINY)
    (tmp_path / "notes.txt").write_text("mine")
    write_demo_model(tmp_path, "mixtral", force=True, **TINY)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "notes.txt").unlink()
    assert digests(tmp_path) == digests(tiny["mixtral"])


def test_torn_rewrite_leaves_nothing_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk gone")

    write_demo_model(tmp_path, "mixtral", **TINY)
    monkeypatch.setattr(write, "save_file", fail)
    with pytest.raises(OSError, match="disk gone"):
        write_demo_model(tmp_path, "mixtral", force=True, **TINY)
    assert not (tmp_path / "config.json").exists()


def test_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=10**9, used=10**9, free=10**6)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DemoModelError, match=r"has 0.00 GB free .* needs 0.0\d GB"):
        write_demo_model(tmp_path / "model", "mixtral", **TINY)
    assert not (tmp_path / "model").exists()
