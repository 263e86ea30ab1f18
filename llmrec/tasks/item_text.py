"""What the tasks say of an item in words: its description, its attributes, and queries made of them."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmrec.catalog import Catalog
from llmrec.data.columns import ITEM, TITLE
from llmrec.exceptions import DataError

if TYPE_CHECKING:
    from llmrec.vocabulary import PlainText

_NO_TEXT = re.compile(r"(^|_)(ids?|asin|ean|upc|isbn|sku|urls?|links?|images?|img|thumbnail)(_|$)", re.IGNORECASE)
_LINK = re.compile(r"(https?://|www\.)\S+")
_LEAST_TOKENS = 8  # hold a space and any one character, byte by byte
_LONGEST_PIECE = 6  # words of an attribute that someone would type


class ItemText:
    """The text columns of a catalog's items, each value cut to a number of tokens.

    Attributes:
        columns: the text columns, the title first.
    """

    def __init__(
        self,
        catalog: Catalog,
        text: "PlainText",
        max_tokens: int,
        columns: Sequence[str] | None = None,
        description: str = "description",
    ) -> None:
        """Finds the text columns.

        Args:
            catalog: with the items.
            text: what counts tokens.
            max_tokens: the most tokens of one value, which is cut between words where it can be.
            columns: the columns beside the title; default: all whose values are mostly words, by name neither ids
                nor links.
            description: the column that describes an item; the others are attributes.

        Raises:
            DataError: if no item has one of `columns`, or `max_tokens` is below 8.
        """
        if max_tokens < _LEAST_TOKENS:
            raise DataError(
                f"max_text_tokens is {max_tokens}. Leave at least {_LEAST_TOKENS} tokens of an item's text."
            )
        self._catalog, self._text, self._max_tokens, self._description = catalog, text, max_tokens, description
        present = {name: None for item in catalog.items for name in item}
        if columns is None:
            columns = [name for name in present if _reads_like_text(name, catalog.items)]
        for name in columns:
            if name not in present:
                raise DataError(
                    f"The items have no column {name!r}; their columns are {', '.join(present)}. "
                    "Choose text columns among these."
                )
        self.columns = (TITLE, *(name for name in columns if name not in (TITLE, ITEM)))
        self._cut: dict[tuple[int, str], str] = {}

    def value(self, row: int, column: str) -> str:
        """An item's text in a column, cut; "" if it has none."""
        if (row, column) not in self._cut:
            full = self._catalog.title(row) if column == TITLE else _plain(self._catalog.items[row].get(column))
            self._cut[row, column] = cut_text(full, self._text, self._max_tokens)
        return self._cut[row, column]

    def description(self, row: int) -> str:
        """The item's description; "" if it has none."""
        return self.value(row, self._description) if self._description in self.columns else ""

    def attributes(self, row: int) -> str:
        """All other columns but the title, as "brand: Norvik; colour: red", cut as a whole; "" if it has none."""
        if (row, "") not in self._cut:
            found = [(name, _plain(self._catalog.items[row].get(name))) for name in self._attribute_columns()]
            joined = "; ".join(f"{label(name)}: {value}" for name, value in found if value)
            self._cut[row, ""] = cut_text(joined, self._text, self._max_tokens)
        return self._cut[row, ""]

    def query(self, row: int, number: int) -> str:
        """A query that someone who looks for such an item may type, made of its attributes; "" if it has none.

        Values are cut into pieces at commas, semicolons, bars and slashes; pieces of one to six words are kept, once
        each. One or two of them are drawn, of different columns where there are two, put behind one another in the
        order drawn, and written in lower case.

        Args:
            row: the item.
            number: what is drawn, any whole number from 0; it decides the query.
        """
        columns = []
        for name in self._attribute_columns():
            pieces = re.split(r"[,;|/]", _plain(self._catalog.items[row].get(name)).casefold())
            kept = dict.fromkeys(piece for part in pieces if _is_piece(piece := " ".join(part.split())))
            columns += [list(kept)] if kept else []
        if not columns:
            return ""
        number, wanted = divmod(number, 2)
        drawn: list[str] = []
        while columns and len(drawn) <= wanted:
            number, place = divmod(number, len(columns))
            pieces = columns.pop(place)
            number, place = divmod(number, len(pieces))
            if pieces[place] not in drawn:
                drawn.append(pieces[place])
        return cut_text(" ".join(drawn), self._text, self._max_tokens)

    def _attribute_columns(self) -> list[str]:
        return [name for name in self.columns if name not in (TITLE, self._description)]


def label(column: str) -> str:
    """A column's name as a sentence has it.

    >>> label("product_class:token_seq")
    'product class'
    """
    return column.split(":")[0].replace("_", " ")


def cut_text(value: str, text: "PlainText", max_tokens: int) -> str:
    """The longest beginning of `value` of at most `max_tokens` tokens behind a space, cut between words if it can be.

    White space is made single spaces. Only where the first word alone is longer, a word is cut.
    """
    words = value.split()
    whole = " ".join(words)
    # Every token holds a byte at least.
    if len(whole.encode("utf-8", "surrogatepass")) < max_tokens or _fits(whole, text, max_tokens):
        return whole
    kept = _longest(len(words), lambda count: _fits(" ".join(words[:count]), text, max_tokens))
    if kept:
        return " ".join(words[:kept])
    return words[0][: _longest(len(words[0]), lambda count: _fits(words[0][:count], text, max_tokens))]


def _fits(value: str, text: "PlainText", max_tokens: int) -> bool:
    return len(text.encode(f" {value}")) <= max_tokens


def _longest(count: int, fits: Any) -> int:
    """The largest number of at most `count` that `fits`, which 0 is taken to do, and which ends where it first fails.

    Tokenizers may spell a longer text with fewer tokens, so what bisection finds is tried, and never too long.
    """
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _plain(value: Any) -> str:
    """A cell as one line of text; "" for what has no letter or digit, and for what is no text."""
    if isinstance(value, list | tuple):
        value = ", ".join(part for entry in value if (part := _plain(entry)))
    elif isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        value = str(value)
    if not isinstance(value, str) or not any(character.isalnum() for character in value):
        return ""
    return " ".join(value.split())


def _is_piece(piece: str) -> bool:
    return 0 < len(piece.split()) <= _LONGEST_PIECE and any(character.isalpha() for character in piece)


def _reads_like_text(name: str, items: Sequence[Mapping[str, Any]]) -> bool:
    """Whether most values of a column are words."""
    if name in (ITEM, TITLE) or _NO_TEXT.search(name.split(":")[0]):
        return False
    present = [value for item in items if (value := item.get(name)) is not None]
    texts = [_plain(value) for value in present if isinstance(value, str | list)]
    words = sum(any(map(str.isalpha, text)) and not _LINK.match(text) for text in texts)
    return words * 2 > len(present)
