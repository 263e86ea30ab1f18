"""Workload: the windows or rows that a split is learnt in, and what a shape costs on them."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import DataError
from llmrec.scaling.cost import Cost, cost_of
from llmrec.scaling.flops import Flops
from llmrec.scaling.language import LanguageShape
from llmrec.scaling.shape import Shape

if TYPE_CHECKING:
    from llmrec.data.split import Split


@dataclass(frozen=True)
class Workload:
    """What an epoch reads.

    Attributes:
        lengths: (P,) int64, items of each window or row.
        targets: (P,) int64, of them learnt there.
        items: N.
        max_history: the longest history.
    """

    lengths: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    items: int
    max_history: int

    @property
    def tokens(self) -> int:
        """Events that an epoch learns."""
        return int(self.targets.sum())

    @classmethod
    def of_windows(
        cls,
        split: "Split",
        max_history: int,
        take: Literal["all", "last"] = "all",
        stride: int = 0,
        users: npt.NDArray[np.bool_] | None = None,
    ) -> "Workload":
        """What train/seqrec.py reads with these flags of its.

        Args:
            split: whose training histories are read.
            max_history, take, stride: as of `llmrec.sequence.windows.windows_of`.
            users: (U,) who is learnt from; None: all.

        Raises:
            DataError: if no training history has two items.
        """
        from llmrec.sequence.windows import windows_of

        chosen = slice(None) if users is None else users
        ends = zip(split.offsets[:-1][chosen].tolist(), split.train_ends[chosen].tolist(), strict=True)
        found = [one for begin, end in ends for one in windows_of(begin, end, max_history, take, stride)]
        pairs = [(one.end - one.begin - 1, one.end - one.first) for one in found]
        return cls._of(pairs, split.num_items, max_history)

    @classmethod
    def of_rows(
        cls,
        split: "Split",
        max_history: int,
        task: Literal["sequence", "next_item"],
        users: npt.NDArray[np.bool_] | None = None,
    ) -> "Workload":
        """What train/sft.py reads of one task.

        Args:
            split: whose training histories are read.
            max_history: the most items of a history.
            task: which.
            users: (U,) who is learnt from; None: all.

        Raises:
            DataError: if there is no row.
        """
        from llmrec.examples import windows

        lengths = (split.train_ends - split.offsets[:-1])[slice(None) if users is None else users].tolist()
        if task == "sequence":
            pairs = [(end - begin, end - first) for one in lengths for begin, first, end in windows(one, max_history)]
        else:
            pairs = [(min(place, max_history) + 1, 1) for one in lengths for place in range(1, one)]
        return cls._of(pairs, split.num_items, max_history)

    @classmethod
    def _of(cls, pairs: list[tuple[int, int]], items: int, max_history: int) -> "Workload":
        if not pairs:
            raise DataError("No training history has two items, so nothing is learnt. Give more of each user.")
        lengths, targets = np.array(pairs, dtype=np.int64).T
        return cls(lengths, targets, items, max_history)

    def cost(self, shape: Shape | LanguageShape) -> Cost:
        """The shape's cost on these windows, of which each has its own length: attention's is not that of the mean.

        Args:
            shape: whose items, length, targets and longest history are those of the workload here.
        """
        pairs, counts = np.unique(np.stack([self.lengths, self.targets], axis=1), axis=0, return_counts=True)
        sums = np.zeros(3)
        for (length, targets), count in zip(pairs.tolist(), counts.tolist(), strict=True):
            window = cost_of(self._fitted(shape, length, targets)).window
            sums += count * np.array([window.layers, window.attention, window.loss])
        mean = self._fitted(shape, float(self.lengths.mean()), float(self.targets.mean()))
        whole = cost_of(mean)
        window = Flops(*(float(value) for value in sums / len(self.lengths)))
        return replace(whole, window=window, flops_per_token=float(sums.sum()) / self.tokens)

    def _fitted(self, shape: Shape | LanguageShape, length: float, targets: float) -> Shape | LanguageShape:
        if isinstance(shape, LanguageShape):
            return replace(shape, length=length, targets=targets)
        return replace(shape, items=self.items, length=length, targets=targets, max_history=max(self.max_history, 1))
