"""Laws that add up: a level, and a term for every axis; and the cells of a grid that they are fitted to."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import DataError
from llmrec.scaling.points import ScalingPoints
from llmrec.scaling.terms import Term

Table = npt.NDArray[np.float64]

AXES = ("depth", "width", "effective", "negatives")


@dataclass(frozen=True)
class Starts:
    """S places to begin a search at, (S, p) each: the parameters with factors of 1, and the bounds to keep to."""

    parameters: Table
    lower: Table
    upper: Table


@dataclass(frozen=True)
class AdditiveForm:
    """metric = level + the sum of `terms`; parameters are the level and then the terms' in their order."""

    terms: tuple[Term, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return ("level", *(name for term in self.terms for name in term.names))

    @property
    def scaled(self) -> npt.NDArray[np.bool_]:
        """(p,) whether the form is linear in a parameter, the others being given."""
        flags = [True]
        for term in self.terms:
            flags += [term.is_scaled and place == 0 for place in range(len(term.names))]
        return np.array(flags)

    def values(self, parameters: Table, x: Mapping[str, Table]) -> Table:
        """(R, n) for parameters (R, p) at the axes' logarithms, (n,) each."""
        result = parameters[:, :1] + np.zeros((1, len(next(iter(x.values())))))
        for term, columns in self.columns():
            levels, place = np.unique(x[term.axis], return_inverse=True)  # grids have few: exponentials cost most
            result = result + term.values(parameters[:, columns], levels)[:, place]
        return np.asarray(result)

    def derivatives(self, parameters: Table, x: Mapping[str, Table]) -> Table:
        """(R, n, p)."""
        parts = [np.ones((len(parameters), len(next(iter(x.values()))), 1))]
        for term, columns in self.columns():
            levels, place = np.unique(x[term.axis], return_inverse=True)
            parts.append(term.derivatives(parameters[:, columns], levels)[:, place])
        return np.concatenate(parts, axis=2)

    def starts(self) -> Starts:
        """Every combination of the terms' branches and shapes."""
        rows, lower, upper = [], [], []
        for branches in itertools.product(*(term.branches() for term in self.terms)):
            below = [-math.inf, *(bound for branch in branches for bound in branch.lower)]
            above = [math.inf, *(bound for branch in branches for bound in branch.upper)]
            for shapes in itertools.product(*(branch.shapes for branch in branches)):
                row = [1.0]
                for term, shape in zip(self.terms, shapes, strict=True):
                    row += ([1.0] if term.is_scaled else []) + list(shape)
                rows.append(row)
                lower.append(below)
                upper.append(above)
        return Starts(np.array(rows), np.array(lower), np.array(upper))

    def columns(self) -> list[tuple[Term, slice]]:
        """Every term with the place of its parameters."""
        found, place = [], 1
        for term in self.terms:
            found.append((term, slice(place, place + len(term.names))))
            place += len(term.names)
        return found


@dataclass(frozen=True)
class Grid:
    """The cells of points, c of them: what was trained, and the mean over its seeds.

    Attributes:
        depth, width, effective: (c,).
        negatives: (c,), or None.
        mean: (c,) the metric, over the cell's replicates.
        count: (c,) how many replicates.
    """

    depth: Table
    width: Table
    effective: Table
    negatives: Table | None
    mean: Table
    count: Table

    @classmethod
    def of(cls, points: ScalingPoints) -> "Grid":
        first, cell = points.cells()
        count = np.bincount(cell).astype(np.float64)
        return cls(
            points.depth[first],
            points.width[first],
            points.effective[first],
            None if points.negatives is None else points.negatives[first],
            np.bincount(cell, weights=points.metric) / count,
            count,
        )

    def __len__(self) -> int:
        return len(self.mean)

    def axis(self, name: str) -> Table | None:
        """(c,) of an axis of `AXES`, None if the points do not have it."""
        values: Table | None = getattr(self, name)
        return values

    def levels(self, name: str) -> int:
        """How many different values an axis has; 0 if the points do not have it."""
        values = self.axis(name)
        return 0 if values is None else len(np.unique(values))

    def ends(self, name: str) -> tuple[float, float]:
        """The least and the greatest value of an axis."""
        values = self.axis(name)
        if values is None:
            raise DataError(f"The points have no {name}. Add the column.")
        return float(values.min()), float(values.max())

    def logarithms(self) -> dict[str, Table]:
        """(c,) by axis; `size` is depth * width^2."""
        return logarithms(self.depth, self.width, self.effective, self.negatives)


def logarithms(depth: Table, width: Table, effective: Table, negatives: Table | None) -> dict[str, Table]:
    """ln of every axis that is given, and of `size` = depth * width^2, (n,) each."""
    found = {"depth": np.log(depth), "width": np.log(width), "effective": np.log(effective)}
    found["size"] = found["depth"] + 2 * found["width"]
    return found if negatives is None else found | {"negatives": np.log(negatives)}
