"""The plots of a scaling report: each function gives a figure and the sentence under it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llmrec.page import plot
from llmrec.scaling.account import COSTS, EncoderAccount
from llmrec.scaling.performance_law import PerformanceLaw
from llmrec.scaling.power_law import PowerLaw
from llmrec.scaling.scaling_fit import ScalingFit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Table = npt.NDArray[np.float64]
Drawing = tuple["Figure", str]

_COLOURS = ("#0a63c9", "#b42318", "#1a7f37", "#8250df", "#9a6700", "#57606a")
_MARKS = "osD^vP"
_SPELT = {"depth": "depth", "width": "width", "effective": "effective data D'"}


def law_figure(fit: ScalingFit, axis: str, metric: str) -> Drawing:
    """The points and two laws over one axis: a line for each value of another, at the points' most data.

    Args:
        fit: the laws.
        axis: "depth", "width" or "effective".
        metric: its name.
    """
    other = "width" if axis == "depth" else "depth"
    grid = fit.grid
    figure, axes = plot(4.0)
    chosen = np.ones(len(grid), dtype=np.bool_)
    if axis != "effective":
        chosen = np.isclose(grid.effective, grid.effective.max())
    if grid.negatives is not None:
        chosen &= np.isclose(grid.negatives, grid.negatives[chosen].max())
    values = grid.axis(axis)
    assert values is not None
    if axis == "effective":  # one line for each size
        kinds = [f"{depth:g} x {width:g}" for depth, width in zip(grid.depth, grid.width, strict=True)]
    else:
        held = grid.axis(other)
        assert held is not None
        kinds = [f"{other} {value:g}" for value in held]
    names = list(dict.fromkeys(kind for kind, taken in zip(kinds, chosen, strict=True) if taken))
    shown = names[:: max(1, len(names) // 6)][:6]
    along = np.geomspace(values[chosen].min(), values[chosen].max(), 60)
    for place, name in enumerate(shown):
        rows = np.flatnonzero(chosen & np.array([kind == name for kind in kinds]))
        colour = _COLOURS[place % len(_COLOURS)]
        axes.plot(values[rows], grid.mean[rows], _MARKS[place % len(_MARKS)], color=colour, label=name)
        first = int(rows[0])
        for law, style in ((PerformanceLaw.name, "-"), (PowerLaw.name, ":")):
            axes.plot(along, _along(fit, law, axis, along, first), style, color=colour, linewidth=1.2)
    _logarithmic(axes, values[chosen])
    axes.set_xlabel(_SPELT[axis])
    _finish(axes, metric, len(shown))
    best = int(np.flatnonzero(chosen)[np.argmax(grid.mean[chosen])])
    left = "" if len(shown) == len(names) else f" {len(names) - len(shown)} more lines are in the table alone."
    return figure, (
        f"{metric} by {_SPELT[axis]}: measured (marks), the Performance Law (lines) and the power law (dots). Best "
        f"measured: depth {grid.depth[best]:g}, width {grid.width[best]:g}, {grid.mean[best]:.4f}.{left}"
    )


def residual_figure(fit: ScalingFit, metric: str) -> Drawing:
    """What each law leaves unexplained, cell by cell."""
    figure, axes = plot(3.2)
    said = []
    for place, (law, name) in enumerate(((PerformanceLaw.name, "Performance Law"), (PowerLaw.name, "power law"))):
        at = fit.candidates[law].law.fitted.at(fit.grid)
        residuals = fit.grid.mean - at
        axes.plot(at, residuals, _MARKS[place], color=_COLOURS[place], label=name, alpha=0.8)
        said.append(
            f"{name} {fit.candidates[law].accuracy.mae:.4f}, cells left out "
            f"{fit.candidates[law].accuracy.leave_one_out_mae:.4f}"
        )
    axes.axhline(0, color="#808080", linewidth=0.8)
    axes.set_xlabel(f"{metric} by the law")
    _finish(axes, "measured - law", 2)
    return figure, f"Residuals of the cells. Mean absolute: {'; '.join(said)}."


def optimum_figure(fit: ScalingFit) -> Drawing:
    """The Performance Law's optimum of depth and width with its interval, over the grid and the reach."""
    figure, axes = plot(1.9)
    said = []
    for place, (axis, (low, high)) in enumerate(fit.peak_intervals.items()):
        first, last = fit.reach.ends[axis]
        bottom, top = fit.reach.bounds(axis)
        peak = fit.performance_law.peak[axis]
        axes.plot([bottom, top], [place, place], color="#808080", linewidth=0.8)
        axes.plot([first, last], [place, place], color="#808080", linewidth=5, alpha=0.35)
        axes.plot([low, high], [place, place], color=_COLOURS[0], linewidth=2)
        inside = bool(np.isfinite(peak)) and bottom <= peak <= top
        if inside:
            axes.plot([peak], [place], "o", color=_COLOURS[1])
        sure = "" if fit.determined[axis] else ", not determined"
        best = f"{peak:.3g}" if inside else "out of reach"
        said.append(f"{axis} {best} [{low:.3g}, {high:.3g}]{sure}")
    axes.set_yticks(range(len(fit.peak_intervals)), list(fit.peak_intervals))
    axes.set_ylim(-0.6, len(fit.peak_intervals) - 0.4)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x", alpha=0.3)
    return figure, (
        f"The law's optimum (dot) with its 90 % interval; thick: the grid, thin: three times beyond it. "
        f"{'; '.join(said)}."
    )


def frontier_figure(account: EncoderAccount, metric: str) -> Drawing | None:
    """What each cell cost and reached, and the ones that nothing cheaper equals; None without costs."""
    if account.fit is None or account.costs is None or account.cost is None:
        return None
    grid, costs = account.fit.grid, account.cell_costs()
    at = account.fit.candidates[account.fit.chosen].law.fitted.at(grid)
    figure, axes = plot(3.6)
    axes.plot(costs, at, "_", color="#808080", markersize=9, label="by the law")
    axes.plot(costs, grid.mean, "o", color=_COLOURS[0], label="measured")
    front = account.frontier()
    axes.step(costs[front], grid.mean[front], where="post", color=_COLOURS[1], label="frontier")
    _logarithmic(axes, costs)
    axes.set_xlabel(COSTS[account.cost])
    _finish(axes, metric, 3)
    steps = "; ".join(
        f"{costs[place]:.3g}: {grid.depth[place]:g} x {grid.width[place]:g}, {grid.mean[place]:.4f}"
        for place in _some(front, 6)
    )
    return figure, f"What {metric} costs, in {COSTS[account.cost]} of a training (depth x width). {steps}."


def loss_figure(account: EncoderAccount, metric: str) -> Drawing | None:
    """Validation loss against the metric; None where fewer than 4 trainings have a loss."""
    agreement, points = account.loss_agreement(), account.points
    if agreement is None or points.loss is None:
        return None
    known = np.flatnonzero(np.isfinite(points.loss))
    figure, axes = plot(3.4)
    shares = np.unique(points.effective[known])
    largest = shares[-len(_MARKS) :]
    if len(fewer := known[points.effective[known] < largest[0]]):
        axes.plot(points.loss[fewer], points.metric[fewer], ".", color="#808080", label=f"D' below {largest[0]:,.0f}")
    for place, data in enumerate(largest):
        rows = known[np.isclose(points.effective[known], data)]
        mark, colour = _MARKS[place % len(_MARKS)], _COLOURS[place % len(_COLOURS)]
        axes.plot(points.loss[rows], points.metric[rows], mark, color=colour, label=f"D' {data:,.0f}")
    axes.set_xlabel("validation loss")
    _finish(axes, metric, len(largest))
    lowest, best = known[np.argmin(points.loss[known])], known[np.argmax(points.metric[known])]
    sizes = [f"depth {points.depth[row]:g}, width {points.width[row]:g}" for row in (lowest, best)]
    return figure, (
        f"Loss and {metric} of each training. Rank correlation of -loss and {metric}: {agreement:.2f}. "
        f"The lowest loss, {points.loss[lowest]:.4f} ({sizes[0]}), goes with {points.metric[lowest]:.4f}; the best "
        f"{metric}, {points.metric[best]:.4f} ({sizes[1]}), with a loss of {points.loss[best]:.4f}."
    )


def _along(fit: ScalingFit, law: str, axis: str, along: Table, row: int) -> Table:
    """A law over an axis, the others as in this cell."""
    grid = fit.grid
    place: dict[str, Table | float] = {
        "depth": float(grid.depth[row]),
        "width": float(grid.width[row]),
        "effective": float(grid.effective[row]),
    }
    place[axis] = along
    negatives = None if grid.negatives is None else float(grid.negatives[row])
    return fit.candidates[law].law.predict(place["depth"], place["width"], place["effective"], negatives)


def _logarithmic(axes: "Axes", values: Table) -> None:
    """A logarithmic axis, with the values themselves as ticks where they are few."""
    levels = np.unique(values)
    axes.set_xscale("log")
    if len(levels) <= 8 and levels.max() < 1e5:
        axes.set_xticks(levels.tolist(), [f"{level:g}" for level in levels])
        axes.minorticks_off()


def _finish(axes: "Axes", label: str, lines: int) -> None:
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize=8, ncols=2 if lines > 4 else 1)


def _some(places: Sequence[int], most: int) -> list[int]:
    """At most so many of them, the last among them."""
    return list(places) if len(places) <= most else [*places[: most - 1], places[-1]]
