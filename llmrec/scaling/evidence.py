"""Whether points speak for a peak of depth or width, for a rise, or for nothing: tests by simulation.

Rising ever more slowly and rising to a peak look alike where noise is large, and a law that has a peak will always
find one. So a peak is believed only if a monotone axis would hardly have given such points (Cox 1962; by simulation,
Williams 1970): the law with that axis' term replaced by a power law's is fitted, many grids are drawn from it with its
own noise, and the share is counted in which the peaked form wins by as much as it does on the points.

What rises and then stays is no power law either, and has no peak. So the largest size must also be worse than the best
one, by more than chance and whatever the shape between them. Both have to be rejected: the larger p-value counts.
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
        peak_p: chance of such a shape if the axis were a power law, or of so low an end if it only stayed what it was
            at best, whichever is larger; corrected for both axes (Holm). 1 where the best lies outside the grid, None
            where two values cannot tell.
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
            peaks[term.axis] = 1.0
            if inside[term.axis]:
                peaks[term.axis] = max(chance(null, fitted, grid, seed, draws), chance_of_end(term.axis, fitted, grid))
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


def chance_of_end(axis: str, fitted: Fitted, grid: Grid) -> float:
    """The p-value of an axis' last size being no worse than the best one before it: Student's t, one-sided.

    Depths and widths have a level each, whatever a law says of them; the noise is what the law leaves unexplained. 1
    where the last is the best. 0 where the cells do not compare the two sizes, so that other tests decide.
    """
    from scipy.stats import t

    root = np.sqrt(grid.count)
    columns, names = [np.ones(len(grid))], [("", 0.0)]
    for name in ("depth", "width"):
        values = grid.logarithms()[name]
        for level in np.unique(values)[1:].tolist():
            columns.append((values == level).astype(np.float64))
            names.append((name, level))
    for name in ("effective", "negatives"):
        if grid.levels(name) > 1:
            columns.append(grid.logarithms()[name])
            names.append((name, 0.0))
    design = np.stack(columns, axis=1) * root[:, None]
    inverse = np.linalg.pinv(design)
    solved = inverse @ (root * grid.mean)
    places = [place for place, (name, _) in enumerate(names) if name == axis]  # the first size is what others add to
    best = int(np.argmax([0.0, *solved[places[:-1]]]))
    contrast = np.zeros(len(names))
    contrast[places[-1]] = -1.0
    if best:
        contrast[places[best - 1]] = 1.0
    if np.abs(contrast - contrast @ inverse @ design).max() > 1e-6:
        return 0.0
    fall = float(contrast @ solved)
    if fall <= 0:
        return 1.0
    freedom = max(len(grid) - len(fitted.parameters), 1)
    spread = float(np.sqrt(fitted.squares / freedom) * np.linalg.norm(contrast @ inverse))
    return float(t.sf(fall / max(spread, 1e-300), freedom))


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
