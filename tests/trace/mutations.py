"""Files as an accident, or somebody, may have changed them."""

from __future__ import annotations

import numpy as np


def mutated(content: bytes, generator: np.random.Generator) -> bytes:
    """A copy with one to three changes: a bit, a byte, a piece overwritten, left out or doubled."""
    changed = bytearray(content)
    for _ in range(generator.integers(1, 4)):
        at = int(generator.integers(max(len(changed), 1)))
        end = at + int(generator.integers(1, 9))
        match generator.integers(6):
            case _ if not changed:
                changed += b"\0"
            case 0:
                changed[at] ^= 1 << int(generator.integers(8))
            case 1:
                changed[at] = int(generator.choice([0, 1, 0x7F, 0x80, 0xFF]))
            case 2:
                changed[at:end] = generator.bytes(len(changed[at:end]))
            case 3:
                del changed[at:end]
            case 4:
                changed[at:at] = changed[at:end]
            case 5:
                del changed[max(at, 1) :]
    return bytes(changed)
