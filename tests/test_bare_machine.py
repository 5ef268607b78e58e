"""Tests of the copier on a machine that has torch, numpy and pytest, but not vLLM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MISSING = (
    *("vllm", "transformers", "tokenizers", "safetensors", "huggingface_hub"),
    *("prometheus_client", "matplotlib", "psutil"),
)
PROGRAM = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {MISSING!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def pytest_without_vllm(directory: Path, *arguments: str) -> str:
    """What pytest printed, called from outside of the project."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--rootdir", str(ROOT), *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The GPU tests that pytest finds there, and what it says of the others."""
    kernels = str(ROOT / "tests" / "gpu" / "test_triton_kernels.py")
    copier = str(ROOT / "tests" / "gpu" / "test_torch_copier.py")
    outside = tmp_path_factory.mktemp("outside")
    return pytest_without_vllm(outside, "--collect-only", copier, kernels).splitlines()


def test_tests_that_need_vllm_are_left_out_and_those_of_the_copier_are_not(
    collected: list[str],
) -> None:
    printed = "\n".join(collected)
    assert "test_torch_copier.py::test_every_byte_arrives_and_no_other_changes" in printed
    assert "test_torch_copier.py::test_transfer_from_file_to_device" in printed
    (skipped,) = (line for line in collected if line.startswith("SKIPPED"))
    assert "test_triton_kernels.py" in skipped
    assert "could not import 'vllm'" in skipped
