"""EncoderAccount: what a table of trainings tells of one encoder: its laws, held-out trainings and costs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from llmrec.exceptions import DataError
from llmrec.scaling.points import ScalingPoints, encoders_of
from llmrec.scaling.scaling_fit import ScalingFit

Table = npt.NDArray[np.float64]

# What trainings may have cost, the first that the table has; with its unit.
COSTS = {"flops": "floating-point operations", "seconds": "seconds", "parameters": "parameters"}


@dataclass(frozen=True)
class HeldOutCell:
    """A size that no law was fitted to.

    Attributes:
        depth, width, effective: what was trained.
        seeds: trainings.
        metric: their mean.
        predicted: by law.
        interval: 90 %, of one more training, by the chosen law.
        beyond: whether it lies farther from the points than the law may be asked.
    """

    depth: float
    width: float
    effective: float
    seeds: int
    metric: float
    predicted: dict[str, float]
    interval: tuple[float, float]
    beyond: bool


@dataclass(frozen=True)
class EncoderAccount:
    """One encoder's part of a table.

    Attributes:
        encoder: its name; None for a table without the column.
        points: the trainings that are not held out.
        fit: their laws; None if they are too few.
        refusal: then why.
        held_out: cells that are.
        costs: (n,) of `points`, of the first column of `COSTS` that the table has for all of them, or None.
        cost: which.
    """

    encoder: str | None
    points: ScalingPoints
    fit: ScalingFit | None
    refusal: str
    held_out: Sequence[HeldOutCell]
    costs: Table | None
    cost: str | None

    @classmethod
    def of(
        cls, frame: pl.DataFrame, encoder: str | None = None, resamples: int = 1000, seed: int = 0
    ) -> "EncoderAccount":
        """Fits the laws, and asks them for what is held out.

        Args:
            frame: as `ScalingPoints.from_frame`; may have the columns of `COSTS`.
            encoder: whose; needed where there are several.
            resamples, seed: of the bootstrap.

        Raises:
            DataError: if the table has no points of this encoder, or they cannot be.
        """
        points = ScalingPoints.from_frame(frame, encoder)
        refusal, fit = "", None
        try:
            fit = ScalingFit.of(points, resamples, seed)
        except DataError as error:
            refusal = str(error)
        cost, costs = _costs(frame, encoder, len(points))
        held = () if fit is None else tuple(_held_out(frame, encoder, fit))
        return cls(points.encoder, points, fit, refusal, held, costs, cost)

    @property
    def name(self) -> str:
        """The encoder's name, or what stands for it."""
        return self.encoder or "trainings"

    def document(self) -> dict[str, Any]:
        """JSON-ready: encoder, refusal, fit (`fit_document`, or None), held_out, cost, frontier, loss_agreement.

        `frontier` has a cell each, by rising cost; it is None without costs.
        """
        from llmrec.scaling.fit_document import fit_document

        return {
            "encoder": self.encoder,
            "refusal": self.refusal or None,
            "fit": None if self.fit is None else fit_document(self.fit),
            "held_out": [asdict(cell) | {"interval": list(cell.interval)} for cell in self.held_out],
            "cost": self.cost,
            "frontier": self._frontier_document(),
            "loss_agreement": self.loss_agreement(),
        }

    def _frontier_document(self) -> list[dict[str, float]] | None:
        if self.fit is None or self.costs is None:
            return None
        grid, costs = self.fit.grid, self.cell_costs()
        columns = {"cost": costs, "depth": grid.depth, "width": grid.width, "effective": grid.effective}
        columns["metric"] = grid.mean
        return [{name: float(values[place]) for name, values in columns.items()} for place in self.frontier()]

    def frontier(self) -> list[int]:
        """The cells that nothing cheaper equals, by cost; empty without costs. Places in the grid of `cell_costs`."""
        if self.fit is None or self.costs is None:
            return []
        costs, mean = self.cell_costs(), self.fit.grid.mean
        best, found = -np.inf, []
        for place in np.lexsort((-mean, costs)).tolist():
            if mean[place] > best:
                best = float(mean[place])
                found.append(place)
        return found

    def cell_costs(self) -> Table:
        """(c,) the mean cost of each cell of the fit's grid."""
        assert self.costs is not None
        cell = self.points.cells()[1]
        return np.asarray(np.bincount(cell, weights=self.costs) / np.bincount(cell))

    def loss_agreement(self) -> float | None:
        """Spearman's correlation of -loss and metric; None for fewer than 4 trainings with a loss, or ties only.

        Below 1 the two would choose other models (arXiv 2412.00714, RQ4).
        """
        if self.points.loss is None:
            return None
        from scipy.stats import spearmanr

        known = np.isfinite(self.points.loss)
        loss, metric = self.points.loss[known], self.points.metric[known]
        if len(loss) < 4 or len(np.unique(loss)) < 2 or len(np.unique(metric)) < 2:
            return None
        return float(spearmanr(-loss, metric).statistic)


def accounts(frame: pl.DataFrame, resamples: int = 1000, seed: int = 0) -> list[EncoderAccount]:
    """The accounts of all encoders of a table, by name.

    Raises:
        DataError: see `EncoderAccount.of`.
    """
    return [EncoderAccount.of(frame, name, resamples, seed) for name in encoders_of(frame) or (None,)]


def _rows(frame: pl.DataFrame, encoder: str | None) -> pl.DataFrame:
    return frame if encoder is None else frame.filter(pl.col("encoder").cast(pl.String) == encoder)


def _marked(rows: pl.DataFrame) -> pl.Series:
    """Which rows are held out, as `ScalingPoints` reads it."""
    if "held_out" not in rows.columns:
        return pl.Series([False] * len(rows), dtype=pl.Boolean)
    spelt = rows["held_out"].cast(pl.String).fill_null("").str.strip_chars().str.to_lowercase()
    return spelt.is_in(["true", "1", "yes"])


def _costs(frame: pl.DataFrame, encoder: str | None, count: int) -> tuple[str | None, Table | None]:
    rows = _rows(frame, encoder)
    rows = rows.filter(~_marked(rows))
    for name in COSTS:
        if name not in rows.columns:
            continue
        values = rows[name].cast(pl.Float64, strict=False).to_numpy().astype(np.float64)
        if len(values) == count and bool(np.all(np.isfinite(values) & (values > 0))):
            return name, values
    return None, None


def _held_out(frame: pl.DataFrame, encoder: str | None, fit: ScalingFit) -> list[HeldOutCell]:
    if not _marked(_rows(frame, encoder)).any():
        return []
    points = ScalingPoints.from_frame(frame, encoder, held_out=True)
    first, cell = points.cells()
    found = []
    for place, row in enumerate(first.tolist()):
        of_cell = cell == place
        depth, width, effective = (float(points.depth[row]), float(points.width[row]), float(points.effective[row]))
        negatives = None if points.negatives is None else float(points.negatives[row])
        try:
            fit.reach.require(depth=depth, width=width, effective=effective, negatives=negatives)
            beyond = False
        except DataError:
            beyond = True
        said = fit.predict(depth, width, effective, negatives, force=True)
        count = int(of_cell.sum())
        found.append(
            HeldOutCell(
                depth,
                width,
                effective,
                count,
                float(points.metric[of_cell].mean()),
                {name: float(said[name]["metric"]) for name in fit.candidates},
                (float(said[said["chosen"]]["run_interval"][0]), float(said[said["chosen"]]["run_interval"][1])),
                beyond,
            )
        )
    return found
