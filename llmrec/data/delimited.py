"""Delimited text: CSV and TSV with a header, and files of known columns without one."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from llmrec.data.columns import NO_HEADER, are_values
from llmrec.data.lines import READING_ERRORS, raise_located
from llmrec.data.source import Source, Table
from llmrec.exceptions import DataError

_SEPARATORS = (",", "\t", ";", "|")


def separator_of(line: str, prefer_tab: bool = False) -> str:
    """The comma, tab, semicolon or bar that a header has, in this order of preference."""
    preferred = ("\t", *_SEPARATORS) if prefer_tab else _SEPARATORS
    return next((separator for separator in preferred if separator in line), preferred[0])


def open_delimited(path: Path, separator: str, names: Sequence[str] | None = None) -> Table:
    """A delimited file. All values are read as strings, so that the id 007 keeps its zeros.

    Args:
        path: plain, or compressed by gzip or zstd.
        separator: one character.
        names: the columns of a file without a header; None reads its header.

    Raises:
        DataError: if it cannot be read, or two columns have one name.
    """

    def scan() -> pl.LazyFrame:
        return pl.scan_csv(
            path,
            separator=separator,
            has_header=names is None,
            new_columns=None if names is None else list(names),
            infer_schema=False,
            glob=False,  # a path is a name here, not a pattern
        )

    def load(columns: Sequence[str] | None) -> tuple[pl.DataFrame, Source]:
        try:
            lazy = scan() if columns is None else scan().select(list(columns))
            return lazy.collect(engine="streaming"), Source(str(path))
        except READING_ERRORS as error:
            raise_located(path, error, separator=separator)

    try:
        columns = scan().collect_schema().names()
    except READING_ERRORS as error:
        raise_located(path, error, separator=separator)
    if any("\r" in name for name in columns):
        raise DataError(f"{path} has lines that end with a carriage return alone. Convert them with tr '\\r' '\\n'.")
    # What polars calls the second of two columns of one name.
    for name in columns:
        original, mark, number = name.rpartition("_duplicated_")
        if mark and number.isdigit() and original in columns:
            advice = f"{NO_HEADER}." if are_values(columns) else "Rename or remove one of them."
            raise DataError(f"{path} has the column {original!r} more than once. {advice}")
    return Table(str(path), "delimited", columns, load)
