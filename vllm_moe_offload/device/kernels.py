"""The rule of ``rule.py`` as kernels: who needs what, who leaves, and the copies.

A layer call launches :func:`plan` and :func:`gather`, behind :func:`count` if it has many tokens.
Nothing in them is known to the host but sizes, so a CUDA graph that captured them serves any step:
what changes between steps lies in device memory.

One program plans. What it reads it reads first, and keeps in registers until everything is stored,
once, behind a barrier: the compiler orders what threads share by ``gather`` and reductions, and not
what they read and write in global memory. (All threads read a counter, and the one that writes it has
read before.)

Launch with ``enable_fp_fusion=False``, so that scores round as numpy's do. Values are not specialised
(a first argument of 1 would be another kernel), and neither is the alignment of what may be a slice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_moe_offload.device import rule

MOST = tl.constexpr(2147483647)
A_CYCLE = tl.constexpr(rule.A_CYCLE)
INFINITY = tl.constexpr(float("inf"))
FROM_IDS = tl.constexpr(0)
FROM_COUNT = tl.constexpr(1)
FROM_WAVE = tl.constexpr(2)
"""Where :func:`plan` finds the call's need: in its ids; in what ``count`` left; in what the wave
before could not serve."""

_OF_CALL = ["ids", "is_padding", "weights"]
_SIZES = ["num_ids", "layer", "num_layers", "num_slots"]


@triton.jit(do_not_specialize=_SIZES[:3], do_not_specialize_on_alignment=_OF_CALL)
def count(
    ids,
    is_padding,
    weights,
    expert_map,
    live,
    votes,
    need,
    log,
    num_ids,
    layer,
    num_layers,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_MAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up the votes of many tokens, a block of ids in each program.

    Args:
        ids: int32 or int64 ``[tokens, TOP_K]``, of all experts; -1: none. With HAS_MAP no others;
            without it what is no expert's number is ignored.
        is_padding: bool ``[tokens]``, rows that no request computes; their ids may be any.
        weights: int32 ``[tokens]``, see ``rule.fixed_point``.
        expert_map: int32, this rank's expert for each of the model's, -1: another rank's. Without
            HAS_MAP not read.
        live: int32 ``[1]``; 0: nothing is kept.
        votes: int32 ``[NUM_EXPERTS]``, to be added to.
        need: int32 ``[NUM_EXPERTS]``, to be set to 1.
        log: int16 ``[tokens, num_layers, TOP_K]``, receives ids, and -1 for padding.
        num_ids: ``tokens * TOP_K``.
        layer: index among ``num_layers``.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (at < num_ids) & (tl.load(live) != 0)
    token = at // TOP_K
    padding = tl.load(is_padding + token, mask=inside, other=1).to(tl.int32)
    chosen = tl.load(ids + at, mask=inside, other=-1).to(tl.int32)
    chosen = tl.where(padding == 0, chosen, -1)
    row = token.to(tl.int64) * num_layers + layer
    tl.store(log + row * TOP_K + at % TOP_K, chosen.to(tl.int16), mask=inside)
    if HAS_MAP:
        chosen = tl.load(expert_map + chosen, mask=chosen >= 0, other=-1)
    counts = (chosen >= 0) & (chosen < NUM_EXPERTS)
    weight = tl.load(weights + token, mask=counts, other=0)
    tl.atomic_add(votes + chosen, weight, mask=counts, sem="relaxed")
    tl.store(need + chosen, tl.full([BLOCK], 1, tl.int32), mask=counts)  # all write the same


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_OF_CALL)
def plan(
    ids,
    is_padding,
    weights,
    expert_map,
    live,
    votes,
    need,
    log,
    slot_of,
    owner,
    slot_score,
    score,
    gain,
    fade,
    call_map,
    in_wave,
    pairs,
    num_pairs,
    counters,
    num_ids,
    layer,
    num_layers,
    num_slots,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_MAP: tl.constexpr,
    SOURCE: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Finds a slot for every expert that the call needs: one program.

    Args:
        ids, is_padding, weights, expert_map, live, log, num_ids, layer: see :func:`count`; with
            another SOURCE than FROM_IDS only ``live`` and ``layer`` are read.
        votes, need: what ``count`` left, or (``need``) the wave before; both are 0 afterwards, but
            for what this wave could not serve.
        slot_of: int32 ``[num_layers, NUM_EXPERTS]``, slot or -1.
        owner: int32 ``[num_slots]``, index into ``slot_of`` or -1.
        slot_score: float32 ``[num_slots]``, the owner's score; -inf without one.
        score: float32 ``[num_layers, NUM_EXPERTS]``.
        gain: float32 ``[num_layers]``, ``rule.gains``.
        fade: float32 ``[1]``, factor on the layer's scores.
        call_map: int32 ``[NUM_EXPERTS + 1]``, see ``rule.Wave``; 0 everywhere while not live.
        in_wave: bool ``[NUM_EXPERTS + 1]``, see ``rule.Wave``; written if there are fewer slots
            than experts.
        pairs: int32 ``[NUM_EXPERTS, 2]``, record and slot of every miss.
        num_pairs: int32 ``[1]``.
        counters: int64 ``[2]``, hits and misses, to be added to.
        EXPERTS, SLOTS: powers of two, at least NUM_EXPERTS and ``num_slots``.
        BLOCK: ids that are looked at together.
    """
    expert = tl.arange(0, EXPERTS)
    is_expert = expert < NUM_EXPERTS
    if tl.load(live) == 0:
        tl.store(call_map + expert, tl.zeros([EXPERTS], tl.int32), mask=is_expert)
        tl.store(call_map + NUM_EXPERTS, 0)
        tl.store(num_pairs, 0)
    else:
        votes_here = tl.zeros([EXPERTS], tl.int32)
        needed = tl.zeros([EXPERTS], tl.int32)
        if SOURCE == FROM_IDS:
            for begin in range(0, num_ids, BLOCK):
                at = begin + tl.arange(0, BLOCK)
                inside = at < num_ids
                token = at // TOP_K
                padding = tl.load(is_padding + token, mask=inside, other=1).to(tl.int32)
                chosen = tl.load(ids + at, mask=inside, other=-1).to(tl.int32)
                chosen = tl.where(padding == 0, chosen, -1)
                row = token.to(tl.int64) * num_layers + layer
                tl.store(log + row * TOP_K + at % TOP_K, chosen.to(tl.int16), mask=inside)
                if HAS_MAP:
                    chosen = tl.load(expert_map + chosen, mask=chosen >= 0, other=-1)
                weight = tl.load(weights + token, mask=inside, other=0)
                same = expert[:, None] == chosen[None, :]
                votes_here += tl.sum(tl.where(same, weight[None, :], 0), 1)
                needed = tl.maximum(needed, tl.max(same.to(tl.int32), 1))
            needed = tl.where(is_expert, needed, 0)
        else:
            needed = tl.load(need + expert, mask=is_expert, other=0)
        if SOURCE == FROM_COUNT:
            votes_here = tl.load(votes + expert, mask=is_expert, other=0)

        first = layer * NUM_EXPERTS
        slots = tl.load(slot_of + first + expert, mask=is_expert, other=-1)
        scores = tl.load(score + first + expert, mask=is_expert, other=0.0)
        if SOURCE != FROM_WAVE:
            scores = scores * tl.load(fade) + votes_here.to(tl.float32) * tl.load(gain + layer)
        is_hit = (needed > 0) & (slots >= 0)
        missing = (needed > 0) & (slots < 0)
        num_missing = tl.sum(missing.to(tl.int32), 0)

        if num_missing > 0:
            # This layer's scores are fresh, and what the call hits is worth everything.
            worth_here = tl.where(is_hit, INFINITY, scores)
            slot = tl.arange(0, SLOTS)
            # Owners by their distance from the layer's experts, whose own is 0 to NUM_EXPERTS.
            place = tl.load(owner + slot, mask=slot < num_slots, other=-1) - first
            is_here = (place >= 0) & (place < NUM_EXPERTS)
            here = tl.gather(worth_here, tl.where(is_here, place, 0), 0)
            worth = tl.load(slot_score + slot, mask=slot < num_slots, other=INFINITY)
            worth = tl.where(is_here, here, worth)
            worth = tl.where(place < NUM_EXPERTS, worth * A_CYCLE, worth)
            going = True
            while going:
                next_expert = tl.min(tl.where(missing, expert, EXPERTS), 0)
                least = tl.min(worth, 0)
                victim = tl.min(tl.where(worth == least, slot, MOST), 0)
                going = (next_expert < EXPERTS) & (least < INFINITY)
                if going:
                    evicted = tl.load(owner + victim)
                    is_other = (evicted >= 0) & (
                        (evicted < first) | (evicted >= first + NUM_EXPERTS)
                    )
                    tl.store(slot_of + evicted, -1, mask=is_other)
                    slots = tl.where((evicted >= 0) & (expert == evicted - first), -1, slots)
                    slots = tl.where(expert == next_expert, victim, slots)
                    worth = tl.where(slot == victim, INFINITY, worth)
                    missing = missing & (expert != next_expert)
        is_served = (needed > 0) & (slots >= 0)
        is_placed = is_served & (is_hit == 0)
        num_placed = tl.sum(is_placed.to(tl.int32), 0)
        rank = tl.cumsum(is_placed.to(tl.int32), 0) - 1
        stand_in = tl.min(tl.where(is_served, slots, MOST), 0)
        stand_in = tl.where(stand_in == MOST, 0, stand_in)

        # Where there are fewer experts than threads, several hold one: all have to have read what the
        # first of them is to write over.
        tl.debug_barrier()
        tl.store(slot_of + first + expert, slots, mask=is_expert)
        tl.store(owner + slots, first + expert, mask=is_placed)
        tl.store(slot_score + slots, scores, mask=slots >= 0)
        tl.store(pairs + 2 * rank, first + expert, mask=is_placed)
        tl.store(pairs + 2 * rank + 1, slots, mask=is_placed)
        tl.store(num_pairs, num_placed)
        tl.store(call_map + expert, tl.where(is_served, slots, stand_in), mask=is_expert)
        tl.store(call_map + NUM_EXPERTS, stand_in)
        if num_slots < NUM_EXPERTS:
            tl.store(in_wave + expert, is_served, mask=is_expert)
            tl.store(in_wave + NUM_EXPERTS, False)
        if (SOURCE != FROM_IDS) | (num_slots < NUM_EXPERTS):
            tl.store(need + expert, missing.to(tl.int32), mask=is_expert)
        if SOURCE == FROM_COUNT:
            tl.store(votes + expert, tl.zeros([EXPERTS], tl.int32), mask=is_expert)
        if SOURCE != FROM_WAVE:
            tl.store(score + first + expert, scores, mask=is_expert)
            tl.store(counters, tl.load(counters) + tl.sum(is_hit.to(tl.int32), 0))
            tl.store(counters + 1, tl.load(counters + 1) + num_missing)


@triton.jit(do_not_specialize=["num_ids"], do_not_specialize_on_alignment=["ids"])
def rename(ids, call_map, slots, num_ids, NUM_EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """Names experts by the slots that a call found for them.

    Args:
        ids: int32 or int64 ``[num_ids]``; what is no expert's number gets the map's last entry.
        call_map: int32 ``[NUM_EXPERTS + 1]``, see :func:`plan`.
        slots: int32 ``[num_ids]``.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + at, mask=at < num_ids, other=-1).to(tl.int32)
    expert = tl.where((expert >= 0) & (expert < NUM_EXPERTS), expert, NUM_EXPERTS)
    tl.store(slots + at, tl.load(call_map + expert), mask=at < num_ids)


@triton.jit(do_not_specialize=["num_blocks", "record_bytes"])
def gather(
    pairs,
    num_pairs,
    records,
    tensors,
    record_bytes,
    num_blocks,
    TENSORS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """Copies records from mapped host memory into the slots of every tensor.

    A fixed number of programs share out the blocks of all records, so the grid needs no count that
    only the device knows.

    Args:
        pairs, num_pairs: see :func:`plan`.
        records: int64 ``[1]``, address of the first record; a multiple of 16.
        tensors: int64 ``[TENSORS, 5]``, per tensor of an expert: address of slot 0, bytes of a slot,
            where it lies in a record, blocks of the tensors before it, and whether all of these are
            multiples of 16 bytes.
        record_bytes: from one record to the next; a multiple of 16.
        num_blocks: of one record, all tensors together.
        BLOCK_BYTES: what a program copies at once.
    """
    word = tl.arange(0, BLOCK_BYTES // 4)
    byte = tl.arange(0, BLOCK_BYTES // 16)
    base = tl.load(records)
    total = tl.load(num_pairs) * num_blocks
    for task in range(tl.program_id(0), total, PROGRAMS):
        pair = task // num_blocks
        block = task % num_blocks
        record = tl.load(pairs + 2 * pair).to(tl.int64)
        slot = tl.load(pairs + 2 * pair + 1).to(tl.int64)
        row = 0  # of the last tensor that begins at or before this block
        for i in range(1, TENSORS):
            row += (tl.load(tensors + i * 5 + 3) <= block).to(tl.int32)
        slot_bytes = tl.load(tensors + row * 5 + 1)
        source = base + record * record_bytes + tl.load(tensors + row * 5 + 2)
        target = tl.load(tensors + row * 5) + slot * slot_bytes
        begin = (block - tl.load(tensors + row * 5 + 3)) * BLOCK_BYTES
        if tl.load(tensors + row * 5 + 4) != 0:
            words_from = tl.multiple_of(source.to(tl.pointer_type(tl.int32)), 16)
            words_to = tl.multiple_of(target.to(tl.pointer_type(tl.int32)), 16)
            at = tl.multiple_of(begin // 4, 4) + word
            inside = tl.max_constancy(at < slot_bytes // 4, 4)
            words = tl.load(words_from + at, mask=inside, eviction_policy="evict_first")
            tl.store(words_to + at, words, mask=inside)
        else:
            bytes_from = source.to(tl.pointer_type(tl.int8))
            bytes_to = target.to(tl.pointer_type(tl.int8))
            for part in range(
                0, tl.minimum(slot_bytes - begin, BLOCK_BYTES), BLOCK_BYTES // 16
            ):
                at = begin + part + byte
                inside = at < slot_bytes
                tl.store(bytes_to + at, tl.load(bytes_from + at, mask=inside), mask=inside)
