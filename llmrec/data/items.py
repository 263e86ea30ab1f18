"""Items: what can be recommended, and the text that describes it."""

import html
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import polars as pl

from llmrec.data.columns import ITEM, TITLE, ColumnNames
from llmrec.data.interactions import Interactions
from llmrec.data.table import read_ids, read_table
from llmrec.exceptions import DataError
from llmrec.storage import atomic_path

logger = logging.getLogger(__name__)

MAX_TEXT = 2000
_MAX_TITLE = 120
_NUMBER = r"^[-+$€£¥]*\s*[\d.,]+(?:[eE][-+]?\d+)?\s*[%$€£¥]?$"
_ID_NAME = re.compile(r"(^|_)(id|ids|asin|ean|upc|isbn|sku)$", re.IGNORECASE)
_URL_NAME = re.compile(r"(^|_)(url|urls|link|links|image|images|img|thumbnail)($|_)", re.IGNORECASE)


class Items:
    """The table of items; the place of an item in it is the item's *row*, by which everything else refers to it.

    Text is cleaned on reading: HTML entities are unescaped, runs of white space become one space, and lists of strings
    become one string, joined by a comma.

    Attributes:
        frame: item_id and title (strings, never null), then the file's other columns; one row per item, in file order.
        missing_titles: items that came without a title; theirs is the first text they have, else their id.
        appended: items that `with_missing` added.
        text_columns: the columns that the user chose for `texts`, or None.
    """

    def __init__(
        self,
        frame: pl.DataFrame,
        missing_titles: int = 0,
        appended: int = 0,
        text_columns: tuple[str, ...] | None = None,
    ) -> None:
        """Wraps a frame that is canonical already; `read` and `from_frame` make it so."""
        self.frame = frame
        self.missing_titles = missing_titles
        self.appended = appended
        self.text_columns = text_columns
        self.ids: list[str] = frame[ITEM].to_list()
        self.titles: list[str] = frame[TITLE].to_list()

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def read(cls, path: str | Path, columns: ColumnNames = ColumnNames()) -> Self:  # noqa: B008 (frozen)
        """Reads parquet, CSV, TSV or JSON lines, compressed by gzip or zstd or not; ids become strings.

        Raises:
            DataError: if the file cannot be read, a column is not there, or an id is null, empty or there twice.
        """
        return cls.from_frame(read_table(path), columns, str(path))

    @classmethod
    def from_frame(
        cls,
        frame: pl.DataFrame,
        columns: ColumnNames = ColumnNames(),  # noqa: B008 (frozen)
        source: str = "the items",
    ) -> Self:
        """Takes over a frame; `source` is its name in messages. Raises DataError as `read` does."""
        if frame.height == 0:
            raise DataError(f"{source} has no rows. Give at least one item.")
        # In a log, "id" would rather number the rows.
        item = columns.find(ITEM, frame.columns, source, required=True, also=("id",))
        title = columns.find(TITLE, frame.columns, source)
        ids = read_ids(frame, item, source)
        _refuse_duplicates(ids, source)
        for name in columns.text or ():
            if name not in frame.columns:
                raise DataError(
                    f"{source} has no column {name!r}; its columns are {', '.join(map(repr, frame.columns))}. "
                    "Say which ones hold text with --text-columns."
                )
        # A column that bears a canonical name without playing its part would be in the way.
        others = [name for name in frame.columns if name not in (item, title, ITEM, TITLE)]
        if binary := [name for name in others if frame[name].dtype in (pl.Binary, pl.Object)]:
            logger.warning("%s: columns of bytes are left out: %s", source, ", ".join(binary))
            others = [name for name in others if name not in binary]
        cleaned = {name: _clean(frame[name]) for name in others}
        titles: list[str | None] = _titles(frame[title], source) if title else [None] * frame.height
        missing = [row for row, value in enumerate(titles) if not value]
        canonical = pl.DataFrame({ITEM: ids, **cleaned})
        candidates = [cleaned[name].to_list() for name in others if _reads_like_text(cleaned[name])]
        for row in missing:
            texts = (column[row] for column in candidates if _has_words(column[row]))
            titles[row] = _shorten(next(texts, ids[row]), _MAX_TITLE)
        canonical.insert_column(1, pl.Series(TITLE, titles, dtype=pl.String))
        text_columns = None if columns.text is None else tuple(TITLE if c == title else c for c in columns.text)
        return cls(canonical, len(missing), text_columns=text_columns)

    @classmethod
    def from_interactions(cls, interactions: Interactions) -> Self:
        """A table of ids alone, for a user without an item file; in order of first appearance."""
        ids = interactions.frame[ITEM].unique(maintain_order=True)
        return cls(pl.DataFrame({ITEM: ids, TITLE: ids}), missing_titles=len(ids))

    def with_missing(self, interactions: Interactions) -> "Items":
        """These items and, after them, those that occur in the interactions alone, with their id for a title."""
        used = interactions.frame[ITEM].unique(maintain_order=True)
        known = set(self.ids)
        new = [item for item in used.to_list() if item not in known]
        if not new:
            return self
        logger.warning("%d item(s) of the interactions are not in the item table, such as %r", len(new), new[0])
        added = pl.DataFrame({ITEM: new, TITLE: new}, schema={ITEM: pl.String, TITLE: pl.String})
        frame = pl.concat([self.frame, added], how="diagonal")
        return Items(frame, self.missing_titles + len(new), self.appended + len(new), self.text_columns)

    def texts(self, columns: Sequence[str] | None = None) -> list[str]:
        """One string per item, `title. column: value. …`, of at most `MAX_TEXT` characters, for an embedding.

        Args:
            columns: the columns to add to the title, in this order; by default those chosen on reading, else every
                column that reads like text, which leaves out ids, links and numbers such as prices. Values without a
                letter or digit, and those that only repeat the title, are left out.

        Raises:
            DataError: if a column is not there.

        >>> frame = pl.DataFrame({"item_id": ["a"], "title": ["Lens Cap"], "brand": ["Norvik"], "price": [4.5]})
        >>> Items.from_frame(frame).texts()
        ['Lens Cap. brand: Norvik.']
        """
        chosen = self.text_columns if columns is None else columns
        if chosen is None:
            names = [n for n in self.frame.columns if n not in (ITEM, TITLE) and _reads_like_text(self.frame[n])]
        else:
            names = [name for name in chosen if name != TITLE]
        parts: list[tuple[str, list[Any]]] = []
        for name in names:
            if name not in self.frame.columns:
                raise DataError(
                    f"The items have no column {name!r}; their columns are {', '.join(self.frame.columns)}. "
                    "Choose text columns among these."
                )
            parts.append((name.split(":")[0].replace("_", " "), self.frame[name].to_list()))
        texts = []
        for row, title in enumerate(self.titles):
            text = _sentence(title)
            for label, values in parts:
                value = "" if values[row] is None else str(values[row])
                if _has_words(value) and _sentence(value).casefold() != _sentence(title).casefold():
                    text += f" {label}: {_sentence(value)}"
            texts.append(_shorten(text, MAX_TEXT))
        return texts

    def write(self, path: str | Path) -> None:
        """Writes parquet with the canonical columns, whole or not at all; `read` gives the same items."""
        with atomic_path(path) as temporary:
            self.frame.write_parquet(temporary)


def _refuse_duplicates(ids: pl.Series, source: str) -> None:
    repeated = ids.is_duplicated()
    if not repeated.any():
        return
    first = ids.filter(repeated)[0]
    rows = [row + 1 for row in (ids == first).arg_true().to_list()]
    raise DataError(
        f"{source}: item {first!r} stands in rows {', '.join(map(str, rows[:5]))}"
        f"{', …' if len(rows) > 5 else ''} ({ids.filter(repeated).n_unique()} item(s) repeat). Keep one row per item."
    )


def _clean(values: pl.Series) -> pl.Series:
    """Strings and lists of strings as clean strings; columns of other types as they are."""
    inner = values.dtype
    while isinstance(inner, pl.List | pl.Array):
        inner = inner.inner  # type: ignore[assignment]
    if inner not in (pl.String, pl.Categorical, pl.Enum):
        return values
    cleaned = [" ".join(_unescaped(_joined(value)).split()) or None for value in values.to_list()]
    return pl.Series(values.name, cleaned, dtype=pl.String)


def _titles(values: pl.Series, source: str) -> list[str | None]:
    """A title column, cleaned, as strings; raises DataError for one that holds neither text nor numbers."""
    cleaned = _clean(values)
    if cleaned.dtype != pl.String and not cleaned.dtype.is_numeric() and cleaned.dtype != pl.Null:
        raise DataError(
            f"{source}: the title column {values.name!r} holds {values.dtype}, which is no text. "
            "Name another one with --title-column."
        )
    return cleaned.cast(pl.String).to_list()


def _unescaped(text: str) -> str:
    """`text` without HTML entities, however often they were escaped: cleaning what is clean changes nothing."""
    while (plain := html.unescape(text)) != text:
        text = plain
    return text


def _joined(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(part for part in map(_joined, value) if part)
    return "" if value is None else str(value)


def _reads_like_text(values: pl.Series) -> bool:
    """Whether a cleaned column holds words rather than ids, links or numbers; a few odd values do not decide."""
    if values.dtype != pl.String or _ID_NAME.search(values.name.split(":")[0]) or _URL_NAME.search(values.name):
        return False
    present = values.drop_nulls()
    if not len(present) or present.str.contains(_NUMBER).all():
        return False
    links = int(present.str.contains(r"^(?:https?://|www\.)\S+$").sum())
    return links * 2 < len(present)


def _has_words(value: str | None) -> bool:
    return value is not None and any(character.isalnum() for character in value)


def _sentence(value: str) -> str:
    return value.rstrip(" .") + "."


def _shorten(text: str, limit: int) -> str:
    """`text` cut to at most `limit` characters, between words where there is a space."""
    if len(text) <= limit:
        return text
    cut = text[: limit + 1]
    return (cut[: cut.rindex(" ")] if " " in cut else cut[:limit]).rstrip()
