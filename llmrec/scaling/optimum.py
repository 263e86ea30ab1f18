"""The size at which a law predicts the most: of all, at a depth, at a product of depth and width, or under a budget.

Where depth and width are free, the Performance Law's optimum has a closed form (`PerformanceLaw.peaks`). The others
are searches over whole depths and widths within reach of the points.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import DataError
from llmrec.scaling.bootstrap import Resampled, percentiles
from llmrec.scaling.law import ScalingLaw
from llmrec.scaling.reach import Reach

Table = npt.NDArray[np.float64]

Cost = Callable[[Table, Table], npt.ArrayLike]

_DEPTHS = 64  # candidates
_WIDTHS = 160
_CHUNK_NUMBERS = 2_000_000  # predictions at once


@dataclass(frozen=True)
class Budget:
    """What a model may cost.

    Attributes:
        cost: of depths and widths, (n,) each, which are whole numbers: (n,) costs, such as parameters or FLOPs,
            which grow with the width.
        most: the highest cost that is allowed.
        what: its name in sentences.
        multiple_of: widths that can be built, such as multiples of the number of heads.
    """

    cost: Cost
    most: float
    what: str = "parameters"
    multiple_of: int = 1


@dataclass(frozen=True)
class Optimum:
    """The best size, with 90 % intervals (low, high) over resamples.

    Attributes:
        depth, width: whole numbers.
        metric: predicted there.
        depth_interval, width_interval: of the best size.
        metric_interval: of the law's value at this size.
        at_end: "depth" or "width", each with "low" or "high", where the best lies at the end of what the points reach
            though nothing else holds it there: the law has no optimum within reach on that axis.
        cost: of this size, if there is a budget.
    """

    depth: int
    width: int
    metric: float
    depth_interval: tuple[int, int]
    width_interval: tuple[int, int]
    metric_interval: tuple[float, float]
    at_end: dict[str, str]
    cost: float | None

    def document(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "depth": self.depth,
            "width": self.width,
            "metric": self.metric,
            "interval": {
                "depth": list(self.depth_interval),
                "width": list(self.width_interval),
                "metric": list(self.metric_interval),
            },
            "at_end": dict(self.at_end),
            "cost": self.cost,
        }


def best_size(
    law: ScalingLaw,
    resampled: Resampled,
    reach: Reach,
    effective: float,
    negatives: float | None = None,
    depth: int | None = None,
    size: float | None = None,
    budget: Budget | None = None,
    force: bool = False,
) -> Optimum:
    """The depth and width with the highest prediction at given data, among whole numbers within reach.

    At most one of `depth`, `size` and `budget` constrains it. Many candidates are thinned to 64 depths and 160 widths
    at even ratios; at each depth the widest that a budget allows is one too. Of equal predictions the smaller depth,
    then the smaller width, is taken.

    Args:
        law: which predicts.
        resampled: its resamples.
        reach: of the points.
        effective: D' to predict at.
        negatives: to predict at, where the law depends on them.
        depth: fixes the depth.
        size: fixes depth * width: at every depth, the width is the nearest whole number.
        budget: what a model may cost.
        force: searches up to the reach's factor squared, and takes data and depth beyond the reach.

    Raises:
        DataError: if something is out of reach, two constraints are given, or nothing within reach satisfies one.
    """
    if sum(given is not None for given in (depth, size, budget)) > 1:
        raise DataError("A depth, a product of depth and width, and a budget are given together. Give one of them.")
    reach.require(force, effective=effective, negatives=negatives, depth=depth)
    within = Reach(reach.ends, reach.factor**2) if force else reach
    depths, widths = candidates(within, depth, size, budget)
    chunk = max(1, _CHUNK_NUMBERS // len(depths))
    best = []
    for start in range(0, len(resampled.parameters), chunk):
        rows = resampled.parameters[start : start + chunk]
        best.append(np.argmax(law.predict_many(rows, depths, widths, effective, negatives), axis=1))
    drawn = np.concatenate(best)
    place = int(np.argmax(law.predict(depths, widths, effective, negatives)))
    found_depth, found_width = float(depths[place]), float(widths[place])
    low, high = percentiles(law.predict_many(resampled.parameters, found_depth, found_width, effective, negatives))
    at_end = {}
    multiple = 1 if budget is None else budget.multiple_of
    for axis, values, step in (("depth", depths, 1), ("width", widths, multiple)):
        if size is not None or (axis == "depth" and depth is not None):
            continue
        bounds = within.whole(axis, 2)
        first, last = -(-int(bounds[0]) // step) * step, int(bounds[-1]) // step * step
        if values[place] <= first and first > step:
            at_end[axis] = "low"
        elif values[place] >= last:
            at_end[axis] = "high"
    cost = None if budget is None else float(_costs(budget, depths[[place]], widths[[place]])[0])
    return Optimum(
        int(found_depth),
        int(found_width),
        float(law.predict(found_depth, found_width, effective, negatives)),
        _whole_interval(depths[drawn]),
        _whole_interval(widths[drawn]),
        (float(low), float(high)),
        at_end,
        cost,
    )


def candidates(reach: Reach, depth: int | None, size: float | None, budget: Budget | None) -> tuple[Table, Table]:
    """The depths and widths, (n,) each, that satisfy the constraint, by depth and then by width.

    Raises:
        DataError: if there is none.
    """
    depths = reach.whole("depth", _DEPTHS) if depth is None else np.array([depth])
    widths = reach.whole("width", _WIDTHS)
    if size is not None:
        low, high = reach.bounds("width")
        nearest = np.maximum(np.rint(size / depths), 1)
        kept = (nearest >= low) & (nearest <= high)
        if not kept.any():
            raise DataError(
                f"No depth from {depths[0]} to {depths[-1]} has a width from {low:g} to {high:g} for depth * width = "
                f"{size:g}: the points do not reach there. Give a product between {depths[0] * max(low, 1):g} and "
                f"{depths[-1] * high:g}."
            )
        return depths[kept].astype(np.float64), nearest[kept].astype(np.float64)
    if budget is None:
        both = np.meshgrid(depths, widths, indexing="ij")
        return both[0].reshape(-1).astype(np.float64), both[1].reshape(-1).astype(np.float64)
    first, last = -(-widths[0] // budget.multiple_of), widths[-1] // budget.multiple_of
    every = budget.multiple_of * np.arange(first, last + 1)
    if not len(every):
        raise DataError(
            f"No width from {widths[0]} to {widths[-1]} is a multiple of {budget.multiple_of}. Allow fewer heads, or "
            "add trainings of larger widths."
        )
    layers = depths.astype(np.float64)
    cheapest = _costs(budget, layers, np.full(len(layers), float(every[0])))
    # At each depth `known` widths are known to be affordable, and `beyond` of them not to be.
    known, beyond = np.zeros(len(layers), dtype=np.int64), np.full(len(layers), len(every) + 1)
    while (beyond - known > 1).any():
        middle = np.where(beyond - known > 1, (known + beyond) // 2, np.maximum(known, 1))
        affordable = _costs(budget, layers, every[middle - 1].astype(np.float64)) <= budget.most
        affordable |= known >= middle
        known, beyond = np.where(affordable, np.maximum(known, middle), known), np.where(affordable, beyond, middle)
    rows = [
        (number, width)
        for number, count in zip(depths.tolist(), known.tolist(), strict=True)
        for width in _thinned(every[:count], _WIDTHS).tolist()
    ]
    if not rows:
        raise DataError(
            f"The smallest model within reach of the points costs {cheapest.min():,.0f} {budget.what}, above the "
            f"budget of {budget.most:,.0f}. Raise the budget, or add trainings of smaller models."
        )
    table = np.array(rows, dtype=np.float64)
    return table[:, 0], table[:, 1]


def _costs(budget: Budget, depths: Table, widths: Table) -> Table:
    costs = np.asarray(budget.cost(depths, widths), dtype=np.float64)
    if costs.shape != depths.shape or not np.isfinite(costs).all():
        raise DataError(
            f"The cost function gives the shape {costs.shape} for {depths.shape} sizes, or numbers that are not "
            "finite. Return one finite cost per size."
        )
    return costs


def _thinned(numbers: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    """Rising numbers, or about `most` of them at even ratios, the first and the last among them."""
    if len(numbers) <= most:
        return numbers
    wanted = np.geomspace(numbers[0], numbers[-1], most)
    places = np.searchsorted(numbers, wanted * (1 - 1e-12))
    return np.asarray(numbers[np.unique(np.minimum(places, len(numbers) - 1))])


def _whole_interval(values: Table) -> tuple[int, int]:
    low, high = percentiles(values)
    return int(low), int(high)
