"""Who may import whom (docs/architecture.md), checked on the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "vllm_moe_offload"
LAYERS = [
    {"config", "layout", "native", "host_memory"},
    {"policy", "trace", "reference"},
    {
        "cache",
        "store",
        "transfer",
        "predictor",
        "shadow",
        "pool",
        "sizing",
        "machine",
        "metrics",
    },
    {"prefetch", "lookahead", "tensor_stream"},
    {"shapes", "layer_calls"},
    {"runtime", "replay", "fit"},
    {"integration", "cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
NO_TORCH = {
    *("policy", "trace", "cache", "store", "config", "layout", "native", "replay"),
    "host_memory",
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, []


@pytest.mark.parametrize(
    ("path", "part"), modules(), ids=lambda value: getattr(value, "name", value)
)
def test_imports_point_down(path, part):
    for module, names in imports(path):
        top, *rest = module.split(".")
        assert top != "vllm" or part == "integration", f"{path} imports {module}"
        if part in NO_TORCH:
            assert top != "torch", f"{path} imports torch"
        if top != "vllm_moe_offload" or part in {"__init__", "cli"}:
            continue
        imported = rest[0] if rest else None
        if imported in {None, part}:
            continue
        assert RANK[imported] <= RANK[part], f"{path} imports {module}: against the direction"
        private = [name for name in names if name.startswith("_")]
        assert not private, f"{path} imports {private} of {module}"


def test_every_module_has_a_place():
    for path, part in modules():
        assert part == "__init__" or part in RANK, f"{path} is in no layer of this test"
