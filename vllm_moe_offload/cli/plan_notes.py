"""What a plan's figures assume, and what they do not say."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_moe_offload.cache.planner import CacheShape
from vllm_moe_offload.cli.plan_model import Model
from vllm_moe_offload.plan.cluster import ClusterFit
from vllm_moe_offload.plan.fit import RUN_MODEL_TYPES, Fit
from vllm_moe_offload.plan.shapes.kernel_form import place
from vllm_moe_offload.plan.ways import Way


def notes(model: Model, result: Fit, *, has_link: bool, has_kv_tokens: bool) -> list[str]:
    """Of a plan.

    Args:
        model: planned for.
        result: the plan, of the rank with least room where there are several.
        has_link, has_kv_tokens: whether the options for them were given.
    """
    if result.cache is None:
        return []
    return [
        *_link(result, result.cache, has_link),
        *_assumptions(model, result, result.cache, has_kv_tokens),
        *_about_formats(model, result),
        *_what_has_not_run(model, result),
    ]


def rank_notes(cluster: ClusterFit) -> Iterator[str]:
    """Of several ranks, beside those."""
    split, machine = cluster.split, cluster.fits[0].machine
    if cluster.problems:
        return
    if machine.ranks > 1:
        yield f"The {machine.ranks} ranks of a node share its host memory and its disk evenly."
    if machine.has_gpu:
        yield "Each rank has a GPU of --device-memory, with a link of its own."
    if split.has_expert_parallel:
        yield (
            "Expert parallel: the slowest link's bytes are the mean over tokens of the most that "
            "one link brings, with every set of experts equally likely; skewed routing makes "
            "them more."
        )
    if split.nodes > 1:
        yield (
            "On each node: the weights under the same path, and a store_dir of its own. Ray must "
            "run on all of them before the line is started on the first."
        )


def _link(result: Fit, cache: CacheShape, has_link: bool) -> Iterator[str]:
    machine = result.machine
    if not has_link and not cache.holds_everything:
        kind = "PCIe 4 x16" if machine.has_gpu else "an NVMe drive"
        yield f"The link is assumed to be {kind}, {machine.link_gbps:g} GB/s."
    if machine.has_gpu and result.host_share < 1 and not cache.holds_everything:
        yield (
            f"Host memory holds {result.host_share:.0%} of the experts; the others are read from "
            f"the store on disk, at {machine.disk_gbps:g} GB/s."
        )


def _assumptions(
    model: Model, result: Fit, cache: CacheShape, has_kv_tokens: bool
) -> Iterator[str]:
    shape = result.shape
    has_spare_kv = not has_kv_tokens and result.kv_tokens > shape.max_tokens
    if has_spare_kv and not cache.holds_everything:
        yield (
            f"The KV cache holds more than one request of {shape.max_tokens:,} tokens; a "
            "smaller --kv-tokens leaves more for experts."
        )
    if shape.extra_expert_layers:
        layers = ", ".join(map(str, shape.extra_expert_layers))
        yield f"Experts of layer {layers} (multi-token prediction) are left out: not served."
    if not result.is_exact:
        yield (
            f"Less than one layer's {shape.num_experts} experts fit: layers run in waves, and "
            "output equals plain vLLM's up to the rounding of a split sum."
        )
        if result.way is Way.DEVICE:
            tokens = cache.num_pool_slots // shape.top_k
            yield (
                f"CUDA graphs have {tokens} token{'s' if tokens > 1 else ''} at most, whose experts "
                "always fit; longer steps run without."
            )
    if not model.has_weights and model.download is None:
        yield f"The weights must be in {model.path}, as safetensors files."


def _about_formats(model: Model, result: Fit) -> Iterator[str]:
    if not model.shape.is_quantized:
        return
    if not model.is_counted and result.format.kind != "mxfp4":  # which is for experts alone
        yield (
            "Dense weights are estimated: which of them are quantised is taken from config.json; "
            "a directory with the files is counted."
        )
    if not result.machine.has_gpu:
        yield (
            "vLLM's kernels for quantised experts ask for AMX. On a CPU without it, add "
            "--moe-offload-config.cpu_kernels avx512 (AVX-512 with BF16 and VNNI)."
        )
    elif result.format.kind == "fp8":
        yield (
            "On a GPU before compute capability 8.9 fp8 experts run on Marlin's kernel, whose "
            "scales add 1.5 % to an expert."
        )


def _what_has_not_run(model: Model, result: Fit) -> Iterator[str]:
    shape = model.shape
    if shape.model_type not in RUN_MODEL_TYPES:
        yield f"The plugin has not been run with {shape.model_type} models yet."
    if result.way is Way.DEVICE:
        yield (
            "A cache that the GPU plans has not run on one yet; its rule and its kernels have, on "
            "CPUs."
        )
    if not result.has_run:
        where = place(result.machine.platform)
        yield f"{result.format.name} experts: not run on a {where} yet; bf16 ones were."
