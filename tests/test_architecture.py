"""Who may import whom (docs/architecture.md), checked on the source."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAME = "vllm_moe_offload"
ROOMS = [
    {"config", "files", "native", "step", "rank"},
    {"trace", "cache"},
    {"forecast", "store"},
    {"policy"},
    {"transfer", "metrics"},
    {"layer_calls", "device"},
    {"runtime", "replay", "plan"},
    {"integration", "cli"},
]
"""From the ground up: a room imports from itself and from rooms below it."""
RANK = {name: rank for rank, names in enumerate(ROOMS) for name in names}
NO_TORCH = {
    *(
        "config",
        "files",
        "native",
        "step",
        "rank",
        "trace",
        "cache",
        "forecast",
        "store",
        "device",
        "policy",
        "replay",
        "metrics",
    ),
}
TORCH_ALLOWED = {
    f"{NAME}.cache.pool",
    f"{NAME}.store.checkpoint_reader",
    f"{NAME}.device.cache",
    f"{NAME}.device.runtime",
    f"{NAME}.device.tokens",
    f"{NAME}.forecast.lookahead",
}
"""Tensors are what these are about."""
TRITON_ALLOWED = {f"{NAME}.device.kernels"}
WITH_TRITON = TRITON_ALLOWED | {f"{NAME}.device.cache"}
"""What cannot be imported where Triton is missing, as beside vLLM for CPUs."""
STARTS_TRITON = {f"{NAME}.integration.gpu_memory"}
"""What imports that when a GPU is served, and not before."""
STRANGERS = {("trace", "policy"), ("policy", "trace")}
"""Rooms that do not know of each other, whatever their rank."""


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / NAME).rglob("*.py"))}


def room_of(module):
    return module.split(".")[1] if "." in module else "__init__"


def imports(path):
    """Every module that a file imports, at its top or in a function, with names taken from it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in MODULES:
                    yield submodule, None
                else:
                    yield node.module, alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    room = room_of(module)
    for imported, name in imports(MODULES[module]):
        top = imported.split(".")[0]
        assert top != "vllm" or room == "integration", f"{module} imports {imported}"
        if top == "torch" and room in NO_TORCH:
            assert module in TORCH_ALLOWED, f"{module} imports torch"
        if top == "triton":
            assert module in TRITON_ALLOWED, f"{module} imports triton"
        if imported in WITH_TRITON:
            assert module in WITH_TRITON | STARTS_TRITON, (
                f"{module} imports {imported}, which needs Triton"
            )
        if imported in MODULES and imported != NAME and room != "__init__":
            other = room_of(imported)
            assert RANK[other] <= RANK[room], f"{module} imports {imported}: it is above"
            assert (room, other) not in STRANGERS, f"{module} imports {imported}"
            private = name is not None and name.startswith("_") and not name.startswith("__")
            assert not private, f"{module} imports {name} of {imported}"


def test_no_file_imports_itself_through_others():
    """Functions that import late included: a circle there is a circle."""
    graph = {
        module: {other for other, _ in imports(path) if other in MODULES and other != NAME}
        for module, path in MODULES.items()
    }
    done, under_way = set(), []

    def visit(module):
        if module in under_way:
            circle = [*under_way[under_way.index(module) :], module]
            raise AssertionError(f"a circle: {' -> '.join(circle)}")
        if module not in done:
            under_way.append(module)
            for other in sorted(graph[module] - {module}):
                visit(other)
            done.add(under_way.pop())

    for module in graph:
        visit(module)


def test_every_module_has_a_room():
    for module in MODULES:
        assert module == NAME or room_of(module) in RANK, f"{module} is in no room of this test"


def test_rooms_exist():
    assert {room_of(module) for module in MODULES if module != NAME} == RANK.keys()


def test_a_wheel_holds_every_data_file() -> None:
    """setuptools leaves out silently what it was told of under a wrong name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    package = ROOT / NAME
    files = {
        str(path.relative_to(package))
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc", ".so"}
    }
    assert files == set(project["tool"]["setuptools"]["package-data"][NAME])
