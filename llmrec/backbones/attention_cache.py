"""AttentionCache: the keys and values of histories that were read already, and how further items stand behind them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from llmrec.backbones.encoder import UNKNOWN_TIME, check_length, places_of
from llmrec.backbones.reasoning_branches import Sight


class KeysAndValues(NamedTuple):
    """What one layer keeps of the places that it has read.

    Attributes:
        keys: (B, H, Sk, D / H), already rotated if the layer rotates.
        values: (B, H, Sk, D / H).
    """

    keys: Tensor
    values: Tensor


class Growth(NamedTuple):
    """m more columns behind S that were read.

    Attributes:
        places: (B, m) of the new ones in their histories.
        allowed: (B, 1, m, S + m), which columns each new one may look at; at itself in any case, for a query that may
            look nowhere has no softmax.
        mask: (B, S + m), true where there is an item.
        timestamps: (B, S + m), or None where all are unknown.
        key_places: (B, S + m).
    """

    places: Tensor
    allowed: Tensor
    mask: Tensor
    timestamps: Tensor | None
    key_places: Tensor


@dataclass(frozen=True)
class AttentionCache:
    """What an encoder keeps of histories that it has read; never changed, only followed by a longer one.

    Attributes:
        layers: every layer's keys and values.
        mask: (B, S), true where there is an item; padding may stand anywhere.
        timestamps: (B, S) int64, or None where all are unknown.
        places: (B, S) int64, or None where each column's place is the number of items before it: thoughts of several
            branches have the same.
    """

    layers: tuple[KeysAndValues, ...]
    mask: Tensor
    timestamps: Tensor | None = None
    places: Tensor | None = None

    def growth(
        self, config: PreTrainedConfig, mask: Tensor, timestamps: Tensor | None = None, isolated: bool = False
    ) -> Growth:
        """How new columns stand behind those that were read.

        Args:
            config: of the encoder.
            mask: (B, m), true where a new column is an item.
            timestamps: (B, m) of the new ones, or None.
            isolated: whether the new ones are rivals: each stands at the first free place, and sees the history and
                itself alone. Otherwise they follow one another.

        Raises:
            BackboneError: if a history gets longer than `config.max_position_embeddings`.
        """
        lengths = self.mask.sum(dim=1)
        added = mask.any(dim=1).long() if isolated else mask.sum(dim=1)
        count = mask.shape[1]
        check_length(config, int((lengths + added).max()), None)
        places = lengths[:, None] + (torch.zeros_like(mask, dtype=torch.long) if isolated else places_of(mask))
        # Padding behind a full history has no place of its own.
        places = places.clamp_max(config.max_position_embeddings - 1)
        alone = torch.eye(count, dtype=torch.bool, device=mask.device)
        before = torch.zeros_like(alone) if isolated else torch.ones_like(alone).tril()
        among = (before & mask[:, None, :]) | alone  # (B, m, m)
        allowed = torch.cat((self.mask[:, None, :].expand(-1, count, -1), among), dim=2)[:, None]
        return Growth(
            places=places,
            allowed=allowed,
            mask=torch.cat((self.mask, mask), dim=1),
            timestamps=self._joined(mask, timestamps),
            key_places=torch.cat((places_of(self.mask), places), dim=1),
        )

    def thought(self, sight: Sight, timestamps: Tensor | None = None) -> Growth:
        """How new columns of thought stand behind those that were read; `timestamps` (B, m) are theirs."""
        before = places_of(self.mask) if self.places is None else self.places
        return Growth(
            places=sight.places,
            allowed=sight.allowed,
            mask=torch.cat((self.mask, sight.mask), dim=1),
            timestamps=self._joined(sight.mask, timestamps),
            key_places=torch.cat((before, sight.places), dim=1),
        )

    def _joined(self, mask: Tensor, timestamps: Tensor | None) -> Tensor | None:
        if self.timestamps is None and timestamps is None:
            return None
        unknown = torch.full((1, 1), UNKNOWN_TIME, device=mask.device)
        before = unknown.expand(self.mask.shape) if self.timestamps is None else self.timestamps
        return torch.cat((before, unknown.expand(mask.shape) if timestamps is None else timestamps), dim=1)
