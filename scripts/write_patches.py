"""Writes docs/patches.md: what of vLLM the plugin changes, and why (`make docs`).

    python scripts/write_patches.py [--check]

The page is made from the comments beside the patches in vllm_moe_offload/integration:

    # Owner.name, .other_name (file of vLLM), Owner.name (another file)
    #   why: ...
    #   upstream: ...
    #   remove when: ...

Every call of ``wrap``, and every assignment that puts a function in the place of vLLM's, has one
in the same file, and every such comment has its patch. --check writes nothing and exits with
1 if the page is not current.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INTEGRATION = ROOT / "vllm_moe_offload" / "integration"
PAGE = ROOT / "docs" / "patches.md"
FIELDS = ("why", "upstream", "remove when")
PLACE = re.compile(r"(\w+)\.(\w+)((?:, \.\w+)*) \(([\w/., ]+)\)")

HEAD = """\
<!-- Written by scripts/write_patches.py (`make docs`) from the comments beside the patches in
     vllm_moe_offload/integration. Edit them there. -->

# What of vLLM is changed

No file of vLLM is touched. The plugin replaces the functions below in memory, and all but two of
its replacements call the original: reloading weights is refused, and weights that are in kernel form
already are left alone. Files are those of the installed `vllm`, and one of `prometheus_client`.

| installed by | in which processes |
|---|---|
| `arguments.py`, `install_worker_hook`, `install_failure_hooks` | all |
| `install_model_patches`, `install_runner_patches`, `loading.py` | workers with offload |
| `remote_counters.py: install_in_worker` | workers with offload |
| `lora_adapters.py` | workers with offload and LoRA |
| `ray_shutdown.py` | workers with offload, on Ray |
| `shared_memory.py` | workers with offload, on a CPU |
| `cpu_kernels.py` | workers with offload and `cpu_kernels=avx512` |
| `install_cuda_patches`, `marlin_slots.py` | workers with offload, on a GPU |
| `draft_passes.py` | workers with offload and speculative decoding |
| `endpoint.py` | servers with offload |
| `ended_ranks.py` | engine cores with offload |
| `verified.py` | engine cores with offload and speculative decoding |
| `remote_counters.py: begin` | engine cores with offload, and workers on other hosts |

With `off`, or without `--moe-offload`, only the first row is there: options are added, and each of
its other replacements looks at the mode and calls the original. Models, kernels, loaders and runners
are vLLM's own.

A vLLM that lacks one of these functions is refused by name
([troubleshooting.md](troubleshooting.md)).
[CONTRIBUTING.md](../CONTRIBUTING.md#a-new-version-of-vllm) says how a new one is tried.

| what | why | nearest thing in vLLM | no longer needed when | installed by |
|---|---|---|---|---|
"""

TAIL = """
Some of vLLM's settings are changed as well. On a GPU `moe_backend` becomes `triton` or `marlin`, by
the checkpoint's format ([architecture.md](architecture.md#on-a-gpu)). Where the host plans,
`cudagraph_mode` becomes `NONE`; where the GPU plans with fewer slots than a layer has experts,
graphs are captured for small batches only. On a CPU
`gpu_memory_utilization` (of RAM) is lowered to what there is, unless it or
`--kv-cache-memory-bytes` was given. With `record_trace`, `shutdown_timeout` becomes 60 s if it was 0.

The patches of `vllm bench` ([benchmarks.md](benchmarks.md)) are the only ones that change files, and
only if you apply them.
"""


class PatchesError(Exception):
    """A patch without its comment, a comment without its patch, or one that cannot be read."""


@dataclass(frozen=True)
class Place:
    """A function or method: its class or module, its name, and the file where that is."""

    owner: str
    name: str
    file: str


@dataclass(frozen=True)
class Block:
    """One comment: what is patched, its fields by name, and where it is installed."""

    places: tuple[Place, ...]
    fields: dict[str, str]
    installer: str


def blocks() -> list[Block]:
    """The comments beside all patches, in the order of files.

    Raises:
        PatchesError: a patch without a comment, or the other way round; names file and patch.
    """
    files = [path for path in sorted(INTEGRATION.glob("*.py")) if path.name != "patching.py"]
    return [block for path in files for block in blocks_of(path.name, path.read_text())]


def blocks_of(file: str, source: str) -> list[Block]:
    """The comments in the source of one file. See :func:`blocks`."""
    try:
        patched = dict(_patched(ast.parse(source)))
        found = [
            Block(places, fields, f"{file}: {patched[places[0].name]}")
            for places, fields in _comments(source, patched)
        ]
    except PatchesError as error:
        raise PatchesError(f"{file}: {error}") from error
    told = {place.name for block in found for place in block.places}
    for name, installer in patched.items():
        if name not in told:
            raise PatchesError(f"{file}: {installer} patches {name}, and no comment says why")
    return found


def _patched(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Names that are replaced in vLLM, each with the function that does it."""
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}

    def visit(node: ast.AST, installer: str) -> Iterator[tuple[str, str]]:
        name = None
        if isinstance(node, ast.Call):
            name = _wrapped(node)
        elif isinstance(node, ast.Assign):
            name = _assigned(node, functions)
        elif isinstance(node, ast.FunctionDef):
            installer = node.name
        if name is not None:
            yield name, installer
        for child in ast.iter_child_nodes(node):
            yield from visit(child, installer)

    return visit(tree, "import")


def _wrapped(call: ast.Call) -> str | None:
    """The name that a call of ``wrap`` replaces."""
    called = getattr(call.func, "attr", getattr(call.func, "id", None))
    if called == "setattr":
        raise PatchesError(f"line {call.lineno}: setattr hides what is patched; use wrap")
    if called != "wrap":
        return None
    name = call.args[1]
    if not (isinstance(name, ast.Constant) and isinstance(name.value, str)):
        raise PatchesError(f"line {call.lineno}: the name given to wrap must be a literal")
    return name.value


def _assigned(node: ast.Assign, functions: set[str]) -> str | None:
    """The attribute that becomes one of ``functions``, as in ``SomeClass.method = function``."""
    (target, *others) = node.targets
    if others or not isinstance(target, ast.Attribute) or not isinstance(node.value, ast.Name):
        return None
    is_own = ast.unparse(target.value) == "self"
    return target.attr if node.value.id in functions and not is_own else None


def _comments(
    source: str, patched: Collection[str]
) -> Iterator[tuple[tuple[Place, ...], dict[str, str]]]:
    """Places and fields of every comment that has a ``why``."""
    heading: list[str] = []
    fields: dict[str, str] = {}
    field = ""
    for line in [*source.splitlines(), ""]:
        comment = re.fullmatch(r"\s*#(?: ( *)(.*))?", line)
        depth, text = (len(comment[1] or ""), comment[2] or "") if comment else (0, "")
        if fields and depth == 0:  # the next heading, or the end of the comment
            yield _places(" ".join(heading), patched), _complete(fields, heading)
            heading, fields = [], {}
        if not text or text.startswith("---"):
            heading = []
        elif depth == 0:
            heading.append(text)
        elif depth == 2:
            field, _, text = text.partition(": ")
            if field in FIELDS:
                fields[field] = text
        elif field in fields:
            fields[field] += f" {text}"


def _places(heading: str, patched: Collection[str]) -> tuple[Place, ...]:
    places = tuple(
        Place(owner, name, file)
        for owner, first, others, files in PLACE.findall(heading)
        for name in (first, *re.findall(r"\w+", others))
        for file in files.split(", ")
    )
    if not places:
        raise PatchesError(f"not of the form Owner.name (file): {heading!r}")
    for place in places:
        if place.name not in patched:
            raise PatchesError(f"a comment on {place.name}, which nothing here patches")
    return places


def _complete(fields: dict[str, str], heading: list[str]) -> dict[str, str]:
    for name in FIELDS:
        if not fields.get(name):
            raise PatchesError(f"no {name!r} in the comment on {' '.join(heading)}")
    return fields


def page() -> str:
    """The whole document."""
    return HEAD + "".join(_row(block) for block in blocks()) + TAIL


def _row(block: Block) -> str:
    names = dict.fromkeys(f"`{place.owner}.{place.name}`" for place in block.places)
    files = dict.fromkeys(f"`{place.file}`" for place in block.places)
    what = f"{', '.join(names)} in {', '.join(files)}"
    cells = [what, *(block.fields[name] for name in FIELDS), f"`{block.installer}`"]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n"


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare only")
    arguments = parser.parse_args()
    try:
        text = page()
    except PatchesError as error:
        print(f"{INTEGRATION.relative_to(ROOT)}/{error}", file=sys.stderr)
        return 1
    if arguments.check:
        if PAGE.exists() and PAGE.read_text() == text:
            return 0
        print(f"{PAGE.relative_to(ROOT)} is not current: run `make docs`", file=sys.stderr)
        return 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
