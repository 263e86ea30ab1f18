"""The Triton kernel of `llmrec.kernels.beam_attention`: a beam's own keys, and the prompt's part joined to them."""

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
        """Lets the kernel be defined, though not run."""

        @staticmethod
        def jit(function: Any) -> Any:
            return function

    triton, tl = _Absent, None


def available() -> bool:
    """Whether Triton is installed."""
    return tl is not None


@triton.jit
def _attend(
    query,
    keys,
    values,
    ancestors,
    prefix,
    prefix_lse,
    out,
    query_row,
    query_head,
    own_step,
    own_request,
    own_beam,
    own_head,
    prefix_request,
    prefix_head,
    prefix_beam,
    prefix_lane,
    lse_request,
    lse_head,
    lse_beam,
    lse_lane,
    beams,
    rows,
    scale,
    softcap,
    STEPS: tl.constexpr,
    OLDEST: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    INDEXED: tl.constexpr,
    PREFIX: tl.constexpr,
):
    """One beam and one key-value head: GROUP query heads over steps OLDEST to STEPS - 1, by an online softmax."""
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    request, beam = row // beams, row % beams
    lane, place = tl.arange(0, GROUP_BLOCK), tl.arange(0, WIDTH_BLOCK)
    head = kv_head * GROUP + lane
    inside = (lane < GROUP)[:, None] & (place < WIDTH)[None, :]
    asked = tl.load(query + row * query_row + head[:, None] * query_head + place[None, :], mask=inside, other=0.0)
    asked = asked.to(tl.float32) * scale
    greatest = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    sums = tl.zeros([GROUP_BLOCK, WIDTH_BLOCK], tl.float32)
    for step in tl.static_range(OLDEST, STEPS):
        ancestor = tl.load(ancestors + step * rows + row) if INDEXED else beam
        own = step * own_step + request * own_request + ancestor * own_beam + kv_head * own_head
        key = tl.load(keys + own + place, mask=place < WIDTH, other=0.0).to(tl.float32)
        value = tl.load(values + own + place, mask=place < WIDTH, other=0.0).to(tl.float32)
        score = tl.sum(asked * key[None, :], 1)
        if CAPPED:
            # tanh by the exponential of a number that is not positive, so that nothing overflows.
            size = tl.exp(-2.0 * tl.abs(score) / softcap)
            score = softcap * tl.where(score < 0, -1.0, 1.0) * (1.0 - size) / (1.0 + size)
        higher = tl.maximum(greatest, score)
        shrink, weight = tl.exp(greatest - higher), tl.exp(score - higher)
        total = total * shrink + weight
        sums = sums * shrink[:, None] + weight[:, None] * value[None, :]
        greatest = higher
    if PREFIX:
        at = request * lse_request + kv_head * lse_head + beam * lse_beam + lane * lse_lane
        lse = tl.load(prefix_lse + at, mask=lane < GROUP, other=float("-inf"))
        lse = tl.where(lse == float("inf"), float("-inf"), lse)  # FlashAttention's word for an empty part
        at = request * prefix_request + kv_head * prefix_head + beam * prefix_beam + lane * prefix_lane
        seen = inside & (lse > float("-inf"))[:, None]
        before = tl.load(prefix + at[:, None] + place[None, :], mask=seen, other=0.0).to(tl.float32)
        higher = tl.maximum(greatest, lse)
        shrink, weight = tl.exp(greatest - higher), tl.exp(lse - higher)
        total = total * shrink + weight
        sums = sums * shrink[:, None] + weight[:, None] * before
    found = sums / total[:, None]
    tl.store(out + (row * tl.num_programs(1) * GROUP + head[:, None]) * WIDTH + place[None, :], found, mask=inside)


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    ancestors: torch.Tensor | None,
    prompt: tuple[torch.Tensor, torch.Tensor] | None,
    scale: float,
    softcap: float = 0.0,
    window: int | None = None,
) -> torch.Tensor:
    """`llmrec.kernels.beam_attention.attend` for types up to float32; sums are in float32."""
    requests, beams, heads, width = query.shape
    steps, kv_heads = keys.shape[0], keys.shape[3]
    group = heads // kv_heads
    query = query.contiguous()
    if keys.stride() != values.stride() or keys.stride(4) != 1:
        keys, values = keys.contiguous(), values.contiguous()
    # Without a prompt or without indices the kernel is given others in their place, and leaves them alone.
    before, lse = (query, query) if prompt is None else prompt
    if prompt is not None:
        before = before if before.stride(3) == 1 else before.contiguous()
        before, lse = before.unflatten(2, (beams, group)), lse.unflatten(2, (beams, group))
    out = torch.empty_like(query)
    _attend[(requests * beams, kv_heads)](
        *(query, keys, values, query if ancestors is None else ancestors.contiguous(), before, lse, out),
        *(heads * width, width),
        *keys.stride()[:4],
        *before.stride()[:4],
        *lse.stride()[:4],
        *(beams, requests * beams, scale, softcap or 1.0),
        STEPS=steps,
        OLDEST=0 if window is None else max(0, steps - window),
        GROUP=group,
        WIDTH=width,
        GROUP_BLOCK=1 << (group - 1).bit_length(),
        WIDTH_BLOCK=1 << (width - 1).bit_length(),
        CAPPED=bool(softcap),
        INDEXED=ancestors is not None,
        PREFIX=prompt is not None,
    )
    return out
