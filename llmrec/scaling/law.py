"""What all scaling laws have in common: they are fitted to points, predict a metric, and name their parameters."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import DataError
from llmrec.scaling.additive import AdditiveForm, Grid, logarithms
from llmrec.scaling.fitting import Fitted, fit_form
from llmrec.scaling.points import ScalingPoints
from llmrec.scaling.sufficiency import require_enough
from llmrec.scaling.terms import LogTerm, Term

Table = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ScalingLaw(ABC):
    """A law with the parameters that fit some points best.

    Attributes:
        fitted: its form and parameters, as they were searched.
    """

    fitted: Fitted
    name: ClassVar[str]

    @classmethod
    def fit(cls, points: ScalingPoints, seed: int = 0) -> Self:
        """Bounded least squares from many starts; `seed` draws some of these.

        Raises:
            DataError: if the points are too few, or do not tell the axes apart.
        """
        grid = Grid.of(points)
        require_enough(grid)
        return cls(fit_form(cls.form_of(grid), grid, seed))

    @classmethod
    def form_of(cls, grid: Grid) -> AdditiveForm:
        """The terms that a grid can tell: where an axis has one value there is none, and the level takes it."""
        terms = [cls.term_of(axis, grid) for axis in cls.axes_of(grid)]
        return AdditiveForm(tuple(terms) + negatives_terms(grid))

    @classmethod
    @abstractmethod
    def axes_of(cls, grid: Grid) -> tuple[str, ...]:
        """The axes that have a term, but for negatives."""

    @classmethod
    @abstractmethod
    def term_of(cls, axis: str, grid: Grid) -> Term:
        """The term of one of these."""

    @abstractmethod
    def spelt(self, parameters: Table) -> dict[str, Table]:
        """The law's parameters under their published names, (R,) each, from those searched (R, p); NaN for none."""

    @property
    def parameters(self) -> dict[str, float]:
        """The law's parameters under their published names; NaN where it has none."""
        return {name: float(values[0]) for name, values in self.spelt(self.fitted.parameters[None]).items()}

    def predict(
        self,
        depth: npt.ArrayLike,
        width: npt.ArrayLike,
        effective: npt.ArrayLike,
        negatives: npt.ArrayLike | None = None,
    ) -> Table:
        """The metric at sizes and data, in the arguments' common shape; nothing here says how far from the points.

        Raises:
            DataError: if the law depends on negatives, and there are none.
        """
        return np.asarray(self.predict_many(self.fitted.parameters[None], depth, width, effective, negatives)[0])

    def predict_many(
        self,
        parameters: Table,
        depth: npt.ArrayLike,
        width: npt.ArrayLike,
        effective: npt.ArrayLike,
        negatives: npt.ArrayLike | None = None,
    ) -> Table:
        """(R, ...) what `predict` returns under each of R searched parameters (R, p)."""
        needed = any(term.axis == "negatives" for term in self.fitted.form.terms)
        if needed and negatives is None:
            raise DataError("This law depends on the number of negatives, and none is given. Say how many.")
        given = [depth, width, effective] + ([negatives] if needed and negatives is not None else [])
        axes = np.broadcast_arrays(*(np.asarray(values, dtype=np.float64) for values in given))
        flat = [values.reshape(-1) for values in axes]
        x = logarithms(flat[0], flat[1], flat[2], flat[3] if needed else None)
        return self.fitted.form.values(parameters, x).reshape(len(parameters), *axes[0].shape)

    def slopes(self, parameters: Table) -> dict[str, Table]:
        """The parameters of terms that two values, or negatives, allow: by axis, the slope by ln, (R,) each."""
        place, found = 1, {}
        for term in self.fitted.form.terms:
            if isinstance(term, LogTerm):
                found[term.names[0]] = parameters[:, place]
            place += len(term.names)
        return found

    def by_axis(self, parameters: Table) -> dict[str, tuple[Term, Table]]:
        """Every axis' term, and its searched parameters (R, k)."""
        place, found = 1, {}
        for term in self.fitted.form.terms:
            found[term.axis] = (term, parameters[:, place : place + len(term.names)])
            place += len(term.names)
        return found


def ends_of(axis: str, grid: Grid) -> tuple[float, float]:
    """The grid's ends on an axis, as logarithms."""
    x = grid.logarithms()[axis]
    return float(x.min()), float(x.max())


def negatives_terms(grid: Grid) -> tuple[Term, ...]:
    """A log-linear term where the points have several numbers of negatives."""
    return (LogTerm("negatives", *ends_of("negatives", grid)),) if grid.levels("negatives") > 1 else ()
