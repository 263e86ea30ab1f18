"""Splits: which interactions a model may learn from, and which it is asked about."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from llmrec.data.columns import ITEM, TIMESTAMP, USER
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.exceptions import DataError

Part = Literal["valid", "test"]
Rows = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Split:
    """Training sequences of all users, and one validation and one test item of each evaluated user.

    Attributes:
        user_ids: the U evaluated users, in order of first appearance.
        train: one array of item rows, oldest first, per user, evaluated or not, in order of first appearance.
        evaluated: (U,) the places in `train` of the evaluated users.
        valid: (U,) item rows.
        test: (U,) item rows.
        num_items: N, the length of the item table.
        content_hash: sha256 of the split's content: item ids in order, then every user's id and train, validation and
            test item ids. Each string and each list is preceded by its length, so that no two splits spell alike.
            Formats and column names leave it unchanged.
        test_gaps: (U,) seconds between the test item and the item before it, NaN where a timestamp is missing; None
            without timestamps. 0 is a tie, of which the order is arbitrary.
    """

    user_ids: list[str]
    train: list[Rows] = field(repr=False)
    evaluated: npt.NDArray[np.int64] = field(repr=False)
    valid: Rows = field(repr=False)
    test: Rows = field(repr=False)
    num_items: int
    content_hash: str
    test_gaps: npt.NDArray[np.float64] | None = field(default=None, repr=False)

    def histories(self, part: Part) -> list[Rows]:
        """What a model sees of each evaluated user: the training part and, for the test, the validation item too."""
        train = [self.train[place] for place in self.evaluated]
        if part == "valid":
            return train
        return [np.append(history, item) for history, item in zip(train, self.valid, strict=True)]

    def targets(self, part: Part) -> Rows:
        """(U,) the item row that each evaluated user took next."""
        return self.valid if part == "valid" else self.test

    def summary(self) -> dict[str, int | float]:
        """Counts, and the shares of test items that are in the user's history, or tied in time with the item before.

        A tie, and with it its share, exists only where the interactions have timestamps. An unknown one is none.
        """
        repeated = [
            target in history for history, target in zip(self.histories("test"), self.targets("test"), strict=True)
        ]
        counts: dict[str, int | float] = {
            "users": len(self.train),
            "evaluated_users": len(self.user_ids),
            "items": self.num_items,
            "interactions": sum(map(len, self.train)) + 2 * len(self.user_ids),
            "repeated_test_share": float(np.mean(repeated)),
        }
        if self.test_gaps is not None:
            counts["tied_test_share"] = float(np.mean(self.test_gaps == 0))
        return counts


def leave_one_out(interactions: Interactions, items: Items, min_history: int = 3) -> Split:
    """Each user's last item is the test, the one before it validation, and the rest training.

    Users with fewer than `min_history` interactions are not evaluated, and all they have is training.

    Raises:
        DataError: if `min_history` is below 3 (nothing would be left to learn from), an interaction's item is not in
            `items`, or no user is long enough.
    """
    if min_history < 3:
        raise DataError(f"min_history is {min_history}, but test and validation alone take two items. Give 3 or more.")
    frame = interactions.frame
    rows = _rows_of(frame[ITEM], items)
    # The frame is sorted by user, so a user is a run of rows.
    users = frame.group_by(USER, maintain_order=True).len()
    user_ids: list[str] = users[USER].to_list()
    lengths = users["len"].to_numpy().astype(np.int64)
    ends = np.cumsum(lengths)
    evaluated = np.flatnonzero(lengths >= min_history)
    if not len(evaluated):
        raise DataError(
            f"None of the {len(lengths)} users has {min_history} interactions (the most are {lengths.max()}), so no "
            "one can be evaluated. Check that the user column is the right one, or give longer histories."
        )
    train_ends = ends.copy()
    train_ends[evaluated] -= 2
    train = [rows[start:end] for start, end in zip(ends - lengths, train_ends, strict=True)]
    held_out = [rows[start:end] for start, end in zip(train_ends, ends, strict=True)]
    last = ends[evaluated] - 1
    gaps = None
    if TIMESTAMP in frame.columns:
        # The difference is taken before the conversion, which would round nanoseconds.
        differences = frame.select(pl.col(TIMESTAMP).diff()).to_series().cast(pl.Float64)
        gaps = differences.fill_null(float("nan")).to_numpy()[last]
    return Split(
        user_ids=[user_ids[place] for place in evaluated],
        train=train,
        evaluated=evaluated,
        valid=rows[last - 1],
        test=rows[last],
        num_items=len(items),
        content_hash=_content_hash(items.ids, user_ids, train, held_out),
        test_gaps=gaps,
    )


def _rows_of(item_ids: pl.Series, items: Items) -> Rows:
    known = pl.DataFrame({ITEM: items.ids, "row": np.arange(len(items), dtype=np.int32)})
    rows = item_ids.to_frame().join(known, on=ITEM, how="left", maintain_order="left")["row"]
    if rows.null_count():
        unknown = item_ids.filter(rows.is_null()).unique(maintain_order=True)
        raise DataError(
            f"{len(unknown)} item(s) of the interactions are not in the item table, such as {unknown[0]!r}. "
            "Add them to the table, or call items.with_missing(interactions)."
        )
    return rows.to_numpy().astype(np.int32)


def _content_hash(
    item_ids: Sequence[str], user_ids: Sequence[str], train: Sequence[Rows], held_out: Sequence[Rows]
) -> str:
    """See `Split.content_hash`; `held_out` has validation and test item of the evaluated users, nothing of others."""
    spelt = [_prefixed(item) for item in item_ids]
    digest = hashlib.sha256()

    def add(strings: Sequence[bytes]) -> None:
        digest.update(len(strings).to_bytes(8, "little") + b"".join(strings))

    add(spelt)
    for user, history, targets in zip(user_ids, train, held_out, strict=True):
        digest.update(_prefixed(user))
        add([spelt[row] for row in history.tolist()])
        add([spelt[row] for row in targets.tolist()])
    return digest.hexdigest()


def _prefixed(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return len(encoded).to_bytes(8, "little") + encoded
