"""What runs on a machine that has torch, numpy and pytest, but not vLLM: tests, and our kernels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MISSING = (
    *("vllm", "transformers", "tokenizers", "safetensors", "huggingface_hub"),
    *("prometheus_client", "matplotlib", "psutil"),
)
WITHOUT = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {MISSING!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""
PYTEST = """
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""
SCRIPT = """
import runpy
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def without_vllm(program: str, directory: Path, *arguments: str) -> str:
    """What a program printed, called from outside of the project."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + program, *arguments],
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
    options = ("--rootdir", str(ROOT), "--collect-only")
    return without_vllm(PYTEST, outside, *options, copier, kernels).splitlines()


def test_tests_that_need_vllm_are_left_out_and_those_of_the_copier_are_not(
    collected: list[str],
) -> None:
    printed = "\n".join(collected)
    assert "test_torch_copier.py::test_every_byte_arrives_and_no_other_changes" in printed
    assert "test_torch_copier.py::test_transfer_from_file_to_device" in printed
    (skipped,) = (line for line in collected if line.startswith("SKIPPED"))
    assert "test_triton_kernels.py" in skipped
    assert "could not import 'vllm'" in skipped


@pytest.mark.parametrize(
    ("script", "arguments", "found"),
    [
        ("gpu_kernels.py", [], "rule"),
        ("gpu_link.py", ["--record-bytes", "4096", "--lock-gb", ".001", "--sweep"], "link"),
    ],
)
def test_kernels_are_tried_without_vllm(
    script: str, arguments: list[str], found: str, tmp_path: Path
) -> None:
    path = str(ROOT / "scripts" / script)
    printed = without_vllm(SCRIPT, tmp_path, path, "--device", "cpu", *arguments)
    last = json.loads(printed.splitlines()[-1])
    assert last["name"] == found
