"""Grid: which trainings a pilot is made of, so that they fit a budget and a law can still be fitted to them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from llmrec.exceptions import DataError

# (depth, width, tokens) -> seconds of one training
Seconds = Callable[[int, int, int], float]
Cell = tuple[int, int, float]
Reason = Literal["repetition", "cell"]

_CURVED = 3  # values of depth and of width that tell a rise from a fall
_SHARES = 2  # that tell what data bring


@dataclass(frozen=True)
class Trial:
    """One training of a pilot.

    Attributes:
        depth: layers.
        width: hidden size.
        share: of the training users, in (0, 1].
        seed: of the training.
        tokens: events that the share has.
        seconds: that it takes, by estimate.
        held_out: whether no law is fitted to it: it is there to hold a prediction against.
    """

    depth: int
    width: int
    share: float
    seed: int
    tokens: int
    seconds: float
    held_out: bool = False

    @property
    def cell(self) -> Cell:
        """What all seeds of it have in common."""
        return self.depth, self.width, self.share


@dataclass(frozen=True)
class PilotGrid:
    """A pilot's trainings, and what the budget had no room for.

    Attributes:
        trials: in the order in which they are to be run: seed by seed, of each the shortest first.
        left_out: what was dropped, in the order of dropping, and as what: a repetition with a further seed, or a cell
            whose last training it was.
        budget: seconds.
    """

    trials: tuple[Trial, ...]
    left_out: tuple[tuple[Trial, Reason], ...]
    budget: float

    @property
    def seconds(self) -> float:
        """That all trials take, one after another."""
        return math.fsum(trial.seconds for trial in self.trials)

    @property
    def cells(self) -> list[Cell]:
        """What is fitted to, in the order of the first seed."""
        return list(dict.fromkeys(trial.cell for trial in self.trials if not trial.held_out))

    def notes(self) -> list[str]:
        """What the grid cannot tell, in sentences."""
        found = []
        for name, values in zip(("depths", "widths"), list(zip(*self.cells, strict=True))[:2], strict=True):
            if len(set(values)) < _CURVED:
                found.append(f"Two {name} tell a slope, and no peak. Add a third.")
        if len({share for *_, share in self.cells}) < _SHARES:
            found.append("One share of the users does not tell what more data bring. Add a second.")
        if len({trial.seed for trial in self.trials}) < 2:
            found.append("One seed does not tell what is noise. Add a second, or a larger budget.")
        return found


@dataclass(frozen=True)
class GridRequest:
    """What a pilot shall vary.

    Attributes:
        depths: numbers of layers, two or more.
        widths: hidden sizes, two or more.
        shares: of the training users, each in (0, 1].
        seeds: of the trainings.
        held_out: pairs (depth, width) that are trained on the largest share with every seed, and not fitted to. One
            that the grid has too is taken out of it.

    Raises:
        DataError: if the values are none, or no law could be fitted to all of them.
    """

    depths: Sequence[int]
    widths: Sequence[int]
    shares: Sequence[float] = (1.0,)
    seeds: Sequence[int] = (0, 1)
    held_out: Sequence[tuple[int, int]] = field(default=())

    def __post_init__(self) -> None:
        for name, values in (
            *(("depths", self.depths), ("widths", self.widths), ("shares", self.shares), ("seeds", self.seeds)),
            ("held-out sizes", self.held_out),
        ):
            if len(set(values)) < len(values):
                raise DataError(f"The {name} are {', '.join(map(str, values))}. Name each once.")
        sizes = [*self.depths, *self.widths, *(size for pair in self.held_out for size in pair)]
        if wrong := [size for size in sizes if size < 1]:
            raise DataError(f"A depth or width is {wrong[0]}. Both count from 1.")
        if wrong_shares := [share for share in self.shares if not 0 < share <= 1]:
            raise DataError(f"A share is {wrong_shares[0]}. Give shares of the users above 0, and at most 1.")
        if not self.seeds or min(self.seeds) < 0:
            raise DataError(f"The seeds are {list(self.seeds)}. Give one or more, none negative.")
        if not self.shares:
            raise DataError("There is no share of the users to train on. Give one or more, such as 0.25 0.5 1.")
        for name, values in (("depth", self.depths), ("width", self.widths)):
            if len(values) < 2:
                shown = f"One {name}, {values[0]}, does" if values else f"No {name} does"
                raise DataError(f"{shown} not tell what {name} is good for. Add two more with --{name}s.")
        if not _enough(self.cells, self):
            raise DataError(
                f"The grid has {len(self.cells)} cells, and the law {unknowns(self)} unknowns: a fit needs "
                f"{unknowns(self) + 1} cells that tell depth, width and data apart. Add depths, widths or shares."
            )

    @property
    def cells(self) -> list[Cell]:
        """All combinations but those held out."""
        return [
            (depth, width, share)
            for share in self.shares
            for depth in self.depths
            for width in self.widths
            if (depth, width) not in self.held_out
        ]


def fit_grid(request: GridRequest, tokens: Mapping[float, int], seconds: Seconds, budget_minutes: float) -> PilotGrid:
    """The trainings of `request` that fit the budget, one after another.

    What is dropped, until the rest fits: first repetitions (trainings of further seeds), the longest first; then whole
    cells, the longest first, passing over those that a fit needs. A fit needs three depths and three widths (two,
    where no more were asked for), two shares (one, likewise), one cell more than the law has unknowns, and cells among
    which the effects of depth, width and share can be told apart: an additive model of their values is determined.
    Held-out trainings are not dropped. Of equally long ones, the later seed goes first, then the larger share, depth
    and width.

    Args:
        request: what to vary.
        tokens: events by share.
        seconds: what a training takes, by depth, width and tokens.
        budget_minutes: for all of them.

    Raises:
        DataError: if the budget has no room for the smallest model, or for what a fit needs.
    """
    if not budget_minutes > 0:
        raise DataError(f"The budget is {budget_minutes:g} minutes. Give more than none.")
    budget = 60 * budget_minutes

    def trial(cell: Cell, seed: int, held_out: bool = False) -> Trial:
        depth, width, share = cell
        return Trial(depth, width, share, seed, tokens[share], seconds(depth, width, tokens[share]), held_out)

    largest = max(request.shares)
    kept = [trial(cell, seed) for seed in request.seeds for cell in request.cells]
    held = [trial((*pair, largest), seed, True) for seed in request.seeds for pair in request.held_out]
    place = {seed: number for number, seed in enumerate(request.seeds)}
    left_out: list[tuple[Trial, Reason]] = []

    def longest_first(trials: Iterable[Trial]) -> list[Trial]:
        return sorted(trials, key=lambda one: (one.seconds, place[one.seed], *_size(one)), reverse=True)

    def too_long() -> bool:
        # What a refusal asks for, in tenths of a minute, has to be enough.
        return math.fsum(one.seconds for one in (*kept, *held)) > budget * (1 + 1e-9)

    for one in longest_first(one for one in kept if place[one.seed] > 0):
        if not too_long():
            break
        kept = [other for other in kept if other is not one]
        left_out.append((one, "repetition"))
    found = True
    while too_long() and found:
        found = False
        for one in longest_first(kept):
            rest = [other for other in kept if other is not one]
            if too_long() and _enough([other.cell for other in rest], request):
                kept, found = rest, True
                left_out.append((one, "cell"))
    if too_long():
        _refuse(kept, held, min((trial(cell, request.seeds[0]) for cell in request.cells), key=_size), budget)
    ordered = sorted([*kept, *held], key=lambda one: (place[one.seed], *_size(one)))
    return PilotGrid(tuple(ordered), tuple(left_out), budget)


def unknowns(request: GridRequest) -> int:
    """How many numbers a law has that can be told from a request: a level; a slope and a bend of depth and of width,
    one of them where there are two values alone; and what data bring, where there is a second share.

    >>> unknowns(GridRequest([1, 2, 4], [8, 16, 32], [0.5, 1.0])), unknowns(GridRequest([1, 2], [8, 16, 32]))
    (6, 4)
    """
    curved = (min(_CURVED, len(values)) - 1 for values in (request.depths, request.widths))
    return 1 + sum(curved) + min(_SHARES, len(request.shares)) - 1


def _enough(cells: Sequence[Cell], request: GridRequest) -> bool:
    """Whether a law can be fitted to these cells of a request."""
    if len(cells) <= unknowns(request):
        return False
    asked = (request.depths, request.widths, request.shares)
    columns = [np.ones((len(cells), 1))]
    for values, wanted, fewest in zip(zip(*cells, strict=True), asked, (_CURVED, _CURVED, _SHARES), strict=True):
        known = sorted(set(values))
        if len(known) < min(fewest, len(wanted)):
            return False
        columns.append(np.array(values)[:, None] == np.array(known[1:]))
    design = np.hstack(columns).astype(np.float64)
    return bool(np.linalg.matrix_rank(design) == design.shape[1])


def _size(trial: Trial) -> tuple[float, ...]:
    return trial.seconds, trial.share, trial.depth, trial.width


def _refuse(needed: Sequence[Trial], held: Sequence[Trial], smallest: Trial, budget: float) -> None:
    """Raises DataError: the budget has no room for what a fit needs."""
    least = math.fsum(one.seconds for one in (*needed, *held))
    what = f"{len(needed)} trainings" + (f" and {len(held)} held out" if held else "")
    add = f"Give at least {_minutes(least)}, for the {what} that a fit needs, or add smaller depths, widths or shares."
    if smallest.seconds > budget:
        raise DataError(
            f"The budget of {budget / 60:.3g} minutes is below the smallest model, {smallest.depth} layers of width "
            f"{smallest.width} on {smallest.share:.0%} of the users: {_minutes(smallest.seconds)}. {add}"
        )
    raise DataError(f"In {budget / 60:.3g} minutes there is no room for a grid that a law can be fitted to. {add}")


def _minutes(seconds: float) -> str:
    """Rounded up, so that what is asked for suffices."""
    return f"{math.ceil(seconds / 6) / 10:g} minutes"
