"""The ``trace`` policy: request-level traces decide what stays.

Score of an expert = what the running requests are expected to use at their next tokens:

* *value*: the successor model (``policy/value.py``) on each request's recent routing, joined
  over requests as the probability that at least one of them uses the expert;
* *history*: the mean of the requests' own decayed frequencies (LRFU), which needs nothing
  learned and carries the first requests;
* *prior*: for a request without much history, what the collection knows: the finished
  requests nearest to its own matrix (prompt included), else the collection's mean;
* *distance*: layers are visited in a cycle, so an expert of the layer just passed waits a
  whole step for its next use and one of the next layer a moment. Scores shrink by
  ``exp(-distance_weight)`` over one cycle (Belady's rule seen from a forecast);
* *fall-back*: plain policies run as shadows (page tables without bytes) on the same routing;
  while one of them hits more, the cache follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.policy.base import FloatArray, IdArray, PlannerRules, Policy, StepRows
from vllm_moe_offload.policy.fallback import Fallback, Shadow
from vllm_moe_offload.policy.requests import Decay, RunningRequests, Uses
from vllm_moe_offload.policy.value import SuccessorModel
from vllm_moe_offload.trace.activation import ActivationTracer
from vllm_moe_offload.trace.collection import ActivationCollection

SLOW_SHARE_THAT_MATTERS = 0.02
"""Share of the slow frequency below which keeping it is not worth the time."""

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
        value: weight of the successor model; 0 turns it off.
        value_tokens: tokens of evidence at which the successor model counts half.
        history: weight of the requests' own decayed frequency.
        slow_history: the same for a frequency that fades more slowly.
        slow_half_life: its half-life in tokens.
        history_half_life: tokens after which a use counts half.
        state_half_life: the same for the successor model's state.
        discount: of the successor model, per token.
        ridge: its regularisation, in tokens of evidence.
        memory_tokens: evidence kept; older routing fades, so that a shift is followed.
        distance_weight: see the module; 0 turns it off.
        prior: weight of the collection's forecast for a request without history.
        prior_tokens: tokens of own history that halve the prior's weight.
        prior_floor: share of the prior's weight that stays: what nobody uses now is still
            told apart by what others used before.
        entries: capacity of the collection.
        layers_ahead: layers whose scores follow each layer call at once; the rest is
            refreshed at the next step. Below 0, layer calls cost as little as LRFU's: only
            the history of the layer itself follows at once.
        fallback: whether shadows are heeded (1) or not (0).
    """

    value: float = 1.0
    value_tokens: float = 500.0
    history: float = 1.0
    history_half_life: float = 4.0
    slow_history: float = 3.0
    slow_half_life: float = 200.0
    state_half_life: float = 3.0
    discount: float = 0.7
    ridge: float = 40.0
    memory_tokens: float = 50_000.0
    distance_weight: float = 0.5
    prior: float = 0.5
    prior_tokens: float = 4.0
    prior_floor: float = 0.0
    entries: float = 300
    layers_ahead: float = -1
    fallback: float = 1.0


class TracePolicy(Policy):
    """Keeps what the running requests' traces say they will use."""

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
        if chosen.value > 0 and size <= LARGEST_MODELLED:
            self.model = SuccessorModel(
                num_layers,
                num_experts,
                discount=chosen.discount,
                ridge=chosen.ridge,
                memory_tokens=chosen.memory_tokens,
            )
        width = self.model.state_size + 1 if self.model is not None else 1
        self._requests = RunningRequests(size, width)
        self._table: FloatArray = self.scores
        self._fallback: Fallback | None = None
        self._state_decay = 2.0 ** (-1.0 / chosen.state_half_life)
        self._slow_decay = 2.0 ** (-1.0 / chosen.slow_half_life)
        self._history_decay = 2.0 ** (-1.0 / chosen.history_half_life)
        position = np.arange(num_layers, dtype=np.float32) / num_layers
        self._unvisited = np.exp(-chosen.distance_weight * position).astype(np.float32)
        self._visited_factor = np.float32(np.exp(-chosen.distance_weight))
        self._ahead = int(chosen.layers_ahead)
        self._step_ids: npt.NDArray[np.int64] = np.zeros((num_layers, 0, 0), np.int64)
        self._layers_seen = 0
        self._value_weight = np.float32(0.0)
        self._slow_share = np.float32(chosen.slow_history)

    def bind(self, scores: FloatArray) -> None:
        """See :meth:`Policy.bind`; without shadows the own scores are the cache's."""
        super().bind(scores)
        self._table = self.scores

    @property
    def full_score(self) -> float:
        """Score that an expert used by every request at every token tends to.

        Makes a probability p of being used comparable with :attr:`scores`: ``p * full_score``.
        Without the distance to the next visit, which shrinks a score by at most
        ``exp(-distance_weight)``, and without the prior, whose weight vanishes as requests
        grow. While a plain policy rules, scores are 1 for what it holds, 0 for the rest.
        """
        if self._fallback is not None and self._fallback.winner is not None:
            return 1.0
        slow = self._slow_share if self._slow_share > SLOW_SHARE_THAT_MATTERS else 0.0
        value = self._value_weight if self.model is not None and self.model.version else 0.0
        return float(self.options.history * (1.0 + slow) + value)

    def attach_shadows(
        self, own: Shadow, plain: Sequence[Shadow], counters: npt.NDArray[np.int64]
    ) -> None:
        """Lets shadows compete.

        Args:
            own: shadow that plans from this policy's own scores while another one rules.
            plain: shadows of the plain policies.
            counters: the cache's own counters; hits first.
        """
        own.scores[...] = self._table
        self._table = own.scores
        self._fallback = Fallback(own, plain, counters)

    # ---- one step ----------------------------------------------------------------------

    def begin_step(self, rows: StepRows) -> None:
        """Takes new requests in and refreshes the scores of all layers."""
        super().begin_step(rows)
        self._layers_seen = 0
        state = self._requests
        self._rows_in_step = np.array(
            [
                state.row_of[request] if request in state.row_of else state.add(request)
                for request in rows.requests
            ],
            np.int64,
        )
        lengths = np.bincount(rows.request_of_row, minlength=len(rows.requests))
        self._prepare_decay(rows, lengths)
        self._refresh_priors(rows)
        self._discount_traces()
        if self.model is not None:
            state.used[: len(state)] = 0
        self._refresh()
        if self._fallback is not None:
            self._fallback.begin_step(rows)
            if self._fallback.winner is None:
                self.scores[...] = self._table

    def _prepare_decay(self, rows: StepRows, lengths: npt.NDArray[np.int64]) -> None:
        """Decay and gain of every running request; one that does not run keeps its state."""
        steps = np.zeros(len(self._requests), np.int64)
        steps[self._rows_in_step] = lengths
        # A request with n rows forgets n times; its older rows count less already.
        ends = np.cumsum(lengths)
        age = ends[rows.request_of_row] - 1 - np.arange(rows.request_of_row.size)
        self._lengths = lengths
        self._for_state, self._for_history, self._for_slow = (
            Decay.of_step(decay, steps, age)
            for decay in (self._state_decay, self._history_decay, self._slow_decay)
        )
        self._owner = self._rows_in_step[rows.request_of_row]

    def _refresh_priors(self, rows: StepRows) -> None:
        if self.options.prior <= 0 or not len(self.collection):
            return
        state = self._requests
        matched = 0
        for row, request in zip(self._rows_in_step, rows.requests, strict=True):
            tokens = int(state.tokens[row])
            if tokens < state.match_at[row] or tokens > 8 * self.options.prior_tokens:
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
                    forecast += cosine * self.collection.distribution(int(index))
                forecast /= 1.0 + float(cosines.sum())
            state.prior[row] = forecast.reshape(-1)

    def _discount_traces(self) -> None:
        if self.model is None:
            return
        state, rows = self._requests, self._rows_in_step
        started = rows[(state.tokens[rows] > 0) & (rows < LEARNING_ROWS)]
        if not started.size:
            return
        discount = self.model.discount
        traces = state.trace[started] * discount
        traces[:, :-1] += (1 - discount) * self.model.project(state.activity[started])
        traces[:, -1] += 1 - discount
        state.trace[started] = traces

    def _refresh(self) -> None:
        """Scores of all layers, as if none had been visited."""
        state, count = self._requests, len(self._requests)
        if self.model is not None and self.model.version:
            states = self.model.project(state.activity[:count])
            state.value[:count] = self.model.predict(states)
        learned = self.model.num_tokens if self.model is not None else 0
        evidence = learned / (learned + self.options.value_tokens) if learned else 0.0
        self._value_weight = np.float32(self.options.value * evidence)
        # Of lasting preferences, too, the successor model knows more once it has evidence.
        self._slow_share = np.float32(self.options.slow_history * (1.0 - evidence))
        self._share = np.float32(self.options.history / max(count, 1))
        options = self.options
        cold = options.prior_tokens / (options.prior_tokens + state.tokens[:count])
        cold = options.prior * np.maximum(cold, options.prior_floor)
        self._cold = (cold / max(count, 1)).astype(np.float32)
        self._has_prior = options.prior > 0 and len(self.collection) > 0
        self._write(0, self.num_layers)
        if self._ahead < 0:
            mean = state.history[:count].mean(axis=0).reshape(self._table.shape)
            self._mean_history = mean
            gain = (1 - self._history_decay) * options.history * self._unvisited
            self._own_gain = gain.astype(np.float32)

    def _write(self, begin: int, end: int) -> None:
        """Writes the scores of layers ``[begin, end)``, not visited in this step."""
        state, count = self._requests, len(self._requests)
        part = slice(begin * self.num_experts, end * self.num_experts)
        total = state.history[:count, part].sum(axis=0)
        if self._slow_share > SLOW_SHARE_THAT_MATTERS:
            total += self._slow_share * state.slow[:count, part].sum(axis=0)
        total *= self._share
        if self.model is not None and self.model.version:
            if count == 1:
                total += self._value_weight * np.maximum(state.value[0, part], 0.0)
            else:
                unused = 1.0 - np.minimum(np.maximum(state.value[:count, part], 0.0), 1.0)
                total += self._value_weight
                total -= self._value_weight * np.multiply.reduce(unused, axis=0)
        if self._has_prior:
            total += self._cold @ state.prior[:count, part]
        table = total.reshape(end - begin, self.num_experts)
        np.multiply(table, self._unvisited[begin:end, None], out=self._table[begin:end])

    def observe(self, layer: int, ids: IdArray, votes: FloatArray) -> None:
        """Updates the scores of this layer and, through the model, of the next ones."""
        if self._step_ids.shape[1:] != ids.shape:
            self._step_ids = np.zeros((self.num_layers, *ids.shape), np.int64)
        self._step_ids[layer] = ids
        self._layers_seen += 1
        end = layer + 1
        if self._ahead < 0:
            # Mean of the requests' histories after this call; the rest keeps until the step's end.
            row = self._table[layer]
            row += (votes - self._mean_history[layer]) * self._own_gain[layer]
        else:
            end = self._absorb_layer(layer)
        self._table[layer] *= self._visited_factor
        if self._fallback is not None:
            self._fallback.observe(layer, ids, votes)
            if self._fallback.winner is not None:
                self._fallback.follow(self.scores)
            else:
                self.scores[layer:end] = self._table[layer:end]

    def _absorb_layer(self, layer: int) -> int:
        """Takes one layer's routing in; returns the layer up to which scores changed."""
        own = slice(layer * self.num_experts, (layer + 1) * self.num_experts)
        before = self._requests.activity[: len(self._requests), own].copy()
        self._absorb(layer, layer + 1)
        end = layer + 1
        if self.model is not None and self.model.version:
            end = min(self.num_layers, end + self._ahead)
            change = self._requests.activity[: len(self._requests), own] - before
            window = slice(layer * self.num_experts, end * self.num_experts)
            weights = self.model.weights_of(layer, self.num_experts, end)
            self._requests.value[: len(self._requests), window] += change @ weights
        self._write(layer, end)
        return end

    def _absorb(self, begin: int, end: int) -> None:
        """Moves the averages of layers ``[begin, end)`` on."""
        state, count = self._requests, len(self._requests)
        own = slice(begin * self.num_experts, end * self.num_experts)
        uses = Uses.of_layers(self._step_ids[begin:end], self._owner, self.num_experts)
        self._for_history.apply(state.history[:count, own], uses)
        if self._slow_share > SLOW_SHARE_THAT_MATTERS:
            self._for_slow.apply(state.slow[:count, own], uses)
        if self.model is not None:
            self._for_state.apply(state.activity[:count, own], uses)
            state.used[:count, own][uses.index] = 1.0

    def end_step(self) -> None:
        """Takes the step in; one that broke off between layers is dropped."""
        if self._fallback is not None:
            self._fallback.end_step()
        if self._layers_seen != self.num_layers:
            return
        self.tracer.begin_step(self.rows)
        self.tracer.observe_step(self._step_ids)
        if self._ahead < 0:
            self._absorb(0, self.num_layers)
        state, rows = self._requests, self._rows_in_step
        if self.model is not None:
            learnable = rows[(self._lengths == 1) & ~self.rows.is_prefill]
            learnable = learnable[learnable < LEARNING_ROWS]
            if learnable.size:
                self.model.learn(
                    self.model.project(state.activity[learnable]),
                    state.trace[learnable],
                    state.used[learnable],
                )
        state.tokens[rows] += self._lengths

    def end_request(self, request: str) -> None:
        """The request stops counting at once; its matrix enters the collection."""
        if request in self._requests.row_of:
            self._requests.remove(request)
        activation = self.tracer.end_request(request)
        if activation is not None and self.options.prior > 0:
            self.collection.add(activation.counts)
        if self._fallback is not None:
            self._fallback.end_request(request)
