"""Messages of the page that no command line provokes: why, and which test has them instead."""

from __future__ import annotations

GPU = "needs a GPU, or one that is simulated: "
DISK = "needs damage on disk, or a disk that fails: "
MODEL = "no model that vLLM has makes it on a CPU: "
WARNING = "a warning, the server goes on: "
VLLM_FIRST = (
    "vLLM refuses or drops it on a CPU first: tests/integration/test_supported.py"
    "::test_refused_by_name"
)
REBUILT = "a warning, and the store is built again: "
OPENING = "tests/store/test_expert_store.py"
STATUS_1 = "a plan or a report, not an error; status 1: "

ELSEWHERE = {
    "install_lock.py: no CPU build": "of `make setup`: tests/scripts/test_install_lock.py",
    # What cannot go together
    "platform ...": GPU + "tests/integration/test_supported_gpu.py::test_platforms",
    "compute capability": GPU + "tests/integration/test_supported_gpu.py::test_platforms",
    "dtype=...: experts of this type": GPU + "tests/integration/test_supported_gpu.py",
    "Triton is not installed": GPU + "tests/integration/test_supported_gpu.py",
    "no C compiler": GPU + "tests/integration/test_supported_gpu.py",
    "use_inductor_graph_partition=True": GPU + "tests/integration/test_supported_gpu.py",
    "splitting_ops names": GPU + "tests/integration/test_supported_gpu.py",
    "VLLM_MOE_SKIP_PADDING=0": GPU + "tests/integration/test_supported_gpu.py",
    "enable_lora=True without": GPU + "tests/integration/test_lora.py",
    "lora_target_modules=...": GPU + "tests/integration/test_lora.py",
    "LoRA adapter ... has weights": GPU + "tests/integration/test_lora.py",
    "speculative_config.draft_load_config.load_format=...": "needs a drafter: "
    "tests/integration/test_supported.py",
    "whose passes vLLM's model runner V2 puts in one graph": GPU
    + "tests/integration/test_drafter_config.py",
    "speculative_config.parallel_drafting=True": MODEL
    + "tests/integration/test_drafter_config.py",
    "the model has none in this pipeline stage": MODEL
    + "tests/integration/test_worker_load.py",
    "the drafter's experts do not fit beside": MODEL + "tests/integration/test_worker_load.py",
    "moe_backend=...": GPU + "tests/integration/test_supported_gpu.py",
    "enable_sleep_mode=True": VLLM_FIRST,
    "enable_cumem_allocator=True": VLLM_FIRST,
    "decode_context_parallel_size=...": VLLM_FIRST,
    "experts would move between ranks": VLLM_FIRST,
    "enable_dbo=...": VLLM_FIRST,
    "reload_weights is not possible": "of a call while serving: "
    "tests/integration/test_patches.py::"
    "test_weights_are_not_reloaded_into_rows_of_other_experts",
    "is replaced by another plugin's": "needs another plugin for the same class",
    # Quantised experts
    "vLLM's kernels for it": "needs another CPU: tests/integration/test_cpu_kernels.py",
    # On a GPU
    "fused_marlin_moe of vLLM": "another vLLM: tests/integration/test_marlin_slots.py",
    "GiB of GPU memory": GPU + "tests/integration/test_gpu_memory.py",
    "MoE offload: quantization=...: quantised experts": "a warning; "
    + GPU
    + "tests/integration/test_supported_gpu.py",
    "the GPU has too little memory to pack": GPU + "tests/integration/test_marlin_slots.py",
    "host_gb=... holds": GPU + "tests/cache/test_sizing.py",
    "bytes of host memory for": GPU + "tests/transfer/test_host_tier.py",
    "MoE offload: the host plans": "a warning; " + GPU + "tests/integration/test_captures.py",
    "MoE offload: the cache holds fewer": "a warning; "
    + GPU
    + "tests/integration/test_captures.py",
    "CUDA does not know ...": GPU + "tests/integration/test_gpu_memory.py",
    "speculative_config.enable_adaptive_verification": "a drafter that is refused anyway: "
    "tests/integration/test_supported.py",
    "kv_sharing_fast_prefill": "a model that shares its KV cache: "
    "tests/integration/test_supported.py",
    "cannot page-lock": GPU + "tests/transfer/test_page_lock.py",
    "would run on ...": GPU + "tests/integration/test_supported_gpu.py",
    "instead of RAM": GPU
    + "tests/integration/test_loading_boundary.py::test_kernel_form_must_be_in_ram",
    # Several machines
    "Ray nodes do not run what this process runs": "needs a Ray cluster: "
    "tests/integration/test_ray.py::test_nodes_that_differ_are_refused",
    "MoE offload: workers on Ray did not close": WARNING
    + "tests/integration/test_ray_shutdown.py",
    "MoE offload: this pipeline stage has no routed experts": WARNING
    + "tests/integration/test_loading_boundary.py",
    "on Ray node ...: ...": "needs a Ray cluster: "
    "tests/integration/test_ray.py::test_a_worker_on_another_node_says_why_it_does_not_start",
    # The model or its checkpoint
    "is not a directory": "what is served has a directory: tests/store/test_identity.py",
    "cannot fingerprint": DISK + "tests/store/test_identity.py",
    "was built without a single": MODEL + "every one of its experts is a RoutedExperts",
    "layers with different numbers": MODEL + "equal in all layers",
    "differ in shape from those of": MODEL + "equal in all layers",
    "(monolithic)": GPU + "tests/integration/test_supported_gpu.py",
    "not one row for each of": MODEL + "parameters are one row per expert",
    "forward_modular of its own": MODEL + "only a pruned model's has one, in vLLM 0.33",
    "that was built without offload": MODEL + "all come through RoutedExperts.__new__",
    "ended at byte": "needs a checkpoint that changes while it is read: "
    "tests/store/test_checkpoint_reader.py::test_a_file_that_shrinks_is_named",
    # The store
    "cannot open the lock": DISK + "tests/store/test_directory.py",
    "set store_dir to a directory that can be written": DISK
    + "tests/store/test_builder.py::test_file_size_limit_is_an_error_that_names_the_store",
    "exists already; open it": "needs two builders that ignore the lock: "
    "tests/store/test_builder.py::test_an_existing_store_is_not_overwritten",
    "vanished right after": "needs somebody who deletes it at that moment",
    "the store is built again": REBUILT + "tests/integration/test_engine.py",
    "every user may write to ... (mode": DISK
    + "tests/store/test_own_files.py::test_what_every_user_may_write_is_refused",
    "may write to ... (mode ...), and so choose what is served; if that": WARNING
    + "tests/store/test_own_files.py::test_what_a_group_may_write_is_told_once",
    "who can change what root serves": WARNING
    + "tests/store/test_own_files.py::test_another_owner_is_refused_and_root_is_told",
    "is a symbolic link, which is not followed": DISK + "tests/store/test_own_files.py"
    "::test_a_store_dir_may_be_a_link_and_what_lies_in_it_may_not",
    "links are not followed": REBUILT
    + OPENING
    + "::test_what_is_no_file_is_neither_read_nor_followed",
    "is of a model with": REBUILT
    + OPENING
    + "::test_a_store_of_another_number_of_layers_or_experts_does_not_open",
    "is of another model or build": REBUILT + OPENING,
    "its experts hold": REBUILT + OPENING,
    "has format version ..., this code reads": REBUILT + OPENING,
    "is not a valid manifest": REBUILT + OPENING,
    "... is not valid (...)": REBUILT + OPENING,
    "does not list checksums": REBUILT + OPENING,
    "bytes, but its layout needs": REBUILT + OPENING,
    "bytes instead of": REBUILT + OPENING,
    "cannot read ...: ...": REBUILT + OPENING,
    "holds a damaged record": REBUILT + OPENING,
    "cannot note in": WARNING
    + "tests/store/test_expert_store.py::test_a_store_that_cannot_be_condemned_says_so",
    "reading through the page cache": WARNING
    + "tests/transfer/test_engine.py::test_refused_o_direct_falls_back_with_a_warning",
    "cannot delete": DISK
    + "tests/store/test_shelf.py::test_what_cannot_be_deleted_is_an_error",
    "Failed to infer device type": "vLLM's; needs vLLM for CUDA where there is no GPU",
    # While serving, memory
    "cannot open the expert store": "needs a store that changes during the start: "
    "tests/transfer/test_engine.py::test_store_that_vanished_or_changed_size",
    "no router was found": WARNING + MODEL + "tests/integration/test_device_calls.py",
    "a prefetch failed": WARNING
    + "tests/transfer/test_prefetch.py::test_a_failed_prefetch_is_a_warning",
    "smaller than what one layer call needs": WARNING
    + "tests/integration/test_engine.py::test_a_cache_smaller_than_a_layer_serves_in_waves",
    "... ended: killed by ...": "needs a rank that is killed: tests/integration/test_ended_ranks.py"
    "::test_a_killed_rank_is_named_and_a_restart_serves",
    "... ended: exit status ...": "needs a rank that crashes: "
    "tests/integration/test_ended_ranks.py::test_how_it_ended",
    "... ended: Ray's actor is gone": "needs a cluster that loses a node: "
    "tests/integration/test_ended_ranks.py::"
    "test_actors_of_ray_are_asked_for_what_became_of_them",
    "MoE offload: no counters of": WARNING + "tests/integration/test_endpoint.py::"
    "test_figures_that_do_not_arrive_have_an_age_and_are_named_once",
    "holds no whole counters": WARNING
    + "tests/test_metrics.py::test_a_damaged_file_is_left_out_with_one_warning",
    "Waiting for connections to close": "vLLM's, and no error",
    "slots of ...; lower cache_gb": "needs memory that runs out: tests/cache/test_sizing.py",
    "cannot populate": "needs memory that runs out",
    "Available memory on node": "vLLM's; needs memory that runs out",
    # Traces and activation matrices
    "starting without the activation matrices": WARNING
    + "tests/trace/test_collection_file.py::test_a_foreign_or_damaged_file_is_left_alone",
    "set another trace_path": WARNING
    + "tests/trace/test_collection.py::test_foreign_and_damaged_files_are_refused",
    "another server keeps its activation matrices": WARNING
    + "tests/trace/test_collection_file.py"
    "::test_of_two_servers_the_first_one_keeps_its_matrices",
    "cannot save activation matrices": WARNING
    + "tests/trace/test_collection_file.py::test_an_unwritable_directory_is_a_warning",
    "record_trace stopped": WARNING
    + "tests/trace/test_recorder.py::test_a_full_disk_stops_recording_not_serving",
    "not all was written at the end": "an error in the log, the server has served: "
    "tests/integration/test_ray_shutdown.py"
    "::test_files_that_cannot_be_written_are_named_and_the_end_goes_on",
    "cannot write the recorded trace": "an error in the log, the server has served: "
    "tests/trace/test_recorder.py::test_a_full_disk_loses_nothing_that_was_recorded",
    "what an earlier server recorded": WARNING
    + "tests/trace/test_recorder.py::test_what_a_killed_server_left_makes_room_for_the_next",
    "another server records to": "needs another server: "
    "tests/integration/test_recording.py::test_two_servers_do_not_record_to_one_file",
    # `vllm-moe-offload`
    "half of what is available at most": "needs a trace as large as memory: "
    "tests/trace/test_routing.py"
    "::test_a_small_file_that_unpacks_to_more_than_there_is_is_refused",
    "do not fit in": "needs a trace whose every token is one layer call of many experts: "
    "tests/replay/test_replay.py",
    "--plot needs matplotlib": "needs an environment without it",
    "files hold experts of layers": "tests/plan/shapes/test_checkpoint.py",
    "elements a layer, the layers' expert tensors hold": "tests/plan/shapes/test_checkpoint.py",
    "by config.json experts are quantised, the files hold": "tests/plan/shapes/test_checkpoint.py",
    "the experts are quantised to what is not served": STATUS_1
    + "tests/cli/test_plan.py::test_what_is_not_served_gets_its_reason_and_no_line",
    "not served: ": STATUS_1 + "tests/plan/test_fit.py",
    "of fast memory": STATUS_1 + "tests/cli/test_plan.py::test_too_little_memory_says",
    "the first start takes": STATUS_1 + "tests/plan/test_fit.py",
}
"""By a part of the message."""
