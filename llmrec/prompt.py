"""Prompt: a Jinja template that turns a history of items into token ids.

The template knows no tokenizer. An item's `semantic_id` renders to a placeholder in the Unicode private-use area;
after rendering, the placeholders become the item's token ids directly, and only the text between them meets a
tokenizer.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmrec.catalog import Catalog
from llmrec.exceptions import PromptError

if TYPE_CHECKING:
    from llmrec.vocabulary import PlainText

_OPEN, _CLOSE = "\ue000", "\ue001"
_PLACEHOLDER = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_PRIVATE = re.compile(f"[{_OPEN}{_CLOSE}]")


class Prompt:
    """A template over `history`, a list of items, oldest first.

    An item offers `semantic_id` and every column of the item table (`title`, `brand`, …). Undefined names are errors.
    The next item's semantic ID follows right behind the rendered prompt.

    >>> Prompt("{% for item in history %}{{ item.title }}; {% endfor %}").source[:6]
    '{% for'
    """

    def __init__(self, source: str) -> None:
        """Compiles `source`; raises PromptError if it is no valid template."""
        self.source = source
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise PromptError(f"The prompt template does not compile: {error}. Correct it.") from error

    @classmethod
    def read(cls, path: str | Path) -> "Prompt":
        """Reads a .jinja file; the newline at its end is not part of the prompt."""
        return cls(Path(path).read_text(encoding="utf-8").removesuffix("\n"))

    def render(self, catalog: Catalog, history: Sequence[int]) -> str:
        """The prompt as text with placeholders, for catalog rows `history`, oldest first."""
        items = [_item(catalog, row) for row in history]
        try:
            return self._template.render(history=items)
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise PromptError(
                f"The prompt template cannot be rendered: {error}. An item has the columns "
                f"{sorted(vars(items[0])) if items else ['semantic_id']}."
            ) from error

    def encode(self, catalog: Catalog, history: Sequence[int], text: "PlainText", start: int) -> list[int]:
        """Token ids of the prompt, opened by the token `start`."""
        if self.is_bare:  # the common case of from-scratch models, where rendering would cost more than the model
            return [start, *catalog.item_tokens[list(history)].reshape(-1).tolist()] if len(history) else [start]
        rendered = self.render(catalog, history)
        ids = [start]
        end = 0
        for match in _PLACEHOLDER.finditer(rendered):
            ids += text.encode(rendered[end : match.start()]) if match.start() > end else []
            ids += catalog.item_tokens[int(match.group(1))].tolist()
            end = match.end()
        return ids + (text.encode(rendered[end:]) if end < len(rendered) else [])

    @cached_property
    def is_bare(self) -> bool:
        """Whether the prompt is nothing but the history's semantic IDs, so that histories extend one another."""
        items = [{"semantic_id": f"{_OPEN}{row}{_CLOSE}"} for row in (3, 1, 4)]
        try:
            return all(
                self._template.render(history=items[:n]) == "".join(item["semantic_id"] for item in items[:n])
                for n in range(4)
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError):
            return False  # it asks for columns


def _item(catalog: Catalog, row: int) -> SimpleNamespace:
    """One item as a template sees it: its columns are attributes, whatever their names (`items`, `values`, …)."""
    columns: dict[str, Any] = {name: _without_placeholders(value) for name, value in catalog.items[row].items()}
    columns |= {"title": _without_placeholders(catalog.title(row)), "semantic_id": f"{_OPEN}{row}{_CLOSE}"}
    return SimpleNamespace(**columns)


def _without_placeholders(value: Any) -> Any:
    """`value` without the placeholder's own characters, which only the catalog may write; also inside lists."""
    if isinstance(value, str):
        return _PRIVATE.sub("", value)
    if isinstance(value, list | tuple):
        return [_without_placeholders(entry) for entry in value]
    if isinstance(value, dict):
        return {_without_placeholders(name): _without_placeholders(entry) for name, entry in value.items()}
    return value
