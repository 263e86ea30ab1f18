"""What lies in an artefact folder beside the model: settings, catalog, prompt; and how histories become token ids."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from llmrec.catalog import CATALOG_FOLDER, Catalog, Softmax
from llmrec.catalog_versions import CatalogVersions
from llmrec.exceptions import ArtefactError, RequestError
from llmrec.prompt import Event, Prompt
from llmrec.tasks.item_text import cut_text
from llmrec.vocabulary import PlainText, start_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrec.tasks.templates import Templates

SETTINGS_FILE, PROMPT_FILE, CONFIG_FILE = "llmrec.json", "prompt.jinja", "config.json"
# The model_type of an artefact without tokenizer and prompt; named here, so that it is known before torch is loaded.
SEQUENCE_MODEL = "llmrec_sequence"

# Tasks whose templates turn a history, and one of them whose turn a query, into an item.
HISTORY_TASKS, SEARCH_TASK = ("next_item", "preference"), "search"


@dataclass
class Settings:
    """How an artefact is used; `llmrec.json` in its folder.

    Attributes:
        max_history: the most recent items that the prompt shows; older ones only count as seen.
        num_beams: beams of a search, unless a request wants more items than that.
        max_text_tokens: the most tokens of a query or a preference, which is cut as it was in training.
        softmax: what the model's probabilities are normalised over: "vocabulary", or "semantic_ids", the catalog's own
            tokens alone, for a model whose loss saw no others and whose other logits therefore mean nothing.
        split: content hash of the split it was trained on, "" if unknown.
        protocol: how that split was made (`Split.protocol`), empty if unknown.
        training: what it was trained with (arguments, seed, versions), for the record.
    """

    max_history: int = 20
    num_beams: int = 50
    max_text_tokens: int = 64
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

    @property
    def seeds(self) -> dict[str, Any]:
        """`training`: the seed of its training, None if unknown; `further`: those of what came after it, if any."""
        named = [
            entry.get("settings", {}).get("trainer", {}).get("seed") for entry in self.training.get("further", [])
        ]
        first = self.training.get("trainer", {}).get("seed")
        return {"training": first} | ({"further": named} if named else {})

    @property
    def recipe(self) -> dict[str, Any]:
        """What of `training` says how it was trained, and nothing that came of it.

        Two models whose recipes are equal but for the seeds are one system, trained twice (`llmrec compare`).
        """
        kept = {
            name: value for name, value in self.training.items() if name not in ("evaluations", "cost", "versions")
        }
        if "further" in kept:
            described = ("method", "settings")
            kept["further"] = [{name: one[name] for name in described if name in one} for one in kept["further"]]
        return kept


class RequestEncoder(ABC):
    """Requests to what a model reads, as a list of whole numbers: its prompt.

    Attributes:
        catalog, settings: of the artefact.
        templates: the prompts of the tasks that the model was trained on, by task and name.
    """

    catalog: Catalog
    settings: Settings
    templates: "Templates"

    @abstractmethod
    def encode(
        self,
        rows: Sequence[int],
        events: Sequence[Event | Mapping[str, Any]] | None = None,
        prompt: Any = None,
        **variables: Any,
    ) -> list[int]:
        """The prompt for catalog rows, oldest first, with one event per row; `prompt` is what `prompt_with` gave."""

    @abstractmethod
    def prompt_with(self, variables: Collection[str]) -> Any:
        """The prompt that takes variables of these names; raises RequestError if there is none."""

    @abstractmethod
    def example(self) -> list[int]:
        """A prompt for trying the model out."""

    @abstractmethod
    def encode_query(self, query: str) -> list[int]:
        """The prompt of a search; raises RequestError if the model was not trained to search, or it is empty."""

    @abstractmethod
    def encode_text(self, text: str) -> list[int]:
        """The prompt in the caller's own words; raises RequestError if the model reads none, or there are none."""

    def known(
        self,
        history: Sequence[str],
        events: Sequence[Event | Mapping[str, Any]] | None = None,
        ignore_unknown: bool = False,
    ) -> tuple[list[int], list[Event | Mapping[str, Any]] | None]:
        """The rows of item ids, and their events; with `ignore_unknown` without those that the catalog does not hold.

        Raises:
            UnknownItemError: if an id is unknown and is not ignored.
            RequestError: if there are not as many events as ids.
        """
        rows = self.catalog.rows(history, ignore_unknown)
        if events is None:
            return rows, None
        if len(events) != len(history):
            raise RequestError(
                f"{len(history)} items came with {len(events)} events. Give one event per item of the history."
            )
        there = [self.catalog.rows([item], ignore_unknown=True) for item in history]
        return rows, [event for event, found in zip(events, there, strict=True) if found]


class PromptEncoder(RequestEncoder):
    """Requests to prompts of token ids; shared by transformers and the server, and alike to what training built."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        catalog: Catalog,
        prompt: Prompt,
        settings: Settings,
        templates: "Templates | None" = None,
    ) -> None:
        """`templates` are those of the tasks that the model was trained on, by task and name."""
        self.catalog = catalog
        self.settings = settings
        self.templates = templates or {}
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
            variables: whatever else the prompt uses (`Prompt.render`). Text is put on one line and cut to
                `max_text_tokens`, as the tasks do.
        """
        if events is not None:
            if len(events) != len(rows):
                raise RequestError(f"{len(rows)} items came with {len(events)} events. Give one event per item.")
            events = events[-self.settings.max_history :]
        recent = list(rows)[-self.settings.max_history :]
        given = {
            name: cut_text(value, self._text, self.settings.max_text_tokens) if isinstance(value, str) else value
            for name, value in variables.items()
        }
        return (prompt or self._prompt).encode(self.catalog, recent, self._text, self._start, events, **given)

    def example(self) -> list[int]:
        """A prompt of two items of which nothing more is known, with a word for whatever else the prompt uses."""
        nothing = Event("", "", math.nan)
        said: dict[str, Any] = dict.fromkeys(self._prompt.variables - {"history"}, "example")
        return self.encode([0, len(self.catalog) // 2], [nothing, nothing], **said)

    def prompt_with(self, variables: Collection[str]) -> Prompt:
        """The prompt that takes variables of these names: the artefact's own, or else the first of its templates.

        Raises:
            RequestError: if there is none.
        """
        own = [self.templates.get(task, {}) for task in HISTORY_TASKS]
        prompts = [self._prompt, *(named[name] for named in own for name in sorted(named))]
        for prompt in prompts:
            if prompt.variables.issuperset(variables):
                return prompt
        known = sorted(frozenset().union(*(prompt.variables for prompt in prompts)) - {"history"})
        raise RequestError(
            f"No prompt of the artefact has a place for {', '.join(sorted(variables))}; beside the history they take "
            f"{', '.join(known) or 'nothing'}. Leave it out, or train with a template that uses it."
        )

    def encode_query(self, query: str) -> list[int]:
        """Token ids of the artefact's own search prompt; of several templates, the first by name.

        Raises:
            RequestError: if the model was not trained to search, or the query is empty.
        """
        if not isinstance(query, str) or not query.strip():
            raise RequestError(f"The query is {query!r}. Give some words to search for.")
        templates = self.templates.get(SEARCH_TASK)
        if not templates:
            raise RequestError(
                f"The artefact has templates for {', '.join(sorted(self.templates)) or 'no task'}, and none to search "
                f"with. Train one with the task {SEARCH_TASK!r}."
            )
        return self.encode([], prompt=templates[min(templates)], query=query)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a prompt in the caller's own words: all of them plain text, none an item or a control token.

        Raises:
            RequestError: if the text is empty.
        """
        if not isinstance(text, str) or not text.strip():
            raise RequestError(f"The text is {text!r}. Give some words.")
        return [self._start, *self._text.encode(text)]


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


def is_sequence(folder: Path) -> bool:
    """Whether a folder holds a sequence model's artefact; False also for what is no artefact."""
    try:
        return bool(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["model_type"] == SEQUENCE_MODEL)
    except (OSError, ValueError, KeyError, TypeError):
        return False
