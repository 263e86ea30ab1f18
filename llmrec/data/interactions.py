"""Interactions: who took which item, in which order."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import polars as pl

from llmrec.data.columns import (
    ACTION,
    DOMAIN,
    FLAGS,
    ITEM,
    POSITION,
    RATING,
    TIMESTAMP,
    USER,
    WEIGHT,
    ColumnNames,
)
from llmrec.data.source import Source
from llmrec.data.table import open_table
from llmrec.data.timestamps import TimestampUnit, check_times
from llmrec.data.values import Fault, check_ids, check_numbers, check_words, refuse
from llmrec.exceptions import DataError
from llmrec.storage import atomic_path

logger = logging.getLogger(__name__)

InvalidRows = Literal["error", "drop"]

_OPTIONAL = (TIMESTAMP, POSITION, RATING, ACTION, DOMAIN, WEIGHT)
_ORDER = "order"


@dataclass(frozen=True)
class Origin:
    """Where the rows of a sorted frame stood.

    Attributes:
        source: what was read.
        height: how many rows it has.
        rows: (M,) the row of the source, from 0, of every row of the frame; None if they are the same.
    """

    source: Source
    height: int
    rows: npt.NDArray[np.uint32] | None


class Interactions:
    """A log of interactions, sorted by user and, inside a user, by time.

    The order inside a user is by timestamp, ties by position, then by place in the file (every sort is stable). A user
    of whom some timestamps are missing is ordered by position, then by place in the file; one of whom some positions
    are missing, without them. A column without a single value counts as absent.

    Attributes:
        frame: columns user_id, item_id (strings) and, where there are any, timestamp (unix seconds; or an order's
            numbers), position, rating (Int64 or Float64), action, domain (strings), weight (Int64 or Float64); users
            in order of first appearance in the file.
        rows_without_timestamp: rows whose timestamp is missing while others have one.
        time_unit: what timestamps were taken for: "s", "ms", "us", "ns", "iso" or "order"; None if there are none, or
            it is not known.
        dropped: rows that `invalid="drop"` left out, by the column that was at fault (of several, the first).
    """

    def __init__(
        self,
        frame: pl.DataFrame,
        rows_without_timestamp: int = 0,
        time_unit: str | None = None,
        dropped: Mapping[str, int] | None = None,
        origin: "Origin | None" = None,
    ) -> None:
        """Wraps a frame that is canonical and sorted already; `read` and `from_frame` make it so."""
        self.frame = frame
        self.rows_without_timestamp = rows_without_timestamp
        self.time_unit = time_unit
        self.dropped: dict[str, int] = dict(dropped or {})
        self._origin = origin
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
    def read(
        cls,
        path: str | Path,
        columns: ColumnNames = ColumnNames(),  # noqa: B008 (frozen)
        timestamp_unit: TimestampUnit = "auto",
        invalid: InvalidRows = "error",
    ) -> Self:
        """Reads any source that `llmrec.data.table.open_table` knows, and of it the columns that are needed.

        Args:
            path: a file, a folder of files of one format, or `hub:user/name`.
            columns: what the source calls its columns.
            timestamp_unit: the times' unit; "auto" finds and logs it, "order" takes any numbers as they are.
            invalid: whether rows with an id that is null, empty or a fraction, a time that cannot be one
                (`llmrec.data.timestamps.check_times` says which) or a position, rating or weight that is no number
                are an error, or left out, counted and warned of.

        Raises:
            DataError: if the source cannot be read, a column is not there, or a row is invalid (unless dropped); with
                file, row and value.
            DependencyError: if the source is on the Hub and `datasets` is not installed.
        """
        table = open_table(path)
        frame, source = table.read(list(_found(columns, table.columns, table.name).values()))
        return cls._made(frame, columns, source, timestamp_unit, invalid)

    @classmethod
    def from_frame(
        cls,
        frame: pl.DataFrame,
        columns: ColumnNames = ColumnNames(),  # noqa: B008 (frozen)
        source: str = "the interactions",
        timestamp_unit: TimestampUnit = "auto",
        invalid: InvalidRows = "error",
    ) -> Self:
        """Takes over a frame in file order; `source` is its name in messages. All else is as for `read`.

        >>> log = pl.DataFrame({"user": ["a", "a", "b"], "item": ["x", "y", "x"], "ts": [20, 10, 5]})
        >>> Interactions.from_frame(log).histories()
        {'a': ['y', 'x'], 'b': ['x']}
        """
        return cls._made(frame, columns, Source(source), timestamp_unit, invalid)

    @classmethod
    def _made(
        cls, frame: pl.DataFrame, columns: ColumnNames, source: Source, unit: TimestampUnit, invalid: InvalidRows
    ) -> Self:
        if frame.height == 0:
            raise DataError(f"{source} has no rows. Give at least one interaction.")
        found = _found(columns, frame.columns, str(source))
        made, faults, time_unit = _canonical(frame, found, source, unit)
        frame, kept, dropped = _without_faults(made, faults, source, invalid)
        missing = frame[TIMESTAMP].null_count() if TIMESTAMP in frame.columns else 0
        empty = [name for name in _OPTIONAL if name in frame.columns and frame[name].null_count() == frame.height]
        if TIMESTAMP in empty:
            missing, time_unit = 0, None
            empty += [_ORDER]
        ordered, order = _ordered(frame.drop(empty))
        origin = Origin(source, len(made), _places(kept, order))
        return cls(ordered, missing, time_unit, dropped, origin)

    def histories(self) -> dict[str, list[str]]:
        """Every user's item ids, oldest first; users in order of first appearance. For data that fits into lists."""
        grouped = self.frame.group_by(USER, maintain_order=True).agg(ITEM)
        return dict(zip(grouped[USER].to_list(), grouped[ITEM].to_list(), strict=True))

    def first_read(self, rows: pl.Series) -> tuple[int, str | None]:
        """Of the rows that are True, at least one, that which stood first in the source: its place, and its name.

        The name, such as "log.csv, row 3 of 10", is None where the source is not known; the place is then the first.
        """
        places = rows.arg_true().to_numpy()
        if self._origin is None:
            return int(places[0]), None
        read = places if self._origin.rows is None else self._origin.rows[places]
        first = int(np.argmin(read))
        return int(places[first]), self._origin.source.at(int(read[first]), self._origin.height)

    def tie_groups(self) -> npt.NDArray[np.int64]:
        """(M,) the number of every row's tie group: consecutive rows of one user that have the same known time.

        Numbers grow from 0 with the rows. A row whose time is missing is alone; without timestamps, all are.
        """
        if TIMESTAMP not in self.frame.columns:
            return np.arange(len(self), dtype=np.int64)
        same = (pl.col(USER) == pl.col(USER).shift()) & (pl.col(TIMESTAMP) == pl.col(TIMESTAMP).shift())
        starts = self.frame.select((~same.fill_null(False)).alias("start"))["start"].to_numpy()
        return np.cumsum(starts, dtype=np.int64) - 1

    def shuffled_ties(self, seed: int) -> Self:
        """The same interactions in a random order inside every tie group (`tie_groups`); all else stays in place.

        What differs between a result on these and on the original came of an arbitrary order. Positions stay where
        they are, ascending, and so number the new order: writing and reading keeps it.

        Args:
            seed: equal seeds give equal orders.
        """
        groups = self.tie_groups()
        if len(groups) and groups[-1] + 1 == len(groups):
            logger.warning("no two interactions of a user have the same time, so there is nothing to shuffle")
        draws = np.random.default_rng(seed).random(len(groups))
        moving = [name for name in self.frame.columns if name != POSITION]
        shuffled = self.frame.select(moving)[np.lexsort((draws, groups))]
        return type(self)(
            self.frame.with_columns(shuffled.get_columns()), self.rows_without_timestamp, self.time_unit, self.dropped
        )

    def write(self, path: str | Path) -> None:
        """Writes parquet with the canonical columns, whole or not at all; `read` gives the same interactions."""
        with atomic_path(path) as temporary:
            self.frame.write_parquet(temporary)


def _found(columns: ColumnNames, available: Sequence[str], source: str) -> dict[str, str]:
    """The file's name of every canonical column that it has."""
    found = {
        USER: columns.find(USER, available, source, required=True),
        ITEM: columns.find(ITEM, available, source, required=True),
    }
    # What the user chose comes first, and nothing else is found in it.
    for name in sorted(_OPTIONAL, key=lambda name: not columns.is_chosen(name)):
        free = [column for column in available if columns.is_chosen(name) or column not in found.values()]
        column = columns.find(name, free, source)
        if column is not None:
            found[name] = column
    parts: dict[str, str] = {}
    for name, column in found.items():
        if column in parts:
            raise DataError(
                f"{source}: the column {column!r} is taken for {parts[column]} and for {name}. Name another one with "
                f"{FLAGS[parts[column]]} or {FLAGS[name]}."
            )
        parts[column] = name
    return {name: found[name] for name in (USER, ITEM, *_OPTIONAL) if name in found}


def _canonical(
    frame: pl.DataFrame, found: dict[str, str], source: Source, unit: TimestampUnit
) -> tuple[pl.DataFrame, list[tuple[str, Fault]], str | None]:
    """Canonical columns in file order, with the times' raw numbers; what is at fault with them; the times' unit."""
    made: dict[str, pl.Series] = {}
    faults: list[tuple[str, Fault]] = []
    time_unit = None
    for name, column in found.items():
        values = frame[column]
        wrong: list[Fault] = []
        if name in (USER, ITEM):
            made[name], wrong = check_ids(values, column, source)
        elif name == TIMESTAMP:
            times, wrong = check_times(values, column, source, unit)
            made[TIMESTAMP], made[_ORDER], time_unit = times.seconds, times.order, times.unit
        elif name in (ACTION, DOMAIN):
            made[name] = check_words(values, column, source)
        else:
            advice = f"Write numbers, or leave the value empty; an empty name of the {name} column passes it over."
            made[name], wrong = check_numbers(values, column, source, advice)
        faults += [(name, fault) for fault in wrong]
    return pl.DataFrame(made), faults, time_unit


def _without_faults(
    frame: pl.DataFrame, faults: list[tuple[str, Fault]], source: Source, invalid: InvalidRows
) -> tuple[pl.DataFrame, pl.Series | None, dict[str, int]]:
    """The rows without a fault; which rows these are, or None for all; how many went, by column."""
    if invalid == "error":
        refuse([fault for _, fault in faults], source)
    elif invalid != "drop":
        raise DataError(f"There is no way {invalid!r} to treat invalid rows. Give error or drop.")
    dropped: dict[str, int] = {}
    bad = pl.repeat(False, frame.height, eager=True, dtype=pl.Boolean)
    for name, fault in faults:
        logger.warning("left out: %s", fault.found(source))
        if new := int((fault.rows & ~bad).sum()):
            dropped[name] = dropped.get(name, 0) + new
        bad |= fault.rows
    if not faults:
        return frame, None, dropped
    frame = frame.filter(~bad)
    if frame.height == 0:
        raise DataError(
            f"All {len(bad)} rows of {source} are invalid. Look at the warnings; a column may be taken for another."
        )
    return frame, ~bad, dropped


def _places(kept: pl.Series | None, order: npt.NDArray[np.int64] | None) -> npt.NDArray[np.uint32] | None:
    """The source's row of every row that was kept and then sorted; None if nothing moved."""
    if kept is None:
        return None if order is None else order.astype(np.uint32)
    rows = kept.arg_true().to_numpy().astype(np.uint32)
    return rows if order is None else rows[order]


def _ordered(frame: pl.DataFrame) -> tuple[pl.DataFrame, npt.NDArray[np.int64] | None]:
    """Rows by user, time, position and place, as the class says, without the raw numbers of times.

    Also the place of each before, or None if none moved.
    """
    rows = frame.select(USER).with_row_index("row")
    keys = [rows.select(pl.col("row").min().over(USER))["row"].to_numpy()]
    for name in (_ORDER, POSITION):
        if name not in frame.columns:
            continue
        if frame[name].null_count():
            # A user of whom some are missing: all are alike, and the next key decides.
            whole = pl.col(name).is_not_null().all().over(USER)
            keys.append(frame.select(pl.when(whole).then(pl.col(name)).otherwise(0))[name].to_numpy())
        else:
            keys.append(frame[name].to_numpy())
    frame = frame.select(name for name in (USER, ITEM, *_OPTIONAL) if name in frame.columns)
    packed = _packed(keys)
    if packed is None:
        order = np.lexsort(keys[::-1])
    elif (packed[1:] >= packed[:-1]).all():
        return frame, None
    else:
        order = np.argsort(packed, kind="stable")
    ordered: pl.DataFrame = frame.rechunk()[order]
    return ordered, order


def _packed(keys: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.int64] | None:
    """One number a row that sorts as all keys do, the first foremost; None if 63 bits do not hold it."""
    packed = np.zeros(len(keys[0]), dtype=np.int64)
    numbers = 1
    for key in keys:
        if not np.issubdtype(key.dtype, np.integer):
            return None
        low, high = int(key.min()), int(key.max())
        numbers *= high - low + 1
        if numbers >= 2**63:
            return None
        packed *= high - low + 1
        packed += key
        packed -= low
    return packed
