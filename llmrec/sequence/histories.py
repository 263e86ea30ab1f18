"""Histories as tensors: what a sequence model reads of each user."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.data.split import Part, Split
from llmrec.sequence.events import EventConfig

Numbers = npt.NDArray[np.int64]


class History(NamedTuple):
    """One history, oldest first, and what is known of what is asked for. n items.

    Attributes:
        rows: (n,) item rows.
        timestamps: (n,) unix seconds, `UNKNOWN_TIME` where unknown; None: all unknown.
        actions: (n,) numbers (`EventConfig.action`); None: all unknown.
        domains: (n,) likewise.
        next_timestamp: of the request; None: unknown, and the model counts from the last item.
        next_action: under which the next item is asked for; None: the model's target action.
        next_domain: of which the next item shall be; None: the last item's.
    """

    rows: Numbers
    timestamps: Numbers | None = None
    actions: Numbers | None = None
    domains: Numbers | None = None
    next_timestamp: int | None = None
    next_action: int | None = None
    next_domain: int | None = None


class LoggedHistories:
    """The interactions of a split as numbers, M of them, and the history of every case."""

    def __init__(self, split: Split, events: EventConfig) -> None:
        """Times that are no clock, but numbers of an order, are left out: a model of gaps has no use for them."""
        self.split, self.events = split, events
        self.columns: dict[str, Numbers] = {}
        if split.timestamps is not None and split.clock:
            known = np.isfinite(split.timestamps)
            self.columns["timestamps"] = np.where(known, np.where(known, split.timestamps, 0), 0).astype(np.int64)
            self.columns["timestamps"][~known] = UNKNOWN_TIME
        for name, column, number in (
            ("actions", split.actions, events.action),
            ("domains", split.domains, events.domain),
        ):
            if column is not None:
                numbers = {word: number(word) for word in column.unique().to_list()}
                self.columns[name] = np.array([numbers[word] for word in column.to_list()], dtype=np.int64)

    @classmethod
    def names(cls, split: Split) -> tuple[list[str], list[str]]:
        """The actions and the domains that the training interactions have, in alphabetical order."""
        found = []
        for column in (split.actions, split.domains):
            words = [] if column is None else column.filter(split.in_training).drop_nulls().unique().to_list()
            found.append(sorted(word for word in words if word))
        return found[0], found[1]

    def cases(self, part: Part, cases: Sequence[int] | Numbers | None = None) -> list[History]:
        """The history of each case of a part, and of its request what an evaluation may tell: all but the item."""
        places = self.split.positions[part]
        chosen = places if cases is None else places[np.asarray(cases, dtype=np.int64)]
        begins = self.split.offsets[self.split.owner[chosen]]
        return [self.before(begin, end) for begin, end in zip(begins.tolist(), chosen.tolist(), strict=True)]

    def before(self, begin: int, end: int) -> History:
        """The interactions `begin … end - 1`, with the event of `end` as what is asked for."""
        parts = {name: column[begin:end] for name, column in self.columns.items()}
        asked = {name.removesuffix("s"): int(column[end]) for name, column in self.columns.items()}
        return History(
            self.split.rows[begin:end].astype(np.int64),
            **parts,
            next_timestamp=asked.get("timestamp"),
            next_action=asked.get("action"),
            next_domain=asked.get("domain"),
        )


def collate(histories: Sequence[History], max_history: int) -> dict[str, Tensor]:
    """The arguments of `SequenceModel.last` and `forward`, padded on the right to the longest.

    Of each history the last `max_history` items are kept. A column of which nothing is known is left out. Where one
    request names its action and another does not, the latter's is -1: the model's target action.
    """
    kept = [min(len(one.rows), max_history) for one in histories]
    width = max([1, *kept])
    batch: dict[str, npt.NDArray[Any]] = {
        "items": _padded([one.rows for one in histories], kept, width, 0),
        "mask": np.arange(width) < np.array(kept, dtype=np.int64)[:, None],
    }
    for name, unknown in (("timestamps", UNKNOWN_TIME), ("actions", 0), ("domains", 0)):
        given = [getattr(one, name) for one in histories]
        asked = [getattr(one, f"next_{name.removesuffix('s')}") for one in histories]
        if all(one is None for one in (*given, *asked)):
            continue
        values = [
            np.full(len(one.rows), unknown) if own is None else own for one, own in zip(histories, given, strict=True)
        ]
        batch[name] = _padded(values, kept, width, unknown)
        if any(value is not None for value in asked):
            batch[f"next_{name}"] = _followed(batch[name], kept, asked, -1 if name == "actions" else None)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _padded(values: Sequence[npt.NDArray[np.integer]], kept: Sequence[int], width: int, fill: int) -> Numbers:
    padded = np.full((len(values), width), fill, dtype=np.int64)
    for place, (value, length) in enumerate(zip(values, kept, strict=True)):
        if length:
            padded[place, :length] = value[-length:]
    return padded


def _followed(column: Numbers, kept: Sequence[int], asked: Sequence[int | None], nothing: int | None) -> Numbers:
    """(B, S) the value after each place; after the last one what is asked, or else `nothing`, or its own."""
    following = np.concatenate([column[:, 1:], column[:, -1:]], axis=1)
    for place, (length, value) in enumerate(zip(kept, asked, strict=True)):
        if length:
            own = column[place, length - 1] if nothing is None else nothing
            following[place, length - 1] = own if value is None else value
    return following


def moved(batch: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """The batch on a device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
