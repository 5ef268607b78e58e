"""``torch.cuda``'s streams and events without a device: what is queued runs later.

As hostile as CUDA allows: streams take turns at random, nothing runs until somebody waits, and a
copy makes a mess of its slot for as long as it runs.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_moe_offload.cache.layout import ExpertLayout
from vllm_moe_offload.cache.pool import SlotPool


class StreamsDouble:
    """In the place of ``torch.cuda``, as far as a copier needs it.

    Attributes:
        slots: what its pool holds, by parameter; 0xEE at first.
        fail: calls that raise at their next use, as torch does for an error of the device.
        writing: addresses that a copy writes to right now.
    """

    def __init__(self, seed: int = 0) -> None:
        self.slots: dict[str, np.ndarray] = {}
        self.fail: set[str] = set()
        self.writing: set[int] = set()
        self._random = random.Random(seed)
        self._streams: list[Stream] = []
        self._compute = self.Stream(None)

    # ---- what torch.cuda has -------------------------------------------------------------

    def Stream(self, device: Any) -> Stream:
        self._streams.append(Stream(self))
        return self._streams[-1]

    def Event(self) -> Event:
        return Event(self)

    def current_stream(self, device: Any) -> Stream:
        return self._compute

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        with _CopiesQueued(stream):
            yield

    def pool(self, layout: ExpertLayout, num_slots: int) -> SlotPool:
        """In RAM, and says that it is on a CUDA device; :attr:`slots` has its bytes."""
        pool = SlotPool(layout, num_slots, device=torch.device("cpu"))
        pool.device = torch.device("cuda", 0)
        for name, tensor in pool.tensors.items():
            self.slots[name] = tensor.view(num_slots, -1).view(torch.uint8).numpy()
            self.slots[name].fill(0xEE)
        return pool

    # ---- what the rest of the machine does -----------------------------------------------

    def launch(self, kernel: Callable[[], None]) -> None:
        """Puts a kernel on the compute stream."""

        def run() -> bool:
            kernel()
            return True

        self._compute.queue.append(run)

    def step(self) -> bool:
        """Lets one stream go on that can; False if none can."""
        streams = [stream for stream in self._streams if stream.queue]
        self._random.shuffle(streams)
        for stream in streams:
            if stream.queue[0]():
                del stream.queue[0]
                return True
        return False

    def step_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert self.step(), "the host waits for what can never run"

    def some_steps(self) -> None:
        for _ in range(self._random.randrange(3)):
            self.step()

    def synchronize(self) -> None:
        """Runs all that was queued."""
        self.step_until(lambda: not any(stream.queue for stream in self._streams))

    def maybe_fail(self, call: str) -> None:
        if call in self.fail:
            self.fail.discard(call)
            raise RuntimeError(f"CUDA error: {call} is out of order\nCompile with ...")


@dataclass(eq=False)
class Stream:
    """Operations in order; each returns whether it could run."""

    device: StreamsDouble
    queue: list[Callable[[], bool]] = field(default_factory=list)

    def wait_event(self, event: Event) -> None:
        self.device.maybe_fail("wait_event")
        recording = event.recording  # as it is now: the event may be recorded anew
        self.queue.append(lambda: recording.done)

    def synchronize(self) -> None:
        self.device.maybe_fail("synchronize")
        self.device.step_until(lambda: not self.queue)


@dataclass(eq=False)
class Recording:
    done: bool = False

    def reach(self) -> bool:
        self.done = True
        return True


@dataclass(eq=False)
class Event:
    device: StreamsDouble
    recording: Recording = field(default_factory=lambda: Recording(done=True))

    def record(self, stream: Stream) -> None:
        self.device.maybe_fail("record")
        self.recording = Recording()
        stream.queue.append(self.recording.reach)

    def query(self) -> bool:
        self.device.maybe_fail("query")
        self.device.some_steps()
        return self.recording.done

    def synchronize(self) -> None:
        self.device.maybe_fail("event.synchronize")
        recording = self.recording
        self.device.step_until(lambda: recording.done)


class _CopiesQueued(TorchDispatchMode):
    """While open, ``copy_`` is queued on a stream instead of done."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        device = self._stream.device
        device.maybe_fail("copy_")
        target, source, non_blocking = args
        assert non_blocking, "the host would wait"
        address, before = target.data_ptr(), source.clone()

        def begin() -> bool:
            assert torch.equal(source, before), "its host slot was overwritten"
            assert address not in device.writing, "two copies write into a slot at once"
            device.writing.add(address)
            target.fill_(0xAA)
            return True

        def end() -> bool:
            assert torch.equal(source, before), "its host slot was overwritten"
            target.copy_(source)
            device.writing.discard(address)
            return True

        self._stream.queue += [begin, end]
        return target


@dataclass
class LockedDouble:
    """In the place of PageLocked."""

    arena: np.ndarray
    num_closed: int = 0

    def close(self) -> None:
        self.num_closed += 1
