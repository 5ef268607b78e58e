"""Every patch of vLLM has a comment that says why, and docs/patches.md has them all."""

import pytest

from scripts.write_patches import FIELDS, PAGE, PatchesError, blocks, blocks_of, page

COMMENT = """\
# Loader.load, .read (model_loader/loader.py), Runner.run (v1/a.py, v1/b.py)
#   why: it must be
#     known.
#   upstream: nothing.
#   remove when: it is told.
"""
PATCHES = """\
def install():
    wrap(Loader, "load", ours)
    patching.wrap(Loader, "read", ours)
    Runner.run = ours


def ours(original):
    self.kept = ours
"""


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "run `make docs`"


def test_a_comment_names_places_and_reasons() -> None:
    (block,) = blocks_of("some.py", COMMENT + PATCHES)
    assert [(place.owner, place.name, place.file) for place in block.places] == [
        ("Loader", "load", "model_loader/loader.py"),
        ("Loader", "read", "model_loader/loader.py"),
        ("Runner", "run", "v1/a.py"),
        ("Runner", "run", "v1/b.py"),
    ]
    assert block.fields == {
        "why": "it must be known.",
        "upstream": "nothing.",
        "remove when": "it is told.",
    }
    assert block.installer == "some.py: install"


def test_comments_follow_each_other_with_and_without_a_line_between() -> None:
    one = COMMENT.replace(", .read", "").replace(", Runner.run (v1/a.py, v1/b.py)", "")
    two = one.replace("Loader.load", "Loader.read")
    three = one.replace("Loader.load (", "Runner.run (")
    ruler = f"# {'-' * 60}\n"
    found = blocks_of("some.py", f"{ruler}{one}{two}\n# A note.\n\n{three}{PATCHES}")
    assert [block.places[0].name for block in found] == ["load", "read", "run"]


def test_a_comment_within_a_function_counts_too() -> None:
    inside = "".join(f"    {line}\n" for line in COMMENT.splitlines())
    body = PATCHES.replace("def install():\n", f"def install():\n{inside}")
    assert len(blocks_of("some.py", body)) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (PATCHES, "install patches load, and no comment says why"),
        (COMMENT + PATCHES.replace("Runner.run =", "Runner.walk ="), "run, which nothing"),
        (COMMENT + PATCHES + "    Loader.close = ours\n", "ours patches close, and no comment"),
        (COMMENT + PATCHES + "wrap(Loader, 'stop', ours)\n", "import patches stop"),
        (COMMENT.replace("upstream", "above") + PATCHES, "no 'upstream' in the comment"),
        (COMMENT.replace(" (v1/a.py, v1/b.py)", "") + PATCHES, "patches run, and no comment"),
        (COMMENT.replace("(", "in ").replace(")", "") + PATCHES, "not of the form"),
        (COMMENT + PATCHES + "setattr(Loader, 'x', ours)\n", "line 14: setattr hides"),
        (COMMENT + PATCHES + "wrap(Loader, name, ours)\n", "line 14: the name given to wrap"),
    ],
)
def test_what_is_not_in_order_is_named(source: str, message: str) -> None:
    with pytest.raises(PatchesError, match=message) as raised:
        blocks_of("some.py", source)
    assert str(raised.value).startswith("some.py: ")


def test_every_row_says_everything() -> None:
    found = blocks()
    assert len(found) >= 16
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    for block in found:
        (row,) = [row for row in rows if row.endswith(f"| {_cells(block)} |")]
        assert all(f"`{place.owner}.{place.name}`" in row for place in block.places)


def _cells(block) -> str:
    return " | ".join([*(block.fields[name] for name in FIELDS), f"`{block.installer}`"])
