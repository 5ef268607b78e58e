"""The core's interface: declared alike in C and in Python, and checked when it is loaded."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_moe_offload import native

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "csrc" / "c_api.h"
STRUCTS = {
    "vmo_completion": native.Completion,
    "vmo_counters": native.Counters,
    "vmo_extent": native.Extent,
    "vmo_layer_call": native.LayerCall,
    "vmo_layer_outcome": native.LayerOutcome,
    "vmo_observer": native.Observer,
    "vmo_planner_view": native.PlannerView,
    "vmo_read": native.Read,
    "vmo_reserved_slot": native.ReservedSlot,
    "vmo_value_step": native.ValueStep,
}
NUMBERS = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint32_t": ctypes.c_uint32,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
}


def declarations() -> str:
    """The header without comments."""
    return re.sub(r"//.*", "", HEADER.read_text())


def compiled(directory: Path, source: str, *flags: str) -> Path:
    path = directory / "out"
    command = ["g++", "-x", "c", "-std=c11", f"-I{HEADER.parent}", *flags, "-", "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True)
    return path


def test_structs_are_laid_out_alike(tmp_path: Path) -> None:
    declared = set(re.findall(r"typedef struct (\w+) \{", declarations()))
    assert declared == set(STRUCTS)
    lines, expected = [], []
    for name, struct in STRUCTS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        expected.append(f"{name} {ctypes.sizeof(struct)}")
        for field, _ in struct._fields_:
            member = f"(({name}*)0)->{field}"
            lines.append(
                f'printf("{name}.{field} %zu %zu\\n", offsetof({name}, {field}), sizeof({member}));'
            )
            where = getattr(struct, field)
            expected.append(f"{name}.{field} {where.offset} {where.size}")
    body = "\n".join(lines)
    includes = '#include <stddef.h>\n#include <stdio.h>\n#include "c_api.h"\n'
    source = f"{includes}int main(void) {{ {body} }}"
    printed = subprocess.run(
        [compiled(tmp_path, source)], capture_output=True, text=True, check=True
    )
    assert printed.stdout.splitlines() == expected


@pytest.mark.parametrize("name", STRUCTS)
def test_fields_have_the_same_types(name: str) -> None:
    body = re.search(rf"typedef struct {name} {{(.*?)}} {name};", declarations(), re.S)
    assert body is not None
    in_c = [line.strip() for line in body[1].split(";") if line.strip()]
    fields = STRUCTS[name]._fields_
    assert len(in_c) == len(fields)
    for text, (field, ctype) in zip(in_c, fields, strict=True):
        kind, named = re.fullmatch(r"(.*[\s*])(\w+)", text).groups()
        assert named == field
        if "*" in kind:
            assert ctype is ctypes.c_void_p or issubclass(ctype, ctypes._Pointer)
        else:
            assert ctype is NUMBERS[kind.strip()], f"{name}.{field}"


def test_functions_take_as_many_arguments() -> None:
    found = re.findall(r"VMO_API [^;(]*?(vmo_\w+)\(([^;]*?)\);", declarations())
    in_c = {
        name: 0 if arguments == "void" else len(arguments.split(","))
        for name, arguments in found
    }
    assert len(found) == HEADER.read_text().count("\nVMO_API ")
    assert in_c == {name: len(parts) for name, (_, parts) in native._SIGNATURES.items()}


def test_the_loaded_core_has_the_number_of_the_header() -> None:
    number = re.search(r"#define VMO_ABI_VERSION (\d+)", HEADER.read_text())
    assert number is not None
    assert native.core.vmo_abi_version() == int(number[1]) == native.ABI_VERSION


def test_no_expert_is_the_headers() -> None:
    assert f"#define VMO_NO_EXPERT ({native.NO_EXPERT})" in HEADER.read_text()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("int vmo_abi_version(void) { return 999; }", 999),
        ("int vmo_last_error(void) { return 0; }", 0),
    ],
    ids=["another number", "from before there was one"],
)
def test_another_interface_is_refused(tmp_path: Path, source: str, found: int) -> None:
    library = compiled(tmp_path, source, "-shared", "-fPIC")
    message = (
        f"the C++ core {library} has interface {found}, this code needs {native.ABI_VERSION}; "
        "build it again: run `pip install -e .` (or `make setup`)"
    )
    with pytest.raises(ImportError, match=re.escape(message)):
        native.load_core(library)
    started = subprocess.run(
        [sys.executable, "-c", "import vllm_moe_offload.native"],
        env={**os.environ, "VMO_CORE_LIBRARY": str(library), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert started.returncode
    assert started.stderr.splitlines()[-1] == f"ImportError: {message}"


def test_a_core_that_is_not_built_is_named(tmp_path: Path) -> None:
    copy = tmp_path / "native.py"
    copy.write_text((ROOT / "vllm_moe_offload" / "native.py").read_text())
    environment = {k: v for k, v in os.environ.items() if k != "VMO_CORE_LIBRARY"}
    started = subprocess.run(
        [sys.executable, copy], env=environment, capture_output=True, text=True, check=False
    )
    assert started.stderr.splitlines()[-1] == (
        "ImportError: the C++ core of vllm-moe-offload is not built: no _core.so in "
        f"{tmp_path}; run `pip install -e .` (or `make setup`)"
    )


def test_the_core_needs_neither_torch_nor_python() -> None:
    """It loads into a Python that imports nothing but ctypes, and is linked with neither."""
    path = native.core._name
    code = f"import ctypes; ctypes.CDLL({path!r}).vmo_abi_version()"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
    # vLLM, where a test before imported it, preloads torch's OpenMP into all that starts.
    bare = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    linked = subprocess.run(
        ["ldd", path], env=bare, capture_output=True, text=True, check=True
    ).stdout
    assert "torch" not in linked
    assert "libpython" not in linked
    undefined = subprocess.run(
        ["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True
    ).stdout
    assert not re.search(r"\b_?Py[A-Z_]", undefined)
