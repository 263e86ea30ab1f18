"""Branches: lines of thought that grow out of places of histories which were read already.

A thought is a vector that enters an encoder behind the items, as one more place would. Each chosen place has a branch
of its own, which sees the history up to that place and its own earlier thoughts, and of other branches nothing: what
all places of a batch think at once is what every prefix of every history would think by itself. Knows neither losses
nor where thoughts come from.

Shapes: B histories, S places, P of which are chosen, M thoughts of a branch at once, n columns that were read.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


class Sight(NamedTuple):
    """Where m new columns stand, and what they see.

    Attributes:
        places: (B, m) int64, each in its own history, counted as if its branch were the history's only end.
        mask: (B, m), true where there is a thought.
        past: (B, m, n), true where a column that was read is seen.
        among: (B, m, m), true where another new one is seen.
    """

    places: Tensor
    mask: Tensor
    past: Tensor
    among: Tensor

    @property
    def allowed(self) -> Tensor:
        """(B, 1, m, n + m); a column sees itself in any case, for a query that may look nowhere has no softmax."""
        alone = torch.eye(self.among.shape[1], dtype=torch.bool, device=self.among.device)
        return torch.cat((self.past, self.among | alone), dim=2)[:, None]


# An encoder's pass through its layers: its cache, thoughts (B, m, D), who sees whom, times (B, m) or None, next times
# (B, m) or None -> states (B, m, D), and the cache with the new columns.
Pass = Callable[[Any, Tensor, Sight, Tensor | None, Tensor | None], tuple[Tensor, Any]]


class Branches(ABC):
    """One branch for each of (B, P) places; never changed, only followed by longer ones."""

    @abstractmethod
    def think(self, thoughts: Tensor, mask: Tensor) -> tuple[Tensor, Self]:
        """The states of one more block of thoughts behind each branch.

        Args:
            thoughts: (B, P, M, D).
            mask: (B, P, M), true where there is a thought.

        Returns:
            (B, P, M, D), zeros where there is none; and the longer branches.
        """


@dataclass(frozen=True)
class AttentionBranches(Branches):
    """Branches of an encoder that attends. Their thoughts lie as further columns behind those of the histories.

    Thoughts have places as items have, one after another behind the branch's own item. They have no times of their
    own: each stands at the time of that item, and asks from the time that the item's place asks from.

    Attributes:
        reads: the encoder's pass through its layers.
        cache: the encoder's, of histories and thoughts.
        history: (B, P, S) which places of its history each branch sees.
        ends: (B, P) int64, the place of each branch's next thought.
        times, next_times: (B, P) of each branch's item, or None.
        owners: (L,) the branch of each column of thought.
        thought: (B, L), true where such a column holds one.
    """

    reads: Pass
    cache: Any
    history: Tensor
    ends: Tensor
    times: Tensor | None
    next_times: Tensor | None
    owners: Tensor
    thought: Tensor

    @classmethod
    def begin(
        cls,
        reads: Pass,
        cache: Any,
        mask: Tensor,
        places: Tensor,
        timestamps: Tensor | None,
        next_timestamps: Tensor | None,
    ) -> Self:
        """Branches without a thought.

        Args:
            reads: the encoder's pass.
            cache: of its `prefill`.
            mask: (B, S) of what it read.
            places: (B, P) int64 columns 0..S - 1.
            timestamps: (B, S) or None.
            next_timestamps: (B, S) or None.
        """
        columns = torch.arange(mask.shape[1], device=mask.device)
        history = (columns <= places[:, :, None]) & mask[:, None, :]
        times, following = (None if one is None else one.gather(1, places) for one in (timestamps, next_timestamps))
        nothing = mask[:, :0]
        return cls(reads, cache, history, history.sum(dim=2), times, following, places.new_empty(0), nothing)

    def think(self, thoughts: Tensor, mask: Tensor) -> tuple[Tensor, Self]:
        """See `Branches.think`. A block's thoughts see the whole block, also those behind them."""
        batch, chosen, count, _ = thoughts.shape
        columns = chosen * count
        owners = torch.arange(chosen, device=mask.device).repeat_interleave(count)
        flat = mask.flatten(1)
        places = self.ends[:, :, None] + (mask.cumsum(dim=2) - 1).clamp_min(0)
        earlier = (owners[:, None] == self.owners) & self.thought[:, None, :]  # (B, m, L)
        sight = Sight(
            places=places.flatten(1),
            mask=flat,
            past=torch.cat((self.history.repeat_interleave(count, dim=1), earlier), dim=2),
            among=(owners[:, None] == owners) & flat[:, None, :],
        )
        times, following = (
            None if one is None else one.repeat_interleave(count, dim=1) for one in (self.times, self.next_times)
        )
        states, cache = self.reads(
            self.cache, thoughts.reshape(batch, columns, -1).masked_fill(~flat[..., None], 0), sight, times, following
        )
        longer = type(self)(
            self.reads,
            cache,
            self.history,
            self.ends + mask.sum(dim=2),
            self.times,
            self.next_times,
            torch.cat((self.owners, owners)),
            torch.cat((self.thought, flat), dim=1),
        )
        return states.masked_fill(~flat[..., None], 0).view_as(thoughts), longer


@dataclass(frozen=True)
class RecurrentBranches(Branches):
    """Branches of a recurrent encoder: nothing but the state after each of them.

    Attributes:
        reads: thoughts (R, 1, D) and states (layers, R, W) -> outputs (R, 1, D) and the states after them.
        states: (layers, B * P, W).
    """

    reads: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    states: Tensor

    def think(self, thoughts: Tensor, mask: Tensor) -> tuple[Tensor, Self]:
        """See `Branches.think`; M is 1."""
        flat = mask.reshape(-1, 1, 1)
        hidden, states = self.reads(thoughts.reshape(-1, 1, thoughts.shape[-1]).masked_fill(~flat, 0), self.states)
        return hidden.masked_fill(~flat, 0).view_as(thoughts), type(self)(self.reads, states)
