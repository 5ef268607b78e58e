"""Messages of docs/troubleshooting.md that `vllm-moe-offload` has: one line, status 2."""

from __future__ import annotations

import pytest

from tests.messages.page import fits
from tests.messages.program import PROGRAM
from vllm_moe_offload import cli


@pytest.mark.parametrize("message", PROGRAM)
def test_wrong_arguments_and_files_are_one_line(message, tmp_path, capsys):
    assert cli.main(PROGRAM[message](tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert fits(message, line)
