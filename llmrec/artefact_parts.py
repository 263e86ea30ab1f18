"""What lies in an artefact folder beside the model: settings, catalog, prompt; and how histories become token ids."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from llmrec.catalog import CATALOG_FOLDER, Catalog, Softmax
from llmrec.catalog_versions import CatalogVersions
from llmrec.exceptions import ArtefactError, RequestError
from llmrec.prompt import Event, Prompt
from llmrec.vocabulary import PlainText, start_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTINGS_FILE, PROMPT_FILE = "llmrec.json", "prompt.jinja"


@dataclass
class Settings:
    """How an artefact is used; `llmrec.json` in its folder.

    Attributes:
        max_history: the most recent items that the prompt shows; older ones only count as seen.
        num_beams: beams of a search, unless a request wants more items than that.
        softmax: what the model's probabilities are normalised over: "vocabulary", or "semantic_ids", the catalog's own
            tokens alone, for a model whose loss saw no others and whose other logits therefore mean nothing.
        split: content hash of the split it was trained on, "" if unknown.
        protocol: how that split was made (`Split.protocol`), empty if unknown.
        training: what it was trained with (arguments, seed, versions), for the record.
    """

    max_history: int = 20
    num_beams: int = 50
    softmax: Softmax = "vocabulary"
    split: str = ""
    protocol: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_history < 1 or self.num_beams < 1:
            raise RequestError(f"max_history is {self.max_history} and num_beams {self.num_beams}. Both count from 1.")
        if self.softmax not in get_args(Softmax):
            raise RequestError(
                f"softmax is {self.softmax!r}, and scores are over one of {', '.join(get_args(Softmax))}. "
                "Use what the model was trained with, or a newer llmrec."
            )


class PromptEncoder:
    """Histories of catalog rows to prompts of token ids; shared by transformers, the server and training."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", catalog: Catalog, prompt: Prompt, settings: Settings
    ) -> None:
        self.catalog = catalog
        self.settings = settings
        self._prompt = prompt
        self._text = PlainText(tokenizer)
        self._start = start_token(tokenizer)

    def encode(
        self,
        rows: Sequence[int],
        events: Sequence[Event | Mapping[str, Any]] | None = None,
        prompt: Prompt | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of the prompt for the last `max_history` of `rows`, oldest first.

        Args:
            rows: catalog rows.
            events: one per row.
            prompt: by default the artefact's own.
            variables: whatever else the prompt uses (`Prompt.render`).
        """
        if events is not None:
            if len(events) != len(rows):
                raise RequestError(f"{len(rows)} items came with {len(events)} events. Give one event per item.")
            events = events[-self.settings.max_history :]
        recent = list(rows)[-self.settings.max_history :]
        return (prompt or self._prompt).encode(self.catalog, recent, self._text, self._start, events, **variables)


def load_parts(
    folder: Path, tokenizer: "PreTrainedTokenizerBase", catalog_version: str | None = None
) -> tuple["PreTrainedTokenizerBase", Catalog, Prompt, Settings]:
    """Everything of an artefact but the model, with a version of the catalog, by default the current one.

    Raises:
        ArtefactError: if the tokenizer is not the catalog's.
        CatalogError: if there is no such version.
    """
    if not (folder / SETTINGS_FILE).is_file():
        raise ArtefactError(
            f"{folder} holds no {SETTINGS_FILE}: it is a model, but not an llmrec artefact. "
            "Train one with train/sft.py, or point to its artefact folder."
        )
    settings = read_settings(folder)
    catalog = CatalogVersions(folder / CATALOG_FOLDER).load(catalog_version)
    if catalog.spelling is not None:
        catalog.spelling.require(tokenizer)
        return tokenizer, catalog, Prompt.read(folder / PROMPT_FILE), settings
    for strings, ids in zip(catalog.token_strings(), catalog.require_tokens(), strict=True):
        if tokenizer.convert_tokens_to_ids(strings) != ids.tolist():
            raise ArtefactError(
                f"The tokenizer in {folder} spells {strings[0]!r} otherwise than its catalog. "
                "The files come from different artefacts: restore the folder."
            )
    return tokenizer, catalog, Prompt.read(folder / PROMPT_FILE), settings


def read_settings(folder: Path) -> Settings:
    """The settings in an artefact's folder; what an older llmrec did not know of has its default."""
    stored = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    return Settings(**{name: value for name, value in stored.items() if name in Settings.__dataclass_fields__})
