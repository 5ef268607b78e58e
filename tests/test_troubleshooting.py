"""docs/troubleshooting.md: its messages are the source's, and none that users meet is missing."""

import ast
import functools
import re
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.messages.elsewhere import ELSEWHERE
from tests.messages.engine import ENGINE
from tests.messages.page import entries, fits, rows
from tests.messages.program import PROGRAM
from tests.messages.serve import SERVE

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vllm_moe_offload"

PROBLEMS = {
    "supported.py",
    "supported_gpu.py",
    "lora.py",
    "formats.py",
    "cpu_kernels.py",
    "speculation.py",
    "split.py",
}
"""Modules that yield what is in the way, a line each."""
USER_ERRORS = {
    "OptionError",
    "StartError",
    "StoreError",
    "DamagedStore",
    "TransferError",
    "UnsupportedVLLM",
    "CollectionError",
    "ReplayError",
    "TraceError",
    "ShapeError",
    "UsageError",
    "ArgumentTypeError",
    "MemoryError",
    "PageLockError",
    "ImportError",
    "NotImplementedError",
    "Problem",
}
PARTS = {"remedy", "_remedy", "reason"}
"""Variables and functions that hold a part of a message."""


def template(node, parts=MappingProxyType({})):
    """The literal text of a message, with ``...`` for what is filled in; None if there is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[ds]", "...", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_part(value, parts) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (template(node.left, parts) or "...") + (template(node.right, parts) or "...")
    return None


def _part(value, parts):
    if isinstance(value, ast.Constant):
        return str(value.value)
    inner = value.value.func if isinstance(value.value, ast.Call) else value.value
    return parts.get(getattr(inner, "id", None), "...")


def parts_of(tree):
    """The templates of a module's message parts, by name."""
    parts = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, node.value
        elif isinstance(node, ast.FunctionDef) and isinstance(node.body[-1], ast.Return):
            name, value = node.name, node.body[-1].value
        else:
            continue
        if name in PARTS and (text := template(value)) is not None:
            parts[name] = text
    return parts


def name_of(call):
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


@functools.cache
def sources():
    return list(_sources())


def _sources():
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        yield path, tree, parts_of(tree)


@functools.cache
def all_texts():
    """Every string of the package, as a template, in one line."""
    return [
        text.replace("\n", " ")
        for _, tree, parts in sources()
        for node in ast.walk(tree)
        if (text := template(node, parts)) is not None
    ]


def user_messages():
    """Where, and what: messages of errors and warnings that reach users."""
    for path, tree, parts in sources():
        where = path.relative_to(PACKAGE)
        for node in ast.walk(tree):
            texts = []
            if isinstance(node, ast.Call) and node.args:
                if name_of(node) in USER_ERRORS or name_of(node) in {"warning", "error"}:
                    texts = [template(node.args[0], parts)]
            elif isinstance(node, ast.FunctionDef) and node.name in {"_explain"}:
                # What such a function returns is raised elsewhere as it is.
                texts = [
                    template(inner, parts)
                    for inner in ast.walk(node)
                    if isinstance(inner, ast.JoinedStr)
                    and " " in (template(inner, parts) or "")
                ]
            elif isinstance(node, ast.Yield) and path.name in PROBLEMS:
                texts = [template(node.value, parts)]
            for text in texts:
                if text is not None and text.strip(". :"):
                    yield f"{where}:{node.lineno}", text


def is_distinctive(entry):
    return any(len(part.strip()) >= 8 for part in entry.split("..."))


@pytest.mark.parametrize("entry", entries())
def test_every_message_on_the_page_is_in_the_source(entry):
    if not is_distinctive(entry):
        pytest.fail(f"{entry!r} names no message")
    assert any(fits(entry, text) for text in all_texts()), (
        f"{entry!r} is in no string of the package"
    )


@pytest.mark.parametrize(("where", "text"), user_messages(), ids=lambda value: value[:60])
def test_every_message_of_the_source_is_on_the_page(where, text):
    text = text.replace("\n", " ")
    found = [entry for entry in entries() if is_distinctive(entry) and fits(entry, text)]
    assert found, f"{where}: {text!r} is not in docs/troubleshooting.md"


def test_messages_are_found_at_all():
    texts = [text for _, text in user_messages()]
    assert len(texts) > 80
    assert any("cannot write the expert store" in text for text in all_texts())


PROVOKED = {**SERVE, **PROGRAM, **ENGINE}


@pytest.mark.parametrize("message", [row for row, _ in rows()])
def test_every_message_is_provoked_or_it_is_said_why_not(message):
    """The tables that `tests/cli` and `tests/integration` run."""
    assert (message in PROVOKED) != any(part in message for part in ELSEWHERE)


def test_the_tables_know_no_message_that_is_not_on_the_page():
    page = [row for row, _ in rows()]
    assert not PROVOKED.keys() - set(page)
    assert not [part for part in ELSEWHERE if not any(part in row for row in page)]


@pytest.mark.parametrize("reason", sorted(set(ELSEWHERE.values())))
def test_the_test_that_has_it_instead_exists(reason):
    for path, _, name in (where.partition("::") for where in re.findall(r"tests/\S+", reason)):
        assert f"def {name}" in (ROOT / path).read_text()
