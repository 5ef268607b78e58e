"""bench_llamacpp.py but for what it starts: limits, figures, GGUF headers, what it refuses."""

from __future__ import annotations

import importlib
import json
import struct
import sys
from argparse import Namespace
from dataclasses import asdict
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from scripts import bench_llamacpp as bench
from scripts.llamacpp import install as installing
from scripts.llamacpp.install import LlamaCpp, LlamaCppError, commit_of, install, run_step
from scripts.llamacpp.limits import Setting, besides_experts, limit_of, settings_of
from scripts.llamacpp.process import turn_of
from scripts.llamacpp.weights import BF16, GgufSizes, ensure_gguf, sizes_of

SIZES = GgufSizes(file_bytes=1000, expert_bytes=800)


# ---- limits ------------------------------------------------------------------------------


def test_limit_is_what_it_takes_besides_and_the_share_of_the_experts() -> None:
    without_limit = {"peak_page_cache_bytes": 1010, "max_usage_bytes": 1300}
    besides = besides_experts(without_limit, SIZES)
    assert besides == 500  # 1300 less all experts: dense weights, and 300 that are no file's
    assert limit_of(0.5, besides, SIZES, unlimited=99_999) == 900
    assert limit_of(0.36, besides, SIZES, unlimited=99_999) == 788
    assert limit_of(1.0, besides, SIZES, unlimited=99_999) == 99_999


def test_a_file_that_was_charged_elsewhere_is_no_ground_for_a_limit() -> None:
    figures = {"peak_page_cache_bytes": 500, "max_usage_bytes": 700}
    with pytest.raises(LlamaCppError, match=r"^500 bytes .* less than the 1000 bytes .*mapped"):
        besides_experts(figures, SIZES)


def test_weights_are_repacked_only_where_nothing_limits() -> None:
    assert settings_of(0.55) == [Setting(1, False, None), Setting(1, False, 128)]
    assert settings_of(1.0) == [Setting(1, True, None), Setting(1, False, None)]


@pytest.mark.parametrize(
    ("cores", "share", "quickest"),
    [
        (2, 0.36, Setting(1, False, 128)),
        (2, 0.36, Setting(2, False, 128)),
        (1, 0.36, Setting(1, False, None)),
        (4, 1.0, Setting(4, True)),
    ],
)
def test_trials_choose_what_is_quickest(
    monkeypatch: pytest.MonkeyPatch, cores: int, share: float, quickest: Setting
) -> None:
    """More threads are tried with the best of the rest alone."""

    def speed(contest: Any, weights: Any, limit: int, setting: Setting) -> float:
        assert limit == 900
        names = ("threads", "repack", "read_ahead_kib")
        return sum(getattr(setting, name) == getattr(quickest, name) for name in names)

    monkeypatch.setattr(bench, "try_setting", speed)
    contest: Any = SimpleNamespace(cores=cores)
    weights: Any = SimpleNamespace(name="bf16")
    chosen = bench.choose(contest, weights, share, 900)
    assert chosen["setting"] == asdict(quickest)
    assert len(chosen["tried"]) == (2 if cores == 1 else 3)
    assert {trial["threads"] for trial in chosen["tried"]} == {1, cores}


def test_vllm_computes_on_the_first_cores() -> None:
    name = "VLLM_CPU_OMP_THREADS_BIND"
    assert [bench.computing_on(n)[name] for n in (1, 2, 8)] == ["0", "0-1", "0-7"]


# ---- figures -----------------------------------------------------------------------------


def test_decoding_is_timed_from_the_first_token_to_the_last() -> None:
    answers = [
        {"token_s": [5.0, 5.5, 6.0], "engine_decoded": 2, "engine_decode_s": 0.8},
        {"token_s": [1.0, 2.0, 4.0], "engine_decoded": 2, "engine_decode_s": 2.4},
    ]
    rest = {"read_bytes": 7, "major_faults": 1, "text": "so"}
    turn = turn_of([answer | rest for answer in answers])
    assert turn["decode_tokens_per_s"] == 4 / (1.0 + 3.0)
    assert turn["engine_tokens_per_s"] == 4 / 3.2
    assert turn["request_s"] == [6.0, 4.0]
    assert (turn["tokens"], turn["read_bytes"], turn["major_faults"]) == (6, 14, 2)


def case_of(contestant: str, number: int, speeds: list[float], share: float = 0.36) -> Any:
    """A case of two requests of 5 tokens per turn."""
    case = {
        "round": number,
        "contestant": contestant,
        "format": "bf16",
        "share": share,
        "samples": [{"decode_tokens_per_s": speed, "tokens": 10} for speed in speeds],
        "cgroup": {"peak_anonymous_bytes": 100 + number, "peak_page_cache_bytes": 50},
        "read_bytes": 40_000_000,
    }
    if contestant != bench.LLAMACPP:
        case["counters"] = {"hits": 90, "misses": 10}
    return case


CASES = [
    case_of("trace", 0, [10.0, 20.0]),
    case_of("llama.cpp", 0, [1.0, 2.0]),
    case_of("llama.cpp", 1, [4.0, 6.0]),
    case_of("trace", 1, [30.0, 40.0]),
    case_of("trace", 1, [50.0], share=1.0),
]


def test_summary_has_a_row_per_contestant_and_ratios_per_round() -> None:
    ours, theirs, alone = bench.summary_of(CASES)
    assert ours["tokens_per_s"] == {"median": 25.0, "min": 10.0, "max": 40.0}
    assert ours["read_mb_per_token"] == 2.0
    assert ours["peak_anonymous_bytes"] == 101
    assert ours["hit_rate"] == 0.9
    assert ours["ratio"] == 25.0 / 3.0
    assert ours["ratios"] == [10.0, 7.0]
    assert theirs["contestant"] == "llama.cpp"
    assert "ratio" not in theirs
    assert "hit_rate" not in theirs
    assert alone["share"] == 1.0
    assert "ratio" not in alone  # llama.cpp did not run there


def test_bar_is_the_ratio_at_the_least_share() -> None:
    rows = bench.summary_of(CASES)
    (bar,) = bench.bars_of(rows)
    assert "36%" in bar.name
    assert bar.measured == rows[0]["ratio"]
    bench.show(rows)


# ---- GGUF --------------------------------------------------------------------------------


def gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def gguf(tensors: dict[str, int], alignment: int | None = None) -> bytes:
    """A file whose tensors have these many bytes each, one after the other."""
    values = [
        gguf_string("general.architecture") + struct.pack("<I", 8) + gguf_string("mixtral"),
        gguf_string("some.flag") + struct.pack("<I?", 7, True),
        gguf_string("some.count") + struct.pack("<IQ", 10, 3),
        gguf_string("some.words") + struct.pack("<IIQ", 9, 8, 2) + 2 * gguf_string("word"),
        gguf_string("some.scores") + struct.pack("<IIQ3f", 9, 6, 3, 0, 1, 2),
    ]
    if alignment is not None:
        values.append(gguf_string("general.alignment") + struct.pack("<II", 4, alignment))
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)) + b"".join(values)
    offset = 0
    for name, size in tensors.items():
        header += gguf_string(name) + struct.pack("<IQQIQ", 2, size, 1, 24, offset)
        offset += size
    padding = -len(header) % (alignment or 32)
    return header + bytes(padding + offset)


@pytest.mark.parametrize("alignment", [None, 128])
def test_experts_of_a_gguf_file_are_counted(tmp_path: Path, alignment: int | None) -> None:
    file = tmp_path / "model.gguf"
    tensors = {
        "token_embd.weight": 64,
        "blk.0.ffn_up_exps.weight": 256,
        "blk.0.ffn_gate_inp.weight": 32,
        "blk.0.ffn_down_exps.weight": 128,
    }
    file.write_bytes(gguf(tensors, alignment))
    sizes = sizes_of(file)
    assert sizes.expert_bytes == 256 + 128
    assert sizes.file_bytes == file.stat().st_size
    assert sizes.other_bytes == sizes.file_bytes - 384


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(60), r"begins with b'PK.*GGUF 2 or 3"),
        (b"GGUF" + struct.pack("<I", 9) + bytes(60), r"version 9; GGUF 2 or 3"),
        (gguf({"blk.0.ffn_up.weight": 64}), r"holds no experts"),
        (gguf({"blk.0.ffn_up_exps.weight": 64})[:60], r"is damaged"),
        (b"", r"is damaged"),
    ],
)
def test_what_is_no_gguf_file_with_experts_is_named(
    tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(LlamaCppError, match=rf"model\.gguf.*{message}"):
        sizes_of(file)


def installed_in(directory: Path) -> LlamaCpp:
    return LlamaCpp(Path(sys.executable), directory, "0123456")


def test_a_gguf_file_is_converted_once(tmp_path: Path) -> None:
    script = tmp_path / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
    script.parent.mkdir(parents=True)
    # Fails when it is asked again.
    script.write_text(
        "import sys; from pathlib import Path\n"
        "model, _, kind, _, out = sys.argv[1:]\n"
        "Path(model, 'asked').touch(exist_ok=False)\n"
        "Path(out).write_text(f'{model} in {kind}')\n"
    )
    model = tmp_path / "small"
    model.mkdir()
    for _ in range(2):
        file = ensure_gguf(installed_in(tmp_path), model, BF16)
        assert file == tmp_path / "small-bf16.gguf"
        assert file.read_text() == f"{model} in bf16"


def test_a_conversion_that_fails_leaves_no_file_and_its_last_line(tmp_path: Path) -> None:
    model = tmp_path / "small"
    model.mkdir()
    with pytest.raises(
        LlamaCppError, match=r"^writing small-bf16\.gguf failed with status 2: .*No such file"
    ):
        ensure_gguf(installed_in(tmp_path), model, BF16)
    assert not list(tmp_path.glob("*.gguf"))


# ---- the installation --------------------------------------------------------------------


def test_the_newest_release_names_the_commit() -> None:
    text = "## [2]\n- feat: update llama.cpp to ggml-org/llama.cpp@0c1e57098\n## [1]\n- ...@4df29be4f"
    assert commit_of(text) == "0c1e57098"
    with pytest.raises(LlamaCppError, match="no commit"):
        commit_of("## [2]\n- fix: something")


def test_a_step_that_fails_says_its_last_line_and_where_the_rest_is(tmp_path: Path) -> None:
    log = tmp_path / "build.log"
    command = [sys.executable, "-c", "import os; print(os.environ['A']); exit('no room')"]
    with pytest.raises(LlamaCppError) as caught:
        run_step("building", command, log, {"A": "what came before"})
    assert str(caught.value) == f"building failed with status 1: no room (see {log})"
    assert "what came before" in log.read_text()


def test_what_is_installed_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / f"llama-cpp-python-{installing.VERSION}"
    source = home / f"llama_cpp_python-{installing.VERSION}"

    def build(home: Path, python: Path, source: Path) -> None:
        source.mkdir(parents=True)
        (source / "CHANGELOG.md").write_text("ggml-org/llama.cpp@0c1e57098")

    monkeypatch.setattr(installing, "_build", build)
    first = install(tmp_path)
    assert first == LlamaCpp(home / "environment" / "bin" / "python", source, "0c1e57098")
    assert first.vendored == source / "vendor" / "llama.cpp"
    assert install(tmp_path) == first  # building again would fail: the source is there


def test_without_a_compiler_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LlamaCppError, match="needs a compiler: no cc in PATH"):
        install(tmp_path / "work")
    assert not (tmp_path / "work").exists()


# ---- the contestant's process ------------------------------------------------------------


class FakeLlama:
    """Generates 7, 8, 9, ... for ever."""

    ctx = "context"

    def __init__(self, path: str, **options: Any) -> None:
        fake = sys.modules["llama_cpp"]
        self.parameters = fake.llama_cpp.llama_model_default_params()
        self.path, self.options = path, options
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1

    def generate(self, prompt: list[int], **options: Any) -> Any:
        assert options == {
            "temp": 0.5,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repeat_penalty": 1.0,
        }
        return count(7)

    def detokenize(self, ids: list[int]) -> bytes:
        return " ".join(map(str, ids)).encode()


@pytest.fixture
def contestant(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script's module, with a llama_cpp that computes nothing."""
    fake = ModuleType("llama_cpp")
    vars(fake).update(
        Llama=FakeLlama,
        llama_cpp=SimpleNamespace(
            llama_model_default_params=lambda: SimpleNamespace(use_extra_bufts=True)
        ),
        llama_perf_context_reset=lambda context: None,
        llama_perf_context=lambda context: SimpleNamespace(t_eval_ms=1500.0, n_eval=2),
    )
    fake.llama_model_default_params = fake.llama_cpp.llama_model_default_params
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    name = "scripts.llamacpp.contestant"
    yield importlib.import_module(name)
    del sys.modules[name]  # it holds the fake


@pytest.mark.parametrize("repack", [True, False])
def test_contestant_maps_the_file_with_what_it_is_told(contestant: Any, repack: bool) -> None:
    arguments = {"gguf": "a.gguf", "context": 99, "threads": 3, "repack": repack}
    llama = contestant.load(arguments)
    assert llama.parameters.use_extra_bufts is repack
    assert llama.path == "a.gguf"
    wanted = {"n_ctx": 99, "n_threads": 3, "use_mmap": True, "use_mlock": False}
    assert wanted.items() <= llama.options.items()


def test_contestant_ends_at_the_number_of_tokens(contestant: Any) -> None:
    llama = FakeLlama("a.gguf")
    answer = contestant.answer(llama, [1, 2], 3, 0.5)
    assert llama.resets == 1
    assert answer["text"] == "7 8 9"
    assert len(answer["token_s"]) == 3
    assert answer["token_s"] == sorted(answer["token_s"])
    assert (answer["engine_decode_s"], answer["engine_decoded"]) == (1.5, 2)
    assert answer["prompt_tokens"] == 2
    assert answer["read_bytes"] >= 0
    json.dumps(answer)


# ---- the command line --------------------------------------------------------------------


def options(tmp_path: Path, *arguments: str) -> Namespace:
    """Options with a checkpoint that exists."""
    (tmp_path / "config.json").touch()
    return bench.build_parser().parse_args(["--model", str(tmp_path), *arguments])


def test_contests_have_the_shares_of_the_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    args = options(tmp_path)
    assert args.shares == [1.0, 0.55, 0.36]
    assert args.formats == ["bf16", "int4"]
    assert list(bench.problems_of(args)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shares", "0.5", "1.5"], "--shares 1.5: a share of the experts lies above 0"),
        (["--shares", "0"], "--shares 0: a share of the experts lies above 0 and up to 1"),
        (["--tokens", "1"], "--tokens 1: it must be at least 2"),
        (["--rounds", "0"], "--rounds 0: it must be at least 1"),
        (["--model", "/nowhere"], "--model /nowhere: no checkpoint; python -m scripts.upcycle"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    (problem,) = bench.problems_of(options(tmp_path, *arguments))
    assert problem.startswith(message)
    assert "\n" not in problem


def test_without_root_there_is_no_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert list(bench.problems_of(options(tmp_path))) == [
        "llama.cpp is limited by a memory cgroup, which needs root"
    ]


def test_turns_that_count_have_other_questions_than_the_one_that_warms_up() -> None:
    prompts = {text: [number] for number, text in enumerate(bench.QUESTIONS)}
    args = Namespace(requests=2, repeats=3)
    llamacpp = LlamaCpp(Path("python"), Path("source"), "0123456")
    warm, *counted = bench.Contest(args, llamacpp, prompts, cores=2).turns
    assert counted == [[[0], [1]], [[2], [3]], [[4], [5]]]
    assert warm == [[6], [7]]
