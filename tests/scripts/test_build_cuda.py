"""scripts/build_cuda.sh: which nvcc compiles the CUDA library."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "build_cuda.sh"
COMPILER = """\
#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release of the double"; exit; fi
echo "$0 $*" >{asked}
while [ "$1" != -o ]; do shift; done
: >"$2"
"""


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A PATH with what the script calls, and no nvcc."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("bash", "dirname", "mv", "sed"):
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    return folder


def compiler(path: Path, asked: Path) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text(COMPILER.format(asked=asked))
    path.chmod(0o755)
    return path


def build(tmp_path: Path, tools: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, tmp_path / "out.so", "90"],
        check=False,
        capture_output=True,
        text=True,
        env={"PATH": str(tools), "PYTHON": sys.executable, **environment},
    )


def test_the_compiler_of_the_wheels_is_found(tmp_path: Path, tools: Path) -> None:
    wheels = tmp_path / "site" / "nvidia" / "cu13"
    nvcc = compiler(wheels / "bin" / "nvcc", tmp_path / "asked")
    done = build(tmp_path, tools, PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith(f"{nvcc} ")
    assert f"-I {wheels}/include" in asked
    assert "release of the double" in done.stdout
    assert (tmp_path / "out.so").exists()


def test_a_compiler_that_is_named_comes_first(tmp_path: Path, tools: Path) -> None:
    compiler(tmp_path / "site" / "nvidia" / "cu13" / "bin" / "nvcc", tmp_path / "not asked")
    named = compiler(tmp_path / "named" / "nvcc", tmp_path / "asked")
    done = build(tmp_path, tools, PYTHONPATH=str(tmp_path / "site"), NVCC=str(named))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "asked").read_text().startswith(f"{named} ")
    assert str(tmp_path / "site") not in (tmp_path / "asked").read_text()


def test_without_one_it_is_said_where_to_get_it(tmp_path: Path, tools: Path) -> None:
    python = tmp_path / "python"  # one that has no wheels
    python.write_text("#!/bin/sh\necho\n")
    python.chmod(0o755)
    done = build(tmp_path, tools, PYTHON=str(python))
    assert done.returncode == 1
    assert "pip install --no-deps -r requirements/cuda-compiler.lock" in done.stderr
    assert not (tmp_path / "out.so").exists()
