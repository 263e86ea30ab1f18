"""Attention of HSTU over histories of different lengths that lie one behind the other, without padding.

Equation 2 of HSTU (arXiv 2402.17152): A V = φ(Q Kᵀ + rab^{p,t}) V with φ = SiLU, point by point and divided by a
length, where Transformers have a softmax. `hstu_attention_reference` is that, written down; `hstu_attention` computes
it by Triton kernels (`hstu_launch`) where tensors are on a GPU, and by `hstu_chunks` elsewhere, both with a backward
pass of their own and never with all the scores in memory.

Letters: B sequences, T items of all of them, H heads, D_qk and D_v widths of one head.
"""

from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.backbones.relative_bias import BUCKET_WIDTH
from llmrec.exceptions import BackboneError
from llmrec.kernels import hstu_chunks, hstu_launch
from llmrec.kernels.hstu_chunks import Jagged

NormalizeBy = Literal["max_length", "length"]
Score = Literal["silu", "softmax"]
Implementation = Literal["auto", "chunked", "triton"]


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_length: int,
    position_bias: Tensor | None = None,
    time_bias: Tensor | None = None,
    timestamps: Tensor | None = None,
    query_timestamps: Tensor | None = None,
    normalize_by: NormalizeBy = "max_length",
    score: Score = "silu",
    implementation: Implementation = "auto",
) -> Tensor:
    """Every item's mixture of the values of its sequence's items up to itself.

    With s = q·k + position_bias[place_q - place_k] + time_bias[bucket], an item at place i (from 0) of its sequence
    gets Σ_j silu(s_j) v_j / n, or Σ_j softmax(s)_j v_j. Nothing is divided by √D_qk: scale `q` for that. It can be
    differentiated, once, with respect to q, k, v and both tables.

    Args:
        q: (T, H, D_qk), of any floating type; sums are in float32, or in float64 for float64.
        k: (T, H, D_qk), of the same type.
        v: (T, H, D_v), of the same type.
        offsets: (B + 1,) int64, where each sequence begins, and T: 0 = offsets[0] ≤ … ≤ offsets[B] = T.
        max_length: what no sequence is longer than.
        position_bias: (max_length,) by distance, the same for all heads; None for none.
        time_bias: (num_time_buckets + 2,) by `relative_bias.time_buckets` of the elapsed time, the last for unknown
            times, the same for all heads; None for none.
        timestamps: (T,) int64 unix seconds of the keys, `UNKNOWN_TIME` where unknown; None: all unknown.
        query_timestamps: (T,) what queries count from; None: `timestamps`.
        normalize_by: n of "silu": `max_length`, or "length", the number of keys that the query sees, i + 1.
        score: "silu" or "softmax", which is not divided by n.
        implementation: "triton", "chunked", or "auto": Triton for tensors on a GPU of a type and width that the
            kernels know, else chunked. "chunked" reads the offsets on the host; "triton" makes it wait for nothing.

    Returns:
        (T, H, D_v) in the type of `q`.

    Raises:
        BackboneError: if shapes, types or offsets do not fit together, a name is unknown, or Triton is asked for where
            it cannot run. Offsets on a GPU are checked there: a failure is raised later, as an assertion of CUDA.
    """
    _check(q, k, v, offsets, max_length, position_bias, time_bias, timestamps, query_timestamps)
    for name, value, known in (
        ("normalize_by", normalize_by, NormalizeBy),
        ("score", score, Score),
        ("implementation", implementation, Implementation),
    ):
        if value not in known.__args__:  # type: ignore[attr-defined]
            raise BackboneError(
                f"{name} of HSTU's attention cannot be {value!r}. Choose one of {', '.join(known.__args__)}."  # type: ignore[attr-defined]
            )
    if time_bias is not None:
        if timestamps is None:
            timestamps = offsets.new_full((len(q),), UNKNOWN_TIME)
        if query_timestamps is None:
            query_timestamps = timestamps
    runs = _runs(q, v, implementation)
    jagged = Jagged(
        offsets.contiguous(),
        max_length,
        None if time_bias is None else timestamps,
        None if time_bias is None else query_timestamps,
        normalize_by == "length",
        score == "softmax",
    )
    found: Tensor = _Attention.apply(q, k, v, position_bias, time_bias, jagged, runs)
    return found


def hstu_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_length: int,
    position_bias: Tensor | None = None,
    time_bias: Tensor | None = None,
    timestamps: Tensor | None = None,
    query_timestamps: Tensor | None = None,
    normalize_by: NormalizeBy = "max_length",
    score: Score = "silu",
) -> Tensor:
    """The definition, in float64, one sequence after the other with all its scores; arguments as `hstu_attention`'s.

    Returns:
        (T, H, D_v) float64, which autograd differentiates.
    """
    outputs = [v[:0].double()]
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        length = last - first
        place = torch.arange(length, device=q.device)
        distance = place[:, None] - place[None, :]
        scores = torch.einsum("ihd,jhd->hij", q[first:last].double(), k[first:last].double())
        if position_bias is not None:
            scores = scores + position_bias.double()[distance.clamp_min(0)]
        if time_bias is not None:
            buckets = torch.full((length, length), len(time_bias) - 1, device=q.device)
            if timestamps is not None:
                keys = timestamps[first:last][None, :].expand(length, -1)
                asked = (timestamps if query_timestamps is None else query_timestamps)[first:last][:, None]
                asked = asked.expand(-1, length)
                known = (keys != UNKNOWN_TIME) & (asked != UNKNOWN_TIME)
                elapsed = (asked - keys).abs().clamp_min(1).double()
                bucket = (elapsed.log() / float(BUCKET_WIDTH)).floor().clamp_max(len(time_bias) - 2).long()
                buckets = torch.where(known, bucket, buckets)
            scores = scores + time_bias.double()[buckets]
        later = distance < 0
        if score == "softmax":
            weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        else:
            weights = (scores * scores.sigmoid()).masked_fill(later, 0.0)
            weights = weights / (max_length if normalize_by == "max_length" else (place + 1)[:, None])
        outputs.append(torch.einsum("hij,jhd->ihd", weights, v[first:last].double()))
    return torch.cat(outputs)


class _Attention(torch.autograd.Function):
    """Forwards and backwards by one of the modules, which keep no scores between the two."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_bias: Tensor | None,
        time_bias: Tensor | None,
        jagged: Jagged,
        runs: ModuleType,
    ) -> Tensor:
        # Products in the tensors' own type, whatever autocast would choose.
        with torch.autocast(q.device.type, enabled=False):
            out, lse = runs.forward(q, k, v, position_bias, time_bias, jagged)
        ctx.save_for_backward(q, k, v, position_bias, time_bias, out if jagged.softmax else None, lse)
        ctx.jagged, ctx.runs = jagged, runs
        found: Tensor = out
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, position_bias, time_bias, out, lse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:5]
        with torch.autocast(q.device.type, enabled=False):
            found = ctx.runs.backward(grad, q, k, v, position_bias, time_bias, ctx.jagged, out, lse, wanted)
        return (*found, None, None)


def _runs(q: Tensor, v: Tensor, implementation: str) -> ModuleType:
    """The module that computes it."""
    possible = hstu_launch.can_run(q, v)
    if implementation == "triton" and not possible:
        raise BackboneError(
            f"No Triton kernel computes HSTU's attention of {q.dtype} in widths {q.shape[-1]} and {v.shape[-1]} on "
            f"{q.device.type} here. Leave the implementation at 'auto'."
        )
    by_kernels = possible and (implementation == "triton" or (implementation == "auto" and q.is_cuda))
    return hstu_launch if by_kernels else hstu_chunks


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_length: int,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
    timestamps: Tensor | None,
    query_timestamps: Tensor | None,
) -> None:
    """Raises BackboneError for what does not fit together."""
    if q.dim() != 3 or k.shape != q.shape or v.dim() != 3 or v.shape[:2] != q.shape[:2]:
        raise BackboneError(
            f"HSTU's attention got queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)}. "
            "Pass (T, H, D_qk) twice and (T, H, D_v)."
        )
    if not (q.is_floating_point() and q.dtype == k.dtype == v.dtype):
        raise BackboneError(
            f"HSTU's attention got queries, keys and values of {q.dtype}, {k.dtype} and {v.dtype}. "
            "Pass one floating type."
        )
    if max_length < 1 or offsets.dim() != 1 or not len(offsets) or offsets.dtype != torch.int64:
        raise BackboneError(
            f"HSTU's attention got offsets {tuple(offsets.shape)} of {offsets.dtype} and a greatest length of "
            f"{max_length}. Pass (B + 1,) int64 and at least 1."
        )
    expected = (
        ("position_bias", position_bias, (max_length,)),
        ("timestamps", timestamps, (len(q),)),
        ("query_timestamps", query_timestamps, (len(q),)),
    )
    for name, tensor, shape in expected:
        if tensor is not None and tensor.shape != shape:
            raise BackboneError(f"{name} of HSTU's attention has shape {tuple(tensor.shape)}. Pass {shape}.")
        if tensor is not None and "timestamps" in name and tensor.dtype != torch.int64:
            raise BackboneError(f"{name} of HSTU's attention are {tensor.dtype}. Pass whole seconds in int64.")
    if time_bias is not None and (time_bias.dim() != 1 or len(time_bias) < 3):
        raise BackboneError(
            f"time_bias of HSTU's attention has shape {tuple(time_bias.shape)}. "
            "Pass (num_time_buckets + 2,), the last for unknown times."
        )
    lengths = offsets.diff()
    fit = (lengths >= 0).all() & (lengths <= max_length).all() & (offsets[0] == 0) & (offsets[-1] == len(q))
    if offsets.is_cuda:  # reading it back would make the host wait, once a layer
        torch._assert_async(fit)
    elif not fit:
        raise BackboneError(
            f"The offsets of HSTU's attention do not share out {len(q)} items among sequences of up to {max_length}. "
            f"Pass ascending offsets from 0 to {len(q)}, and the last {max_length} items of longer sequences."
        )
