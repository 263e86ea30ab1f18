"""Least squares for additive laws: bounded, from many starts; and many at once for resamples.

The points' own fit is scipy's bounded least squares from the best of several hundred starts: at each, the parameters
in which a law is linear are solved for exactly, and the sums of squares compared. The fits of resamples, thousands of
small problems that differ in their targets alone, are done together by damped Gauss-Newton steps within bounds
(Levenberg 1944, Marquardt 1963), in batches of numpy arrays.

A term whose factor is 0 has no slope by its shape, so that a search ends there though another shape would help. Where
that is so, the search goes on with the shape that helps most.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmrec.scaling.additive import AdditiveForm, Grid, Starts

Table = npt.NDArray[np.float64]

_POLISHED = 4  # of the starts, the best ones
_DRAWN = 2  # starts between them, by seed
_STEPS = 50


@dataclass(frozen=True)
class Fitted:
    """A form with its best parameters.

    Attributes:
        form: the form.
        parameters: (p,).
        lower, upper: (p,) the box in which they were found.
        squares: the weighted sum of squares over cells: count * (mean - value)^2.
    """

    form: AdditiveForm
    parameters: Table
    lower: Table
    upper: Table
    squares: float

    def at(self, grid: Grid) -> Table:
        """(c,) the values at a grid's cells."""
        return np.asarray(self.form.values(self.parameters[None], grid.logarithms())[0])


def fit_form(form: AdditiveForm, grid: Grid, seed: int = 0) -> Fitted:
    """The least-squares parameters of a form; cells count by their replicates, so it is that of the rows.

    Args:
        form: what to fit.
        grid: the cells.
        seed: of the starts that are drawn between the best ones.
    """
    from scipy.optimize import least_squares

    x, weights = grid.logarithms(), np.sqrt(grid.count)
    starts = form.starts()
    solved, squares = _solved(form, grid, starts, grid.mean[None])
    order = np.argsort(squares[:, 0], kind="stable")
    chosen = [(solved[place, 0], starts.lower[place], starts.upper[place]) for place in order[:_POLISHED]]
    rng = np.random.default_rng(seed)
    for place in order[:_DRAWN]:
        mate = rng.choice(np.flatnonzero((starts.lower == starts.lower[place]).all(axis=1)))
        share = rng.uniform()
        between = share * solved[place, 0] + (1 - share) * solved[mate, 0]
        chosen.append((between, starts.lower[place], starts.upper[place]))
    best: Fitted | None = None
    for start, lower, upper in chosen:
        found = least_squares(
            lambda given: weights * (form.values(given[None], x)[0] - grid.mean),
            np.clip(start, lower, upper),
            jac=lambda given: weights[:, None] * form.derivatives(given[None], x)[0],
            bounds=(lower, upper),
            x_scale="jac",
            ftol=1e-13,
            xtol=1e-12,
            gtol=1e-15,
            max_nfev=400,
        )
        if best is None or 2 * found.cost < best.squares:
            best = Fitted(form, np.asarray(found.x), lower, upper, 2 * float(found.cost))
    assert best is not None
    # scipy keeps strictly inside the bounds; the last digits, and what lies on a bound, are found from there.
    ended = _searched(
        form, grid, best.parameters[None], best.lower[None], best.upper[None], grid.mean[None], grid.count[None]
    )
    if ended.squares[0] >= best.squares:
        return best
    return Fitted(form, ended.parameters[0], ended.lower[0], ended.upper[0], float(ended.squares[0]))


def fit_many(
    form: AdditiveForm, grid: Grid, targets: Table, near: Fitted | None = None, counts: Table | None = None
) -> tuple[Table, Table]:
    """The least-squares parameters (R, p), and the sums of squares (R,), for each of R sets of cells' means.

    Each begins at the best of the form's starts for it, and at `near`; the better end counts.

    Args:
        form: what to fit.
        grid: the cells.
        targets: (R, c) their means.
        near: a fit of other targets of the same grid.
        counts: (R, c) the cells' weights if not the replicates' number; 0 leaves a cell out.
    """
    weights = np.broadcast_to(grid.count, targets.shape) if counts is None else counts
    starts = form.starts()
    solved, squares = _solved(form, grid, starts, targets)
    best = np.argmin(squares, axis=0)
    rows = np.arange(len(targets))
    begin, lower, upper = solved[best, rows], starts.lower[best], starts.upper[best]
    if near is None:
        found = _searched(form, grid, begin, lower, upper, targets, weights)
        return found.parameters, found.squares
    # Both searches of all resamples in one batch.
    ends = _searched(
        form,
        grid,
        np.concatenate([begin, np.broadcast_to(near.parameters, begin.shape)]),
        np.concatenate([lower, np.broadcast_to(near.lower, begin.shape)]),
        np.concatenate([upper, np.broadcast_to(near.upper, begin.shape)]),
        np.concatenate([targets, targets]),
        np.concatenate([weights, weights]),
    )
    better = np.where(ends.squares[len(rows) :] < ends.squares[: len(rows)], rows + len(rows), rows)
    return ends.parameters[better], ends.squares[better]


@dataclass(frozen=True)
class _Ends:
    """Where searches ended: parameters, lower and upper bounds (R, p), and the sums of squares (R,)."""

    parameters: Table
    lower: Table
    upper: Table
    squares: Table


def _searched(
    form: AdditiveForm, grid: Grid, parameters: Table, lower: Table, upper: Table, targets: Table, counts: Table
) -> _Ends:
    """Descends, and descends again from where a term without effect has got a shape with one."""
    parameters, squares = _descended(form, grid, parameters, lower, upper, targets, counts)
    for _ in form.terms:
        revived = _revived(form, grid, _Ends(parameters, lower, upper, squares), targets, counts)
        if revived is None:
            break
        rows, start, below, above = revived
        there, new = _descended(form, grid, start, below, above, targets[rows], counts[rows])
        lowered = new < squares[rows]
        if not lowered.any():
            break
        rows = rows[lowered]
        parameters, lower, upper, squares = (given.copy() for given in (parameters, lower, upper, squares))
        parameters[rows], squares[rows] = there[lowered], new[lowered]
        lower[rows], upper[rows] = below[lowered], above[lowered]
    return _Ends(parameters, lower, upper, squares)


def _revived(
    form: AdditiveForm, grid: Grid, ends: _Ends, targets: Table, counts: Table
) -> tuple[npt.NDArray[np.int64], Table, Table, Table] | None:
    """Rows in which another shape of a term whose factor is 0 lowers the sum of squares; starts and bounds for them.

    At the end of a search the residuals have no slope by the other parameters, so the slope by the factor decides:
    that shape is taken whose unit-length change of the values lowers the squares fastest. None if there is no row.
    """
    x = grid.logarithms()
    parameters, lower, upper = ends.parameters.copy(), ends.lower.copy(), ends.upper.copy()
    residuals = counts * (form.values(parameters, x) - targets)
    promised = 1e-6 * np.sqrt(ends.squares)
    chosen = np.zeros(len(parameters), dtype=np.bool_)
    for term, columns in form.columns():
        if not term.is_scaled or len(term.names) < 2:
            continue
        dead = np.abs(ends.parameters[:, columns.start]) < 1e-12
        for branch in term.branches():
            direction = 1.0 if branch.upper[0] > 0 else -1.0
            for shape in branch.shapes:
                change = term.values(np.array([[1.0, *shape]]), x[term.axis])[0]
                around = change - (counts @ change / counts.sum(axis=1))[:, None]
                length = np.sqrt((counts * around**2).sum(axis=1))
                gain = -direction * (residuals @ change) / np.maximum(length, 1e-300)
                better = dead & (gain > promised)
                promised = np.where(better, gain, promised)
                chosen |= better
                # One term at a time: what an earlier one was given goes back.
                parameters[better], lower[better], upper[better] = (
                    given[better] for given in (ends.parameters, ends.lower, ends.upper)
                )
                parameters[better, columns] = [0.0, *shape]
                lower[better, columns], upper[better, columns] = branch.lower, branch.upper
    rows = np.flatnonzero(chosen)
    return (rows, parameters[rows], lower[rows], upper[rows]) if len(rows) else None


def _solved(form: AdditiveForm, grid: Grid, starts: Starts, targets: Table) -> tuple[Table, Table]:
    """(S, R, p) every start with its factors solved for and put into their bounds, and (S, R) the sums of squares."""
    x, root, scaled = grid.logarithms(), np.sqrt(grid.count), form.scaled
    shapes = starts.parameters.copy()
    shapes[:, scaled] = 1.0
    columns = form.derivatives(shapes, x)[:, :, scaled]  # (S, c, l): with factors of 1, what each multiplies
    shapes[:, scaled] = 0.0
    fixed = form.values(shapes, x)  # (S, c): what no factor multiplies
    inverse = np.linalg.pinv(columns * root[None, :, None], rcond=1e-10)
    parameters = np.repeat(starts.parameters[:, None], len(targets), axis=1)
    squares = np.empty((len(shapes), len(targets)))
    for place in range(len(shapes)):
        wanted = targets - fixed[place]
        factors = (wanted * root) @ inverse[place].T
        factors = np.clip(factors, starts.lower[place, scaled], starts.upper[place, scaled])
        # What is clipped moves the level: it is solved for again.
        left = wanted - factors[:, 1:] @ columns[place][:, 1:].T
        factors[:, 0] = left @ grid.count / grid.count.sum()
        parameters[place][:, scaled] = factors
        squares[place] = ((left - factors[:, :1]) ** 2) @ grid.count
    return parameters, squares


def _descended(
    form: AdditiveForm, grid: Grid, parameters: Table, lower: Table, upper: Table, targets: Table, counts: Table
) -> tuple[Table, Table]:
    """(R, p) the ends of damped Gauss-Newton steps from `parameters` within bounds, and (R,) their sums of squares.

    A parameter at a bound that the step would leave stays there for that step; a step beyond a bound ends at it. A
    step that does not lower the sum of squares is not taken, and the next is damped more.
    """
    x, root = grid.logarithms(), np.sqrt(counts)
    parameters = np.clip(parameters, lower, upper)
    residuals = root * (form.values(parameters, x) - targets)
    squares = (residuals**2).sum(axis=1)
    damping = np.full(len(parameters), 1e-3)
    active = np.arange(len(parameters))
    idle = np.zeros(len(parameters), dtype=np.int64)
    for _ in range(_STEPS):
        at = parameters[active]
        slopes = root[active][:, :, None] * form.derivatives(at, x)
        gradient = np.einsum("rcp,rc->rp", slopes, residuals[active])
        normal = np.einsum("rcp,rcq->rpq", slopes, slopes)
        held = ((at <= lower[active]) & (gradient > 0)) | ((at >= upper[active]) & (gradient < 0))
        normal[np.repeat(held[:, :, None], normal.shape[2], axis=2)] = 0.0
        normal[np.repeat(held[:, None, :], normal.shape[1], axis=1)] = 0.0
        diagonal = np.einsum("rpp->rp", normal)
        floor = np.maximum(diagonal.max(axis=1, keepdims=True), 1e-300) * 1e-14
        ridge = np.maximum(damping[active, None] * diagonal, floor) + np.where(held, 1.0, 0.0)
        indices = np.arange(normal.shape[1])
        normal[:, indices, indices] += ridge
        step = np.linalg.solve(normal, -np.where(held, 0.0, gradient)[:, :, None])[:, :, 0]
        tried = np.clip(at + step, lower[active], upper[active])
        there = root[active] * (form.values(tried, x) - targets[active])
        new = (there**2).sum(axis=1)
        new = np.where(np.isfinite(new), new, np.inf)
        lowered = new < squares[active]
        gain = squares[active] - new
        small = lowered & (gain <= 1e-8 * squares[active])
        taken = active[lowered]
        parameters[taken], residuals[taken], squares[taken] = tried[lowered], there[lowered], new[lowered]
        damping[active] = np.where(lowered, damping[active] / 4, damping[active] * 6)
        idle[active] = np.where(small, idle[active] + 1, np.where(lowered, 0, idle[active]))
        active = active[(idle[active] < 2) & (damping[active] < 1e12)]
        if not len(active):
            break
    return parameters, squares
