"""A drafter's passes through its own experts: whose tokens each of them computes."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np

from vllm_moe_offload.integration.experts import find_runtime
from vllm_moe_offload.integration.patching import require, wrap
from vllm_moe_offload.runtime import OffloadRuntime
from vllm_moe_offload.step import StepTokens


# --------------------------------------------------------------------------------------
# SpecDecodeBaseProposer.propose (v1/spec_decode/llm_base_proposer.py),
# llm_base_proposer.set_forward_context (v1/spec_decode/llm_base_proposer.py)
#   why: a drafter with experts of its own runs several times in a step, outside of what the runner
#     prepared: first on the step's tokens, then on its own guesses, one per request. Each run is
#     within a forward context.
#   upstream: ForwardContext does not say whose rows they are.
#   remove when: it carries the request of every row.
def install() -> None:
    """Tells the runtime of a drafter's passes; in a worker whose server has a drafter."""
    from vllm.v1.spec_decode import llm_base_proposer

    proposer = llm_base_proposer.SpecDecodeBaseProposer
    signature = inspect.signature(require(proposer, "propose"))

    def propose(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        runtime = _runtime_of(self)
        if runtime is None:  # nothing of the drafter is offloaded
            return original(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs).arguments
        starts = bound["common_attn_metadata"].query_start_loc_cpu.numpy()
        with _Passes(runtime, np.diff(starts)):
            return original(self, *args, **kwargs)

    wrap(proposer, "propose", propose)
    wrap(llm_base_proposer, "set_forward_context", _set_forward_context)


def _runtime_of(proposer: Any) -> OffloadRuntime | None:
    """The runtime behind a drafter's experts, remembered on the proposer; None if it is not to know
    of passes: where all experts are resident on a GPU it looks at none."""
    if not hasattr(proposer, "_moe_offload_runtime"):
        runtime = find_runtime(proposer.model)
        is_told = isinstance(runtime, OffloadRuntime)
        proposer._moe_offload_runtime = runtime if is_told else None
    known: OffloadRuntime | None = proposer._moe_offload_runtime
    return known


class _Passes:
    """The passes of one proposal, while it is open; there is one at a time."""

    running: _Passes | None = None

    def __init__(self, runtime: OffloadRuntime, lengths: np.ndarray) -> None:
        """``lengths``: tokens of each request in the first pass."""
        self._runtime = runtime
        self._lengths = lengths
        # Who they are makes no difference: what a drafter uses is nobody's trace.
        self._requests = [str(index) for index in range(len(lengths))]

    def __enter__(self) -> None:
        _Passes.running = self

    def __exit__(self, *_: object) -> None:
        _Passes.running = None

    def next_pass(self) -> contextlib.AbstractContextManager[None]:
        """Around one run of the drafter."""
        nobody = np.zeros(len(self._requests), np.int64)
        tokens = StepTokens.of_lengths(self._requests, self._lengths, nobody, nobody > 0)
        self._lengths = nobody + 1
        return self._runtime.draft_pass(tokens)


@contextlib.contextmanager
def _set_forward_context(original: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    passes = _Passes.running
    with original(*args, **kwargs), passes.next_pass() if passes else contextlib.nullcontext():
        yield
