"""A predictor that is told what will be used, for oracles and tests."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.cache.planner import ExpertCache
from vllm_moe_offload.forecast.predictor import LIKELY, Predictor
from vllm_moe_offload.step import IdArray, StepTokens


class Foretold(Predictor):
    """Keeps and reads ahead what :meth:`told` says of the next layers.

    Attributes:
        depth: layers ahead of which it is told.
    """

    depth: int

    @abstractmethod
    def told(self, layer: int, ahead: int) -> list[tuple[int, float]] | None:
        """(expert, probability of use) of layer ``layer + ahead``, most probable first.

        None where nothing is known.
        """

    def begin_step(self, tokens: StepTokens) -> None:
        """See :class:`Predictor`."""

    def observe(self, layer: int, ids: IdArray) -> None:
        """See :class:`Predictor`."""

    def foresee(
        self, layer: int, hidden: Any, cache: ExpertCache, value: float, max_reads: int
    ) -> npt.NDArray[np.int32]:
        """See :meth:`Predictor.foresee`."""
        del hidden
        reads: list[tuple[int, int, int]] = []
        for ahead in range(1, self.depth + 1):
            target = (
                layer + ahead
            ) % cache.shape.num_layers  # of the next step, if it is known
            expected = self.told(layer, ahead)
            if expected is None or len(reads) >= max_reads:
                break
            for expert, chance in expected:
                is_absent = cache.page_table[target, expert] < 0
                if chance < LIKELY or (is_absent and len(reads) >= max_reads):
                    continue
                slot = cache.prefetch(target, expert, chance * value)
                if slot >= 0:
                    reads.append((target, expert, slot))
        return np.array(reads, np.int32).reshape(-1, 3)

    def end_step(self) -> None:
        """See :class:`Predictor`."""
