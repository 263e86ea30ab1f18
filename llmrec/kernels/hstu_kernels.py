"""The Triton kernel of `llmrec.kernels.hstu_attention`, forwards, and what its gradients' kernels share with it.

Jagged and causal, with the bias of place and time added inside. One program keeps a block of queries of one sequence
and head and goes over the blocks of keys up to it. Blocks of scores that no query sees are not computed, and only
those on the diagonal are masked. `hstu_launch` runs it.

All kernels take q, k (T, H, QK) and v, grad (T, H, VALUE) by their strides over items and heads, with rows of one head
in one piece, and offsets (B + 1,), timestamps (T,) and query_timestamps (T,) int64. What they write is contiguous. The
grid has one program per sequence, head and block, `blocks` of them for the longest sequence that there may be.
"""

# Triton knows no types, and writes what is constant in a kernel in capitals.
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator,assignment"
# ruff: noqa: N803
from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine that trains on its processor has none

    class _Absent:
        """Lets the kernels be defined, though not run."""

        @staticmethod
        def jit(function: Any) -> Any:
            return function

    triton, tl = _Absent, None


def available() -> bool:
    """Whether Triton is installed."""
    return tl is not None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on tensors that may lie on the processor."""
    return available() and not isinstance(attend, triton.JITFunction)


@triton.jit
def time_bucket(asked, known, starts, num_starts, last_bucket, PER_LOG: tl.constexpr, UNKNOWN: tl.constexpr):
    """`relative_bias.time_buckets`: by a logarithm, and by the bucket's first second where that is a close call."""
    elapsed = tl.maximum(tl.abs(asked - known), 1)
    level = tl.log(elapsed.to(tl.float32)) * PER_LOG
    nearest = (level + 0.5).to(tl.int32)
    close = (tl.abs(level - nearest.to(tl.float32)) < 1e-3) & (nearest < num_starts)
    start = tl.load(starts + nearest, mask=close, other=0)
    bucket = tl.where(close, nearest - (elapsed < start).to(tl.int32), level.to(tl.int32))
    bucket = tl.minimum(bucket, last_bucket)
    return tl.where((asked == UNKNOWN) | (known == UNKNOWN), last_bucket + 1, bucket)


@triton.jit
def biased(
    scores,
    distance,
    asked,
    known,
    position_bias,
    time_bias,
    starts,
    max_length,
    num_starts,
    last_bucket,
    POSITION: tl.constexpr,
    TIME: tl.constexpr,
    PER_LOG: tl.constexpr,
    UNKNOWN: tl.constexpr,
):
    """The scores with both biases; `asked` and `known` broadcast to them."""
    if POSITION:
        there = (distance >= 0) & (distance < max_length)
        scores += tl.load(position_bias + distance, mask=there, other=0.0).to(tl.float32)
    if TIME:
        bucket = time_bucket(asked, known, starts, num_starts, last_bucket, PER_LOG, UNKNOWN)
        scores += tl.load(time_bias + bucket).to(tl.float32)
    return scores


@triton.jit
def gradients(scores, dweights, inverse, lse, along, distance, SOFTMAX: tl.constexpr, MASKED: tl.constexpr):
    """Weights, and the gradients of the scores; if MASKED, zeros where the key comes later.

    The other arguments broadcast to the scores: 1 / n of the query, the logarithm of what its softmax was divided by,
    and its output times its output's gradient.
    """
    if SOFTMAX:
        weights = tl.exp(scores - lse)
        if MASKED:
            weights = tl.where(distance >= 0, weights, 0.0)
        dscores = weights * (dweights - along)
    else:
        # silu(s) = s σ(s); silu'(s) = σ(s) + silu(s) (1 - σ(s))
        share = 1.0 / (1.0 + tl.exp(-scores))
        weights = scores * share
        dscores = dweights * inverse * (share + weights * (1.0 - share))
        weights = weights * inverse
        if MASKED:
            weights = tl.where(distance >= 0, weights, 0.0)
            dscores = tl.where(distance >= 0, dscores, 0.0)
    return weights, dscores


@triton.jit
def attend(
    q,
    k,
    v,
    position_bias,
    time_bias,
    starts,
    offsets,
    timestamps,
    query_timestamps,
    out,
    lse,
    q_item,
    q_head,
    k_item,
    k_head,
    v_item,
    v_head,
    heads,
    blocks,
    max_length,
    num_starts,
    last_bucket,
    inverse_length,
    QK: tl.constexpr,
    VALUE: tl.constexpr,
    QK_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    PASSING: tl.constexpr,
    POSITION: tl.constexpr,
    TIME: tl.constexpr,
    BY_LENGTH: tl.constexpr,
    SOFTMAX: tl.constexpr,
    PRECISION: tl.constexpr,
    PER_LOG: tl.constexpr,
    UNKNOWN: tl.constexpr,
):
    """KEPT queries of one head and sequence: PASSING keys at a time, at last those that not all of them see."""
    program = tl.program_id(0)
    sequence, head = program // (blocks * heads), ((program // blocks) % heads).to(tl.int64)
    begin = tl.load(offsets + sequence)
    length = (tl.load(offsets + sequence + 1) - begin).to(tl.int32)
    first = (blocks - 1 - program % blocks) * KEPT  # the most work first
    if first >= length:
        return
    row, column = first + tl.arange(0, KEPT), tl.arange(0, PASSING)
    qk, value = tl.arange(0, QK_BLOCK), tl.arange(0, VALUE_BLOCK)
    inside = row < length
    item = begin + row
    query = tl.load(
        q + item[:, None] * q_item + head * q_head + qk[None, :],
        mask=inside[:, None] & (qk < QK)[None, :],
        other=0.0,
    )
    asked = tl.zeros([KEPT], tl.int64)
    known = tl.zeros([PASSING], tl.int64)
    if TIME:
        asked = tl.load(query_timestamps + item, mask=inside, other=0)
    sums = tl.zeros([KEPT, VALUE_BLOCK], tl.float32)
    greatest = tl.full([KEPT], float("-inf"), tl.float32)
    total = tl.zeros([KEPT], tl.float32)
    whole, end = (first // PASSING) * PASSING, tl.minimum(first + KEPT, length)
    for masked in tl.static_range(2):
        for start in range(whole if masked else 0, end if masked else whole, PASSING):
            place = start + column
            there = place < length
            other = begin + place
            key = tl.load(
                k + other[None, :] * k_item + head * k_head + qk[:, None],
                mask=there[None, :] & (qk < QK)[:, None],
                other=0.0,
            )
            values = tl.load(
                v + other[:, None] * v_item + head * v_head + value[None, :],
                mask=there[:, None] & (value < VALUE)[None, :],
                other=0.0,
            )
            if TIME:
                known = tl.load(timestamps + other, mask=there, other=0)
            distance = row[:, None] - place[None, :]
            scores = tl.dot(query, key, input_precision=PRECISION)
            scores = biased(
                *(scores, distance, asked[:, None], known[None, :], position_bias, time_bias, starts),
                *(max_length, num_starts, last_bucket, POSITION, TIME, PER_LOG, UNKNOWN),
            )
            if SOFTMAX:
                if masked:
                    scores = tl.where(distance >= 0, scores, float("-inf"))
                higher = tl.maximum(greatest, tl.max(scores, 1))  # finite: every query sees the first block
                weights = tl.exp(scores - higher[:, None])
                shrink = tl.exp(greatest - higher)
                total = total * shrink + tl.sum(weights, 1)
                sums = sums * shrink[:, None]
                greatest = higher
            else:
                weights = scores / (1.0 + tl.exp(-scores))
                if masked:
                    weights = tl.where(distance >= 0, weights, 0.0)
            sums += tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    if SOFTMAX:
        sums = sums / total[:, None]
        tl.store(lse + item * heads + head, greatest + tl.log(total), mask=inside)
    elif BY_LENGTH:
        sums = sums / (row + 1).to(tl.float32)[:, None]
    else:
        sums = sums * inverse_length
    tl.store(
        out + (item[:, None] * heads + head) * VALUE + value[None, :],
        sums.to(out.dtype.element_ty),
        mask=inside[:, None] & (value < VALUE)[None, :],
    )
