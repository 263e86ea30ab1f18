"""What an HSTU keeps of histories that it has read, and how further items look at it.

Sources: HSTU (arXiv 2402.17152), equation 2 for what attention is, section 3.4 (M-FALCON) for candidates that see the
history and not each other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrec.backbones.relative_bias import RelativeBias

# Queries and keys (…, H, qk_dim), values (…, H, v_dim) and a layer's bias -> what was read, (…, H, v_dim).
Attend = Callable[[Tensor, Tensor, Tensor, RelativeBias], Tensor]


@dataclass(frozen=True)
class HSTUCache:
    """The keys and values of histories that were read already, in n columns, with padding where the histories had it.

    Attributes:
        keys: one (B, n, H, qk_dim) per layer, turned already if there is RoPE.
        values: one (B, n, H, v_dim) per layer.
        places: (B, n) each column's place in its own history.
        mask: (B, n), true where there is an item.
        timestamps: (B, n) int64, `UNKNOWN_TIME` where unknown.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    places: Tensor
    mask: Tensor
    timestamps: Tensor

    @property
    def lengths(self) -> Tensor:
        """(B,) the items of each history, which is the place of the next one."""
        return self.mask.sum(dim=1)


class Continuation:
    """Attention of m more items a history, in one pass through the layers."""

    def __init__(
        self,
        cache: HSTUCache,
        places: Tensor,
        mask: Tensor,
        timestamps: Tensor,
        next_timestamps: Tensor | None,
        isolated: bool,
        normaliser: Tensor | int,
        softmax: bool,
        bias: RelativeBias,
        looks: Tensor | None = None,
    ) -> None:
        """
        Args:
            cache: of the B histories.
            places: (B, m), of the new items.
            mask: (B, m).
            timestamps: (B, m).
            next_timestamps: (B, m) or None.
            isolated: whether a new item sees the history and itself alone, or also those before it.
            normaliser: n of equation 2, a number or (B, 1, m, 1).
            softmax: whether weights are a softmax of the scores, without n, and not their SiLU.
            bias: of any layer.
            looks: (B, 1, m, n + m), true where a new item looks; None: at all that was read and, of the new ones, as
                `isolated` says.
        """
        self._cache, self._isolated, self._softmax, self._normaliser = cache, isolated, softmax, normaliser
        self._columns = (places, mask, timestamps)
        self._added: dict[int, tuple[Tensor, Tensor]] = {}
        batch, count = places.shape
        history = bias.relations(places, timestamps, next_timestamps, cache.places, cache.timestamps)
        if isolated:
            alone = [None if column is None else column.reshape(-1, 1) for column in (timestamps, next_timestamps)]
            own = bias.relations(places.reshape(-1, 1), *alone)
            seen = mask[:, :, None]
        else:
            own = bias.relations(places, timestamps, next_timestamps)
            seen = torch.ones(count, count, dtype=torch.bool, device=mask.device).tril() & mask[:, None, :]
        self._relations = (history, own)
        self._own_shape = (batch, 1, count, seen.shape[-1])
        past = cache.mask[:, None, :].expand(-1, count, -1)
        # (B, 1, m, n + 1 or n + m)
        self._looks = torch.cat((past, seen), dim=-1)[:, None] if looks is None else looks

    def layer(self, number: int) -> Attend:
        """The attention of one layer."""
        return partial(self._attend, number)

    def grown(self) -> HSTUCache:
        """The cache with the new items behind, once every layer has attended."""
        keys, values = (
            tuple(
                torch.cat((past, self._added[number][part]), dim=1)
                for number, past in enumerate((self._cache.keys, self._cache.values)[part])
            )
            for part in (0, 1)
        )
        past = (self._cache.places, self._cache.mask, self._cache.timestamps)
        return HSTUCache(keys, values, *(torch.cat(pair, dim=1) for pair in zip(past, self._columns, strict=True)))

    def _attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias) -> Tensor:
        """q and k (B, m, H, qk_dim), v (B, m, H, v_dim) -> (B, m, H, v_dim)."""
        self._added[number] = (k, v)
        past_keys, past_values = self._cache.keys[number], self._cache.values[number]
        history = torch.einsum("bqhd,bkhd->bhqk", q, past_keys)
        own = (
            torch.einsum("bqhd,bqhd->bhq", q, k)[..., None]
            if self._isolated
            else torch.einsum("bqhd,bkhd->bhqk", q, k)
        )
        for_history, for_own = (bias.of(relations) for relations in self._relations)
        if for_history is not None and for_own is not None:
            history, own = history + for_history, own + for_own.reshape(self._own_shape)
        weights = self._weights(torch.cat((history, own), dim=-1)).to(v.dtype)
        history, own = weights.split((past_keys.shape[1], own.shape[-1]), dim=-1)
        read = torch.einsum("bhqk,bkhd->bqhd", history, past_values)
        return read + (own.transpose(1, 2) * v if self._isolated else torch.einsum("bhqk,bkhd->bqhd", own, v))

    def _weights(self, scores: Tensor) -> Tensor:
        """(B, H, m, n + …) -> A(X) of equation 2, and zeros where a query does not look."""
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self._softmax:
            # A query at padding looks nowhere and has no softmax: finite scores give it one, which is thrown away.
            low = torch.finfo(scores.dtype).min
            return scores.masked_fill(~self._looks, low).softmax(dim=-1).masked_fill(~self._looks, 0)
        return F.silu(scores).masked_fill(~self._looks, 0) / self._normaliser
