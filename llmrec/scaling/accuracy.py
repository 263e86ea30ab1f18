"""How well a law fits the points it was fitted to, and those it was not."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec.scaling.additive import Grid
from llmrec.scaling.fitting import Fitted, fit_many

Table = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Accuracy:
    """Over cells, each weighted by its replicates: what seeds alone change is nobody's to explain.

    Attributes:
        r2: 1 - residual sum of squares / sum of squares around the mean.
        mae: the mean absolute residual.
        leave_one_out_r2, leave_one_out_mae, leave_one_out_rmse: of predictions for each cell by a fit of the others;
            a cell with all its seeds is left out at once. This R^2 is below 0 where the mean predicts better.
    """

    r2: float
    mae: float
    leave_one_out_r2: float
    leave_one_out_mae: float
    leave_one_out_rmse: float

    def document(self) -> dict[str, Any]:
        """JSON-ready: r2, mae, leave_one_out {r2, mae, rmse}."""
        prefix = "leave_one_out_"
        given = asdict(self)
        return {name: value for name, value in given.items() if not name.startswith(prefix)} | {
            "leave_one_out": {name[len(prefix) :]: value for name, value in given.items() if name.startswith(prefix)}
        }


def accuracy(fitted: Fitted, grid: Grid) -> Accuracy:
    """The accuracy of a fit on the grid it was fitted to."""
    spread = float(grid.count @ (grid.mean - np.average(grid.mean, weights=grid.count)) ** 2)
    residuals = np.abs(grid.mean - fitted.at(grid))
    missed = np.abs(grid.mean - left_out(fitted, grid))
    return Accuracy(
        1 - float(grid.count @ residuals**2) / spread,
        float(np.average(residuals, weights=grid.count)),
        1 - float(grid.count @ missed**2) / spread,
        float(np.average(missed, weights=grid.count)),
        float(np.sqrt(np.average(missed**2, weights=grid.count))),
    )


def left_out(fitted: Fitted, grid: Grid) -> Table:
    """(c,) every cell's metric as predicted by a fit of the same form to all other cells."""
    cells = len(grid)
    counts = np.where(np.eye(cells, dtype=np.bool_), 0.0, grid.count[None])
    parameters, _ = fit_many(fitted.form, grid, np.repeat(grid.mean[None], cells, axis=0), fitted, counts)
    return np.asarray(np.diagonal(fitted.form.values(parameters, grid.logarithms())))
