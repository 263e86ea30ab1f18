"""Levels: one ranking read twice, by items and by semantic IDs, and how much higher the second reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec.evaluation.metrics import Metric, values
from llmrec.evaluation.ranks import Ranks
from llmrec.evaluation.uncertainty import bootstrap_means, paired_difference

Table = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Levels:
    """The same ranking, read twice.

    Attributes:
        items: places of the targets among the items.
        ids: places of the targets' IDs among the distinct IDs, which is what several papers count.
    """

    items: Ranks
    ids: Ranks

    def document(
        self,
        users: npt.ArrayLike,
        metrics: Sequence[tuple[Metric, int]] = (("HR", 10), ("NDCG", 10)),
        resamples: int = 1000,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Both levels, their paired difference and their ratio, JSON-ready.

        Args:
            users: (C,) the user of every case; they are resampled whole.
            metrics: names and cut-offs.
            resamples: of the bootstrap.
            seed: of the bootstrap.

        Returns:
            For every metric such as HR@10: "HR@10" (item level) and "HR@10 (ID level)"; "HR@10 inflation", ID level
            minus item level case by case, with "HR@10 inflation p_value"; "HR@10 ratio", ID level over item level,
            None if the item level is 0. All but the p-value have a 95 % " interval95" over users.
        """
        owner = np.asarray(users)
        names = [f"{name}@{k}" for name, k in metrics]
        item = np.stack([values(self.items, name, k) for name, k in metrics], axis=1)
        identifier = np.stack([values(self.ids, name, k) for name, k in metrics], axis=1)
        result: dict[str, Any] = {}
        for label, table in (("", item), (" (ID level)", identifier)):
            interval = bootstrap_means(table, owner, resamples=resamples, seed=seed)
            for place, name in enumerate(names):
                result[f"{name}{label}"] = float(interval.mean[place])
                result[f"{name}{label} interval95"] = [float(interval.low[place]), float(interval.high[place])]
        gap = paired_difference(identifier, item, owner, resamples=resamples, seed=seed)
        ratios = ratio_interval(identifier, item, owner, resamples, seed)
        for place, name in enumerate(names):
            result[f"{name} inflation"] = float(gap.mean[place])
            result[f"{name} inflation interval95"] = [float(gap.low[place]), float(gap.high[place])]
            result[f"{name} inflation p_value"] = float(gap.p_value[place])
            ratio, *bounds = (float(value) if np.isfinite(value) else None for value in ratios[:, place])
            result[f"{name} ratio"], result[f"{name} ratio interval95"] = ratio, bounds
        return result


def ratio_interval(above: Table, below: Table, users: npt.ArrayLike, resamples: int = 1000, seed: int = 0) -> Table:
    """The ratio of two means over the same cases, with its 95 % percentile interval over users.

    Users are resampled whole and both means are of the same resample, because they are of the same users. A resample
    whose lower mean is 0 has the ratio infinity, or 1 if both are 0.

    Args:
        above: (C, M) numerators by case, none negative.
        below: (C, M) denominators by case, none negative.
        users: (C,) the user of every case.
        resamples: how many.
        seed: of the draws.

    Returns:
        (3, M): ratio, low, high.

    >>> ones = np.ones((4, 1))
    >>> ratio_interval(3 * ones, 2 * ones, [0, 1, 2, 3], resamples=50).reshape(-1).tolist()
    [1.5, 1.5, 1.5]
    """
    _, owner = np.unique(np.asarray(users), return_inverse=True)
    width = above.shape[1]
    both = np.concatenate([above, below], axis=1).astype(np.float64)
    sums = np.stack([np.bincount(owner, weights=column) for column in both.T], axis=1)
    rng = np.random.default_rng(seed)
    num_users = len(sums)
    drawn = np.empty((resamples, 2 * width))
    for sample in range(resamples):
        times = np.bincount(rng.integers(0, num_users, size=num_users), minlength=num_users)
        drawn[sample] = times @ sums
    ratios = _divided(drawn[:, :width], drawn[:, width:])
    whole = sums.sum(axis=0)
    low, high = np.quantile(ratios, [0.025, 0.975], axis=0, method="nearest")
    return np.stack([_divided(whole[:width], whole[width:]), low, high])


def _divided(above: Table, below: Table) -> Table:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((above == 0) & (below == 0), 1.0, above / below)
