"""Start: the artefact that a training after SFT begins with, and the interactions that it was trained on."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from llmrec import artefact
from llmrec.artefact_parts import Settings, is_sequence, load_parts
from llmrec.catalog import CATALOG_FOLDER
from llmrec.catalog_versions import refuse_to_replace
from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.data.split import Split
from llmrec.exceptions import ArtefactError, RecipeError
from llmrec.tasks.task_data import TaskData
from llmrec.trained_split import learnt_part, refuse_grown, trained_split

if TYPE_CHECKING:
    from llmrec.recommender import Recommender


@dataclass(frozen=True)
class Start:
    """What training begins with; no weight of it is loaded.

    Attributes:
        name: its name in comparisons.
        folder: the verified artefact.
        held: catalog, tokenizer, prompt, and the interactions of the users that SFT learnt from.
        split: of all interactions: what the recommender is tested on.
        settings: how it is served, and how it was trained.
    """

    name: str
    folder: Path
    held: TaskData = field(repr=False)
    split: Split = field(repr=False)
    settings: Settings = field(repr=False)

    @property
    def weights_hash(self) -> str:
        """Of its weights and its tokenizer."""
        return artefact.weights_hash(self.folder)

    def recommender(self) -> "Recommender":
        """As it is served."""
        from llmrec.recommender import Recommender

        return Recommender.from_pretrained(self.folder)

    @classmethod
    def read(
        cls,
        name: str,
        path_or_repo_id: str,
        interactions: str,
        names: ColumnArguments,
        splits: SplitArguments,
        preferences: str | None = None,
    ) -> Self:
        """Reads everything but the weights.

        Args:
            name: in comparisons.
            path_or_repo_id: a folder, or a Hub id.
            interactions: the file that it was trained on.
            names: what the file calls its columns.
            splits: how they are split; left at the defaults, as the artefact says.
            preferences: a table of what users said, where the served prompt shows it.

        Raises:
            ArtefactError: if it is none, or not whole.
            RecipeError: if it is a sequence model, or its catalog has grown since its training.
            DataError: if the interactions are not those that it was trained on.
        """
        from transformers import AutoTokenizer

        from llmrec.tasks.tables import Preferences
        from llmrec.tasks.templates import load_templates

        folder = artefact.resolve(path_or_repo_id)
        if is_sequence(folder):
            raise RecipeError(
                f"{path_or_repo_id} holds a sequence model, which scores items and proposes none. Begin with an "
                "artefact of train/sft.py."
            )
        tokenizer, catalog, prompt, settings = load_parts(folder, AutoTokenizer.from_pretrained(folder))
        refuse_grown(catalog, path_or_repo_id)
        split = trained_split(names.read_interactions(interactions), catalog, settings, splits)
        held = TaskData(
            learnt_part(split, settings),  # who was no part of the first training is none of this one
            catalog,
            tokenizer,
            prompt,
            load_templates(folder / artefact.TEMPLATES_FOLDER),
            max_history=settings.max_history,
            max_text_tokens=settings.max_text_tokens,
            preferences=None if preferences is None else Preferences.read(preferences, names.names()),
        )
        return cls(name, folder, held, split, settings)


def check_place(folder: str | Path, system: str) -> None:
    """Raises ArtefactError or CatalogError if a result there would replace what is no earlier result of this name.

    Args:
        folder: for the artefact.
        system: its name; `metrics.json` beside the artefact is to be of it.
    """
    folder = Path(folder)
    refuse_to_replace(folder / CATALOG_FOLDER)
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not empty and not (folder / artefact.MANIFEST).is_file():
        raise ArtefactError(
            f"{folder} holds something else than an earlier run's result (it has no {artefact.MANIFEST}), and would "
            "be replaced. Give another --artefact, or move it away."
        )
    beside = folder.resolve().parent / "metrics.json"
    if not beside.is_file():
        return
    try:
        owner = json.loads(beside.read_text(encoding="utf-8"))["system"]
    except (OSError, ValueError, KeyError, TypeError):
        owner = "something else"
    if owner != system:
        raise ArtefactError(
            f"{beside} is of {owner}, and would be replaced by that of {system}. Give the artefact a folder of its "
            f"own, such as --artefact {folder.parent / system / folder.name}."
        )
