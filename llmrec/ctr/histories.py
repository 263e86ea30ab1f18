"""What is known of a user before each labelled row: from the rows themselves, or as the file gives it."""

from typing import Literal, NamedTuple

import numpy as np
import torch

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.ctr.model import action_of
from llmrec.ctr.rows import LabelledRows, Numbers
from llmrec.exceptions import DataError

HistorySource = Literal["labelled", "liked", "given"]
Simultaneous = Literal["known", "unknown"]


class Events(NamedTuple):
    """What a user did, oldest first, n events.

    Attributes:
        items: (n,) item rows.
        actions: (n,) of `action_of`.
        timestamps: (n,) unix seconds, `UNKNOWN_TIME` where unknown.
    """

    items: Numbers
    actions: Numbers
    timestamps: Numbers

    def last(self, count: int) -> "Events":
        """The most recent `count`."""
        return Events(*(column[max(0, len(column) - count) :] for column in self))

    def __bool__(self) -> bool:
        return len(self.items) > 0


class Histories:
    """The history of every one of I rows, as slices of one list of E events.

    Attributes:
        events: of all users, each user's by time.
        begin, end: (I,) the slice of each row.
    """

    def __init__(self, events: Events, begin: Numbers, end: Numbers) -> None:
        self.events, self.begin, self.end = events, begin, end

    def before(self, row: int, max_history: int) -> Events:
        """The most recent events before a row."""
        end = int(self.end[row])
        begin = max(int(self.begin[row]), end - max_history)
        return Events(*(column[begin:end] for column in self.events))

    def lengths(self) -> Numbers:
        """(I,) all events before each row."""
        return self.end - self.begin

    @classmethod
    def of(
        cls, rows: LabelledRows, source: HistorySource = "labelled", simultaneous: Simultaneous = "known"
    ) -> "Histories":
        """The histories of all rows.

        A user's rows are in order of their files, inside a file by time, and those of one time in file order; if a
        time is unknown, all are in file order and none is simultaneous. So no history knows anything of a later file.

        Args:
            rows: a row of a later part has the earlier parts in its history, and what came before it in its own.
            source: "labelled": all the user's rows before, with their labels as actions; "liked": those of them with
                a label 1 at any K; "given": the file's own histories, of which every item counts as liked at all K
                and no time is known.
            simultaneous: whether rows of the same part and second that stand earlier in it are known; files such as
                CoLLM's have histories in which they are. Of no meaning for "given".

        Raises:
            DataError: if histories of the file are asked for and it has none, or the names are not known.
        """
        if source == "given":
            if rows.given is None:
                raise DataError("The files have no column of histories. Take those of the rows: labelled or liked.")
            items, bounds = rows.given
            liked = np.full(len(items), 2 ** rows.labels.shape[1], dtype=np.int64)
            return cls(Events(items, liked, np.full(len(items), UNKNOWN_TIME)), bounds[:-1], bounds[1:])
        if source not in ("labelled", "liked") or simultaneous not in ("known", "unknown"):
            raise DataError(
                f"Histories are {source!r} with simultaneous rows {simultaneous!r}. Choose labelled, liked or given, "
                "and known or unknown."
            )
        clock = np.zeros_like(rows.timestamps) if (rows.timestamps == UNKNOWN_TIME).any() else rows.timestamps
        order = np.lexsort((np.arange(len(rows)), clock, rows.part, rows.users))
        users, times = rows.users[order], rows.timestamps[order]
        kept = np.ones(len(rows), dtype=np.bool_) if source == "labelled" else (rows.labels[order] == 1).any(axis=1)
        # How many kept events stand before each place of the order.
        before = np.concatenate([np.zeros(1, np.int64), kept.cumsum()])
        places = np.arange(len(rows))
        if simultaneous == "unknown" and clock is rows.timestamps:
            fresh = np.ones(len(rows), dtype=np.bool_)
            same_part = rows.part[order][1:] == rows.part[order][:-1]
            same_time = times[1:] == times[:-1]
            fresh[1:] = (users[1:] != users[:-1]) | ~same_part | ~same_time
            places = np.maximum.accumulate(np.where(fresh, places, 0))
        first = np.searchsorted(users, users, side="left")
        begin, end = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        begin[order], end[order] = before[first], before[places]
        actions = action_of(torch.from_numpy(rows.labels[order[kept]])).numpy()
        return cls(Events(rows.items[order[kept]], actions, times[kept]), begin, end)
