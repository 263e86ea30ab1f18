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

from llmrec.distillation.soft_targets import Direction, Teaching
from llmrec.exceptions import DataError

if TYPE_CHECKING:
    from llmrec.data.split import Split

Rest = Literal["uniform", "none"]
Numbers = npt.NDArray[np.int64]


class ItemDistributions:
    """The distributions of C training interactions, each a target with the history before it.

    Attributes:
        places: (C,) the interactions, ascending places of `Split.rows`.
        rows: (C, W) int64 rows of items that may be recommended, each once, the most probable first; -1 behind the
            end of a shorter list.
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


class TableTeaching(Teaching):
    """The distributions of some places as a `Teaching`: W named items each, and one share for every other item."""

    def __init__(self, table: ItemDistributions, chosen: Numbers, device: torch.device) -> None:
        self._rest = table.rest
        self._rows = torch.from_numpy(table.rows[chosen]).to(device)
        self._scores = torch.from_numpy(table.scores[chosen]).to(device)
        self._live = torch.from_numpy(table.live).to(device)

    def log_probabilities(self, begin: int, end: int, temperature: float, dtype: torch.dtype) -> Tensor:
        """See `Teaching.log_probabilities`; over all N items."""
        rows, scores, share, _ = self._said(begin, end, temperature)
        # What stands behind the end of a shorter list goes to a column behind the items.
        found = torch.empty((len(rows), len(self._live) + 1), dtype=dtype, device=rows.device)
        found[:] = share.to(dtype)
        found[:, :-1].masked_fill_(~self._live, -torch.inf)
        found.scatter_(1, rows.where(rows >= 0, len(self._live)), scores.to(dtype))
        return found[:, :-1]

    def divergence(
        self, own: Tensor, begin: int, end: int, temperature: float, direction: Direction
    ) -> tuple[Tensor, Tensor]:
        """See `Teaching.divergence`.

        Of the teacher only W + 1 numbers a place differ, and the forward direction is made of these:

            KL(p ‖ q) = Σ_named p (log p - log q) + s (others · log s - Σ_others log q)
            q - p = q - s - (p - s) named, where s is the share of each other item
        """
        if direction == "reverse":
            return super().divergence(own, begin, end, temperature, direction)
        rows, scores, share, others = self._said(begin, end, temperature)
        named = rows >= 0
        at = rows.where(named, 0)
        theirs = own.gather(1, at).double().masked_fill_(~named, 0.0)
        p, s = scores.exp(), share.exp()
        live = self._live.to(own.dtype)
        with torch.autocast(own.device.type, enabled=False):  # a sum over all items has no room in half precision
            every = own @ live
        # p log p is 0 where p is.
        each = (p * (scores.masked_fill(p == 0, 0.0) - theirs)).sum(dim=1, keepdim=True)
        unnamed = every[:, None].double() - theirs.sum(dim=1, keepdim=True)
        each += s * (others * share.masked_fill(s == 0, 0.0) - unnamed)
        slope = own.exp_().addcmul_(-s.to(own.dtype), live[None])
        slope.scatter_add_(1, at, (s - p).masked_fill_(~named, 0.0).to(own.dtype))
        return each[:, 0].to(own.dtype), slope

    def _said(self, begin: int, end: int, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows (c, W), their log p (c, W), the log p (c, 1) of every other item, and how many (c, 1) these are."""
        rows, scores = self._rows[begin:end], self._scores[begin:end].double() / temperature
        named = rows >= 0
        scores = scores.masked_fill(~named, -torch.inf)
        share = torch.full((len(rows), 1), -torch.inf, dtype=torch.float64, device=rows.device)
        others = (self._live.sum() - named.sum(dim=1, keepdim=True)).double().clamp_(min=0.0)
        if self._rest == "uniform":
            left = (1 - (scores * temperature).exp().sum(dim=1, keepdim=True)).clamp(min=0.0)
            share = (left / others).log().masked_fill(others == 0, -torch.inf) / temperature
        # W + 1 numbers say what all N sum up to.
        total = torch.cat([scores, share + others.log()], dim=1).logsumexp(dim=1, keepdim=True)
        return rows, scores - total, share - total, others


def training_places(split: "Split", most: int = 0, seed: int = 0) -> Numbers:
    """The training interactions that have one before them, ascending; with `most` so many, drawn with the seed."""
    begins = split.offsets[:-1][split.owner]
    places = np.flatnonzero(split.in_training & (np.arange(len(split.rows)) > begins))
    if most and most < len(places):
        places = np.sort(np.random.default_rng(seed).permutation(places)[:most])
    return places.astype(np.int64)
