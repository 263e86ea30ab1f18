"""ItemDistributions: what a language model holds probable after every training history, item by item.

A constrained search finds the W most probable items of a history with their log-probabilities. The probability that
these do not have, of items that the search did not reach and of what spells no item, is spread by a stated rule:
"uniform" gives it in equal parts to all other items that may be recommended; "none" drops it, and the found ones are
scaled up to 1. At a temperature T every probability is taken to the power 1 / T, and all are scaled to 1 again.
"""

from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmrec.exceptions import DataError

if TYPE_CHECKING:
    from llmrec.data.split import Split

Rest = Literal["uniform", "none"]
Numbers = npt.NDArray[np.int64]


class ItemDistributions:
    """The distributions of C training interactions, each a target with the history before it.

    Attributes:
        places: (C,) the interactions, ascending places of `Split.rows`.
        rows: (C, W) int64 item rows, the most probable first; -1 behind the end of a shorter list.
        scores: (C, W) float32 log-probabilities; -inf there.
        live: (N,) which items may be recommended.
        rest: how what is left is spread.
    """

    def __init__(
        self,
        places: Numbers,
        rows: Numbers,
        scores: npt.NDArray[np.float32],
        live: npt.NDArray[np.bool_],
        rest: Rest = "uniform",
    ) -> None:
        """Raises DataError if arrays do not fit, places are not ascending, or there is no such rule."""
        if rest not in ("uniform", "none"):
            raise DataError(f"The rest of a distribution is spread by {rest!r}. Choose 'uniform' or 'none'.")
        if rows.shape != scores.shape or len(rows) != len(places) or (np.diff(places) <= 0).any():
            raise DataError(
                f"{len(places)} places, rows {rows.shape} and scores {scores.shape} are no distributions. Give one "
                "list per place, places ascending and each once."
            )
        self.places, self.rows, self.scores, self.live, self.rest = places, rows, scores, live, rest

    def __len__(self) -> int:
        return len(self.places)

    def at(self, asked: Tensor) -> tuple["TableTeaching", Tensor]:
        """The distributions of the interactions `asked` (M,), and which (M,) of them there are."""
        wanted = asked.cpu().numpy()
        found = np.searchsorted(self.places, wanted)
        there = found < len(self.places)
        there[there] = self.places[found[there]] == wanted[there]
        chosen = found[there]
        return TableTeaching(self, chosen, asked.device), torch.from_numpy(there).to(asked.device)


class TableTeaching:
    """The distributions of some places as a `Teaching`."""

    def __init__(self, table: ItemDistributions, chosen: Numbers, device: torch.device) -> None:
        self._rest = table.rest
        self._rows = torch.from_numpy(table.rows[chosen]).to(device)
        self._scores = torch.from_numpy(table.scores[chosen]).to(device)
        self._live = torch.from_numpy(table.live).to(device)

    def log_probabilities(self, begin: int, end: int, temperature: float, dtype: torch.dtype) -> Tensor:
        """See `Teaching.log_probabilities`; over all N items."""
        rows, scores = self._rows[begin:end], self._scores[begin:end].double() / temperature
        named = rows >= 0
        scores = scores.masked_fill(~named, -torch.inf)
        share = torch.full((len(rows), 1), -torch.inf, dtype=torch.float64, device=rows.device)  # of each other item
        others = (self._live.sum() - named.sum(dim=1, keepdim=True)).double()
        if self._rest == "uniform":
            left = (1 - (scores * temperature).exp().sum(dim=1, keepdim=True)).clamp(min=0.0)
            share = (left / others.clamp(min=1)).log() / temperature
        # W + 1 numbers say what all N sum up to.
        total = torch.cat([scores, share + others.clamp(min=0).log()], dim=1).logsumexp(dim=1, keepdim=True)
        # What stands behind the end of a shorter list goes to a column behind the items.
        found = torch.empty((len(rows), len(self._live) + 1), dtype=dtype, device=rows.device)
        found[:] = (share - total).to(dtype)
        found[:, :-1].masked_fill_(~self._live, -torch.inf)
        found.scatter_(1, rows.where(named, len(self._live)), (scores - total).to(dtype))
        return found[:, :-1]


def training_places(split: "Split", most: int = 0, seed: int = 0) -> Numbers:
    """The training interactions that have one before them, ascending; with `most` so many, drawn with the seed."""
    begins = split.offsets[:-1][split.owner]
    places = np.flatnonzero(split.in_training & (np.arange(len(split.rows)) > begins))
    if most and most < len(places):
        places = np.sort(np.random.default_rng(seed).permutation(places)[:most])
    return places.astype(np.int64)
