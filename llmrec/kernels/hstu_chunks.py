"""`llmrec.kernels.hstu_attention` in torch, forwards and backwards, a bounded number of scores at a time.

Sequences of about one length are padded to a rectangle, whose queries are taken a run at a time, with the keys up to
the last of them. The backward pass computes each run's scores again.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmrec.backbones.relative_bias import time_buckets

# Scores held at once, 4 MB in float32: they and what is made of them stay in a processor's cache.
SCORES = 1 << 20
# Queries of one run at most: keys behind a run's end are never looked at, so short runs waste less.
_QUERIES = 128
# Scores behind the ends of a rectangle's sequences, in all: to compute them takes about as long as one rectangle more.
_WASTED = 1 << 15


@dataclass(frozen=True)
class Jagged:
    """What is known of the sequences besides queries, keys and values.

    Attributes:
        offsets: (B + 1,) int64, where each sequence begins, and T.
        max_length: what no sequence is longer than.
        timestamps: (T,) int64 of the keys, where there is a time bias.
        query_timestamps: (T,) int64, likewise.
        by_length: whether SiLU's weights are divided by the number of keys seen, not by `max_length`.
        softmax: whether weights are a softmax of the scores, not their SiLU.
    """

    offsets: Tensor
    max_length: int
    timestamps: Tensor | None
    query_timestamps: Tensor | None
    by_length: bool
    softmax: bool


@dataclass(frozen=True)
class _Rectangle:
    """Some sequences of about one length, padded to the longest; S its length.

    Attributes:
        index: (G, S) the items' places in the batch; behind a sequence's end, its last one's again.
        present: (G, S) whether there is an item.
        runs: (first, last) of the queries that are taken together.
    """

    index: Tensor
    present: Tensor
    runs: list[tuple[int, int]]

    def take(self, flat: Tensor, dtype: torch.dtype) -> Tensor:
        """(T, H, D) -> (G, H, S, D)."""
        return flat[self.index].to(dtype).transpose(1, 2)

    def put(self, flat: Tensor, padded: Tensor) -> None:
        """Writes what `take` would read, where there are items."""
        flat[self.index[self.present]] = padded.transpose(1, 2)[self.present].to(flat.dtype)


def forward(
    q: Tensor, k: Tensor, v: Tensor, position_bias: Tensor | None, time_bias: Tensor | None, jagged: Jagged
) -> tuple[Tensor, Tensor | None]:
    """The output (T, H, D_v), and for a softmax the (T, H) logarithms of what it divided by."""
    exact = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty_like(v)
    lse = q.new_empty(q.shape[:2], dtype=exact) if jagged.softmax else None
    for some in _rectangles(jagged, q.shape[1]):
        queries, keys, values = (some.take(flat, exact) for flat in (q, k, v))
        found = values.new_empty((*queries.shape[:3], values.shape[-1]))
        normal = values.new_empty((*queries.shape[:3], 1))
        for first, last in some.runs:
            scores, _ = _scores(queries, keys, position_bias, time_bias, jagged, some, first, last)
            later = _distances(first, last, q.device) < 0
            if jagged.softmax:
                scores.masked_fill_(later, -torch.inf)
                normal[:, :, first:last] = scores.logsumexp(-1, keepdim=True)
                weights = scores.sub_(normal[:, :, first:last]).exp_()
            else:
                weights = torch.nn.functional.silu(scores, inplace=True).masked_fill_(later, 0.0)
                weights *= _inverse_length(first, last, jagged, weights)
            found[:, :, first:last] = weights @ values[:, :, :last]
        some.put(out, found)
        if lse is not None:
            some.put(lse.unsqueeze(-1), normal)
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
    jagged: Jagged,
    out: Tensor | None,
    lse: Tensor | None,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, and of the two tables where `wanted`.

    Args:
        grad: (T, H, D_v), of the output.
        out: the output, where it was a softmax.
        lse: likewise.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dposition = (
        None if position_bias is None or not wanted[0] else position_bias.new_zeros(jagged.max_length).to(exact)
    )
    dtime = None if time_bias is None or not wanted[1] else time_bias.new_zeros(len(time_bias)).to(exact)
    for some in _rectangles(jagged, q.shape[1]):
        queries, keys, values, asked = (some.take(flat, exact) for flat in (q, k, v, grad))
        # What stands behind a sequence's end may be anything, so its gradients are made zeros.
        asked = asked.masked_fill(~some.present[:, None, :, None], 0.0)
        grads = [torch.zeros_like(part) for part in (queries, keys, values)]
        if out is not None and lse is not None:
            along = (some.take(out, exact) * asked).sum(-1, keepdim=True)
            normal = some.take(lse.unsqueeze(-1), exact)
        for first, last in some.runs:
            scores, buckets = _scores(queries, keys, position_bias, time_bias, jagged, some, first, last)
            distances = _distances(first, last, q.device)
            dweights = asked[:, :, first:last] @ values[:, :, :last].transpose(-1, -2)
            if jagged.softmax:
                weights = scores.sub_(normal[:, :, first:last]).exp_().masked_fill_(distances < 0, 0.0)
                dscores = dweights.sub_(along[:, :, first:last]).mul_(weights)
            else:
                # silu(s) = s σ(s); silu'(s) = σ(s) + silu(s) (1 - σ(s))
                share = scores.sigmoid()
                weights = scores.mul_(share)
                slope = share + weights * (1.0 - share)
                inverse = _inverse_length(first, last, jagged, weights).masked_fill(distances < 0, 0.0)
                weights *= inverse
                dscores = dweights.mul_(slope).mul_(inverse)
            grads[0][:, :, first:last] = dscores @ keys[:, :, :last]
            grads[1][:, :, :last] += dscores.transpose(-1, -2) @ queries[:, :, first:last]
            grads[2][:, :, :last] += weights.transpose(-1, -2) @ asked[:, :, first:last]
            if dposition is not None:
                whole = dscores.sum((0, 1)).flatten()
                dposition.scatter_add_(0, distances.clamp_min(0).flatten(), whole)
            if dtime is not None and buckets is not None:
                dtime.scatter_add_(0, buckets.flatten(), dscores.sum(1).flatten())
        for flat, padded in zip((dq, dk, dv), grads, strict=True):
            some.put(flat, padded)
    return (
        *(dq, dk, dv),
        None if dposition is None or position_bias is None else dposition.to(position_bias.dtype),
        None if dtime is None or time_bias is None else dtime.to(time_bias.dtype),
    )


def _rectangles(jagged: Jagged, heads: int) -> Iterator[_Rectangle]:
    """All sequences, longest first, in rectangles of which one run's scores are at most `SCORES` or one query's."""
    lengths = jagged.offsets.diff()
    order = lengths.argsort(descending=True, stable=True)
    descending = lengths[order].tolist()
    begin = 0
    while begin < len(descending) and (longest := descending[begin]):
        most = max(1, SCORES // (heads * longest * min(longest, _QUERIES)))
        end, wasted = begin + 1, 0
        while end < min(len(descending), begin + most) and descending[end]:
            wasted += heads * (longest**2 - descending[end] ** 2)
            if wasted > _WASTED:
                break
            end += 1
        chosen = order[begin:end]
        place = torch.arange(longest, device=order.device)
        size = lengths[chosen, None]
        index = jagged.offsets[chosen, None] + torch.minimum(place, size - 1)
        step = max(1, min(_QUERIES, SCORES // (heads * longest * (end - begin))))
        runs = [(first, min(first + step, longest)) for first in range(0, longest, step)]
        yield _Rectangle(index, place < size, runs)
        begin = end


def _scores(
    queries: Tensor,
    keys: Tensor,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
    jagged: Jagged,
    some: _Rectangle,
    first: int,
    last: int,
) -> tuple[Tensor, Tensor | None]:
    """(G, H, last - first, last) of a run's queries and all keys up to its end; and the (G, …) buckets, if any."""
    scores = queries[:, :, first:last] @ keys[:, :, :last].transpose(-1, -2)
    if position_bias is not None:
        scores += position_bias.to(scores.dtype)[_distances(first, last, scores.device).clamp_min(0)]
    buckets = None
    if time_bias is not None and jagged.timestamps is not None and jagged.query_timestamps is not None:
        asked = jagged.query_timestamps[some.index[:, first:last]]
        known = jagged.timestamps[some.index[:, :last]]
        buckets = time_buckets(asked[:, :, None], known[:, None, :], len(time_bias) - 2)
        picked = time_bias.to(scores.dtype).index_select(0, buckets.flatten())  # several times faster than [buckets]
        scores += picked.view_as(buckets).unsqueeze(1)
    return scores, buckets


def _distances(first: int, last: int, device: torch.device) -> Tensor:
    """(last - first, last) int64, place of the query - place of the key."""
    return torch.arange(first, last, device=device)[:, None] - torch.arange(last, device=device)[None, :]


def _inverse_length(first: int, last: int, jagged: Jagged, like: Tensor) -> Tensor:
    """(last - first, 1): 1 / n of each query."""
    length = torch.arange(first + 1, last + 1, device=like.device)
    if not jagged.by_length:
        length = torch.full_like(length, jagged.max_length)
    return length.to(like.dtype).reciprocal()[:, None]
