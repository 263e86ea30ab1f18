"""LabelledRows: who was shown what, when, and what came of it; read from files of any known format."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.data.columns import ITEM, TIMESTAMP, USER, ColumnNames
from llmrec.data.source import Source
from llmrec.data.table import read_table
from llmrec.data.timestamps import TimestampUnit, check_times
from llmrec.exceptions import DataError
from llmrec.storage import sha256_of

Numbers = npt.NDArray[np.int64]

MISSING = -100  # a label that is not known, as losses of torch and transformers have it


@dataclass(frozen=True)
class RowColumns:
    """What files of labelled rows call their columns; names of llmrec and their usual aliases need not be given.

    Attributes:
        user, item, timestamp: as in `ColumnNames`.
        labels: of 0 and 1, one or several; empty values and nulls are labels that are not known.
        threshold: None, or from which value on a label is a 1 (of ratings, say).
        history: the column with the items that the user had taken before, or "" for none.
        flags: further columns of 0 and 1 by which results are told apart.
    """

    user: str = USER
    item: str = ITEM
    timestamp: str = TIMESTAMP
    labels: tuple[str, ...] = ("label",)
    threshold: float | None = None
    history: str = "his"
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelledRows:
    """I rows of one or several files, in file order.

    Attributes:
        user_ids: (U,) of all files, in alphabetical order; a user is known by the place here.
        item_ids: (N,) likewise, of rows and of the histories given with them.
        users: (I,).
        items: (I,).
        labels: (I, K) 0, 1 or `MISSING`.
        timestamps: (I,) unix seconds, `UNKNOWN_TIME` where unknown.
        part: (I,) the file that a row is from, counted from 0.
        label_names: K.
        given: None, or the histories that the files have: the items (E,), and where each row's begin, (I + 1,).
        flags: name -> (I,) bool.
        sources: name and sha256 of every file.
    """

    user_ids: tuple[str, ...] = field(repr=False)
    item_ids: tuple[str, ...] = field(repr=False)
    users: Numbers = field(repr=False)
    items: Numbers = field(repr=False)
    labels: Numbers = field(repr=False)
    timestamps: Numbers = field(repr=False)
    part: Numbers = field(repr=False)
    label_names: tuple[str, ...]
    given: tuple[Numbers, Numbers] | None = field(repr=False)
    flags: dict[str, npt.NDArray[np.bool_]] = field(repr=False)
    sources: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.users)

    @classmethod
    def read(
        cls, paths: Sequence[str | Path], columns: RowColumns | None = None, unit: TimestampUnit = "auto"
    ) -> "LabelledRows":
        """Reads files of the same columns: parquet, JSON lines, CSV or whatever `llmrec.data.table` knows.

        A history is a list of ids, or text: a JSON list, or ids between spaces.

        Args:
            paths: at least one; of several, the first is usually training.
            columns: their names.
            unit: of times.

        Raises:
            DataError: if a file cannot be read, a column is missing, an id is empty, a label is neither 0 nor 1, or a
                time is none.
        """
        names = columns or RowColumns()
        if not names.labels or len(set(names.labels)) != len(names.labels):
            raise DataError(f"The label columns are {list(names.labels)}. Name one or several, each once.")
        read = [_read_file(Path(path), names, unit) for path in paths]
        if not read:
            raise DataError("No file of labelled rows was given. Give at least one.")
        users, user_ids = _numbered([file["users"] for file in read])
        histories = None
        if all(file["histories"] is not None for file in read):
            histories = [file["histories"].explode(empty_as_null=False) for file in read]
        items, item_ids = _numbered([*(file["items"] for file in read), *(histories or ())])
        total = sum(len(file["users"]) for file in read)
        given = None
        if histories is not None:
            lengths = np.concatenate([file["histories"].list.len().to_numpy() for file in read]).astype(np.int64)
            given = items[total:], np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
        return cls(
            user_ids=user_ids,
            item_ids=item_ids,
            users=users,
            items=items[:total],
            labels=np.concatenate([file["labels"] for file in read]),
            timestamps=np.concatenate([file["timestamps"] for file in read]),
            part=np.repeat(np.arange(len(read), dtype=np.int64), [len(file["users"]) for file in read]),
            label_names=names.labels,
            given=given,
            flags={name: np.concatenate([file["flags"][name] for file in read]) for name in names.flags},
            sources=tuple((Path(path).name, sha256_of(path)) for path in paths),
        )

    def latest(self, share: float, chosen: Numbers) -> npt.NDArray[np.bool_]:
        """Which of the chosen rows (C,) are the latest ones: round(share · C) of them, by time, then by place.

        Raises:
            DataError: if a time is not known.
        """
        if (self.timestamps[chosen] == UNKNOWN_TIME).any():
            raise DataError(
                "Some rows have no time, so it is not known which are the latest. "
                "Give the parts as files of their own."
            )
        order = np.argsort(self.timestamps[chosen], kind="stable")
        late = np.zeros(len(chosen), dtype=np.bool_)
        late[order[len(chosen) - round(share * len(chosen)) :]] = True
        return late

    def with_latest_as(self, part: int, share: float) -> "LabelledRows":
        """The same rows, the latest share of which is another part; raises as `latest` does."""
        late = self.latest(share, np.arange(len(self)))
        return replace(self, part=np.where(late, part, self.part))


def _read_file(path: Path, names: RowColumns, unit: TimestampUnit) -> dict[str, Any]:
    """The columns of one file: ids as text, the rest as arrays."""
    frame = read_table(path)
    known = ColumnNames(user=names.user, item=names.item, timestamp=names.timestamp)
    available, source = frame.columns, str(path)
    found: dict[str, Any] = {
        "users": _ids(frame[known.find(USER, available, source, True)], source),
        "items": _ids(frame[known.find(ITEM, available, source, True)], source),
        "labels": np.stack([_labels(frame, name, names.threshold, source) for name in names.labels], axis=1),
        "flags": {name: _labels(frame, name, None, source) == 1 for name in names.flags},
        "timestamps": np.full(len(frame), UNKNOWN_TIME, dtype=np.int64),
        "histories": None,
    }
    if (column := known.find(TIMESTAMP, available, source)) is not None:
        times, faults = check_times(frame[column], column, Source(source), unit)
        if faults:
            raise DataError(
                f"{source} has rows whose {column!r} is no time. Write unix seconds or ISO 8601, or leave it empty."
            )
        seconds = times.order if times.unit == "order" else times.seconds
        found["timestamps"] = seconds.floor().cast(pl.Int64).fill_null(UNKNOWN_TIME).to_numpy()
    if names.history and names.history in available:
        found["histories"] = _histories(frame[names.history], source)
    elif names.history and names.history != RowColumns.history:
        raise DataError(
            f"{source} has no column {names.history!r}; its columns are {', '.join(map(repr, available))}. "
            "Name the column of histories, or none."
        )
    return found


def _ids(column: pl.Series, source: str) -> pl.Series:
    text = column.cast(pl.String).str.strip_chars()
    empty = int((text.is_null() | (text == "")).sum())
    if empty:
        raise DataError(f"{source} has {empty} row(s) without a {column.name!r}. Leave such rows out.")
    return text


def _labels(frame: pl.DataFrame, name: str, threshold: float | None, source: str) -> Numbers:
    """(I,) 0, 1 or `MISSING`."""
    if name not in frame.columns:
        raise DataError(
            f"{source} has no column {name!r}; its columns are {', '.join(map(repr, frame.columns))}. "
            "Say which column holds the label."
        )
    column = frame[name]
    if column.dtype == pl.String:
        column = column.str.strip_chars().replace("", None)
    try:
        numbers = column.cast(pl.Float64)
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{source}: the labels in {name!r} are no numbers. Write 0, 1 or nothing.") from error
    values = numbers.fill_null(np.nan).to_numpy()
    lacking = np.isnan(values)
    if threshold is not None:
        values = np.where(lacking, np.nan, values >= threshold)
    wrong = values[~lacking & (values != 0) & (values != 1)]
    if len(wrong):
        raise DataError(
            f"{source}: {len(wrong)} value(s) of {name!r} are neither 0 nor 1, such as {wrong[0]:g}. "
            "Give a threshold from which on a value is a 1."
        )
    return np.where(lacking, MISSING, np.where(lacking, 0, values)).astype(np.int64)


def _histories(column: pl.Series, source: str) -> pl.Series:
    """Lists of ids as text."""
    if column.dtype == pl.String:
        lists = pl.Series(column.name, [_ids_of(text, source) for text in column.to_list()], dtype=pl.List(pl.String))
    elif isinstance(column.dtype, pl.List | pl.Array) or column.dtype == pl.Null:
        lists = column.cast(pl.List(pl.String))
    else:
        raise DataError(
            f"{source}: the histories in {column.name!r} are {column.dtype}. Give lists of ids, or text with spaces."
        )
    lists = lists.fill_null([])
    if lists.list.eval(pl.element().is_null()).list.any().any():
        raise DataError(f"{source}: a history in {column.name!r} has an empty id. Leave such ids out.")
    return lists


def _ids_of(text: str | None, source: str) -> list[str]:
    if text is None or not text.strip():
        return []
    if not text.lstrip().startswith("["):
        return text.split()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{source}: the history {text[:60]!r} is no JSON list. Write [1, 2], or ids between spaces."
        ) from error
    if not all(isinstance(one, str | int) and not isinstance(one, bool) for one in found):
        raise DataError(f"{source}: the history {text[:60]!r} holds what is no id. Write numbers or text.")
    return [str(one) for one in found]


def _numbered(columns: Sequence[pl.Series]) -> tuple[Numbers, tuple[str, ...]]:
    """The columns one behind the other as places in the list of their different values, and that list."""
    values = pl.concat([column.rename("id") for column in columns])
    ids = values.unique().sort()
    places = values.to_frame().join(
        pl.DataFrame({"id": ids, "place": np.arange(len(ids), dtype=np.int64)}),
        on="id",
        how="left",
        maintain_order="left",
    )
    return places["place"].to_numpy(), tuple(ids.to_list())
