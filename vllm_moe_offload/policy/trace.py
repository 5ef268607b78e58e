"""The ``trace`` policy: request-level traces decide what stays.

Score of an expert = what the running requests are expected to use of it at their next tokens,
a mixture of forecasts whose weights are learned online (``policy/mixture.py``):

* *history*: the mean of the requests' own averages over few and over many tokens;
* *popularity*: what all requests used lately, those that ended included;
* *prior*: what the collection knows: the finished requests nearest to a request's own matrix
  (prompt included), else the collection's mean. It also stands in for the history of a
  request that has none yet;
* *value*: the successor model (``policy/value.py``) on each request's recent routing.

Layers are visited in a cycle, so an expert of the layer just passed waits a whole step for its
next use and one of the next layer a moment: scores shrink by ``exp(-distance_weight)`` over
one cycle (Belady's rule seen from a forecast). And plain policies run beside it as shadows
(``policy/fallback.py``): while one of them hits more, the cache follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.policy.averages import StepUses, UseAverages
from vllm_moe_offload.policy.base import FloatArray, IdArray, PlannerRules, Policy, StepRows
from vllm_moe_offload.policy.fallback import Fallback, Shadow
from vllm_moe_offload.policy.mixture import Mixture
from vllm_moe_offload.policy.requests import RunningRequests
from vllm_moe_offload.policy.value import SuccessorModel
from vllm_moe_offload.trace.activation import ActivationTracer
from vllm_moe_offload.trace.collection import ActivationCollection

HALF_LIVES = (1.0, 4.0, 16.0, 200.0)
"""Tokens after which a use counts half in each average: the last token, a phrase, a
paragraph, the whole answer. The mixture sorts out which of them matters."""
POPULARITY_HALF_LIVES = (30.0, 1000.0)
"""Steps after which a use counts half in the popularities: what the requests before these
used, and what most requests use."""
INITIAL_WEIGHTS = (0.0, 0.25, 0.0, 0.5, 0.05, 0.05, 0.1, 0.25, 0.0)
"""Before anything was used: averages, popularities, prior, value, constant. A step or two of
evidence outweighs them."""
POPULARITY = len(HALF_LIVES)
PRIOR, VALUE, CONSTANT = range(POPULARITY + len(POPULARITY_HALF_LIVES), len(INITIAL_WEIGHTS))
LASTING = PRIOR - 1
"""The popularity that stands in where nothing else is known."""

COLD_TOKENS = 0.1
"""Tokens of own history that weigh as much as what stands in for it: below one, since a
request's first token says more about it than all other requests."""

MATCHED_TOKENS = 32
"""Age at which a request is matched for the last time: then its own history says more."""

MATCHES_PER_STEP = 2
"""Requests that ask the collection in one step, so that no step waits for many."""

LEARNING_ROWS = 4
"""Requests learned from at a time: more add cost per step, and evidence comes anyway."""

LARGEST_MODELLED = 16384
"""Experts in all layers beyond which the successor model costs more than it brings."""


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """Constants of the policy; none is tuned to a model.

    Attributes:
        value: factor on the successor model's part of the scores; 0 turns it off.
        history: factor on the averages' part; 0 turns them off.
        slow_history: further factor on the slowest average; 0 turns it off.
        popularity: factor on what all requests used; 0 turns it off.
        prior: factor on the collection's part; 0 turns the collection off.
        state_half_life: tokens after which a use counts half in the successor model's state.
        discount: of the future, per token, in the successor model.
        ridge: its regularisation, in tokens of evidence.
        memory_tokens: its evidence kept; older routing fades, so that a shift is followed.
        mixture_discount: of the future, per step, in what the mixture forecasts.
        mixture_steps: evidence that the mixture keeps.
        distance_weight: see the module; 0 turns it off.
        entries: capacity of the collection.
        layers_ahead: layers whose forecasts follow each layer call at once, at the price of a
            matrix product per layer call. Below 0, only the layer's own history does, and
            the rest follows at the next step.
        fallback: whether shadows are heeded (1) or not (0).
    """

    value: float = 1.0
    history: float = 1.0
    slow_history: float = 1.0
    popularity: float = 1.0
    prior: float = 1.0
    state_half_life: float = 3.0
    discount: float = 0.7
    ridge: float = 40.0
    memory_tokens: float = 50_000.0
    mixture_discount: float = 0.4
    mixture_steps: float = 500.0
    distance_weight: float = 0.5
    entries: float = 300
    layers_ahead: float = -1
    fallback: float = 1.0


class TracePolicy(Policy):
    """Keeps what the running requests' traces say they will use.

    Attributes:
        collection: activation matrices of finished requests.
        tracer: those of the running ones.
        model: the successor model, None where it is off or the model is too large.
    """

    name: ClassVar[str] = "trace"
    rules: ClassVar[PlannerRules] = PlannerRules(admission=True)

    def __init__(self, num_layers: int, num_experts: int, **options: float) -> None:
        """``options``: fields of :class:`TraceOptions`."""
        super().__init__(num_layers, num_experts)
        self.options = chosen = TraceOptions(**options)
        size = num_layers * num_experts
        self.collection = ActivationCollection(num_layers, num_experts, int(chosen.entries))
        self.tracer = ActivationTracer(num_layers, num_experts)
        self.model: SuccessorModel | None = None
        if chosen.value != 0 and size <= LARGEST_MODELLED:
            self.model = SuccessorModel(
                num_layers,
                num_experts,
                discount=chosen.discount,
                ridge=chosen.ridge,
                memory_tokens=chosen.memory_tokens,
            )
        self._mixture = Mixture(
            np.array(INITIAL_WEIGHTS),
            size,
            discount=chosen.mixture_discount,
            memory_steps=chosen.mixture_steps,
        )
        parts = self._mixture.parts
        parts[CONSTANT] = 1.0
        self._factors = np.ones(len(parts))
        self._factors[:POPULARITY] = chosen.history
        self._factors[POPULARITY - 1] *= chosen.slow_history
        self._factors[POPULARITY:PRIOR] = chosen.popularity
        self._factors[PRIOR] = chosen.prior
        self._factors[VALUE] = chosen.value if self.model is not None else 0.0
        self._averages = UseAverages(HALF_LIVES, parts[:POPULARITY])
        self._popularity_keep = 2.0 ** (-1.0 / np.array(POPULARITY_HALF_LIVES)[:, None])
        self._popularity_weight = np.zeros_like(self._popularity_keep)
        self._requests = RunningRequests(size, self.model.state_size if self.model else 0)
        self._is_prior_current = True
        self._state_decay = 2.0 ** (-1.0 / chosen.state_half_life)
        self._fallback: Fallback | None = None

        shape = (num_layers, num_experts)
        position = np.arange(num_layers, dtype=np.float32)[:, None] / num_layers
        self._unvisited = np.exp(-chosen.distance_weight * position).astype(np.float32)
        self._visited_factor = np.float32(np.exp(-chosen.distance_weight))
        self._ahead = int(chosen.layers_ahead)
        self._vote_gain: FloatArray = np.zeros((num_layers, 1), np.float32)
        self._fade: FloatArray = np.zeros(shape, np.float32)
        self._change: FloatArray = np.zeros(num_experts, np.float32)
        self._votes: FloatArray = np.zeros(shape, np.float32)
        self._ids: npt.NDArray[np.int32] = np.zeros((num_layers, 0, 0), np.int32)
        self._layers_seen = 0

    @property
    def full_score(self) -> float:
        """Score that an expert used by every request at every token tends to.

        Makes a probability p of being used comparable with :attr:`scores`: ``p * full_score``.
        Without the distance to the next visit, which shrinks a score by at most
        ``exp(-distance_weight)``. While a plain policy rules, scores are 1 for what it holds,
        0 for the rest.
        """
        if self._fallback is not None and self._fallback.winner is not None:
            return 1.0
        known = self._mixture.weights * self._factors
        if self.model is None or not self.model.version:
            known[VALUE] = 0.0
        if not len(self.collection):
            known[PRIOR] = 0.0
        return float(known.sum())

    def attach_shadows(self, own: Shadow, plain: Sequence[Shadow]) -> None:
        """Lets shadows compete.

        Args:
            own: shadow that plans from this policy's own scores.
            plain: shadows of the plain policies.
        """
        self._fallback = Fallback(own, plain)

    # ---- one step ----------------------------------------------------------------------

    def begin_step(self, rows: StepRows) -> None:
        """Takes new requests in and refreshes the scores of all layers."""
        super().begin_step(rows)
        self._layers_seen = 0
        state = self._requests
        self._running = np.array(
            [
                state.row_of[request] if request in state.row_of else self._add(request)
                for request in rows.requests
            ],
            np.int64,
        )
        self._match(rows)
        self._forecast()
        read, follow = self._mix()
        shape = self.scores.shape
        parts = self._mixture.parts
        # One product each: BLAS is slower at both at once, a matrix of two rows.
        own = (read.astype(np.float32) @ parts).reshape(shape)
        own *= self._unvisited
        faded = (follow.astype(np.float32) @ parts).reshape(shape)
        np.multiply(faded, self._vote_gain, out=self._fade)
        if self._fallback is None:
            self.scores[...] = own
        else:
            self._fallback.begin_step(rows, own)
            if self._fallback.winner is None:
                self.scores[...] = own

    def _add(self, request: str) -> int:
        row = self._requests.add(request)
        self._averages.add(row)
        return row

    def _match(self, rows: StepRows) -> None:
        """Asks the collection what requests like the young ones used."""
        if not self.options.prior or not len(self.collection):
            return
        state = self._requests
        matched = 0
        for row, request in zip(self._running.tolist(), rows.requests, strict=True):
            tokens = int(state.tokens[row])
            if tokens < state.match_at[row] or tokens > MATCHED_TOKENS:
                continue
            if matched == MATCHES_PER_STEP:
                break  # the others are still due at the next step
            matched += 1
            state.match_at[row] = max(1, 2 * tokens)
            forecast = self.collection.mean()
            activation = self.tracer.get(request)
            if activation is not None:
                indices, cosines = self.collection.nearest(activation.counts, 3)
                for index, cosine in zip(indices, cosines, strict=True):
                    self.collection.add_distribution(int(index), float(cosine), forecast)
                forecast /= 1.0 + float(cosines.sum())
            state.prior[row] = forecast.reshape(-1)
            self._is_prior_current = False

    def _forecast(self) -> None:
        """Refreshes the parts that forecasts are made of."""
        state, count = self._requests, len(self._requests)
        parts = self._mixture.parts
        self._averages.refresh_totals(count)
        if not self._is_prior_current:
            np.sum(state.prior[:count], axis=0, out=parts[PRIOR])
            self._is_prior_current = True
        if self.model is not None and self.model.version:
            self._values = self.model.predict(state.state[:count])
            np.sum(np.clip(self._values, 0.0, 1.0), axis=0, out=parts[VALUE])

    def _mix(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Refits the mixture.

        Returns:
            ``[forecasts]`` each: factors on the parts that give the scores, and those that
            give what a layer's history loses at its call, per unit of ``_vote_gain``.
        """
        count = len(self._requests)
        averages, mixing = self._averages, self._mixture.mixing
        mixing[...] = 0.0
        mixing[CONSTANT, CONSTANT] = 1.0
        mixing[VALUE, VALUE] = 1.0 / count
        mixing[PRIOR, PRIOR] = self._ids.shape[2] / count  # its rows sum to 1, uses to top_k
        if self._popularity_weight.all():
            popular = np.arange(POPULARITY, PRIOR)
            mixing[popular, popular] = 1.0 / self._popularity_weight[:, 0]
        stand_in = PRIOR if self.options.prior and len(self.collection) else LASTING
        if stand_in == LASTING and not self.options.popularity:
            stand_in = CONSTANT  # the same for all: nothing is known
        cold = COLD_TOKENS * (1.0 - averages.decay)
        reached = averages.weight[:, :count].mean(axis=1)
        history = np.arange(POPULARITY)
        mixing[history, history] = 1.0 / (count * (reached + cold))
        mixing[history, stand_in] = cold / (reached + cold) * mixing[stand_in, stand_in]
        self._mixture.fit(self._factors != 0)
        weights = self._mixture.weights * self._factors
        # An average moves towards what this call used by a share that shrinks to 1 - decay.
        share = (1.0 - averages.decay) / (1.0 - (1.0 - reached) * averages.decay + cold)
        gains = weights[:POPULARITY] * share
        np.multiply(
            self._unvisited, np.float32(gains.sum() * self._visited_factor), self._vote_gain
        )
        follow = gains @ mixing[:POPULARITY] / (gains.sum() or 1.0)
        return weights @ mixing, follow

    def observe(self, layer: int, ids: IdArray, votes: FloatArray) -> None:
        """Updates the scores of this layer; with ``layers_ahead``, also of the next ones."""
        if self._ids.shape[1:] != ids.shape:
            self._ids = np.zeros((self.num_layers, *ids.shape), np.int32)
        self._ids[layer] = ids
        self._votes[layer] = votes
        self._layers_seen += 1
        if self._fallback is not None and self._fallback.winner is not None:
            self._fallback.lead(layer, self._ids, votes, self.scores)
            return
        if self._ahead >= 0:
            self._look_ahead(layer)
        change, row = self._change, self.scores[layer]
        np.multiply(votes, self._vote_gain[layer], out=change)
        change -= self._fade[layer]
        row *= self._visited_factor
        row += change

    def _look_ahead(self, layer: int) -> None:
        """Lets the forecasts of the next layers follow this call's routing."""
        if self.model is None or not self.model.version or not self.model.dense:
            return
        state, count, experts = self._requests, len(self._requests), self.num_experts
        end = min(self.num_layers, layer + 1 + self._ahead)
        own = slice(layer * experts, (layer + 1) * experts)
        window = slice(layer * experts, end * experts)
        lengths = np.bincount(self.rows.request_of_row, minlength=self._running.size)
        change = np.zeros((count, experts), np.float32)
        kept = (self._state_decay**lengths).astype(np.float32)[:, None]
        change[self._running] = (kept - 1.0) * state.state[self._running, own]
        owner = self._running[self.rows.request_of_row]
        np.add.at(change, (owner[:, None], self._ids[layer]), 1.0 - self._state_decay)
        before = np.clip(self._values[:, window], 0.0, 1.0).sum(axis=0)
        self._values[:, window] += change @ self.model.weights[own, window]
        after = np.clip(self._values[:, window], 0.0, 1.0).sum(axis=0)
        weight = self._mixture.weights[VALUE] * self._factors[VALUE] / count
        gain = (after - before).reshape(-1, experts) * np.float32(weight)
        self.scores[layer:end] += gain * self._unvisited[layer:end]

    def end_step(self) -> None:
        """Takes the step in; one that broke off between layers is dropped."""
        if self._layers_seen != self.num_layers:
            return
        if self._fallback is not None:
            gain = self._votes * self._vote_gain
            gain -= self._fade
            self._fallback.end_step(self._ids, self._votes, gain, float(self._visited_factor))
        self.tracer.begin_step(self.rows)
        self.tracer.observe_step(self._ids)
        state, rows = self._requests, self._running
        used = self._votes.reshape(-1)
        self._mixture.learn(used)
        gained = 1.0 - self._popularity_keep
        popularity = self._mixture.parts[POPULARITY:PRIOR]
        popularity *= self._popularity_keep.astype(np.float32)
        popularity += gained.astype(np.float32) * used
        self._popularity_weight += gained * (1.0 - self._popularity_weight)
        uses = StepUses.of_step(self._ids, self.rows, rows, self.num_experts)
        self._averages.take_in(uses, len(state))
        if self.model is not None:
            self._learn_values(self.model, uses)
        state.tokens[rows] += uses.lengths

    def _learn_values(self, model: SuccessorModel, uses: StepUses) -> None:
        """Moves the successor model's states on and lets it learn from some of them."""
        state, rows = self._requests, uses.rows
        started = rows[(rows < LEARNING_ROWS) & (state.tokens[rows] > 0)]
        model.discount_traces(state.trace, state.state, started)
        state.state[rows] *= (self._state_decay**uses.lengths).astype(np.float32)[:, None]
        gain = ((1.0 - self._state_decay) * self._state_decay**uses.age).astype(np.float32)
        model.add_uses(state.state, uses.owner, uses.keys, gain)
        learnable = rows[(rows < LEARNING_ROWS) & (uses.lengths == 1) & ~self.rows.is_prefill]
        if learnable.size:
            used = np.zeros((LEARNING_ROWS, model.size), np.float32)
            few = uses.owner < LEARNING_ROWS
            used[uses.owner[few], uses.keys[few]] = 1.0
            model.learn(state.state[learnable], state.trace[learnable], used[learnable])

    def end_request(self, request: str) -> None:
        """The request stops counting at once; its matrix enters the collection."""
        if request in self._requests.row_of:
            self._averages.move(*self._requests.remove(request))
            self._is_prior_current = False
        activation = self.tracer.end_request(request)
        if activation is not None and self.options.prior:
            self.collection.add(activation.counts)
