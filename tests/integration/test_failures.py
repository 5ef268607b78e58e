"""How a child's reason becomes the front end's error, and that a command's last line."""

from __future__ import annotations

import argparse
import os
import stat
from types import SimpleNamespace

import pytest

from vllm_moe_offload.config import OptionError
from vllm_moe_offload.integration import failures
from vllm_moe_offload.integration.counters_dir import ENVIRONMENT


@pytest.fixture(autouse=True)
def server_directory(monkeypatch, tmp_path):
    """The directory of a server whose front end is this process."""
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    monkeypatch.setenv("PYTHONWARNINGS", "")
    failures.begin()
    return tmp_path


@pytest.fixture
def as_child(monkeypatch):
    """This process is a child of the front end."""
    monkeypatch.setattr(failures, "_front_end", os.getpid() + 1)


def fail(error):
    def start():
        raise error

    return start


def test_what_works_is_left_alone(as_child):
    assert failures.in_child(lambda x, y: x + y, 1, y=2) == 3
    assert failures.in_front_end(lambda: 3) == 3
    assert failures.known_failure() is None


def test_a_child_leaves_quietly_because_of_an_option(as_child, server_directory):
    with pytest.raises(SystemExit) as caught:
        failures.in_child(fail(OptionError("cache_gb=1:\n too small")))
    assert caught.value.code == failures.OPTION_STATUS
    assert failures.known_failure() == failures.Failure("cache_gb=1: too small", True)
    (left,) = server_directory.iterdir()
    assert stat.S_IMODE(left.stat().st_mode) == 0o600


def test_other_errors_go_on_in_a_child_and_the_first_stays(as_child):
    with pytest.raises(KeyError):
        failures.in_child(fail(KeyError("first")))
    with pytest.raises(ValueError):
        failures.in_child(fail(ValueError("second")))
    assert failures.known_failure() == failures.Failure("KeyError: 'first'", False)


def test_a_child_whose_sibling_failed_for_an_option_is_quiet_too(as_child):
    failures.leave_failure(OptionError("of a rank"))
    with pytest.raises(SystemExit):
        failures.in_child(fail(RuntimeError("workers failed")))


@pytest.mark.parametrize("wait", [failures.in_child, failures.in_front_end])
def test_the_front_end_raises_what_a_child_left(wait):
    failures.leave_failure(OptionError("of a worker"))
    with pytest.raises(OptionError, match=r"^of a worker$"):
        wait(fail(RuntimeError("See root cause above")))
    failures.begin()
    failures.leave_failure(ValueError("no memory"))
    with pytest.raises(failures.StartError, match=r"^the engine did not start: ValueError: no"):
        wait(fail(RuntimeError("See root cause above")))


@pytest.mark.parametrize("error", [OptionError("mine"), RuntimeError("mine")])
def test_in_one_process_errors_reach_the_caller_as_they_are(error):
    with pytest.raises(type(error), match=r"^mine$"):
        failures.in_child(fail(error))


def test_an_ended_engine_is_told_once(caplog, server_directory):
    failures.tell(server_directory)
    assert not caplog.records
    failures.leave_failure(RuntimeError("gone"))
    with pytest.raises(failures.StartError):
        failures.in_front_end(fail(RuntimeError()))
    failures.tell(server_directory)
    assert not caplog.records
    failures.begin()
    failures.leave_failure(RuntimeError("gone"))
    failures.tell(server_directory)
    assert caplog.records[0].getMessage() == "MoE offload: the engine ended: RuntimeError: gone"


@pytest.mark.parametrize(
    ("error", "status"), [(OptionError("wrong"), 2), (failures.StartError("wrong"), 1)]
)
def test_a_command_ends_with_one_line(error, status, capsys):
    def command(_):
        raise error

    parser = SimpleNamespace(prog="vllm")
    chosen = argparse.Namespace(dispatch_function=command, subparser="serve")
    arguments = failures.parse_args(lambda _: chosen, parser)
    with pytest.raises(SystemExit) as caught:
        arguments.dispatch_function(arguments)
    assert caught.value.code == status
    assert capsys.readouterr().err == "vllm serve: error: wrong\n"


def test_other_errors_and_other_parsers_are_left_alone():
    chosen = argparse.Namespace(dispatch_function=fail(KeyError()), subparser="serve")
    arguments = failures.parse_args(lambda _: chosen, SimpleNamespace(prog="vllm"))
    with pytest.raises(TypeError):  # of the stand-in, which takes no arguments
        arguments.dispatch_function(arguments)
    assert failures.parse_args(lambda _: argparse.Namespace(a=1), None).a == 1
