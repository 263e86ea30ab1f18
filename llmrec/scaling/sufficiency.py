"""Whether points can tell a law at all: how many cells, how many values per axis, and whether axes vary apart."""

import numpy as np

from llmrec.exceptions import DataError
from llmrec.scaling.additive import Grid


def parameters_needed(grid: Grid) -> int:
    """How many parameters the Performance Law has for a grid: level, depth, width, data, negatives."""
    sizes = sum(min(grid.levels(axis), 3) - 1 for axis in ("depth", "width"))
    return 1 + sizes + (grid.levels("effective") > 1) + (grid.levels("negatives") > 1)


def require_enough(grid: Grid) -> None:
    """Refuses a grid that no law can be fitted to; what it lacks is said.

    Raises:
        DataError: if depth or width has one value only, all metrics are equal, there are not more cells than
            parameters, or two axes change together only.
    """
    for axis, what in (("depth", "layers"), ("width", "the hidden size")):
        if grid.levels(axis) == 1:
            only = int(grid.ends(axis)[0])
            others = (only // 2, 2 * only) if only > 1 else (2, 4)
            raise DataError(
                f"All points have one {axis}, {only}, so nothing tells what {what} would change. Add trainings of at "
                f"least two other values, such as {axis} {others[0]} and {others[1]}, at each "
                f"{'width' if axis == 'depth' else 'depth'}."
            )
    if np.ptp(grid.mean) == 0:
        raise DataError(
            f"All points have the metric {grid.mean[0]:g}, so there is nothing to fit. Check that every row is a "
            "training and an evaluation of its own, and add sizes that differ more."
        )
    needed = parameters_needed(grid)
    if len(grid) <= needed:
        raise DataError(
            f"There are {len(grid)} different points (size and data; seeds do not count) for {needed} parameters. Add "
            f"at least {needed + 1 - len(grid)} more: other depths and widths, and 2 or 3 shares of the data."
        )
    columns, names = [np.ones(len(grid))], [""]
    for axis in ("depth", "width", "effective", "negatives"):
        if (values := grid.axis(axis)) is None or grid.levels(axis) == 1:
            continue
        x = np.log(values)
        x = (x - x.mean()) / x.std()
        columns.append(x)
        names.append(axis)
        if axis in ("depth", "width") and grid.levels(axis) > 2:
            columns.append(x * x)
            names.append(axis)
        if np.linalg.matrix_rank(np.stack(columns, axis=1), tol=1e-6) < len(columns):
            raise DataError(
                f"The {_what(axis)} of the points changes only together with their "
                f"{' and '.join(dict.fromkeys(_what(name) for name in names[1:] if name != axis))}, so their effects "
                f"cannot be told apart. Add trainings that differ in {_what(axis)} alone."
            )


def _what(axis: str) -> str:
    return "effective data" if axis == "effective" else axis
