"""What one axis (depth, width, data, negatives) adds to a metric: the terms of which laws are made.

A term is a function of the axis' natural logarithm x and of few parameters. It is 0 in the middle of the grid, so that
the level of a law is its value there: the level and the terms then hardly depend on each other, and least squares is
well-conditioned. Parameters come in batches, (R, k), because laws are fitted to many resamples at once.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.float64]

REACH = 3.0  # an optimum is looked for up to this factor beyond the grid, in both directions


@dataclass(frozen=True)
class Branch:
    """A box of parameters to search, and the shapes at which to start.

    Attributes:
        lower, upper: (k,) bounds.
        shapes: starting values of the parameters but the first where that is a factor of the term, else of all.
    """

    lower: tuple[float, ...]
    upper: tuple[float, ...]
    shapes: tuple[tuple[float, ...], ...]


class Term(Protocol):
    """What an axis adds.

    Attributes:
        axis: its name.
        low, high: the grid's ends, as logarithms.
        names: of the parameters.
        is_scaled: whether the first parameter is a factor of the whole term.
    """

    @property
    def axis(self) -> str: ...

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def is_scaled(self) -> bool: ...

    def branches(self) -> tuple[Branch, ...]: ...

    def values(self, parameters: Table, x: Table) -> Table:
        """(R, n) of parameters (R, k) at the logarithms x (n,)."""
        ...

    def derivatives(self, parameters: Table, x: Table) -> Table:
        """(R, n, k) by the parameters."""
        ...


@dataclass(frozen=True)
class PeakedTerm:
    """The Performance Law's term of depth or width, which rises and then falls: -w (ln z + 1 / (2 z)), z = size^v.

    With bend a = -v and slope s = w a / 2, the slope at size 1, it is s (2 x - (e^(a x) - 1) / a) but for a constant.
    Its slope s (2 - e^(a x)) is 0 at x = ln 2 / a, the peak. For a = 0 it is log-linear. Only concave shapes are
    searched: s, a >= 0 (rising first) and s, a <= 0 (falling from size 1 on).

    Attributes:
        axis: its name.
        low, high: the grid's ends, as logarithms.
    """

    axis: str
    low: float
    high: float

    @property
    def names(self) -> tuple[str, ...]:
        return (f"{self.axis}_slope", f"{self.axis}_bend")

    @property
    def is_scaled(self) -> bool:
        return True

    def branches(self) -> tuple[Branch, ...]:
        steepest = math.log(2) / max(self.low - math.log(REACH), math.log(1.25))
        peaks = np.linspace(max(self.low - math.log(REACH), math.log(1.25)), self.high + math.log(REACH), 5)
        rising = ((0.0,), (math.log(2) / (3 * float(peaks[-1])),), *((math.log(2) / peak,) for peak in peaks.tolist()))
        return (
            Branch((0.0, 0.0), (math.inf, steepest), rising),
            Branch((-math.inf, -steepest), (0.0, 0.0), ((-steepest / 5,),)),
        )

    def values(self, parameters: Table, x: Table) -> Table:
        slope, bend = parameters[:, :1], parameters[:, 1:2]
        return slope * (_rise(bend, x[None]) - _rise(bend, np.full((1, 1), self._middle)))

    def derivatives(self, parameters: Table, x: Table) -> Table:
        slope, bend = parameters[:, :1], parameters[:, 1:2]
        middle = np.full((1, 1), self._middle)
        by_slope = _rise(bend, x[None]) - _rise(bend, middle)
        return np.stack([by_slope, slope * (_rise_by_bend(bend, x[None]) - _rise_by_bend(bend, middle))], axis=2)

    @property
    def _middle(self) -> float:
        return (self.low + self.high) / 2


@dataclass(frozen=True)
class GrowthTerm:
    """The Performance Law's term of effective data: ln z + 1 / (2 z), z = D'^w, with one parameter w.

    It grows nearly like w ln D'. Slightly negative w are searched too, up to where more data would hurt most, so that
    data that do not help are found to be such without standing at a bound.

    Attributes:
        axis: its name.
        low, high: the grid's ends, as logarithms.
    """

    axis: str
    low: float
    high: float

    @property
    def names(self) -> tuple[str, ...]:
        return (f"{self.axis}_growth",)

    @property
    def is_scaled(self) -> bool:
        return False

    def branches(self) -> tuple[Branch, ...]:
        # At w = -0.37 / ln D' the slope by ln D' is lowest; beyond, it rises again, and w were not unique.
        return (Branch((-0.35 / max(self.high, 1.0),), (2.0,), ((0.0,), (0.02,), (0.2,))),)

    def values(self, parameters: Table, x: Table) -> Table:
        middle = (self.low + self.high) / 2
        bent = np.exp(-parameters * x[None]) - np.exp(-parameters * middle)
        return np.asarray(parameters * (x[None] - middle) + bent / 2)

    def derivatives(self, parameters: Table, x: Table) -> Table:
        middle = (self.low + self.high) / 2
        bent = x[None] * np.exp(-parameters * x[None]) - middle * np.exp(-parameters * middle)
        return np.asarray((x[None] - middle - bent / 2)[:, :, None])


@dataclass(frozen=True)
class PowerTerm:
    """A power law's term, -A / size^p. A, p > 0: it rises ever more slowly towards an end.

    Where larger sizes hurt, signs are free, as published fits leave them: A < 0 < p falls ever more slowly, and
    A > 0 > p ever faster. A term is monotone in any case. Searched by the gain from the grid's low end to its high
    end, and by p; A = gain size_low^p / (1 - ratio^-p) with the grid's ratio. Towards p = 0 it is log-linear.

    Attributes:
        axis: its name.
        low, high: the grid's ends, as logarithms, low < high.
    """

    axis: str
    low: float
    high: float

    @property
    def names(self) -> tuple[str, ...]:
        return (f"{self.axis}_gain", f"{self.axis}_power")

    @property
    def is_scaled(self) -> bool:
        return True

    def branches(self) -> tuple[Branch, ...]:
        return (
            Branch((0.0, 0.01), (math.inf, 5.0), ((0.02,), (0.3,), (1.0,), (2.5,))),
            Branch((-math.inf, 0.01), (0.0, 5.0), ((0.3,), (2.0,))),
            Branch((-math.inf, -10.0), (0.0, -0.01), ((-0.3,), (-2.0,), (-6.0,))),
        )

    def values(self, parameters: Table, x: Table) -> Table:
        gain, power = parameters[:, :1], parameters[:, 1:2]
        return gain * (self._share(power, x[None]) - self._share(power, np.full((1, 1), (self.low + self.high) / 2)))

    def derivatives(self, parameters: Table, x: Table) -> Table:
        gain, power = parameters[:, :1], parameters[:, 1:2]
        middle = np.full((1, 1), (self.low + self.high) / 2)
        by_gain = self._share(power, x[None]) - self._share(power, middle)
        by_power = gain * (self._share_by_power(power, x[None]) - self._share_by_power(power, middle))
        return np.stack([by_gain, by_power], axis=2)

    def end(self, gain: Table, power: Table) -> tuple[Table, Table]:
        """What the term is towards, in addition to what it is in the grid's middle, and A of -A / size^p; (R,) each.

        The end is at infinite size for p > 0, at size 0 for p < 0.
        """
        whole = gain / -np.expm1(-power * (self.high - self.low))
        middle = gain * self._share(power[:, None], np.full((1, 1), (self.low + self.high) / 2))[:, 0]
        return whole - middle, whole * np.exp(power * self.low)

    def _share(self, power: Table, x: Table) -> Table:
        """Of the gain at x: 0 at the grid's low end, 1 at its high end."""
        return np.asarray(np.expm1(-power * (x - self.low)) / np.expm1(-power * (self.high - self.low)))

    def _share_by_power(self, power: Table, x: Table) -> Table:
        run, ratio = x - self.low, self.high - self.low
        whole = -np.expm1(-power * ratio)
        above = run * np.exp(-power * run) * whole + ratio * np.exp(-power * ratio) * np.expm1(-power * run)
        return np.asarray(above / whole**2)


@dataclass(frozen=True)
class LogTerm:
    """slope * x: all that two sizes can tell.

    Attributes:
        axis: its name.
        low, high: the grid's ends, as logarithms.
    """

    axis: str
    low: float
    high: float

    @property
    def names(self) -> tuple[str, ...]:
        return (f"{self.axis}_slope",)

    @property
    def is_scaled(self) -> bool:
        return True

    def branches(self) -> tuple[Branch, ...]:
        return (Branch((-math.inf,), (math.inf,), ((),)),)

    def values(self, parameters: Table, x: Table) -> Table:
        return parameters * (x[None] - (self.low + self.high) / 2)

    def derivatives(self, parameters: Table, x: Table) -> Table:
        return np.broadcast_to((x - (self.low + self.high) / 2)[None, :, None], (len(parameters), len(x), 1)).copy()


def _rise(bend: Table, x: Table) -> Table:
    """2 x - (e^(a x) - 1) / a, and x for a = 0."""
    safe = np.where(np.abs(bend) < 1e-7, 1.0, bend)
    return np.asarray(np.where(np.abs(bend) < 1e-7, x - bend * x * x / 2, 2 * x - np.expm1(safe * x) / safe))


def _rise_by_bend(bend: Table, x: Table) -> Table:
    """-(a x e^(a x) - (e^(a x) - 1)) / a^2, by its series where the difference would lose its digits."""
    product = bend * x
    near = np.abs(product) < 1e-3
    safe = np.where(near, 1.0, bend)
    whole = (product * np.exp(product) - np.expm1(product)) / safe**2
    series = x * x * (1 / 2 + product / 3 + product**2 / 8 + product**3 / 30)
    return np.asarray(-np.where(near, series, whole))
