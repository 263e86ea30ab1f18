"""Prompt: a Jinja template that turns a history of items into token ids.

The template knows no tokenizer. An item's `semantic_id` renders to a placeholder in the Unicode private-use area;
after rendering, the placeholders become the item's token ids directly, and only the text between them meets a
tokenizer.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from jinja2 import StrictUndefined, TemplateError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmrec.catalog import Catalog
from llmrec.exceptions import PromptError

if TYPE_CHECKING:
    from llmrec.vocabulary import PlainText

# Variables whose values are catalog rows; a template sees items.
ITEM_VARIABLES, ITEM_LIST_VARIABLES = ("item", "candidate"), ("liked", "disliked")
EVENT_COLUMNS = ("action", "domain", "gap")

_OPEN, _CLOSE = "\ue000", "\ue001"
_PLACEHOLDER = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_PRIVATE = re.compile(f"[{_OPEN}{_CLOSE}]")
_RENDERING_ERRORS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError)
_MINUTE, _HOUR, _DAY, _WEEK, _MONTH, _YEAR = 60, 3600, 86_400, 7 * 86_400, 30.4375 * 86_400, 365.25 * 86_400
# The last probe is longer than a template would ever count up to.
_PROBED_LENGTHS = (0, 1, 2, 3, 64)


@dataclass(frozen=True)
class Event:
    """What is known of one place of a history, beside its item. None: the log does not have it, or not for this place.

    Attributes:
        action: what the user did there; "" if that is not known of this place alone.
        domain: the shop or category; likewise.
        timestamp: unix seconds; NaN if it is not known of this place alone.
    """

    action: str | None = None
    domain: str | None = None
    timestamp: float | None = None

    @classmethod
    def of(cls, value: "Event | Mapping[str, Any]") -> Self:
        """An event from a mapping with some of the attributes, as a request has it.

        Raises:
            PromptError: if it has other keys, or a timestamp that is no number or infinite.
        """
        if isinstance(value, cls):
            return value
        try:
            given = dict(value)  # type: ignore[arg-type]
            action, domain, timestamp = (given.pop(name, None) for name in ("action", "domain", "timestamp"))
            if given:
                raise ValueError(f"unknown: {', '.join(map(str, given))}")
            moment = None if timestamp is None else float(timestamp)
            if moment is not None and math.isinf(moment):
                raise ValueError(f"{timestamp} is no moment")
            return cls(None if action is None else str(action), None if domain is None else str(domain), moment)
        except (TypeError, ValueError) as error:
            raise PromptError(
                f"The event {str(value)[:80]!r} cannot be read ({error}). "
                "An event has an action, a domain and a timestamp in unix seconds, each optional."
            ) from error


class Prompt:
    """A template over `history`, a list of items, oldest first, and over whatever else a task offers.

    An item offers `semantic_id` and every column of the item table (`title`, `brand`, …); with events, an item of the
    history also offers `action`, `domain` and `gap`. Undefined names are errors. The answer, such as the next item's
    semantic ID, follows right behind the rendered prompt.

    >>> Prompt("{% for item in history %}{{ item.title }}; {% endfor %}").source[:6]
    '{% for'
    """

    def __init__(self, source: str) -> None:
        """Compiles `source`; raises PromptError if it is no valid template."""
        self.source = source
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)
        try:
            self._template = environment.from_string(source)
            self._syntax = environment.parse(source)
            self._globals = frozenset(environment.globals)
        except (TemplateError, RecursionError) as error:
            raise PromptError(f"The prompt template does not compile: {error}. Correct it.") from error

    @classmethod
    def read(cls, path: str | Path) -> "Prompt":
        """Reads a .jinja file; the newline at its end is not part of the prompt.

        Raises:
            PromptError: if there is no such file, it is not UTF-8, or no valid template.
        """
        try:
            source = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(f"The prompt template {path} cannot be read ({error}). Check the path.") from error
        return cls(source.removesuffix("\n"))

    def __reduce__(self) -> tuple[type["Prompt"], tuple[str]]:
        return type(self), (self.source,)  # a compiled template cannot be sent to another process

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template takes from outside, also those that it only asks whether they are defined.

        >>> sorted(Prompt("{{ preference }}{% for item in history %}{{ item.title }}{% endfor %}").variables)
        ['history', 'preference']
        """
        return frozenset(meta.find_undeclared_variables(self._syntax)) - self._globals

    @cached_property
    def attributes(self) -> frozenset[str]:
        """The names that it reads of items, such as `title` and `gap` (and of whatever else has attributes)."""
        found = {node.attr for node in self._syntax.find_all(nodes.Getattr)}
        for node in self._syntax.find_all(nodes.Getitem):
            if isinstance(node.arg, nodes.Const):
                found.add(str(node.arg.value))
        for keyword in self._syntax.find_all(nodes.Keyword):  # as of map(attribute="title")
            if keyword.key == "attribute" and isinstance(keyword.value, nodes.Const):
                found.update(str(keyword.value.value).split("."))
        return frozenset(found)

    def render(
        self,
        catalog: Catalog,
        history: Sequence[int],
        events: Sequence[Event | Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt as text with placeholders.

        Args:
            catalog: with the items.
            history: catalog rows, oldest first.
            events: one per item of the history, or None.
            variables: whatever else the template uses. `item` and `candidate` are a catalog row, `liked` and
                `disliked` lists of them; all else is passed as it is.

        Raises:
            PromptError: if the template uses what it is not given, there are not as many events as items, or it
                cannot be rendered.
        """
        offered = [{}] * len(history) if events is None else _offered(events, len(history))
        values = {name: _value(catalog, name, value) for name, value in variables.items()}
        values["history"] = [_Item(catalog, row, more) for row, more in zip(history, offered, strict=True)]
        try:
            return self._template.render(values)
        except _RENDERING_ERRORS as error:
            columns = {"title", "semantic_id", *(catalog.items[history[0]] if len(history) else ())}
            columns |= offered[0].keys() if offered else set()
            lacking = sorted(self.attributes & set(EVENT_COLUMNS) - columns) if len(history) else []
            raise PromptError(
                f"The prompt template cannot be rendered: {_reason(error)}. An item has the columns "
                f"{sorted(columns)}; beside the history there is {sorted(variables) or 'nothing'}."
                + (f" It shows {', '.join(lacking)} of the history: give events with it." if lacking else "")
            ) from error

    def encode(
        self,
        catalog: Catalog,
        history: Sequence[int],
        text: "PlainText",
        start: int,
        events: Sequence[Event | Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of the prompt, opened by the token `start`; arguments and errors are those of `render`."""
        if self.is_bare:  # the common case of from-scratch models, where rendering would cost more than the model
            return [start, *catalog.tokens_of_rows(list(history))]
        rendered = self.render(catalog, history, events, **variables)
        ids = [start]
        end = 0
        for match in _PLACEHOLDER.finditer(rendered):
            ids += text.encode(rendered[end : match.start()]) if match.start() > end else []
            ids += catalog.tokens_of(int(match.group(1)))
            end = match.end()
        return ids + (text.encode(rendered[end:]) if end < len(rendered) else [])

    def check(self, catalog: Catalog, events: Iterable[str] = (), **variables: Any) -> None:
        """Renders it once for every kind of item that the catalog has, so that what is missing shows before training.

        Items are of one kind if they have the same columns. Histories of none, one and two items are tried.

        Args:
            catalog: with the items; no token ids are needed.
            events: which of `EVENT_COLUMNS` the history will have.
            variables: an example of all else that the template will be given.

        Raises:
            PromptError: if the template uses anything else.
        """
        known = set(events)
        event = Event(
            "action" if "action" in known else None,
            "domain" if "domain" in known else None,
            0.0 if "gap" in known else None,
        )
        kinds = {frozenset(item): row for row, item in reversed(list(enumerate(catalog.items)))}
        for row in sorted(kinds.values()):
            given = {
                name: row if name in ITEM_VARIABLES else [row] if name in ITEM_LIST_VARIABLES else value
                for name, value in variables.items()
            }
            for length in (0, 1, 2):
                self.render(catalog, [row] * length, [event] * length, **given)

    @cached_property
    def is_bare(self) -> bool:
        """Whether the prompt is nothing but the history's semantic IDs, so that histories extend one another."""
        if self.variables != {"history"}:
            return False
        probes = [_Probe(f"{_OPEN}{row}{_CLOSE}") for row in range(_PROBED_LENGTHS[-1])]
        try:
            same = all(
                self._template.render(history=probes[:n]) == "".join(probe.semantic_id for probe in probes[:n])
                for n in _PROBED_LENGTHS
            )
        except _RENDERING_ERRORS:
            return False
        return same and not any(probe.asked for probe in probes)


def gap_in_words(seconds: float) -> str:
    """The time from one event to the next, as a prompt says it; "" if it is not known (NaN).

    >>> [gap_in_words(gap) for gap in (0, 30, 3 * 60, 5400, 3 * 86_400, 15 * 86_400, 4e6, 1e8)]
    ['at the same time', 'moments later', '3 minutes later', '1 hour later', '3 days later', '2 weeks later', \
'1 month later', '3 years later']
    """
    if seconds != seconds:
        return ""
    if seconds <= 0:
        return "at the same time" if seconds == 0 else "earlier"
    units = (
        *((_YEAR, "year"), (_MONTH, "month"), (2 * _WEEK, "week"), (_DAY, "day")),
        *((_HOUR, "hour"), (_MINUTE, "minute")),
    )
    for least, name in units:
        if seconds >= least:
            count = int(seconds // (_WEEK if name == "week" else least))
            return f"{count} {name}{'s' if count > 1 else ''} later"
    return "moments later"


class _Item:
    """One item as a template sees it: its columns are attributes, whatever their names (`items`, `values`, …)."""

    def __init__(self, catalog: Catalog, row: int, more: Mapping[str, Any]) -> None:
        self._catalog, self._row, self._more = catalog, row, more

    def __getattr__(self, name: str) -> Any:
        if name == "semantic_id":
            return f"{_OPEN}{self._row}{_CLOSE}"
        if name == "title":
            return _without_placeholders(self._catalog.title(self._row))
        for columns in (self._more, self._catalog.items[self._row]):
            if name in columns:
                return _without_placeholders(columns[name])
        raise AttributeError(name)

    def __str__(self) -> str:
        raise TypeError("an item is no text; write its title or its semantic_id")


class _Probe:
    """An item that notes whether anything but its semantic ID is asked for."""

    def __init__(self, semantic_id: str) -> None:
        self.semantic_id = semantic_id
        self.asked = False

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_"):
            self.asked = True
        raise AttributeError(name)


def _offered(events: Sequence[Event | Mapping[str, Any]], length: int) -> list[dict[str, str]]:
    """What every event of a history adds to its item."""
    if len(events) != length:
        raise PromptError(f"{length} items of a history came with {len(events)} events. Give one event per item.")
    known = [Event.of(event) for event in events]
    # What one event has and another lacks is not known of the other, as in a log with gaps in a column.
    has_action, has_domain, has_time = (
        any(getattr(event, name) is not None for event in known) for name in ("action", "domain", "timestamp")
    )
    found: list[dict[str, str]] = []
    before = math.nan
    for event in known:
        more: dict[str, str] = {}
        if has_action:
            more["action"] = event.action or ""
        if has_domain:
            more["domain"] = event.domain or ""
        if has_time:
            moment = math.nan if event.timestamp is None else event.timestamp
            more["gap"] = gap_in_words(moment - before)
            before = moment
        found.append(more)
    return found


def _value(catalog: Catalog, name: str, value: Any) -> Any:
    """A variable as a template sees it."""
    if name in ITEM_VARIABLES:
        return _Item(catalog, int(value), {})
    if name in ITEM_LIST_VARIABLES:
        return [_Item(catalog, int(row), {}) for row in value]
    return _without_placeholders(value)


def _reason(error: Exception) -> str:
    """What a template's error says, without the names of this module's classes."""
    return str(error).replace("'llmrec.prompt._Item object'", "an item").rstrip(".") or type(error).__name__


def _without_placeholders(value: Any) -> Any:
    """`value` without the placeholder's own characters, which only the catalog may write; also inside lists."""
    if isinstance(value, str):
        return _PRIVATE.sub("", value)
    if isinstance(value, list | tuple):
        return [_without_placeholders(entry) for entry in value]
    if isinstance(value, dict):
        return {_without_placeholders(name): _without_placeholders(entry) for name, entry in value.items()}
    return value
