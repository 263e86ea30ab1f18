"""`llmrec stages`: the stages' files and where they lie."""

import json

from rich.console import Console

from llmrec.stages import ACCELERATED, stage_files, stage_path, stages_root


def show_stages(name: str | None = None, as_json: bool = False) -> None:
    """Prints the path of the stage file `name`, or all stage files.

    Raises:
        StageError: there is no such file.
    """
    console = Console(highlight=False, soft_wrap=True)
    if name is not None:
        path = str(stage_path(name))
        console.print_json(json.dumps({name: path})) if as_json else console.print(path, markup=False)
        return
    files = stage_files()
    if as_json:
        console.print_json(json.dumps({file: str(stage_path(file)) for file in files}))
        return
    scripts = [file for file in files if file.endswith(".py")]
    console.print(f"The stages lie under {stages_root()}", markup=False)
    for script in scripts:
        how = "accelerate launch" if script in ACCELERATED else "python"
        console.print(f"  {script:<28} llmrec run {script}  ({how})", markup=False)
    others = [file for file in files if file not in scripts]
    if others:
        console.print("Recipes, templates and deployment files:")
        for file in others:
            console.print(f"  {file}", markup=False)
