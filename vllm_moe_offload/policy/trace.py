"""The ``trace`` policy: request-level traces decide what stays.

Score of an expert = what the running requests are expected to use of it at their next tokens
(``forecast/forecast.py``). Layers are visited in a cycle, so an expert of the layer just passed
waits a whole step for its next use and one of the next layer a moment: scores shrink by
``exp(-distance_weight)`` over one cycle (Belady's rule seen from a forecast). And plain
policies run beside it as shadows (``policy/fallback.py``): while one of them hits more, the
cache follows it.

A layer call only moves its own layer's scores. All else, learning from the step before and
scoring all layers afresh, is put off to the first moment in which serving waits for a read
(:meth:`TracePolicy.catch_up`), where it costs nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.cache.planner import PlannerRules
from vllm_moe_offload.forecast.forecast import Forecast, TraceOptions
from vllm_moe_offload.native import Observer, core
from vllm_moe_offload.policy.base import Policy
from vllm_moe_offload.policy.fallback import Fallback, Shadow
from vllm_moe_offload.step import FloatArray, IdArray, StepTokens


class TracePolicy(Policy):
    """Keeps what the running requests' traces say they will use.

    Attributes:
        options: see :class:`TraceOptions`.
        forecast: what it expects; it holds the activation matrices, running and collected.
        is_scoring: whether scores are of any use; if not, only traces are kept.
    """

    name: ClassVar[str] = "trace"
    rules: ClassVar[PlannerRules] = PlannerRules(admission=True)

    def __init__(self, num_layers: int, num_experts: int, **options: float) -> None:
        """``options``: fields of :class:`TraceOptions`."""
        super().__init__(num_layers, num_experts)
        self.options = chosen = TraceOptions(**options)
        self.forecast = Forecast(num_layers, num_experts, chosen)
        self._fallback: Fallback | None = None
        shape = (num_layers, num_experts)
        position = np.arange(num_layers, dtype=np.float32)[:, None] / num_layers
        self._unvisited = np.exp(-chosen.distance_weight * position).astype(np.float32)
        self._visited_factor = np.float32(np.exp(-chosen.distance_weight))
        self._decay = float(self._visited_factor)
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
        self.is_scoring = True

    @property
    def full_score(self) -> float:
        """Score that an expert used by every request at every token tends to.

        Makes a probability p of being used comparable with :attr:`scores`: ``p * full_score``.
        Without the distance to the next visit, which shrinks a score by at most
        ``exp(-distance_weight)``. While a plain policy rules, scores are 1 for what it holds,
        0 for the rest.
        """
        if self._is_led:
            return 1.0
        return self.forecast.full_score

    def bind(self, scores: FloatArray) -> None:
        """See :meth:`Policy.bind`; ``scores`` must be contiguous."""
        super().bind(scores)
        self._observer.scores = scores.ctypes.data

    def attach_shadows(self, own: Shadow, plain: Sequence[Shadow]) -> None:
        """Lets shadows compete.

        Args:
            own: shadow that plans from this policy's own scores.
            plain: shadows of the plain policies.
        """
        self._fallback = Fallback(own, plain)

    def begin_step(self, tokens: StepTokens) -> None:
        """Leaves all that takes time to :meth:`catch_up`."""
        super().begin_step(tokens)
        self._observer.layers_seen = self._layers_followed = 0
        self._is_behind = True
        if self._fallback is not None and self._fallback.is_decided:
            self.catch_up()  # who rules must not change within a step

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
        own = self.forecast.scores
        own *= self._unvisited
        gain = np.float32(self.forecast.gain * self._decay)
        np.multiply(self._unvisited, gain, out=self._vote_gain)
        np.multiply(self.forecast.fading, self._vote_gain, out=self._fade)
        if self._fallback is not None:
            self._fallback.expect(own)
            if not self._observer.layers_seen:
                self._fallback.change()
            if self._fallback.winner is not None:
                return
        seen = slice(self._observer.layers_seen)
        own[seen] *= self._visited_factor
        own[seen] += self._votes[seen] * self._vote_gain[seen] - self._fade[seen]
        self.scores[...] = own

    def _follow(self) -> None:
        """What the step's tokens used so far changes what they will use."""
        begin, end = self._layers_followed, self._observer.layers_seen
        self._layers_followed = end
        if begin == end or not self.is_scoring or not self.options.follow or self._is_led:
            return
        factors = self._unvisited[:, 0].copy()
        factors[:end] *= self._visited_factor
        self.forecast.follow(begin, self._ids[begin:end], self.scores, factors)

    @property
    def _is_led(self) -> bool:
        """Whether a plain policy rules."""
        return self._fallback is not None and self._fallback.winner is not None

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
        """See :meth:`Policy.native_observer`; there is none while a plain policy rules."""
        if self._is_led:
            return 0
        self._make_room(num_tokens, top_k)
        self._observer.follows = self.is_scoring
        return ctypes.addressof(self._observer)

    def observe(self, layer: int, ids: IdArray, votes: FloatArray) -> None:
        """Updates the scores of this layer."""
        self._make_room(*ids.shape)
        self._ids[layer] = ids
        self._votes[layer] = votes
        self._observer.layers_seen += 1
        if not self.is_scoring:
            return
        if self._fallback is not None and self._fallback.winner is not None:
            self._fallback.lead(layer, self._ids, votes, self.scores)
            return
        observer, row_bytes = self._observer, layer * self.num_experts * 4
        core.vmo_follow(
            observer.scores + row_bytes,
            observer.votes + row_bytes,
            observer.fade + row_bytes,
            self._vote_gain[layer, 0],
            self._decay,
            self.num_experts,
        )

    def end_step(self) -> None:
        """Keeps the step for :meth:`catch_up`; one that broke off between layers is dropped."""
        if self._observer.layers_seen != self.num_layers:
            return
        if self._is_behind:
            self._refresh()
        self._ids, self._past_ids = self._past_ids, self._ids
        self._votes, self._past_votes = self._past_votes, self._votes
        self._past_tokens = self.tokens
        self._has_past = True
        self._place_step()

    def _take_in(self) -> None:
        if not self._has_past:
            return
        self._has_past = False
        ids, votes = self._past_ids, self._past_votes
        if not self.is_scoring:
            self.forecast.trace(self._past_tokens, ids)
            return
        if self._fallback is not None:
            gain = votes * self._vote_gain
            gain -= self._fade
            self._fallback.end_step(ids, votes, gain, self._decay)
        self.forecast.take_in(ids, votes)

    def end_request(self, request: str) -> None:
        """The request stops counting at once; its matrix enters the collection."""
        self._take_in()
        self.forecast.end_request(request)
