"""patches/ and scripts/apply_patches.py on copies of vLLM's files, for every supported version.

The installed vLLM has the stock files of its own version. Those of the others come out of
their released wheel (some hundred MB), in `make test-all` only.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scripts import apply_patches
from scripts.apply_patches import BENCHMARKS, PATCHES, State

BYSTANDER = "plot"
INSTALLED = apply_patches.installed_version(apply_patches.find_site()).partition("+")[0]
VERSIONS = apply_patches.supported_versions()


@pytest.fixture(scope="session")
def stock_package(tmp_path_factory):
    """Path of a ``vllm/`` with the stock benchmarks of a version."""
    made = {}

    def package(version):
        if version not in made:
            directory = tmp_path_factory.mktemp(f"stock-{version}")
            if version == INSTALLED:
                copy_installed(directory)
            else:
                download(version, directory)
            made[version] = directory / "vllm"
        return made[version]

    return package


def copy_installed(directory):
    names = ["_version.py", *(f"benchmarks/{name}.py" for name in (*BENCHMARKS, BYSTANDER))]
    (directory / "vllm/benchmarks").mkdir(parents=True)
    for name in names:
        shutil.copy2(apply_patches.find_site() / "vllm" / name, directory / "vllm" / name)
    # Whoever runs the tests may have the patches applied.
    apply_patches.change(apply_patches.open_installation(directory), State.STOCK)


def download(version, directory):
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--only-binary=:all:", "--dest", str(directory), f"vllm=={version}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 and "Retrying (Retry(" in done.stderr:
        pytest.skip(f"needs the wheel of vLLM {version}, and no package index answers")
    assert done.returncode == 0, done.stderr
    (wheel,) = directory.glob("vllm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        wanted = [
            name
            for name in archive.namelist()
            if name == "vllm/_version.py" or re.fullmatch(r"vllm/benchmarks/\w+\.py", name)
        ]
        archive.extractall(directory, wanted)
    wheel.unlink()


@pytest.fixture(
    params=[
        pytest.param(version, marks=() if version == INSTALLED else pytest.mark.slow)
        for version in VERSIONS
    ]
)
def site(request, stock_package, tmp_path):
    """A directory of its own that contains a stock ``vllm/`` of the version."""
    shutil.copytree(stock_package(request.param), tmp_path / "vllm")
    return tmp_path


def version_of(site):
    return apply_patches.installed_version(site)


def run(command, site):
    return apply_patches.main([command, "--site", str(site)])


def content(site):
    """Every file below the site, by name."""
    return {
        str(path.relative_to(site)): path.read_bytes()
        for path in sorted(site.rglob("*"))
        if path.is_file()
    }


def target(site, name):
    return site / "vllm" / "benchmarks" / f"{name}.py"


# ---- the patches -----------------------------------------------------------------------


def test_every_version_has_its_patches_and_checksums():
    assert {"0.32.0", "0.33.0"} <= set(VERSIONS)
    relative = {f"vllm/benchmarks/{name}.py" for name in BENCHMARKS}
    for version in VERSIONS:
        stock = apply_patches.checksums(PATCHES / version / "stock.sha256")
        patched = apply_patches.checksums(PATCHES / version / "patched.sha256")
        assert set(stock) == set(patched) == relative
        assert not set(stock.values()) & set(patched.values())
        for name in BENCHMARKS:
            lines = (PATCHES / version / f"{name}.patch").read_text().splitlines()
            assert lines[0] == f"--- a/vllm/benchmarks/{name}.py"
            assert lines[1] == f"+++ b/vllm/benchmarks/{name}.py"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_all_versions_get_the_same_code_in_the_same_surroundings(name):
    """So what is tested on the installed vLLM holds for the others: line numbers differ."""

    def hunks(version):
        text = (PATCHES / version / f"{name}.patch").read_text()
        return re.sub(r"^@@ .* @@", "@@", text, flags=re.MULTILINE)

    assert len({hunks(version) for version in VERSIONS}) == 1


def test_applied_files_are_python_and_the_rest_is_untouched(site):
    before = content(site)
    modes = {name: target(site, name).stat().st_mode for name in BENCHMARKS}
    assert run("apply", site) == 0
    after = content(site)
    assert set(after) == set(before)  # nothing left behind either
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {f"vllm/benchmarks/{name}.py" for name in BENCHMARKS}
    for name in BENCHMARKS:
        compile(target(site, name).read_text(), name, "exec")
        assert "moe_offload_stats" in target(site, name).read_text()
        assert target(site, name).stat().st_mode == modes[name]


# ---- apply, check, revert --------------------------------------------------------------


def test_apply_check_revert(site, capsys):
    before = content(site)
    assert run("check", site) == 1
    assert capsys.readouterr().out.count(": not applied\n") == len(BENCHMARKS) + 1
    assert run("apply", site) == 0
    assert run("check", site) == 0
    assert f"vLLM {version_of(site)}: applied" in capsys.readouterr().out
    assert run("revert", site) == 0
    assert run("check", site) == 1
    assert content(site) == before


def test_what_is_done_already_is_not_done_again(site, capsys):
    assert run("revert", site) == 0
    assert "not applied: nothing to do" in capsys.readouterr().out
    assert run("apply", site) == 0
    inodes = [target(site, name).stat().st_ino for name in BENCHMARKS]
    capsys.readouterr()
    assert run("apply", site) == 0
    assert "already applied: nothing to do" in capsys.readouterr().out
    assert [target(site, name).stat().st_ino for name in BENCHMARKS] == inodes


def test_a_build_of_the_same_version_is_accepted(site):
    version = site / "vllm" / "_version.py"
    version.write_text(f"__version__ = version = '{version_of(site)}+cpu'\n")
    assert run("apply", site) == 0
    assert run("check", site) == 0


@pytest.mark.parametrize("version", ["0.31.1", "0.32.1", "0.33.0rc1", "0.34.0", "0.33"])
@pytest.mark.parametrize("command", ["apply", "check", "revert"])
def test_another_version_is_refused_by_name(site, capsys, command, version):
    (site / "vllm" / "_version.py").write_text(f"__version__ = version = '{version}'\n")
    before = content(site)
    assert run(command, site) == 2
    message = capsys.readouterr().err
    assert f"vLLM {version} is installed in {site}" in message
    assert f"patches are for {' and '.join(VERSIONS)} only" in message
    assert content(site) == before


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("command", ["apply", "revert"])
def test_a_modified_file_is_refused_by_name(site, capsys, command, name):
    if command == "revert":
        assert run("apply", site) == 0
    with target(site, name).open("a") as file:
        file.write("# mine\n")
    before = content(site)
    assert run(command, site) == 2
    assert f"{target(site, name)} is modified" in capsys.readouterr().err
    assert run("check", site) == 2
    assert f"{name}.py: modified: neither stock nor patched" in capsys.readouterr().out
    assert content(site) == before


def test_a_missing_file_is_refused_by_name(site, capsys):
    target(site, "latency").unlink()
    before = content(site)
    assert run("apply", site) == 2
    assert f"{target(site, 'latency')} is missing" in capsys.readouterr().err
    assert run("check", site) == 2
    assert content(site) == before


def test_a_patch_that_makes_another_file_is_refused(
    site, tmp_path_factory, monkeypatch, capsys
):
    patches = tmp_path_factory.mktemp("tampered") / "patches"
    shutil.copytree(PATCHES, patches)
    patch = patches / version_of(site) / "throughput.patch"
    patch.write_text(patch.read_text().replace("+    print_moe_offload_stats(", "+    print("))
    monkeypatch.setattr(apply_patches, "PATCHES", patches)
    before = content(site)
    assert run("apply", site) == 2
    assert f"{patch} does not fit" in capsys.readouterr().err
    assert content(site) == before


# ---- all or none -----------------------------------------------------------------------


@pytest.fixture
def failing_rename(monkeypatch):
    """Makes the nth renaming into place fail."""
    rename = os.replace

    def install(fails_at, error):
        calls = []

        def replace(source, destination):
            calls.append(destination)
            if len(calls) == fails_at:
                raise error
            rename(source, destination)

        monkeypatch.setattr(os, "replace", replace)
        return calls

    return install


@pytest.mark.parametrize("fails_at", [1, 2, 3])
@pytest.mark.parametrize("command", ["apply", "revert"])
def test_after_a_failure_half_way_nothing_is_changed(
    site, failing_rename, capsys, command, fails_at
):
    if command == "revert":
        assert run("apply", site) == 0
    before = content(site)
    calls = failing_rename(fails_at, OSError(28, "No space left on device"))
    assert run(command, site) == 2
    assert len(calls) == fails_at + fails_at - 1  # those before it were put back
    assert "No space left on device" in capsys.readouterr().err
    assert content(site) == before


def test_an_interrupt_half_way_changes_nothing(site, failing_rename):
    before = content(site)
    failing_rename(2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run("apply", site)
    assert content(site) == before


@pytest.mark.parametrize("command", ["apply", "revert"])
def test_what_a_killed_run_left_is_named_and_finished(site, capsys, command):
    stock = content(site)
    assert run("apply", site) == 0
    patched = content(site)
    latency = "vllm/benchmarks/latency.py"
    (site / latency).write_bytes(stock[latency])
    capsys.readouterr()
    assert run("check", site) == 2
    output = capsys.readouterr().out
    assert "serve.py: applied" in output
    assert "latency.py: not applied" in output
    assert "partly applied" in output
    assert run(command, site) == 0
    assert content(site) == (patched if command == "apply" else stock)


def test_what_others_import_is_patched_first_and_reverted_last(site, failing_rename):
    calls = failing_rename(0, None)  # never
    assert run("apply", site) == 0
    assert run("revert", site) == 0
    assert [path.stem for path in calls] == [*BENCHMARKS, *reversed(BENCHMARKS)]


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_links_into_a_package_cache_are_not_written_through(site, tmp_path_factory, link):
    linked = tmp_path_factory.mktemp("linked")
    shutil.copytree(site / "vllm", linked / "vllm", copy_function=link)
    before = content(site)
    assert run("apply", linked) == 0
    assert run("check", linked) == 0
    assert content(site) == before


def test_without_the_patch_program_nothing_is_changed(site, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    before = content(site)
    assert run("apply", site) == 2
    assert "the program 'patch' is needed" in capsys.readouterr().err
    assert content(site) == before


# ---- finding vLLM ----------------------------------------------------------------------


def test_a_directory_without_vllm_is_refused(tmp_path, capsys):
    assert run("apply", tmp_path) == 2
    assert f"no vLLM in {tmp_path}" in capsys.readouterr().err


def test_the_installed_vllm_is_found_without_importing_it():
    code = (
        "import sys; from scripts.apply_patches import find_site;"
        "print(find_site()); print('vllm' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    path, modules = done.stdout.splitlines()
    assert (Path(path) / "vllm" / "benchmarks" / "serve.py").is_file()
    assert modules == "False False"
