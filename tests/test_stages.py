import subprocess
import sys
from pathlib import Path

import pytest

import llmrec.stages
from llmrec.exceptions import StageError
from llmrec.stages import FOLDERS, stage_command, stage_files, stage_path, stages_root

SCRIPT = "train/sft.py"


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A made-up tree, as a checkout (`request.param` is true) or as an installed wheel; returns the stages' root."""
    package = tmp_path / "llmrec"
    package.mkdir()
    root = tmp_path if request.param else package
    if request.param:
        (tmp_path / "pyproject.toml").touch()
    else:
        # Another distribution's folder beside the package must not be taken for a stage.
        (tmp_path / "train").mkdir()
        (tmp_path / "train" / "sft.py").write_text("raise SystemExit('not llmrec')")
    for name in (
        "train/sft.py",
        "train/recipes/debug.yaml",
        "train/__pycache__/sft.pyc",
        "serve/.hidden",
        "other/x.py",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("import sys; print(*sys.argv[1:], sep='|')")
    monkeypatch.setattr(llmrec.stages, "__file__", str(package / "stages.py"))
    return root


@pytest.mark.parametrize("layout", [True, False], indirect=True, ids=["checkout", "wheel"])
def test_stage_files_are_found_in_a_checkout_and_in_a_wheel(layout: Path) -> None:
    assert stages_root() == layout
    assert stage_path(SCRIPT) == layout / "train" / "sft.py"
    assert stage_path("train/recipes/debug.yaml").is_file()
    assert stage_files() == ["train/recipes/debug.yaml", "train/sft.py"]


@pytest.mark.parametrize("layout", [True], indirect=True)
@pytest.mark.parametrize(
    "name", ["", "sft.py", "train", "train/rl.py", "train/../other/x.py", "other/x.py", "/etc/passwd"]
)
def test_unknown_stage_names_those_that_exist(layout: Path, name: str) -> None:
    with pytest.raises(StageError, match=r"no stage file .* Name one of: .*train/sft\.py"):
        stage_path(name)


@pytest.mark.parametrize("layout", [True], indirect=True)
def test_misspelt_recipe_is_answered_with_its_folder_s_files(layout: Path) -> None:
    with pytest.raises(StageError, match=r"Name one of: train/recipes/debug\.yaml, train/sft\.py\."):
        stage_path("train/recipes/debugg.yaml")


@pytest.mark.parametrize("layout", [False], indirect=True)
def test_installation_without_stages_says_so(layout: Path) -> None:
    for file in stage_files():
        (layout / file).unlink()
    with pytest.raises(StageError, match="none at all"):
        stage_path(SCRIPT)


@pytest.mark.parametrize("layout", [True], indirect=True)
def test_command_runs_the_script_with_its_arguments(layout: Path) -> None:
    command = stage_command(SCRIPT, ["--config", "a b.yaml"], launcher="python")
    assert command == [sys.executable, str(layout / SCRIPT), "--config", "a b.yaml"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "--config|a b.yaml\n"


@pytest.mark.parametrize("layout", [True], indirect=True)
def test_command_takes_accelerate_for_training(layout: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    assert stage_command(SCRIPT, ["--x"]) == [*launch, str(layout / SCRIPT), "--x"]
    options = ["--config_file", "ddp.yaml"]
    assert stage_command(SCRIPT, ["--x"], None, options) == [*launch, *options, str(layout / SCRIPT), "--x"]
    (layout / "semantic_ids").mkdir()
    (layout / "semantic_ids" / "build.py").touch()
    assert stage_command("semantic_ids/build.py")[1:] == [str(layout / "semantic_ids" / "build.py")]
    assert stage_command("semantic_ids/build.py", launcher="accelerate")[:3] == launch


@pytest.mark.parametrize("layout", [True], indirect=True)
def test_command_refuses_what_cannot_run(layout: Path) -> None:
    with pytest.raises(StageError, match="is no Python script"):
        stage_command("train/recipes/debug.yaml")
    with pytest.raises(StageError, match="no launcher options"):
        stage_command(SCRIPT, launcher="python", launcher_args=["--config_file", "x"])


@pytest.mark.parametrize(
    "name", ["semantic_ids/embed.py", "semantic_ids/build.py", "train/sft.py", "train/score.py", "serve/server.py"]
)
def test_this_installation_has_the_main_stages(name: str) -> None:
    assert stage_path(name).is_file()


def test_stage_folders_are_no_packages() -> None:
    assert [folder for folder in FOLDERS if list((stages_root() / folder).rglob("__init__.py"))] == []
