"""One directory of counters per vLLM: shared with its children, not with other servers."""

import multiprocessing
import os
import subprocess
import sys

from vllm_moe_offload.integration.counters_dir import ENVIRONMENT, ensure_counters_dir

PRINT_OWN = (
    "from vllm_moe_offload.integration.counters_dir import ensure_counters_dir;"
    "print(ensure_counters_dir())"
)


def _child(queue):
    queue.put(str(ensure_counters_dir()))


def test_children_share_and_other_processes_do_not(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    own = ensure_counters_dir()
    assert ensure_counters_dir() == own
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == str(own)
    child.join()
    # A server started from this process inherits the variable, but is another vLLM.
    other = subprocess.run(
        [sys.executable, "-c", PRINT_OWN], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert other != str(own)
    assert not os.path.exists(other)  # removed at its exit
    assert own.is_dir()
