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
        levels = len(np.unique(grid.logarithms()[axis].round(12)))
        return PowerTerm(axis, low, high) if levels > 2 else LogTerm(axis, low, high)

    def spelt(self, parameters: Table) -> dict[str, Table]:
        """E, A, a, B, b, C, c; for an axis of two values, and for negatives, the slope by ln instead.

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
