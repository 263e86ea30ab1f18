"""How far from its points a law may be asked: a stated factor, per axis, beyond the grid's ends."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import DataError
from llmrec.scaling.additive import AXES, Grid
from llmrec.scaling.terms import REACH

Integers = npt.NDArray[np.int64]

_WHAT = {
    "depth": "depth",
    "width": "width",
    "effective": "effective data (tokens * quality)",
    "negatives": "negatives",
}


@dataclass(frozen=True)
class Reach:
    """The ends of a grid's axes, and the factor.

    Attributes:
        ends: (least, greatest) by axis of `AXES`; without negatives if the points have none.
        factor: how far beyond.
    """

    ends: dict[str, tuple[float, float]]
    factor: float = REACH

    @classmethod
    def of(cls, grid: Grid, factor: float = REACH) -> "Reach":
        return cls({axis: grid.ends(axis) for axis in AXES if grid.axis(axis) is not None}, factor)

    def bounds(self, axis: str) -> tuple[float, float]:
        """The least and the greatest value that may be asked for."""
        low, high = self.ends[axis]
        return low / self.factor, high * self.factor

    def require(self, force: bool = False, **values: float | None) -> None:
        """Refuses values, by axis, that are no positive numbers, or beyond the bounds and not forced.

        Raises:
            DataError: with the bounds, and what to train to go further.
        """
        for axis, value in values.items():
            if value is None:
                continue
            if not math.isfinite(value) or value <= 0:
                raise DataError(f"The {_WHAT[axis]} to predict for is {value:g}. Give a number above 0.")
            if force or axis not in self.ends:
                continue
            low, high = self.bounds(axis)
            if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
                first, last = self.ends[axis]
                raise DataError(
                    f"The {_WHAT[axis]} {value:g} is more than {self.factor:g} times beyond the points, which go from "
                    f"{first:g} to {last:g}: the law says nothing reliable there. Stay within {low:g} and {high:g}, "
                    "add trainings nearer to it, or force the prediction."
                )

    def whole(self, axis: str, most: int) -> Integers:
        """The whole numbers within the bounds; about `most` of them at even ratios where there are more."""
        low, high = self.bounds(axis)
        first, last = max(1, math.ceil(low - 1e-9)), math.floor(high + 1e-9)
        numbers = np.arange(first, last + 1) if last - first < most else np.geomspace(first, last, most).round()
        return np.unique(numbers.astype(np.int64))
