"""Faults that a person could write into the kernels show in the comparison with the rule."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import pytest

from tests.device.kernels.harness import Comparison, Shape
from vllm_moe_offload.device import cache, kernels

FEW = Shape(3, 8, 3, 11, 3)
MANY = Shape(3, 8, 2, 12, 30)
WAVES = Shape(3, 8, 3, 5, 4)
SHARED = Shape(2, 6, 3, 8, 3, num_ranks=2)
"""What a fault needs to show; each step of these takes a fifth of a second or so."""

FAULTS: dict[str, tuple[Shape, str, str]] = {
    "a hit is not pinned": (WAVES, "tl.where(is_hit, INFINITY, scores)", "scores"),
    "another layer still has who left": (
        FEW,
        "                    tl.store(slot_of + evicted, -1, mask=is_other)\n",
        "",
    ),
    "this layer still has who left": (
        FEW,
        "tl.where((evicted >= 0) & (expert == evicted - first), -1, slots)",
        "slots",
    ),
    "of equals the last leaves": (
        FEW,
        "tl.min(tl.where(worth == least, slot, MOST), 0)",
        "tl.max(tl.where(worth == least, slot, -1), 0)",
    ),
    "whose layer comes a cycle later is worth as much": (
        FEW,
        "tl.where(place < NUM_EXPERTS, worth * A_CYCLE, worth)",
        "worth",
    ),
    "a layer counts as one that comes later": (
        FEW,
        "(place < NUM_EXPERTS, worth *",
        "(place < 0, worth *",
    ),
    "slots keep the worth of their first day": (
        FEW,
        "tl.store(slot_score + slots, scores, mask=slots >= 0)",
        "tl.store(slot_score + slots, scores, mask=is_placed)",
    ),
    "scores do not fade": (FEW, "scores * tl.load(fade) +", "scores +"),
    "scores fade in every wave": (
        WAVES,
        "        if SOURCE != FROM_WAVE:\n            scores",
        "        if True:\n            scores",
    ),
    "later waves are counted": (
        WAVES,
        "        if SOURCE != FROM_WAVE:\n            tl.store(score",
        "        if True:\n            tl.store(score",
    ),
    "a wave forgets what is left": (
        WAVES,
        "tl.store(need + expert, missing.to(tl.int32), mask=is_expert)",
        "tl.store(need + expert, needed, mask=is_expert)",
    ),
    "padding counts, of few": (
        FEW,
        "                chosen = tl.where(padding == 0, chosen, -1)\n                row",
        "                row",
    ),
    "padding counts, of many": (
        MANY,
        "    chosen = tl.where(padding == 0, chosen, -1)\n    row",
        "    row",
    ),
    "needs stay, of many": (
        MANY,
        "if (SOURCE != FROM_IDS) | (num_slots < NUM_EXPERTS):",
        "if num_slots < NUM_EXPERTS:",
    ),
    "votes stay, of many": (
        MANY,
        "            tl.store(votes + expert, tl.zeros([EXPERTS], tl.int32), mask=is_expert)\n",
        "            pass\n",
    ),
    "a dry run counts, of few": (FEW, "if tl.load(live) == 0:", "if tl.load(live) < 0:"),
    "a dry run counts, of many": (
        MANY,
        "(at < num_ids) & (tl.load(live) != 0)",
        "at < num_ids",
    ),
    "no slot stands in": (
        FEW,
        "tl.where(stand_in == MOST, 0, stand_in)",
        "tl.where(stand_in == MOST, -1, stand_in)",
    ),
    "other ranks' experts count": (
        SHARED,
        "                    chosen = tl.load(expert_map + chosen, mask=chosen >= 0, other=-1)\n",
        "                    pass\n",
    ),
    "the log has no layers": (
        FEW,
        "                row = token.to(tl.int64) * num_layers + layer\n",
        "                row = token.to(tl.int64) * num_layers\n",
    ),
    "every copy goes to the first slot": (
        FEW,
        "tl.load(pairs + 2 * pair + 1)",
        "tl.load(pairs + 1)",
    ),
    "the last block is left out": (
        FEW,
        "total = tl.load(num_pairs) * num_blocks",
        "total = tl.load(num_pairs) * num_blocks - 1",
    ),
    "every block is of the first tensor": (FEW, "<= block).to(tl.int32)", "< 0).to(tl.int32)"),
}
"""By what goes wrong: where that shows; a text of ``kernels.py`` and what stands there instead."""
NUM_STEPS = 8


def kernels_with(directory: Path, old: str, new: str) -> ModuleType:
    """The module with another text; a real file, because Triton reads its source again."""
    source = inspect.getsource(kernels)
    assert source.count(old) == 1, f"kernels.py no longer says {old!r} once"
    path = directory / "faulty_kernels.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("faulty_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, old, new = FAULTS[fault]
    monkeypatch.setattr(cache, "kernels", kernels_with(tmp_path, old, new))
    with pytest.raises(AssertionError):
        Comparison(cache, shape).run(seed=2, num_steps=NUM_STEPS)


@pytest.mark.parametrize("shape", [FEW, MANY, WAVES, SHARED])
def test_without_a_fault_nothing_shows(
    shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is caught above is the fault, not how it was planted."""
    monkeypatch.setattr(cache, "kernels", kernels_with(tmp_path, "def plan(", "def plan("))
    Comparison(cache, shape).run(seed=2, num_steps=NUM_STEPS)
