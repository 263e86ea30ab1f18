"""The wheel, installed in an environment elsewhere, holds the library, the command and the stages."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

STAGE_FOLDERS = ("prompts", "semantic_ids", "train", "serve")
SCRIPTS = ["semantic_ids/embed.py", "semantic_ids/build.py", "train/sft.py", "train/score.py", "serve/server.py"]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def stage_files(checkout: Path) -> list[str]:
    """The stages' files that belong to the project: tracked by git, or new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *STAGE_FOLDERS]
    listed = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("the checkout is not a git repository")
    return sorted(name for name in listed.stdout.splitlines() if (checkout / name).is_file())


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(out), str(checkout)], check=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment with the wheel; it shares this environment's dependencies."""
    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    # A path that comes from a .pth is not searched for further .pth files, so the editable llmrec stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--force-reinstall", "--ignore-installed", str(wheel)], check=True)
    return folder / "bin"


@pytest.fixture(scope="module")
def run(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program of the new environment from another folder, without this one's Python variables."""
    elsewhere = tmp_path_factory.mktemp("cwd")

    def call(program: str, *args: str) -> "subprocess.CompletedProcess[str]":
        variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        return subprocess.run(
            [str(installed / program), *args],
            cwd=elsewhere,
            env=variables | {"PYTHONSAFEPATH": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return call


def test_wheel_holds_every_stage_file_and_nothing_that_git_ignores(wheel: Path, stage_files: list[str]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    inside = {name.removeprefix("llmrec/") for name in names if name.startswith("llmrec/")}
    assert [name for name in stage_files if name not in inside] == []
    packed = {name for name in inside if name.split("/")[0] in STAGE_FOLDERS}
    assert packed == set(stage_files)
    assert [name for name in SCRIPTS if name not in inside] == []
    assert "py.typed" in inside
    # Nothing lands in site-packages beside the package and its metadata.
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"llmrec"}


def test_installed_package_is_the_wheel_s(run: Run, installed: Path) -> None:
    code = "import llmrec; from importlib.resources import files; print(llmrec.__file__, files('llmrec') / 'py.typed')"
    result = run("python", "-c", code)
    assert result.returncode == 0, result.stderr
    for path in result.stdout.split():
        assert Path(path).is_relative_to(installed.parent)
        assert Path(path).is_file()


def test_installed_stages_are_found_inside_the_package(run: Run, installed: Path, stage_files: list[str]) -> None:
    code = """
import json, sys
from llmrec.stages import stage_path
print(json.dumps([str(stage_path(name)) for name in sys.argv[1:]]))
"""
    names = sorted({*stage_files, *SCRIPTS})
    result = run("python", "-c", code, *names)
    assert result.returncode == 0, result.stderr
    for name, path in zip(names, json.loads(result.stdout), strict=True):
        assert Path(path).is_relative_to(installed.parent)
        assert path.endswith(f"/site-packages/llmrec/{name}")


def test_installed_command_answers(run: Run) -> None:
    shown = run("llmrec", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "quickstart" in shown.stdout
    doctor = run("llmrec", "doctor", "--json")
    report = json.loads(doctor.stdout)
    assert doctor.returncode == int(any(check["status"] == "broken" for check in report["checks"])), doctor.stderr
    (lock,) = [check for check in report["checks"] if check["name"] == "lock"]
    assert "no checkout" in lock["finding"]
    stages = run("llmrec", "stages", "--json")
    assert set(json.loads(stages.stdout)) >= set(SCRIPTS)


def test_installed_entry_points_are_the_wheel_s(run: Run, installed: Path) -> None:
    code = """
import json
from importlib.metadata import distribution
llmrec = distribution("llmrec")
print(json.dumps([str(llmrec.locate_file("")), *([e.group, e.name, e.value] for e in llmrec.entry_points)]))
"""
    result = run("python", "-c", code)
    where, *entries = json.loads(result.stdout)
    assert Path(where).is_relative_to(installed.parent)
    assert sorted(map(tuple, entries)) == [
        ("console_scripts", "llmrec", "llmrec.cli.main:main"),
        ("vllm.endpoint_plugins", "llmrec_http", "llmrec.engine.http:RecommendRoutes"),
        ("vllm.general_plugins", "llmrec", "llmrec.engine.plugin:register"),
    ]
