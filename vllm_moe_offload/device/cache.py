"""The cache's state on a device, and the launches of a layer call.

Every tensor is made before a graph is captured and stays where it is; a call allocates nothing and
waits for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from vllm_moe_offload.cache.layout import ExpertLayout
from vllm_moe_offload.device import kernels, rule
from vllm_moe_offload.device.tokens import LayerTokens

COUNT_BLOCK = 1024
RENAME_BLOCK = 512
GATHER_PROGRAMS = 32
"""Enough to fill the link, and few enough to leave a GPU to other kernels."""
GATHER_BLOCK_BYTES = 32 << 10
_REGISTERS = 1 << 16
"""Of a multiprocessor. The planner runs alone, and is told that it may use as many as there are: the
assembler would rather spill some than have fewer programs at once."""
_WIDE_BYTES = 16
_PLAN_ELEMENTS = 512
"""Entries that each warp may compare at once when votes are added up."""


class DeviceCache:
    """Which expert lies in which slot, on the device, and how it gets there.

    A layer call is :meth:`bring`, or :meth:`waves` if the pool has fewer slots than a layer has
    experts. Slots and page table are as ``rule.OnePool`` has them.

    Attributes:
        slot_of, owner, score: see ``rule.OnePool``.
        slot_score: float32 ``[num_slots]``, the owner's score; -inf without one.
        log: int16 ``[max_tokens, num_layers, top_k]``, ids of the last step; -1: padding.
        counters: int64 ``[2]``, hits and misses.
        live: int32 ``[1]``; 0: calls are for shapes only. They keep nothing, and every expert is in
            slot 0.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_experts: int,
        num_slots: int,
        top_k: int,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        """An empty cache, not live.

        Raises:
            ValueError: there are more slots than the planner can look at.
        """
        if not 1 <= num_slots <= rule.MAX_SLOTS:
            raise ValueError(f"num_slots must lie in [1, {rule.MAX_SLOTS}], got {num_slots}")
        self.num_layers, self.num_experts, self.num_slots = num_layers, num_experts, num_slots
        self.top_k = top_k

        def table(*shape: int, fill: int = 0, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.full(shape, fill, dtype=dtype, device=device)

        self.slot_of = table(num_layers, num_experts, fill=rule.NO_SLOT)
        self.owner = table(num_slots, fill=rule.NO_OWNER)
        self.slot_score = table(num_slots, dtype=torch.float32)
        self.slot_score.fill_(-math.inf)
        self.score = table(num_layers, num_experts, dtype=torch.float32)
        self.log = table(max_tokens, num_layers, top_k, fill=-1, dtype=torch.int16)
        self.counters = table(2, dtype=torch.int64)
        self.live = table(1)
        self._gain = torch.from_numpy(rule.gains(num_layers)).to(device)
        self._fade = table(1, dtype=torch.float32)
        self._fade.fill_(float(rule.fade_of()))
        self._votes = table(num_experts)
        self._need = table(num_experts)
        self._call_map = table(num_experts + 1)
        self._in_wave = table(num_experts + 1, dtype=torch.bool)
        self._pairs = table(num_experts, 2)
        self._num_pairs = table(1)
        self._no_map = table(1)
        # As many as there are blocks of tokens at most: one more per expert than there are ids.
        self._renamed = table(max_tokens * top_k + num_experts + 1)

        slots = _power_of_two(num_slots)
        self._num_warps = 4 if slots <= 2048 else 8 if slots <= 8192 else 16
        experts = _power_of_two(num_experts)
        self._plan_sizes = {
            "NUM_EXPERTS": num_experts,
            "TOP_K": top_k,
            "EXPERTS": experts,
            "SLOTS": slots,
            "BLOCK": max(_PLAN_ELEMENTS * self._num_warps // experts, 1),
        }
        self._copies: _Copies | None = None

    def attach(
        self, layout: ExpertLayout, slots: Mapping[str, torch.Tensor], records: torch.Tensor
    ) -> None:
        """Says where experts lie.

        Args:
            layout: of one expert.
            slots: per tensor of it ``[num_slots, ...]`` on the device.
            records: uint8 ``[num_layers * num_experts, record bytes]``, mapped host memory whose
                address holds on the device as well.
        """
        self._copies = _Copies.of(layout, slots, records, self.live.device)

    def warm_up(self, id_type: torch.dtype) -> None:
        """Has all compiled that calls will launch, before anything is live.

        Args:
            id_type: of the router's choice.
        """
        many = -(-2 * self.num_experts // self.top_k)
        device = self.live.device
        for num_tokens in (1, many):
            tokens = LayerTokens(
                torch.zeros(num_tokens, self.top_k, dtype=id_type, device=device),
                torch.ones(num_tokens, dtype=torch.bool, device=device),
                torch.zeros(num_tokens, dtype=torch.int32, device=device),
            )
            if self.num_slots < self.num_experts:
                for _ in self.waves(0, tokens):
                    pass
            else:
                self.bring(0, tokens)
        self.rename(torch.zeros(1, dtype=id_type, device=device))

    def bring(self, layer: int, tokens: LayerTokens) -> torch.Tensor:
        """Has the experts of a call copied into slots, and says which.

        Returns:
            int32 ``[num_experts + 1]``, this call's until the next one: the slot of every expert that
            the call needs, a valid slot for every other and for an id of -1.
        """
        self._plan(layer, tokens, self._need_of(layer, tokens))
        self._gather()
        return self._call_map

    def waves(
        self, layer: int, tokens: LayerTokens
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """:meth:`bring` for a pool that has fewer slots than a layer has experts.

        Yields:
            What :meth:`bring` returns, and bool ``[num_experts + 1]``, which experts are of this
            wave: the others must weigh nothing. The kernels that use it are launched before the next
            one is asked for.
        """
        most = min(self.num_experts, tokens.ids.numel())
        yield self.bring(layer, tokens), self._in_wave
        for _ in range(1, -(-most // self.num_slots)):
            self._plan(layer, tokens, kernels.FROM_WAVE.value)
            self._gather()
            yield self._call_map, self._in_wave

    def rename(self, ids: torch.Tensor) -> torch.Tensor:
        """Slots of experts by the last call's map: int32 like ``ids``, until the next renaming.

        Args:
            ids: int32 or int64, contiguous; an id that is no expert's gets a valid slot, too.
        """
        num_ids = ids.numel()
        slots = self._renamed[:num_ids]
        kernels.rename[(-(-num_ids // RENAME_BLOCK),)](
            ids,
            self._call_map,
            slots,
            num_ids,
            NUM_EXPERTS=self.num_experts,
            BLOCK=RENAME_BLOCK,
        )
        return slots.view(ids.shape)

    def note(self, layer: int, tokens: LayerTokens) -> None:
        """Writes a call to the log: for layers that lack no expert. What it leaves beside that, a
        call of :meth:`bring` would take for its own."""
        self._count(layer, tokens)

    def _need_of(self, layer: int, tokens: LayerTokens) -> int:
        """Counts what many tokens need; where the planner finds it."""
        if tokens.ids.numel() < 2 * self.num_experts:
            return int(kernels.FROM_IDS.value)
        self._count(layer, tokens)
        return int(kernels.FROM_COUNT.value)

    def _count(self, layer: int, tokens: LayerTokens) -> None:
        num_ids = tokens.ids.numel()
        kernels.count[(-(-num_ids // COUNT_BLOCK),)](
            *self._of_call(tokens),
            self._votes,
            self._need,
            self.log,
            num_ids,
            layer,
            self.num_layers,
            NUM_EXPERTS=self.num_experts,
            TOP_K=self.top_k,
            HAS_MAP=tokens.expert_map is not None,
            BLOCK=COUNT_BLOCK,
        )

    def _of_call(self, tokens: LayerTokens) -> tuple[torch.Tensor, ...]:
        expert_map = self._no_map if tokens.expert_map is None else tokens.expert_map
        return tokens.ids, tokens.is_padding, tokens.weights, expert_map, self.live

    def _plan(self, layer: int, tokens: LayerTokens, source: int) -> None:
        kernels.plan[(1,)](
            *self._of_call(tokens),
            self._votes,
            self._need,
            self.log,
            self.slot_of,
            self.owner,
            self.slot_score,
            self.score,
            self._gain,
            self._fade,
            self._call_map,
            self._in_wave,
            self._pairs,
            self._num_pairs,
            self.counters,
            tokens.ids.numel(),
            layer,
            self.num_layers,
            self.num_slots,
            HAS_MAP=tokens.expert_map is not None,
            SOURCE=source,
            num_warps=self._num_warps,
            maxnreg=min(_REGISTERS // (32 * self._num_warps), 255),
            enable_fp_fusion=False,
            **self._plan_sizes,
        )

    def _gather(self) -> None:
        copies = self._copies
        assert copies is not None, "attach() comes first"
        kernels.gather[(GATHER_PROGRAMS,)](
            self._pairs,
            self._num_pairs,
            copies.records,
            copies.tensors,
            copies.record_bytes,
            copies.num_blocks,
            TENSORS=copies.tensors.shape[0],
            PROGRAMS=GATHER_PROGRAMS,
            BLOCK_BYTES=GATHER_BLOCK_BYTES,
            num_warps=8,
        )


@dataclass(frozen=True, slots=True)
class _Copies:
    """What ``kernels.gather`` is told of records and slots; keeps both alive."""

    records: torch.Tensor
    tensors: torch.Tensor
    record_bytes: int
    num_blocks: int
    memory: tuple[torch.Tensor, ...]

    @classmethod
    def of(
        cls,
        layout: ExpertLayout,
        slots: Mapping[str, torch.Tensor],
        records: torch.Tensor,
        device: torch.device,
    ) -> _Copies:
        rows, offset, num_blocks = [], 0, 0
        for spec in (*layout.direct, *layout.tail):
            address = slots[spec.name].data_ptr()
            is_wide = not (address | spec.nbytes | offset) % _WIDE_BYTES
            rows.append([address, spec.nbytes, offset, num_blocks, int(is_wide)])
            offset += spec.nbytes
            num_blocks += -(-spec.nbytes // GATHER_BLOCK_BYTES)
        return cls(
            torch.tensor([records.data_ptr()], dtype=torch.int64, device=device),
            torch.tensor(rows, dtype=torch.int64, device=device),
            records.shape[1],
            num_blocks,
            (records, *slots.values()),
        )


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
