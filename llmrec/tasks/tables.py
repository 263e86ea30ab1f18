"""Tables beside the log: queries that were typed for items, and preferences that users put into words."""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import polars as pl

from llmrec.data.columns import ITEM, TIMESTAMP, USER, ColumnNames
from llmrec.data.split import Split
from llmrec.data.table import open_table
from llmrec.data.timestamps import check_times
from llmrec.data.values import check_ids, refuse
from llmrec.exceptions import DataError

logger = logging.getLogger(__name__)

QUERY, PREFERENCE = "query", "preference"


@dataclass(frozen=True)
class Queries:
    """What was typed to find items.

    Attributes:
        rows: the item row of every query.
        texts: the queries.
    """

    rows: Sequence[int] = field(repr=False)
    texts: Sequence[str] = field(repr=False)

    @cached_property
    def content_hash(self) -> str:
        return _hash([list(self.rows), list(self.texts)])

    @classmethod
    def read(cls, path: str | Path, split: Split, columns: ColumnNames = ColumnNames()) -> "Queries":  # noqa: B008
        """Reads a table with the columns item_id and query; where it has user_id, nothing held out is learnt.

        A query of a user for an item that the split holds out of that user's interactions is left out, and so are
        queries of items that the split does not know; both are counted in a warning.

        Raises:
            DataError: if the table cannot be read, lacks a column, or no query is left.
        """
        frame, source = open_table(path).read()
        item = columns.find(ITEM, frame.columns, source.name, required=True)
        user = columns.find(USER, frame.columns, source.name)
        ids, faults = check_ids(frame[item], item, source)
        refuse(faults, source)
        texts = _texts(frame, QUERY, source.name)
        row_of = {id: row for row, id in enumerate(split.item_ids)}
        held_out: set[tuple[str, str]] = set()
        users: Sequence[str | None] = [None] * frame.height
        if user is not None:
            users = frame[user].cast(pl.String).to_list()
            held_out = _held_out(split)
        known = [id in row_of and text != "" for id, text in zip(ids, texts, strict=True)]
        free = [(user or "", id) not in held_out for user, id in zip(users, ids, strict=True)]
        kept = [place for place in range(frame.height) if known[place] and free[place]]
        if left := frame.height - len(kept):
            logger.warning(
                "%s: %d of %d queries are left out: %d are empty or of unknown items, the others of held-out "
                "interactions",
                *(source, left, frame.height, known.count(False)),
            )
        if not kept:
            raise DataError(f"{source} has no query for an item of the catalog. Check that its item column is right.")
        return cls([row_of[ids[place]] for place in kept], [texts[place] for place in kept])


@dataclass(frozen=True)
class Preferences:
    """What users said that they like, each with the moment from which it is known.

    Attributes:
        timed: whether the table has times; without them, all is known from the beginning.
        said: by user id, (unix seconds or -inf, text) ascending in time, equal times in the table's order.
    """

    timed: bool
    said: dict[str, list[tuple[float, str]]] = field(repr=False)

    @cached_property
    def content_hash(self) -> str:
        said = {user: [[str(time), text] for time, text in entries] for user, entries in sorted(self.said.items())}
        return _hash([self.timed, said])

    @classmethod
    def read(cls, path: str | Path, columns: ColumnNames = ColumnNames()) -> "Preferences":  # noqa: B008 (frozen)
        """Reads a table with the columns user_id and preference, and timestamp if it has one.

        Where there are times, a preference without one is left out, because it may come from what is held out.

        Raises:
            DataError: if the table cannot be read, lacks a column, holds no preference, or its times are no clock.
        """
        frame, source = open_table(path).read()
        user = columns.find(USER, frame.columns, source.name, required=True)
        column = columns.find(TIMESTAMP, frame.columns, source.name)
        ids, faults = check_ids(frame[user], user, source)
        refuse(faults, source)
        texts = _texts(frame, PREFERENCE, source.name)
        times: list[float | None] = [-math.inf] * frame.height
        if column is not None:
            checked, wrong = check_times(frame[column], column, source)
            refuse(wrong, source)
            if checked.unit == "order":
                raise DataError(
                    f"{source}: the times in {column!r} are no clock, so what was known when cannot be told. "
                    "Give unix times, or leave the column out."
                )
            times = checked.seconds.cast(pl.Float64).to_list()
        said: dict[str, list[tuple[float, str]]] = {}
        left = 0
        for id, text, time in zip(ids, texts, times, strict=True):
            if text == "" or time is None or math.isnan(time):
                left += 1
                continue
            said.setdefault(id, []).append((time, text))
        if left:
            logger.warning("%s: %d preferences are left out: empty, or without a time", source, left)
        if not said:
            raise DataError(f"{source} has no preference that can be used. Fill in its texts and times.")
        return cls(
            column is not None, {id: sorted(entries, key=lambda entry: entry[0]) for id, entries in said.items()}
        )

    def known(self, user: str, moment: float | None) -> str | None:
        """The latest that the user had said before a moment, or None.

        Args:
            user: their id.
            moment: unix seconds. What was said at the moment itself is not known yet; of an unknown moment (None or
                NaN) nothing is that has a time.
        """
        latest = None
        for time, text in self.said.get(user, ()):
            if time == -math.inf or (moment is not None and time < moment):
                latest = text
        return latest


def _texts(frame: pl.DataFrame, column: str, source: str) -> list[str]:
    """A column of text, on one line each; "" where there is none."""
    if column not in frame.columns:
        raise DataError(
            f"{source} has no column {column!r}; its columns are {', '.join(map(repr, frame.columns))}. "
            f"Name the column of texts {column}."
        )
    if frame[column].dtype != pl.String:
        raise DataError(f"{source}: {column} holds {frame[column].dtype}, which is no text. Write sentences or words.")
    return [" ".join((text or "").split()) for text in frame[column].to_list()]


def _held_out(split: Split) -> set[tuple[str, str]]:
    """(user, item) of what training does not hold, without what it holds all the same."""
    pairs: dict[bool, set[tuple[str, str]]] = {True: set(), False: set()}
    for inside, user, row in zip(split.in_training.tolist(), split.owner.tolist(), split.rows.tolist(), strict=True):
        pairs[inside].add((split.all_users[user], split.item_ids[row]))
    return pairs[False] - pairs[True]


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()
