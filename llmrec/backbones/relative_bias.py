"""Relative attention bias: what is added to a query's score of a key because of their distance and the time between.

Source: HSTU (arXiv 2402.17152, section 3.2), rab^{p,t}: one learnt number per distance and one per bucket of elapsed
time, in every layer, shared by its heads; RoPE: Su et al. (2021), arXiv 2104.09864. For all encoders that attend.
"""

from decimal import ROUND_CEILING, Decimal
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.exceptions import BackboneError

BiasKind = Literal["none", "position", "time", "position+time", "rope", "rope+time"]

# The width of a bucket of time: the natural logarithm of seconds, divided by this (the authors' code).
BUCKET_WIDTH = 0.301
ROPE_BASE = 10_000.0


class Relations(NamedTuple):
    """How queries and keys stand to each other; the same for all layers of a model, so it is made once.

    Attributes:
        distances: (1 or B, Sq, Sk) int64, place of the query - place of the key, 0 where the key comes later; None if
            the kind does not look at places.
        buckets: (1 or B, Sq or 1, Sk or 1) int64 buckets of elapsed time; None if the kind does not look at times.
    """

    distances: Tensor | None
    buckets: Tensor | None


class RelativeBias(nn.Module):
    """The additive bias of one layer, b_p[place_q - place_k] + b_t[bucket(time_q - time_k)], or nothing.

    "rope" and "rope+time" stand for `rotate`, which the layer calls itself: their bias has no part for places.

    Attributes:
        position: (num_heads, max_length) by distance, or None.
        time: (num_heads, num_time_buckets + 2) by bucket, the last for unknown times, or None.
    """

    def __init__(self, kind: str, max_length: int, num_time_buckets: int = 128, num_heads: int = 1) -> None:
        """
        Args:
            kind: one of `BiasKind`.
            max_length: distances are 0..max_length - 1.
            num_time_buckets: the greatest bucket of a known time; there are num_time_buckets + 1 of these.
            num_heads: 1 to share the bias between all heads, as HSTU does, or H for one each.

        Raises:
            BackboneError: if the kind is unknown, or there is no distance, bucket or head.
        """
        super().__init__()
        if kind not in get_args(BiasKind) or min(max_length, num_time_buckets, num_heads) < 1:
            raise BackboneError(
                f"There is no relative bias {kind!r} of {max_length} distances, {num_time_buckets} buckets and "
                f"{num_heads} heads. Choose one of {', '.join(get_args(BiasKind))}, and at least one of each."
            )
        self.kind = kind
        self.num_time_buckets = num_time_buckets
        self.position = nn.Parameter(torch.empty(num_heads, max_length)) if "position" in kind else None
        self.time = nn.Parameter(torch.empty(num_heads, num_time_buckets + 2)) if "time" in kind else None
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draws both tables from N(0, std²), as the authors' code does."""
        for table in self.parameters():
            nn.init.normal_(table, std=std)

    def relations(
        self,
        places: Tensor,
        timestamps: Tensor | None = None,
        next_timestamps: Tensor | None = None,
        key_places: Tensor | None = None,
        key_timestamps: Tensor | None = None,
    ) -> Relations:
        """What `of` needs; arguments as of `forward`. Layers of one kind and number of buckets can share it."""
        distances = buckets = None
        if self.position is not None:
            keys = places if key_places is None else key_places
            distances = (places[:, :, None] - keys[:, None, :]).clamp_min(0)
        if self.time is not None:
            known = timestamps if key_timestamps is None else key_timestamps
            queries = query_times(timestamps, next_timestamps)
            if queries is None or known is None:
                buckets = torch.full((1, 1, 1), self.num_time_buckets + 1, device=places.device)
            else:
                buckets = time_buckets(queries[:, :, None], known[:, None, :], self.num_time_buckets)
        return Relations(distances, buckets)

    def of(self, relations: Relations) -> Tensor | None:
        """The bias of queries and keys that stand to each other like that, as `forward` returns it."""
        bias = None
        for table, index in ((self.position, relations.distances), (self.time, relations.buckets)):
            if table is not None and index is not None:
                part = table[:, index].transpose(0, 1)  # (1 or B, 1 or H, Sq, Sk)
                bias = part if bias is None else bias + part
        return bias

    def forward(
        self,
        places: Tensor,
        timestamps: Tensor | None = None,
        next_timestamps: Tensor | None = None,
        key_places: Tensor | None = None,
        key_timestamps: Tensor | None = None,
    ) -> Tensor | None:
        """The bias of every query and key. What it is for a key later than its query means nothing: hide such keys.

        Args:
            places: (B, Sq) int64 places of the queries, 0..max_length - 1; (1, Sq) if all rows have the same, which
                is much cheaper.
            timestamps: (B, Sq) int64 unix seconds, `UNKNOWN_TIME` where unknown; None: all unknown.
            next_timestamps: (B, Sq), see `query_times`.
            key_places: (B, Sk) or (1, Sk) places of the keys; None: the queries are the keys.
            key_timestamps: (B, Sk) times of the keys; None: the queries' own `timestamps`.

        Returns:
            Something that broadcasts to (B, H, Sq, Sk), or None where this kind adds nothing.
        """
        return self.of(self.relations(places, timestamps, next_timestamps, key_places, key_timestamps))


def query_times(timestamps: Tensor | None, next_timestamps: Tensor | None) -> Tensor | None:
    """The times that queries count from: the next item's, and the place's own where that is unknown.

    HSTU's authors count from the next item's time, for a model predicts what is taken *then*; at the end of a history,
    where no next time is known, from the last item's own. Of any one shape; None: all unknown.
    """
    if next_timestamps is None or timestamps is None:
        return timestamps if next_timestamps is None else next_timestamps
    return torch.where(next_timestamps == UNKNOWN_TIME, timestamps, next_timestamps)


def time_buckets(queries: Tensor, keys: Tensor, num_time_buckets: int = 128) -> Tensor:
    """min(⌊ln(max(1, |t_q - t_k|)) / 0.301⌋, num_time_buckets), and num_time_buckets + 1 where a time is unknown.

    Exact, so that every device and kernel says the same: the rounded quotient is the bucket or the one above, and a
    comparison of whole seconds says which.

    Args:
        queries: int64 unix seconds, `UNKNOWN_TIME` where unknown.
        keys: likewise, of a shape that broadcasts with it.
        num_time_buckets: the greatest bucket of a known time.

    >>> time_buckets(torch.tensor([100]), torch.tensor([100, 99, 98, 70, UNKNOWN_TIME]))
    tensor([  0,   0,   2,  11, 129])
    """
    starts = bucket_starts(num_time_buckets, queries.device)
    elapsed = (queries - keys).abs_().clamp_min_(1)
    buckets = elapsed.float().log_().div_(BUCKET_WIDTH).add_(0.5).long().clamp_max_(len(starts) - 1)
    buckets -= (elapsed < starts[buckets]).long()
    return buckets.masked_fill_((queries == UNKNOWN_TIME) | (keys == UNKNOWN_TIME), num_time_buckets + 1)


@lru_cache
def bucket_starts(num_time_buckets: int, device: torch.device) -> Tensor:
    """(≤ num_time_buckets + 1,) int64: the fewest seconds of every bucket, ascending; those beyond int64 left out."""
    width = Decimal(str(BUCKET_WIDTH))
    starts = [0]
    for bucket in range(1, num_time_buckets + 1):
        starts.append(int((width * bucket).exp().to_integral_value(ROUND_CEILING)))
    return torch.tensor([start for start in starts if start < 2**63], dtype=torch.int64, device=device)


def rotate(queries: Tensor, keys: Tensor, places: Tensor, key_places: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """RoPE: turns queries and keys by angles that grow with their place, so that products know the distance alone.

    Args:
        queries: (B, H, Sq, d), d even.
        keys: (B, H, Sk, d).
        places: (B, Sq) or (1, Sq) of the queries.
        key_places: (B, Sk) or (1, Sk); None: the queries' own.

    Returns:
        Both, turned.

    Raises:
        BackboneError: if d is odd.
    """
    there = places if key_places is None else key_places
    return turned(queries, places[:, None]), turned(keys, there[:, None])


def turned(vectors: Tensor, places: Tensor) -> Tensor:
    """Vectors (…, d) turned by the angles place · 10000^(-2i/d); the pair i is (x_i, x_{i + d/2}).

    Args:
        vectors: of any leading shape; d even.
        places: of a shape that broadcasts to the leading shape.

    Raises:
        BackboneError: if d is odd.
    """
    width = vectors.shape[-1]
    if width % 2:
        raise BackboneError(f"RoPE turns pairs of numbers, and a head has {width}. Choose an even width of heads.")
    exact = torch.promote_types(vectors.dtype, torch.float32)
    powers = torch.arange(0, width, 2, dtype=exact, device=vectors.device) / width
    angles = places[..., None] * ROPE_BASE**-powers
    cos, sin = angles.cos(), angles.sin()
    first, second = vectors.to(exact).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(vectors.dtype)
