"""The Performance Law (arXiv 2412.00430): a metric that rises and then falls with depth and width.

    metric = -w1 (ln H^w3 + p / H^w3) - w2 (ln d^w4 + p / d^w4) + (ln D'^w5 + p / D'^w5) + b,    p = 1/2

with depth H, width d and effective data D' = tokens * S'. Signs of w1 and w2 are those of the authors' code: a larger
w1 or w2 is a larger potential of scaling. For w1 > 0 > w3 the metric is best at H* = p^(1/w3), likewise d* = p^(1/w4),
whatever the data: by this law, more data raise the metric of all sizes alike and do not move the optimum.

The published procedure fits D to one data set, where it cannot be told from b. Here D' is given, and several subsets
of the data are fitted jointly; with one, the data's term is left out and b takes it.
"""

import math
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from llmrec.scaling.additive import Grid
from llmrec.scaling.law import ScalingLaw, ends_of
from llmrec.scaling.terms import GrowthTerm, LogTerm, PeakedTerm, Term

Table = npt.NDArray[np.float64]

P = 0.5


class PerformanceLaw(ScalingLaw):
    """`PerformanceLaw.fit(points)`; see the module for the formula."""

    name: ClassVar[str] = "performance_law"

    @classmethod
    def axes_of(cls, grid: Grid) -> tuple[str, ...]:
        return ("depth", "width", *(("effective",) if grid.levels("effective") > 1 else ()))

    @classmethod
    def term_of(cls, axis: str, grid: Grid) -> Term:
        low, high = ends_of(axis, grid)
        if axis == "effective":
            return GrowthTerm(axis, low, high)
        return PeakedTerm(axis, low, high) if grid.levels(axis) > 2 else LogTerm(axis, low, high)

    def spelt(self, parameters: Table) -> dict[str, Table]:
        """w1, w3 (depth), w2, w4 (width), w5 (data), b, p; for an axis of two values, its slope by ln instead.

        A log-linear axis is the limit of w3 = 0 with an infinite w1, which is NaN here, and then so is b.
        """
        found: dict[str, Table] = {}
        b = parameters[:, 0].copy()
        for axis, (term, given) in self.by_axis(parameters).items():
            middle = (term.low + term.high) / 2
            if isinstance(term, PeakedTerm):
                slope, bend = given[:, 0], given[:, 1]
                factor = np.where(bend == 0, np.nan, 2 * slope / np.where(bend == 0, 1.0, bend))
                factor = np.where((slope == 0) & (bend == 0), 0.0, factor)
                first, second = ("w1", "w3") if axis == "depth" else ("w2", "w4")
                found[first], found[second] = factor, -bend
                b = b - factor * (bend * middle - np.exp(bend * middle) * P)
            elif isinstance(term, GrowthTerm):
                found["w5"] = given[:, 0]
                b = b - (given[:, 0] * middle + np.exp(-given[:, 0] * middle) * P)
            else:
                b = b - given[:, 0] * middle
        return found | self.slopes(parameters) | {"b": b, "p": np.full(len(parameters), P)}

    def peaks(self, parameters: Table) -> dict[str, Table]:
        """The closed-form optimum of depth and width, (R,) each, under searched parameters (R, p).

        p^(1 / w3), from near 0 (falling from the start) to infinity (log-linear, rising); NaN where the term is flat,
        so that every size is as good, or has no bend because two values do not tell one.
        """
        found = {}
        for axis, (term, given) in self.by_axis(parameters).items():
            if axis not in ("depth", "width"):
                continue
            if isinstance(term, PeakedTerm):
                slope, bend = given[:, 0], given[:, 1]
                with np.errstate(divide="ignore", over="ignore"):
                    peak = np.exp(math.log(2) / np.where(bend == 0, np.where(slope < 0, -0.0, 0.0), bend))
                found[axis] = np.where(slope == 0, np.nan, peak)
            else:
                found[axis] = np.full(len(given), np.nan)
        return found

    @property
    def peak(self) -> dict[str, float]:
        """The optimum of depth and width by the closed form; see `peaks`."""
        return {axis: float(values[0]) for axis, values in self.peaks(self.fitted.parameters[None]).items()}
