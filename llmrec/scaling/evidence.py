"""Whether points speak for a peak of depth or width, for a rise, or for nothing: tests by simulation.

Rising ever more slowly and rising to a peak look alike where noise is large, and a law that has a peak will always
find one. So a peak is believed only if a monotone axis would hardly have given such points (Cox 1962; by simulation,
Williams 1970): the law with that axis' term replaced by a power law's is fitted, many grids are drawn from it with its
own noise, and the share is counted in which the peaked form wins by as much as it does on the points.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from llmrec.evaluation.uncertainty import holm
from llmrec.scaling.additive import AdditiveForm, Grid
from llmrec.scaling.fitting import Fitted, fit_form, fit_many
from llmrec.scaling.terms import PeakedTerm, PowerTerm

Table = npt.NDArray[np.float64]

ALPHA = 0.05
DRAWS = 199


@dataclass(frozen=True)
class AxisEvidence:
    """What the points say about depth or width.

    Attributes:
        axis: its name.
        kind: "flat" (sizes do not differ by more than chance), "peaked" (a peak inside the grid, that monotone axes
            would hardly give), "rising" or "falling".
        effect_p: chance of so much difference if the axis did nothing.
        peak_p: chance of such a shape if the axis were monotone, corrected for both axes (Holm); 1 where the best lies
            outside the grid, None where two values cannot tell.
    """

    axis: str
    kind: str
    effect_p: float
    peak_p: float | None


def evidence(fitted: Fitted, grid: Grid, seed: int = 0, draws: int = DRAWS) -> dict[str, AxisEvidence]:
    """Tests the Performance Law's fit, for depth and width, by so many draws: p is at least 1 / (draws + 1)."""
    effects: dict[str, float] = {}
    peaks: dict[str, float] = {}
    rises: dict[str, bool] = {}
    inside: dict[str, bool] = {}
    for place, term in enumerate(fitted.form.terms):
        if term.axis not in ("depth", "width"):
            continue
        terms = fitted.form.terms
        without = AdditiveForm(terms[:place] + terms[place + 1 :])
        effects[term.axis] = chance(fit_form(without, grid, seed), fitted, grid, seed, draws)
        start = 1 + sum(len(other.names) for other in terms[:place])
        if isinstance(term, PeakedTerm):
            monotone = replace(
                fitted.form, terms=(*terms[:place], PowerTerm(term.axis, term.low, term.high), *terms[place + 1 :])
            )
            null = fit_form(monotone, grid, seed)
            rises[term.axis] = bool(null.parameters[start] > 0)
            slope, bend = fitted.parameters[start : start + 2]
            inside[term.axis] = bool(slope > 0 and bend * term.low < np.log(2) < bend * term.high)
            peaks[term.axis] = chance(null, fitted, grid, seed, draws) if inside[term.axis] else 1.0
        else:
            rises[term.axis] = bool(fitted.parameters[start] > 0)
    corrected = dict(zip(peaks, holm(list(peaks.values())).tolist(), strict=True)) if peaks else {}
    found = {}
    for axis, effect in effects.items():
        if effect >= ALPHA:
            kind = "flat"
        elif axis in peaks and inside[axis] and corrected[axis] < ALPHA:
            kind = "peaked"
        else:
            kind = "rising" if rises[axis] else "falling"
        found[axis] = AxisEvidence(axis, kind, effect, corrected.get(axis))
    return found


def chance(null: Fitted, full: Fitted, grid: Grid, seed: int = 0, draws: int = DRAWS) -> float:
    """The p-value of a null form against another: how often its own data give as small a share of its squares.

    Grids are drawn from the null's values with normal noise of its residuals' spread; both forms are fitted to each.
    The statistic is the null's sum of squares by the other's. p counts the points as one more draw.
    """
    rng = np.random.default_rng((seed, 3))
    freedom = max(len(grid) - len(null.parameters), 1)
    spread = np.sqrt(null.squares / freedom)
    noise = rng.normal(size=(draws, len(grid))) * spread / np.sqrt(grid.count)
    targets = null.at(grid) + noise
    _, of_null = fit_many(null.form, grid, targets, null)
    _, of_full = fit_many(full.form, grid, targets, full)
    smallest = 1e-12 * float(grid.count @ (grid.mean - grid.mean.mean()) ** 2)
    observed = null.squares / max(full.squares, smallest)
    extreme = of_null / np.maximum(of_full, smallest) >= observed * (1 - 1e-9)
    return (1 + int(np.count_nonzero(extreme))) / (draws + 1)
