"""The size asked for is met; explicit sizes win."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.demo_model import ARCHS, DemoModelError, Shape, expert_bytes, write_demo_model
from scripts.demo_model.sizes import resolve_shape
from tests.scripts.demo_model.checkpoints import TINY, TWO_ARCHS, experts_of, tensors_of


@pytest.mark.parametrize("gigabytes", [0.02, 0.3, 1.0, 6.0, 40.0])
@pytest.mark.parametrize("arch", ARCHS)
def test_size_is_met(arch: str, gigabytes: float) -> None:
    shape = resolve_shape(arch, gigabytes, {})
    assert expert_bytes(arch, shape) / 1e9 == pytest.approx(gigabytes, rel=0.1)
    assert shape.top_k == ARCHS[arch].default.top_k


@pytest.mark.parametrize("arch", TWO_ARCHS)
def test_written_experts_have_the_size(arch: str, tmp_path: Path) -> None:
    shape = write_demo_model(tmp_path, arch, experts_gb=0.02)
    experts = experts_of(tensors_of(tmp_path))
    written = sum(tensor.nbytes for group in experts.values() for tensor in group)
    assert written == expert_bytes(arch, shape)
    assert written / 1e9 == pytest.approx(0.02, rel=0.1)


def test_explicit_sizes_win() -> None:
    flags = {"layers": 12, "experts": 16, "top_k": 2, "hidden": 1024, "intermediate": 2048}
    assert resolve_shape("mixtral", None, flags) == Shape(**flags)
    shape = resolve_shape("qwen3_moe", 2.0, {"layers": 5, "hidden": 1024})
    assert (shape.layers, shape.hidden) == (5, 1024)
    assert expert_bytes("qwen3_moe", shape) / 1e9 == pytest.approx(2.0, rel=0.1)
    assert resolve_shape("qwen3_moe", None, {"experts": 4}).top_k == 4


def test_fixed_sizes_that_cannot_reach_the_size(tmp_path: Path) -> None:
    fixed = TINY | {"experts_gb": 5.0}
    with pytest.raises(DemoModelError, match=r"experts-gb is 5; with layers=2, .* has .* GB"):
        write_demo_model(tmp_path, "mixtral", **fixed)
