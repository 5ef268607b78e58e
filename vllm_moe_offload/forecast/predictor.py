"""What a prefetcher asks: which experts will the next layers use?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.cache.planner import ExpertCache
from vllm_moe_offload.step import IdArray, StepTokens

LIKELY = 0.6
"""Probability of use from which an expert is read ahead: a wrong guess costs a read that
nobody waits for and the least valuable resident, a missed one a wait."""


class Predictor(ABC):
    """What a prefetcher asks.

    Attributes:
        native_handle: of a ``RouterLookahead`` (``csrc/lookahead.h``) that may be asked in the
            same native call that plans; 0: :meth:`observe` and :meth:`foresee` are to be called.
    """

    native_handle: int = 0

    @abstractmethod
    def begin_step(self, tokens: StepTokens) -> None:
        """A step begins."""

    @abstractmethod
    def observe(self, layer: int, ids: IdArray) -> None:
        """Layer ``layer`` routed the step's tokens; ids ``[tokens, top_k]``."""

    @abstractmethod
    def foresee(
        self, layer: int, hidden: Any, cache: ExpertCache, value: float, max_reads: int
    ) -> npt.NDArray[np.int32]:
        """Keeps what the layers behind ``layer`` will probably use, and names what to read.

        What is likely and resident is kept until its layer was served; for what is likely and
        absent, slots of ``cache`` are reserved, the nearest layer and the most likely first.

        Args:
            layer: the layer that routed last.
            hidden: what its router was given, a tensor ``[tokens or more, hidden]``; None: not
                known.
            cache: whose page table, slots and scores count.
            value: score of an expert that is used for certain.
            max_reads: most slots to be reserved.

        Returns:
            int32 ``[reads, 3]``: layer, expert and slot of each that is to be read; valid until
            the next call.
        """

    @abstractmethod
    def end_step(self) -> None:
        """All layers of the step ran."""
