"""Whether all nodes of a Ray cluster run the same: asked before workers are made there.

A node without the plugin would load the whole model, one with another version of it or of vLLM
would count or pack differently, and one with another CPU would compute with other kernels. None
of them could say so: what asks them is sent there as code (``node_facts.py``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_moe_offload.config import OptionError
from vllm_moe_offload.integration import node_facts
from vllm_moe_offload.integration.patching import require

logger = logging.getLogger("vllm.moe_offload")

ANSWER_SECONDS = 300
"""How long a node may take to start a process and answer; vLLM's workers start like that, too."""
SAME = ("vLLM", "vllm-moe-offload", "plugin")
SAME_ON_CPUS = ("instruction set", "platform for Ray")
"""What must be equal on all nodes: names of :func:`node_facts.facts`."""


def differences(
    driver: Mapping[str, str], node: Mapping[str, str], *, on_cpus: bool
) -> Iterator[str]:
    """What of a node's answer is not the driver's, in words."""
    for name in (*SAME, *(SAME_ON_CPUS if on_cpus else ())):
        if node[name] != driver[name]:
            yield f"{name}: {node[name]}, here: {driver[name]}"


def check(parallel_config: Any) -> None:
    """Connects to Ray as vLLM is about to do, and asks every node that gets a worker.

    Raises:
        OptionError: nodes differ from this process; names them, what they have, and what is here.
    """
    import ray
    from vllm.platforms import current_platform
    from vllm.v1.executor import ray_utils

    connect = require(ray_utils, "initialize_ray_cluster")
    connect(parallel_config, require_gpu_on_driver=False)  # vLLM's own call finds this done
    here = node_facts.facts(None)
    problems = []
    for node_id, answer in _ask(parallel_config.placement_group).items():
        name = _name(node_id, ray.nodes())
        logger.info(
            "MoE offload: Ray node %s: %s cores, OMP_NUM_THREADS=%s",
            name,
            answer["cores"],
            answer["OMP_NUM_THREADS"],
        )
        found = list(differences(here, answer, on_cpus=current_platform.is_cpu()))
        if found:
            problems.append(f"{name} has {'; '.join(found)}")
    if problems:
        raise OptionError(
            "--moe-offload: Ray nodes do not run what this process runs: "
            f"{', and '.join(problems)}. Make them equal (variables: before 'ray start'), or leave "
            "such nodes out"
        )


def _ask(placement_group: Any) -> dict[str, dict[str, str]]:
    """Answers by node id, of all nodes that the placement group has bundles on."""
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    bundles = ray.util.placement_group_table(placement_group)["bundles_to_node_id"]
    nodes = sorted(set(bundles.values()))
    cloudpickle.register_pickle_by_value(node_facts)
    task = ray.remote(node_facts.facts)
    asked = [
        task.options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        ).remote(os.environ.get("VLLM_PLUGINS"))
        for node_id in nodes
    ]
    return dict(zip(nodes, ray.get(asked, timeout=ANSWER_SECONDS), strict=True))


def _name(node_id: str, nodes: list[dict[str, Any]]) -> str:
    """Address and the beginning of the id: several nodes may be on one machine."""
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes}
    return f"{addresses[node_id]} ({node_id[:8]})"


def start(original: Any, self: Any, vllm_config: Any) -> None:
    """``Executor.__init__`` of an executor on Ray.

    Raises:
        OptionError: see :func:`check`.
        Exception: what a worker raised there; Ray's own error would repeat the traceback that
            Ray has logged.
    """
    from ray.exceptions import RayTaskError

    check(vllm_config.parallel_config)
    try:
        original(self, vllm_config)
    except RayTaskError as error:
        raise error.cause from error
