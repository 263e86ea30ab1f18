"""Two answers to one question: how far they agree, and what moved."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmrec.service.schema import RecommendedItem


@dataclass(frozen=True)
class Move:
    """Where an item stands in two answers; None for not at all."""

    id: str
    title: str
    first: int | None
    second: int | None

    @property
    def in_words(self) -> str:
        """What became of the item from the first answer to the second."""
        if self.first is None:
            return "new"
        if self.second is None:
            return "gone"
        by = self.first - self.second
        return "same place" if by == 0 else f"{'up' if by > 0 else 'down'} {abs(by)}"


@dataclass(frozen=True)
class Agreement:
    """How far two answers agree.

    Attributes:
        overlaps: (k, items that both have among their first k), for some k up to the longer answer's length.
        moves: every item of either, by its place in the second answer; the gone ones last, by that in the first.
    """

    overlaps: list[tuple[int, int]]
    moves: list[Move]


def agreement(first: Sequence[RecommendedItem], second: Sequence[RecommendedItem]) -> Agreement:
    """Compares two answers, best item first; items are the same if their ids are.

    >>> a, b, c = (RecommendedItem(id=name, rank=1, log_probability=-1, title="") for name in "abc")
    >>> found = agreement([a, b], [b, c])
    >>> found.overlaps, [(move.id, move.in_words) for move in found.moves]
    ([(1, 0), (2, 1)], [('b', 'up 1'), ('c', 'new'), ('a', 'gone')])
    """
    longest = max(len(first), len(second))
    depths = sorted({depth for depth in (1, 3, 5, 10, 20, 50, 100) if depth < longest} | ({longest} - {0}))
    before = {item.id: place for place, item in enumerate(first, start=1)}
    after = {item.id: place for place, item in enumerate(second, start=1)}
    overlaps = [
        (depth, sum(place <= depth and after.get(name, depth + 1) <= depth for name, place in before.items()))
        for depth in depths
    ]
    moves = [Move(item.id, item.title, before.get(item.id), after[item.id]) for item in second]
    moves += [Move(item.id, item.title, before[item.id], None) for item in first if item.id not in after]
    return Agreement(overlaps, moves)
