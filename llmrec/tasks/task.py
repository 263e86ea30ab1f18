"""Task: numbered cases, each with a history, variables for a template, and the answer's tokens."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from llmrec.examples import Row, answered
from llmrec.exceptions import DataError, PromptError
from llmrec.prompt import EVENT_COLUMNS, ITEM_LIST_VARIABLES, ITEM_VARIABLES, Prompt
from llmrec.tasks.task_data import TaskData


@dataclass(frozen=True)
class Case:
    """One question of a task, before a template words it.

    Attributes:
        answer: its token ids.
        history: the places (begin, end) in the log of what the prompt shows as history.
        variables: what else the template may use, by name.
    """

    answer: list[int]
    history: tuple[int, int] = (0, 0)
    variables: Mapping[str, Any] = field(default_factory=dict)


class Task(ABC):
    """Cases that are known by their number, so that any of them can be made alone and in any order.

    Attributes:
        name: in a mixture, in a row, and of its folder of templates.
        offers: the variables that its templates may use beside the history.
        has_history: whether its cases have one.
        numbers: the cases that a template asks, ascending: what a pass over the task holds.
    """

    name: ClassVar[str]
    offers: ClassVar[frozenset[str]] = frozenset()
    has_history: ClassVar[bool] = True

    def __init__(self, data: TaskData, template: str | None = None) -> None:
        """Finds the cases and the templates that fit the data.

        Args:
            data: what the rows are made of.
            template: the only template to use; default: all of the task, without those that show of the history what
                the log does not have.

        Raises:
            PromptError: if there is no such template, none at all, or one uses what the task does not offer.
            DataError: if the data has no case for the task.
        """
        self.data = data
        self.templates = self._fitting_templates(template)
        self.numbers: npt.NDArray[np.int64] = np.flatnonzero(self._asked())
        if not len(self.numbers):
            raise DataError(f"The task {self.name!r} has no rows: {self.lacking()}. Leave it out of the mixture.")

    @abstractmethod
    def size(self) -> int:
        """How many cases there are, whether or not a template asks them."""

    @abstractmethod
    def case(self, number: int, draw: int) -> Case:
        """The case of a number below `size`; `draw` decides what is random in it."""

    @abstractmethod
    def lacking(self) -> str:
        """What is not there if the task has no case, to follow "it has no rows: "."""

    def has(self, variable: str) -> npt.NDArray[np.bool_]:
        """(size,) which cases have a variable that the task offers; by default all."""
        return np.ones(self.size(), dtype=bool)

    def row(self, number: int, turn: int, seed: int) -> Row:
        """The training row of a case in one of several passes, each with another template while there are others.

        The first template is drawn by a hash of seed, task and case, so no other case and no cap moves it.
        """
        number = int(number)
        case = self.case(number, hashed(seed, self.name, number, turn))
        names = [name for name, prompt in self.templates.items() if self._needs(prompt) <= case.variables.keys()]
        prompt = self.templates[shuffled(names, hashed(seed, self.name, number))[turn % len(names)]]
        begin, end = case.history
        history = self.data.split.rows[begin:end].tolist()
        events = self.data.events(begin, end) if prompt.attributes & set(EVENT_COLUMNS) else None
        tokens = prompt.encode(self.data.catalog, history, self.data.text, self.data.start, events, **case.variables)
        return answered(tokens, case.answer, self.name)

    def own_templates(self) -> Mapping[str, Prompt]:
        """All templates of the task, by name."""
        return self.data.templates.get(self.name, {})

    def item_answer(self, row: int) -> list[int]:
        """An item's tokens."""
        return self.data.catalog.tokens_of(int(row))

    def text_answer(self, value: str) -> list[int]:
        """Words behind a space, and the token that ends them."""
        return [*self.data.text.encode(f" {value}"), self.data.end]

    def _fitting_templates(self, only: str | None) -> dict[str, Prompt]:
        templates = dict(sorted(self.own_templates().items()))
        if only is not None and only not in templates:
            raise PromptError(
                f"The task {self.name!r} has no template {only!r}. Name one of: {', '.join(templates) or 'none'}."
            )
        if only is not None:
            templates = {only: templates[only]}
        fitting = {}
        for name, prompt in templates.items():
            if unknown := self._needs(prompt) - self.offers:
                raise PromptError(
                    f"The template {self.name}/{name} uses {', '.join(sorted(unknown))}, which the task does not "
                    f"offer. It may use {', '.join(sorted(self.offers | {'history'}))}."
                )
            if missing := self._missing_events(prompt):
                if only is None:
                    continue
                raise PromptError(
                    f"The template {self.name}/{name} shows {', '.join(sorted(missing))} of the history, which the "
                    "interactions do not have. Name their columns, or choose another template."
                )
            try:
                prompt.check(self.data.catalog, self.data.event_columns, **self._examples(prompt))
            except PromptError as error:
                raise PromptError(f"The template {self.name}/{name}: {error}") from error
            fitting[name] = prompt
        if not fitting:
            raise PromptError(
                f"The task {self.name!r} has no template that these interactions can fill. "
                f"Write one as {self.name}/NAME.jinja in the folder of templates."
            )
        return fitting

    def _needs(self, prompt: Prompt) -> frozenset[str]:
        return prompt.variables - {"history"}

    def _missing_events(self, prompt: Prompt) -> frozenset[str]:
        """What the template reads of events, neither the log nor the item table having it."""
        columns = self.data.event_columns.union(*self.data.catalog.items[:1])
        return (prompt.attributes & set(EVENT_COLUMNS)) - columns if self.has_history else frozenset()

    def _examples(self, prompt: Prompt) -> dict[str, Any]:
        rows = {*ITEM_VARIABLES, *ITEM_LIST_VARIABLES}
        return {name: 0 if name in rows else "example" for name in self._needs(prompt)}

    def _asked(self) -> npt.NDArray[np.bool_]:
        """(size,) whether at least one template finds all that it uses."""
        asked = np.zeros(self.size(), dtype=bool)
        for prompt in self.templates.values():
            fits = np.ones(self.size(), dtype=bool)
            for variable in self._needs(prompt):
                fits &= self.has(variable)
            asked |= fits
        return asked


def hashed(*parts: int | str) -> int:
    """A whole number below 2**128 that only these values decide: no process, machine or hash seed changes it."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=16).digest(), "little")


def shuffled(names: Sequence[str], number: int) -> list[str]:
    """The permutation of `names` that a large number stands for.

    >>> [shuffled(["a", "b", "c"], number) for number in (0, 1, 5)]
    [['a', 'b', 'c'], ['b', 'a', 'c'], ['c', 'b', 'a']]
    """
    left, order = list(names), []
    while left:
        number, place = divmod(number, len(left))
        order.append(left.pop(place))
    return order
