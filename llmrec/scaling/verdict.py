"""The verdict in words: which shape the points have, and whether more data or a bigger model would help."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec.scaling.additive import Grid
from llmrec.scaling.bootstrap import Resampled, percentiles
from llmrec.scaling.evidence import AxisEvidence
from llmrec.scaling.law import ScalingLaw
from llmrec.scaling.reach import Reach

Table = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Gain:
    """What doubling one thing is predicted to add to the metric; the interval is the law's 90 %."""

    value: float
    low: float
    high: float

    def document(self) -> dict[str, Any]:
        """JSON-ready: gain, interval."""
        return {"gain": self.value, "interval": [self.low, self.high]}


def form_of(found: Mapping[str, AxisEvidence]) -> str:
    """What sizes do: "peaked" if an axis has a peak, else "power law" if one rises, "falling" if one falls, "flat"."""
    kinds = {axis.kind for axis in found.values()}
    for kind, form in (("peaked", "peaked"), ("rising", "power law"), ("falling", "falling")):
        if kind in kinds:
            return form
    return "flat"


def base_size(law: ScalingLaw, grid: Grid) -> tuple[float, float]:
    """The depth and width of the grid whose predicted metric at the most data is highest."""
    negatives = None if grid.negatives is None else np.full(len(grid), grid.ends("negatives")[1])
    place = int(np.argmax(law.predict(grid.depth, grid.width, grid.ends("effective")[1], negatives)))
    return float(grid.depth[place]), float(grid.width[place])


def gains(
    law: ScalingLaw,
    resampled: Resampled,
    grid: Grid,
    base: tuple[float, float],
    effective: float,
    negatives: float | None,
    reach: Reach | None = None,
) -> dict[str, Gain]:
    """What doubling data, depth, width and negatives adds at `base` (depth, width) and data D'.

    An axis with one value in the points has no gain, nor one whose double lies beyond `reach`.
    """
    depth, width = base
    here = {"depth": depth, "width": width, "effective": effective}
    here |= {} if negatives is None else {"negatives": negatives}
    found: dict[str, Gain] = {}
    for axis in ("effective", "depth", "width", "negatives"):
        if grid.levels(axis) < 2 or axis not in here:
            continue
        there = here | {axis: 2 * here[axis]}
        if reach is not None and there[axis] > reach.bounds(axis)[1] * (1 + 1e-9):
            continue
        drawn = _at(law, resampled.parameters, there) - _at(law, resampled.parameters, here)
        low, high = percentiles(drawn)
        own = law.fitted.parameters[None]
        gained = _at(law, own, there) - _at(law, own, here)
        found["data" if axis == "effective" else axis] = Gain(float(gained[0]), float(low), float(high))
    return found


def _at(law: ScalingLaw, parameters: Table, place: Mapping[str, float]) -> Table:
    """(R,) what a law with parameters (R, p) predicts."""
    return law.predict_many(parameters, place["depth"], place["width"], place["effective"], place.get("negatives"))


def advice_of(found: Mapping[str, Gain]) -> str:
    """The doubling with the largest gain of those whose interval is above 0: data, a model, negatives, or neither."""
    worthwhile = {name: gain.value for name, gain in found.items() if gain.low > 0}
    if not worthwhile:
        return "neither"
    best = max(worthwhile, key=lambda name: worthwhile[name])
    return {"data": "more data", "negatives": "more negatives"}.get(best, "bigger model")


def in_words(
    form: str,
    found: Mapping[str, AxisEvidence],
    peaks: Mapping[str, float],
    determined: Mapping[str, bool],
    doubled: Mapping[str, Gain],
    base: tuple[float, float],
    effective: float,
) -> str:
    """The verdict: it begins with the form, then says what each axis does, and what doubling would add."""
    axes = []
    for name, axis in found.items():
        if axis.kind == "peaked":
            where = f"best near {peaks[name]:.0f}" if determined[name] else "best inside the grid, but not known where"
            axes.append(f"{name} is {where}")
        elif axis.kind == "flat":
            axes.append(f"{name} makes no difference that these points show")
        else:
            axes.append(f"the metric {'rises' if axis.kind == 'rising' else 'falls'} with {name} over the grid")
    sentences = [f"{form}: {'; '.join(axes)}."]
    said = ", ".join(f"{name} {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]" for name, gain in doubled.items())
    sentences.append(
        f"From depth {base[0]:g}, width {base[1]:g} and {effective:,.0f} effective data, doubling is predicted to "
        f"change the metric by: {said}."
        if said
        else "Doubling anything leaves what the points reach, so no gain is told."
    )
    endings = {
        "neither": "Neither more data nor a bigger model is shown to help: no interval is above 0.",
        "more data": "More data help most.",
        "bigger model": "A bigger model helps most.",
        "more negatives": "More negatives help most.",
    }
    sentences.append(endings[advice_of(doubled)])
    if "data" not in doubled:
        sentences.append("What more data would do is not known from these points.")
    return " ".join(sentences)
