"""One level of a constrained beam search over static shapes: mask, score, keep the best W.

`llmrec.beam` asks the device how many children its beams really have, and reads the answer back. Here nothing is read
back and every shape follows from the number of requests, of beams and the level alone, so that the whole search can be
recorded as a CUDA graph: a beam always gets as many slots as the level's widest node has children (the padding of
STATIC, arXiv 2602.22647, over a trie whose child ids *are* the rows, so that no column of next states is read).

`select_padded` is the definition, in torch; `select` takes the Triton kernels of `select_kernels` where tensors are on
a GPU. Both return the same bits, given the same normalisers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from llmrec.exceptions import CatalogError
from llmrec.kernels import select_kernels

# Slots that the torch form looks at together, over all requests: bounds its memory on levels with a skewed fan-out.
_SLOTS_AT_ONCE = 1 << 22
_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Level:
    """One level of a trie, as `TrieTensors` has it.

    Attributes:
        start: (n_above + 1,) int32; the children of node `p` are nodes start[p] to start[p + 1] of this level.
        token: (n,) int32 token ids on the edges, -1 behind an item's end.
        fan_out: the greatest number of children that a node of the level above has.
    """

    start: torch.Tensor
    token: torch.Tensor
    fan_out: int

    @classmethod
    def of(cls, start: torch.Tensor, token: torch.Tensor) -> "Level":
        """The level with these arrays; reads its fan-out from the device once, so not for use within a search.

        >>> Level.of(torch.tensor([0, 2, 3]), torch.tensor([7, 9, 8])).fan_out
        2
        """
        width = start[1:] - start[:-1]
        return cls(start, token, int(width.max()) if width.numel() else 0)


class Selection(NamedTuple):
    """The best W children, those that live first and in the order of their nodes; then dead places.

    A dead place has score -inf, node 0, parent 0, and the level's first token, all of which may be used as indices.

    Attributes, each (R, W):
        node: int64, in this level.
        parent: int64, places of the beams that they continue.
        token: int64, -1 behind an item's end.
        score: of the beam up to here.
        gain: this level's part of it, 0 for dead places.
    """

    node: torch.Tensor
    parent: torch.Tensor
    token: torch.Tensor
    score: torch.Tensor
    gain: torch.Tensor


def select(
    level: Level,
    logits: torch.Tensor,
    score: torch.Tensor,
    node: torch.Tensor,
    width: int,
    normal: torch.Tensor | None = None,
    dead: torch.Tensor | None = None,
) -> Selection:
    """The best `width` continuations of every request, by kernels on a GPU and by `select_padded` elsewhere.

    Equal scores go to the lower node. Candidates that are NaN or -inf are never kept.

    Args:
        level: of the children.
        logits: (R, W', V), floating point of any width.
        score: (R, W') float32 or float64, -inf for dead beams.
        node: (R, W') int64 nodes of the level above, valid for dead beams too.
        width: W.
        normal: (R, W') in the scores' type, what is taken off each logit (`normalizer`); None to normalise over a
            beam's legal children alone.
        dead: ascending int64 keys `request · n + node` that may not be entered, padded by `pad_keys`.

    Raises:
        CatalogError: if the candidates of a request cannot be counted in 31 bits.
    """
    _check(level, node)
    if logits.is_cuda and score.dtype == torch.float32 and level.fan_out and select_kernels.available():
        if normal is None:
            normal = select_kernels.legal_normalizer(level.start, level.token, logits, node, dead)
        found = select_kernels.select(
            level.start, level.token, level.fan_out, logits, score, node, width, normal, dead
        )
        return Selection(*found)
    return select_padded(level, logits, score, node, width, normal, dead)


def select_padded(
    level: Level,
    logits: torch.Tensor,
    score: torch.Tensor,
    node: torch.Tensor,
    width: int,
    normal: torch.Tensor | None = None,
    dead: torch.Tensor | None = None,
    at_once: int = _SLOTS_AT_ONCE,
) -> Selection:
    """`select` in torch; beams are looked at in runs of at most `at_once` slots over all requests, or of one beam."""
    _check(level, node)
    requests, beams = node.shape
    slots = level.fan_out
    empty = Selection(
        node=node.new_zeros((requests, width)),
        parent=node.new_zeros((requests, width)),
        token=level.token[:1].long().expand(requests, width) if slots else node.new_zeros((requests, width)),
        score=score.new_full((requests, width), -torch.inf),
        gain=score.new_zeros((requests, width)),
    )
    if not slots:
        return empty
    run = max(1, at_once // (requests * slots))
    best: list[torch.Tensor] = []  # value, child, parent, gain, each (R, at most W): in node order, like what follows
    for first in range(0, beams, run):
        some = slice(first, first + run)
        part = _candidates(
            level,
            logits[:, some],
            score[:, some],
            node[:, some],
            None if normal is None else normal[:, some],
            dead,
        )
        part[2] = part[2] + first
        if best:
            part = [torch.cat(pair, dim=1) for pair in zip(best, part, strict=True)]
        place, alive = _best_in_order(part[0], width)
        best = [values.gather(1, place) for values in part]
        best[0] = best[0].masked_fill(~alive, -torch.inf)
    value, child, parent, gain = best
    alive = value > -torch.inf
    return Selection(
        node=child.where(alive, 0),
        parent=parent.where(alive, 0),
        token=level.token[child.where(alive, 0)].long(),
        score=value,
        gain=gain.where(alive, 0.0),
    )


def normalizer(logits: torch.Tensor, dtype: torch.dtype, vocabulary: torch.Tensor | None = None) -> torch.Tensor:
    """(R, W') what logits (R, W', V) are normalised by: log of the sum of their exponentials, in `dtype`.

    Over the token ids `vocabulary` (n,) alone, or over all. On a GPU in float32 by one streaming pass, which differs
    from torch's in the last bits.
    """
    if logits.is_cuda and dtype == torch.float32 and select_kernels.available():
        return select_kernels.normalizer(logits, vocabulary)
    chosen = logits.to(dtype) if vocabulary is None else logits[..., vocabulary].to(dtype)
    return chosen.logsumexp(-1)


def pad_keys(keys: torch.Tensor, length: int) -> torch.Tensor:
    """Ascending keys (n,) with places at their end that no node has, so that as many searches share one shape.

    Raises:
        CatalogError: if there are more than `length`.

    >>> pad_keys(torch.tensor([3, 5]), 3).tolist()
    [3, 5, 9223372036854775807]
    """
    if keys.numel() > length:
        raise CatalogError(f"{keys.numel()} excluded nodes do not fit {length} places. Make room for more of them.")
    padding = torch.full((length - keys.numel(),), torch.iinfo(torch.int64).max, device=keys.device)
    return torch.cat([keys.long(), padding])


def places(counts: Sequence[int], least: int = 16) -> list[int]:
    """How many places per level hold these numbers of keys: powers of two, so that few different shapes arise.

    >>> places([0, 3, 17])
    [0, 16, 32]
    """
    return [max(least, 1 << (count - 1).bit_length()) if count else 0 for count in counts]


def _check(level: Level, node: torch.Tensor) -> None:
    if node.shape[1] * level.fan_out > _LIMIT:
        raise CatalogError(
            f"{node.shape[1]} beams with {level.fan_out} children each are more candidates than {_LIMIT}. "
            "Search with fewer beams."
        )


def _candidates(
    level: Level,
    logits: torch.Tensor,
    score: torch.Tensor,
    node: torch.Tensor,
    normal: torch.Tensor | None,
    dead: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Of every slot, (R, W'·C) in node order: value (-inf where nothing legal is), child, parent and gain."""
    requests, beams = node.shape
    begin = level.start[node].long()
    width = level.start[node + 1].long() - begin
    offset = torch.arange(level.fan_out, device=node.device)
    legal = offset < width.unsqueeze(-1)  # (R, W', C)
    child = begin.unsqueeze(-1) + offset.where(legal, 0)
    child = child.clamp(max=len(level.token) - 1)  # a node without children may begin past the last
    if dead is not None and dead.numel():
        rows = torch.arange(requests, device=node.device).view(-1, 1, 1)
        keys = rows * len(level.token) + child
        legal &= dead[torch.searchsorted(dead, keys).clamp(max=len(dead) - 1)] != keys
    token = level.token[child].long()
    # The few logits of children are widened, not all of them: the same numbers for a fraction of the traffic.
    chosen = logits.gather(-1, token.clamp(min=0)).to(score.dtype)
    if normal is None:
        total = chosen.masked_fill(~legal, -torch.inf).logsumexp(-1)
        # Where all children are excluded, the logsumexp is -inf, and -inf - -inf would be NaN.
        normal = total.masked_fill(torch.isinf(total), 0.0)
    gain = (chosen - normal.unsqueeze(-1)).masked_fill(token < 0, 0.0)
    value = score.unsqueeze(-1) + gain
    # NaN compares with nothing; as -inf it is an item that was not found, which callers notice.
    value = value.masked_fill(~legal | value.isnan(), -torch.inf)
    parent = torch.arange(beams, device=node.device).view(1, -1, 1).expand_as(child)
    return [values.flatten(1) for values in (value, child, parent, gain)]


def _best_in_order(value: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, width) places of the greatest entries of each row (R, n), ascending, and which of these there are.

    Ties go to the left, -inf is never kept. The kept places are moved together by their running count, so that no
    shape depends on a value.
    """
    least = value.topk(min(width, value.shape[1]), dim=1).values[:, -1:]
    above = value > least
    tied = (value == least) & (value > -torch.inf)
    left = width - above.sum(1, keepdim=True)
    keep = above | (tied & (tied.cumsum(1, dtype=torch.int32) <= left))
    rank = keep.cumsum(1, dtype=torch.int32).long() - 1
    place = torch.arange(value.shape[1], device=value.device).expand_as(value)
    found = place.new_zeros((value.shape[0], width + 1))  # what is not kept goes to the last column, which is cut off
    found.scatter_(1, rank.where(keep, width), place)
    alive = torch.arange(width, device=value.device) < keep.sum(1, keepdim=True)
    return found[:, :width], alive
