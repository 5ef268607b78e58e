"""Which experts the next layers will use for this step's tokens, learned from routing alone.

A token's routing in layer l says much about its routing in the layers behind it, because all
of them read the same residual stream. One ridge regression per (layer, layers ahead), learned
online, predicts "this token uses expert e of layer l + d" from

* the experts that the token chose in layers l and l - 1,
* what its request used lately in layer l + d (decayed, a few tokens),
* a constant.

Serving asks after each layer call and prefetches what is likely and not resident; the lead
time is d layers. Where it can, it asks the model's own routers instead
(:class:`vllm_moe_offload.forecast.lookahead.RouterLookahead`); replay, without hidden states, cannot.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.cache.planner import ExpertCache
from vllm_moe_offload.forecast.predictor import LIKELY, Predictor
from vllm_moe_offload.native import NO_EXPERT
from vllm_moe_offload.step import StepTokens

FloatArray = npt.NDArray[np.float32]

BLOCK = 64
"""Inputs per block; more experts than this share inputs by hashing."""
BATCH = 32
MAX_STEP_TOKENS = 64
"""Steps of more tokens than this are prefill, which streams whole layers: not predicted."""
MIN_TOKENS = 128
"""Tokens seen before anything is predicted, and between two fits at least."""


class RoutingPredictor(Predictor):
    """A predictor that looks at routing alone and says what it expects as a list.

    Attributes:
        depth: layers ahead that it may be asked for.
    """

    depth: int

    @abstractmethod
    def predict(
        self, layer: int, ahead: int, threshold: float
    ) -> list[tuple[int, float]] | None:
        """What layer ``layer + ahead`` will probably use.

        Args:
            layer: the layer that routed last.
            ahead: 1 to ``depth``.
            threshold: least probability that matters.

        Returns:
            (expert, probability that at least one of the step's tokens uses it), most probable
            first. None where nothing can be said: nothing learned yet, too many tokens, beyond
            the last layer.
        """

    def foresee(
        self, layer: int, hidden: Any, cache: ExpertCache, value: float, max_reads: int
    ) -> npt.NDArray[np.int32]:
        """See :meth:`Predictor.foresee`."""
        del hidden
        reads: list[tuple[int, int, int]] = []
        for ahead in range(1, self.depth + 1):
            if len(reads) >= max_reads:
                break
            target = (layer + ahead) % cache.shape.num_layers  # of the next step, if it knows
            likely = self.predict(layer, ahead, LIKELY)
            if likely is None:
                break
            for expert, chance in likely:
                if cache.page_table[target, expert] < 0 and len(reads) >= max_reads:
                    continue
                row = cache.prefetch(target, expert, chance * value)
                if row >= 0:
                    reads.append((target, expert, row))
        return np.array(reads, np.int32).reshape(-1, 3)


class CrossLayerPredictor(RoutingPredictor):
    """Linear predictor of the next layers' experts; learned from every step it sees.

    One step: :meth:`begin_step`; per layer :meth:`observe`, then :meth:`predict` if wanted;
    :meth:`end_step`. :meth:`end_request` when a request ends. Cost per call is
    ``tokens * depth * 193 * experts`` multiplications at most.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        *,
        depth: int = 4,
        ridge: float = 5.0,
        half_life: float = 3.0,
        memory_tokens: float = 50_000.0,
    ) -> None:
        """``depth``: layers to look ahead, at least 1."""
        if depth < 1:
            raise ValueError(
                f"depth of the cross-layer predictor must be at least 1, got {depth}"
            )
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.depth = depth
        self._block = block = min(num_experts, BLOCK)
        self._width = width = 3 * block + 1
        self._input_of: npt.NDArray[np.int64] = np.arange(num_experts) % block
        self._ridge = np.float32(ridge)
        self._keep = np.float32(2.0 ** (-1.0 / half_life))
        self._memory_tokens = memory_tokens
        self._gram: FloatArray = np.zeros((num_layers, depth, width, width), np.float32)
        self._cross: FloatArray = np.zeros((num_layers, depth, width, num_experts), np.float32)
        self._weights: FloatArray = np.zeros_like(self._cross)
        self._history: dict[str, FloatArray] = {}
        self._chosen: FloatArray = np.zeros((BATCH, num_layers, num_experts), np.float32)
        self._before: FloatArray = np.zeros((BATCH, num_layers, block), np.float32)
        self._filled = 0
        self._tokens = 0
        self._effective = 0.0
        self._next_fit = MIN_TOKENS
        self._active = False
        self._used: FloatArray = np.zeros((0, num_layers, num_experts), np.float32)
        self._lately: FloatArray = np.zeros((0, num_layers, block), np.float32)
        self._requests: list[str] = []

    @property
    def is_ready(self) -> bool:
        """Whether it has learned enough to predict anything."""
        return self._tokens >= MIN_TOKENS

    def begin_step(self, tokens: StepTokens) -> None:
        """A step begins; steps with a prompt in them are not predicted."""
        count = tokens.request_of_token.size
        self._active = count <= MAX_STEP_TOKENS and not bool(tokens.is_prefill.any())
        if not self._active:
            return
        self._requests = [tokens.requests[index] for index in tokens.request_of_token]
        shape = (self.num_layers, self._block)
        empty = np.zeros(shape, np.float32)
        self._lately = np.stack([self._history.get(name, empty) for name in self._requests])
        self._used = np.zeros((count, self.num_layers, self.num_experts), np.float32)

    def observe(self, layer: int, ids: npt.NDArray[np.integer[Any]]) -> None:
        """Layer ``layer`` routed the step's tokens; ids ``[tokens, top_k]``."""
        if self._active:
            row, choice = np.nonzero(ids != NO_EXPERT)
            self._used[row, layer, ids[row, choice]] = 1.0

    def predict(
        self, layer: int, ahead: int, threshold: float
    ) -> list[tuple[int, float]] | None:
        """See :meth:`RoutingPredictor.predict`."""
        likely = self.probabilities(layer, ahead)
        if likely is None:
            return None
        experts = np.flatnonzero(likely >= threshold)
        order = experts[np.argsort(-likely[experts], kind="stable")]
        return list(zip(order.tolist(), likely[order].tolist(), strict=True))

    def probabilities(self, layer: int, ahead: int) -> FloatArray | None:
        """Expected use of the experts of layer ``layer + ahead`` by this step's tokens.

        Args:
            layer: the layer that routed last.
            ahead: 1 to ``depth``.

        Returns:
            float32 ``[experts]``: the probability that at least one token uses the expert.
            None before anything was learned, in steps with prefill, and beyond the last layer.
        """
        if not self._active or not self.is_ready or layer + ahead >= self.num_layers:
            return None
        inputs = self._inputs(layer, ahead, self._used, self._lately)[-1]
        likely = inputs @ self._weights[layer, ahead - 1]  # [tokens, experts]
        np.clip(likely, 0.0, 1.0, out=likely)
        return np.asarray(1.0 - np.multiply.reduce(1.0 - likely, axis=0), np.float32)

    def end_step(self) -> None:
        """Learns from the step."""
        if not self._active:
            return
        self._active = False
        folded = self._fold(self._used)
        for index, name in enumerate(self._requests):
            history = self._lately[index] * self._keep + folded[index] * (1 - self._keep)
            self._history[name] = history
        count, start = len(self._requests), 0
        while start < count:
            take = min(BATCH - self._filled, count - start)
            rows = slice(self._filled, self._filled + take)
            self._chosen[rows] = self._used[start : start + take]
            self._before[rows] = self._lately[start : start + take]
            self._filled += take
            start += take
            if self._filled == BATCH:
                self._accumulate()
        self._tokens += count
        self._effective += count
        if self._tokens >= self._next_fit:
            self._fit()

    def end_request(self, request: str) -> None:
        """The request's history leaves."""
        self._history.pop(request, None)

    def _fold(self, used: FloatArray) -> FloatArray:
        """Choices ``[..., experts]`` as inputs ``[..., block]``."""
        if self._block == self.num_experts:
            return used
        folded = np.zeros((*used.shape[:-1], self._block), np.float32)
        for start in range(0, self.num_experts, self._block):
            part = used[..., start : start + self._block]
            folded[..., : part.shape[-1]] += part
        return folded

    def _inputs(
        self, layer: int, ahead: int, used: FloatArray, lately: FloatArray
    ) -> FloatArray:
        """Regression inputs ``[ahead, tokens, width]``."""
        block = self._block
        inputs = np.zeros((ahead, len(used), self._width), np.float32)
        inputs[:, :, :block] = self._fold(used[:, layer])
        if layer:
            inputs[:, :, block : 2 * block] = self._fold(used[:, layer - 1])
        targets = lately[:, layer + 1 : layer + 1 + ahead]
        inputs[:, :, 2 * block : 3 * block] = targets.transpose(1, 0, 2)
        inputs[:, :, -1] = 1.0
        return inputs

    def _accumulate(self) -> None:
        for layer in range(self.num_layers - 1):
            ahead = min(self.depth, self.num_layers - 1 - layer)
            inputs = self._inputs(layer, ahead, self._chosen, self._before)
            transposed = inputs.transpose(0, 2, 1)
            targets = self._chosen[:, layer + 1 : layer + 1 + ahead].transpose(1, 0, 2)
            self._gram[layer, :ahead] += transposed @ inputs
            self._cross[layer, :ahead] += transposed @ targets
        self._filled = 0

    def _fit(self) -> None:
        regular = self._gram + self._ridge * np.eye(self._width, dtype=np.float32)
        self._weights = np.linalg.solve(regular, self._cross)
        self._next_fit = self._tokens + max(
            MIN_TOKENS, int(0.5 * min(self._tokens, self._memory_tokens))
        )
        if self._effective > self._memory_tokens:
            keep = np.float32(self._memory_tokens / self._effective)
            self._gram *= keep
            self._cross *= keep
            self._effective = self._memory_tokens
