"""Windows: the pieces of training histories that are predicted item by item, and the batches that they make."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.examples import IGNORED
from llmrec.exceptions import DataError
from llmrec.sequence.histories import LoggedHistories, Numbers
from llmrec.sequence.stochastic_length import Choice, kept_places

Take = Literal["all", "last"]


class Window(NamedTuple):
    """A piece of a history.

    Attributes:
        begin: its first input, a place in `Split.rows`.
        end: behind its last target: inputs are `begin … end - 2`, their targets `begin + 1 … end - 1`.
        first: the first place that is a target here; what comes before is context alone.
    """

    begin: int
    end: int
    first: int


def windows_of(begin: int, end: int, max_history: int, take: Take = "all", stride: int = 0) -> list[Window]:
    """The windows of one training history, the interactions `begin … end - 1`.

    Args:
        max_history: inputs of a window, at most.
        take: "all": every item but the first is a target exactly once. "last": only the last window is there, as in
            HSTU's protocol, and what comes before it is not learnt from.
        stride: how many new targets each further window brings; the smaller, the more context they have. 0: as many as
            a window holds.

    >>> windows_of(0, 6, max_history=3)
    [Window(begin=2, end=6, first=3), Window(begin=0, end=3, first=1)]
    >>> windows_of(0, 6, max_history=3, stride=1)[1:]
    [Window(begin=1, end=5, first=4), Window(begin=0, end=4, first=1)]
    """
    stride = stride or max_history
    if max_history < 1 or not 1 <= stride <= max_history:
        raise DataError(f"max_history is {max_history} and the stride {stride}. The stride is from 1 to max_history.")
    found: list[Window] = []
    last = end  # behind the last target that is left; windows are cut from the newest item on
    while last - begin >= 2:
        start = max(begin, last - 1 - max_history)
        first = start + 1 if start == begin or take == "last" else max(start + 1, last - stride)
        found.append(Window(start, last, first))
        if take == "last":
            break
        last = first
    return found


class TrainingWindows(torch.utils.data.Dataset[Any]):
    """The training windows of a split; a batch of them comes as tensors.

    Its indices are pairs (epoch, window), so that whatever is drawn for a window (stochastic length, hidden items)
    hangs on the seed, the epoch and the window alone, in any number of processes and after any restart. A negative
    window, -1 - w, is window w without labels: a filling.
    """

    def __init__(
        self,
        histories: LoggedHistories,
        max_history: int,
        take: Take = "all",
        stride: int = 0,
        alpha: float = 2.0,
        choice: Choice = "recent",
        hidden_share: float = 0.0,
        action_weights: npt.ArrayLike | None = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            histories: of the split.
            max_history, take, stride: see `windows_of`.
            alpha, choice: of the stochastic length; 2 for none.
            hidden_share: the share of items that a cloze model does not see; 0: each next item is predicted.
            action_weights: (A + 1,) what a target counts by the number of its action; None: 1 each. A target of weight
                0 is none.
            seed: of the draws.

        Raises:
            DataError: if no history has two items.
        """
        split = histories.split
        self.histories = histories
        self.max_history, self.alpha, self.choice, self.seed = max_history, alpha, choice, seed
        self.hidden_share = hidden_share
        self.action_weights = None if action_weights is None else np.asarray(action_weights, dtype=np.float32)
        pairs = zip(split.offsets[:-1].tolist(), split.train_ends.tolist(), strict=True)
        self.windows = [window for begin, end in pairs for window in windows_of(begin, end, max_history, take, stride)]
        if not self.windows:
            raise DataError(
                "No training history has two items, so nothing follows anything. Give more interactions of each user."
            )
        self.owner_begins = set(split.offsets[:-1].tolist())
        self.lengths = np.array([window.end - window.begin - 1 for window in self.windows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.windows)

    def target_counts(self) -> Numbers:
        """(N,) how often each item can be asked for in an epoch; of a cloze model, how often it can be hidden."""
        split = self.histories.split
        asked = np.zeros(len(split.rows), dtype=np.int64)
        for window in self.windows:
            asked[window.begin if self.hidden_share > 0 else window.first : window.end] += 1
        if self.action_weights is not None and "actions" in self.histories.columns:
            asked[self.action_weights[self.histories.columns["actions"]] == 0] = 0
        counts = np.zeros(split.num_items, dtype=np.int64)
        np.add.at(counts, split.rows, asked)
        return counts

    def __getitems__(self, indices: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """A whole batch: the arguments of `SequenceModel.forward`, and

        * labels (B, S): the item row that is asked for at each place, `IGNORED` where none is;
        * weights (B, S), if there are action weights;
        * first_items (F,): the first items of the histories that begin in this batch.
        """
        return collate_windows([self._window(epoch, window) for epoch, window in indices])

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Tensor]:
        return self.__getitems__([index])

    def _window(self, epoch: int, number: int) -> dict[str, Numbers]:
        filling, number = number < 0, number if number >= 0 else -1 - number
        window = self.windows[number]
        rows, columns = self.histories.split.rows, self.histories.columns
        generator = np.random.default_rng([self.seed, epoch, number])
        cloze = self.hidden_share > 0
        # A cloze model predicts what stands in the window, its last item included: where a recommendation hides one
        # behind the longest history, training has to be too.
        length = window.end - window.begin - (0 if cloze else 1)
        longest = self.max_history + (1 if cloze else 0)
        kept = np.arange(length)
        if self.alpha < 2:
            kept = kept[kept_places(length, longest, self.alpha, generator, self.choice)]
        places = window.begin + kept
        following = places + 1
        if self.histories.events.tokens_before:
            # A token before an item says under what that item is taken, and so what is asked for by its state.
            following[:-1] = places[1:]
        found: dict[str, Numbers] = {"items": rows[places].astype(np.int64)}
        for name, column in columns.items():
            found[name] = column[places]
            if not cloze:
                found[f"next_{name}"] = column[following]
        if cloze:
            hidden = generator.random(len(places)) < self.hidden_share
            if generator.random() < 0.5 or not hidden.any():
                # As it will be asked: the last item alone is not known.
                hidden[:] = False
                hidden[-1] = True
            asked, taken = hidden, places
            found["hidden"] = hidden.astype(np.int64)
        else:
            asked, taken = following >= window.first, following
        labels = np.where(asked, rows[taken], IGNORED).astype(np.int64)
        if self.action_weights is not None and "actions" in columns:
            weights = self.action_weights[columns["actions"][taken]]
            found["weights"] = weights
            labels[weights == 0] = IGNORED
        found["labels"] = np.full_like(labels, IGNORED) if filling else labels
        begins = window.begin in self.owner_begins and not filling
        found["first_items"] = rows[window.begin : window.begin + begins].astype(np.int64)
        return found


def collate_windows(windows: Sequence[dict[str, Numbers]]) -> dict[str, Tensor]:
    """Windows as one batch, padded on the right."""
    lengths = np.array([len(window["items"]) for window in windows], dtype=np.int64)
    width = int(lengths.max())
    inside = np.arange(width) < lengths[:, None]
    batch = {"mask": torch.from_numpy(inside)}
    for name in windows[0]:
        flat = np.concatenate([window[name] for window in windows])
        if name == "first_items":
            batch[name] = torch.from_numpy(flat)
            continue
        fill = IGNORED if name == "labels" else UNKNOWN_TIME if name.endswith("timestamps") else 0
        padded = np.full((len(windows), width), fill, dtype=flat.dtype)
        padded[inside] = flat
        batch[name] = torch.from_numpy(padded.astype(bool) if name == "hidden" else padded)
    return batch


class EpochBatches(torch.utils.data.Sampler[list[tuple[int, int]]]):
    """The batches of each epoch: pairs (epoch, window), of windows of like length, the share of one process.

    How many batches there are is the same in every epoch and process; where they do not come out even, a process gets
    a filling without labels.

    Attributes:
        epoch: which comes next; set by the Trainer.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.int64],
        batch_size: int,
        budget: int = 0,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        """
        Args:
            lengths: (P,) of the windows.
            batch_size: windows of a batch; without effect if there is a budget.
            budget: predictions of a batch, at most, but for a single window that has more; 0: none, and batches are
                drawn from windows of any length.
            seed: of the order.
            process, processes: whose share.
        """
        if batch_size < 1 or budget < 0:
            raise DataError(f"The batch size is {batch_size} and the budget {budget}. Give at least 1 and 0.")
        self.lengths, self.batch_size, self.budget, self.seed = lengths, batch_size, budget, seed
        self.process, self.processes = process, processes
        self.epoch = 0
        self._count = len(self._plan(0))

    def set_epoch(self, epoch: int) -> None:
        """Which epoch is drawn next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self._count // self.processes)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        plan = self._plan(self.epoch)
        for number in range(self.process, len(self) * self.processes, self.processes):
            if number < len(plan):
                yield [(self.epoch, int(window)) for window in plan[number]]
            else:
                yield [(self.epoch, -1 - int(plan[0][0]))]

    def _plan(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.lengths))
        if not self.budget:
            return [order[begin : begin + self.batch_size] for begin in range(0, len(order), self.batch_size)]
        order = order[np.argsort(self.lengths[order], kind="stable")]
        batches, begin, filled = [], 0, 0
        for place, length in enumerate(self.lengths[order].tolist()):
            if place > begin and filled + length > self.budget:
                batches.append(order[begin:place])
                begin, filled = place, 0
            filled += length
        batches.append(order[begin:])
        return [batches[number] for number in generator.permutation(len(batches))]
