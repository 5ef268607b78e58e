"""One per worker whose GPU plans its cache, or keeps all experts: what happens between steps.

Layer calls never come here. A step's votes go to the device before it, its routing and the counters
come back behind it; the host looks at them once they have arrived, and waits for nothing while there
is anything to compute. Knows nothing of vLLM.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np
import torch

from vllm_moe_offload.device.arrivals import Arrivals, Event
from vllm_moe_offload.device.followers import Followers
from vllm_moe_offload.device.rule import Ints, fixed_point
from vllm_moe_offload.metrics import VALUES, Counters
from vllm_moe_offload.step import StepTokens

COUNTERS_EVERY_S = 1.0
"""Counters are looked at this often, and when a request ends."""
LOGS = 3
"""Steps whose routing may be on its way: vLLM schedules one ahead of the one that runs."""


class PlannedCache(Protocol):
    """What the runtime asks of a ``cache.DeviceCache``, which tells of these."""

    live: torch.Tensor
    log: torch.Tensor
    counters: torch.Tensor


class DeviceRuntime:
    """Votes to the device, routing and counters back.

    Attributes:
        weights: int32 ``[max_tokens]`` on the device, the step's votes (``rule.fixed_point``).
        published: what other processes see of the counters.
        tokens: of the step that runs; None: no request stands behind what is computed.
        is_dummy: whether a :meth:`dummy_run` is open.
        arrivals: what the host does once copies have arrived.
    """

    def __init__(
        self,
        cache: PlannedCache | None,
        followers: Followers,
        *,
        num_layers: int,
        num_slots: int,
        expert_bytes: int,
        is_resident: bool,
        record_event: Callable[[], Event],
        published: Counters | None = None,
        release: Callable[[], None] | None = None,
    ) -> None:
        """Begins with nothing live: until :meth:`go_live` steps are for shapes only.

        Args:
            cache: of the device; None where all experts are resident and nobody looks at routing.
            followers: of the routing.
            num_layers, num_slots: of the model and its pool.
            expert_bytes: of one.
            is_resident: whether all experts are in slots, and never leave.
            record_event: marks where the device's stream is now.
            published: where counters are written to.
            release: gives back what the cache copies from, once the device is done.
        """
        self.published = published
        self.tokens: StepTokens | None = None
        self.is_dummy = False
        self._cache = cache
        self._followers = followers
        self._num_layers, self._num_slots = num_layers, num_slots
        self._expert_bytes = expert_bytes
        self._is_resident = is_resident
        self._record_event = record_event
        self._release = release
        self.arrivals = Arrivals()
        self._num_steps = 0
        self._follow_ns = 0
        self._counted_at_s = 0.0
        self._closed = False
        self._logs: list[torch.Tensor] = []
        if cache is not None:
            device = cache.live.device
            self.weights = torch.zeros(len(cache.log), dtype=torch.int32, device=device)
            self._sent: Ints = np.zeros(0, np.int32)
            self._pins = device.type == "cuda"
            if followers.wants_routing:
                self._logs = [self._on_host(cache.log) for _ in range(LOGS)]
        self._publish(0, 0, 0)

    def _on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(
            tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=self._pins
        )

    # ---- steps and requests ----------------------------------------------------------

    def begin_step(self, tokens: StepTokens) -> None:
        """A forward pass for real requests begins; what is launched from now on sees its votes."""
        if self.is_dummy:
            return
        self.tokens = tokens
        if self._cache is None:
            return
        votes = fixed_point(tokens.weights)
        if np.array_equal(votes, self._sent):
            return  # as in most steps that only decode
        self._sent = votes
        staged = torch.from_numpy(votes)
        if self._pins:
            staged = staged.pin_memory()
        self.weights[: votes.size].copy_(staged, non_blocking=True)

    def after_forward(self) -> None:
        """All that a step computes was launched, or there was nothing to compute."""
        if self.is_dummy:
            return
        tokens, self.tokens = self.tokens, None
        if tokens is None:
            self._fetch_counters()
            self.arrivals.wait_for_all()  # nothing else is to be done
            return
        began_ns = time.perf_counter_ns()
        self._num_steps += 1
        self._fetch_step(tokens)
        if time.monotonic() - self._counted_at_s >= COUNTERS_EVERY_S:
            self._fetch_counters()
        self.arrivals.take_in()
        self._follow_ns += time.perf_counter_ns() - began_ns

    def _fetch_step(self, tokens: StepTokens) -> None:
        """Has the step's routing copied to the host, where somebody looks at it."""
        if self._cache is None or not self._followers.wants_routing:
            self.arrivals.then(lambda: self._followers.step(tokens, None))
            return
        if not self._logs:
            self.arrivals.wait_for_all()
        log, rows = self._logs.pop(), tokens.request_of_token.size
        log[:rows].copy_(self._cache.log[:rows], non_blocking=True)

        def arrived() -> None:
            self._followers.step(tokens, log[:rows].numpy())
            self._logs.append(log)

        self.arrivals.after(self._record_event(), arrived)

    def _fetch_counters(self) -> None:
        """Has the counters copied to the host, and shown there."""
        self._counted_at_s = time.monotonic()
        num_steps = self._num_steps
        if self._cache is None:
            self.arrivals.then(lambda: self._publish(0, 0, num_steps))
            return
        counters = self._on_host(self._cache.counters)
        counters.copy_(self._cache.counters, non_blocking=True)

        def arrived() -> None:
            hits, misses = counters.tolist()
            self._publish(hits, misses, num_steps)

        self.arrivals.after(self._record_event(), arrived)

    def verify(self, ends: Mapping[str, int]) -> None:
        """Says which drafted tokens of the steps so far are their requests'; before the next step,
        and before :meth:`end_request`. ``ends``: see :meth:`StepTokens.is_verified`."""
        if not self.is_dummy:
            self.arrivals.then(lambda: self._followers.verify(ends))

    def end_request(self, request: str) -> None:
        """A request will never run again."""
        if self.is_dummy:
            return
        self._counted_at_s = 0.0
        self.arrivals.then(lambda: self._followers.end_request(request))

    @contextlib.contextmanager
    def dummy_run(self) -> Iterator[None]:
        """While open, what is computed is nobody's."""
        before, self.is_dummy = self.is_dummy, True
        try:
            yield
        finally:
            self.is_dummy = before

    def go_live(self) -> None:
        """Warm-up is over: from now on layer calls move the cache."""
        if self._cache is not None:
            self._cache.live.fill_(1)

    # ---- figures ---------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Tokens computed for good, of steps whose end the host has seen."""
        return self._followers.tokens.total

    def _publish(self, hits: int, misses: int, num_steps: int) -> None:
        if self.published is None:
            return
        # Every miss takes a slot, a free one as long as there are any.
        resident = self._num_slots if self._is_resident else min(misses, self._num_slots)
        figures = {
            "hits": hits,
            "misses": misses,
            "evictions": max(misses - resident, 0),
            "calls": num_steps * self._num_layers,
            "read_bytes": misses * self._expert_bytes,
            "policy_seconds": self._follow_ns / 1e9,
            "tokens": self.num_tokens,
            "slots": self._num_slots,
            "resident_experts": resident,
            "cache_bytes": self._num_slots * self._expert_bytes,
        }
        self.published.write([figures.get(name, 0) for name in VALUES])

    def close(self) -> None:
        """Takes in what is under way and finishes the recording; safe to call again.

        Raises:
            ExceptionGroup: what could not be closed; the rest is.
        """
        if self._closed:
            return
        self._closed = True
        published = [] if self.published is None else [self.published.close]
        release = [] if self._release is None else [self._release]
        errors = []
        for close in (
            self._fetch_counters,
            self.arrivals.wait_for_all,
            *published,
            *self._followers.closers(),
            *release,
        ):
            try:
                close()
            except Exception as error:  # noqa: BLE001 (raised below, with the others)
                errors.append(error)
        if errors:
            raise ExceptionGroup("the expert cache did not close", errors)
