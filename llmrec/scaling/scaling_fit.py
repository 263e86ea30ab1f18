"""Everything that points tell: the laws with their intervals, the optimum, the verdict, and predictions from them."""

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import polars as pl

from llmrec.exceptions import DataError
from llmrec.scaling.accuracy import Accuracy, accuracy
from llmrec.scaling.additive import Grid
from llmrec.scaling.bootstrap import Resampled, percentiles, resample
from llmrec.scaling.chinchilla import ChinchillaLaw
from llmrec.scaling.evidence import AxisEvidence, evidence
from llmrec.scaling.law import ScalingLaw
from llmrec.scaling.optimum import Budget, Optimum, best_size
from llmrec.scaling.performance_law import PerformanceLaw
from llmrec.scaling.points import ScalingPoints
from llmrec.scaling.power_law import PowerLaw
from llmrec.scaling.reach import Reach
from llmrec.scaling.sufficiency import require_enough
from llmrec.scaling.verdict import Gain, base_size, form_of, gains, in_words

Table = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """A law on the points: its fit, its resamples, its accuracy."""

    law: ScalingLaw
    resampled: Resampled
    accuracy: Accuracy

    def document(self) -> dict[str, Any]:
        """JSON-ready: r2, mae, leave_one_out, parameters, interval of the parameters."""
        low, high = self.parameter_intervals()
        return {
            **self.accuracy.document(),
            "parameters": {name: finite(value) for name, value in self.law.parameters.items()},
            "interval": {name: [low[name], high[name]] for name in low},
        }

    def parameter_intervals(self) -> tuple[dict[str, float | None], dict[str, float | None]]:
        """The low and high ends by parameter; None where they are infinite."""
        spelt = {name: percentiles(values) for name, values in self.law.spelt(self.resampled.parameters).items()}
        return (
            {name: finite(float(ends[0])) for name, ends in spelt.items()},
            {name: finite(float(ends[1])) for name, ends in spelt.items()},
        )


@dataclass(frozen=True)
class ScalingFit:
    """The laws of some points.

    Attributes:
        points: what was fitted.
        resamples, seed: of the bootstrap; with them the same points give the same numbers.
    """

    points: ScalingPoints
    resamples: int = 1000
    seed: int = 0

    @classmethod
    def of(cls, points: ScalingPoints, resamples: int = 1000, seed: int = 0) -> Self:
        """Refuses points that cannot tell a law; the work is done when it is asked for.

        Raises:
            DataError: see `llmrec.scaling.sufficiency`.
        """
        require_enough(Grid.of(points))
        return cls(points, resamples, seed)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """From what `fit_document` gave, written as JSON: its points, resamples and seed are taken, and fitted again.

        Raises:
            DataError: if the file is not there, or is no such document.
        """
        path = Path(path)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            frame = pl.DataFrame(found["points"], infer_schema_length=None)
            resamples, seed, encoder = int(found["resamples"]), int(found["seed"]), found.get("encoder")
            if seed < 0 or not isinstance(encoder, str | None):
                raise ValueError(f"seed {seed}, encoder {encoder!r}")
        except FileNotFoundError as error:
            raise DataError(f"There is no file {path}. Write one with `llmrec scale fit … --json {path}`.") from error
        except (OSError, ValueError, TypeError, KeyError, OverflowError, pl.exceptions.PolarsError) as error:
            raise DataError(
                f"{path} is not what `llmrec scale fit` writes ({type(error).__name__}). Fit the points again with "
                "--json."
            ) from error
        return cls.of(replace(ScalingPoints.from_frame(frame), encoder=encoder), resamples, seed)

    @cached_property
    def grid(self) -> Grid:
        """The points' cells."""
        return Grid.of(self.points)

    @cached_property
    def reach(self) -> Reach:
        """How far predictions go."""
        return Reach.of(self.grid)

    @cached_property
    def performance_law(self) -> PerformanceLaw:
        return PerformanceLaw.fit(self.points, self.seed)

    @cached_property
    def candidates(self) -> dict[str, Candidate]:
        """The laws by name: performance_law, power_law, chinchilla."""
        laws: tuple[ScalingLaw, ...] = (
            self.performance_law,
            PowerLaw.fit(self.points, self.seed),
            ChinchillaLaw.fit(self.points, self.seed),
        )
        return {
            law.name: Candidate(
                law,
                resample(law.fitted, self.grid, self.resamples, self.seed),
                accuracy(law.fitted, self.grid),
            )
            for law in laws
        }

    @cached_property
    def evidence(self) -> dict[str, AxisEvidence]:
        """What depth and width do, by tests."""
        return evidence(self.performance_law.fitted, self.grid, self.seed)

    @property
    def form(self) -> str:
        """ "peaked", "power law", "falling" or "flat"."""
        return form_of(self.evidence)

    @property
    def chosen(self) -> str:
        """The law that predicts: performance_law for "peaked", else which predicts left-out cells better.

        Of the Performance Law and the power law; the Chinchilla form is there to be looked at.
        """
        if self.form == "peaked":
            return PerformanceLaw.name
        names = (PowerLaw.name, PerformanceLaw.name)
        return min(names, key=lambda name: self.candidates[name].accuracy.leave_one_out_rmse)

    @cached_property
    def peak_intervals(self) -> dict[str, tuple[float, float]]:
        """The 90 % interval of the Performance Law's optimum by axis, cut at the end of the reach."""
        candidate = self.candidates[PerformanceLaw.name]
        found = {}
        for axis, drawn in self.performance_law.peaks(candidate.resampled.parameters).items():
            low, high = percentiles(drawn)
            first, last = self.reach.bounds(axis)
            found[axis] = (float(np.clip(low, first, last)), float(np.clip(high, first, last)))
        return found

    @cached_property
    def determined(self) -> dict[str, bool]:
        """Whether the points tell the optimum of depth and of width, and what data and negatives do.

        An optimum is told where the axis is peaked and the interval's ends lie inside the grid.
        """
        found = {}
        for axis, (low, high) in self.peak_intervals.items():
            first, last = self.reach.ends[axis]
            found[axis] = self.evidence[axis].kind == "peaked" and first <= low and high <= last
        found["data"] = self.grid.levels("effective") > 1
        found["negatives"] = self.grid.levels("negatives") > 1
        return found

    def reasons(self) -> list[str]:
        """A sentence for each thing that the points do not determine, with what to add."""
        said = []
        for axis, (low, high) in self.peak_intervals.items():
            if self.determined[axis]:
                continue
            first, last = self.reach.ends[axis]
            kind, levels = self.evidence[axis].kind, self.grid.levels(axis)
            if levels < 3:
                said.append(f"The best {axis} is not determined: the points have {levels} values of it. Add a third.")
            elif kind == "flat":
                said.append(
                    f"The best {axis} is not determined: from {first:g} to {last:g} it makes no difference that can "
                    "be told from chance. Add seeds, or values further apart."
                )
            elif kind == "peaked":
                said.append(
                    f"The best {axis} is not determined: its interval, {low:.3g} to {high:.3g}, leaves the grid of "
                    f"{first:g} to {last:g}. Add values beyond the grid, or seeds."
                )
            else:
                end = "larger than" if kind == "rising" else "smaller than"
                limit = last if kind == "rising" else first
                said.append(
                    f"The best {axis} is not determined: no turn inside {first:g} to {last:g} can be told from a "
                    f"steady change, so it may be {end} {limit:g}. Add such values, or seeds."
                )
        if not self.determined["data"]:
            said.append(
                "What more data do is not determined: all points have the same effective data, and the constant takes "
                "their term. Add trainings on shares of the users."
            )
        return said

    @cached_property
    def base(self) -> tuple[float, float]:
        """The depth and width of the grid from which gains are told."""
        return base_size(self.candidates[self.chosen].law, self.grid)

    @property
    def most(self) -> tuple[float, float | None]:
        """The points' most effective data and, where they have any, most negatives."""
        return self.grid.ends("effective")[1], None if self.grid.negatives is None else self.grid.ends("negatives")[1]

    def gains(
        self,
        name: str | None = None,
        base: tuple[float, float] | None = None,
        effective: float | None = None,
        negatives: float | None = None,
        force: bool = False,
    ) -> dict[str, Gain]:
        """What doubling adds by a law, by default the chosen one, at (depth, width) and data, by default the most.

        What leaves the reach is left out, unless forced.
        """
        candidate = self.candidates[name or self.chosen]
        return gains(
            candidate.law,
            candidate.resampled,
            self.grid,
            base or self.base,
            self.most[0] if effective is None else effective,
            self.most[1] if negatives is None else negatives,
            None if force else self.reach,
        )

    def verdict(
        self,
        base: tuple[float, float] | None = None,
        effective: float | None = None,
        negatives: float | None = None,
        force: bool = False,
    ) -> str:
        """In words: the form, each axis, and the gains of doubling; arguments as those of `gains`."""
        doubled = self.gains(None, base, effective, negatives, force)
        data = self.most[0] if effective is None else effective
        peak = self.performance_law.peak
        return in_words(self.form, self.evidence, peak, self.determined, doubled, base or self.base, data)

    def predict(
        self, depth: float, width: float, effective: float, negatives: float | None = None, force: bool = False
    ) -> dict[str, Any]:
        """The metric at a size and data by every law, JSON-ready; negatives are by default the points' most.

        Returns:
            chosen, and by law {metric, interval (of the law), run_interval (of one more training)}, 90 % each.

        Raises:
            DataError: if it is more than the reach's factor beyond the points, and not forced; or so far that a law
                has no finite value.
        """
        self.reach.require(force, depth=depth, width=width, effective=effective, negatives=negatives)
        negatives = self.most[1] if negatives is None else negatives
        found: dict[str, Any] = {"chosen": self.chosen}
        for name, candidate in self.candidates.items():
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused
                drawn = candidate.law.predict_many(candidate.resampled.parameters, depth, width, effective, negatives)
                metric = float(candidate.law.predict(depth, width, effective, negatives))
            found[name] = {
                "metric": metric,
                "interval": ends_of_draws(drawn),
                "run_interval": ends_of_draws(drawn + candidate.resampled.noise),
            }
            if not np.isfinite([found[name]["metric"], *found[name]["interval"], *found[name]["run_interval"]]).all():
                raise DataError(
                    f"At depth {depth:g}, width {width:g} and {effective:g} effective data a law has no finite value. "
                    "Ask for something nearer to the points."
                )
        return found

    def best(
        self,
        effective: float | None = None,
        negatives: float | None = None,
        depth: int | None = None,
        size: float | None = None,
        budget: Budget | None = None,
        force: bool = False,
        name: str | None = None,
    ) -> Optimum:
        """The best whole depth and width by a law, by default the chosen one, at data D', by default the most.

        Raises:
            DataError: see `best_size`.
        """
        candidate = self.candidates[name or self.chosen]
        data = self.most[0] if effective is None else effective
        negatives = self.most[1] if negatives is None else negatives
        return best_size(candidate.law, candidate.resampled, self.reach, data, negatives, depth, size, budget, force)


def ends_of_draws(drawn: Table) -> list[float]:
    """The 90 % interval of draws (R,), JSON-ready."""
    low, high = percentiles(drawn)
    return [float(low), float(high)]


def finite(value: float) -> float | None:
    """A number for JSON: None for what is infinite or none."""
    return value if math.isfinite(value) else None
