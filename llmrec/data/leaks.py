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
_BASE = 0xD1342543DE82EF95  # of hashes of runs; odd, so that it has an inverse modulo 2^64
_VARIED = 3  # different items that a sequence must hold to be called a copy; fewer, again and again, are a habit


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
        (interactions that repeat an earlier one of the same user with the same item and known time), doubled_users
        (whose second half equals the first, or who have every interaction twice in a row, with 3 different items or
        more), doubled_share (of the users with 6 interactions or more).
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
        **_doubled(split),
    }


def overlap(split: Split, part: Part = "test") -> dict[str, Any]:
    """Targets that occur in the same user's training sequence, set against how usual repeats are in this log.

    Where users do take items again, such targets are natural. The rate to expect is the larger of two shares: of all
    interactions that are targets of neither part, and of those of them that are the last before each target (whose
    pasts are as long as training), each of those that repeat one in the user's past. No target of either part counts
    there, for a leak would set its own standard.

    Returns:
        JSON-ready: cases, in_training (targets), share, expected_share, p_value (binomial, one-sided: that many or
        more at the expected rate; None without cases), examples (at most 5: user, item, the time or None).
    """
    positions, owner = split.positions[part], split.case_users(part)
    first = first_places(split)
    again = first != np.arange(len(first))
    leaked = again[positions] & (first[positions] < split.train_ends[owner])
    expected = _usual(split, again, positions)
    count = int(leaked.sum())
    return {
        "cases": len(positions),
        "in_training": count,
        "share": count / max(1, len(positions)),
        "expected_share": expected,
        "p_value": _p_value(count, len(positions), expected),
        "examples": _examples(split, positions[leaked]),
    }


def history_overlap(split: Split, part: Part = "test") -> dict[str, Any]:
    """Targets that occur anywhere before in the same user's sequence, and those that repeat the item just before.

    A copy of the target may lie behind the end of training: at the place of validation, or in the history of a user
    who has no training. Only cases with at most one other target between the last interaction that is none and their
    own are looked at, since the pasts of later ones are longer than those that tell what is usual (`overlap`).

    Returns:
        JSON-ready: cases (those looked at), and for in_history and just_before each targets, share, expected_share,
        p_value (binomial, one-sided, None without cases); examples (at most 5, those of just_before first).
    """
    positions = split.positions[part]
    positions = positions[positions - _last_free(split)[positions] <= 2]
    first, places = first_places(split), np.arange(len(split.rows))
    just_before = np.append(False, split.rows[1:] == split.rows[:-1]) & (places != split.offsets[split.owner])
    found: dict[str, Any] = {"cases": len(positions)}
    for name, mask in (("in_history", first != places), ("just_before", just_before)):
        count, expected = int(mask[positions].sum()), _usual(split, mask, positions)
        found[name] = {
            "targets": count,
            "share": count / max(1, len(positions)),
            "expected_share": expected,
            "p_value": _p_value(count, len(positions), expected),
        }
    repeated = positions[(first != places)[positions]]
    shown = repeated[np.argsort(~just_before[repeated], kind="stable")]
    return {**found, "examples": _examples(split, shown)}


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

    None, too, if the times are no clock, but numbers that begin anew with every user: most users begin at the smallest
    one, and no user has one twice in a row.

    Returns:
        JSON-ready: cases (those whose time is known), later_share_mean and later_share_median (over the cases, of the
        training interactions of other users with known times those that are later than the target), later_item_share
        (of the cases whose item is in training with a known time, those whose item's first such interaction, by
        anyone, is later than the target).
    """
    if split.timestamps is None or _counted_per_user(split):
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
    """Users whose sequence equals that of an earlier user: bots, test accounts, or a log that was joined twice.

    Whole sequences are compared, and sequences less their first or their last item, in any combination, as long as 5
    interactions or more are equal: a copy that lacks the last item holds the very history of a test case. Long and
    near ones must hold 3 different items; two users who take one item again and again are no copies.

    Returns:
        JSON-ready: users (whose whole sequence equals an earlier one), long_users (of these, those with 5 interactions
        or more, of 3 items or more), near_users (others, with all but the first or the last item in common with an
        earlier user, likewise), long_share and near_share (of the users with 5 or more), examples (at most 5 pairs of
        user ids, long ones first, then near ones).
    """
    lengths = np.diff(split.offsets)
    starts, ends = split.offsets[:-1], split.offsets[1:]
    every = np.arange(len(lengths))
    user, first, items = _twins(split, every, starts, ends, 1)
    long = (lengths[user] >= _LONG) & (items >= _VARIED)
    whole, other, varied = _twins(
        split,
        np.tile(every, 3),
        np.concatenate([starts, starts + 1, starts]),
        np.concatenate([ends, ends, ends - 1]),
        _LONG,
    )
    near = np.isin(whole, user, invert=True) & (varied >= _VARIED)
    near_user, chosen = np.unique(whole[near], return_index=True)
    near_first = other[near][chosen]
    order = np.argsort(~long, kind="stable")
    enough = int(long.sum())
    pairs = [
        *zip(first[order][:enough].tolist(), user[order][:enough].tolist(), strict=True),
        *zip(near_first.tolist(), near_user.tolist(), strict=True),
        *zip(first[order][enough:].tolist(), user[order][enough:].tolist(), strict=True),
    ]
    return {
        "users": len(user),
        "long_users": enough,
        "near_users": len(near_user),
        "long_share": enough / max(1, int((lengths >= _LONG).sum())),
        "near_share": len(near_user) / max(1, int((lengths >= _LONG).sum())),
        "examples": [[split.all_users[a], split.all_users[b]] for a, b in pairs[:_EXAMPLES]],
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


def _last_free(split: Split) -> Places:
    """(M,) the last place before each one that is a target of neither part, -1 if there is none in the whole log."""
    free = np.arange(len(split.rows))
    for positions in split.positions.values():
        free[positions] = -1
    return np.append(-1, np.maximum.accumulate(free)[:-1]) if len(free) else free


def _usual(split: Split, mask: npt.NDArray[np.bool_], positions: Places) -> float:
    """The share of the mask to expect at these targets, from what no part asks for (see `overlap`)."""
    elsewhere = np.arange(len(split.rows)) != split.offsets[split.owner]
    for targets in split.positions.values():
        elsewhere[targets] = False
    before = _last_free(split)[positions]
    before = before[before > split.offsets[split.owner[positions]]]
    return max(_share(mask[elsewhere]), _share(mask[before]))


def _p_value(count: int, cases: int, expected: float) -> float | None:
    from scipy.stats import binomtest

    return float(binomtest(count, cases, expected, "greater").pvalue) if cases else None


def _counted_per_user(split: Split) -> bool:
    """Whether times are no clock and begin anew with every user, so that two users' cannot be compared."""
    times = split.timestamps
    if split.clock or times is None or not np.isfinite(times).any():
        return False
    begins = times[split.offsets[:-1][np.diff(split.offsets) > 0]]
    tied = np.append(False, times[1:] == times[:-1]) & (np.arange(len(times)) != split.offsets[split.owner])
    return len(begins) > 1 and not tied.any() and bool(np.mean(begins == np.nanmin(times)) > 0.5)


def _exact_copies(split: Split) -> int:
    if split.timestamps is None:
        return 0
    again = np.flatnonzero(np.isfinite(split.timestamps) & (np.diff(split.offsets)[split.owner] > 1))
    table = pl.DataFrame({"user": split.owner[again], "item": split.rows[again], "time": split.timestamps[again]})
    return len(again) - table.n_unique()


def _doubled(split: Split) -> dict[str, Any]:
    """Users who are there twice over: abcabc or aabbcc. A few items in turn (ababab) are a habit."""
    lengths = np.diff(split.offsets)
    places = np.arange(len(split.rows))
    within, half = places - split.offsets[split.owner], lengths[split.owner] // 2
    even = (lengths >= 2 * _VARIED) & (lengths % 2 == 0)
    doubled = np.zeros(len(lengths), dtype=bool)
    for copy in (np.where(within < half, places + half, places), np.where(within % 2 == 0, places + 1, places)):
        differ = split.rows[np.where(even[split.owner], copy, places)] != split.rows
        doubled |= even & (np.bincount(split.owner[differ], minlength=len(lengths)) == 0)
    fresh = first_places(split) == places
    doubled &= np.bincount(split.owner[fresh], minlength=len(lengths)) >= _VARIED
    count = int(doubled.sum())
    return {"doubled_users": count, "doubled_share": count / max(1, int((lengths >= 2 * _VARIED).sum()))}


def _twins(split: Split, user: Places, starts: Places, ends: Places, least: int) -> tuple[Places, Places, Places]:
    """Users of runs rows[start:end] of `least` interactions or more that equal a run of an earlier user.

    Returns:
        The users, the first user with the run of each, and how many different items the run has. A user may be there
        more than once. Hashes find the pairs, and the items decide.
    """
    # P(x), the sum over places up to x of a hash of the item times base^place, modulo 2^64. What a run adds to it,
    # over base^start, does not depend on where the run stands.
    powers, inverses = (
        np.cumprod(np.append(np.uint64(1), np.full(len(split.rows), base, dtype=np.uint64)), dtype=np.uint64)
        for base in (_BASE, pow(_BASE, -1, 2**64))
    )
    hashes = _mixed((split.rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    sums = np.append(np.uint64(0), np.cumsum(hashes * powers[:-1], dtype=np.uint64))
    enough = ends - starts >= least
    user, starts, ends = user[enough], starts[enough], ends[enough]
    runs = pl.DataFrame(
        {
            "user": user,
            "start": starts,
            "length": ends - starts,
            "print": (sums[ends] - sums[starts]) * inverses[starts],
        }
    ).sort("user", maintain_order=True)
    earliest = [pl.col(name).first().over("length", "print").alias(f"first {name}") for name in ("user", "start")]
    pairs = runs.with_columns(earliest).filter(pl.col("user") != pl.col("first user"))
    late, early, start, other, length = (
        pairs[name].to_numpy().astype(np.int64) for name in ("user", "first user", "start", "first start", "length")
    )
    pair, within = _inside(length)
    items = split.rows[start[pair] + within]
    same = np.bincount(pair[items != split.rows[other[pair] + within]], minlength=len(late)) == 0
    different = np.unique(pair * split.num_items + items) // split.num_items
    varied = np.bincount(different, minlength=len(late))
    return late[same], early[same], varied[same]


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Splitmix64's last steps: nearby numbers come out far apart."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _inside(lengths: Places) -> tuple[Places, Places]:
    """For every place of runs of these lengths, one run after another: the run's number, and the place in it."""
    ends = np.cumsum(lengths)
    return np.repeat(np.arange(len(lengths)), lengths), np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)


def _share(mask: npt.NDArray[Any]) -> float:
    return float(np.mean(mask)) if len(mask) else 0.0
