"""What the running requests are expected to use next: forecasts, and how they are mixed.

* *history*: the mean of the requests' own averages over their last tokens;
* *popularity*: what all requests used lately, those that ended included;
* *prior*: the mean of the collection, which finished requests left. It also stands in for the
  history of a request that has none yet;
* *value*: the successor model (``forecast/successor.py``) on each request's recent routing.

Their weights are learned (``forecast/mixture.py``).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.forecast.averages import FadingTables, StepUses, UseAverages
from vllm_moe_offload.forecast.mixture import Mixture
from vllm_moe_offload.forecast.requests import RunningRequests
from vllm_moe_offload.forecast.successor import SuccessorModel
from vllm_moe_offload.native import ValueStep, check, core
from vllm_moe_offload.step import FloatArray, StepTokens
from vllm_moe_offload.trace.activation import ExpertTracer
from vllm_moe_offload.trace.collection import ActivationCollection

HALF_LIVES = (1.0, 4.0, 16.0)
"""Tokens after which a use counts half in each average: the last token, a phrase, a
paragraph. The mixture sorts out which of them matters."""
POPULARITY_HALF_LIVES = (30.0, 1000.0)
"""Steps after which a use counts half in the popularities: what the requests before these
used, and what most requests use."""
INITIAL_WEIGHTS = (0.0, 0.25, 0.5, 0.05, 0.05, 0.1, 0.25, 0.0)
"""Before anything was used: averages, popularities, prior, value, constant. A step or two of
evidence outweighs them."""
POPULARITY = len(HALF_LIVES)
PRIOR, VALUE, CONSTANT = range(POPULARITY + len(POPULARITY_HALF_LIVES), len(INITIAL_WEIGHTS))
LASTING = PRIOR - 1
"""The popularity that stands in where nothing else is known."""

COLD_TOKENS = 0.1
"""Tokens of own history that weigh as much as what stands in for it: below one, since a
request's first token says more about it than all other requests."""

LEARNING_REQUESTS = 4
"""Requests learned from at a time: more add cost per step, and evidence comes anyway."""

LARGEST_MODELLED = 16384
"""Experts in all layers beyond which the successor model costs more than it brings."""

STATE_HALF_LIFE_TOKENS = 3.0
"""After which a use counts half in the successor model's state."""

COLLECTED = 300
"""Activation matrices of finished requests that are kept."""


class Forecast:
    """Expected use of every expert by the running requests; see the module.

    Attributes:
        collection: activation matrices of finished requests.
        tracer: those of the running ones.
        model: the successor model, None where there are more experts than it is for.
        requests: state of the running requests.
        full_score: forecast for an expert that every request uses at every token, in the long
            run.
        gain: what a score gains for each unit of a layer call's votes, as the averages move
            towards what the call used; it loses ``gain * fading`` at the same time.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_layers, self.num_experts = num_layers, num_experts
        size = num_layers * num_experts
        self.collection = ActivationCollection(num_layers, num_experts, COLLECTED)
        self.tracer = ExpertTracer(num_layers, num_experts)
        self.model: SuccessorModel | None = None
        if size <= LARGEST_MODELLED:
            self.model = SuccessorModel(num_layers, num_experts)
        self._mixture = Mixture(np.array(INITIAL_WEIGHTS), size)
        parts = self._mixture.parts
        parts[CONSTANT] = 1.0
        self._active = np.ones(len(parts), np.bool_)
        self._active[VALUE] = self.model is not None
        self._averages = UseAverages(HALF_LIVES, parts[:POPULARITY])
        self._popularity = FadingTables(parts[POPULARITY:PRIOR])
        self._popularity_keep = 2.0 ** (-1.0 / np.array(POPULARITY_HALF_LIVES))
        self._popularity_weight = np.zeros_like(self._popularity_keep)
        self.requests = RunningRequests(self.model.state_size if self.model else 0)
        self._state_decay = 2.0 ** (-1.0 / STATE_HALF_LIFE_TOKENS)
        self._top_k = 0
        self._read: FloatArray = np.zeros(len(parts), np.float32)
        self._fade: FloatArray = np.zeros(len(parts), np.float32)
        self.gain = 0.0
        known = self._mixture.weights
        self.full_score = float(known.sum() - known[VALUE] - known[PRIOR])

    def begin_step(self, tokens: StepTokens) -> None:
        """Takes new requests in and refreshes the forecasts."""
        self._step = tokens
        state = self.requests
        self._running = np.array(
            [
                state.index_of[request] if request in state.index_of else self._add(request)
                for request in tokens.requests
            ],
            np.int64,
        )
        self._refresh_parts()
        self._mix()

    @property
    def scores(self) -> FloatArray:
        """float32 ``[layers, experts]``, a new array."""
        return (self._read @ self._mixture.parts).reshape(self.num_layers, -1)

    @property
    def fading(self) -> FloatArray:
        """float32 ``[layers, experts]``, what the averages move away from; a new array."""
        return (self._fade @ self._mixture.parts).reshape(self.num_layers, -1)

    def _add(self, request: str) -> int:
        index = self.requests.add(request)
        self._averages.add(index)
        return index

    def _refresh_parts(self) -> None:
        state, count = self.requests, len(self.requests)
        parts = self._mixture.parts
        self._averages.refresh_totals(count)
        parts[PRIOR] = self.collection.mean().reshape(-1)
        if self.model is not None and self.model.version:
            self._values = self.model.predict(state.state[:count])
            np.sum(np.clip(self._values, 0.0, 1.0), axis=0, out=parts[VALUE])

    def _mix(self) -> None:
        """Refits the mixture: what to read the scores from, and how they follow a call."""
        count = len(self.requests)
        averages, mixing = self._averages, self._mixture.mixing
        mixing[...] = 0.0
        mixing[CONSTANT, CONSTANT] = 1.0
        mixing[VALUE, VALUE] = 1.0 / count
        mixing[PRIOR, PRIOR] = self._top_k  # a layer of the mean sums to 1, its uses to top_k
        if self._popularity_weight.all():
            popular = np.arange(POPULARITY, PRIOR)
            mixing[popular, popular] = 1.0 / self._popularity_weight
        stand_in = PRIOR if len(self.collection) else LASTING
        cold = COLD_TOKENS * (1.0 - averages.decay)
        reached = averages.weight[:, :count].mean(axis=1)
        history = np.arange(POPULARITY)
        mixing[history, history] = 1.0 / (count * (reached + cold))
        mixing[history, stand_in] = cold / (reached + cold) * mixing[stand_in, stand_in]
        mixing[:, :POPULARITY] *= averages.totals.scale
        mixing[:, POPULARITY:PRIOR] *= self._popularity.scale
        self._mixture.fit(self._active)
        weights = self._mixture.weights.copy()
        # An average moves towards what this call used by a share that shrinks to 1 - decay.
        share = (1.0 - averages.decay) / (1.0 - (1.0 - reached) * averages.decay + cold)
        gains = weights[:POPULARITY] * share
        self.gain = float(gains.sum())
        self._read = (weights @ mixing).astype(np.float32)
        if self.model is None or not self.model.version:
            weights[VALUE] = 0.0
        if not len(self.collection):
            weights[PRIOR] = 0.0
        self.full_score = float(weights.sum())
        fade = gains @ mixing[:POPULARITY] / (self.gain or 1.0)
        self._fade = fade.astype(np.float32)

    def follow(
        self,
        first_layer: int,
        ids: npt.NDArray[np.int32],
        scores: FloatArray,
        factors: FloatArray,
    ) -> None:
        """Lets all values, and scores with them, follow what layers of this step routed to.

        Nothing happens where the successor model has learned nothing yet, or is too large for
        this.

        Args:
            first_layer: layer of ``ids[0]``.
            ids: contiguous ``[layers, tokens, top_k]`` of consecutive layers.
            scores: ``[num_layers, experts]``, changed in place.
            factors: ``[num_layers]``, what a forecast counts in a layer's scores.
        """
        if self.model is None or not self.model.version or not self.model.dense:
            return
        weight = self._mixture.weights[VALUE] / len(self.requests)
        weighted = factors * np.float32(weight)
        owners = self._step.request_of_token
        lengths = np.bincount(owners, minlength=self._running.size)
        kept = (self._state_decay**lengths).astype(np.float32)
        step = ValueStep(
            values=self._values.ctypes.data,
            weights=self.model.weights.ctypes.data,
            states=self.requests.state.ctypes.data,
            ids=ids.ctypes.data,
            owners=owners.ctypes.data,
            running=self._running.ctypes.data,
            kept=kept.ctypes.data,
            scores=scores.ctypes.data,
            factors=weighted.ctypes.data,
            num_layers=self.num_layers,
            num_experts=self.num_experts,
            first_layer=first_layer,
            end_layer=first_layer + len(ids),
            num_tokens=ids.shape[1],
            top_k=ids.shape[2],
            num_running=self._running.size,
            use=1.0 - self._state_decay,
        )
        check(core.vmo_follow_values(step))

    def trace(self, tokens: StepTokens, ids: npt.NDArray[np.int32]) -> None:
        """Counts a complete step in the running requests' matrices; ids as :meth:`take_in`."""
        self.tracer.begin_step(tokens)
        self.tracer.observe_step(ids)

    def take_in(
        self, tokens: StepTokens, ids: npt.NDArray[np.int32], votes: FloatArray
    ) -> None:
        """Learns from a complete step.

        Args:
            tokens: those of :meth:`begin_step`, or as many of them as count.
            ids: ``[layers, tokens, top_k]``.
            votes: ``[layers, experts]``, share of the requests that used each expert.
        """
        self._top_k = ids.shape[2]
        self.trace(tokens, ids)
        used = votes.reshape(-1)
        self._mixture.learn(used)
        uses = StepUses.of_step(ids, tokens, self._running, self.num_experts)
        gained = 1.0 - self._popularity_keep
        keys = np.unique(uses.keys)
        self._popularity.fade(self._popularity_keep)
        self._popularity.add(keys, gained[:, None] * used[keys])
        self._popularity_weight += gained * (1.0 - self._popularity_weight)
        self._averages.take_in(uses, len(self.requests))
        if self.model is not None:
            is_prefill = np.zeros(len(self.requests), np.bool_)
            is_prefill[self._running] = tokens.is_prefill
            # Verified guesses of a drafter are tokens like others: each has a successor.
            for of_round in uses.rounds(tokens.is_prefill):
                self._learn_values(self.model, of_round, is_prefill)

    def _learn_values(
        self, model: SuccessorModel, uses: StepUses, is_prefill: npt.NDArray[np.bool_]
    ) -> None:
        """Moves the successor model's states on and lets it learn from some of them.

        ``is_prefill``: bool ``[requests]``, by the running requests' indices.
        """
        state, indices = self.requests, uses.indices
        started = indices[(indices < LEARNING_REQUESTS) & (state.tokens[indices] > 0)]
        model.discount_traces(state.trace, state.state, started)
        state.state[indices] *= (self._state_decay**uses.lengths).astype(np.float32)[:, None]
        gain = ((1.0 - self._state_decay) * self._state_decay**uses.age).astype(np.float32)
        model.add_uses(state.state, uses.owner, uses.keys, gain)
        state.tokens[indices] += uses.lengths
        learnable = indices[
            (indices < LEARNING_REQUESTS) & (uses.lengths == 1) & ~is_prefill[indices]
        ]
        if learnable.size:
            used = np.zeros((LEARNING_REQUESTS, model.size), np.float32)
            few = uses.owner < LEARNING_REQUESTS
            used[uses.owner[few], uses.keys[few]] = 1.0
            model.learn(state.state[learnable], state.trace[learnable], used[learnable])

    def end_request(self, request: str) -> None:
        """The request stops counting at once; its matrix enters the collection."""
        if request in self.requests.index_of:
            self._averages.move(*self.requests.remove(request))
        activation = self.tracer.end_request(request)
        if activation is not None:
            self.collection.add(activation.counts)
