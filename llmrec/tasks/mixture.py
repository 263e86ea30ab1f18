"""Mixture: how much of which task an epoch holds, and in which order its rows come."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmrec.examples import Row
from llmrec.exceptions import DataError
from llmrec.tasks.histories import HistoryToTitle, NextItem, PreferredNextItem, TitlesToId, WholeSequences
from llmrec.tasks.item_tasks import IdToItem, ItemToId, Search
from llmrec.tasks.ratings import YesNo
from llmrec.tasks.task import Task, hashed
from llmrec.tasks.task_data import TaskData

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        *(WholeSequences, NextItem, ItemToId, IdToItem, HistoryToTitle),
        *(TitlesToId, Search, PreferredNextItem, YesNo),
    )
}
_ENTRY = re.compile(r"(?P<task>[^/=:]*)(/(?P<template>[^/=:]*))?(=(?P<passes>[^/=:]*))?(:(?P<cap>[^/=:]*))?")
_ADVICE = "Write NAME, NAME=PASSES, NAME:CAP or NAME=PASSES:CAP, such as next_item or item_to_id=0.5:10000"


@dataclass(frozen=True)
class Entry:
    """One task's part of a mixture.

    Attributes:
        task: its name.
        template: the only template it is asked by, or None for all that fit.
        passes: how often an epoch holds every case; 0.5: half of the cases, drawn; 2: twice, by other templates.
        cap: the most rows, or None.
    """

    task: str
    template: str | None = None
    passes: float = 1.0
    cap: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Entry":
        """Reads `NAME[/TEMPLATE][=PASSES][:CAP]`.

        Raises:
            DataError: if it is written otherwise, there is no such task, or a number is none or not above 0.

        >>> Entry.parse("item_to_id/title=0.5:1000")
        Entry(task='item_to_id', template='title', passes=0.5, cap=1000)
        """
        found = _ENTRY.fullmatch(text.strip())
        if found is None:
            raise DataError(f"{text!r} is no entry of a mixture. {_ADVICE}.")
        if found["task"] not in TASKS:
            raise DataError(f"There is no task {found['task']!r}. Name one of: {', '.join(TASKS)}.")
        passes, cap = 1.0, None
        try:
            if found["passes"] is not None:
                passes = float(found["passes"])
            if found["cap"] is not None:
                cap = int(found["cap"])
        except ValueError as error:
            raise DataError(f"{text!r} has a number that is none. {_ADVICE}.") from error
        if not (passes > 0 and math.isfinite(passes)) or (cap is not None and cap < 1):
            raise DataError(f"{text!r} asks for nothing, or for no end. {_ADVICE}; passes and caps are above 0.")
        return cls(found["task"], found["template"], passes, cap)

    def __str__(self) -> str:
        template = "" if self.template is None else f"/{self.template}"
        return f"{self.task}{template}={str(self.passes).removesuffix('.0')}" + (
            "" if self.cap is None else f":{self.cap}"
        )


@dataclass(frozen=True)
class Mixture:
    """The entries of a mixture, in the order given."""

    entries: tuple[Entry, ...]

    @classmethod
    def parse(cls, texts: Sequence[str]) -> "Mixture":
        """Reads one entry per text.

        Raises:
            DataError: if there is none, one cannot be read, or two are of the same task and template.

        >>> print(Mixture.parse(["next_item", "id_to_item=2"]))
        next_item=1, id_to_item=2
        """
        entries = tuple(Entry.parse(text) for text in texts)
        if not entries:
            raise DataError(f"The mixture is empty. {_ADVICE}.")
        names = [(entry.task, entry.template) for entry in entries]
        for entry, name in zip(entries, names, strict=True):
            if names.count(name) > 1:
                raise DataError(f"The mixture has {entry.task!r} twice. Give one entry with more passes.")
        return cls(entries)

    def __str__(self) -> str:
        return ", ".join(map(str, self.entries))


class Plan:
    """The rows of a mixture by number, none of them made yet; a few bytes a row, whatever its length.

    Order and draws hang on the seed alone, so a stream and a list of the rows are the same, in every process.
    """

    def __init__(self, mixture: Mixture, data: TaskData, seed: int) -> None:
        """Checks every template and finds every task's cases.

        Raises:
            PromptError: if a template uses what is not there.
            DataError: if a task has no case.
        """
        self._seed = seed
        self._tasks = [TASKS[entry.task](data, entry.template) for entry in mixture.entries]
        parts = [_turns(entry, task.numbers, seed) for entry, task in zip(mixture.entries, self._tasks, strict=True)]
        owners = np.repeat(np.arange(len(parts), dtype=np.int16), [len(numbers) for numbers, _ in parts])
        order = np.random.default_rng(hashed(seed, "order")).permutation(len(owners))
        self._owners = owners[order]
        self._numbers = np.concatenate([numbers for numbers, _ in parts])[order]
        self._turns = np.concatenate([turns for _, turns in parts])[order]

    def __len__(self) -> int:
        return len(self._owners)

    def __getitem__(self, place: int) -> Row:
        task: Task = self._tasks[int(self._owners[place])]
        return task.row(int(self._numbers[place]), int(self._turns[place]), self._seed)

    def rows(self, begin: int = 0, end: int | None = None) -> Iterator[Row]:
        """The rows from one place to another, made as they are asked for."""
        for place in range(begin, len(self) if end is None else end):
            yield self[place]


def _turns(
    entry: Entry, cases: npt.NDArray[np.int64], seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """The cases of all passes, and the pass of each; half a row counts as one."""
    rows = max(1, math.floor(entry.passes * len(cases) + 0.5))
    rows = rows if entry.cap is None else min(rows, entry.cap)
    whole, rest = divmod(rows, len(cases))
    drawn = np.random.default_rng(hashed(seed, entry.task, entry.template or "", "part")).permutation(len(cases))
    numbers = np.concatenate([np.tile(cases, whole), cases[np.sort(drawn[:rest])]])
    return numbers, np.repeat(np.arange(whole + 1, dtype=np.int32), [len(cases)] * whole + [rest])
