"""Parts, options and the collecting of results; the contest itself is tried by --device cpu."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts import bench_gpu as bench  # noqa: E402
from scripts import gpu_options  # noqa: E402
from scripts import gpu_plan as plan  # noqa: E402
from scripts.gpu_contest import difference, prompt_text  # noqa: E402
from scripts.gpu_models import DISK_FACTOR  # noqa: E402
from vllm_moe_offload.cache.sizing import cache_slots  # noqa: E402

PARTS = plan.parts_of(plan.MODELS)


def part_named(name: str) -> plan.Part:
    """A part of the full benchmark."""
    return plan.select_parts([name], PARTS)[0]


# ---- parts -----------------------------------------------------------------------------


def test_all_parts_unless_some_are_named() -> None:
    assert plan.select_parts(None, PARTS) == PARTS
    assert [p.name for p in plan.select_parts(["mixtral-8x7b-12.5"], PARTS)] == [
        "mixtral-8x7b-12.5"
    ]


def test_parts_run_once_in_the_order_asked_for() -> None:
    names = ["mixtral-8x7b-50", "qwen3-30b-a3b-25", "mixtral-8x7b-50"]
    assert [p.name for p in plan.select_parts(names, PARTS)] == names[:2]


def test_an_unknown_part_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"qwen3-30b-a3b-26; parts are .*qwen3-30b-a3b-25"):
        plan.select_parts(["qwen3-30b-a3b-26"], PARTS)


def test_parts_of_misses_are_run_where_they_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, expected in (
        ([], [part.name for part in PARTS]),
        (["--parts", "qwen3-30b-a3b-all-but-one-misses"], ["qwen3-30b-a3b-all-but-one-misses"]),
    ):
        monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *arguments, "--list"])
        assert bench.main() == 0
        listed = capsys.readouterr().out.splitlines()
        assert [line.partition(":")[0] for line in listed] == expected


@pytest.mark.parametrize("layers", [None, 5, 47])
def test_all_but_one_has_a_slot(layers: int | None) -> None:
    """Through the option, as cache_gb says it."""
    model = plan.with_layers(plan.MODELS[0], layers)
    (part,) = [part for part in plan.sweep_of([model]) if part.share_name == plan.ALL_BUT_ONE]
    slots = cache_slots(
        plan.offload_options(part, "trace", Path(), Path())["cache_gb"],
        expert_bytes=1,
        num_layers=model.shape.layers,
        num_experts=model.shape.experts,
        top_k=model.shape.top_k,
        auto_bytes=0,
    )
    assert slots == model.shape.layers * model.shape.experts - 1


def planned_for(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> gpu_options.Planned:
    parser = argparse.ArgumentParser()
    gpu_options.add_plan_options(parser)
    return gpu_options.planned(parser.parse_args(arguments))


def test_topics_change_only_where_misses_are_the_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = ("qwen3-30b-a3b-25", "qwen3-30b-a3b-25-misses")
    own = planned_for(monkeypatch, "--parts", *parts)
    kept, changing = (own.sizes_of(part).workloads for part in own.parts)
    assert not any(workload.any_topic for workload in kept)
    assert [w.name for w in changing] == ["decode-1-any-topic", "decode-8-any-topic"]
    asked = planned_for(monkeypatch, "--parts", *parts, "--workloads", "decode-1")
    assert [asked.sizes_of(part).workloads[0].name for part in asked.parts] == ["decode-1"] * 2


@pytest.mark.parametrize(
    ("name", "record_bytes"), [("qwen3-30b-a3b", 9_437_184), ("mixtral-8x7b", 352_321_536)]
)
def test_experts_have_the_released_models_size(name: str, record_bytes: int) -> None:
    model = next(model for model in plan.MODELS if model.name == name)
    assert model.record_bytes == record_bytes
    # A checkpoint and a store of it must fit on a disk of 64 GB.
    assert 2 * DISK_FACTOR * model.expert_bytes < 50e9


# ---- options ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "share", "groups"),
    [
        (16, 0.25, (6, 5)),  # layers 0, 6, 12 stay, the fourth pays for the buffer
        (16, 0.125, (16, 15)),
        (16, 0.5, None),
        (8, 0.125, (1, 1)),  # the buffer alone
        (8, 0.1, None),
    ],
)
def test_prefetch_groups_use_the_memory_and_no_more(
    layers: int, share: float, groups: tuple[int, int] | None
) -> None:
    found = plan.prefetch_groups(layers, share)
    if share * layers < 1:
        assert found is None
        return
    assert found is not None
    size, offloaded = found
    resident = sum(layer % size < size - offloaded for layer in range(layers))
    assert resident + 1 == int(share * layers)
    if groups is not None:
        assert found == groups


def test_contestants_differ_in_what_offloads_and_in_nothing_else() -> None:
    part = part_named("qwen3-30b-a3b-25")
    options: dict[str, Any] = {
        name: plan.engine_options(part, name, plan.FULL) for name in plan.CONTESTANTS
    }
    common = options["resident"]
    assert options["trace"] == options["lru"] == common
    assert common["kernel_config"] == {"moe_backend": "triton"}
    for name in plan.VLLM_OFFLOADERS:
        own = {key for key in options[name] if key not in common}
        assert own
        assert all("offload" in key for key in own)
        assert {key: options[name][key] for key in common} == common
    offloaded_bytes = options["cpu-offload-gb"]["cpu_offload_gb"] * plan.GIB
    assert offloaded_bytes == pytest.approx(0.75 * part.model.expert_bytes)


def test_one_contestant_has_the_kernels_that_vllm_chooses() -> None:
    part = part_named("qwen3-30b-a3b-100")
    own = plan.engine_options(part, plan.RESIDENT_AUTO, plan.FULL)
    same = plan.engine_options(part, "resident", plan.FULL)
    assert isinstance(own, dict)
    assert isinstance(same, dict)
    assert own | {"kernel_config": {"moe_backend": "triton"}} == same
    assert plan.RESIDENT_AUTO in part.contestants


def test_what_a_platform_or_a_size_does_not_allow_says_why() -> None:
    part = part_named("qwen3-30b-a3b-25")
    on_cpu = plan.EngineChoices(device="cpu")
    assert plan.engine_options(part, "cpu-offload-gb", plan.FULL, on_cpu) == (
        "not on this platform"
    )
    tight = plan.Part(plan.with_layers(part.model, 3), 25.0)
    assert "less than a layer" in str(plan.engine_options(tight, "vllm-prefetch", plan.FULL))


def test_requests_fit_the_engine() -> None:
    options = plan.engine_options(part_named("mixtral-8x7b-25"), "resident", plan.FULL)
    assert isinstance(options, dict)
    for workload in plan.FULL.workloads:
        assert workload.prompt_tokens + workload.new_tokens <= options["max_model_len"]
        assert workload.batch <= options["max_num_seqs"]
        if workload.is_decode:  # all get their first token in one step
            assert workload.batch * workload.prompt_tokens <= options["max_num_batched_tokens"]


def test_workloads_are_chosen_in_the_order_asked_for() -> None:
    chosen = plan.with_workloads(
        plan.FULL, ["prefill-4096", "decode-1", "decode-8", "decode-1"]
    )
    assert [w.name for w in chosen.workloads] == ["prefill-4096", "decode-1", "decode-8"]
    assert chosen.max_batch == 8
    assert chosen.max_tokens == 4096 + 2
    assert plan.with_workloads(plan.FULL, None) == plan.FULL
    options = plan.engine_options(part_named("qwen3-30b-a3b-25"), "resident", chosen)
    assert isinstance(options, dict)
    assert options["compilation_config"] == {"cudagraph_capture_sizes": [1, 8]}


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        (plan.EngineChoices(backend="eager"), {"backend": "eager"}),
        (plan.EngineChoices(), {}),
        (plan.EngineChoices(enforce_eager=True), None),
        (plan.EngineChoices("cpu"), None),
        (
            plan.EngineChoices("cpu", backend="eager"),
            {"backend": "eager", "mode": "DYNAMO_TRACE_ONCE"},
        ),
    ],
)
def test_all_contestants_are_compiled_alike(
    choices: plan.EngineChoices, expected: dict[str, str] | None
) -> None:
    part = part_named("qwen3-30b-a3b-25")
    for name in (*plan.CONTESTANTS, plan.RESIDENT_AUTO):
        options = plan.engine_options(part, name, plan.FULL, choices)
        if isinstance(options, str):
            assert choices.device == "cpu"
            continue
        if expected is None:
            assert options["enforce_eager"] is True
            assert "compilation_config" not in options
            continue
        assert "enforce_eager" not in options
        graphs = {"cudagraph_capture_sizes": [1, 8, 32]} if choices.device == "cuda" else {}
        assert options["compilation_config"] == expected | graphs


def test_host_gb_goes_to_the_plugin(tmp_path: Path) -> None:
    part = part_named("qwen3-30b-a3b-25")
    plain = plan.offload_options(part, "trace", tmp_path, tmp_path)
    assert "host_gb" not in plain
    given = plan.offload_options(part, "trace", tmp_path, tmp_path, "100%")
    assert given == plain | {"host_gb": "100%"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "decode-2"], "no such workload: decode-2; workloads are decode-1, "),
        (["--workloads", "decode-1", "x"], "no such workload: x; workloads are decode-1, "),
        (
            ["--quick", "--workloads", "decode-8"],
            "workloads are decode-1, prefill-512, decode-4",
        ),
        (
            ["--backend", "eager", "--enforce-eager"],
            "--enforce-eager: the latter compiles nothing",
        ),
        (["--backend", "cudagraphs"], "invalid choice: 'cudagraphs'"),
        (["--host-gb", "lots"], "--host-gb lots: allowed: a positive number of GiB"),
        (["--host-gb", "200%"], "--host-gb 200%: allowed: "),
        (["--device", "cpu", "--host-gb", "4"], "--host-gb 4: only with --device cuda"),
        (["--parts", "x"], "no such part: x; parts are "),
    ],
)
def test_wrong_arguments_are_refused_in_a_line(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *arguments, "--list"])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


# ---- results ---------------------------------------------------------------------------


def test_a_contestant_that_died_keeps_its_samples() -> None:
    sample = {"repeat": 1, "counters": {"misses": 2, "prefetch_useful": 1}}
    findings = [
        {"kind": "ready", "start_s": 9.0, "memory": {}, "counts_compilations": True},
        {"kind": "sample", "workload": "decode-1", "sample": sample},
    ]
    result = bench.collect(findings, record_bytes=10)
    assert not result["ended"]
    assert [s["crossing_bytes"] for s in result["workloads"]["decode-1"]] == [30]


class Killed(BaseException):
    """The run ends here, with nothing done afterwards."""


def on_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *more: str) -> list[str]:
    """``bench_gpu.py`` on tiny models in another folder; nothing is written or measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "ensure_model", lambda *_: tmp_path / "model")
    monkeypatch.setattr(bench, "end_on_sigterm", lambda: None)
    arguments = ["--device", "cpu", "--parts", "tiny-qwen3-25", "--work-dir", "work", *more]
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *arguments])
    return arguments


def test_each_contestant_is_on_disk_before_the_next_one_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_cpu(monkeypatch, tmp_path, "--results", "out")
    on_disk = []

    def run_contestant(part: plan.Part, name: str, *_: Any, **__: Any) -> dict[str, Any]:
        if (tmp_path / "out" / "gpu.json").exists():
            report = json.loads((tmp_path / "out" / "gpu.json").read_text())
            found = report["parts"]["tiny-qwen3-25"]["contestants"]
            on_disk.append({name: entry["status"] for name, entry in found.items()})
        if len(on_disk) == 2:
            monkeypatch.setattr(bench, "save", lambda *_, **__: None)  # as after SIGKILL
            raise Killed
        return {"status": "measured", "reason": "", "short": {}, "workloads": {}}

    monkeypatch.setattr(bench, "run_contestant", run_contestant)
    with pytest.raises(Killed):
        bench.main()
    rest = dict.fromkeys(plan.CONTESTANTS, "not run")
    first, second, *_ = plan.CONTESTANTS
    assert on_disk == [
        rest | {first: "measured"},
        rest | dict.fromkeys((first, second), "measured"),
    ]


def sweep_on_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *more: str
) -> tuple[list[tuple[str, str, float]], dict[str, Any]]:
    """Two parts of the sweep on tiny models: who ran, with which limit, and the report."""
    on_cpu(monkeypatch, tmp_path)
    parts = ("tiny-qwen3-25-misses", "tiny-qwen3-50-misses")
    arguments = ("--device", "cpu", "--parts", *parts, "--work-dir", "work")
    arguments += ("--results", str(tmp_path / "out"), *more)
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *arguments])
    monkeypatch.setattr(bench, "measure_link", lambda part, args: {"of": part.name})
    ran = []

    def run_contestant(
        part: plan.Part, name: str, *_: Any, limit_s: float, **__: Any
    ) -> dict[str, Any]:
        ran.append((part.name, name, limit_s))
        return {"status": "measured", "reason": "", "short": {}, "workloads": {}}

    monkeypatch.setattr(bench, "run_contestant", run_contestant)
    assert bench.main() == 0
    return ran, json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]


def test_what_is_the_same_in_all_parts_is_measured_once_if_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = "tiny-qwen3-25-misses", "tiny-qwen3-50-misses"
    ran, parts = sweep_on_cpu(monkeypatch, tmp_path, "--resident-once")
    assert [row[:2] for row in ran] == [
        (first, "resident"),
        (first, "trace"),
        (second, "trace"),
    ]
    assert parts[second]["link"] == {"of": first}
    resident = parts[second]["contestants"]["resident"]
    assert (resident["status"], resident["measured_in"]) == ("measured", first)
    ran, parts = sweep_on_cpu(monkeypatch, tmp_path)
    assert len(ran) == 4
    assert parts[second]["link"] == {"of": second}


def test_all_parts_share_one_limit_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran, _ = sweep_on_cpu(monkeypatch, tmp_path, "--total-limit-s", "300", "--resident-once")
    # 1.6 parts of as many as contestants are to come, and what all leave to end by itself.
    wanted = [1.6 * 300 / 3, 1.6 * 300 / 2, 300 - bench.GRACE_S]
    assert [limit for *_, limit in ran] == pytest.approx(wanted, abs=2)
    ran, _ = sweep_on_cpu(monkeypatch, tmp_path, "--time-limit-s", "300")
    assert [limit for *_, limit in ran] == pytest.approx([240, 280, 240, 280], abs=2)


def test_what_was_chosen_is_in_the_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_cpu(
        monkeypatch,
        tmp_path,
        *("--results", str(tmp_path / "out"), "--contestants", "resident"),
        *("--backend", "eager", "--workloads", "decode-1"),
    )
    asked = {}

    def run_contestant(*given: Any, model_dir: Path, limit_s: float) -> dict[str, Any]:
        asked["sizes"] = given[2]
        return {"status": "failed", "reason": f"see {tmp_path}/work/logs", "short": {}}

    monkeypatch.setattr(bench, "run_contestant", run_contestant)
    assert bench.main() == 1
    assert [workload.name for workload in asked["sizes"].workloads] == ["decode-1"]
    written = (tmp_path / "out" / "gpu.json").read_text()
    parameters = json.loads(written)["parts"]["tiny-qwen3-25"]["parameters"]
    assert parameters["backend"] == "eager"
    assert parameters["enforce_eager"] is False
    assert parameters["host_gb"] is None
    assert [workload["name"] for workload in parameters["workloads"]] == ["decode-1"]
    assert str(tmp_path) not in written


def test_a_link_that_takes_too_long_does_not_end_the_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(command: list[str], **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, bench.LINK_LIMIT_S)

    monkeypatch.setattr(subprocess, "run", run)
    found = bench.measure_link(part_named("qwen3-30b-a3b-25"), SimpleNamespace(device="cuda"))
    assert found == {"error": f"not done within {bench.LINK_LIMIT_S} s"}


def test_a_contestant_runs_offline_and_writes_below_the_work_dir(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: dict[str, Any] = {}

    class Process:
        def __init__(self, command: list[Any], *, env: dict[str, str], **_: Any) -> None:
            started.update(env=env, spec=json.loads(Path(command[2]).read_text()))

        def wait(self, *_: float) -> int:
            return 0

        poll = wait

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    args = argparse.Namespace(
        **{"device": "cuda", "attention_backend": None, "backend": "eager"},
        **{"enforce_eager": False, "host_gb": "100%", "work_dir": tmp_path},
    )
    result = bench.run_contestant(
        part_named("qwen3-30b-a3b-25"),
        "trace",
        plan.with_workloads(plan.FULL, ["decode-1"]),
        args,
        model_dir=tmp_path / "model",
        limit_s=1.0,
    )
    assert result["status"] == "failed"  # it wrote nothing
    assert started["spec"]["offload"]["host_gb"] == "100%"
    assert [workload["name"] for workload in started["spec"]["workloads"]] == ["decode-1"]
    environment = started["env"]
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"
    assert environment["NCCL_SOCKET_IFNAME"] == "eth0"  # as the user has it
    for name in ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "XDG_CACHE_HOME"):
        assert Path(environment[name]).is_relative_to(tmp_path)


def test_warm_ups_are_in_the_report() -> None:
    findings = [
        {"kind": "warm-up", "workload": "decode-1", "repeat": 0, "compiled": 9},
        {"kind": "warm-up", "workload": "decode-1", "repeat": 1, "compiled": 1},
        {"kind": "end"},
    ]
    assert bench.collect(findings, record_bytes=10)["warm_ups"] == {
        "decode-1": [{"repeat": 0, "compiled": 9}, {"repeat": 1, "compiled": 1}]
    }


def contestant(status: str, reason: str = "", **short: int) -> dict[str, Any]:
    """A contestant of a part."""
    return {"status": status, "reason": reason, "short": short}


@pytest.mark.parametrize(
    ("found", "complete"),
    [
        (contestant("measured"), True),
        (contestant("measured", decode=1), False),
        (contestant("failed", "exit status 1"), False),
        (contestant("not run", "not on this platform"), True),
        (contestant("not run", "not possible: less than a layer"), True),
        (contestant("not run", "the part's time was over"), False),
    ],
)
def test_a_part_is_complete_if_all_that_can_run_did(
    found: dict[str, Any], complete: bool
) -> None:
    assert bench.is_complete({"contestants": {"a": found}}) is complete


def test_prompts_repeat_themselves_only_for_the_same_arguments() -> None:
    assert prompt_text(100, 3, 1) == prompt_text(100, 3, 1)
    assert prompt_text(100, 3, 1) != prompt_text(100, 3, 2)
    assert len(prompt_text(1000, 15, 0).split()) == 1000


def test_counters_are_differences() -> None:
    assert difference({"hits": 1.0}, {"hits": 4.0}) == {"hits": 3.0}
    assert difference(None, {"hits": 4.0}) is None


@pytest.mark.parametrize(("backend", "expected"), [("eager", "0"), ("inductor", None)])
def test_nothing_is_compiled_ahead_of_time_without_inductor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: str, expected: str | None
) -> None:
    on_cpu(
        monkeypatch,
        tmp_path,
        *("--results", str(tmp_path / "out"), "--contestants", "resident"),
        *("--backend", backend, "--workloads", "decode-1"),
    )
    given: list[dict[str, str]] = []

    class Ended:
        def __init__(self, _: object, *, env: dict[str, str], **__: object) -> None:
            given.append(env)

        def wait(self, _: float | None = None) -> int:
            return 0

        poll = wait

    monkeypatch.delenv("VLLM_USE_AOT_COMPILE", raising=False)
    # Of the benchmark alone: others ask git and the CPU.
    replaced = SimpleNamespace(**(vars(subprocess) | {"Popen": Ended}))
    monkeypatch.setattr(bench, "subprocess", replaced)
    assert bench.main() == 1  # nothing was measured
    assert [env.get("VLLM_USE_AOT_COMPILE") for env in given] == [expected]
