"""vLLM's model runner V2 on a CPU: its own batches, buffers, kernels and choice of graphs.

What is doubled is what needs a GPU or weights: the graphs (a replay runs the model again, on the very
tensors that it was captured with, as a graph does), the model, attention and the sampler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.worker.cpu.buffer_utils import UvaBuffer
from vllm.v1.worker.gpu import buffer_utils, cudagraph_utils
from vllm.v1.worker.gpu.async_utils import StepTimingCollector
from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.gpu.kv_connector import NO_OP_KV_CONNECTOR
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.states import RequestState

CAPTURE_SIZES = (1, 2, 4, 8, 16)
MAX_REQUESTS, MAX_TOKENS, MAX_MODEL_LEN = 8, 64, 128
CPU = torch.device("cpu")

Layers = Callable[[torch.Tensor], None]
"""What the model's layers do with a step's token ids, ``[rows]``."""


class Graph:
    """A graph that replays what was called while it was captured."""

    recording: Graph | None = None

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []

    def add(self, call: Callable[[], None]) -> None:
        self._calls.append(call)

    def replay(self) -> None:
        for call in self._calls:
            call()

    @staticmethod
    @contextlib.contextmanager
    def capture(graph: Graph, *_: object, **__: object) -> Iterator[None]:
        Graph.recording = graph
        try:
            yield
        finally:
            Graph.recording = None


class Model(torch.nn.Module):
    """Calls its layers, and remembers what it was told was padding each time.

    Where vLLM captures pieces, so does this: one graph for each number of rows.
    """

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self._layers = layers
        self._pieces: dict[int, Graph] = {}
        self.padding: list[list[bool]] = []

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        context = get_forward_context()

        def run() -> None:
            with override_forward_context(context):
                self.padding.append(context.is_padding.tolist())
                self._layers(input_ids)

        if context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE:
            piece = self._pieces.get(len(input_ids))
            if piece is None:
                piece = self._pieces[len(input_ids)] = Graph()
                piece.add(run)
            piece.replay()
        else:
            if Graph.recording is not None:
                Graph.recording.add(run)
            run()
        return torch.zeros(len(input_ids), 1)


def install_doubles(patch: pytest.MonkeyPatch) -> None:
    """Until ``patch`` is undone: memory without page-locking, graphs without a GPU, one rank."""
    patch.setattr(buffer_utils, "UvaBuffer", UvaBuffer)
    group = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    patch.setattr(cudagraph_utils, "get_pp_group", lambda: group)
    patch.setattr(cudagraph_utils, "is_global_first_rank", lambda: False)
    patch.setattr(cudagraph_utils, "graph_capture", lambda **_: contextlib.nullcontext())
    patch.setattr(cudagraph_utils, "capture_pool", lambda *_: contextlib.nullcontext())
    patch.setattr(cudagraph_utils, "current_stream", lambda: None)
    patch.setattr(cudagraph_utils, "has_compiled_submodule", lambda _: True)
    patch.setattr(type(current_platform), "_global_graph_pool", object())
    patch.setattr(torch.cuda, "CUDAGraph", Graph)
    patch.setattr(torch.cuda, "graph", Graph.capture)


def configuration(mode: CUDAGraphMode) -> SimpleNamespace:
    """Of a VllmConfig, what a step reads."""
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            data_parallel_size=1,
            data_parallel_rank=0,
            tensor_parallel_size=1,
            use_sequence_parallel_moe=False,
            is_moe_model=True,
        ),
        compilation_config=SimpleNamespace(
            cudagraph_mode=mode,
            cudagraph_capture_sizes=list(CAPTURE_SIZES),
            max_cudagraph_capture_size=CAPTURE_SIZES[-1],
            fast_moe_cold_start=False,
            static_forward_context={},
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=MAX_REQUESTS),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        observability_config=SimpleNamespace(cudagraph_metrics=False),
        model_config=SimpleNamespace(rswa_window=None),
        speculative_config=None,
        lora_config=None,
    )


def made_runner(model: Model, mode: CUDAGraphMode) -> GPUModelRunner:
    """A runner of one worker, before its graphs are captured."""
    config = configuration(mode)
    model_state = MagicMock(num_new_sampled_tokens_per_step=1)
    model_state.prepare_inputs.return_value = {}
    model_state.prepare_dummy_inputs.return_value = {}
    runner = object.__new__(GPUModelRunner)
    vars(runner).update(
        vars(config),
        vllm_config=config,
        model=model,
        model_state=model_state,
        device=CPU,
        vocab_size=MAX_REQUESTS * MAX_MODEL_LEN,
        max_num_reqs=MAX_REQUESTS,
        max_num_tokens=MAX_TOKENS,
        max_model_len=MAX_MODEL_LEN,
        decode_query_len=1,
        num_speculative_steps=0,
        use_pp=False,
        is_first_pp_rank=True,
        is_last_pp_rank=True,
        is_encoder_decoder=False,
        is_pooling_model=False,
        uses_inputs_embeds=False,
        use_aux_hidden_state_outputs=False,
        dcp_size=1,
        _draft_workspace_lane=0,
        input_buffers=InputBuffers(MAX_REQUESTS, MAX_TOKENS, CPU),
        req_states=RequestState(
            max_num_reqs=MAX_REQUESTS,
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=MAX_TOKENS,
            num_speculative_steps=0,
            vocab_size=MAX_REQUESTS * MAX_MODEL_LEN,
            device=CPU,
        ),
        cudagraph_manager=ModelCudaGraphManager(config, CPU, mode, 1),
        block_tables=MagicMock(cp_size=1),
        kv_cache_config=SimpleNamespace(kv_cache_groups=[], num_blocks=8),
        attn_groups=[],
        kv_caches=[],
        step_timing=StepTimingCollector(),
        kv_connector=NO_OP_KV_CONNECTOR,
        lora_state=MagicMock(),
        sampler=MagicMock(penalties_state=SimpleNamespace(output_bin_counts=None)),
        prompt_logprobs_worker=MagicMock(),
        eplb=MagicMock(),
        ec_connector=MagicMock(),
        execute_model_state=None,
        **dict.fromkeys(
            (
                "adaptive_verification",
                "aux_output_connector",
                "batch_sharder",
                "encoder_cache",
                "fast_prefill",
                "intermediate_tensors",
                "kv_block_zeroer",
                "pcp_manager",
                "pooling_runner",
                "pp_handler",
                "rejection_sampler",
                "speculator",
                "structured_outputs_worker",
                "ubatch_runner",
            )
        ),
    )
    return runner


def capture(runner: GPUModelRunner) -> None:
    """The part of ``capture_model`` that runs the model."""
    runner.cudagraph_manager.capture(
        runner.model,
        runner.model_state,
        runner.input_buffers,
        None,
        runner.block_tables,
        runner.attn_groups,
        runner.kv_cache_config,
    )


@dataclass
class Request:
    """Of a scheduler's: token ``position`` of it is ``token(position)``, sampled ones too.

    Attributes:
        number: no other request has it, so that a token id tells whose it is, and where it stands.
        num_computed: tokens that were scheduled so far.
    """

    number: int
    prompt_len: int
    num_computed: int = 0
    is_known: bool = False

    @property
    def name(self) -> str:
        return f"request-{self.number}"

    def token(self, position: int) -> int:
        return self.number * MAX_MODEL_LEN + position


class Share(NamedTuple):
    """Of a request in a step."""

    first_position: int
    num_tokens: int
    is_prefill: bool


@dataclass
class Scheduler:
    """Asks a runner for steps, and gives it the tokens that its sampler is to have sampled."""

    runner: GPUModelRunner
    finished: set[str] = field(default_factory=set)
    preempted: set[str] = field(default_factory=set)
    _known: dict[str, Request] = field(default_factory=dict)

    def finish(self, request: Request) -> None:
        """With the next step."""
        self.finished.add(request.name)

    def preempt(self, request: Request) -> None:
        """With the next step; it begins anew, with what it sampled as part of its prompt."""
        self.preempted.add(request.name)
        request.prompt_len = request.num_computed + 1
        request.num_computed, request.is_known = 0, False

    def step(self, *scheduled: tuple[Request, int]) -> dict[str, Share]:
        """Runs so many tokens of each request. Returns what each of them has in the step."""
        self._known |= {request.name: request for request, _ in scheduled}
        output = SchedulerOutput.make_empty()
        output.finished_req_ids, self.finished = self.finished, set()
        output.preempted_req_ids, self.preempted = self.preempted, set()
        output.num_scheduled_tokens = {request.name: num for request, num in scheduled}
        output.total_num_scheduled_tokens = sum(num for _, num in scheduled)
        output.scheduled_new_reqs = [
            NewRequestData(
                req_id=request.name,
                prompt_token_ids=(prompt := _tokens(request, request.prompt_len)),
                mm_features=[],
                sampling_params=SamplingParams(max_tokens=MAX_MODEL_LEN),
                pooling_params=None,
                block_ids=(),
                num_computed_tokens=0,
                lora_request=None,
                prefill_token_ids=prompt,
            )
            for request, _ in scheduled
            if not request.is_known
        ]
        known = [request for request, _ in scheduled if request.is_known]
        output.scheduled_cached_reqs = CachedRequestData.make_empty()
        output.scheduled_cached_reqs.req_ids = [request.name for request in known]
        output.scheduled_cached_reqs.num_computed_tokens = [it.num_computed for it in known]
        output.scheduled_cached_reqs.new_block_ids = [None] * len(known)
        self.runner.execute_model(output)
        shares = {
            request.name: Share(
                request.num_computed, num_tokens, request.num_computed < request.prompt_len
            )
            for request, num_tokens in scheduled
        }
        for request, num_tokens in scheduled:
            request.num_computed += num_tokens
            request.is_known = True
        if scheduled:
            batch = self.runner.execute_model_state.input_batch
            self._sample(batch, [self._known[name] for name in batch.req_ids])
        return shares

    def _sample(self, batch: Any, requests: list[Request]) -> None:
        """As ``sample_tokens`` ends: what was sampled stays on the device for the next step."""
        ends = [request.num_computed for request in requests]
        sampled = [it.token(end) for it, end in zip(requests, ends, strict=True)]
        has_sampled = [end >= it.prompt_len for it, end in zip(requests, ends, strict=True)]
        self.runner.postprocess_sampled(
            batch.idx_mapping,
            torch.tensor(sampled)[:, None],
            torch.tensor(has_sampled, dtype=torch.int32),
            torch.zeros(len(sampled), dtype=torch.int32),
            batch.query_start_loc,
        )


def _tokens(request: Request, end: int) -> list[int]:
    return [request.token(position) for position in range(end)]


def positions_of(tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of token ids: number of the request, position in it."""
    return np.divmod(np.asarray(tokens), MAX_MODEL_LEN)
