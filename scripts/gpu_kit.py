"""Packs everything of ours that runs on a CUDA machine where nothing can be fetched or built.

    make gpu-kit                      build/gpu-kit/ and build/gpu-kit.tar.xz
    python scripts/gpu_kit.py --pieces DIR

In the kit: the package with its native library and ``*.egg-info`` (vLLM finds the plugin by it),
tests, scripts, and kit.json, which names the commit. Nothing of ours is compiled for a GPU, or
against a Python or a torch. ``site`` has what the package needs and a
machine with torch may lack, for one version of Python. What is needed beside the kit there: torch,
and stock vLLM with its requirements, whose packed pieces lie in --pieces.

Checks that the kit is small, and that with the largest piece and this tree it fits into one transfer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.harness.machine import commit  # noqa: E402

KIT = ROOT / "build" / "gpu-kit"
FOLDERS = ("vllm_moe_offload", "tests", "scripts")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
"""What pytest, the egg-info and a reader there want."""
CARRIED = ("pydantic", "pydantic_core", "annotated-types", "typing-inspection")
"""Packages in ``site``, of the versions in the lock."""
LOCK = ROOT / "requirements" / "cpu.lock"
PLATFORMS = ("manylinux_2_17_x86_64", "manylinux2014_x86_64")
LIBRARY = "_core.so"
MOST_KIT_BYTES = 8_000_000
MOST_TRANSFER_BYTES = 64 << 20
"""Of one transfer: kit, one piece, and the tracked tree."""
LARGEST_PIECE_BYTES = 56_000_000
"""Assumed where no pieces are at hand to be looked at: they are made to stay under it."""

LISTED = (
    "git",
    "-C",
    str(ROOT),
    "ls-files",
    "-z",
    "--cached",
    "--others",
    "--exclude-standard",
)


class KitError(RuntimeError):
    """The kit is incomplete or too large; the message says what to do."""


def tracked(*paths: str) -> list[Path]:
    """Files that git tracks or would, and that are there, relative to the root."""
    listed = subprocess.run(
        [*LISTED, "--", *paths],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).exists()]


def collect(kit: Path) -> None:
    """Copies sources and makes the egg-info; the native library is in the kit before."""
    for file in tracked(*FOLDERS, *FILES):
        target = kit / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, target)
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(kit)],
        cwd=ROOT,
        check=True,
    )
    (kit / "setup.py").unlink()  # nothing is built there
    state = commit()
    name = f"{state['commit']}{'-dirty' if state['dirty'] else ''}"
    (kit / "kit.json").write_text(
        json.dumps({"commit": name, "made": time.strftime("%Y-%m-%dT%H:%M:%S%z")}) + "\n"
    )


def strip_library(kit: Path) -> None:
    """The native library, stripped, into the kit's package."""
    package = kit / "vllm_moe_offload"
    package.mkdir(parents=True)
    library = ROOT / "vllm_moe_offload" / LIBRARY
    if not library.exists():
        raise KitError(f"{library.relative_to(ROOT)} is missing: run `make setup`")
    subprocess.run(["strip", "-o", str(package / LIBRARY), str(library)], check=True)


def carry(site: Path, python_version: str) -> None:
    """Puts CARRIED into a folder, for a Python that need not be this one."""
    locked = {
        line.partition("==")[0].lower().replace("-", "_"): line.split()[0]
        for line in LOCK.read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"),
            *("--only-binary=:all:", "--implementation", "cp"),
            *("--python-version", python_version, "--target", str(site)),
            *(word for platform in PLATFORMS for word in ("--platform", platform)),
            *(locked[name.replace("-", "_")] for name in CARRIED),
        ],
        check=True,
        stderr=subprocess.PIPE,
        text=True,
    )


def pack(kit: Path) -> Path:
    """``<kit>.tar.xz``, with the same bytes for the same kit."""
    packed = kit.parent / f"{kit.name}.tar.xz"

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if "__pycache__" in entry.name:
            return None
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry

    with tarfile.open(packed, "w:xz", preset=9) as archive:
        archive.add(kit, arcname=kit.name, filter=plain)
    return packed


def check_sizes(kit_bytes: int, tree_bytes: int, pieces: list[Path]) -> list[str]:
    """What to tell; raises KitError for what is too large."""
    largest = max((piece.stat().st_size for piece in pieces), default=LARGEST_PIECE_BYTES)
    total = kit_bytes + tree_bytes + largest
    told = [
        f"kit packed: {kit_bytes / 1e6:.2f} MB of {MOST_KIT_BYTES / 1e6:g} MB",
        f"largest piece of vLLM: {largest / 1e6:.2f} MB"
        + ("" if pieces else " (assumed: there is none to look at)"),
        f"tracked tree: {tree_bytes / 1e6:.2f} MB",
        f"in one transfer: {total / 2**20:.1f} of {MOST_TRANSFER_BYTES >> 20} MiB",
    ]
    if kit_bytes > MOST_KIT_BYTES:
        raise KitError(f"too large: {told[0]}")
    if total > MOST_TRANSFER_BYTES:
        raise KitError(f"too large: {'; '.join(told)}")
    return told


def main() -> int:
    """Exit status 1 where the kit is incomplete or too large."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pieces",
        type=Path,
        default=ROOT / ".bundle",
        help="folder with packed pieces of vLLM (*.tar.xz; default: .bundle)",
    )
    parser.add_argument("--python-version", default="3.12", help="there (default: 3.12)")
    args = parser.parse_args()
    began = time.monotonic()
    shutil.rmtree(KIT, ignore_errors=True)
    try:
        strip_library(KIT)
        collect(KIT)
        carry(KIT / "site", args.python_version)
        packed = pack(KIT)
        tree_bytes = sum((ROOT / file).stat().st_size for file in tracked())
        told = check_sizes(
            packed.stat().st_size, tree_bytes, sorted(args.pieces.glob("*.tar.xz"))
        )
    except KitError as error:
        print(f"gpu-kit: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"gpu-kit: {error}\n{error.stderr or ''}", file=sys.stderr)
        return 1
    size = (KIT / "vllm_moe_offload" / LIBRARY).stat().st_size
    print(f"{LIBRARY}: {size / 1e6:.2f} MB")
    files = [path for path in KIT.rglob("*") if path.is_file()]
    print(f"{KIT.relative_to(ROOT)}: {len(files)} files")
    print(f"{packed.relative_to(ROOT)}: made in {time.monotonic() - began:.0f} s")
    print("\n".join(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
