"""The Triton kernel for the gradients of the position and time bias of HSTU's attention.

Both tables are shared by all heads and sequences, so the gradients of all scores have to be added up by distance and
by bucket. One program takes the square blocks of scores that lie on one diagonal of blocks: distances stand at the
same places of all of these, so the blocks are added up whole, and torch sums the result's diagonals. The heads of a
block are added up before anything is looked for in it, and then each bucket that occurs in it is summed: in a block
off the main diagonal, times lie close on the logarithmic scale, and few do. No atomics, so results repeat to the bit.
"""

# Triton knows no types, and writes what is constant in a kernel in capitals.
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator,assignment"
# ruff: noqa: N803
from __future__ import annotations

from typing import Any

from llmrec.kernels.hstu_kernels import biased, gradients, time_bucket

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine that trains on its processor has none

    class _Absent:
        """Lets the kernel be defined, though not run."""

        @staticmethod
        def jit(function: Any) -> Any:
            return function

    triton, tl = _Absent, None


@triton.jit
def bias_gradients(
    q,
    k,
    v,
    position_bias,
    time_bias,
    starts,
    offsets,
    timestamps,
    query_timestamps,
    grad,
    lse,
    along,
    by_place,
    by_bucket,
    q_item,
    q_head,
    k_item,
    k_head,
    v_item,
    v_head,
    grad_item,
    grad_head,
    heads,
    sequences,
    max_length,
    num_starts,
    last_bucket,
    inverse_length,
    QK: tl.constexpr,
    VALUE: tl.constexpr,
    QK_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SIDE: tl.constexpr,
    BUCKETS_BLOCK: tl.constexpr,
    POSITION: tl.constexpr,
    TIME: tl.constexpr,
    WANT_POSITION: tl.constexpr,
    WANT_TIME: tl.constexpr,
    BY_LENGTH: tl.constexpr,
    SOFTMAX: tl.constexpr,
    PRECISION: tl.constexpr,
    PER_LOG: tl.constexpr,
    UNKNOWN: tl.constexpr,
):
    """One diagonal of blocks, of every so many-th sequence, every so many-th block.

    Arguments as of the kernels of `hstu_kernels`; the grid is (diagonals, parts of the sequences, parts of the
    blocks). Program p writes by_place[p] (SIDE, SIDE), the sum of its blocks, and by_bucket[p] (BUCKETS_BLOCK,).
    """
    diagonal = tl.program_id(0)
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + diagonal
    line, column = tl.arange(0, SIDE), tl.arange(0, SIDE)
    qk, value, bucket_number = tl.arange(0, QK_BLOCK), tl.arange(0, VALUE_BLOCK), tl.arange(0, BUCKETS_BLOCK)
    distance = diagonal * SIDE + line[:, None] - column[None, :]
    earlier = distance >= 0
    whole = tl.zeros([SIDE, SIDE], tl.float32)
    found = tl.zeros([BUCKETS_BLOCK], tl.float32)
    place_scores = tl.zeros([SIDE, SIDE], tl.float32)
    if POSITION:  # the same for all of them
        place_scores = biased(
            *(place_scores, distance, 0, 0, position_bias, time_bias, starts),
            *(max_length, num_starts, last_bucket, True, False, PER_LOG, UNKNOWN),
        )
    for sequence in range(tl.program_id(1), sequences, tl.num_programs(1)):
        begin = tl.load(offsets + sequence)
        length = (tl.load(offsets + sequence + 1) - begin).to(tl.int32)
        for block in range(diagonal + tl.program_id(2), tl.cdiv(length, SIDE), tl.num_programs(2)):
            row, place = block * SIDE + line, (block - diagonal) * SIDE + column
            inside, there = row < length, place < length
            item, other = begin + row, begin + place
            both = place_scores
            bucket = tl.zeros([SIDE, SIDE], tl.int32)
            if TIME:
                asked = tl.load(query_timestamps + item, mask=inside, other=0)
                known = tl.load(timestamps + other, mask=there, other=0)
                bucket = time_bucket(asked[:, None], known[None, :], starts, num_starts, last_bucket, PER_LOG, UNKNOWN)
                both = both + tl.load(time_bias + bucket).to(tl.float32)
            inverse = tl.full([SIDE], 1.0, tl.float32) * inverse_length
            if BY_LENGTH:
                inverse = 1.0 / (row + 1).to(tl.float32)
            normal = tl.zeros([SIDE], tl.float32)
            product = tl.zeros([SIDE], tl.float32)
            block_sum = tl.zeros([SIDE, SIDE], tl.float32)
            for head in range(heads):
                # Queries behind the sequence's end have zeros for their output's gradient, and add zeros.
                query = tl.load(
                    q + item[:, None] * q_item + head * q_head + qk[None, :],
                    mask=inside[:, None] & (qk < QK)[None, :],
                    other=0.0,
                )
                given = tl.load(
                    grad + item[:, None] * grad_item + head * grad_head + value[None, :],
                    mask=inside[:, None] & (value < VALUE)[None, :],
                    other=0.0,
                )
                key = tl.load(
                    k + other[None, :] * k_item + head * k_head + qk[:, None],
                    mask=there[None, :] & (qk < QK)[:, None],
                    other=0.0,
                )
                values = tl.load(
                    v + other[None, :] * v_item + head * v_head + value[:, None],
                    mask=there[None, :] & (value < VALUE)[:, None],
                    other=0.0,
                )
                if SOFTMAX:
                    normal = tl.load(lse + item * heads + head, mask=inside, other=float("inf"))
                    product = tl.load(along + item * heads + head, mask=inside, other=0.0)
                scores = tl.dot(query, key, input_precision=PRECISION) + both
                dweights = tl.dot(given, values, input_precision=PRECISION)
                _, dscores = gradients(
                    *(scores, dweights, inverse[:, None], normal[:, None], product[:, None], distance, SOFTMAX, False),
                )
                block_sum += dscores
            block_sum = tl.where(earlier, block_sum, 0.0)
            if WANT_POSITION:
                whole += block_sum
            if WANT_TIME:
                seen = earlier & inside[:, None] & (bucket <= last_bucket)
                lowest = tl.min(tl.min(tl.where(seen, bucket, last_bucket + 1), 1), 0)
                highest = tl.max(tl.max(tl.where(seen, bucket, -1), 1), 0)
                for number in range(lowest, highest + 1):
                    part = tl.sum(tl.sum(tl.where(bucket == number, block_sum, 0.0), 1), 0)
                    found += tl.where(bucket_number == number, part, 0.0)
                part = tl.sum(tl.sum(tl.where(bucket > last_bucket, block_sum, 0.0), 1), 0)
                found += tl.where(bucket_number == last_bucket + 1, part, 0.0)
    if WANT_POSITION:
        at = program.to(tl.int64) * SIDE * SIDE + line[:, None] * SIDE + column[None, :]
        tl.store(by_place + at, whole)
    if WANT_TIME:
        tl.store(by_bucket + program.to(tl.int64) * BUCKETS_BLOCK + bucket_number, found)
