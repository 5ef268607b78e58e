"""Files and functions that docs/architecture.md names are where it says, and links lead somewhere."""

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


PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
LINKS = [
    (page, link)
    for page in PAGES
    for link in dict.fromkeys(re.findall(r"\]\(([^)\s]+)\)", page.read_text()))
    if not link.startswith("https://")
]


def anchors(page):
    """Names of a page's headings in links, as hosts of Markdown make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    ("page", "link"), LINKS, ids=lambda value: getattr(value, "name", value)
)
def test_links_lead_somewhere(page, link):
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    assert target.exists(), f"{page.name} links to {path}"
    assert not anchor or anchor in anchors(target), f"{target.name} has no heading #{anchor}"
