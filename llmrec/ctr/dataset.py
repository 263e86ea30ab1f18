"""Labelled rows as what a ranking model reads: a case each, or whole histories whose every event is a case."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.ctr.histories import Events, Histories
from llmrec.ctr.items import UNKNOWN_ITEM
from llmrec.ctr.model import UNKNOWN_ACTION, action_of
from llmrec.ctr.rows import MISSING, LabelledRows, Numbers
from llmrec.exceptions import DataError


class EventRow(NamedTuple):
    """A row of a batch: S events, K labels.

    Attributes:
        items, actions, timestamps: (S,), oldest first.
        labels: (S, K), `MISSING` where nothing is asked.
        weights: (S,) what the labels of each place count.
    """

    items: Numbers
    actions: Numbers
    timestamps: Numbers
    labels: Numbers
    weights: npt.NDArray[np.float32]


class Cases(Dataset[EventRow]):
    """Each labelled row as a sequence of its own: the history before it, and the candidate at its end."""

    def __init__(
        self,
        rows: LabelledRows,
        histories: Histories,
        catalogue: Numbers,
        chosen: Numbers,
        max_history: int,
        weights: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """
        Args:
            rows: I of them.
            histories: of these rows.
            catalogue: (number of `rows.item_ids`,) each item's row in the model.
            chosen: (C,) which rows are cases.
            max_history: the most recent events of a case.
            weights: (I,) what each row counts; None: 1 each.
        """
        self.rows, self.histories, self.chosen, self.max_history = rows, histories, chosen, max_history
        self._catalogue = catalogue
        self._asked = 2 ** rows.labels.shape[1] + 1
        self._weights = np.ones(len(rows), dtype=np.float32) if weights is None else weights

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, case: int) -> EventRow:
        row = int(self.chosen[case])
        events = self.histories.before(row, self.max_history)
        num_events = len(events.items)
        labels = np.full((num_events + 1, self.rows.labels.shape[1]), MISSING, dtype=np.int64)
        labels[-1] = self.rows.labels[row]
        return EventRow(
            self._catalogue[np.append(events.items, self.rows.items[row])],
            np.append(events.actions, self._asked),
            np.append(events.timestamps, self.rows.timestamps[row]),
            labels,
            np.full(num_events + 1, self._weights[row], dtype=np.float32),
        )

    def lengths(self) -> Numbers:
        """(C,) events of each case, the candidate included."""
        return np.minimum(self.histories.lengths()[self.chosen], self.max_history) + 1


class Windows(Dataset[EventRow]):
    """Whole histories, of which a causal model of the layout "interleaved" predicts every event in one pass.

    HSTU's generative training: a user of n events costs one sequence of n instead of n sequences. A history of more
    than `max_history` + 1 events is cut into windows that overlap by half at least; each event is asked for once, in
    the first window that holds it, so all but those of the first window know at least half of `max_history` events.
    """

    def __init__(
        self,
        rows: LabelledRows,
        catalogue: Numbers,
        chosen: Numbers,
        max_history: int,
        weights: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """
        Args:
            rows: I of them; only the `chosen` ones are in histories, too.
            catalogue: (number of `rows.item_ids`,) each item's row in the model.
            chosen: (C,) rows of the histories, ascending.
            max_history: the most events that a prediction looks back on.
            weights: (I,) what each row counts; one of 0 is in histories and not asked for. None: 1 each.

        Raises:
            DataError: if `max_history` is below 1.
        """
        if max_history < 1:
            raise DataError(f"max_history is {max_history}, and a window has to hold an event. Give 1 or more.")
        # Of rows that are all events, the number of events before is the place in the order of users and times.
        order = chosen[np.argsort(Histories.of(rows).end[chosen], kind="stable")]
        owner = rows.users[order]
        begins = np.flatnonzero(np.append(True, owner[1:] != owner[:-1])) if len(order) else np.zeros(0, np.int64)
        step = max(1, (max_history + 1) // 2)
        windows = []
        for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(order)], strict=True):
            asked = begin
            while asked < end:
                last = min(end, asked + (max_history + 1 if asked == begin else step))
                windows.append((max(begin, last - max_history - 1), asked, last))
                asked = last
        self._windows = np.array(windows, dtype=np.int64).reshape(-1, 3)
        self._items = catalogue[rows.items[order]]
        self._times = rows.timestamps[order]
        self._labels = rows.labels[order]
        self._weights = np.ones(len(order), dtype=np.float32) if weights is None else weights[order]
        self._actions = action_of(torch.from_numpy(self._labels)).numpy()

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, window: int) -> EventRow:
        begin, asked, end = self._windows[window].tolist()
        weights = self._weights[begin:end]
        silent = (np.arange(begin, end) < asked) | (weights == 0)
        return EventRow(
            self._items[begin:end],
            self._actions[begin:end],
            self._times[begin:end],
            np.where(silent[:, None], MISSING, self._labels[begin:end]),
            weights,
        )

    def lengths(self) -> Numbers:
        """(W,) events of each window."""
        return self._windows[:, 2] - self._windows[:, 0]


def collate(batch: Sequence[EventRow]) -> dict[str, Tensor]:
    """Rows as the tensors that `llmrec.ctr.model.CTRModel` takes, padded on the right to the longest.

    `items`, `mask`, `timestamps`, `actions` (B, S), `labels` (B, S, K) and `weights` (B, S).
    """
    longest = max(len(row.items) for row in batch)
    padding = (UNKNOWN_ITEM, UNKNOWN_ACTION, UNKNOWN_TIME, MISSING, 0)

    def padded(column: int) -> Tensor:
        first = batch[0][column]
        filled = np.full((len(batch), longest, *first.shape[1:]), padding[column], dtype=first.dtype)
        for place, row in enumerate(batch):
            filled[place, : len(row[column])] = row[column]
        return torch.from_numpy(filled)

    lengths = torch.tensor([len(row.items) for row in batch])
    return {
        "items": padded(0),
        "mask": torch.arange(longest) < lengths[:, None],
        "actions": padded(1),
        "timestamps": padded(2),
        "labels": padded(3),
        "weights": padded(4),
    }


def case_tensors(
    histories: Sequence[Events], candidates: Sequence[int], times: Sequence[int], asked: int
) -> dict[str, Tensor]:
    """Histories of model rows with a candidate behind each, as `collate` gives them, without labels."""
    rows = [
        EventRow(
            np.append(events.items, candidate),
            np.append(events.actions, asked),
            np.append(events.timestamps, time),
            np.zeros((len(events.items) + 1, 0), dtype=np.int64),
            np.zeros(len(events.items) + 1, dtype=np.float32),
        )
        for events, candidate, time in zip(histories, candidates, times, strict=True)
    ]
    tensors = collate(rows)
    return {name: tensors[name] for name in ("items", "mask", "actions", "timestamps")}
