"""The form of Chinchilla's law (arXiv 2203.15556) for a metric: E - A / P^a [- C / D'^c].

P = depth * width^2, to which the parameters of a Transformer's or HSTU's layers are proportional (12 or 5 of it; the
factor goes into A); the items' table, width * items, is not counted. Depth and width matter by P alone.
"""

from typing import ClassVar

from llmrec.scaling.additive import Grid
from llmrec.scaling.power_law import PowerLaw


class ChinchillaLaw(PowerLaw):
    """`ChinchillaLaw.fit(points)`; see the module for the formula."""

    name: ClassVar[str] = "chinchilla"

    @classmethod
    def axes_of(cls, grid: Grid) -> tuple[str, ...]:
        return ("size", *(("effective",) if grid.levels("effective") > 1 else ()))
