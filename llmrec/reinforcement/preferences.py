"""Preferences: cases in which an item was taken and others were not, drawn or proposed by a model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import BackboneError, RecipeError
from llmrec.reinforcement.cases import RolloutCases, Rows
from llmrec.tasks.task import hashed


class Proposing(Protocol):
    """As much of `llmrec.reinforcement.rollouts.Rollouts` as is needed here."""

    def generate(self, chosen: Sequence[int]) -> Any:
        """Of the cases at these places something with `items` (B, G), catalog rows, the best first."""


@dataclass(frozen=True)
class PreferenceCases:
    """C cases, in each of which the target is preferred to n other items.

    Attributes:
        cases: prompts and targets.
        negatives: (C, n) int64 catalog rows, none of them the target, no row twice in a case.
    """

    cases: RolloutCases
    negatives: Rows = field(repr=False)

    def __post_init__(self) -> None:
        shape = np.shape(self.negatives)
        if len(shape) != 2 or shape[0] != len(self.cases) or shape[1] < 1:
            raise RecipeError(
                f"{len(self.cases)} cases came with negatives of shape {shape}. Give each at least one, and all "
                "equally many."
            )
        ascending = np.sort(self.negatives, axis=1)
        if (self.negatives == self.cases.targets[:, None]).any() or (ascending[:, 1:] == ascending[:, :-1]).any():
            raise RecipeError(
                "A case has its own target among the negatives, or a negative twice. Make them with uniform_negatives "
                "or hard_negatives."
            )

    def __len__(self) -> int:
        return len(self.cases)

    @property
    def items(self) -> Rows:
        """(C, 1 + n) the target and the negatives."""
        return np.concatenate([self.cases.targets[:, None], self.negatives], axis=1)


def uniform_negatives(
    cases: RolloutCases, live: npt.NDArray[np.bool_], count: int, seed: int = 0, exclude_seen: bool = True
) -> Rows:
    """Items drawn for each case without replacement, each live one alike but for the target.

    Args:
        cases: the questions.
        live: (N,) which items may be recommended (`~catalog.retired`).
        count: n, at least 1.
        seed: of the draw.
        exclude_seen: whether items of the case's history are not drawn.

    Returns:
        (C, n) int64 catalog rows, in the order of the draw.

    Raises:
        RecipeError: if count is below 1, or a case has fewer items to draw from.
    """
    _check_count(count)
    everything = np.flatnonzero(live)
    generator = np.random.default_rng(hashed(seed, "uniform negatives"))
    found = np.empty((len(cases), count), dtype=np.int64)
    for case, target in enumerate(cases.targets.tolist()):
        seen = cases.histories[case] if exclude_seen else np.empty(0, dtype=np.int64)
        gone = np.unique(np.append(seen, target))
        places = np.searchsorted(everything, gone[live[gone]])  # ascending, of what must not be drawn
        left = len(everything) - len(places)
        if left < count:
            raise RecipeError(
                f"A case has {left} item(s) to draw {count} negative(s) from: the catalog has {len(everything)} live "
                f"items, and its target and history are left out. Ask for {max(1, left)} at most."
            )
        drawn = generator.choice(left, count, replace=False)
        # The d-th of what is left stands behind all of the gone ones that have at most d left before them.
        behind = np.searchsorted(places - np.arange(len(places)), drawn, side="right")
        found[case] = everything[drawn + behind]
    return found


def hard_negatives(
    cases: RolloutCases, rollouts: Proposing, count: int, batch_size: int = 64, begin: int = 0, end: int | None = None
) -> Rows:
    """What a model proposes for each case and was not taken: the first of its group that are not the target.

    Args:
        cases: the questions, which are those of the rollouts.
        rollouts: of the starting model, of groups of `count` + 1 items or more.
        count: n, at least 1.
        batch_size: cases at once.
        begin, end: the cases that are asked; all by default.

    Returns:
        (end - begin, n) int64 catalog rows, in the order of the groups: of beams the most probable first.

    Raises:
        RecipeError: if count is below 1, or the groups are too small.
        BackboneError: if a group names an item twice, or what is none.
    """
    _check_count(count)
    last = len(cases) if end is None else end
    found = np.empty((last - begin, count), dtype=np.int64)
    for first in range(begin, last, batch_size):
        places = range(first, min(first + batch_size, last))
        items = np.asarray(rollouts.generate(list(places)).items, dtype=np.int64)  # (B, G)
        if items.shape[1] <= count:
            raise RecipeError(
                f"Groups of {items.shape[1]} items may hold the target, and leave fewer than {count} negatives. Let "
                f"the rollouts propose {count + 1} or more."
            )
        ascending = np.sort(items, axis=1)
        if ascending[:, 0].min() < 0 or (ascending[:, 1:] == ascending[:, :-1]).any():
            raise BackboneError("A group names an item twice, or what is none. Use rollouts of this catalog.")
        wrong = items != cases.targets[places.start : places.stop, None]
        # Wrong ones first, each kind in the group's order.
        order = np.argsort(~wrong, axis=1, kind="stable")[:, :count]
        found[places.start - begin : places.stop - begin] = np.take_along_axis(items, order, axis=1)
    return found


def _check_count(count: int) -> None:
    if count < 1:
        raise RecipeError(f"{count} negatives are asked for. A preference needs at least 1.")
