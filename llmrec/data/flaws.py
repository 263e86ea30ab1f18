"""Flaws of an item table as it came, which reading mends and the canonical table no longer shows."""

import html
from dataclasses import dataclass, field

import polars as pl

from llmrec.data.columns import ITEM, TITLE, ColumnNames
from llmrec.data.items import clean_titles
from llmrec.data.source import Source
from llmrec.data.values import check_ids

EXAMPLES = 3


@dataclass(frozen=True)
class Flaws:
    """What reading mended.

    Attributes:
        untitled: the ids of items whose title is empty, or all if the table has no titles; in file order.
        escaped_texts: cells of text with HTML entities.
        escaped_items: items with at least one such cell.
        examples: up to three such cells: item_id, column, text.
    """

    untitled: list[str] = field(default_factory=list)
    escaped_texts: int = 0
    escaped_items: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)


def find_flaws(
    frame: pl.DataFrame,
    columns: ColumnNames = ColumnNames(),  # noqa: B008 (frozen)
    source: str | Source = "the items",
) -> Flaws:
    """Looks a frame over that `Items.from_frame` takes; rows without an id of their own are passed over.

    Raises:
        DataError: if a column that was chosen, or that of ids, is not there, or that of titles holds no text.

    >>> find_flaws(pl.DataFrame({"item_id": [1, 2], "title": ["Salt &amp; Pepper", " "]})).untitled
    ['2']
    """
    source = source if isinstance(source, Source) else Source(source)
    item = columns.find(ITEM, frame.columns, source.name, required=True, also=("id",))
    title = columns.find(TITLE, frame.columns, source.name)
    ids, faults = check_ids(frame[item], item, source)
    kept = ids.is_first_distinct()
    for fault in faults:
        kept &= ~fault.rows
    # What bears a canonical name without playing its part is not read.
    names = [name for name in frame.columns if name == title or name not in (item, ITEM, TITLE)]
    frame, ids = frame.select(names).filter(kept), ids.filter(kept)
    # As the reader takes them, which finds no words in "[]".
    titles = [None] * len(frame) if title is None else clean_titles(frame[title], source)
    escaped = []
    for name in frame.columns:
        cells = _cells(frame[name])
        if cells is None:
            continue
        # Python is asked about the few cells alone that may hold an entity.
        odd = cells.filter(pl.col("text").str.contains("&", literal=True)).with_columns(
            pl.col("text").map_elements(html.unescape, return_dtype=pl.String).alias("plain")
        )
        odd = odd.filter(pl.col("text") != pl.col("plain")).unique("row", maintain_order=True)
        escaped.append(odd.select("row", "text", column=pl.lit(name)))
    cells_found = pl.concat(escaped) if escaped else pl.DataFrame({"row": [], "text": [], "column": []})
    return Flaws(
        untitled=[item for item, words in zip(ids.to_list(), titles, strict=True) if not words],
        escaped_texts=len(cells_found),
        escaped_items=cells_found["row"].n_unique(),
        examples=[
            {"item_id": ids[cell["row"]], "column": cell["column"], "text": cell["text"][:200]}
            for cell in cells_found.head(EXAMPLES).to_dicts()
        ],
    )


def _cells(values: pl.Series) -> pl.DataFrame | None:
    """The strings of a column as rows (row, text), those of a list or object one by one; None if there are none."""
    cells = pl.DataFrame({"row": pl.int_range(len(values), dtype=pl.Int64, eager=True), "text": values})
    while isinstance(cells["text"].dtype, pl.List | pl.Array):
        cells = cells.explode("text")
    if isinstance(cells["text"].dtype, pl.Struct):
        parts = []
        for part in cells["text"].struct.fields:
            found = _cells(cells["text"].struct.field(part))
            if found is not None:
                parts.append(found.with_columns(cells["row"].gather(found["row"])))
        return pl.concat(parts) if parts else None
    if cells["text"].dtype not in (pl.String, pl.Categorical, pl.Enum):
        return None
    return cells.drop_nulls().cast({"text": pl.String})
