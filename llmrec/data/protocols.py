"""The protocols by which interactions are split: leave-one-out, by time, by sample, by user."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from llmrec.data.columns import ACTION, DOMAIN, ITEM, POSITION, RATING, TIMESTAMP, USER
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.split import Places, Rows, Split
from llmrec.exceptions import DataError


def leave_one_out(interactions: Interactions, items: Items, min_history: int = 3) -> Split:
    """Each user's last item is the test, the one before it validation, and the rest training.

    Users with fewer than `min_history` interactions are not evaluated, and all they have is training.

    Raises:
        DataError: if `min_history` is below 3 (nothing would be left to learn from), an interaction's item is not in
            `items`, or no user is long enough.
    """
    if min_history < 3:
        raise DataError(f"min_history is {min_history}, but test and validation alone take two items. Give 3 or more.")
    log = _Log(interactions, items)
    lengths = np.diff(log.offsets)
    evaluated = np.flatnonzero(lengths >= min_history)
    if not len(evaluated):
        raise DataError(
            f"None of the {len(lengths)} users has {min_history} interactions (the most are {lengths.max()}), so no "
            "one can be evaluated. Check that the user column is the right one, or give longer histories."
        )
    train_ends = log.offsets[1:].copy()
    train_ends[evaluated] -= 2
    ends = log.offsets[1:][evaluated]
    protocol = {"split": "leave-one-out", "min_history": min_history}
    return log.split(train_ends, ends - 2, ends - 1, protocol)


def global_temporal(
    interactions: Interactions,
    items: Items,
    valid_share: float = 0.1,
    test_share: float = 0.1,
    valid_time: float | None = None,
    test_time: float | None = None,
    targets: Literal["all", "first"] = "all",
) -> Split:
    """Training is what happened before one moment, for everyone; then come a validation window and a test window.

    No model sees what anyone did after its moment of training, which leave-one-out does not promise. Interactions at
    a moment itself belong after it, so one moment is never cut in two. Cases of users or items that training does not
    hold are kept apart (`Split.headline`) and counted (`Split.summary`). An interaction without a time counts as
    simultaneous with the one before it; in front of a user's first known time, as earlier than everything.

    Args:
        interactions: with timestamps.
        items: the catalog.
        valid_share: share of the interactions between the two moments, where no time is given.
        test_share: share of the interactions from the second moment on, where no time is given.
        valid_time: unix seconds, the end of training; by default by share.
        test_time: unix seconds, the end of validation; by default by share.
        targets: "all": every later interaction is a case, its history all before it; "first": a user's first one in
            each window.

    Raises:
        DataError: if there are no timestamps, or a part would be empty.
    """
    _check_shares(valid_share, test_share)
    log = _Log(interactions, items)
    times = log.running_times("global-temporal")
    ordered = np.sort(times)
    if test_time is None:
        test_time = _quantile(ordered, 1 - test_share)
    if valid_time is None:
        before = ordered[ordered < test_time]
        valid_time = _quantile(before, 1 - valid_share / (1 - test_share)) if len(before) else test_time
    train = times < valid_time
    test = times >= test_time
    valid = ~train & ~test
    for name, inside in (("training", train), ("validation", valid), ("test", test)):
        if not inside.any():
            raise DataError(
                f"The {name} part is empty: the log spans {_moment(ordered[np.isfinite(ordered)][:1])} to "
                f"{_moment(ordered[-1:])}, validation begins at {_moment([valid_time])}, test at "
                f"{_moment([test_time])}. Give other times or shares."
            )
    found = []
    for inside in (valid, test):
        positions = np.flatnonzero(inside)
        if targets == "first":
            positions = positions[np.unique(log.owner[positions], return_index=True)[1]]
        found.append(positions)
    train_ends = log.offsets[:-1] + np.bincount(log.owner[train], minlength=len(log.users))
    protocol = {
        "split": "global-temporal",
        "valid_time": valid_time,
        "test_time": test_time,
        "targets": targets,
    }
    return log.split(train_ends, found[0], found[1], protocol, apart=True)


def by_sample(interactions: Interactions, items: Items, valid_share: float = 0.1, test_share: float = 0.1) -> Split:
    """All samples (a history, its next item), sorted by the time of the next item, are cut by number, as 8:1:1.

    The protocol of MiniOneRec (arXiv 2510.24431). Every interaction but a user's first is a sample. Equal times keep
    the order of the log: users by first appearance, then their own order. Training is what the training samples hold.
    Missing times are treated as by `global_temporal`. All cases count, cold ones too, as they do there.

    Raises:
        DataError: if there are no timestamps, or a part would be empty.
    """
    _check_shares(valid_share, test_share)
    log = _Log(interactions, items)
    times = log.running_times("by-sample")
    samples = np.flatnonzero(np.arange(len(log.rows)) != log.offsets[:-1][log.owner])
    samples = samples[np.argsort(times[samples], kind="stable")]
    # A hair more than the product, which a float may put below the whole number that it is.
    cuts = [int(np.floor(len(samples) * share + 1e-9)) for share in (1 - valid_share - test_share, 1 - test_share)]
    train, valid, test = np.split(samples, cuts)
    if not len(train) or not len(valid) or not len(test):
        raise DataError(
            f"{len(samples)} samples make {len(train)}, {len(valid)} and {len(test)} for training, validation and "
            "test. Give a longer log, or other shares."
        )
    taken = np.bincount(log.owner[train], minlength=len(log.users))
    train_ends = log.offsets[:-1] + taken + (taken > 0)
    protocol = {"split": "by-sample", "valid_share": valid_share, "test_share": test_share}
    return log.split(train_ends, np.sort(valid), np.sort(test), protocol)


def cold_users(
    interactions: Interactions,
    items: Items,
    valid_share: float = 0.1,
    test_share: float = 0.1,
    seed: int = 0,
) -> Split:
    """Users drawn with a seed are held out whole; the last item of each is asked for, after the rest of their history.

    Only users of two interactions or more are drawn. All others are training, with all they did.

    Raises:
        DataError: if no user would be left for a part.
    """
    _check_shares(valid_share, test_share)
    log = _Log(interactions, items)
    lengths = np.diff(log.offsets)
    eligible = np.flatnonzero(lengths >= 2)
    drawn = np.random.default_rng(seed).permutation(eligible)
    counts = [max(1, round(share * len(log.users))) for share in (test_share, valid_share)]
    if sum(counts) >= len(log.users) or sum(counts) > len(eligible):
        raise DataError(
            f"{len(eligible)} of {len(log.users)} users have two interactions, too few to hold out {sum(counts)}. "
            "Give smaller shares, or more users."
        )
    test, valid = np.sort(drawn[: counts[0]]), np.sort(drawn[counts[0] : sum(counts)])
    train_ends = log.offsets[1:].copy()
    train_ends[test], train_ends[valid] = log.offsets[:-1][test], log.offsets[:-1][valid]
    ends = log.offsets[1:] - 1
    protocol = {"split": "cold-users", "valid_share": valid_share, "test_share": test_share, "seed": seed}
    return log.split(train_ends, ends[valid], ends[test], protocol)


class _Log:
    """Interactions as arrays over an item table; the frame is sorted by user, so a user is a run of rows."""

    def __init__(self, interactions: Interactions, items: Items) -> None:
        if len(items) < 2:
            raise DataError(
                f"The catalog has {len(items)} item, {items.ids[0]!r}, so there is nothing to choose from. "
                "Check that the item column is the right one, or give more items."
            )
        frame = interactions.frame
        self.item_ids = items.ids
        self.rows = _rows_of(frame[ITEM], items)
        runs = frame.group_by(USER, maintain_order=True).len()
        self.users: list[str] = runs[USER].to_list()
        self.offsets = np.concatenate([[0], np.cumsum(runs["len"].to_numpy().astype(np.int64))])
        self.owner = np.repeat(np.arange(len(self.users)), np.diff(self.offsets))
        self.timestamps, self.ratings = (_numbers(frame, name) for name in (TIMESTAMP, RATING))
        self.clock = None if interactions.time_unit is None else interactions.time_unit != "order"
        self.positions_decide = _positions_decide(frame)
        self.context = {name: frame[name] if name in frame.columns else None for name in (ACTION, DOMAIN)}

    def running_times(self, split: str) -> npt.NDArray[np.float64]:
        """(M,) times that never fall inside a user: an unknown one is that of the interaction before it."""
        if self.timestamps is None:
            raise DataError(
                f"The interactions have no timestamps, which the split {split!r} cuts by. "
                "Name their column with --timestamp-column, or split by leave-one-out."
            )
        times = pl.DataFrame({"user": self.owner, "time": np.nan_to_num(self.timestamps, nan=-np.inf)})
        return times.select(pl.col("time").cum_max().over("user")).to_series().to_numpy()

    def split(
        self,
        train_ends: Places,
        valid: Places,
        test: Places,
        protocol: Mapping[str, Any],
        apart: bool = False,
    ) -> Split:
        return Split(
            all_users=self.users,
            item_ids=self.item_ids,
            rows=self.rows,
            offsets=self.offsets,
            train_ends=train_ends,
            positions={"valid": valid, "test": test},
            protocol=protocol,
            timestamps=self.timestamps,
            actions=self.context[ACTION],
            domains=self.context[DOMAIN],
            ratings=self.ratings,
            apart=apart,
            clock=self.clock,
            positions_decide=self.positions_decide,
        )


def _numbers(frame: pl.DataFrame, name: str) -> npt.NDArray[np.float64] | None:
    """(M,) a column's values, NaN where one is missing; None if there is no such column."""
    if name not in frame.columns:
        return None
    return frame[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()


def _positions_decide(frame: pl.DataFrame) -> bool:
    """Whether positions ascend wherever a user has the same time twice in a row; False if there is no such place."""
    if TIMESTAMP not in frame.columns or POSITION not in frame.columns:
        return False
    tied = (pl.col(USER) == pl.col(USER).shift()) & (pl.col(TIMESTAMP) == pl.col(TIMESTAMP).shift())
    # A user of whom one position is missing is ordered without them.
    whole = pl.col(POSITION).is_not_null().all().over(USER)
    decided = whole & (pl.col(POSITION) > pl.col(POSITION).shift())
    at_ties = frame.select(tied.fill_null(False).alias("tied"), decided.fill_null(False).alias("decided"))
    at_ties = at_ties.filter("tied")
    return at_ties.height > 0 and bool(at_ties["decided"].all())


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


def _check_shares(valid_share: float, test_share: float) -> None:
    if not (valid_share > 0 and test_share > 0 and valid_share + test_share < 1):
        raise DataError(
            f"The shares are {valid_share} for validation and {test_share} for test. "
            "Both are above 0, and together they leave something for training."
        )


def _quantile(ordered: npt.NDArray[np.float64], share: float) -> float:
    """The first of the ascending values that has at least `share` of them before it, as far as ties allow."""
    return float(ordered[int(np.clip(np.floor(len(ordered) * share + 1e-9), 0, len(ordered) - 1))])


def _moment(seconds: Sequence[float] | npt.NDArray[np.float64]) -> str:
    return ", ".join(f"{value:.0f}" for value in seconds)
