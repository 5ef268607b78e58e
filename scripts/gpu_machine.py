"""The machine that the GPU scripts' engines start on: the GPU, or a double of it."""

from __future__ import annotations

import contextlib


def machine(device: str) -> contextlib.AbstractContextManager[None]:
    """While open, engines that start in this process without a GPU serve as on one all the same.

    On the double the cache is planned as on a device, by the rule in numpy; vLLM's kernels for CPUs
    compute (tests/integration/simulated_device.py).
    """
    if device == "cuda":
        return contextlib.nullcontext()
    from tests.integration.simulated_device import simulated_device

    simulated: contextlib.AbstractContextManager[None] = simulated_device(late=1)
    return simulated
