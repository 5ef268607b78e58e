"""What a routing trace or an EAM collection holds, as figures and heat maps."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.trace.collection import ActivationCollection
from vllm_moe_offload.trace.routing import RoutingTrace, load_trace

Maps = dict[str, npt.NDArray[np.floating[Any]]]


def describe(path: str | Path) -> tuple[dict[str, Any], Maps]:
    """Summary of a file and heat maps ``[layers, experts]`` by title.

    Raises:
        TraceError, CollectionError: the file is neither; says why.
        OSError: it cannot be read.
    """
    if zipfile.is_zipfile(path):
        return _describe_trace(load_trace(path))
    return _describe_collection(ActivationCollection.load(path))


def _describe_trace(trace: RoutingTrace) -> tuple[dict[str, Any], Maps]:
    use = expert_use(trace)
    share = use / np.maximum(use.sum(axis=1, keepdims=True), 1)
    schedule = trace.schedule
    summary = {
        "kind": "routing trace",
        "requests": trace.num_requests,
        "tokens": int(trace.lens.sum()),
        "prompt_tokens": None if trace.prefill_lens is None else int(trace.prefill_lens.sum()),
        "tokens_per_request": _spread(trace.lens),
        "layers": trace.num_layers,
        "experts": trace.num_experts,
        "top_k": trace.top_k,
        "adjacent_token_reuse": round(adjacent_reuse(trace), 4),
        "experts_used": f"{np.count_nonzero(use)} of {use.size}",
        "busiest_quarter_of_experts_serves": round(_busiest_quarter(share), 4),
        "schedule": "none"
        if schedule is None
        else f"{np.unique(schedule.row_step).size} steps, {schedule.slots} slots "
        f"+ {schedule.staging_slots} staging",
    }
    return summary, {"share of the layer's tokens": share}


def _describe_collection(collection: ActivationCollection) -> tuple[dict[str, Any], Maps]:
    entries = len(collection)
    nearest = []
    for index in range(min(entries, 200)):
        own = collection.distribution(index)
        found, cosines = collection.nearest(own, 2)
        nearest += [float(c) for i, c in zip(found, cosines, strict=True) if i != index][:1]
    summary = {
        "kind": "EAM collection",
        "model": collection.fingerprint,
        "entries": entries,
        "layers": collection.num_layers,
        "experts": collection.num_experts,
        "tokens_per_layer_and_entry": _spread(
            np.array(
                [
                    collection.entry(i).counts.sum() / collection.num_layers
                    for i in range(entries)
                ]
            )
        ),
        "cosine_to_nearest_other_entry": _spread(np.array(nearest)),
        "bytes": collection.nbytes,
    }
    maps: Maps = {"mean of all entries": collection.mean()}
    for index in range(min(entries, 3)):
        maps[f"entry {index}"] = collection.distribution(index)
    return summary, maps


def expert_use(trace: RoutingTrace) -> npt.NDArray[np.int64]:
    """Tokens per expert, int64 ``[layers, experts]``."""
    use = np.empty((trace.num_layers, trace.num_experts), np.int64)
    for layer in range(trace.num_layers):
        use[layer] = np.bincount(trace.ids[:, layer].reshape(-1), minlength=trace.num_experts)
    return use


def adjacent_reuse(trace: RoutingTrace) -> float:
    """Mean share of a token's experts that the request's token before it used, too."""
    if trace.ids.shape[0] < 2:
        return 0.0
    last = np.zeros(trace.ids.shape[0], np.bool_)
    last[trace.starts + trace.lens - 1] = True
    pairs = np.flatnonzero(~last[:-1])
    shares = [
        np.mean((trace.ids[part + 1, :, :, None] == trace.ids[part, :, None, :]).any(axis=3))
        for part in np.array_split(pairs, max(pairs.size // 4096, 1))
        if part.size
    ]
    return float(np.mean(shares)) if shares else 0.0


def plot_heat_maps(pyplot: Any, maps: Maps, path: str | Path) -> None:
    """Draws ``maps`` below each other into a picture at ``path``."""
    figure, axes = pyplot.subplots(len(maps), 1, figsize=(9, 3.2 * len(maps)), squeeze=False)
    for axis, (title, table) in zip(axes[:, 0], maps.items(), strict=True):
        image = axis.imshow(table, aspect="auto", interpolation="nearest", cmap="viridis")
        axis.set_title(title)
        axis.set_xlabel("expert")
        axis.set_ylabel("MoE layer")
        figure.colorbar(image, ax=axis)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _busiest_quarter(share: npt.NDArray[np.floating[Any]]) -> float:
    count = max(share.shape[1] // 4, 1)
    return float(np.sort(share, axis=1)[:, -count:].sum(axis=1).mean())


def _spread(values: npt.NDArray[Any]) -> str:
    if not values.size:
        return "none"
    low, middle, high = np.percentile(values, [0, 50, 100])
    return f"{low:.4g} to {high:.4g}, median {middle:.4g}"
