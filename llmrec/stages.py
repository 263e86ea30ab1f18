"""Where the stages' scripts lie, and the commands that start them.

The stages (`prompts/ semantic_ids/ train/ serve/`) are files to edit and run, not modules to import: in a checkout
they lie beside the package, in an installed wheel inside it. This module knows their paths, not what they do.
"""

import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from llmrec.exceptions import StageError

FOLDERS = ("prompts", "semantic_ids", "train", "serve")
ACCELERATED = frozenset({"train/sft.py", "train/rl.py", "train/distill.py", "train/seqrec.py", "train/rank.py"})

Launcher = Literal["python", "accelerate"]


def stages_root() -> Path:
    """The folder that holds the four stage folders: the checkout's root, or the package's own folder in a wheel."""
    package = Path(__file__).resolve().parent
    # The project file tells a checkout from a site-packages folder in which another distribution put a `train/`.
    return package.parent if (package.parent / "pyproject.toml").is_file() else package


def stage_files() -> list[str]:
    """The names of all stage files (scripts, recipes, templates, deployment files), e.g. `train/sft.py`, sorted."""
    root = stages_root()
    files = (file for folder in FOLDERS for file in (root / folder).rglob("*") if file.is_file())
    names = (file.relative_to(root) for file in files)
    return sorted(n.as_posix() for n in names if "__pycache__" not in n.parts and not n.name.startswith("."))


def stage_path(name: str) -> Path:
    """The path of the stage file `name`, e.g. `train/sft.py` or `train/recipes/debug.yaml`.

    Raises:
        StageError: no stage has such a file; the message names those that it has.
    """
    path = stages_root() / name
    parts = PurePosixPath(name).parts
    if parts and parts[0] in FOLDERS and ".." not in parts and path.is_file():
        return path
    existing = stage_files()
    # A misspelt recipe is answered with that folder's files, a misspelt folder with the scripts.
    near = [file for file in existing if parts and file.startswith(parts[0] + "/")]
    shown = near or [file for file in existing if file.endswith(".py")]
    raise StageError(
        f"There is no stage file {name!r} under {stages_root()}. Name one of: {', '.join(shown)}."
        if shown
        else f"There is no stage file {name!r}, and none at all under {stages_root()}. "
        "Install llmrec again: its wheel holds the stages, and a checkout has them beside the package."
    )


def stage_command(
    name: str,
    args: Sequence[str] = (),
    launcher: Launcher | None = None,
    launcher_args: Sequence[str] = (),
) -> list[str]:
    """The argument vector that runs a stage's script with this Python.

    Args:
        name: A script, e.g. `train/sft.py`.
        args: The script's own arguments.
        launcher: `python`, or `accelerate` (one process per device); None takes accelerate for the scripts that
            train models, else python.
        launcher_args: Options of `accelerate launch` itself, e.g. `["--config_file", "train/accelerate/ddp.yaml"]`.

    Raises:
        StageError: there is no such script, or it is no Python script, or python was given launcher options.
    """
    script = stage_path(name)
    if script.suffix != ".py":
        raise StageError(
            f"{name!r} is no Python script. Run one of: {', '.join(f for f in stage_files() if f.endswith('.py'))}."
        )
    launcher = launcher or ("accelerate" if name in ACCELERATED else "python")
    if launcher == "accelerate":
        return [sys.executable, "-m", "accelerate.commands.launch", *launcher_args, str(script), *args]
    if launcher_args:
        raise StageError(
            f"python takes no launcher options, but was given {' '.join(launcher_args)!r}. "
            "Leave them out, or choose the accelerate launcher."
        )
    return [sys.executable, str(script), *args]
