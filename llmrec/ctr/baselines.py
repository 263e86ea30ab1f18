"""What is known without a model: the shares of label 1, of all, of an item, of a user, and of both together."""

import numpy as np
import numpy.typing as npt

from llmrec.ctr.histories import Histories
from llmrec.ctr.rows import LabelledRows, Numbers

Vector = npt.NDArray[np.float64]


def baselines(
    rows: LabelledRows,
    train: Numbers,
    asked: Numbers,
    label: int = 0,
    simultaneous: str = "known",
    strength: float = 5.0,
) -> dict[str, Vector]:
    """Probabilities (C,) of the asked rows by each baseline, of one label.

    * "share": the training rows' share of label 1, for all.
    * "item": the item's share in the training rows, with `strength` rows of the overall share added.
    * "user": the user's share among the rows known before the asked one, as a model with labelled histories knows
      them, with `strength` rows of the overall share added.
    * "item and user": the sum of the log-odds of both, less those of the overall share.

    Args:
        rows: I of them.
        train: (T,) the rows whose labels an item's share may use.
        asked: (C,).
        label: which of the K.
        simultaneous: as of `Histories.of`.
        strength: of the overall share, in rows.
    """
    known = rows.labels[train, label] >= 0
    liked = rows.labels[train, label] == 1
    share = float((liked.sum() + 0.5) / (known.sum() + 1))
    size = len(rows.item_ids)
    count = np.bincount(rows.items[train], weights=known, minlength=size)
    likes = np.bincount(rows.items[train], weights=liked, minlength=size)
    item = ((likes + strength * share) / (count + strength))[rows.items[asked]]
    histories = Histories.of(rows, "labelled", "known" if simultaneous == "known" else "unknown")
    # Histories are slices of all rows in the order of users and times, so sums before are differences of two.
    order = np.argsort(Histories.of(rows).end, kind="stable")
    sums = {
        name: np.append(0, np.cumsum(values[order]))
        for name, values in (("known", rows.labels[:, label] >= 0), ("liked", rows.labels[:, label] == 1))
    }
    before = {
        name: sums[name][histories.end[asked]] - sums[name][histories.begin[asked]] for name in ("known", "liked")
    }
    user = (before["liked"] + strength * share) / (before["known"] + strength)
    both = _logit(item) + _logit(user) - _logit(np.array(share))
    return {
        "share": np.full(len(asked), share),
        "item": item,
        "user": user,
        "item and user": 1 / (1 + np.exp(-both)),
    }


def _logit(probability: Vector) -> Vector:
    odds: Vector = np.log(probability) - np.log1p(-probability)
    return odds
