"""Networks of the layers: routers, which are planted, and experts, which are random.

Outputs are small beside the residual stream, so that topics survive all layers, but large
enough that one wrong expert changes the log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

from scripts.demo_model.architectures import ARCHS, SHARED_EXPERTS, Shape
from scripts.demo_model.plant import GAINS, Plant
from scripts.demo_model.seeded import generator, normal
from scripts.demo_model.weights import Weight, gaussian, window


class Networks:
    """Tensors of what comes after attention in a layer.

    With ``shared_noise`` experts are windows of one block of random numbers.
    """

    def __init__(
        self, arch: str, shape: Shape, seed: int, plant: Plant, *, shared_noise: bool
    ) -> None:
        self.arch, self.shape, self.seed, self.plant = arch, shape, seed, plant
        self.shared_noise = shared_noise
        self.traits = ARCHS[arch]

    @cached_property
    def dense_width(self) -> int:
        """Width of a DeepSeek model's dense layers."""
        return self.shape.intermediate * (self.shape.top_k + SHARED_EXPERTS)

    @cached_property
    def expert_rms(self) -> float:
        """Output of one expert such that all layers together add ``GAINS.experts``."""
        rng = generator(self.seed, "expert_rms")
        spread = math.hypot(GAINS.popularity, GAINS.route_topic, GAINS.route_token)
        scores = spread * normal(rng, 1000, self.shape.experts)
        chosen = scores.softmax(dim=1).topk(self.shape.top_k, dim=1).values
        if self.traits.renormalize:
            chosen = chosen / chosen.sum(dim=1, keepdim=True)
        moe_layers = self.shape.layers - self.traits.dense_layers
        return GAINS.experts / math.sqrt(moe_layers) / float(chosen.norm(dim=1).mean())

    def weights(self, prefix: str, layer: int) -> Iterator[Weight]:
        """Tensors of one layer: dense, or router and experts."""
        if layer < self.traits.dense_layers:
            yield from self._dense(f"{prefix}.mlp", self.dense_width)
        else:
            yield from self._moe(f"{prefix}.{self.traits.moe_name}")

    def _dense(self, prefix: str, width: int) -> Iterator[Weight]:
        std = GAINS.dense / math.sqrt(self.shape.layers)
        yield from self._network(prefix, width, std, ("gate_proj", "up_proj", "down_proj"))

    def _moe(self, prefix: str) -> Iterator[Weight]:
        shape = self.shape
        router = "router" if self.arch == "gpt_oss" else "gate"
        yield Weight(
            f"{prefix}.{router}.weight",
            (shape.experts, shape.hidden),
            lambda rng: self.plant.router(rng, shape.experts),
        )
        if self.arch == "gpt_oss":
            yield gaussian(f"{prefix}.router.bias", (shape.experts,), 0.2)
            yield from self._fused_experts(f"{prefix}.experts")
            return
        for expert in range(shape.experts):
            yield from self._network(
                f"{prefix}.experts.{expert}",
                shape.intermediate,
                self.expert_rms,
                self.traits.expert_names,
            )
        if self.arch == "deepseek_v2":
            width = SHARED_EXPERTS * shape.intermediate
            yield from self._dense(f"{prefix}.shared_experts", width)

    def _network(
        self, prefix: str, width: int, rms: float, names: tuple[str, str, str]
    ) -> Iterator[Weight]:
        """A random gated network whose output has root mean square ``rms``."""
        hidden = self.shape.hidden
        gate, up, down = names
        fan_in = 1 / math.sqrt(hidden)
        fan_out = rms / (self.traits.act_rms * math.sqrt(width))
        for name, shape, std in (
            (gate, (width, hidden), fan_in),
            (up, (width, hidden), fan_in),
            (down, (hidden, width), fan_out),
        ):
            if self.shared_noise:
                yield window(f"{prefix}.{name}.weight", shape, std, self.seed)
            else:
                yield gaussian(f"{prefix}.{name}.weight", shape, std)

    def _fused_experts(self, prefix: str) -> Iterator[Weight]:
        """gpt-oss keeps a layer's experts in one tensor, gate and up columns interleaved."""
        shape, rms = self.shape, self.expert_rms
        experts, hidden, width = shape.experts, shape.hidden, shape.intermediate
        fan_out = rms / (self.traits.act_rms * math.sqrt(width))
        yield gaussian(
            f"{prefix}.gate_up_proj", (experts, hidden, 2 * width), 1 / math.sqrt(hidden)
        )
        yield gaussian(f"{prefix}.gate_up_proj_bias", (experts, 2 * width), 0.2)
        yield gaussian(f"{prefix}.down_proj", (experts, width, hidden), fan_out)
        yield gaussian(f"{prefix}.down_proj_bias", (experts, hidden), 0.2 * rms)
