"""Files and functions that docs/architecture.md names are where it says."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "architecture.md").read_text()
PLACES = (ROOT, ROOT / "vllm_moe_offload", ROOT / "docs")
PATHS = sorted(
    set(re.findall(r"`([\w/.*-]+\.(?:py|h|cpp|sh|md))`", TEXT))
    | set(re.findall(r"`((?:[\w-]+/)+)`", TEXT))
)
SHORT = {path.name for path in (ROOT / "vllm_moe_offload").rglob("*.py")}
"""In the table of modules a file is named within the row of its folder."""
CALLS = re.findall(r"`([\w/]+\.(?:py|cpp))`: ((?:`\w+`(?:, | -> )?)+)", TEXT)


@pytest.mark.parametrize("path", PATHS)
def test_what_is_named_exists(path):
    found = any(list(place.glob(path.rstrip("/"))) for place in PLACES)
    assert found or path in SHORT, f"docs/architecture.md names {path}"


def test_functions_are_looked_for():
    assert len(CALLS) >= 12


@pytest.mark.parametrize(("path", "names"), CALLS)
def test_functions_are_where_the_page_says(path, names):
    (file,) = [place / path for place in PLACES if (place / path).exists()]
    source = file.read_text()
    for name in re.findall(r"\w+", names):
        if file.suffix == ".py":
            defined = {getattr(node, "name", None) for node in ast.walk(ast.parse(source))}
            assert name in defined, f"{path} has no {name}"
        else:
            assert re.search(rf"\b{name}\(", source), f"{path} has no {name}"
