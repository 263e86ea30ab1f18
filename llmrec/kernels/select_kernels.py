"""Triton kernels of `llmrec.kernels.select`: gather, log-probability, mask and top W of one level.

A candidate is a (beam, offset) pair, numbered in node order. Its score and its number make one 64-bit key: the score's
bits, arranged so that integers compare as the floats do, above the number, turned round so that of equal scores the
lower node is greater. Keys are distinct, so their W greatest are the exact selection with its tie rule, whatever the
order of the work. `_partial` keeps the best of each tile of slots, `_merge` the best of several such lists, and
`_finish` puts the last list into node order and writes it out.

What a launch does depends on shapes alone; a tile without a legal child returns early, which is what makes levels with
a skewed fan-out cheap.
"""

# Triton knows no types, and writes what is constant in a kernel in capitals.
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator,assignment"
# ruff: noqa: N803
from __future__ import annotations

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine that serves on its processor has none

    class _Absent:
        """Lets the kernels be defined, though not run."""

        @staticmethod
        def jit(function: Any) -> Any:
            return function

    triton, tl = _Absent, None

# Below every key of a finite score.
_NO_KEY = -(2**63 - 1)
# Slots of one tile, keys of one merging program, logits that one program adds up. Swept by benchmarks/gpu_check.py.
TILE, MERGE, STREAM = 1024, 2048, 4096


def available() -> bool:
    """Whether Triton is installed."""
    return tl is not None


@triton.jit
def _excluded(dead, key, legal, num_dead, PROBES: tl.constexpr):
    """Which of `key` occur among the ascending `dead`: PROBES halvings, the same for every key."""
    place = key * 0
    for step in tl.static_range(PROBES):
        stride = 1 << (PROBES - 1 - step)
        probe = place + (stride - 1)
        below = tl.load(dead + probe, mask=legal & (probe < num_dead), other=0x7FFFFFFFFFFFFFFF) < key
        place = tl.where(below, place + stride, place)
    return tl.load(dead + place, mask=legal & (place < num_dead), other=-1) == key


@triton.jit
def _partial(
    logits,
    normal,
    score,
    node,
    start,
    token,
    dead,
    out,
    logits_request,
    logits_beam,
    beams,
    slots,
    num_nodes,
    num_dead,
    BEAMS: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    KEEP: tl.constexpr,
    PROBES: tl.constexpr,
    NO_KEY: tl.constexpr,
):
    """The KEEP greatest keys of a tile of BEAMS beams x SLOTS slots of one request; unsorted if the tile has fewer."""
    tile, request = tl.program_id(0), tl.program_id(1).to(tl.int64)
    beam = (tile // CHUNKS) * BEAMS + tl.arange(0, BEAMS)
    present = beam < beams
    above = tl.load(score + request * beams + beam, mask=present, other=float("-inf"))
    base = tl.load(normal + request * beams + beam, mask=present, other=0.0)
    parent = tl.load(node + request * beams + beam, mask=present, other=0)
    begin = tl.load(start + parent, mask=present, other=0)
    end = tl.load(start + parent + 1, mask=present, other=0)
    offset = (tile % CHUNKS) * SLOTS + tl.arange(0, SLOTS)
    child = begin[:, None] + offset[None, :]
    legal = (child < end[:, None]) & (above > float("-inf"))[:, None]
    count: tl.constexpr = BEAMS * SLOTS
    kept: tl.constexpr = KEEP if count > KEEP else count
    place = out + (request * tl.num_programs(0) + tile) * kept + tl.arange(0, kept)
    if tl.max(tl.max(legal.to(tl.int32), 1), 0) == 0:
        tl.store(place, tl.full([kept], NO_KEY, tl.int64))
    else:
        edge = tl.load(token + child, mask=legal, other=-1)
        row = logits + request * logits_request + beam.to(tl.int64)[:, None] * logits_beam
        logit = tl.load(row + edge, mask=legal & (edge >= 0), other=0.0).to(tl.float32)
        value = above[:, None] + tl.where(edge < 0, 0.0, logit - base[:, None])
        if PROBES:
            key = request * num_nodes + child.to(tl.int64)
            legal = legal & (_excluded(dead, key, legal, num_dead, PROBES) == 0)
        legal = legal & (value > float("-inf"))  # not for NaN either
        value = tl.where(value == 0.0, 0.0, value)  # -0.0 and 0.0 are equal scores
        bits = value.to(tl.int32, bitcast=True)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        number = beam[:, None] * slots + offset[None, :]
        keys = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - number).to(tl.int64)
        keys = tl.reshape(tl.where(legal, keys, NO_KEY), [count])
        if kept < count:
            keys = tl.topk(keys, kept)
        tl.store(place, keys)


@triton.jit
def _merge(keys, out, count, BLOCK: tl.constexpr, KEEP: tl.constexpr, NO_KEY: tl.constexpr):
    """The KEEP greatest of each run of BLOCK of a request's `count` keys."""
    group, request = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = group * BLOCK + tl.arange(0, BLOCK)
    some = tl.load(keys + request * count + place, mask=place < count, other=NO_KEY)
    target = out + (request * tl.num_programs(0) + group) * KEEP + tl.arange(0, KEEP)
    tl.store(target, tl.topk(some, KEEP))


@triton.jit
def _finish(
    keys,
    logits,
    normal,
    node,
    start,
    token,
    node_out,
    parent_out,
    token_out,
    score_out,
    gain_out,
    logits_request,
    logits_beam,
    beams,
    slots,
    count,
    width,
    BLOCK: tl.constexpr,
    KEEP: tl.constexpr,
    NO_KEY: tl.constexpr,
):
    """Writes the `width` greatest of a request's `count` keys in the order of their numbers; one program a request."""
    request = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    some = tl.load(keys + request * count + place, mask=place < count, other=NO_KEY)
    best = tl.topk(some, KEEP) if KEEP < BLOCK else tl.sort(some, descending=True)
    rank = tl.arange(0, KEEP)
    alive = (best > NO_KEY) & (rank < width)
    number = 0x7FFFFFFF - (best & 0xFFFFFFFF)
    # Numbers are below 2^31, so what is not kept sorts behind them all.
    in_order = tl.sort(tl.where(alive, (number << 32) | ((best >> 32) & 0xFFFFFFFF), 0x7FFFFFFFFFFFFFFF))
    alive = in_order < 0x7FFFFFFFFFFFFFFF
    number = tl.where(alive, in_order >> 32, 0)
    beam = number // slots
    parent = tl.load(node + request * beams + beam)
    child = tl.where(alive, tl.load(start + parent).to(tl.int64) + number % slots, 0)
    edge = tl.load(token + child)
    ordered = (in_order & 0xFFFFFFFF).to(tl.int32)
    value = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    wanted = alive & (edge >= 0)
    logit = tl.load(logits + request * logits_request + beam * logits_beam + edge, mask=wanted, other=0.0)
    gain = logit.to(tl.float32) - tl.load(normal + request * beams + beam)
    target, inside = request * width + rank, rank < width
    tl.store(node_out + target, child, mask=inside)
    tl.store(parent_out + target, tl.where(alive, beam, 0), mask=inside)
    tl.store(token_out + target, edge.to(tl.int64), mask=inside)
    tl.store(score_out + target, tl.where(alive, value, float("-inf")), mask=inside)
    tl.store(gain_out + target, tl.where(wanted, gain, 0.0), mask=inside)


@triton.jit
def _normalizer(
    logits,
    vocabulary,
    out,
    row_stride,
    count,
    per_split,
    BLOCK: tl.constexpr,
    GATHER: tl.constexpr,
):
    """log sum exp of one split of one row, in one pass."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    greatest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    first = split * per_split
    for begin in range(first, first + per_split, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        inside = (place < count) & (place < first + per_split)
        if GATHER:
            place = tl.load(vocabulary + place, mask=inside, other=0)
        value = tl.load(logits + row * row_stride + place, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(greatest, value)
        level = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf would be NaN
        total = total * tl.exp(greatest - level) + tl.exp(value - level)
        greatest = higher
    highest = tl.max(greatest, 0)
    level = tl.where(highest == float("-inf"), 0.0, highest)
    whole = tl.sum(total * tl.exp(greatest - level), 0)
    found = tl.where(highest == float("inf"), float("inf"), tl.log(whole) + level)
    tl.store(out + row * tl.num_programs(1) + split, found)


@triton.jit
def _legal_normalizer(
    logits,
    node,
    start,
    token,
    dead,
    out,
    logits_request,
    logits_beam,
    num_nodes,
    num_dead,
    BLOCK: tl.constexpr,
    PROBES: tl.constexpr,
):
    """log sum exp over one beam's legal children, 0 where that is infinite."""
    beam, request = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = request * tl.num_programs(0) + beam
    parent = tl.load(node + place)
    begin, end = tl.load(start + parent), tl.load(start + parent + 1)
    greatest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(begin, end, BLOCK):
        child = first + tl.arange(0, BLOCK)
        legal = child < end
        if PROBES:
            key = request * num_nodes + child.to(tl.int64)
            legal = legal & (_excluded(dead, key, legal, num_dead, PROBES) == 0)
        edge = tl.load(token + child, mask=legal, other=0)
        edge = tl.where(edge < 0, 0, edge)
        row = logits + request * logits_request + beam.to(tl.int64) * logits_beam
        value = tl.load(row + edge, mask=legal, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(greatest, value)
        level = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(greatest - level) + tl.exp(value - level)
        greatest = higher
    highest = tl.max(greatest, 0)
    level = tl.where(highest == float("-inf"), 0.0, highest)
    found = tl.log(tl.sum(total * tl.exp(greatest - level), 0)) + level
    infinite = (highest == float("inf")) | (highest == float("-inf"))
    tl.store(out + place, tl.where(infinite, 0.0, found))


def select(
    start: torch.Tensor,
    token: torch.Tensor,
    fan_out: int,
    logits: torch.Tensor,
    score: torch.Tensor,
    node: torch.Tensor,
    width: int,
    normal: torch.Tensor,
    dead: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """`llmrec.kernels.select.select` for float32 scores: node, parent, token, score and gain, each (R, width)."""
    requests, beams = node.shape
    logits, score, node, normal = _rows(logits), score.contiguous(), node.contiguous(), normal.contiguous()
    keep = max(16, _power(width))
    slots = min(_power(fan_out), max(TILE, 2 * keep))
    together = min(_power(beams), max(1, max(TILE, 2 * keep) // slots))
    chunks = -(-fan_out // slots)
    tiles = -(-beams // together) * chunks
    kept = min(keep, together * slots)
    keys = torch.empty((requests, tiles, kept), dtype=torch.int64, device=node.device)
    absent = dead is None or not dead.numel()
    num_dead = 0 if dead is None or absent else dead.numel()
    _partial[(tiles, requests)](
        *(logits, normal, score, node, start, token, node if absent else dead, keys),
        *(logits.stride(0), logits.stride(1), beams, fan_out, len(token), num_dead),
        BEAMS=together,
        SLOTS=slots,
        CHUNKS=chunks,
        KEEP=keep,
        PROBES=num_dead.bit_length(),
        NO_KEY=_NO_KEY,
    )
    count = tiles * kept
    block = max(MERGE, 2 * keep)
    while count > block:
        groups = -(-count // block)
        merged = torch.empty((requests, groups, keep), dtype=torch.int64, device=node.device)
        _merge[(groups, requests)](keys, merged, count, BLOCK=block, KEEP=keep, NO_KEY=_NO_KEY)
        keys, count = merged, groups * keep
    found = [torch.empty((requests, width), dtype=torch.int64, device=node.device) for _ in range(3)]
    found += [torch.empty((requests, width), dtype=torch.float32, device=node.device) for _ in range(2)]
    _finish[(requests,)](
        *(keys, logits, normal, node, start, token, *found),
        *(logits.stride(0), logits.stride(1), beams, fan_out, count, width),
        BLOCK=max(keep, _power(count)),
        KEEP=keep,
        NO_KEY=_NO_KEY,
    )
    return tuple(found)


def normalizer(logits: torch.Tensor, vocabulary: torch.Tensor | None = None) -> torch.Tensor:
    """(R, W') log sum exp of logits (R, W', V), in float32, over all tokens or over `vocabulary`."""
    rows = logits.reshape(-1, logits.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    count = rows.shape[1] if vocabulary is None else vocabulary.numel()
    # Few rows are shared out over more programs, for one alone cannot keep the memory busy.
    splits = max(1, min(-(-count // STREAM), 512 // max(1, len(rows))))
    block = min(STREAM, max(16, _power(count)))
    per_split = -(-count // (splits * block)) * block
    out = torch.empty((len(rows), splits), dtype=torch.float32, device=logits.device)
    _normalizer[(len(rows), splits)](
        *(rows, rows if vocabulary is None else vocabulary, out, rows.stride(0), count, per_split),
        BLOCK=block,
        GATHER=vocabulary is not None,
    )
    return (out.logsumexp(1) if splits > 1 else out[:, 0]).view(logits.shape[:-1])


def legal_normalizer(
    start: torch.Tensor,
    token: torch.Tensor,
    logits: torch.Tensor,
    node: torch.Tensor,
    dead: torch.Tensor | None = None,
) -> torch.Tensor:
    """(R, W') log sum exp of each beam's legal children, in float32, 0 where it is infinite."""
    requests, beams = node.shape
    logits, node = _rows(logits), node.contiguous()
    out = torch.empty((requests, beams), dtype=torch.float32, device=node.device)
    absent = dead is None or not dead.numel()
    num_dead = 0 if dead is None or absent else dead.numel()
    _legal_normalizer[(beams, requests)](
        *(logits, node, start, token, node if absent else dead, out),
        *(logits.stride(0), logits.stride(1), len(token), num_dead),
        BLOCK=256,
        PROBES=num_dead.bit_length(),
    )
    return out


def _power(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def _rows(logits: torch.Tensor) -> torch.Tensor:
    """The logits, each row's one behind the other."""
    return logits if logits.stride(2) == 1 else logits.contiguous()
