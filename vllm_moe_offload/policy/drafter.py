"""Scores of a drafter's own experts, in one cache with the model's."""

from __future__ import annotations

from vllm_moe_offload.policy import make_policy
from vllm_moe_offload.policy.base import Policy
from vllm_moe_offload.policy.plain import LRFU
from vllm_moe_offload.policy.trace import TracePolicy
from vllm_moe_offload.step import StepTokens


class DrafterScores(LRFU):
    """How often a drafter's passes used its experts lately, on the scale of the ``trace`` policy.

    ``trace`` learns from steps of the model; a drafter's layers run several times in one, on tokens
    that may be wrong. How often an expert was used is what can be known of it, and what it is worth:
    with several passes a step, a resident expert is used several times for one of the model's.
    """

    def __init__(self, model: TracePolicy, num_layers: int, passes_per_layer: float) -> None:
        """Of the layers behind those of ``model``.

        Args:
            model: whose scores these compete with.
            num_layers: of model and drafter together.
            passes_per_layer: in a step, through each of the drafter's layers.
        """
        super().__init__(num_layers, model.num_experts)
        self._model = model
        self._passes_per_layer = passes_per_layer

    def begin_step(self, tokens: StepTokens) -> None:
        """A pass of the drafter begins."""
        super().begin_step(tokens)
        self._gains[...] = self._model.full_score * self._passes_per_layer * (1.0 - self.decay)


def make_policies(
    mode: str, num_layers: int, num_draft_layers: int, num_experts: int, passes_per_layer: float
) -> tuple[Policy, Policy | None]:
    """The policy of a mode, and who scores the layers of a drafter, if it has some.

    A plain policy scores all of them: which layer is whose makes no difference to it.

    Args:
        mode: name of a policy that serves.
        num_layers: of the model.
        num_draft_layers: of its drafter.
        num_experts: of every layer.
        passes_per_layer: see :class:`DrafterScores`.
    """
    total = num_layers + num_draft_layers
    if mode != TracePolicy.name:
        policy = make_policy(mode, total, num_experts)
        return policy, policy if num_draft_layers else None
    traced = TracePolicy(num_layers, num_experts)
    return traced, DrafterScores(traced, total, passes_per_layer) if num_draft_layers else None
