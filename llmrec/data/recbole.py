"""RecBole's atomic files: tab-separated text whose header says every column's type."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl

from llmrec.data.delimited import open_delimited
from llmrec.data.source import Source, Table
from llmrec.exceptions import DataError

_TYPED = re.compile(r"^(?P<name>[^:]+):(?P<type>token|token_seq|float|float_seq)$")


def is_typed(header: str, separator: str) -> bool:
    """Whether every column of a header says its type, as in `user_id:token`."""
    return all(_TYPED.match(name.strip().strip('"')) for name in header.split(separator))


def open_atomic(path: Path, separator: str) -> Table:
    """An atomic file (.inter, .item, .user); the types leave the columns' names.

    `token` is text; so is `token_seq`, whose words a blank separates, because titles are stored so, too. `float` is a
    number if every value is one, `float_seq` a list of numbers.

    Raises:
        DataError: if it cannot be read, two columns have one name, or a `float_seq` holds what is no number.
    """
    raw = open_delimited(path, separator)
    typed = {}
    for column in raw.columns:
        match = _TYPED.match(column.strip())
        name = match["name"] if match else column
        if name in typed:
            raise DataError(f"{path} has the column {name!r} more than once. Rename or remove one of them.")
        typed[name] = (column, match["type"] if match else "token")

    def load(columns: Sequence[str] | None) -> tuple[pl.DataFrame, Source]:
        names = list(typed) if columns is None else list(columns)
        frame, source = raw.load([typed[name][0] for name in names])
        values = {name: _converted(frame[typed[name][0]], typed[name][1], name, source) for name in names}
        return pl.DataFrame(values), source

    return replace(raw, kind="RecBole", columns=list(typed), load=load)


def _converted(values: pl.Series, kind: str, name: str, source: Source) -> pl.Series:
    if kind == "float":
        # Whole numbers stay exact; what is no number stays text, for the one who needs it to name the row.
        for number in (pl.Int64, pl.Float64):
            numbers = values.cast(number, strict=False)
            if numbers.null_count() == values.null_count():
                return numbers
    if kind == "float_seq":
        lists = values.str.strip_chars().str.replace_all(r"\s+", " ").str.split(" ")
        lists = lists.list.eval(pl.element().filter(pl.element() != ""))
        numbers = lists.cast(pl.List(pl.Float64), strict=False)
        lost = numbers.list.eval(pl.element().is_null()).list.any().fill_null(False)
        if lost.any():
            row = int(lost.arg_max() or 0)
            raise DataError(
                f"{source.at(row, len(lost))}: {name} is {values[row]!r}, which is no sequence of numbers "
                f"({lost.sum()} such row(s)). Separate numbers by blanks, or declare the column as token_seq."
            )
        return numbers
    return values
