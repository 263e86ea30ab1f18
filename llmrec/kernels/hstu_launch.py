"""Runs the Triton kernels of HSTU's attention: the same two functions as `llmrec.kernels.hstu_chunks` has."""

# Triton's kernels have no types, and are launched by an index.
# mypy: disable-error-code="index,misc"
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.backbones.relative_bias import BUCKET_WIDTH, bucket_starts
from llmrec.kernels import hstu_bias_kernel, hstu_gradient_kernels, hstu_kernels
from llmrec.kernels.hstu_chunks import Jagged


class Tile(NamedTuple):
    """How a kernel is launched: items of a block that stays and of one that passes by, and Triton's two numbers."""

    kept: int
    passing: int
    warps: int
    stages: int


# By a head's width (`_width`) and whether there is a bias, which takes registers. benchmarks/hstu.py sweeps them.
Tiles = dict[tuple[int, bool], Tile]
ATTEND: Tiles = {
    **{(0, False): Tile(128, 64, 4, 3), (1, False): Tile(128, 64, 8, 2), (2, False): Tile(64, 32, 8, 1)},
    **{(0, True): Tile(128, 32, 8, 2), (1, True): Tile(64, 64, 8, 2), (2, True): Tile(64, 32, 8, 1)},
}
QUERY_GRADIENTS: Tiles = {
    **{(0, False): Tile(64, 64, 4, 2), (1, False): Tile(64, 64, 4, 2), (2, False): Tile(32, 32, 4, 1)},
    **{(0, True): Tile(64, 64, 8, 2), (1, True): Tile(64, 64, 8, 2), (2, True): Tile(32, 32, 4, 1)},
}
KEY_GRADIENTS: Tiles = {
    **{(0, False): Tile(64, 64, 4, 2), (1, False): Tile(64, 64, 8, 2), (2, False): Tile(32, 32, 4, 1)},
    **{(0, True): Tile(64, 64, 8, 2), (1, True): Tile(64, 64, 8, 2), (2, True): Tile(32, 32, 4, 1)},
}
BIAS_GRADIENTS: Tiles = {
    (0, True): Tile(64, 64, 8, 2),
    (1, True): Tile(64, 64, 8, 1),
    (2, True): Tile(32, 32, 4, 1),
}
# Programs of `bias_gradients`, about: enough for a large GPU, few enough for what each of them writes.
BIAS_PROGRAMS = 1024
# The widest head, in bytes: what the smallest tiles have registers and shared memory for.
_WIDEST = 512
# Shared memory of one program that the larger tiles take, in bytes: that of GPUs for servers, from the A100 on.
_SHARED = 160 * 1024


def can_run(q: Tensor, v: Tensor) -> bool:
    """Whether there is a kernel for these, and something here that runs it: a GPU, or Triton's interpreter."""
    widths = (q.shape[2], v.shape[2])
    return (
        hstu_kernels.available()
        and q.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and min(widths) >= 1
        and max(widths) * q.element_size() <= _WIDEST
        and (q.is_cuda or hstu_kernels.interpreted())
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, position_bias: Tensor | None, time_bias: Tensor | None, jagged: Jagged
) -> tuple[Tensor, Tensor | None]:
    """The output (T, H, D_v), and for a softmax the (T, H) float32 logarithms of what it divided by."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    out = q.new_empty(v.shape)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32) if jagged.softmax else None
    tile = ATTEND[_width(q, v), position_bias is not None or time_bias is not None]
    blocks, grid = _grid(q, jagged, tile)
    if grid:
        with torch.cuda.device_of(q):
            hstu_kernels.attend[(grid,)](
                *(q, k, v, *_tables(q, position_bias, time_bias, jagged), out, out if lse is None else lse),
                *(*_strides(q, k, v), q.shape[1], blocks, *_sizes(time_bias, q, jagged)),
                **_constants(q, v, position_bias, time_bias, jagged),
                **_launch(tile),
            )
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
    """Gradients of q, k, v, and of the two tables where `wanted`; arguments as `hstu_chunks.backward`'s."""
    grad, q, k, v = _rows(grad), _rows(q), _rows(k), _rows(v)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    key = (_width(q, v), position_bias is not None or time_bias is not None)
    heads = q.shape[1]
    along = None if out is None else (out.float() * grad.float()).sum(-1)
    given = (
        *(q, k, v, *_tables(q, position_bias, time_bias, jagged), grad),
        *((q, q) if lse is None or along is None else (lse, along)),
    )
    strides = (*_strides(q, k, v, grad), heads)
    sizes = _sizes(time_bias, q, jagged)
    constants = _constants(q, v, position_bias, time_bias, jagged)
    with torch.cuda.device_of(q):
        for kernel, tile, results in (
            (hstu_gradient_kernels.query_gradients, QUERY_GRADIENTS[key], (dq,)),
            (hstu_gradient_kernels.key_gradients, KEY_GRADIENTS[key], (dk, dv)),
        ):
            blocks, grid = _grid(q, jagged, tile)
            if grid:
                kernel[(grid,)](*given, *results, *strides, blocks, *sizes, **constants, **_launch(tile))
    want = (position_bias is not None and wanted[0], time_bias is not None and wanted[1])
    if not any(want):
        return dq, dk, dv, None, None
    tile, sequences = BIAS_GRADIENTS[key], len(jagged.offsets) - 1
    diagonals = -(-jagged.max_length // tile.kept)
    # Sequences are shared out first; where there are few of them, the blocks of each diagonal are too.
    parts = max(1, min(sequences, BIAS_PROGRAMS // diagonals))
    pieces = max(1, min(diagonals, BIAS_PROGRAMS // (diagonals * parts)))
    num_buckets = 0 if time_bias is None else len(time_bias)
    buckets_block = _power(num_buckets)
    by_place = q.new_empty((parts * pieces, diagonals, tile.kept, tile.kept) if want[0] else 1, dtype=torch.float32)
    by_bucket = q.new_empty((parts * pieces * diagonals, buckets_block) if want[1] else 1, dtype=torch.float32)
    with torch.cuda.device_of(q):
        hstu_bias_kernel.bias_gradients[(diagonals, parts, pieces)](
            *(*given, by_place, by_bucket, *strides, sequences, *sizes),
            SIDE=tile.kept,
            BUCKETS_BLOCK=buckets_block,
            WANT_POSITION=want[0],
            WANT_TIME=want[1],
            **constants,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    dposition = dtime = None
    if want[0] and position_bias is not None:
        dposition = _by_distance(by_place.sum(0))[: jagged.max_length].to(position_bias.dtype)
    if want[1] and time_bias is not None:
        dtime = by_bucket.sum(0)[:num_buckets].to(time_bias.dtype)
    return dq, dk, dv, dposition, dtime


def _by_distance(blocks: Tensor) -> Tensor:
    """Sums by distance: blocks[d, i, j] (E, S, S) is of distance d S + i - j; (E S,) from distance 0 on.

    >>> _by_distance(torch.tensor([[[1.0, 0.0], [2.0, 3.0]], [[4.0, 5.0], [6.0, 7.0]]]))
    tensor([ 4.,  7., 11.,  6.])
    """
    diagonals, side, _ = blocks.shape
    # Turned round, entry j of line i lies on anti-diagonal i + j. Written in lines of 2 S, read in lines of 2 S - 1,
    # each of these is one column.
    turned = torch.nn.functional.pad(blocks.flip(2), (0, side))
    skewed = turned.flatten(1)[:, :-side].unflatten(1, (side, 2 * side - 1)).sum(1)  # distance d S - S + 1 + column
    halves = torch.nn.functional.pad(skewed, (1, 0)).unflatten(1, (2, side))
    sums = blocks.new_zeros((diagonals + 1, side))
    sums[:-1] += halves[:, 0]
    sums[1:] += halves[:, 1]
    return sums[1:].flatten()


def _rows(flat: Tensor) -> Tensor:
    """(T, H, D) with each row of D in one piece."""
    return flat if flat.stride(2) == 1 else flat.contiguous()


def _power(number: int) -> int:
    """The least power of two that is not below `number`, and not below 16, the least that tl.dot multiplies."""
    return max(16, 1 << max(0, number - 1).bit_length())


def _width(q: Tensor, v: Tensor) -> int:
    """0, 1 or 2, the smallest tiles: a head's width, padded to a power of two, is up to 64, up to 128, or more.

    It is 2 for float32, whose products are computed in three parts, and on GPUs with little shared memory.
    """
    if q.element_size() > 2:
        return 2
    if q.is_cuda:
        device = torch.cuda.get_device_properties(q.device)
        if getattr(device, "shared_memory_per_block_optin", device.shared_memory_per_block) < _SHARED:
            return 2
    padded = _power(max(q.shape[2], v.shape[2]))
    return 0 if padded <= 64 else 1 if padded <= 128 else 2


def _grid(q: Tensor, jagged: Jagged, tile: Tile) -> tuple[int, int]:
    """Blocks of the longest sequence that there may be, and programs in all."""
    blocks = -(-jagged.max_length // tile.kept)
    return blocks, blocks * q.shape[1] * (len(jagged.offsets) - 1)


def _tables(
    q: Tensor, position_bias: Tensor | None, time_bias: Tensor | None, jagged: Jagged
) -> tuple[Tensor | None, ...]:
    """Tables, starts of buckets, offsets and times; where there is none, something in its place, which is not read."""
    starts = q if time_bias is None else bucket_starts(len(time_bias) - 2, q.device)
    return (
        q if position_bias is None else position_bias.contiguous(),
        q if time_bias is None else time_bias.contiguous(),
        *(starts, jagged.offsets),
        q if jagged.timestamps is None else jagged.timestamps.contiguous(),
        q if jagged.query_timestamps is None else jagged.query_timestamps.contiguous(),
    )


def _strides(*flats: Tensor) -> tuple[int, ...]:
    """Of each, over items and over heads."""
    return tuple(stride for flat in flats for stride in flat.stride()[:2])


def _sizes(time_bias: Tensor | None, q: Tensor, jagged: Jagged) -> tuple[float, ...]:
    """The greatest length, starts of buckets, the last bucket of a known time, and 1 / n."""
    last = 0 if time_bias is None else len(time_bias) - 2
    num_starts = 0 if time_bias is None else len(bucket_starts(last, q.device))
    return jagged.max_length, num_starts, last, 1.0 / jagged.max_length


def _constants(
    q: Tensor, v: Tensor, position_bias: Tensor | None, time_bias: Tensor | None, jagged: Jagged
) -> dict[str, Any]:
    """What all kernels are compiled for."""
    return {
        "QK": q.shape[2],
        "VALUE": v.shape[2],
        "QK_BLOCK": _power(q.shape[2]),
        "VALUE_BLOCK": _power(v.shape[2]),
        "POSITION": position_bias is not None,
        "TIME": time_bias is not None,
        "BY_LENGTH": jagged.by_length,
        "SOFTMAX": jagged.softmax,
        "PRECISION": "tf32x3",  # of float32 alone: three products of halves, as exact as one in float32
        "PER_LOG": 1.0 / float(BUCKET_WIDTH),
        "UNKNOWN": UNKNOWN_TIME,
    }


def _launch(tile: Tile) -> dict[str, int]:
    """The tile as the kernels of `hstu_kernels` take it."""
    return {"KEPT": tile.kept, "PASSING": tile.passing, "num_warps": tile.warps, "num_stages": tile.stages}
