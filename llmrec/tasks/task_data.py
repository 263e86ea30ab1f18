"""TaskData: everything that decides the rows of tasks, in one place."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmrec.catalog import Catalog
from llmrec.data.split import Part, Split
from llmrec.exceptions import DataError, PromptError
from llmrec.prompt import Event, Prompt
from llmrec.tasks.events import LoggedEvents
from llmrec.tasks.item_text import ItemText, cut_text
from llmrec.tasks.tables import Preferences, Queries
from llmrec.vocabulary import PlainText, start_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrec.tasks.templates import Templates


_REMEMBERED, _LONGEST_REMEMBERED = 100_000, 200  # texts, and characters of one: some 100 MB at most


@dataclass(frozen=True)
class TaskData:
    """What the tasks' rows are made of. Places are those of `split.rows`.

    Attributes:
        split: of the interactions; the tasks learn from its training part alone.
        catalog: with token ids, its items in the split's order.
        tokenizer: the one that spells the catalog.
        prompt: the template that the recommender is served with, which the task next_item asks by too.
        templates: by task and name.
        max_history: the most recent items that a prompt shows.
        max_text_tokens: the most tokens of an item's text where it is an answer or stands alone, of a query and of a
            preference.
        like_threshold: the least rating that is a "Yes".
        text_columns: the items' columns of text beside the title; default: all that read like text.
        description_column: the one among them that describes an item.
        queries: what was typed for items, or None: queries are made of the items' attributes.
        preferences: what users said that they like, or None.
    """

    split: Split
    catalog: Catalog = field(repr=False)
    tokenizer: "PreTrainedTokenizerBase" = field(repr=False)
    prompt: Prompt
    templates: "Templates" = field(repr=False)
    max_history: int = 20
    max_text_tokens: int = 64
    like_threshold: float = 4.0
    text_columns: tuple[str, ...] | None = None
    description_column: str = "description"
    queries: Queries | None = None
    preferences: Preferences | None = None

    def __post_init__(self) -> None:
        if self.max_history < 1:
            raise DataError(f"max_history is {self.max_history}. Show at least 1 item.")
        if self.split.item_ids != self.catalog.ids:
            raise DataError(
                f"The split has {self.split.num_items} items and the catalog {len(self.catalog)}, or they are in "
                "another order. Split the interactions over the catalog's own items."
            )

    @cached_property
    def text(self) -> PlainText:
        """What encodes text without control tokens."""
        return _RememberedText(self.tokenizer)

    @cached_property
    def start(self) -> int:
        """The token that opens a prompt."""
        return start_token(self.tokenizer)

    @cached_property
    def end(self) -> int:
        """The token that ends an answer of text; raises PromptError if the tokenizer has none."""
        if self.tokenizer.eos_token_id is None:
            raise PromptError(
                f"The tokenizer {type(self.tokenizer).__name__} has no end-of-sequence token, so an answer of text "
                "would have no end. Set its eos_token, or leave out the tasks that answer with text."
            )
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def item_text(self) -> ItemText:
        """The items' text columns."""
        return ItemText(self.catalog, self.text, self.max_text_tokens, self.text_columns, self.description_column)

    @cached_property
    def begins(self) -> npt.NDArray[np.int64]:
        """(M,) the place where every interaction's user begins."""
        return self.split.offsets[:-1][self.split.owner]

    @cached_property
    def logged(self) -> LoggedEvents:
        """The log's actions, domains and times."""
        return LoggedEvents(self.split)

    @property
    def event_columns(self) -> frozenset[str]:
        """Which of a history's `action`, `domain` and `gap` the log has."""
        return self.logged.columns

    def history(self, place: int) -> tuple[int, int]:
        """The places (begin, end) of what a prompt shows before the interaction at `place`."""
        return max(int(self.begins[place]), place - self.max_history), place

    def events(self, begin: int, end: int) -> list[Event]:
        """The events of these places; without what the log does not have."""
        return self.logged.between(begin, end)

    def preference(self, place: int) -> str | None:
        """What the user had said before the interaction at `place`, cut; None if nothing is known."""
        if self.preferences is None:
            return None
        if self.preferences.timed and not self.split.clock:
            raise DataError(
                "The preferences have times and the interactions have no clock, so what was known when cannot be "
                "told. Give interactions with timestamps, or preferences without."
            )
        times = self.logged.times
        user = self.split.all_users[self.split.owner[place]]
        said = self.preferences.known(user, None if times is None else times[place])
        if said is not None and said not in self._cut:
            self._cut[said] = cut_text(said, self.text, self.max_text_tokens)
        return None if said is None else self._cut[said] or None

    def case_events(self, part: Part, cases: Sequence[int] | None = None) -> list[list[Event]] | None:
        """Per case of a part (default: all) the events of its whole history; None if the log has none to offer."""
        return self.logged.of_cases(part, cases)

    def case_variables(self, part: Part, cases: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
        """Per case of a part (default: all) what the served prompt is given beside the history: a preference."""
        for place in self._places(part, cases):
            said = self.preference(place) if "preference" in self.prompt.variables else None
            yield {} if said is None else {"preference": said}

    def _places(self, part: Part, cases: Sequence[int] | None) -> list[int]:
        """The log's places of the targets of some cases."""
        places = self.split.positions[part]
        return [int(place) for place in (places if cases is None else places[np.asarray(cases, dtype=np.int64)])]

    @cached_property
    def _cut(self) -> dict[str, str]:
        """Preferences that were cut before."""
        return {}

    @cached_property
    def content_hash(self) -> str:
        """sha256 of all that decides a row, the code that makes it included, but for mixture and seed."""
        split, catalog = self.split, self.catalog
        digest = hashlib.sha256(b"llmrec tasks 1")
        for numbers in (split.timestamps, split.ratings):
            digest.update(b"none" if numbers is None else np.ascontiguousarray(numbers, dtype="<f8").tobytes())
        for level in catalog.require_tokens():
            digest.update(np.ascontiguousarray(level, dtype="<i8").tobytes())
        described = {
            "split": [split.content_hash, split.clock],
            "words": [None if column is None else column.to_list() for column in (split.actions, split.domains)],
            "catalog": [catalog.content_hash, *map(dict, catalog.items)],
            "tokenizer": _fingerprint(self.tokenizer),
            "templates": {
                task: {name: p.source for name, p in named.items()} for task, named in self.templates.items()
            },
            "prompt": self.prompt.source,
            "numbers": [self.max_history, self.max_text_tokens, self.like_threshold],
            "columns": [self.text_columns, self.description_column],
            "tables": [table and table.content_hash for table in (self.queries, self.preferences)],
            "code": _code(),
        }
        digest.update(json.dumps(described, sort_keys=True, default=str).encode())
        return digest.hexdigest()


class _RememberedText(PlainText):
    """The same, faster: what stands between the items of a prompt is of a few kinds, and titles come again."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        super().__init__(tokenizer)
        self._remembered: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        found = self._remembered.get(text)
        if found is None:
            found = tuple(super().encode(text))
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.clear()
            if len(text) <= _LONGEST_REMEMBERED:
                self._remembered[text] = found
        return list(found)


def _fingerprint(tokenizer: "PreTrainedTokenizerBase") -> Mapping[str, Any]:
    """What decides how a tokenizer spells."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "class": type(tokenizer).__name__,
        "rules": backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        "added": sorted((id, str(token)) for id, token in tokenizer.added_tokens_decoder.items()),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
    }


# Of this folder, what asks models and makes no rows: with another version of it, checkpoints are still the run's own.
_NO_ROWS = ("case_lists.py",)


def _code() -> str:
    """A hash of the modules that make rows, and of the versions of what they call."""
    import jinja2
    import tokenizers
    import transformers

    package = Path(__file__).parents[1]
    modules = [package / name for name in ("prompt.py", "examples.py", "vocabulary.py", "catalog.py")]
    of_tasks = [module for module in sorted((package / "tasks").glob("*.py")) if module.name not in _NO_ROWS]
    digest = hashlib.sha256()
    for module in [*modules, *of_tasks]:
        digest.update(module.read_bytes())
    return " ".join([digest.hexdigest(), jinja2.__version__, tokenizers.__version__, transformers.__version__])
