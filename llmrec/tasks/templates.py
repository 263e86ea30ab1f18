"""The templates of tasks: those shipped under `prompts/tasks/`, a user's own, and those that travel in an artefact."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmrec.exceptions import PromptError
from llmrec.prompt import Prompt
from llmrec.stages import stages_root

Templates = Mapping[str, Mapping[str, Prompt]]

_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")


def shipped_templates(tasks: Sequence[str] | None = None) -> dict[str, dict[str, Prompt]]:
    """The templates of `prompts/tasks/`, of these tasks or of all."""
    found = load_templates(stages_root() / "prompts" / "tasks")
    return found if tasks is None else {task: found[task] for task in tasks if task in found}


def load_templates(folder: str | Path) -> dict[str, dict[str, Prompt]]:
    """The templates of a folder, `<task>/<name>.jinja`, by task and name, both sorted; a folder without any gives {}.

    Raises:
        PromptError: if a template does not compile; the message names its file.
    """
    found: dict[str, dict[str, Prompt]] = {}
    for path in sorted(Path(folder).glob("*/*.jinja"), key=lambda path: (path.parent.name, path.stem)):
        try:
            found.setdefault(path.parent.name, {})[path.stem] = Prompt.read(path)
        except PromptError as error:
            raise PromptError(f"{path}: {error}") from error
    return found


def save_templates(templates: Templates, folder: str | Path) -> None:
    """Writes `<task>/<name>.jinja` files, which `load_templates` reads back alike.

    Raises:
        PromptError: if a task's or a template's name is not made of small letters, digits and underscores.
    """
    for task, named in templates.items():
        for name, prompt in named.items():
            if not _NAME.fullmatch(task) or not _NAME.fullmatch(name):
                raise PromptError(
                    f"The template {task}/{name} cannot be saved under that name. "
                    "Use small letters, digits and underscores."
                )
            path = Path(folder) / task / f"{name}.jinja"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(prompt.source + "\n", encoding="utf-8")
