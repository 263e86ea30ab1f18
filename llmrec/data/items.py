"""Items: what can be recommended, and the text that describes it."""

import html
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import polars as pl

from llmrec.data.columns import ITEM, TITLE, ColumnNames
from llmrec.data.interactions import Interactions
from llmrec.data.source import Source
from llmrec.data.table import open_table
from llmrec.data.values import Fault, check_ids, refuse
from llmrec.exceptions import DataError
from llmrec.storage import atomic_path

logger = logging.getLogger(__name__)

MAX_TEXT = 2000
_MAX_TITLE = 120
_NUMBER = r"^[-+$€£¥]*\s*[\d.,]+(?:[eE][-+]?\d+)?\s*[%$€£¥]?$"
_ID_NAME = re.compile(r"(^|_)(id|ids|asin|ean|upc|isbn|sku)$", re.IGNORECASE)
_VECTOR = r"^\[[-+\d.eE,\s]*\]$"
_LINKS = r"^(?:https?://|www\.)\S+(?:,\s?(?:https?://|www\.)\S+)*$"
_PRODUCTS = r"\bB0[0-9A-Z]{8}\b"
_URL_NAME = re.compile(r"(^|_)(url|urls|link|links|image|images|img|thumbnail)($|_)", re.IGNORECASE)


class Items:
    """The table of items; the place of an item in it is the item's *row*, by which everything else refers to it.

    Text is cleaned on reading: HTML entities are unescaped, runs of white space become one space, and lists of strings
    become one string, joined by a comma. An object, such as Amazon's details, becomes "key: value, key: value".
    Columns of numbers, and of lists or arrays of numbers (embeddings), are passed through; columns of bytes are left
    out.

    Attributes:
        frame: item_id and title (strings, never null), then the file's other columns; one row per item, in file order.
        missing_titles: items that came without a title; theirs is the first text they have, else their id.
        appended: items that `with_missing` added.
        text_columns: the columns that the user chose for `texts`, or None.
        dropped: rows that `invalid="drop"` left out, by reason: "item_id" (no id), "repeated" (an id once more).
    """

    def __init__(
        self,
        frame: pl.DataFrame,
        missing_titles: int = 0,
        appended: int = 0,
        text_columns: tuple[str, ...] | None = None,
        dropped: Mapping[str, int] | None = None,
    ) -> None:
        """Wraps a frame that is canonical already; `read` and `from_frame` make it so."""
        self.frame = frame
        self.missing_titles = missing_titles
        self.appended = appended
        self.text_columns = text_columns
        self.dropped: dict[str, int] = dict(dropped or {})
        self.ids: list[str] = frame[ITEM].to_list()
        self.titles: list[str] = frame[TITLE].to_list()

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def read(
        cls,
        path: str | Path,
        columns: ColumnNames = ColumnNames(),  # noqa: B008 (frozen)
        invalid: Literal["error", "drop"] = "error",
    ) -> Self:
        """Reads any source that `llmrec.data.table.open_table` knows; ids become strings.

        Args:
            path: a file, a folder of files of one format, or `hub:user/name`.
            columns: what the source calls its columns.
            invalid: whether rows whose id is null, empty, a fraction, or was there before are an error, or left out
                (of equal ids all but the first), counted and warned of.

        Raises:
            DataError: if the source cannot be read, a column is not there, or a row is invalid (unless dropped).
            DependencyError: if the source is on the Hub and `datasets` is not installed.
        """
        frame, source = open_table(path).read()
        return cls._made(frame, columns, source, invalid)

    @classmethod
    def from_frame(
        cls,
        frame: pl.DataFrame,
        columns: ColumnNames = ColumnNames(),  # noqa: B008 (frozen)
        source: str = "the items",
        invalid: Literal["error", "drop"] = "error",
    ) -> Self:
        """Takes over a frame; `source` is its name in messages. Arguments and errors are those of `read`."""
        return cls._made(frame, columns, Source(source), invalid)

    @classmethod
    def _made(
        cls, frame: pl.DataFrame, columns: ColumnNames, source: Source, invalid: Literal["error", "drop"]
    ) -> Self:
        if frame.height == 0:
            raise DataError(f"{source} has no rows. Give at least one item.")
        # In a log, "id" would rather number the rows.
        item = columns.find(ITEM, frame.columns, source.name, required=True, also=("id",))
        title = columns.find(TITLE, frame.columns, source.name)
        ids, faults = check_ids(frame[item], item, source)
        if invalid == "error":
            refuse(faults, source)
            _refuse_duplicates(ids, source)
        kept, dropped = _kept(ids, faults, source)
        frame, ids = frame.filter(kept), ids.filter(kept)
        for name in columns.text or ():
            if name not in frame.columns:
                raise DataError(
                    f"{source} has no column {name!r}; its columns are {', '.join(map(repr, frame.columns))}. "
                    "Say which ones hold text with --text-columns."
                )
        # A column that bears a canonical name without playing its part would be in the way.
        others = [name for name in frame.columns if name not in (item, title, ITEM, TITLE)]
        if binary := [name for name in others if _holds_bytes(frame[name].dtype)]:
            logger.warning("%s: columns of bytes are left out: %s", source, ", ".join(binary))
            others = [name for name in others if name not in binary]
        cleaned = {name: _clean(frame[name]) for name in others}
        titles: list[str | None] = clean_titles(frame[title], source) if title else [None] * frame.height
        missing = [row for row, value in enumerate(titles) if not value]
        # A table of ids alone is meant to be one; there is no text to name.
        if missing and (title is not None or others):
            row = int(kept.arg_true()[missing[0]])
            logger.warning(
                "%d item(s) have no title, such as %s (item %r); their first other text, or else their id, stands in: "
                "%s, or clean with --empty-titles drop",
                *(len(missing), source.at(row, len(kept)), ids[missing[0]]),
                "fill them in" if title else "there is no title column, name it with --title-column",
            )
        canonical = pl.DataFrame({ITEM: ids, **cleaned})
        candidates = [cleaned[name].to_list() for name in others if _reads_like_text(cleaned[name])]
        for row in missing:
            texts = (column[row] for column in candidates if _has_words(column[row]))
            titles[row] = _shorten(next(texts, ids[row]), _MAX_TITLE)
        canonical.insert_column(1, pl.Series(TITLE, titles, dtype=pl.String))
        text_columns = None if columns.text is None else tuple(TITLE if c == title else c for c in columns.text)
        return cls(canonical, len(missing), text_columns=text_columns, dropped=dropped)

    @classmethod
    def from_interactions(cls, interactions: Interactions) -> Self:
        """A table of ids alone, for a user without an item file; in order of first appearance."""
        ids = interactions.frame[ITEM].unique(maintain_order=True)
        return cls(pl.DataFrame({ITEM: ids, TITLE: ids}), missing_titles=len(ids))

    def with_missing(self, interactions: Interactions) -> "Items":
        """These items and, after them, those that occur in the interactions alone, with their id for a title."""
        used = interactions.frame[ITEM].unique(maintain_order=True).cast(pl.String)
        known = set(self.ids)
        new = [item for item in used.to_list() if item not in known]
        if not new:
            return self
        unknown = interactions.frame[ITEM].cast(pl.String).is_in(pl.Series(new, dtype=pl.String).implode())
        first, where = interactions.first_read(unknown)
        logger.warning(
            "%d item(s) of the interactions are not in the item table, such as %r%s; they are kept with their id as "
            "title: add them to the table, or clean with --unknown-items drop",
            *(len(new), str(interactions.frame[ITEM][first]), f" ({where})" if where else ""),
        )
        added = pl.DataFrame({ITEM: new, TITLE: new}, schema={ITEM: pl.String, TITLE: pl.String})
        frame = pl.concat([self.frame, added], how="diagonal")
        return Items(frame, self.missing_titles + len(new), self.appended + len(new), self.text_columns, self.dropped)

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
            values = self.frame[name].fill_nan(None) if self.frame[name].dtype.is_float() else self.frame[name]
            parts.append((name.split(":")[0].replace("_", " "), values.to_list()))
        texts = []
        for row, title in enumerate(self.titles):
            text = _sentence(title)
            for label, cells in parts:
                value = "" if cells[row] is None else str(cells[row])
                if _has_words(value) and _sentence(value).casefold() != _sentence(title).casefold():
                    text += f" {label}: {_sentence(value)}"
            texts.append(_shorten(text, MAX_TEXT))
        return texts

    def write(self, path: str | Path) -> None:
        """Writes parquet with the canonical columns, whole or not at all; `read` gives the same items."""
        with atomic_path(path) as temporary:
            self.frame.write_parquet(temporary)


def _refuse_duplicates(ids: pl.Series, source: Source) -> None:
    repeated = ids.is_duplicated()
    if not repeated.any():
        return
    first = ids.filter(repeated)[0]
    rows = [row + 1 for row in (ids == first).arg_true().to_list()]
    raise DataError(
        f"{source}: item {first!r} stands in rows {', '.join(map(str, rows[:5]))}"
        f"{', …' if len(rows) > 5 else ''} ({ids.filter(repeated).n_unique()} item(s) repeat). Keep one row per "
        "item, or drop the later ones with --invalid-rows drop."
    )


def _kept(ids: pl.Series, faults: Sequence[Fault], source: Source) -> tuple[pl.Series, dict[str, int]]:
    """Which rows have an id, and it for the first time; and how many were left out, which is also said."""
    bad = pl.repeat(False, len(ids), eager=True, dtype=pl.Boolean)
    dropped: dict[str, int] = {}
    for fault in faults:
        logger.warning("left out: %s", fault.found(source))
        bad |= fault.rows
    if bad.any():
        dropped[ITEM] = int(bad.sum())
    repeated = ~ids.is_first_distinct() & ~bad
    if repeated.any():
        row = int(repeated.arg_max() or 0)
        logger.warning(
            "left out: %d row(s) repeat an item, such as %s (%r)",
            *(repeated.sum(), source.at(row, len(ids)), ids[row]),
        )
        dropped["repeated"] = int(repeated.sum())
    if (bad | repeated).all():
        raise DataError(f"All {len(ids)} rows of {source} are invalid. Check that the item column is the right one.")
    return ~(bad | repeated), dropped


def _holds_bytes(kind: Any) -> bool:
    if isinstance(kind, pl.List | pl.Array):
        return _holds_bytes(kind.inner)
    if isinstance(kind, pl.Struct):
        return any(_holds_bytes(field.dtype) for field in kind.fields)
    return kind in (pl.Binary, pl.Object)


def _clean(values: pl.Series) -> pl.Series:
    """Strings, objects and lists of them as clean strings; columns of other types as they are."""
    inner: Any = values.dtype
    while isinstance(inner, pl.List | pl.Array):
        inner = inner.inner
    if inner not in (pl.String, pl.Categorical, pl.Enum) and not isinstance(inner, pl.Struct):
        return values
    if values.dtype == pl.String and len(present := values.drop_nulls()) and present.str.contains(_VECTOR).all():
        return _vectors(values)
    cleaned = [" ".join(_unescaped(_joined(value)).split()) or None for value in values.to_list()]
    return pl.Series(values.name, cleaned, dtype=pl.String)


def _vectors(values: pl.Series) -> pl.Series:
    """Text such as "[0.5, 1]", in which CSV holds an embedding, as lists of numbers; as it is if one is none."""
    inside = values.str.strip_chars("[] ").str.split(",").list.eval(pl.element().str.strip_chars())
    numbers = inside.list.eval(pl.element().filter(pl.element() != "")).cast(pl.List(pl.Float64), strict=False)
    return values if numbers.list.eval(pl.element().is_null()).list.any().any() else numbers


def clean_titles(values: pl.Series, source: Source) -> list[str | None]:
    """A title column, cleaned, as strings, None or empty where there is none; NaN is none.

    Raises:
        DataError: if it holds neither text nor numbers.
    """
    cleaned = values if isinstance(values.dtype, pl.Struct) else _clean(values)
    cleaned = cleaned.fill_nan(None) if cleaned.dtype.is_float() else cleaned
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
    if isinstance(value, dict):
        return ", ".join(
            f"{name}: {part}" for name, part in zip(value, map(_joined, value.values()), strict=True) if part
        )
    if isinstance(value, str) and value[:1] in ("{", "["):
        return _joined_json(value)
    return "" if value is None else str(value)


def _joined_json(text: str) -> str:
    """JSON as text that reads well, if it is an object or a list of more than numbers; else the text as it is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    plain = isinstance(value, list) and not any(isinstance(part, str | dict | list) for part in value)
    return text if plain and value else _joined(value)


def _reads_like_text(values: pl.Series) -> bool:
    """Whether a cleaned column holds words rather than ids, links or numbers; a few odd values do not decide."""
    if values.dtype != pl.String or _ID_NAME.search(values.name.split(":")[0]) or _URL_NAME.search(values.name):
        return False
    present = values.drop_nulls()
    if not len(present) or present.str.contains(_NUMBER).all():
        return False
    others = int((present.str.contains(_LINKS) | present.str.contains(_PRODUCTS)).sum())
    return others * 2 < len(present)


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
