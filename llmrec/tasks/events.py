"""LoggedEvents: what a log says of every place of a history, beside its item, as a prompt shows it."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from llmrec.data.split import Part, Split
from llmrec.prompt import Event


class LoggedEvents:
    """The events of a split's interactions. Places are those of `split.rows`, M of them.

    Attributes:
        split: of the interactions.
    """

    def __init__(self, split: Split) -> None:
        self.split = split

    @cached_property
    def columns(self) -> frozenset[str]:
        """Which of a history's `action`, `domain` and `gap` the log has; gaps need a clock."""
        had = {"action": self.split.actions is not None, "domain": self.split.domains is not None}
        return frozenset(name for name, has in (had | {"gap": bool(self.split.clock)}).items() if has)

    @cached_property
    def times(self) -> list[float] | None:
        """(M,) unix seconds, NaN where one is unknown; None without a clock."""
        return self.split.timestamps.tolist() if self.split.timestamps is not None and self.split.clock else None

    @cached_property
    def _words(self) -> tuple[list[str] | None, list[str] | None]:
        """(M,) actions and domains; "" where one is unknown, None for a column that the log lacks."""
        actions, domains = (
            None if column is None else [word or "" for word in column.to_list()]
            for column in (self.split.actions, self.split.domains)
        )
        return actions, domains

    def between(self, begin: int, end: int) -> list[Event]:
        """The events of these places; without what the log does not have."""
        (actions, domains), times = self._words, self.times
        return [
            Event(
                None if actions is None else actions[place],
                None if domains is None else domains[place],
                None if times is None else times[place],
            )
            for place in range(begin, end)
        ]

    def of_cases(self, part: Part, cases: Sequence[int] | None = None) -> list[list[Event]] | None:
        """Per case of a part (default: all) the events of its whole history; None if the log has none to offer."""
        if not self.columns:
            return None
        places = self.split.positions[part]
        chosen = places if cases is None else places[np.asarray(cases, dtype=np.int64)]
        begins = self.split.offsets[self.split.owner[chosen]]
        return [
            self.between(begin, end) for begin, end in zip(begins.tolist(), np.asarray(chosen).tolist(), strict=True)
        ]
