"""What a test gives away: targets that training holds, others' future, users twice, and what only the test knows."""

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from llmrec.data.columns import ITEM, USER
from llmrec.data.interactions import Interactions
from llmrec.data.split import Part, Places, Split

_EXAMPLES = 5
_LONG = 5  # interactions; two users are easily alike in fewer


def first_places(split: Split) -> Places:
    """(M,) the place of the first interaction of the same user with the same item, which may be the row itself."""
    keys = split.owner * split.num_items + split.rows
    _, first, number = np.unique(keys, return_index=True, return_inverse=True)
    places: Places = first[number].astype(np.int64)
    return places


def repeats(split: Split) -> dict[str, Any]:
    """How often users take what they took before.

    Returns:
        JSON-ready: repeated_pairs (distinct user-item pairs that occur more than once), repeated_pair_share (of the
        distinct pairs), repeated_share (of the interactions after a user's first, those of an item in the user's own
        past), immediate_share (of the same, those of the item just before), test_in_history_share, exact_copies
        (interactions that repeat an earlier one of the same user with the same item and known time).
    """
    first = first_places(split)
    again = first != np.arange(len(first))
    later = np.arange(len(first)) != split.offsets[split.owner]
    immediate = np.append(False, split.rows[1:] == split.rows[:-1]) & later if len(first) else later
    counts = np.bincount(first, minlength=1)
    distinct = int((counts > 0).sum())
    return {
        "repeated_pairs": int((counts > 1).sum()),
        "repeated_pair_share": int((counts > 1).sum()) / max(1, distinct),
        "repeated_share": _share(again[later]),
        "immediate_share": _share(immediate[later]),
        "test_in_history_share": _share(again[split.positions["test"]]),
        "exact_copies": _exact_copies(split),
    }


def overlap(split: Split, part: Part = "test") -> dict[str, Any]:
    """Targets that occur in the same user's training sequence, set against how usual repeats are in this log.

    Where users do take items again, such targets are natural. The rate to expect is the larger of two shares: of all
    interactions that are no targets of this part, and of those just before its targets (whose pasts are as long), each
    of those that repeat one in the user's past.

    Returns:
        JSON-ready: cases, in_training (targets), share, expected_share, p_value (binomial, one-sided: that many or
        more at the expected rate; None without cases), examples (at most 5: user, item, the time or None).
    """
    from scipy.stats import binomtest

    positions, owner = split.positions[part], split.case_users(part)
    first = first_places(split)
    again = first != np.arange(len(first))
    leaked = again[positions] & (first[positions] < split.train_ends[owner])
    elsewhere = np.arange(len(first)) != split.offsets[split.owner]
    elsewhere[positions] = False
    before = positions[positions > split.offsets[owner]] - 1
    expected = max(_share(again[elsewhere]), _share(again[before]))
    count = int(leaked.sum())
    p_value = float(binomtest(count, len(positions), expected, "greater").pvalue) if len(positions) else None
    return {
        "cases": len(positions),
        "in_training": count,
        "share": count / max(1, len(positions)),
        "expected_share": expected,
        "p_value": p_value,
        "examples": _examples(split, positions[leaked]),
    }


def seen_overlap(split: Split, seen: Interactions, part: Part = "test") -> dict[str, Any]:
    """Targets that occur, as pairs of user and item, in what a model was trained on.

    A pair that is in the user's own past, too, the model may know from there; `unexplained` leaves those out.

    Args:
        seen: what the model was trained on.

    Returns:
        JSON-ready: interactions (of seen), users_in_common, cases, in_seen, unexplained, share (unexplained per case),
        examples (at most 5, unexplained).
    """
    positions = split.positions[part]
    again = first_places(split)[positions] != positions
    users, items = pl.Series(split.all_users, dtype=pl.String), pl.Series(split.item_ids, dtype=pl.String)
    cases = pl.DataFrame(
        {USER: users.gather(split.case_users(part)), ITEM: items.gather(split.targets(part)), "place": positions}
    )
    pairs = seen.frame.select(pl.col(USER).cast(pl.String), pl.col(ITEM).cast(pl.String)).unique()
    hit = np.isin(positions, cases.join(pairs, on=[USER, ITEM], how="semi")["place"].to_numpy())
    unexplained = hit & ~again
    return {
        "interactions": len(seen),
        "users_in_common": int(users.is_in(pairs[USER].unique().implode()).sum()),
        "cases": len(positions),
        "in_seen": int(hit.sum()),
        "unexplained": int(unexplained.sum()),
        "share": _share(unexplained),
        "examples": _examples(split, positions[unexplained]),
    }


def look_ahead(split: Split) -> dict[str, Any] | None:
    """How much of other users' future training holds, seen from each test case; None without timestamps or cases.

    Returns:
        JSON-ready: cases (those whose time is known), later_share_mean and later_share_median (over the cases, of the
        training interactions of other users with known times those that are later than the target), later_item_share
        (of the cases whose item is in training with a known time, those whose item's first such interaction, by
        anyone, is later than the target).
    """
    if split.timestamps is None:
        return None
    times, positions = split.timestamps, split.positions["test"]
    positions = positions[np.isfinite(times[positions])]
    training = np.flatnonzero(split.in_training & np.isfinite(times))
    if not len(positions) or not len(training):
        return None
    moments = np.unique(times[training])
    moment = np.searchsorted(moments, times[training])
    # Training interactions up to a moment, of everyone and of the user alone, by binary search in sorted numbers.
    here = np.searchsorted(moments, times[positions], side="right")
    owner = split.owner[positions]
    own = np.sort(split.owner[training] * (len(moments) + 1) + moment)
    starts = np.searchsorted(own, owner * (len(moments) + 1))
    ends = np.searchsorted(own, (owner + 1) * (len(moments) + 1))
    own_later = ends - np.searchsorted(own, owner * (len(moments) + 1) + here)
    later = len(training) - np.searchsorted(np.sort(moment), here) - own_later
    others = len(training) - (ends - starts)
    shares = later[others > 0] / others[others > 0]
    first = np.full(split.num_items, np.inf)
    np.minimum.at(first, split.rows[training], times[training])
    known = np.isfinite(first[split.rows[positions]])
    return {
        "cases": len(positions),
        "later_share_mean": float(shares.mean()) if len(shares) else 0.0,
        "later_share_median": float(np.median(shares)) if len(shares) else 0.0,
        "later_item_share": _share((first[split.rows[positions]] > times[positions])[known]),
    }


def equal_users(split: Split) -> dict[str, Any]:
    """Users whose whole sequence equals that of an earlier user: bots, test accounts, or a log that was joined twice.

    Returns:
        JSON-ready: users (those with such an earlier one), long_users (those with 5 interactions or more), long_share
        (of the users with 5 or more), examples (at most 5 pairs of user ids, long ones first).
    """
    lengths = np.diff(split.offsets)
    within = (np.arange(len(split.rows)) - split.offsets[split.owner]).astype(np.uint64)
    mixed = _mixed(split.rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ _mixed(within))
    sums = np.append(np.uint64(0), np.cumsum(mixed, dtype=np.uint64))
    prints = sums[split.offsets[1:]] - sums[split.offsets[:-1]]
    table = pl.DataFrame({"length": lengths, "print": prints}).with_row_index("user")
    table = table.filter(pl.col("length") > 0).with_columns(
        pl.col("user").min().over("length", "print").alias("first")
    )
    twins = table.filter(pl.col("user") != pl.col("first"))
    user, first = twins["user"].to_numpy().astype(np.int64), twins["first"].to_numpy().astype(np.int64)
    same = _really_equal(split, user, first)
    user, first = user[same], first[same]
    long = lengths[user] >= _LONG
    shown = np.argsort(~long, kind="stable")[:_EXAMPLES]
    return {
        "users": len(user),
        "long_users": int(long.sum()),
        "long_share": int(long.sum()) / max(1, int((lengths >= _LONG).sum())),
        "examples": [[split.all_users[first[k]], split.all_users[user[k]]] for k in shown.tolist()],
    }


def unseen(split: Split) -> dict[str, Any]:
    """Users and items that training lacks.

    Returns:
        JSON-ready: items_only_in_test, items_only_in_valid_or_test (those that occur, but not in training),
        test_cases_of_unseen_items, cold_users (with a test or validation case and no training),
        test_cases_of_cold_users.
    """
    elsewhere = np.zeros(split.num_items, dtype=bool)
    elsewhere[split.rows] = True
    outside = elsewhere & (split.train_counts == 0)
    not_test = np.ones(len(split.rows), dtype=bool)
    not_test[split.positions["test"]] = False
    before = np.zeros(split.num_items, dtype=bool)
    before[split.rows[not_test]] = True
    asked = np.unique(np.concatenate([split.case_users("valid"), split.case_users("test")]))
    cold = split.train_ends == split.offsets[:-1]
    return {
        "items_only_in_test": int((outside & ~before).sum()),
        "items_only_in_valid_or_test": int(outside.sum()),
        "test_cases_of_unseen_items": int(split.unseen_items("test").sum()),
        "cold_users": int(cold[asked].sum()),
        "test_cases_of_cold_users": int(split.unseen_users("test").sum()),
    }


def _examples(split: Split, positions: Places) -> list[dict[str, Any]]:
    times = split.timestamps
    return [
        {
            "user": split.all_users[split.owner[place]],
            "item": split.item_ids[split.rows[place]],
            "time": None if times is None or np.isnan(times[place]) else float(times[place]),
        }
        for place in positions[:_EXAMPLES].tolist()
    ]


def _exact_copies(split: Split) -> int:
    if split.timestamps is None:
        return 0
    again = np.flatnonzero(np.isfinite(split.timestamps) & (np.diff(split.offsets)[split.owner] > 1))
    table = pl.DataFrame({"user": split.owner[again], "item": split.rows[again], "time": split.timestamps[again]})
    return len(again) - table.n_unique()


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Splitmix64's last steps: nearby numbers come out far apart."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _really_equal(split: Split, user: Places, first: Places) -> npt.NDArray[np.bool_]:
    """For every pair of users of equal length, whether their sequences are the same: what the sums only suggest."""
    lengths = np.diff(split.offsets)[user]
    ends = np.cumsum(lengths)
    within = np.arange(int(lengths.sum())) - np.repeat(ends - lengths, lengths)
    pair = np.repeat(np.arange(len(user)), lengths)
    differ = split.rows[split.offsets[user][pair] + within] != split.rows[split.offsets[first][pair] + within]
    same: npt.NDArray[np.bool_] = np.bincount(pair[differ], minlength=len(user)) == 0
    return same


def _share(mask: npt.NDArray[Any]) -> float:
    return float(np.mean(mask)) if len(mask) else 0.0
