"""A device cache beside the rule, driven by the same calls and compared after each.

On a CPU the kernels are interpreted; on a GPU (``scripts/gpu_kernels.py``) they are what serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

from vllm_moe_offload.cache.layout import ExpertLayout, TensorSpec
from vllm_moe_offload.device import rule

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    """Of a model, its cache, and the calls.

    Attributes:
        padding: what the ids of padded rows are, real experts or -1.
        num_ranks: experts of the model are divided, this rank has every so many'th.
        kind: of ids. "routed": those of a token differ; "any": they may be the same, or no expert's.
    """

    num_layers: int
    num_experts: int
    top_k: int
    num_slots: int
    max_tokens: int
    padding: str = "experts"
    num_ranks: int = 1
    dtype: type[np.signedinteger] = np.int32
    kind: str = "routed"

    @property
    def num_routed(self) -> int:
        return self.num_experts * self.num_ranks

    @property
    def expert_map(self) -> np.ndarray | None:
        if self.num_ranks == 1:
            return None
        places = np.full(self.num_routed, -1, np.int32)
        places[:: self.num_ranks] = np.arange(self.num_experts)
        return places


LAYOUT = ExpertLayout(
    (
        TensorSpec("w13", (2, 1024), "bfloat16", 4096),
        TensorSpec("bias", (7,), "bfloat16", 14),
    )
)
"""Copied by word, in two blocks; by byte, because it has no whole 16."""
MORE_TENSORS = ExpertLayout(
    (
        TensorSpec("w2", (4, 20), "bfloat16", 160),
        TensorSpec("w13", (2, 2048), "bfloat16", 8192),
        TensorSpec("w13_scale", (5, 413), "bfloat16", 4130),
        TensorSpec("w2_scale", (1,), "uint8", 1),
        TensorSpec("w2_bias", (9, 8), "bfloat16", 144),
    )
)
"""Of one block and of several, both by word and by byte; the last one because of what precedes it."""
LARGE_TENSORS = ExpertLayout(
    (
        TensorSpec("w13", (2, 40000), "bfloat16", 160000),
        TensorSpec("w13_scale", (40001,), "uint8", 40001),
        TensorSpec("w2", (9, 8), "bfloat16", 144),
    )
)
"""Of several blocks as large as a server's, by word and by byte."""
LIKELY = 40
"""Experts that a call chooses from, at most: one miss takes the interpreter a millisecond or two."""


def random_steps(
    shape: Shape, seed: int, num_steps: int, most_likely: int = LIKELY
) -> Iterator[tuple[bool, list[tuple]]]:
    """Per step: whether it is live, and ids, padding and votes of each layer's call."""
    rng = np.random.default_rng(seed)
    for _ in range(num_steps):
        num_tokens = int(rng.integers(0, shape.max_tokens + 1))
        num_rows = int(rng.integers(max(num_tokens, 1), shape.max_tokens + 1))
        is_padding = np.arange(num_rows) >= num_tokens
        weights = np.full(num_rows, 2**30 // max(num_tokens, 1), np.int32)
        weights[rng.random(num_rows) < 0.2] = 0
        layers = []
        for _ in range(shape.num_layers):
            # Of some experts, so that there are hits; of all, so that there are waves.
            num_likely = int(rng.integers(shape.num_routed // 2, shape.num_routed + 1))
            num_likely = max(shape.top_k, min(num_likely, most_likely))
            likely = rng.permutation(shape.num_routed)[:num_likely]
            ids = np.stack([rng.permutation(likely)[: shape.top_k] for _ in range(num_rows)])
            if shape.kind == "any":
                ids = rng.integers(-1, shape.num_routed + 2, ids.shape)
                ids[:, 1:] = np.where(
                    rng.random(ids[:, 1:].shape) < 0.3, ids[:, :1], ids[:, 1:]
                )
            if shape.padding == "-1":
                ids[num_tokens:] = -1
            layers.append((ids.astype(shape.dtype), is_padding, weights))
        yield bool(rng.random() > 0.2), layers


class Comparison:
    """The cache of ``module`` (``device/cache.py``) and the rule."""

    def __init__(
        self,
        module: ModuleType,
        shape: Shape,
        layout: ExpertLayout = LAYOUT,
        device: torch.device = CPU,
    ) -> None:
        self.device = device
        self.most_likely = shape.num_routed
        if device == CPU:
            # An interpreted program costs a millisecond, whatever it copies.
            module.GATHER_PROGRAMS, module.GATHER_BLOCK_BYTES = 2, 2048
            self.most_likely = LIKELY
        self.module = module
        self.layout = layout
        self.shape = shape
        self.pool = rule.OnePool(shape.num_layers, shape.num_experts, shape.num_slots)
        self.cache = module.DeviceCache(
            num_layers=shape.num_layers,
            num_experts=shape.num_experts,
            num_slots=shape.num_slots,
            top_k=shape.top_k,
            max_tokens=shape.max_tokens,
            device=device,
        )
        records = shape.num_layers * shape.num_experts
        generator = torch.Generator().manual_seed(0)
        self.records = torch.randint(
            0, 256, (records, layout.record_bytes), generator=generator, dtype=torch.uint8
        )
        self.slots = {
            spec.name: torch.zeros(
                shape.num_slots, spec.nbytes, dtype=torch.uint8, device=device
            )
            for spec in layout.tensors
        }
        on_host = self.records if device == CPU else self.records.pin_memory()
        self.cache.attach(layout, self.slots, on_host)
        self.records = self.records.to(device)  # for comparisons
        self.num_calls = 0

    def run(self, seed: int, num_steps: int) -> None:
        """Raises AssertionError at the first difference."""
        for is_live, layers in random_steps(self.shape, seed, num_steps, self.most_likely):
            self.cache.live.fill_(int(is_live))
            for layer, (ids, is_padding, weights) in enumerate(layers):
                self.call(layer, ids, is_padding, weights, is_live)
                self.num_calls += 1

    def on_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)

    def call(
        self,
        layer: int,
        ids: np.ndarray,
        is_padding: np.ndarray,
        weights: np.ndarray,
        is_live: bool,
    ) -> None:
        """One layer call on both."""
        places = self.shape.expert_map
        tokens = self.module.LayerTokens(
            self.on_device(ids),
            self.on_device(is_padding),
            self.on_device(weights),
            None if places is None else self.on_device(places),
        )
        log = self.cache.log.clone()
        before = {name: rows.clone() for name, rows in self.slots.items()}
        if not is_live:
            self.call_in_vain(layer, tokens, before, log)
            return
        real = ids[~is_padding]
        own = real if places is None else np.where(real >= 0, places[real], -1)
        self.pool.observe(layer, own, weights[~is_padding])
        if self.shape.num_slots >= self.shape.num_experts:
            self.compare(layer, self.pool.place(layer), self.cache.bring(layer, tokens), before)
            assert self.pool.is_served
        else:
            for call_map, in_wave in self.cache.waves(layer, tokens):
                wave = self.pool.place(layer)
                np.testing.assert_array_equal(in_wave.cpu().numpy(), wave.in_wave)
                self.compare(layer, wave, call_map, before)
                before = {name: rows.clone() for name, rows in self.slots.items()}
            assert self.pool.is_served
            assert not self.cache._need.any()
        log[: len(ids), layer] = self.on_device(np.where(is_padding[:, None], -1, ids))
        assert torch.equal(self.cache.log, log), "the log"
        assert self.cache.counters.tolist() == [self.pool.hits, self.pool.misses]

    def compare_names(self, call_map: torch.Tensor) -> None:
        """Experts by their slots; what is none has a slot, too."""
        most = self.shape.num_experts
        ids = torch.from_numpy(np.arange(-2, most + 2, dtype=self.shape.dtype))
        ids = ids[: self.cache._renamed.numel()]
        known = torch.where((ids >= 0) & (ids < most), ids, most).long()
        assert torch.equal(self.cache.rename(ids), call_map[known])

    def call_in_vain(self, layer: int, tokens: object, before: dict, log: torch.Tensor) -> None:
        """A call that must leave nothing behind."""
        state = [self.cache.slot_of, self.cache.owner, self.cache.score, self.cache.counters]
        old = [tensor.clone() for tensor in state]
        if self.shape.num_slots >= self.shape.num_experts:
            assert not self.cache.bring(layer, tokens).any()
        else:
            for call_map, _ in self.cache.waves(layer, tokens):
                assert not call_map.any()
        assert all(torch.equal(tensor, was) for tensor, was in zip(state, old, strict=True))
        assert all(torch.equal(self.slots[name], rows) for name, rows in before.items())
        assert torch.equal(self.cache.log, log)

    def compare(
        self, layer: int, wave: rule.Wave, call_map: torch.Tensor, before: dict
    ) -> None:
        """After a wave: what the call is given, the state, and the bytes."""
        np.testing.assert_array_equal(call_map.cpu().numpy(), wave.call_map)
        self.compare_names(call_map)
        assert set(call_map.tolist()) <= set(range(self.shape.num_slots))
        num_pairs = int(self.cache._num_pairs)
        np.testing.assert_array_equal(self.cache._pairs[:num_pairs].cpu().numpy(), wave.pairs)
        np.testing.assert_array_equal(self.cache.slot_of.cpu().numpy(), self.pool.slot_of)
        np.testing.assert_array_equal(self.cache.owner.cpu().numpy(), self.pool.owner)
        np.testing.assert_array_equal(self.cache.score.cpu().numpy(), self.pool.score)
        worth = np.where(
            self.pool.owner < 0, -np.inf, self.pool.score.reshape(-1)[self.pool.owner]
        )
        np.testing.assert_array_equal(self.cache.slot_score.cpu().numpy(), worth)
        filled = set()
        for record, slot in wave.pairs.tolist():
            filled.add(slot)
            offset = 0
            for spec in (*self.layout.direct, *self.layout.tail):
                expected = self.records[record, offset : offset + spec.nbytes]
                assert torch.equal(self.slots[spec.name][slot], expected), spec.name
                offset += spec.nbytes
        kept = [slot for slot in range(self.shape.num_slots) if slot not in filled]
        for name, rows in self.slots.items():
            assert torch.equal(rows[kept], before[name][kept]), f"{name}: others' slots"
