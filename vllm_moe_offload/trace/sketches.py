"""Vectors by which activation matrices are compared, and a search for the most similar.

A matrix is its own vector up to :data:`EXACT_KEYS` experts. Above, it is a count sketch (Charikar,
Chen & Farach-Colton, 2002; inner products survive in expectation), of which the sums of every few
numbers are a smaller, coarser one: many entries are passed over by that alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

EXACT_KEYS = 1024
SKETCH_SIZE = 256
COARSE_SIZE = 64
COARSE_CANDIDATES = 256
"""Entries that the coarse sketches leave over, where there are more."""


def count_sketch(size: int, width: int) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Where each of ``size`` numbers goes in a sketch of ``width``, and with which sign.

    Returns int64 and float32 ``[size]``; the same in every process.
    """
    generator = np.random.default_rng(0x5EED)
    return (
        generator.integers(0, width, size),
        generator.choice(np.array([-1, 1], np.float32), size),
    )


class Sketches:
    """Unit vectors of numbered entries.

    Attributes:
        is_exact: whether vectors are the matrices themselves.
    """

    def __init__(self, size: int, capacity: int) -> None:
        """``size``: numbers in a matrix; ``capacity``: most entries there will be."""
        self.is_exact = size <= EXACT_KEYS
        self._capacity = capacity
        width = size if self.is_exact else SKETCH_SIZE
        self._bucket, self._sign = count_sketch(size, width)
        self._vectors: FloatArray = np.zeros((min(capacity, 16), width), np.float32)
        self._coarse: FloatArray = np.zeros(
            (0 if self.is_exact else len(self._vectors), COARSE_SIZE), np.float32
        )
        self._count = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tables = (self._bucket, self._sign, self._vectors, self._coarse)
        return sum(table.nbytes for table in tables)

    @property
    def vectors(self) -> FloatArray:
        """float32 ``[entries, width]``, a view."""
        return self._vectors[: self._count]

    def of(self, keys: npt.NDArray[np.integer[Any]], counts: FloatArray) -> FloatArray:
        """Unit vector of a matrix with ``counts`` at ``keys``; zero if there are none."""
        if self.is_exact:
            vector = np.zeros(self._vectors.shape[1], np.float32)
            vector[keys] = counts
        else:
            signed = counts * self._sign[keys]
            vector = np.bincount(self._bucket[keys], signed, SKETCH_SIZE).astype(np.float32)
        norm = float(np.linalg.norm(vector))
        return vector / np.float32(norm) if norm > 0 else vector

    def put(self, index: int, vector: FloatArray) -> None:
        """Makes ``vector`` that of entry ``index``, which may be the next new one."""
        if index == len(self._vectors):
            length = min(self._capacity, 2 * index)
            self._vectors = _grown(self._vectors, length)
            if not self.is_exact:
                self._coarse = _grown(self._coarse, length)
        self._count = max(self._count, index + 1)
        self._vectors[index] = vector
        if not self.is_exact:
            self._coarse[index] = _coarsened(vector)

    def most_similar(self, vector: FloatArray, count: int) -> npt.NDArray[np.int64]:
        """Up to ``count`` entries whose vectors have the greatest products, in no order."""
        if self.is_exact or self._count <= COARSE_CANDIDATES:
            return _largest(self.vectors @ vector, count)
        coarse = self._coarse[: self._count] @ _coarsened(vector)
        candidates = _largest(coarse, max(count, COARSE_CANDIDATES))
        return candidates[_largest(self._vectors[candidates] @ vector, count)]


def _coarsened(vector: FloatArray) -> FloatArray:
    sums = vector.reshape(-1, COARSE_SIZE).sum(axis=0)
    norm = float(np.linalg.norm(sums))
    return np.asarray(sums / norm if norm > 0 else sums, np.float32)


def _largest(values: FloatArray, count: int) -> npt.NDArray[np.int64]:
    if count >= values.size:
        return np.arange(values.size)
    return np.argpartition(values, -count)[-count:]


def _grown(table: FloatArray, length: int) -> FloatArray:
    grown = np.zeros((length, table.shape[1]), np.float32)
    grown[: len(table)] = table
    return grown
