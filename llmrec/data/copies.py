"""What a log holds twice: interactions, halves of users, and users."""

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from llmrec.data.split import Places, Split

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


def exact_copies(split: Split) -> int:
    if split.timestamps is None:
        return 0
    again = np.flatnonzero(np.isfinite(split.timestamps) & (np.diff(split.offsets)[split.owner] > 1))
    table = pl.DataFrame({"user": split.owner[again], "item": split.rows[again], "time": split.timestamps[again]})
    return len(again) - table.n_unique()


def doubled(split: Split) -> dict[str, Any]:
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
