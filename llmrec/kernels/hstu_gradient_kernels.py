"""The Triton kernels for the gradients of HSTU's attention with respect to queries, and to keys and values.

One program of `query_gradients` keeps a block of queries and goes over the blocks of keys up to it; one of
`key_gradients` keeps a block of keys and goes over the queries from it on. Scores are computed again in both. Nothing
is added atomically, so results repeat to the bit. Arguments as `hstu_kernels` says; `hstu_launch` runs them.
"""

# Triton knows no types, and writes what is constant in a kernel in capitals.
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator,assignment"
# ruff: noqa: N803
from __future__ import annotations

from typing import Any

from llmrec.kernels.hstu_kernels import biased, gradients

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


@triton.jit
def query_gradients(
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
    dq,
    q_item,
    q_head,
    k_item,
    k_head,
    v_item,
    v_head,
    grad_item,
    grad_head,
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
    """The gradients of KEPT queries, PASSING keys at a time."""
    program = tl.program_id(0)
    sequence, head = program // (blocks * heads), ((program // blocks) % heads).to(tl.int64)
    begin = tl.load(offsets + sequence)
    length = (tl.load(offsets + sequence + 1) - begin).to(tl.int32)
    first = (blocks - 1 - program % blocks) * KEPT
    if first >= length:
        return
    row, column = first + tl.arange(0, KEPT), tl.arange(0, PASSING)
    qk, value = tl.arange(0, QK_BLOCK), tl.arange(0, VALUE_BLOCK)
    inside = row < length
    item = begin + row
    in_qk, in_value = inside[:, None] & (qk < QK)[None, :], inside[:, None] & (value < VALUE)[None, :]
    query = tl.load(q + item[:, None] * q_item + head * q_head + qk[None, :], mask=in_qk, other=0.0)
    given = tl.load(grad + item[:, None] * grad_item + head * grad_head + value[None, :], mask=in_value, other=0.0)
    inverse = tl.full([KEPT], 1.0, tl.float32) * inverse_length
    if BY_LENGTH:
        inverse = 1.0 / (row + 1).to(tl.float32)
    normal = tl.zeros([KEPT], tl.float32)
    product = tl.zeros([KEPT], tl.float32)
    if SOFTMAX:
        normal = tl.load(lse + item * heads + head, mask=inside, other=float("inf"))
        product = tl.load(along + item * heads + head, mask=inside, other=0.0)
    asked = tl.zeros([KEPT], tl.int64)
    known = tl.zeros([PASSING], tl.int64)
    if TIME:
        asked = tl.load(query_timestamps + item, mask=inside, other=0)
    sums = tl.zeros([KEPT, QK_BLOCK], tl.float32)
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
                v + other[None, :] * v_item + head * v_head + value[:, None],
                mask=there[None, :] & (value < VALUE)[:, None],
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
            dweights = tl.dot(given, values, input_precision=PRECISION)
            _, dscores = gradients(
                *(scores, dweights, inverse[:, None], normal[:, None], product[:, None], distance, SOFTMAX, masked),
            )
            sums += tl.dot(dscores.to(key.dtype), tl.trans(key), input_precision=PRECISION)
    tl.store(dq + (item[:, None] * heads + head) * QK + qk[None, :], sums.to(dq.dtype.element_ty), mask=in_qk)


@triton.jit
def key_gradients(
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
    dk,
    dv,
    q_item,
    q_head,
    k_item,
    k_head,
    v_item,
    v_head,
    grad_item,
    grad_head,
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
    """The gradients of KEPT keys and their values, PASSING queries at a time; blocks of scores lie turned round."""
    program = tl.program_id(0)
    sequence, head = program // (blocks * heads), ((program // blocks) % heads).to(tl.int64)
    begin = tl.load(offsets + sequence)
    length = (tl.load(offsets + sequence + 1) - begin).to(tl.int32)
    first = (program % blocks) * KEPT
    if first >= length:
        return
    row, column = first + tl.arange(0, KEPT), tl.arange(0, PASSING)
    qk, value = tl.arange(0, QK_BLOCK), tl.arange(0, VALUE_BLOCK)
    inside = row < length
    item = begin + row
    in_qk, in_value = inside[:, None] & (qk < QK)[None, :], inside[:, None] & (value < VALUE)[None, :]
    key = tl.load(k + item[:, None] * k_item + head * k_head + qk[None, :], mask=in_qk, other=0.0)
    values = tl.load(v + item[:, None] * v_item + head * v_head + value[None, :], mask=in_value, other=0.0)
    asked = tl.zeros([PASSING], tl.int64)
    known = tl.zeros([KEPT], tl.int64)
    if TIME:
        known = tl.load(timestamps + item, mask=inside, other=0)
    inverse = tl.full([PASSING], 1.0, tl.float32) * inverse_length
    normal = tl.zeros([PASSING], tl.float32)
    product = tl.zeros([PASSING], tl.float32)
    key_sums = tl.zeros([KEPT, QK_BLOCK], tl.float32)
    value_sums = tl.zeros([KEPT, VALUE_BLOCK], tl.float32)
    whole = tl.minimum(tl.cdiv(first + KEPT - 1, PASSING) * PASSING, length)
    for later in tl.static_range(2):
        for start in range(whole if later else (first // PASSING) * PASSING, length if later else whole, PASSING):
            place = start + column
            there = place < length
            other = begin + place
            query = tl.load(
                q + other[None, :] * q_item + head * q_head + qk[:, None],
                mask=there[None, :] & (qk < QK)[:, None],
                other=0.0,
            )
            # Zeros behind the end, so that no query from there adds anything.
            given = tl.load(
                grad + other[:, None] * grad_item + head * grad_head + value[None, :],
                mask=there[:, None] & (value < VALUE)[None, :],
                other=0.0,
            )
            if TIME:
                asked = tl.load(query_timestamps + other, mask=there, other=0)
            if BY_LENGTH:
                inverse = 1.0 / (place + 1).to(tl.float32)
            if SOFTMAX:
                normal = tl.load(lse + other * heads + head, mask=there, other=float("inf"))
                product = tl.load(along + other * heads + head, mask=there, other=0.0)
            distance = place[None, :] - row[:, None]
            scores = tl.dot(key, query, input_precision=PRECISION)
            scores = biased(
                *(scores, distance, asked[None, :], known[:, None], position_bias, time_bias, starts),
                *(max_length, num_starts, last_bucket, POSITION, TIME, PER_LOG, UNKNOWN),
            )
            dweights = tl.dot(values, tl.trans(given), input_precision=PRECISION)
            weights, dscores = gradients(
                *(scores, dweights, inverse[None, :], normal[None, :], product[None, :], distance, SOFTMAX, not later),
            )
            value_sums += tl.dot(weights.to(given.dtype), given, input_precision=PRECISION)
            key_sums += tl.dot(dscores.to(query.dtype), tl.trans(query), input_precision=PRECISION)
    tl.store(dk + (item[:, None] * heads + head) * QK + qk[None, :], key_sums.to(dk.dtype.element_ty), mask=in_qk)
    tl.store(
        dv + (item[:, None] * heads + head) * VALUE + value[None, :], value_sums.to(dv.dtype.element_ty), mask=in_value
    )
