"""Splits: which interactions a model may learn from, and which it is asked about."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

Part = Literal["valid", "test"]
Rows = npt.NDArray[np.int32]
Places = npt.NDArray[np.int64]

_FIRST_REAL_TIME = 315_532_800  # 1980-01-01 in unix seconds: a clock that shows less counts something else
_LAST_TIME = 253_402_300_800  # the year 10000, which no calendar here can write


@dataclass(frozen=True)
class Split:
    """Training sequences of all users, and the *cases* of validation and test: after this history, which item?

    Whatever the protocol, training holds a prefix of what each user did, because models continue histories. A case is
    one interaction to be predicted from all that its user did before it. M interactions, U users, N items, C cases of
    a part.

    Attributes:
        all_users: the U users, in order of first appearance.
        item_ids: the N item ids, in the order of their rows.
        rows: (M,) the item row of every interaction, users one after another, oldest first.
        offsets: (U + 1,) a user's interactions are `rows[offsets[u]:offsets[u + 1]]`.
        train_ends: (U,) of which `rows[offsets[u]:train_ends[u]]` are training.
        positions: the places (C,) in `rows` of a part's targets.
        protocol: the name of the split and its values, JSON-ready.
        timestamps: (M,) unix seconds, or the numbers of an order (see `clock`), NaN where unknown; or None.
        actions: (M,) what the user did (behaviour), or None.
        domains: (M,) the domain of the interaction, or None.
        ratings: (M,) how much the user liked it, NaN where unknown; or None.
        apart: whether cases of users or items that training does not hold are kept apart from the headline figure.
        clock: whether the timestamps are unix seconds, and not numbers of an order. Left at None it is guessed: their
            median lies after 1980 and all of them before the year 10000. False without timestamps.
        positions_decide: whether all interactions of a user at the same time have an order that the log itself gives,
            by positions, so that none hangs on the order of the file.
        content_hash: sha256 of item ids in order, user ids, sequences and parts. The lengths of all strings come
            first, so that no two splits spell alike. Formats, column names, times and what they are taken for leave it
            unchanged.
    """

    all_users: list[str] = field(repr=False)
    item_ids: list[str] = field(repr=False)
    rows: Rows = field(repr=False)
    offsets: Places = field(repr=False)
    train_ends: Places = field(repr=False)
    positions: Mapping[Part, Places] = field(repr=False)
    protocol: Mapping[str, Any]
    timestamps: npt.NDArray[np.float64] | None = field(default=None, repr=False)
    actions: pl.Series | None = field(default=None, repr=False)
    domains: pl.Series | None = field(default=None, repr=False)
    ratings: npt.NDArray[np.float64] | None = field(default=None, repr=False)
    apart: bool = False
    clock: bool | None = None
    positions_decide: bool = False

    def __post_init__(self) -> None:
        if self.timestamps is None:
            object.__setattr__(self, "clock", False)
        elif self.clock is None:
            known = self.timestamps[np.isfinite(self.timestamps)]
            real = len(known) > 0 and np.median(known) >= _FIRST_REAL_TIME and known.max() < _LAST_TIME
            object.__setattr__(self, "clock", bool(real))

    @property
    def num_items(self) -> int:
        """N, the length of the item table."""
        return len(self.item_ids)

    @cached_property
    def content_hash(self) -> str:
        digest = hashlib.sha256(b"llmrec split 2")
        for strings in (self.item_ids, self.all_users):
            encoded = [text.encode("utf-8") for text in strings]
            digest.update(np.array([len(encoded), *map(len, encoded)], dtype="<i8").tobytes())
            digest.update(b"".join(encoded))
        for places in (self.offsets, self.rows, self.train_ends, self.positions["valid"], self.positions["test"]):
            digest.update(len(places).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(places, dtype="<i8").tobytes())
        return digest.hexdigest()

    @property
    def train(self) -> list[Rows]:
        """The training sequence of every user, oldest first; empty where a user has none."""
        ends = zip(self.offsets[:-1].tolist(), self.train_ends.tolist(), strict=True)
        return [self.rows[start:end] for start, end in ends]

    @cached_property
    def train_counts(self) -> Places:
        """(N,) how often training holds every item."""
        return np.bincount(self.rows[self.in_training], minlength=self.num_items).astype(np.int64)

    @cached_property
    def owner(self) -> Places:
        """(M,) the place in `all_users` of every interaction's user."""
        return np.repeat(np.arange(len(self.all_users)), np.diff(self.offsets))

    @cached_property
    def in_training(self) -> npt.NDArray[np.bool_]:
        """(M,) which interactions are training."""
        inside: npt.NDArray[np.bool_] = np.arange(len(self.rows)) < self.train_ends[self.owner]
        return inside

    def case_users(self, part: Part) -> Places:
        """(C,) the place in `all_users` of every case's user."""
        return self.owner[self.positions[part]]

    def users(self, part: Part) -> list[str]:
        """The user id of every case."""
        return [self.all_users[user] for user in self.case_users(part).tolist()]

    def histories(self, part: Part) -> list[Rows]:
        """What a model sees in every case: all that the user did before the target, oldest first."""
        starts = self.offsets[self.case_users(part)]
        pairs = zip(starts.tolist(), self.positions[part].tolist(), strict=True)
        return [self.rows[start:end] for start, end in pairs]

    def targets(self, part: Part) -> Rows:
        """(C,) the item row that was taken next."""
        return self.rows[self.positions[part]]

    def gaps(self, part: Part) -> npt.NDArray[np.float64] | None:
        """(C,) seconds between a target and the user's interaction before it; NaN if a time is unknown or it is first.

        0 is a tie, of which the order is arbitrary. None without timestamps.
        """
        if self.timestamps is None:
            return None
        positions = self.positions[part]
        first = positions == self.offsets[self.case_users(part)]
        return np.where(first, np.nan, self.timestamps[positions] - self.timestamps[np.maximum(positions - 1, 0)])

    def later_days(self, part: Part) -> npt.NDArray[np.bool_] | None:
        """(C,) whether a target lies on a later day (UTC) than the interaction before it; False where unknown.

        None without timestamps, or if they are no unix times but an order.
        """
        if self.timestamps is None or not self.clock:
            return None
        days = np.floor_divide(self.timestamps, 86_400.0)
        positions = self.positions[part]
        first = positions == self.offsets[self.case_users(part)]
        later: npt.NDArray[np.bool_] = ~first & (days[positions] > days[np.maximum(positions - 1, 0)])
        return later

    def unseen_items(self, part: Part) -> npt.NDArray[np.bool_]:
        """(C,) whether the target does not occur in training."""
        unseen: npt.NDArray[np.bool_] = self.train_counts[self.targets(part)] == 0
        return unseen

    def unseen_users(self, part: Part) -> npt.NDArray[np.bool_]:
        """(C,) whether the user has nothing in training."""
        unseen: npt.NDArray[np.bool_] = (self.train_ends == self.offsets[:-1])[self.case_users(part)]
        return unseen

    def headline(self, part: Part) -> npt.NDArray[np.bool_]:
        """(C,) which cases the headline figure counts; the rest is kept apart, in slices of its own."""
        if not self.apart:
            return np.ones(len(self.positions[part]), dtype=bool)
        return ~(self.unseen_items(part) | self.unseen_users(part))

    def summary(self) -> dict[str, int | float]:
        """Counts, and the shares of test items that are in the user's history, or tied in time with the item before.

        A tie, and with it its share, exists only where the interactions have timestamps. An unknown one is none.
        """
        histories, targets = self.histories("test"), self.targets("test")
        repeated = [target in history for history, target in zip(histories, targets, strict=True)]
        counts: dict[str, int | float] = {
            "users": len(self.all_users),
            "evaluated_users": len(np.unique(self.case_users("test"))),
            "items": self.num_items,
            "interactions": len(self.rows),
            "training_interactions": int(self.in_training.sum()),
            "validation_cases": len(self.positions["valid"]),
            "test_cases": len(targets),
            "test_items_unseen_in_training": len(np.unique(targets[self.unseen_items("test")])),
            "test_cases_of_unseen_items": int(self.unseen_items("test").sum()),
            "test_users_unseen_in_training": len(np.unique(self.case_users("test")[self.unseen_users("test")])),
            "repeated_test_share": float(np.mean(repeated)),
        }
        gaps = self.gaps("test")
        if gaps is not None:
            counts["tied_test_share"] = float(np.mean(gaps == 0))
        return counts
