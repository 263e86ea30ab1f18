"""Intervals of a law's parameters, predictions and optimum, by resampling residuals.

A resample is the law's values plus residuals drawn from those of the fit (Efron and Tibshirani 1993, chapter 9), cell
by cell: seeds of one cell are averaged first, so that a cell which the law misses counts as one deviation, however
many seeds agree on it. Two corrections make intervals of few cells wide enough. Residuals of c cells and p parameters
are too small by sqrt((c - p) / c), and are drawn so much larger. And their spread is itself an estimate: each resample
divides by the root of a chi-square draw of c - p degrees of freedom, as Student's t does.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import DataError
from llmrec.scaling.additive import Grid
from llmrec.scaling.fitting import Fitted, fit_many

Table = npt.NDArray[np.float64]

LEVEL = 0.9
_CHUNK = 500


@dataclass(frozen=True)
class Resampled:
    """The fits of R resamples.

    Attributes:
        parameters: (R, p) as searched.
        noise: (R,) by how much one more training, of one seed, deviates from the law.
    """

    parameters: Table
    noise: Table


def resample(fitted: Fitted, grid: Grid, resamples: int = 1000, seed: int = 0) -> Resampled:
    """Fits `resamples` resamples of the grid.

    Raises:
        DataError: if there are fewer than 20 resamples.
    """
    if resamples < 20:
        raise DataError(f"{resamples} resamples have no 90 % interval. Give 20 or more; 1,000 are usual.")
    rng = np.random.default_rng((seed, 2))
    at, root = fitted.at(grid), np.sqrt(grid.count)
    cells, freedom = len(grid), max(len(grid) - len(fitted.parameters), 1)
    residuals = root * (grid.mean - at)
    residuals = (residuals - residuals.mean()) * np.sqrt(cells / freedom)
    drawn = residuals[rng.integers(cells, size=(resamples, cells + 1))]
    drawn *= np.sqrt(freedom / rng.chisquare(freedom, size=(resamples, 1)))
    targets = at + drawn[:, :cells] / root
    parts = [fit_many(fitted.form, grid, targets[i : i + _CHUNK], fitted)[0] for i in range(0, resamples, _CHUNK)]
    return Resampled(np.concatenate(parts), drawn[:, cells])


def percentiles(values: Table, level: float = LEVEL) -> tuple[Table, Table]:
    """The central interval of values (R, ...), over the resamples; NaN counts as anything, so it is at both ends."""
    tail = (1 - level) / 2
    low = np.quantile(np.where(np.isnan(values), -np.inf, values), tail, axis=0, method="closest_observation")
    high = np.quantile(np.where(np.isnan(values), np.inf, values), 1 - tail, axis=0, method="closest_observation")
    return np.asarray(low), np.asarray(high)
