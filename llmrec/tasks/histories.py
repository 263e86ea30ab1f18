"""Tasks that continue a history: the next item, asked and answered in semantic IDs or in titles."""

from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from llmrec.examples import Row, check_bare, sequence_row, windows
from llmrec.prompt import Prompt
from llmrec.tasks.task import Case, Task
from llmrec.tasks.task_data import TaskData

SERVED = "served"  # the name by which the served prompt is a template of next_item


class NextItem(Task):
    """History -> the next item's semantic ID, for every training interaction but a user's first."""

    name: ClassVar[str] = "next_item"

    @cached_property
    def places(self) -> npt.NDArray[np.int64]:
        """The log's places of the targets."""
        return _followers(self.data)

    def size(self) -> int:
        return len(self.places)

    def case(self, number: int, draw: int) -> Case:
        place = int(self.places[number])
        return Case(self.item_answer(self.data.split.rows[place]), self.data.history(place))

    def lacking(self) -> str:
        return "no user has two training interactions"

    def own_templates(self) -> Mapping[str, Prompt]:
        return {**super().own_templates(), SERVED: self.data.prompt}


class TitlesToId(NextItem):
    """A history of titles -> the next item's semantic ID."""

    name: ClassVar[str] = "titles_to_id"
    own_templates = Task.own_templates


class HistoryToTitle(NextItem):
    """A history of semantic IDs -> the next item's title."""

    name: ClassVar[str] = "history_to_title"
    own_templates = Task.own_templates

    def case(self, number: int, draw: int) -> Case:
        place = int(self.places[number])
        title = self.data.item_text.value(int(self.data.split.rows[place]), "title")
        return Case(self.text_answer(title), self.data.history(place))


class PreferredNextItem(NextItem):
    """What a user had said that they like, and their history -> the next item's semantic ID."""

    name: ClassVar[str] = "preference"
    offers: ClassVar[frozenset[str]] = frozenset({"preference"})
    own_templates = Task.own_templates

    @cached_property
    def places(self) -> npt.NDArray[np.int64]:
        return np.array(
            [place for place in _followers(self.data).tolist() if self.data.preference(place)], dtype=np.int64
        )

    def case(self, number: int, draw: int) -> Case:
        place = int(self.places[number])
        said = {"preference": self.data.preference(place)}
        return Case(self.item_answer(self.data.split.rows[place]), self.data.history(place), said)

    def lacking(self) -> str:
        if self.data.preferences is None:
            return "there is no table of preferences"
        return "no preference was known before a training interaction of its user"


class WholeSequences(Task):
    """Every item of a training sequence is a target once, in one row or a few overlapping ones; for bare prompts."""

    name: ClassVar[str] = "sequence"

    @cached_property
    def windows(self) -> npt.NDArray[np.int64]:
        """(windows, 3) the log's places: begin, first target, end."""
        split = self.data.split
        found = [
            (start + begin, start + done, start + end)
            for start, stop in zip(split.offsets[:-1].tolist(), split.train_ends.tolist(), strict=True)
            for begin, done, end in windows(stop - start, self.data.max_history)
        ]
        return np.array(found, dtype=np.int64).reshape(-1, 3)

    def size(self) -> int:
        return len(self.windows)

    def case(self, number: int, draw: int) -> Case:
        begin, done, end = self.windows[number].tolist()
        return Case(self.data.catalog.tokens_of_rows(self.data.split.rows[done:end]), (begin, done))

    def row(self, number: int, turn: int, seed: int) -> Row:
        begin, done, end = self.windows[number].tolist()
        return sequence_row(self.data.catalog, self.data.split.rows[begin:end].tolist(), done - begin, self.data.start)

    def lacking(self) -> str:
        return "no user has a training interaction"

    def own_templates(self) -> Mapping[str, Prompt]:
        check_bare(self.data.prompt)
        return {SERVED: self.data.prompt}


def _followers(data: TaskData) -> npt.NDArray[np.int64]:
    """The log's places of all training interactions but the first of each user."""
    first = np.arange(len(data.split.rows)) == data.begins
    return np.flatnonzero(data.split.in_training & ~first)
