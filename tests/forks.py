"""What a forked process does, which has the memory of its parent and none of its threads."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable

LIMIT_SECONDS = 20


def in_a_fork(body: Callable[[], object]) -> None:
    """Runs ``body`` in a forked process; AssertionError unless it returns there in time."""
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # kills, also in a native call
            signal.alarm(LIMIT_SECONDS)
            body()
            status = 0
        except BaseException:  # noqa: BLE001 (printed, and told by the status)
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the forked process ended with wait status {status}"
