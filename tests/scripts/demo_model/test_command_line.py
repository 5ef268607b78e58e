"""The command line writes what the function writes, and refuses what cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.demo_model.__main__ import main
from tests.scripts.demo_model.checkpoints import TINY, TWO_ARCHS, digests

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("arch", TWO_ARCHS)
def test_same_seed_same_bytes(tiny: dict[str, Path], arch: str, tmp_path: Path) -> None:
    # Another process, with another hash seed and other threads, through the command line.
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "scripts.demo_model",
            tmp_path / "m",
            "--arch",
            arch,
            *flags,
        ],
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"},
    )
    assert digests(tmp_path / "m") == digests(tiny[arch])


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--hidden", "100"], ["hidden is 100", "multiple of 32"]),
        (["--intermediate", "33"], ["intermediate is 33", "multiple of 32"]),
        (["--hidden", "0"], ["hidden is 0", "multiple of 32"]),
        (["--layers", "0"], ["layers is 0", "at least 1"]),
        (["--arch", "deepseek_v2", "--layers", "1"], ["layers is 1", "at least 2"]),
        (["--experts", "1"], ["experts is 1", "at least 2"]),
        (["--top-k", "17"], ["top-k is 17", "between 1 and experts (16)"]),
        (["--top-k", "0"], ["top-k is 0", "between 1"]),
        (["--experts-gb", "-1"], ["experts-gb is -1", "positive"]),
        (["--experts-gb", "nan"], ["experts-gb is nan", "positive"]),
        (["--experts-gb", "1e9"], ["experts-gb is 1e+09", "the nearest has"]),
        (["--experts-gb", "1", "--hidden", "100"], ["hidden is 100", "multiple of 32"]),
        (["--arch", "llama"], ["llama", "mixtral", "gpt_oss"]),
        (["--layers", "two"], ["--layers", "two"]),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    with pytest.raises(SystemExit) as stop:
        main([str(out), *arguments])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert all(part in message for part in parts), message
    assert not out.exists()
