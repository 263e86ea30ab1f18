"""Which rows make a batch: bins up to a budget of tokens, and the share of a process in an evaluation."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmrec.examples import IGNORED
from llmrec.exceptions import DataError


def row_lengths(dataset: Any) -> npt.NDArray[np.int64]:
    """The tokens (N,) of each row of a `datasets.Dataset` or a sequence of rows; of a bin, those of its rows."""
    if isinstance(dataset, Bins):
        return np.array([dataset.lengths[rows].sum() for rows in dataset.bins], dtype=np.int64)
    if hasattr(dataset, "column_names"):
        table = dataset.select_columns(["input_ids"]).with_format("arrow")
        parts = [part["input_ids"].combine_chunks() for part in table.iter(10_000)]
        sizes = [part.value_lengths().to_numpy(zero_copy_only=False) for part in parts]
        return np.concatenate(sizes).astype(np.int64) if sizes else np.zeros(0, dtype=np.int64)
    return np.array([len(dataset[place]["input_ids"]) for place in range(len(dataset))], dtype=np.int64)


def pack_decreasing(lengths: npt.ArrayLike, budget: int) -> list[npt.NDArray[np.int64]]:
    """First-fit decreasing: rows from the longest on, each into the first bin with room.

    Johnson (1973) "Near-optimal bin packing algorithms": about 11/9 of the fewest possible bins at worst. Of equally
    long rows the earlier comes first.

    Args:
        lengths: (N,) tokens of each row.
        budget: tokens of a bin.

    Returns:
        Bins in the order in which they were opened: ascending places of rows.

    Raises:
        DataError: if a row is longer than `budget`.

    >>> [rows.tolist() for rows in pack_decreasing([3, 6, 5, 2], budget=8)]
    [[1, 3], [0, 2]]
    """
    sizes = _checked(lengths, budget)
    room = np.zeros(0, dtype=np.int64)
    owner = np.empty(len(sizes), dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    # Equally long rows go one after another, so they fill the open bins from the first on: a step for each length.
    starts = np.flatnonzero(np.diff(sizes[order], prepend=-1))
    for rows in np.split(order, starts[1:]) if len(order) else []:
        size = int(sizes[rows[0]])
        fits = room // size
        taken = np.clip(len(rows) - (np.cumsum(fits) - fits), 0, fits)
        left = len(rows) - int(taken.sum())
        each = budget // size
        fresh = np.minimum(each, left - each * np.arange(-(-left // each)))
        taken = np.concatenate([taken, fresh])
        room = np.concatenate([room, np.full(len(fresh), budget)]) - taken * size
        owner[rows] = np.repeat(np.arange(len(taken)), taken)
    return _grouped(owner, len(room))


def pack_in_order(lengths: npt.ArrayLike, budget: int) -> list[npt.NDArray[np.int64]]:
    """Rows in their order, each bin closed when the next row does not fit; see `pack_decreasing`.

    >>> [rows.tolist() for rows in pack_in_order([3, 6, 5, 2], budget=8)]
    [[0], [1], [2, 3]]
    """
    sizes = _checked(lengths, budget)
    owner = np.empty(len(sizes), dtype=np.int64)
    current, used = -1, budget
    for place, size in enumerate(sizes.tolist()):
        if used + size > budget:
            current, used = current + 1, 0
        used += size
        owner[place] = current
    return _grouped(owner, current + 1)


def pad_to_budget(lengths: npt.ArrayLike, budget: int) -> list[npt.NDArray[np.int64]]:
    """Rows from the longest on, as many to a bin as the bin padded to its longest row has room for.

    >>> [rows.tolist() for rows in pad_to_budget([3, 6, 5, 2], budget=8)]
    [[1], [2], [0, 3]]
    """
    sizes = _checked(lengths, budget)
    order = np.argsort(-sizes, kind="stable")
    owner = np.empty(len(sizes), dtype=np.int64)
    begin = current = 0
    while begin < len(order):
        end = begin + budget // int(sizes[order[begin]])
        owner[order[begin:end]] = current
        begin, current = end, current + 1
    return _grouped(owner, current)


def _checked(lengths: npt.ArrayLike, budget: int) -> npt.NDArray[np.int64]:
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and sizes.min() < 1:
        raise DataError(f"Row {int(sizes.argmin())} has no tokens. Leave it out.")
    if len(sizes) and sizes.max() > budget:
        raise DataError(
            f"A row has {sizes.max()} tokens and a batch at most {budget}. Give max_tokens_per_batch {sizes.max()} or "
            "more, or shorten the histories."
        )
    return sizes


def _grouped(owner: npt.NDArray[np.int64], bins: int) -> list[npt.NDArray[np.int64]]:
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.searchsorted(owner[order], np.arange(1, bins))) if bins else []


class Bins(torch.utils.data.Dataset[dict[str, Any]]):
    """A data set of bins: each item is the rows of one bin, within a budget of tokens.

    The bins are drawn up once, so a Trainer's samplers, processes and resuming work on them as on rows. Which of
    several equally long rows share a bin is drawn with the seed.

    Attributes:
        dataset: the rows.
        bins: rows of each bin.
        lengths: (N,) tokens of each row.
    """

    def __init__(self, dataset: Any, budget: int, layout: str, seed: int = 0) -> None:
        """
        Args:
            dataset: rows, with a length.
            budget: tokens of a bin; for other layouts than "packed", with its filling.
            layout: packed bins are drawn up first-fit decreasing, others of rows of like length.
            seed: of the draw.

        Raises:
            DataError: if a row has no tokens, or more than `budget`.
        """
        self.dataset = dataset
        self.lengths = row_lengths(dataset)
        drawn = np.random.default_rng(seed).permutation(len(self.lengths))
        plan = (pack_decreasing if layout == "packed" else pad_to_budget)(self.lengths[drawn], budget)
        self.bins = [np.sort(drawn[rows]) for rows in plan]

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {"rows": [self.dataset[int(row)] for row in self.bins[place]]}


class ShareOfRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows to evaluate, of which each process takes whole batches, none twice.

    Batches are of rows of like length, the longest first. All processes have equally many, because sharded models
    compute in step: where the last round has too few, a process computes a batch whose labels are taken away.
    """

    def __init__(self, dataset: Any, batch_size: int, process: int = 0, processes: int = 1) -> None:
        """
        Args:
            dataset: rows, with a length.
            batch_size: rows of a batch.
            process: this process's number, from 0.
            processes: how many there are.
        """
        self._dataset = dataset
        order = np.argsort(-row_lengths(dataset), kind="stable")
        every = [order[begin : begin + batch_size].tolist() for begin in range(0, len(order), batch_size)]
        self.batches = every[process::processes]
        if len(self.batches) < -(-len(every) // processes):
            self.batches.append([-1 - int(order[0])])  # negative: without labels

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return dict(self._dataset[place]) if place >= 0 else _without_labels(self._dataset[-1 - place])


class EndlessStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """A stream that begins again where it ends, in its own order.

    A trainer cannot know how many steps a pass has, so one that is resumed counts them from the training's begin.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            empty = True
            for row in self._dataset:
                empty = False
                yield row
            if empty:
                raise DataError("The stream of training rows is empty. Check the mixture and the interactions.")


class ShareOfStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """`ShareOfRows` of a stream: every process reads all of it and keeps its batches, in the stream's order."""

    def __init__(self, dataset: Any, batch_size: int, process: int = 0, processes: int = 1) -> None:
        self._dataset = dataset
        self._batch_size, self._process, self._processes = batch_size, process, processes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        begin = self._process * self._batch_size
        round_: list[dict[str, Any]] = []
        for row in self._dataset:
            round_.append(row)
            if len(round_) == self._batch_size * self._processes:
                yield from map(dict, round_[begin : begin + self._batch_size])
                round_ = []
        if round_:
            yield from map(dict, round_[begin : begin + self._batch_size] or [_without_labels(round_[0])])


def _without_labels(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "labels": [IGNORED] * len(row["input_ids"])}
