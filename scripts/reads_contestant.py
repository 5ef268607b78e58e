"""One contestant of check_cost.py: an engine with an empty cache that answers rounds of prompts.

    python scripts/reads_contestant.py ARGUMENTS_AS_JSON

A round per line on stdin (its seed), its figures as JSON on stdout, as prefetch_contestant.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.harness.engine import take_stdout  # noqa: E402
from scripts.prefetch_contestant import Contestant  # noqa: E402

WARM_UP_SEED = 10**6
"""Of prompts that no round has."""


class FirstReads:
    """Counts records that were read at least once; has them checked at no read, if told so.

    There is no option that leaves out the first check, so what a server without it would do is had
    by taking every record for checked before anything was read.
    """

    def __init__(self, reader: Any, *, checks: bool) -> None:
        self.records: set[tuple[int, int]] = set()
        self._submit = reader.submit
        reader.submit = self._note
        if not checks:
            for layer in reader._is_checked:
                layer[:] = bytes([True]) * len(layer)

    def _note(self, records: Any, priority: int) -> list[int]:
        self.records.update((layer, expert) for layer, expert, _ in records)
        tickets: list[int] = self._submit(records, priority)
        return tickets


def main() -> int:
    """See the module's docstring."""
    answers = take_stdout()
    arguments = json.loads(sys.argv[1])
    contestant = Contestant(arguments)
    # vLLM's first prompts are slow; as a dummy run they read nothing.
    with contestant.runtime.dummy_run():
        contestant.generate(WARM_UP_SEED)
    transfer: Any = contestant.runtime._transfer
    reads = FirstReads(transfer._reader, checks=arguments["checks"])
    shape = contestant.runtime.cache.shape
    total = shape.num_layers * shape.num_experts
    print(json.dumps({"slots": shape.num_slots, "records": total}), file=answers, flush=True)
    for line in sys.stdin:
        figures = contestant.run(int(line)) | {"records_read": len(reads.records)}
        print(json.dumps(figures), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
