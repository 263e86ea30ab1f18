"""`llmrec run`: one stage's script in place of this process."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llmrec.exceptions import StageError
from llmrec.stages import Launcher, stage_command


def run_stage(
    stage: str, args: Sequence[str], launcher: Launcher | None = None, launch_config: Path | None = None
) -> None:
    """Becomes the stage's process, so that its signals and its exit code are the caller's.

    Raises:
        StageError: there is no such script, or the launch config is missing or is not for this launcher.
    """
    if launch_config is not None and not launch_config.is_file():
        raise StageError(f"There is no launch config {launch_config}. Give a YAML file of `accelerate launch`.")
    options = [] if launch_config is None else ["--config_file", str(launch_config)]
    command = stage_command(stage, args, launcher, options)
    sys.stdout.flush()
    os.execv(command[0], command)
