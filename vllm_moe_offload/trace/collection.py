"""EAMC: a bounded collection of the activation matrices of finished requests.

The idea is MoE-Infinity's (arXiv 2401.14361): requests of one kind activate the same
experts, so what a finished request activated predicts one that starts like it. Distance is
the cosine of the flattened matrices; when the collection is full, the entry closest to the
new one makes room, which keeps it diverse.

Matrices are kept sparse (an expert's key is ``layer * num_experts + expert``). In large models
candidates come from sketches (``sketches.py``) and the best few are compared exactly: a dense scan
of 10,000 matrices of 61,440 experts reads 2.4 GB.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from vllm_moe_offload.trace.sketches import Sketches

FloatArray = npt.NDArray[np.float32]

FORMAT = "vllm-moe-offload EAM collection"
VERSION = 1
RERANKED = 8
MAX_NONZERO = 4096
"""Largest counts kept per matrix; the others are too rare to predict anything."""


class CollectionError(ValueError):
    """A collection file that is damaged, of another version, or of another model."""


@dataclass(frozen=True, slots=True)
class SparseMatrix:
    """One activation matrix.

    Attributes:
        keys: int32 ``[nonzero]``, ascending.
        counts: float32 ``[nonzero]``, tokens.
        norm: Euclidean length of ``counts``.
    """

    keys: npt.NDArray[np.int32]
    counts: FloatArray
    norm: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", float(np.linalg.norm(self.counts)))


class ActivationCollection:
    """Bounded set of activation matrices with nearest-neighbour search.

    Attributes:
        capacity: most entries ever held.
        fingerprint: names the model that the matrices belong to.
    """

    def __init__(
        self, num_layers: int, num_experts: int, capacity: int, fingerprint: str = ""
    ) -> None:
        """``capacity`` must be positive."""
        if capacity < 1:
            raise ValueError(f"capacity of a collection must be at least 1, got {capacity}")
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.capacity = capacity
        self.fingerprint = fingerprint
        self._entries: list[SparseMatrix] = []
        size = num_layers * num_experts
        self._sketches = Sketches(size, capacity)
        self._sum: FloatArray = np.zeros(size, np.float32)
        self._mean: FloatArray | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, index: int) -> SparseMatrix:
        """One entry; indices change when entries are replaced."""
        return self._entries[index]

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices and sketches."""
        entries = sum(entry.keys.nbytes + entry.counts.nbytes for entry in self._entries)
        return entries + self._sketches.nbytes

    def add(self, counts: npt.NDArray[np.floating[Any]]) -> int:
        """Takes in a finished request's ``[layers, experts]`` counts; returns its index.

        An empty matrix is ignored (-1). When full, the closest entry is replaced.
        """
        flat = np.asarray(counts, np.float32).reshape(-1)
        keys = np.flatnonzero(flat > 0)
        if not keys.size:
            return -1
        if keys.size > MAX_NONZERO:
            largest = np.argpartition(flat[keys], -MAX_NONZERO)[-MAX_NONZERO:]
            keys = np.sort(keys[largest])
        return self._insert(SparseMatrix(keys.astype(np.int32), flat[keys]))

    def _insert(self, entry: SparseMatrix) -> int:
        sketch = self._sketches.of(entry.keys, entry.counts)
        if len(self._entries) < self.capacity:
            index = len(self._entries)
            self._entries.append(entry)
        else:
            index = int(self._nearest_of(entry.keys, entry.counts, sketch, 1)[0][0])
            self._add_to_mean(self._entries[index], -1.0)
            self._entries[index] = entry
        self._sketches.put(index, sketch)
        self._add_to_mean(entry, 1.0)
        return index

    def nearest(
        self, counts: npt.NDArray[np.floating[Any]], k: int = 1
    ) -> tuple[npt.NDArray[np.int64], FloatArray]:
        """The k entries closest to ``[layers, experts]`` counts.

        Returns their indices, closest first, and cosines in [0, 1]; fewer than k if the
        collection is smaller, none if it or ``counts`` is empty. Zero counts do not matter,
        so a request under way is compared by what was observed of it.
        """
        flat = np.asarray(counts, np.float32).reshape(-1)
        keys = np.flatnonzero(flat > 0)
        if not keys.size or not self._entries:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        return self._nearest_of(keys, flat[keys], self._sketches.of(keys, flat[keys]), k)

    def nearest_each(
        self, counts: npt.NDArray[np.floating[Any]]
    ) -> tuple[npt.NDArray[np.int64], FloatArray]:
        """:meth:`nearest` with k = 1 for each of ``[requests, layers, experts]``; -1 if none.

        One matrix product for all requests where matching is exact.
        """
        flat = np.asarray(counts, np.float32).reshape(len(counts), -1)
        indices = np.full(len(flat), -1, np.int64)
        cosines = np.zeros(len(flat), np.float32)
        if not self._entries:
            return indices, cosines
        if not self._sketches.is_exact:
            for row, single in enumerate(flat):
                found, values = self.nearest(single, 1)
                if found.size:
                    indices[row], cosines[row] = found[0], values[0]
            return indices, cosines
        norms = np.sqrt(np.einsum("re,re->r", flat, flat))
        similarity = flat @ self._sketches.vectors.T
        best = similarity.argmax(axis=1)
        known = norms > 0
        indices[known] = best[known]
        cosines[known] = similarity[np.arange(len(flat)), best][known] / norms[known]
        return indices, cosines

    def distribution(self, index: int) -> FloatArray:
        """Entry ``index`` as ``[layers, experts]`` with rows that sum to 1 (or are 0)."""
        entry = self._entries[index]
        dense = np.zeros(self.num_layers * self.num_experts, np.float32)
        dense[entry.keys] = entry.counts
        return _normalise_rows(dense.reshape(self.num_layers, self.num_experts))

    def mean(self) -> FloatArray:
        """Mean distribution over all entries ``[layers, experts]``; the caller's to keep."""
        if self._mean is None:
            table = self._sum.reshape(self.num_layers, self.num_experts)
            self._mean = _normalise_rows(np.maximum(table, 0.0))
        return self._mean.copy()

    def _add_to_mean(self, entry: SparseMatrix, sign: float) -> None:
        # Rows of one request sum to its tokens in every layer: a share per request.
        total = float(entry.counts.sum())
        self._sum[entry.keys] += entry.counts * np.float32(sign / total)
        self._mean = None

    def _nearest_of(
        self, keys: npt.NDArray[Any], counts: FloatArray, sketch: FloatArray, k: int
    ) -> tuple[npt.NDArray[np.int64], FloatArray]:
        if self._sketches.is_exact:
            best = self._sketches.most_similar(sketch, k)
            values = self._sketches.vectors[best] @ sketch
        else:
            best = self._sketches.most_similar(sketch, max(k, RERANKED))
            dense = np.zeros(self._sum.size, np.float32)
            dense[keys] = counts / np.float32(np.linalg.norm(counts))
            entries = [self._entries[index] for index in best.tolist()]
            values = np.array(
                [dense[entry.keys] @ entry.counts / entry.norm for entry in entries], np.float32
            )
        order = np.lexsort((best, -values))[:k]
        return best[order].astype(np.int64), np.clip(values[order], 0.0, 1.0)

    def save(self, path: str | Path) -> None:
        """Writes the collection atomically, readable by its owner only.

        Raises:
            OSError: the file cannot be written; an older one is left as it was.
        """
        document = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "num_layers": self.num_layers,
            "num_experts": self.num_experts,
            "entries": [
                [entry.keys.astype("<i4").tobytes(), entry.counts.astype("<f4").tobytes()]
                for entry in list(self._entries)  # the server goes on adding
            ],
        }
        path = Path(path)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:  # mkstemp made it 0600
                file.write(msgpack.packb(document))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(
        cls, path: str | Path, capacity: int | None = None, fingerprint: str | None = None
    ) -> ActivationCollection:
        """Reads a collection; keeps its last ``capacity`` entries.

        Args:
            path: file written by :meth:`save`.
            capacity: of the new collection; None: the entries that the file holds.
            fingerprint: refuse a file of another model; None takes any.

        Raises:
            CollectionError: damaged, foreign, of another version or model; says which.
            OSError: the file cannot be read.
        """
        remedy = "delete it or set another trace_path"
        try:
            document = msgpack.unpackb(Path(path).read_bytes())
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise CollectionError(
                f"{path} is damaged or no collection ({error}); {remedy}"
            ) from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise CollectionError(f"{path} is not an EAM collection; {remedy}")
        if document.get("version") != VERSION:
            raise CollectionError(
                f"{path} has version {document.get('version')}, this release reads {VERSION}; "
                f"{remedy}"
            )
        if fingerprint is not None and document.get("fingerprint") != fingerprint:
            raise CollectionError(
                f"{path} belongs to model {document.get('fingerprint')!r}, this is "
                f"{fingerprint!r}; {remedy}"
            )
        try:
            layers, experts = int(document["num_layers"]), int(document["num_experts"])
            raw = document["entries"]
            collection = cls(
                layers, experts, capacity or max(len(raw), 1), str(document["fingerprint"])
            )
            for keys, counts in raw[-collection.capacity :]:
                collection._insert(_decoded(keys, counts, layers * experts))
        except (KeyError, TypeError, ValueError) as error:
            raise CollectionError(f"{path} is damaged ({error}); {remedy}") from error
        return collection


def _decoded(keys: bytes, counts: bytes, size: int) -> SparseMatrix:
    entry = SparseMatrix(
        np.frombuffer(keys, "<i4").astype(np.int32),
        np.frombuffer(counts, "<f4").astype(np.float32),
    )
    if entry.keys.size != entry.counts.size or not entry.keys.size:
        raise ValueError("an entry's keys and counts differ in number, or there are none")
    if entry.keys.min() < 0 or entry.keys.max() >= size or np.any(np.diff(entry.keys) <= 0):
        raise ValueError(f"keys of an entry must ascend within [0, {size})")
    if not np.all(np.isfinite(entry.counts)) or entry.counts.min() <= 0:
        raise ValueError("counts must be positive and finite")
    return entry


def _normalise_rows(table: FloatArray) -> FloatArray:
    total = table.sum(axis=1, keepdims=True)
    return np.asarray(table / np.where(total > 0, total, np.float32(1.0)), np.float32)
