"""The ``trace`` policy: request-level traces decide what stays.

Score of an expert = what the running requests are expected to use of it at their next tokens
(``forecast/forecast.py``). Layers are visited in a cycle, so an expert of the layer just passed
waits a whole step for its next use and one of the next layer a moment: scores shrink by
``exp(-DISTANCE_WEIGHT)`` over one cycle (Belady's rule seen from a forecast).

A layer call only moves its own layer's scores. All else, learning from the step before and
scoring all layers afresh, is put off to the first moment in which serving waits for a read
(:meth:`TracePolicy.catch_up`), where it costs nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.cache.planner import ExpertCache, PlannerRules
from vllm_moe_offload.forecast.forecast import Forecast
from vllm_moe_offload.native import Observer
from vllm_moe_offload.policy.base import Policy, fade_and_gain
from vllm_moe_offload.step import FloatArray, IdArray, StepTokens, count_votes

DISTANCE_WEIGHT = 0.5
"""What the distance to the next visit counts: the logarithm by which a score shrinks over one
cycle of layers."""


class TracePolicy(Policy):
    """Keeps what the running requests' traces say they will use.

    Attributes:
        forecast: what it expects; it holds the activation matrices, running and collected.
        is_scoring: whether scores are of any use; if not, only traces are kept.
    """

    name: ClassVar[str] = "trace"
    rules: ClassVar[PlannerRules] = PlannerRules(admission=True)

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self.forecast = Forecast(num_layers, num_experts)
        self.is_scoring = True
        shape = (num_layers, num_experts)
        position = np.arange(num_layers, dtype=np.float32)[:, None] / num_layers
        self._unvisited = np.exp(-DISTANCE_WEIGHT * position).astype(np.float32)
        self._decay = float(np.float32(np.exp(-DISTANCE_WEIGHT)))
        self._vote_gain: FloatArray = np.zeros((num_layers, 1), np.float32)
        self._fade: FloatArray = np.zeros(shape, np.float32)
        self._votes: FloatArray = np.zeros(shape, np.float32)
        self._ids: npt.NDArray[np.int32] = np.zeros((num_layers, 0, 0), np.int32)
        self._past_votes, self._past_ids = self._votes.copy(), self._ids
        # What a layer call does to these arrays is done in C++, in serving without a detour.
        self._observer = Observer(
            scores=self.scores.ctypes.data,
            fade=self._fade.ctypes.data,
            gains=self._vote_gain.ctypes.data,
            decay=self._decay,
        )
        self._place_step()
        self._is_behind = False  # scores are not refreshed since the step began
        self._layers_followed = 0  # of this step, whose routing the other layers' scores know
        self._has_past = False  # the step before was not learned from
        self._ends: Mapping[str, int] = {}  # where its requests' verified tokens end
        # Guesses of requests that paused since (or whose batch others follow, in a pipeline):
        # positions, and ids ``[layers, tokens, top_k]``.
        self._open: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]] = {}

    @property
    def full_score(self) -> float:
        """Score that an expert used by every request at every token tends to.

        Makes a probability p of being used comparable with :attr:`scores`: ``p * full_score``.
        Without the distance to the next visit, which shrinks a score by at most
        ``exp(-DISTANCE_WEIGHT)``.
        """
        return self.forecast.full_score

    def bind(self, cache: ExpertCache) -> None:
        """See :meth:`Policy.bind`. Where everything fits there is nothing to choose: then only
        traces are kept."""
        super().bind(cache)
        self._observer.scores = self.scores.ctypes.data
        self.is_scoring = not cache.shape.holds_everything

    def begin_step(self, tokens: StepTokens) -> None:
        """Leaves all that takes time to :meth:`catch_up`."""
        super().begin_step(tokens)
        self._observer.layers_seen = self._layers_followed = 0
        self._is_behind = True

    def catch_up(self) -> None:
        """Learns from the step before, and lets all scores follow this one's routing so far."""
        if self._is_behind:
            self._refresh()
        self._follow()

    def _refresh(self) -> None:
        self._is_behind = False
        self._take_in()
        if not self.is_scoring:
            return
        self.forecast.begin_step(self.tokens)
        np.multiply(self.forecast.scores, self._unvisited, out=self.scores)
        gain = np.float32(self.forecast.gain * self._decay)
        np.multiply(self._unvisited, gain, out=self._vote_gain)
        np.multiply(self.forecast.fading, self._vote_gain, out=self._fade)
        for layer in range(self._observer.layers_seen):
            fade_and_gain(self._observer, layer, self.num_experts)

    def _follow(self) -> None:
        """What the step's tokens used so far changes what they will use."""
        begin, end = self._layers_followed, self._observer.layers_seen
        self._layers_followed = end
        if begin == end or not self.is_scoring:
            return
        factors = self._unvisited[:, 0].copy()
        factors[:end] *= np.float32(self._decay)
        self.forecast.follow(begin, self._ids[begin:end], self.scores, factors)

    def _make_room(self, num_tokens: int, top_k: int) -> None:
        """For the ids of a step, of which ``observer`` is to know."""
        if self._ids.shape[1:] != (num_tokens, top_k):
            self._ids = np.zeros((self.num_layers, num_tokens, top_k), np.int32)
            self._place_step()

    def _place_step(self) -> None:
        """Tells the observer where the step's ids and votes lie."""
        observer = self._observer
        observer.ids, observer.votes = self._ids.ctypes.data, self._votes.ctypes.data
        observer.ids_per_layer = self._ids[0].size

    def native_observer(self, num_tokens: int, top_k: int) -> int:
        """See :meth:`Policy.native_observer`."""
        self._make_room(num_tokens, top_k)
        self._observer.follows = self.is_scoring
        return ctypes.addressof(self._observer)

    def observe(self, layer: int, ids: IdArray, votes: FloatArray) -> None:
        """Updates the scores of this layer."""
        self._make_room(*ids.shape)
        self._ids[layer] = ids
        self._votes[layer] = votes
        self._observer.layers_seen += 1
        if self.is_scoring:
            fade_and_gain(self._observer, layer, self.num_experts)

    def observe_step(self, ids: IdArray) -> None:
        """All layers routed the step's tokens, where scores are of no use; ids
        ``[layers, tokens, top_k]``."""
        self._make_room(*ids.shape[1:])
        self._ids[...] = ids
        self._observer.layers_seen = self.num_layers

    def end_step(self) -> None:
        """Keeps the step for :meth:`catch_up`; one that broke off between layers is dropped."""
        if self._observer.layers_seen != self.num_layers:
            return
        if self._is_behind:
            self._refresh()
        self._ids, self._past_ids = self._past_ids, self._ids
        self._votes, self._past_votes = self._past_votes, self._votes
        self._past_tokens = self.tokens
        self._ends = {}
        self._has_past = True
        self._place_step()

    def verify(self, ends: Mapping[str, int]) -> None:
        """See :meth:`Policy.verify`. What a drafter guessed wrong was computed, and needed its
        experts; it says nothing of what its request uses."""
        self._ends = ends
        for request in self._open.keys() & ends.keys():
            positions, ids = self._open.pop(request)
            count = int(np.searchsorted(positions, ends[request]))
            if count:
                one = np.ones(1, np.int64)
                tokens = StepTokens.of_lengths([request], count * one, positions[:1], one < 0)
                self.forecast.trace(tokens, ids[:, :count])

    def _take_in(self) -> None:
        if not self._has_past:
            return
        self._has_past = False
        tokens, ids, votes = self._past_tokens, self._past_ids, self._past_votes
        if tokens.num_drafted is not None:
            is_verified = tokens.is_verified(self._ends)
            self._keep_open(tokens, ids)
            if not is_verified.all():
                tokens, ids = tokens.only(is_verified), ids.compress(is_verified, axis=1)
                votes = np.zeros_like(votes)
                for of_layer, votes_of_layer in zip(ids, votes, strict=True):
                    count_votes(of_layer, tokens.weights, votes_of_layer)
        if self.is_scoring:
            self.forecast.take_in(tokens, ids, votes)
        else:
            self.forecast.trace(tokens, ids)

    def _keep_open(self, tokens: StepTokens, ids: npt.NDArray[np.int32]) -> None:
        """Keeps the guesses of which nothing is known yet: they may be in matrices later."""
        is_drafted = tokens.is_drafted()
        for index, request in enumerate(tokens.requests):
            if request not in self._ends:
                mine = is_drafted & (tokens.request_of_token == index)
                if mine.any():
                    self._open[request] = tokens.positions[mine], ids.compress(mine, axis=1)

    def end_request(self, request: str) -> None:
        """The request stops counting at once; its matrix enters the collection."""
        self._take_in()
        self._open.pop(request, None)
        self.forecast.end_request(request)
