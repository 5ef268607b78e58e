"""Who follows what steps routed where the device plans: nobody whose answer a step waits for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.policy.trace import TracePolicy
from vllm_moe_offload.step import StepTokens, TokenCount
from vllm_moe_offload.trace.collection_file import CollectionFile
from vllm_moe_offload.trace.recorder import TraceRecorder


class Followers:
    """The activation matrices of requests, their recorded trace, and how many tokens there were.

    Attributes:
        tokens: computed so far.
    """

    def __init__(
        self,
        policy: TracePolicy | None = None,
        collection_file: CollectionFile | None = None,
        recorder: TraceRecorder | None = None,
    ) -> None:
        """Wires what is given together.

        Args:
            policy: keeps activation matrices, and scores nothing: the device does.
            collection_file: where it keeps those of finished requests.
            recorder: of the model's routing.
        """
        self.tokens = TokenCount()
        self._policy = policy
        self._collection_file = collection_file
        self._recorder = recorder
        if policy is not None:
            policy.is_scoring = False

    @property
    def wants_routing(self) -> bool:
        """Whether anybody looks at what steps routed."""
        return self._policy is not None or self._recorder is not None

    def step(self, tokens: StepTokens, ids: npt.NDArray[np.integer[Any]] | None) -> None:
        """A step was computed; ids ``[tokens, layers, top_k]``, None if nobody wants them."""
        self.tokens.end_step(tokens)
        if ids is None:
            return
        if self._policy is not None:
            self._policy.begin_step(tokens)
            self._policy.observe_step(ids.transpose(1, 0, 2))
            self._policy.end_step()
        if self._recorder is not None:
            self._recorder.begin_step(tokens)
            self._recorder.observe_step(ids)
            self._recorder.end_step()

    def verify(self, ends: Mapping[str, int]) -> None:
        """Says which drafted tokens of the steps so far are their requests' (see
        ``StepTokens.is_verified``)."""
        self.tokens.verify(ends)
        if self._policy is not None:
            self._policy.verify(ends)
        if self._recorder is not None:
            self._recorder.verify(ends)

    def end_request(self, request: str) -> None:
        """A request will never run again."""
        if self._policy is not None:
            self._policy.end_request(request)
        if self._collection_file is not None:
            self._collection_file.changed()
        if self._recorder is not None:
            self._recorder.end_request(request)

    def closers(self) -> list[Callable[[], None]]:
        """What ends recording and saves matrices; each may raise OSError."""
        parts = (self._recorder, self._collection_file)
        return [part.close for part in parts if part is not None]
