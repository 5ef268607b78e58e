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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from vllm_moe_offload.files import open_regular, replacing
from vllm_moe_offload.trace.shape import shape_fault
from vllm_moe_offload.trace.sketches import Sketches

FloatArray = npt.NDArray[np.float32]

FORMAT = "vllm-moe-offload EAM collection"
VERSION = 1
RERANKED = 8
MAX_NONZERO = 4096
"""Largest counts kept per matrix; the others are too rare to predict anything."""
MAX_ENTRIES = 20_000
"""Most that a file may hold; a server collects some hundred."""
MAX_COUNT = 1 << 40
MAX_FILE_BYTES = 1 << 30


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
        with replacing(Path(path)) as file:
            file.write(msgpack.packb(document))

    @classmethod
    def load(
        cls,
        path: str | Path,
        capacity: int | None = None,
        fingerprint: str | None = None,
        shape: tuple[int, int] | None = None,
    ) -> ActivationCollection:
        """Reads a collection; keeps its last ``capacity`` entries.

        Args:
            path: file written by :meth:`save`.
            capacity: of the new collection; None: the entries that the file holds.
            fingerprint: refuse a file of another model; None takes any.
            shape: layers and experts per layer; refuse a file of others; None takes any.

        Raises:
            CollectionError: damaged, foreign, of another version or model; says which.
            OSError: the file cannot be read.
        """
        remedy = "delete it or set another trace_path"
        document = _document(path, remedy)
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
        found = (document.get("num_layers"), document.get("num_experts"))
        if shape is not None and found != shape:
            raise CollectionError(
                f"{path} is of {found[0]} layers x {found[1]} experts, this model has "
                f"{shape[0]} x {shape[1]}; {remedy}"
            )
        try:
            return cls._of_document(document, capacity)
        except ValueError as error:
            raise CollectionError(f"{path} is damaged ({error}); {remedy}") from error

    @classmethod
    def _of_document(
        cls, document: dict[str, Any], capacity: int | None
    ) -> ActivationCollection:
        """Raises ValueError for what :meth:`save` does not write; before it takes memory for it."""
        layers, experts = document.get("num_layers"), document.get("num_experts")
        if not isinstance(layers, int) or not isinstance(experts, int):
            raise ValueError("num_layers and num_experts must be integers")
        fault = shape_fault(layers, experts)
        if fault is not None:
            raise ValueError(fault)
        raw, fingerprint = document.get("entries"), document.get("fingerprint")
        if not isinstance(raw, list) or not isinstance(fingerprint, str):
            raise ValueError("entries must be a list, and fingerprint text")
        collection = cls(layers, experts, capacity or max(len(raw), 1), fingerprint)
        for entry in raw[-collection.capacity :]:
            collection._insert(_decoded(entry, layers * experts))
        return collection


def _document(path: str | Path, remedy: str) -> Any:
    """What a file holds, of sizes that a collection may have."""
    with open_regular(Path(path)) as file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes > MAX_FILE_BYTES:
            raise CollectionError(
                f"{path} has {nbytes} bytes, a collection {MAX_FILE_BYTES} at most; {remedy}"
            )
        content = file.read(MAX_FILE_BYTES)
    try:
        return msgpack.unpackb(
            content,
            max_array_len=MAX_ENTRIES,
            max_bin_len=MAX_NONZERO * 4,
            max_str_len=4096,
            max_map_len=64,
            max_ext_len=0,
        )
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise CollectionError(
            f"{path} is damaged or no collection ({error}); {remedy}"
        ) from error


def _decoded(raw: Any, size: int) -> SparseMatrix:
    """An entry as :meth:`ActivationCollection.save` writes it; raises ValueError for others."""
    parts = raw if isinstance(raw, list) else ()
    if len(parts) != 2 or not all(isinstance(part, bytes) for part in parts):
        raise ValueError("an entry must be two byte strings, keys and counts")
    keys = np.frombuffer(parts[0], "<i4").astype(np.int32)
    counts = np.frombuffer(parts[1], "<f4").astype(np.float32)
    if keys.size != counts.size or not keys.size:
        raise ValueError("an entry's keys and counts differ in number, or there are none")
    if keys.min() < 0 or keys.max() >= size or np.any(np.diff(keys) <= 0):
        raise ValueError(f"keys of an entry must ascend within [0, {size})")
    if not np.all((counts >= 1) & (counts <= MAX_COUNT)):
        raise ValueError(f"counts must be numbers of tokens, from 1 to {MAX_COUNT}")
    return SparseMatrix(keys, counts)


def _normalise_rows(table: FloatArray) -> FloatArray:
    total = table.sum(axis=1, keepdims=True)
    return np.asarray(table / np.where(total > 0, total, np.float32(1.0)), np.float32)
