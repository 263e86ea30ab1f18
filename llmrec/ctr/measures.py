"""What is said of a ranking model's probabilities: how well they order, how true they are, and how sure that is.

I cases of U users, K labels.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec.ctr.rows import MISSING
from llmrec.evaluation.probability import calibration, user_auc
from llmrec.evaluation.uncertainty import bootstrap_means
from llmrec.exceptions import DataError
from llmrec.rating import measures

Vector = npt.NDArray[np.float64]

_CLIP = 1e-7  # as `llmrec.evaluation.probability.log_loss` clips
_CHUNK_BYTES = 32 * 2**20  # of what is computed at once for resamples


def auc_interval(
    labels: npt.ArrayLike, scores: npt.ArrayLike, users: npt.ArrayLike, resamples: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """The 95 % percentile interval of AUC by a bootstrap over users: a drawn user brings all cases.

    Draws what `llmrec.evaluation.uncertainty.bootstrap_means` draws with the same seed. A resample in which all labels
    are alike has no AUC and is left out; None if all are like that.

    Args:
        labels: (I,) 0 or 1.
        scores: (I,).
        users: (I,).
        resamples: how many.
        seed: of the draws.
    """
    known, given = np.asarray(labels) == 1, np.asarray(scores, dtype=np.float64)
    order = np.argsort(given, kind="stable")
    known, given = known[order], given[order]
    names, owner = np.unique(np.asarray(users)[order], return_inverse=True)
    # The first place of each run of equal scores, and for each place its run.
    starts = np.flatnonzero(np.append(True, given[1:] != given[:-1]))
    run = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(given))))
    generator = np.random.default_rng(seed)
    size = max(1, _CHUNK_BYTES // (32 * len(given)))
    found: list[Vector] = []
    for begin in range(0, resamples, size):
        drawn = [
            np.bincount(generator.integers(len(names), size=len(names)), minlength=len(names))
            for _ in range(min(size, resamples - begin))
        ]
        weights = np.stack(drawn).astype(np.float64)[:, owner.reshape(-1)]  # (R, I)
        positive, negative = weights * known, weights * ~known
        # A positive beats every negative of a lower score, and half of those of its own.
        below = np.add.reduceat(negative, starts, axis=1)
        beaten = (np.cumsum(below, axis=1) - below / 2)[:, run]
        pairs = positive.sum(axis=1) * negative.sum(axis=1)
        won = (positive * beaten).sum(axis=1)
        found.append(won[pairs > 0] / pairs[pairs > 0])
    values = np.concatenate(found)
    if not len(values):
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def measure(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, users: npt.ArrayLike, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """The measures of one label, JSON-ready.

    AUC over all cases. UAUC: the mean of the AUC inside every user who has both labels, each counting once; GAUC: the
    same, users counting as their cases do; users of one label are left out of both, and `users_left_out` says which
    share they are. Log-loss (nats), Brier score and ECE (ten bins of equal width) as in `llmrec.rating`. Each but ECE
    with the 95 % interval of a bootstrap over users as "… interval95". What cannot be ordered has None.

    Args:
        labels: (I,) 0, 1 or `MISSING`; cases without this label are left out and counted.
        probabilities: (I,).
        users: (I,).
        resamples: of the intervals.
        seed: of the intervals.

    Raises:
        DataError: if shapes disagree, no case has the label, or a probability is none.
    """
    known, given, owner = np.asarray(labels), np.asarray(probabilities, dtype=np.float64), np.asarray(users)
    if not known.shape == given.shape == owner.shape or known.ndim != 1:
        raise DataError(
            f"Labels, probabilities and users have the shapes {known.shape}, {given.shape} and {owner.shape}. "
            "Give one of each per case."
        )
    there = known != MISSING
    known, given, owner = known[there], given[there], owner[there]
    found: dict[str, Any] = {"cases": len(known), "users": len(np.unique(owner)), **measures(known, given, owner)}
    found["label_share"] = float(known.mean())
    found |= {"AUC interval95": None, "GAUC": None, "UAUC interval95": None, "users_left_out": 1.0}
    if found["AUC"] is not None:
        bounds = auc_interval(known, given, owner, resamples, seed)
        found["AUC interval95"] = None if bounds is None else list(bounds)
    if found["UAUC"] is not None:
        by_user = user_auc(known, given, owner)
        interval = bootstrap_means(by_user.values[:, None], by_user.users, resamples, seed)
        found["UAUC interval95"] = [float(interval.low[0]), float(interval.high[0])]
        found |= {"GAUC": by_user.weighted, "users_left_out": by_user.skipped_users}
    kept = np.clip(given, _CLIP, 1 - _CLIP)
    losses = -np.where(known == 1, np.log(kept), np.log1p(-kept))
    interval = bootstrap_means(np.stack([losses, (given - known) ** 2], axis=1), owner, resamples, seed)
    for place, name in enumerate(("log_loss", "Brier")):
        found[f"{name} interval95"] = [float(interval.low[place]), float(interval.high[place])]
    return found


def reliability(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> list[dict[str, float]]:
    """The table behind a reliability plot: ten bins of about equally many cases, by rising probability.

    Each has "low", "high", "cases", "predicted" and "observed", as `llmrec.evaluation.probability.Calibration`.

    Args:
        labels: (I,) 0, 1 or `MISSING`, which are left out.
        probabilities: (I,).
    """
    known, given = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    table = calibration(known[known != MISSING], given[known != MISSING], by="mass")
    columns = (table.low, table.high, table.counts, table.predicted, table.observed)
    names = ("low", "high", "cases", "predicted", "observed")
    return [dict(zip(names, map(float, row), strict=True)) for row in zip(*columns, strict=True)]


def sliced(
    labels: npt.NDArray[np.int64],
    probabilities: Vector,
    users: npt.NDArray[Any],
    slices: Mapping[str, npt.NDArray[np.bool_]],
) -> dict[str, dict[str, Any]]:
    """Cases, AUC, UAUC, log-loss and the share of label 1 of parts of the cases, those without a case left out.

    Args:
        labels, probabilities, users: (I,), see `measure`.
        slices: name -> (I,) which cases belong to it.
    """
    found = {}
    for name, chosen in slices.items():
        kept = chosen & (labels != MISSING)
        if kept.any():
            all_of_it = measures(labels[kept], probabilities[kept], users[kept])
            found[name] = {"cases": int(kept.sum()), "label_share": float(labels[kept].mean())} | {
                metric: all_of_it[metric] for metric in ("AUC", "UAUC", "UAUC_users", "log_loss")
            }
    return found


def length_slices(lengths: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.bool_]]:
    """Cases by the number of events (I,) that are known before them."""
    return {
        "no history": lengths == 0,
        "history 1-9": (lengths >= 1) & (lengths <= 9),
        "history 10-49": (lengths >= 10) & (lengths <= 49),
        "history 50 and more": lengths >= 50,
    }
