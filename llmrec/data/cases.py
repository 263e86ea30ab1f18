"""A split as tables of ids: training as a log, validation and test as one row per case."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
from polars.io.plugins import register_io_source

from llmrec.data.columns import ACTION, DOMAIN, ITEM, TIMESTAMP, USER
from llmrec.data.split import Part, Split
from llmrec.storage import atomic_path, write_json

logger = logging.getLogger(__name__)

HISTORY = "history"
TARGET = "target"
COUNTED = "counted"
_BATCH = 1 << 20  # ids of histories that are held in memory at once


def training_frame(split: Split) -> pl.DataFrame:
    """Training as canonical interactions: user_id, item_id and, where known, timestamp, action and domain.

    What `Interactions` reads from it has the split's order. A log orders users of whom some times are missing by their
    place in the file; if training holds only times of such a user, and they run backwards, a reader would sort them.
    Times earlier than one before them are therefore left out, and counted in a warning.
    """
    inside = np.flatnonzero(split.in_training)
    frame = pl.DataFrame({USER: _users(split, split.owner[inside]), ITEM: _items(split, split.rows[inside])}).hstack(
        _context(split, inside)
    )
    if TIMESTAMP not in frame.columns:
        return frame
    times = pl.DataFrame({"user": split.owner[inside], "time": frame[TIMESTAMP]})
    backwards = times.select((pl.col("time") < pl.col("time").cum_max().over("user")).fill_null(False)).to_series()
    if backwards.any():
        row = int(backwards.arg_max() or 0)
        logger.warning(
            "%d time(s) of training run backwards in a user's order, such as %s of user %r; they are written as "
            "unknown, because a reader would sort by them: to order these users by time, drop rows without a time",
            *(backwards.sum(), frame[TIMESTAMP][row], frame[USER][row]),
        )
    return frame.with_columns(frame[TIMESTAMP].set(backwards, None))


def case_frame(split: Split, part: Part, start: int = 0, stop: int | None = None) -> pl.DataFrame:
    """The cases `start` to `stop` (without it) of a part, in the split's order.

    Returns:
        One row per case: user_id; history, the ids of all items before, oldest first; target, the id that came next;
        where known its timestamp (unix seconds), action and domain; and counted, whether the headline figure has it.
    """
    positions = split.positions[part][start:stop]
    owners = split.owner[positions]
    first = split.offsets[owners]
    lengths = positions - first
    case = np.repeat(np.arange(len(positions)), lengths)
    places = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths) + first[case]
    ids = pl.DataFrame({"case": case, HISTORY: _items(split, split.rows[places])})
    histories = ids.group_by("case", maintain_order=True).agg(HISTORY)
    cases = pl.DataFrame({"case": np.arange(len(positions)), USER: _users(split, owners)}).join(
        histories, on="case", how="left", maintain_order="left"
    )
    return (
        cases.select(USER, pl.col(HISTORY).fill_null([]), _items(split, split.rows[positions]).alias(TARGET))
        .hstack(_context(split, positions))
        .with_columns(pl.Series(COUNTED, split.headline(part)[start:stop]))
    )


def write_split(
    split: Split, folder: str | Path, announce: Callable[[str, float], None] = lambda name, done: None
) -> None:
    """Writes train.parquet, valid.parquet, test.parquet and, last, split.json: protocol, content hash, counts.

    Cases go to the file batch by batch: histories that grow with every case are never held all at once.

    Args:
        split: any split.
        folder: is made if need be; other files in it stay.
        announce: is called with a file's name and the share of it that is written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # From here on, and until the end, the folder holds no whole split.
    (folder / "split.json").unlink(missing_ok=True)
    announce("train.parquet", 0.0)
    with atomic_path(folder / "train.parquet") as temporary:
        training_frame(split).write_parquet(temporary)
    parts: tuple[Part, ...] = ("valid", "test")
    for part in parts:
        name = f"{part}.parquet"
        batches = _batches(split, part, lambda done, name=name: announce(name, done))  # type: ignore[misc]
        with atomic_path(folder / name) as temporary:
            batches.sink_parquet(temporary)
    write_json(
        folder / "split.json",
        {"protocol": dict(split.protocol), "content_hash": split.content_hash, "counts": split.summary()},
    )


def _batches(split: Split, part: Part, announce: Callable[[float], None]) -> pl.LazyFrame:
    """All cases of a part, made when they are asked for, so many at a time that their histories fill one batch."""
    positions = split.positions[part]
    filled = np.cumsum(positions - split.offsets[split.owner[positions]])

    def make(
        columns: list[str] | None, predicate: pl.Expr | None, rows: int | None, size: int | None
    ) -> Iterator[pl.DataFrame]:
        start = 0
        while start < len(positions):
            before = filled[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(filled, before + _BATCH, side="right")))
            announce(start / len(positions))
            yield case_frame(split, part, start, stop)
            start = stop

    return register_io_source(make, schema=case_frame(split, part, 0, 1).schema)


def _users(split: Split, places: npt.NDArray[np.int64]) -> pl.Series:
    return pl.Series(split.all_users, dtype=pl.String).gather(places)


def _items(split: Split, rows: npt.NDArray[np.int32]) -> pl.Series:
    return pl.Series(split.item_ids, dtype=pl.String).gather(rows)


def _context(split: Split, places: npt.NDArray[np.int64]) -> list[pl.Series]:
    """What is known of the interactions at these places, beside their users and items."""
    known = []
    if split.timestamps is not None:
        seconds = split.timestamps
        whole = bool(np.all(np.isnan(seconds) | (seconds == np.floor(seconds))))
        times = pl.Series(TIMESTAMP, seconds[places]).fill_nan(None)
        known.append(times.cast(pl.Int64) if whole else times)
    for name, values in ((ACTION, split.actions), (DOMAIN, split.domains)):
        if values is not None:
            known.append(values.gather(places).alias(name))
    return known
