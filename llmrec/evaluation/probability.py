"""Metrics of predictions with labels, as click-through models make them: AUC, user-AUC, log-loss, calibration.

I impressions, each with a label 0 or 1 and a score, higher being likelier; log-loss and calibration need the score to
be a probability.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import DataError

Vector = npt.NDArray[np.float64]

_CLIP = 1e-7  # near the least distance to 1 that float32 knows


@dataclass(frozen=True)
class UserAUC:
    """AUC inside every user who has both labels, E users of all U.

    Attributes:
        users: (E,) the users, ascending.
        values: (E,) the AUC of each, tied pairs counting half.
        impressions: (E,) of each.
        all_users: U.
        all_impressions: I.
    """

    users: npt.NDArray[Any] = field(repr=False)
    values: Vector = field(repr=False)
    impressions: npt.NDArray[np.int64] = field(repr=False)
    all_users: int
    all_impressions: int

    @property
    def mean(self) -> float:
        """UAUC, every user counting once."""
        return float(self.values.mean())

    @property
    def weighted(self) -> float:
        """GAUC, users weighted by impressions (Zhou et al. 2018, "Deep interest network", equation 7)."""
        return float(self.values @ self.impressions / self.impressions.sum())

    @property
    def skipped_users(self) -> float:
        """The share of users left out, whose impressions all have one label."""
        return 1 - len(self.users) / self.all_users

    @property
    def skipped_impressions(self) -> float:
        """The share of impressions left out with them."""
        return 1 - int(self.impressions.sum()) / self.all_impressions


@dataclass(frozen=True)
class Calibration:
    """The table behind a reliability plot: b bins that hold a prediction, by rising probability.

    Attributes:
        low, high: (b,) bounds of each bin; one holds low ≤ probability < high, and the last also its high.
        counts: (b,) predictions.
        predicted: (b,) their mean probability.
        observed: (b,) the share of label 1 among them.
    """

    low: Vector = field(repr=False)
    high: Vector = field(repr=False)
    counts: npt.NDArray[np.int64] = field(repr=False)
    predicted: Vector = field(repr=False)
    observed: Vector = field(repr=False)

    @property
    def error(self) -> float:
        """The expected calibration error: the mean of |observed - predicted|, bins weighted by predictions."""
        return float(np.abs(self.observed - self.predicted) @ self.counts / self.counts.sum())


def auc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """The share of pairs of label 1 and label 0 that the scores order rightly, tied pairs counting half.

    Raises:
        DataError: if shapes disagree, labels are not both 0 and 1, or a score is NaN.

    >>> auc([1, 0, 0, 1], [0.9, 0.1, 0.4, 0.4])
    0.875
    """
    known, given = _checked(labels, scores)
    if known.all() or not known.any():
        raise DataError(
            f"All {len(known)} labels are {int(known[0])}, so there are no pairs to order. Evaluate on both labels."
        )
    return float(user_auc(known, given, np.zeros(len(known), dtype=np.int64)).values[0])


def user_auc(labels: npt.ArrayLike, scores: npt.ArrayLike, users: npt.ArrayLike) -> UserAUC:
    """AUC among each user's own impressions, which is what a ranking shown to that user depends on.

    Args:
        labels: (I,) 0 or 1.
        scores: (I,) numbers; they need not be comparable between users.
        users: (I,) whose impression it is: anything of which equal values mean one user.

    Raises:
        DataError: if shapes disagree, a label is not 0 or 1, a score is NaN, or no user has both labels.

    >>> found = user_auc([1, 0, 1, 0, 1], [0.9, 0.1, 0.2, 0.2, 0.5], users=["a", "a", "b", "b", "c"])
    >>> found.values.tolist(), found.mean, round(found.skipped_users, 4)
    ([1.0, 0.5], 0.75, 0.3333)
    """
    known, given = _checked(labels, scores)
    if np.shape(users) != known.shape:
        raise DataError(f"{np.shape(users)} users do not fit {len(known)} labels. Give one user per impression.")
    names, owner, sizes = np.unique(np.asarray(users), return_inverse=True, return_counts=True)
    owner = owner.reshape(-1)
    order = np.lexsort((given, owner))
    ordered_owner, ordered_score, ordered_label = owner[order], given[order], known[order]
    # A run of equal scores inside a user shares the mean of the run's places, from 1: a tied pair counts half.
    new = np.ones(len(order), dtype=np.bool_)
    new[1:] = (ordered_owner[1:] != ordered_owner[:-1]) | (ordered_score[1:] != ordered_score[:-1])
    begin = np.flatnonzero(new)
    length = np.diff(np.append(begin, len(order)))
    place = np.repeat(begin + (length + 1) / 2, length) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    positive = np.bincount(owner[known], minlength=len(names))
    negative = sizes - positive
    rank_sum = np.bincount(ordered_owner[ordered_label], weights=place[ordered_label], minlength=len(names))
    both = np.flatnonzero((positive > 0) & (negative > 0))
    if not len(both):
        raise DataError(
            f"None of {len(names)} users has both labels, so none has an AUC. Evaluate on more impressions per user."
        )
    pairs = positive[both] * negative[both]
    values = (rank_sum[both] - positive[both] * (positive[both] + 1) / 2) / pairs
    return UserAUC(names[both], values, sizes[both].astype(np.int64), len(names), len(known))


def log_loss(labels: npt.ArrayLike, probabilities: npt.ArrayLike, clip: float = _CLIP) -> float:
    """The mean of -ln of the probability given to the label that came, in nats.

    Probabilities are clipped to [clip, 1 - clip] first, because one certain error would make the mean infinite.

    Raises:
        DataError: if shapes disagree, a label is not 0 or 1, a probability is outside [0, 1], or `clip` outside
            (0, 0.5).

    >>> round(log_loss([1, 0], [0.5, 0.75]), 6)  # (ln 2 + ln 4) / 2
    1.039721
    """
    known, given = _checked(labels, probabilities, bounded=True)
    if not 0 < clip < 0.5:
        raise DataError(f"Probabilities cannot be clipped by {clip}. Give a number above 0 and below 0.5.")
    kept = np.clip(given, clip, 1 - clip)
    return float(-np.where(known, np.log(kept), np.log1p(-kept)).mean())


def calibration(
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    bins: int = 10,
    by: Literal["width", "mass"] = "width",
) -> Calibration:
    """Compares predicted probabilities with observed shares, bin by bin (Naeini et al. 2015; Guo et al. 2017).

    Args:
        labels: (I,) 0 or 1.
        probabilities: (I,) of label 1.
        bins: how many, at most: bins without a prediction are left out.
        by: "width": bins of equal width on [0, 1]; "mass": bounds at the quantiles, so that bins hold about equally
            many predictions, which click probabilities near 0 need. Equal probabilities are never divided.

    Raises:
        DataError: if shapes disagree, a label is not 0 or 1, a probability is outside [0, 1], `bins` is below 1, or
            `by` is not known.

    >>> table = calibration([0, 0, 1, 1], [0.1, 0.2, 0.2, 0.9], bins=2)
    >>> table.counts.tolist(), table.observed.round(4).tolist(), round(table.error, 4)
    ([3, 1], [0.3333, 1.0], 0.15)
    """
    known, given = _checked(labels, probabilities, bounded=True)
    if bins < 1 or by not in ("width", "mass"):
        raise DataError(f"{bins} bins by {by!r} cannot be made. Give 1 or more, by 'width' or by 'mass'.")
    shares = np.arange(bins + 1) / bins
    edges: Vector = shares if by == "width" else np.quantile(given, shares).astype(np.float64)
    place = np.searchsorted(edges[1:-1], given, side="right")
    counts = np.bincount(place, minlength=bins)
    held = np.flatnonzero(counts)
    return Calibration(
        edges[held],
        edges[held + 1],
        counts[held].astype(np.int64),
        np.bincount(place, weights=given, minlength=bins)[held] / counts[held],
        np.bincount(place, weights=known, minlength=bins)[held] / counts[held],
    )


def _checked(
    labels: npt.ArrayLike, scores: npt.ArrayLike, bounded: bool = False
) -> tuple[npt.NDArray[np.bool_], Vector]:
    known, given = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if known.ndim != 1 or known.shape != given.shape or not len(known):
        raise DataError(
            f"Labels have the shape {known.shape} and scores {given.shape}. Give one of each per impression, and at "
            "least one impression."
        )
    other = known[(known != 0) & (known != 1)]
    if len(other):
        raise DataError(f"{len(other)} label(s) are neither 0 nor 1, such as {other[0]}. Turn ratings into 0 and 1.")
    wrong = np.flatnonzero(~((given >= 0) & (given <= 1)) if bounded else np.isnan(given))
    if len(wrong):
        what = "no probabilities" if bounded else "NaN"
        raise DataError(
            f"{len(wrong)} score(s) are {what}, such as {given[wrong[0]]} of impression {wrong[0]}. "
            f"{'Apply the sigmoid to scores, or' if bounded else 'Mend the model, or'} leave out such impressions."
        )
    return known.astype(np.bool_), given
