"""Uncertainty: what a figure, or the difference of two, owes to the users that happened to be sampled, and to seeds.

The unit is the user. A user's cases resemble each other, so they are drawn together or not at all; treating them as
independent makes intervals too narrow. Nothing here knows of training: intervals and tests of one seed are about these
trained models, and `over_seeds` is about training.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import DataError

Table = npt.NDArray[np.float64]

_CHUNK_BYTES = 32 * 2**20  # of the weights of the resamples that are multiplied at once


@dataclass(frozen=True)
class Interval:
    """Means of M metrics with the bounds of their 95 % intervals, (M,) each."""

    mean: Table
    low: Table
    high: Table


@dataclass(frozen=True)
class Difference:
    """Means of M paired differences with the bounds of their 95 % intervals and two-sided p-values, (M,) each."""

    mean: Table
    low: Table
    high: Table
    p_value: Table


def bootstrap_means(values: npt.ArrayLike, users: npt.ArrayLike, resamples: int = 1000, seed: int = 0) -> Interval:
    """The mean over cases of every metric, with a 95 % percentile interval of a bootstrap over users.

    A resample draws as many users as there are, with replacement, each with all cases; its mean is the sum of its
    cases' values by the number of its cases (Efron and Tibshirani 1993, chapters 8 and 13). All metrics see the same
    resamples. An interval of very few users is too narrow; that of one has no width and says nothing.

    Args:
        values: (C, M) every case's value of every metric.
        users: (C,) whose case it is: anything of which equal values mean one user.
        resamples: how many.
        seed: of the draws.

    Raises:
        DataError: if shapes disagree, there are no cases, a value is not finite, or `resamples` is below 1.

    >>> found = bootstrap_means([[1.0], [0.0], [0.0], [1.0]], users=[7, 7, 8, 9], resamples=200)
    >>> found.mean.tolist(), found.low.tolist(), found.high.tolist()
    ([0.5], [0.0], [1.0])
    """
    sums, cases = _by_user(values, users, resamples)
    return Interval(sums.sum(axis=0) / cases.sum(), *_percentiles(sums, cases, resamples, seed))


def paired_difference(
    a: npt.ArrayLike, b: npt.ArrayLike, users: npt.ArrayLike, resamples: int = 1000, seed: int = 0
) -> Difference:
    """The mean of `a` minus `b` over the same cases, with a 95 % bootstrap interval over users and a p-value.

    The p-value is of a randomisation test (Fisher 1935; Smucker, Allan and Carterette 2007 for ranking metrics). Its
    null is that the two systems are exchangeable on every user: swapping which of them answered all cases of a user is
    as likely as not. Under it, each user's summed difference has a random sign; p is the share of `resamples` random
    assignments of signs, with the observed one counted as one more, whose mean is at least as far from 0 as observed.
    It is therefore never below 1 / (resamples + 1), and 1 if the systems do not differ. It is about these two trained
    systems, not about two methods.

    Args:
        a: (C, M) every case's value of every metric of one system.
        b: (C, M) the other's, case by case.
        users: (C,) whose case it is.
        resamples: of the bootstrap, and of the test.
        seed: of both; the bootstrap draws what `bootstrap_means` draws with it.

    Raises:
        DataError: if shapes disagree, there are no cases, a value is not finite, or `resamples` is below 1.

    >>> found = paired_difference([[1.0], [1.0], [0.0]], [[0.0], [0.0], [0.0]], users=[0, 1, 2], resamples=200)
    >>> found.mean.round(4).tolist(), bool(0.4 < found.p_value[0] < 0.6)
    ([0.6667], True)
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise DataError(
            f"The systems' values have the shapes {first.shape} and {second.shape}, so cases cannot be paired. "
            "Evaluate both on the same cases and metrics."
        )
    sums, cases = _by_user(first - second, users, resamples)
    total = sums.sum(axis=0)
    # Flips that give the observed mean in another order of summation must count as equal to it.
    observed = np.abs(total) - 1e-12 * np.abs(sums).sum(axis=0)
    rng = np.random.default_rng((seed, 1))
    extreme = np.zeros(sums.shape[1], dtype=np.int64)
    for size in _chunks(resamples, len(sums)):
        kept = np.stack([rng.integers(0, 2, size=len(sums), dtype=np.bool_) for _ in range(size)])
        flipped = 2 * (kept.astype(np.float64) @ sums) - total
        extreme += np.count_nonzero(np.abs(flipped) >= observed, axis=0)
    low, high = _percentiles(sums, cases, resamples, seed)
    return Difference(total / cases.sum(), low, high, (extreme + 1) / (resamples + 1))


def holm(p_values: npt.ArrayLike) -> Table:
    """P-values (T,) corrected for T tests: below α with a chance of at most α if no null is false (Holm 1979).

    The i-th smallest (from 0) is multiplied by T - i, is at least as large as the one before, and at most 1.

    Raises:
        DataError: if a value is no number from 0 to 1.

    >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
    [0.03, 0.06, 0.06]
    """
    given = np.asarray(p_values, dtype=np.float64).reshape(-1)
    wrong = given[~((given >= 0) & (given <= 1))]
    if len(wrong):
        raise DataError(f"A p-value is {wrong[0]}, which is no probability. Give numbers from 0 to 1.")
    order = np.argsort(given, kind="stable")
    stepped = np.maximum.accumulate(given[order] * np.arange(len(given), 0, -1))
    corrected = np.empty_like(given)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


def over_seeds(values: npt.ArrayLike) -> tuple[float, float | None]:
    """The mean over training seeds and the sample's standard deviation (S - 1); None for one seed, which has none.

    Raises:
        DataError: if there are no values, or one is not finite.

    >>> over_seeds([0.25, 0.5, 0.75]), over_seeds([0.1])
    ((0.5, 0.25), (0.1, None))
    """
    given = np.asarray(values, dtype=np.float64).reshape(-1)
    if not len(given) or not np.isfinite(given).all():
        raise DataError(f"The seeds' values are {given.tolist()}. Give one finite number per seed.")
    return float(given.mean()), float(given.std(ddof=1)) if len(given) > 1 else None


def _by_user(values: npt.ArrayLike, users: npt.ArrayLike, resamples: int) -> tuple[Table, Table]:
    """The sums (U, M) of every user's values, and the number (U,) of the user's cases."""
    table, owner = np.asarray(values, dtype=np.float64), np.asarray(users)
    if table.ndim != 2 or owner.shape != table.shape[:1]:
        raise DataError(
            f"Values have the shape {table.shape} and users {owner.shape}. Give values as (cases, metrics) and one "
            "user per case."
        )
    if not len(table):
        raise DataError("There are no cases, so nothing can be resampled. Evaluate at least one user.")
    if resamples < 1:
        raise DataError(f"{resamples} resamples have no quantiles. Give 1 or more; 1,000 are usual.")
    wrong = np.argwhere(~np.isfinite(table))
    if len(wrong):
        case, metric = wrong[0].tolist()
        raise DataError(
            f"{len(wrong)} value(s) are not finite, such as {table[case, metric]} of case {case} in column {metric}. "
            "Leave out cases without a value."
        )
    _, place, cases = np.unique(owner, return_inverse=True, return_counts=True)
    order = np.argsort(place.reshape(-1), kind="stable")
    sums = np.add.reduceat(table[order], np.cumsum(cases) - cases, axis=0)
    return sums, cases.astype(np.float64)


def _percentiles(sums: Table, cases: Table, resamples: int, seed: int) -> tuple[Table, Table]:
    """The 2.5 % and 97.5 % quantiles (M,) of the resampled ratios of sums."""
    num_users = len(sums)
    rng = np.random.default_rng(seed)
    both = np.concatenate([sums, cases[:, None]], axis=1)
    means = []
    for size in _chunks(resamples, num_users):
        drawn = [np.bincount(rng.integers(num_users, size=num_users), minlength=num_users) for _ in range(size)]
        resampled = np.stack(drawn).astype(np.float64) @ both
        means.append(resampled[:, :-1] / resampled[:, -1:])
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975], axis=0)
    return low, high


def _chunks(resamples: int, num_users: int) -> list[int]:
    """Sizes that add up to `resamples`, so small that the weights of a chunk fit into `_CHUNK_BYTES`."""
    size = max(1, _CHUNK_BYTES // (16 * num_users))
    return [min(size, resamples - start) for start in range(0, resamples, size)]
