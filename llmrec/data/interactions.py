"""Interactions: who took which item, in which order."""

from pathlib import Path
from typing import Self

import polars as pl

from llmrec.data.columns import ITEM, POSITION, TIMESTAMP, USER, ColumnNames
from llmrec.data.table import read_ids, read_numbers, read_table
from llmrec.exceptions import DataError
from llmrec.storage import atomic_path


class Interactions:
    """A log of interactions, sorted by user and, inside a user, by time.

    The order inside a user is by timestamp, ties by position, then by place in the file (every sort is stable). A user
    of whom some timestamps are missing is ordered by position, then by place in the file; one of whom some positions
    are missing, without them. A column without a single value counts as absent.

    Attributes:
        frame: columns user_id, item_id (strings) and, where there are any, timestamp (Int64 or Float64) and position
            (Int64 or Float64); users in order of first appearance in the file.
        rows_without_timestamp: rows whose timestamp is missing while others have one.
    """

    def __init__(self, frame: pl.DataFrame, rows_without_timestamp: int = 0) -> None:
        """Wraps a frame that is canonical and sorted already; `read` and `from_frame` make it so."""
        self.frame = frame
        self.rows_without_timestamp = rows_without_timestamp
        self._users: list[str] | None = None

    def __len__(self) -> int:
        return self.frame.height

    @property
    def user_ids(self) -> list[str]:
        """Users in order of first appearance in the file."""
        if self._users is None:
            self._users = self.frame[USER].unique(maintain_order=True).to_list()
        return self._users

    @classmethod
    def read(cls, path: str | Path, columns: ColumnNames = ColumnNames()) -> Self:  # noqa: B008 (frozen)
        """Reads parquet, CSV, TSV or JSON lines, compressed by gzip or zstd or not; ids become strings.

        Raises:
            DataError: if the file cannot be read, a column is not there, an id is null or empty, or a timestamp or
                position is no number; with file, row and value.
        """
        return cls.from_frame(read_table(path), columns, str(path))

    @classmethod
    def from_frame(
        cls,
        frame: pl.DataFrame,
        columns: ColumnNames = ColumnNames(),  # noqa: B008 (frozen)
        source: str = "the interactions",
    ) -> Self:
        """Takes over a frame in file order; `source` is its name in messages. Raises DataError as `read` does."""
        if frame.height == 0:
            raise DataError(f"{source} has no rows. Give at least one interaction.")
        user = columns.find(USER, frame.columns, source, required=True)
        item = columns.find(ITEM, frame.columns, source, required=True)
        canonical = pl.DataFrame(
            {USER: read_ids(frame, user, source), ITEM: read_ids(frame, item, source)}
        ).with_row_index("row")
        missing = 0
        keys = ["first_row"]
        for name in (TIMESTAMP, POSITION):
            column = columns.find(name, frame.columns, source)
            if column is None:
                continue
            numbers = read_numbers(frame, column, source)
            if numbers.null_count() == len(numbers):
                continue
            if name == TIMESTAMP:
                missing = numbers.null_count()
            canonical = canonical.with_columns(numbers.alias(name))
            key = pl.when(pl.col(name).is_not_null().all().over(USER)).then(pl.col(name))
            canonical = canonical.with_columns(key.alias(f"{name}_key"))
            keys.append(f"{name}_key")
        canonical = canonical.with_columns(pl.col("row").min().over(USER).alias("first_row"))
        canonical = canonical.sort([*keys, "row"], nulls_last=True, maintain_order=True)
        return cls(canonical.select(c for c in (USER, ITEM, TIMESTAMP, POSITION) if c in canonical.columns), missing)

    def histories(self) -> dict[str, list[str]]:
        """Every user's item ids, oldest first; users in order of first appearance."""
        grouped = self.frame.group_by(USER, maintain_order=True).agg(ITEM)
        return dict(zip(grouped[USER].to_list(), grouped[ITEM].to_list(), strict=True))

    def write(self, path: str | Path) -> None:
        """Writes parquet with the canonical columns, whole or not at all; `read` gives the same interactions."""
        with atomic_path(path) as temporary:
            self.frame.write_parquet(temporary)
