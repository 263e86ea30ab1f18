"""The power law of sizes and data (arXiv 2001.08361's form for a metric): E - A / H^a - B / d^b [- C / D'^c].

H is the depth, d the width, D' = tokens * S' the effective data. Each axis is monotone, so it has no optimum inside:
it is what the Performance Law must be better than before an optimum is believed.
"""

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from llmrec.scaling.additive import Grid
from llmrec.scaling.law import ScalingLaw, ends_of
from llmrec.scaling.terms import LogTerm, PowerTerm, Term

Table = npt.NDArray[np.float64]

_LETTERS = {"depth": ("A", "a"), "width": ("B", "b"), "effective": ("C", "c"), "size": ("A", "a")}


class PowerLaw(ScalingLaw):
    """`PowerLaw.fit(points)`; see the module for the formula."""

    name: ClassVar[str] = "power_law"

    @classmethod
    def axes_of(cls, grid: Grid) -> tuple[str, ...]:
        return ("depth", "width", *(("effective",) if grid.levels("effective") > 1 else ()))

    @classmethod
    def term_of(cls, axis: str, grid: Grid) -> Term:
        low, high = ends_of(axis, grid)
        bends = cls._levels(axis, grid) > 2
        if axis == "effective":
            # The Performance Law has one parameter for the data. Where a second here would leave no cell over, every
            # cell would be met whatever its noise, and intervals have no width.
            others = sum(2 if cls._levels(other, grid) > 2 else 1 for other in cls.axes_of(grid) if other != axis)
            bends &= len(grid) > 1 + others + (grid.levels("negatives") > 1) + 2
        return PowerTerm(axis, low, high) if bends else LogTerm(axis, low, high)

    @staticmethod
    def _levels(axis: str, grid: Grid) -> int:
        """How many different values an axis has, `size` too."""
        return len(np.unique(grid.logarithms()[axis].round(12)))

    def spelt(self, parameters: Table) -> dict[str, Table]:
        """E, A, a, B, b, C, c; for an axis of two values, for negatives and for data of few cells, a slope by ln.

        E is the metric towards which it rises if all exponents are positive.
        """
        found: dict[str, Table] = {}
        level = parameters[:, 0].copy()
        for axis, (term, given) in self.by_axis(parameters).items():
            if isinstance(term, PowerTerm):
                end, amplitude = term.end(given[:, 0], given[:, 1])
                level = level + end
                letter, exponent = _LETTERS[axis]
                found[letter], found[exponent] = amplitude, given[:, 1]
            elif isinstance(term, LogTerm):
                level = level - given[:, 0] * (term.low + term.high) / 2
        return {"E": level} | found | self.slopes(parameters)
