"""Where rows come from: a table not yet read, and names for its rows, so that a message can point at one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import polars as pl

from llmrec.exceptions import DataError


@dataclass(frozen=True)
class Source:
    """The name of what was read and, if it was a folder, its files.

    Attributes:
        name: a path, a Hub id, or words such as "the interactions".
        parts: names and numbers of rows of the files that were joined, in order; empty for one file.
    """

    name: str
    parts: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return self.name

    @classmethod
    def joined(cls, name: str, parts: Sequence[tuple["Source", int]]) -> "Source":
        """The source of tables that were put one after another; each comes with its number of rows."""
        return cls(name, tuple((str(part), rows) for part, rows in parts))

    def at(self, row: int, rows: int) -> str:
        """Names a row, which is counted from 0 here and from 1, without the header, in the result.

        Args:
            row: its place among all rows.
            rows: how many there are.

        >>> Source("log.csv").at(2, 10)
        'log.csv, row 3 of 10'
        >>> Source("log", (("log/0.csv", 2), ("log/1.csv", 8))).at(2, 10)
        'log/1.csv, row 1 of 8'
        """
        name = self.name
        for part, height in self.parts:
            if row < height:
                name, rows = part, height
                break
            row -= height
        return f"{name}, row {row + 1} of {rows}"


@dataclass(frozen=True)
class Table:
    """A table whose columns are known and whose rows were not read yet.

    Attributes:
        name: a path or a Hub id.
        kind: its format; the files of a folder share one.
        columns: their names, without a format's own decoration.
        load: reads the columns named, or all for None, and says where their rows come from.
    """

    name: str
    kind: str
    columns: list[str]
    load: Callable[[Sequence[str] | None], tuple[pl.DataFrame, Source]]

    def read(self, columns: Sequence[str] | None = None) -> tuple[pl.DataFrame, Source]:
        """The columns named, or all of them, with all rows.

        Raises:
            DataError: if the file cannot be read (with the line), or has no rows.
        """
        frame, source = self.load(columns)
        if frame.width == 0 or frame.height == 0:
            raise DataError(f"{self.name} has no rows. Give a file with one row per interaction or item.")
        return frame, source
