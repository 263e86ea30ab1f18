"""The Triton kernels of HSTU's attention against its definition; `test_triton.py` runs this in a process of its own.

As with `in_triton.py`: on a GPU, or interpreted, or compiled alone.
"""

# Triton writes what is constant in a kernel in capitals.
# ruff: noqa: N803

import itertools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from random_sequences import random_sequences
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.backbones.relative_bias import bucket_starts, time_buckets
from llmrec.exceptions import BackboneError
from llmrec.kernels import hstu_bias_kernel, hstu_gradient_kernels, hstu_kernels, hstu_launch
from llmrec.kernels.hstu_attention import hstu_attention
from llmrec.kernels.hstu_launch import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = hstu_kernels.interpreted()
compiled_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter stands in the kernels' place")
run_only = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="nothing runs these kernels here")
WAYS = [("max_length", "silu"), ("length", "silu"), ("max_length", "softmax")]
# Kept and passing blocks of different sizes, either way round.
SMALL = [(Tile(32, 16, 4, 1), Tile(16, 32, 4, 1)), (Tile(16, 32, 4, 1), Tile(32, 16, 4, 1))]

if INTERPRETED:
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiplied = InterpreterBuilder.create_dot

    def widened(self, *arguments):
        """The interpreter keeps bfloat16 as the bits of an integer, and would multiply these integers."""
        operands = [
            TensorHandle((part.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
            if part.dtype.scalar == tl.bfloat16
            else part
            for part in arguments[:2]
        ]
        return multiplied(self, *operands, *arguments[2:])

    InterpreterBuilder.create_dot = widened


def small_tiles(monkeypatch, which):
    first, second = SMALL[which]
    monkeypatch.setattr(hstu_launch, "ATTEND", dict.fromkeys(hstu_launch.ATTEND, first))
    monkeypatch.setattr(hstu_launch, "QUERY_GRADIENTS", dict.fromkeys(hstu_launch.QUERY_GRADIENTS, second))
    monkeypatch.setattr(hstu_launch, "KEY_GRADIENTS", dict.fromkeys(hstu_launch.KEY_GRADIENTS, second))
    monkeypatch.setattr(hstu_launch, "BIAS_GRADIENTS", {key: Tile(16, 16, 4, 1) for key in hstu_launch.BIAS_GRADIENTS})


def assert_close(found, expected, dtype):
    """Up to some roundings of the operands of a product, by the size of what was added up."""
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        if one.numel():
            bound = (40 if dtype == torch.float32 else 8) * torch.finfo(dtype).eps * (1 + other.abs().max())
            assert (one.double() - other.double()).abs().max() <= bound


@run_only
@pytest.mark.parametrize(
    ("dtype", "way", "bias"),
    [
        *itertools.product(["float32"], range(3), ["none", "position", "time", "both"]),
        *itertools.product(["bfloat16"], range(3), ["none", "both"]),
        ("float16", 0, "both"),
    ],
)
def test_kernels_are_the_definition_forwards_and_backwards(dtype, way, bias, monkeypatch):
    small_tiles(monkeypatch, way % 2)
    dtype = getattr(torch, dtype)
    case = random_sequences(
        way + 3,
        [3, 0, 37, 1, 50] if dtype == torch.float32 else [1, 0, 37],
        widths=[(5, 20), (16, 16), (33, 4)][way],
        dtype=dtype,
        position=bias in ("position", "both"),
        time=bias in ("time", "both"),
        normalize_by=WAYS[way][0],
        score=WAYS[way][1],
    ).to(DEVICE)
    assert_close(case.by(hstu_attention, implementation="triton"), case.exact(), dtype)


@run_only
@pytest.mark.parametrize("programs", [1, 7, 10_000])
def test_gradients_of_the_bias_however_they_are_shared_out(programs, monkeypatch):
    small_tiles(monkeypatch, 0)
    monkeypatch.setattr(hstu_launch, "BIAS_PROGRAMS", programs)
    case = random_sequences(9, [40, 2, 0, 55], dtype=torch.float32, spare=20).to(DEVICE)
    assert_close(case.by(hstu_attention, implementation="triton"), case.exact(), torch.float32)


@run_only
@pytest.mark.parametrize("frozen", ["position_bias", "time_bias"])
def test_one_of_two_tables_is_frozen(frozen, monkeypatch):
    small_tiles(monkeypatch, 1)
    case = random_sequences(2, [20, 33], dtype=torch.float32).to(DEVICE)
    expected = case.exact()[4 if frozen == "time_bias" else 5]
    getattr(case, frozen).requires_grad_(False)
    hstu_attention(*case.arguments(), implementation="triton").backward(case.grad)
    assert getattr(case, frozen).grad is None
    learnt = case.position_bias if frozen == "time_bias" else case.time_bias
    assert_close([learnt.grad], [expected], torch.float32)


@run_only
def test_heads_that_are_too_wide_are_left_to_torch():
    case = random_sequences(1, [3, 4], widths=(129, 4), dtype=torch.float32).to(DEVICE)
    assert_close(case.by(hstu_attention), case.exact(), torch.float32)
    with pytest.raises(BackboneError, match="in widths 129 and 4"):
        hstu_attention(*case.arguments(), implementation="triton")


@run_only
def test_the_sizes_that_are_used():
    case = random_sequences(1, [150, 70], widths=(24, 24), heads=1, dtype=torch.float32).to(DEVICE)
    assert_close(case.by(hstu_attention, implementation="triton"), case.exact(), torch.float32)


@run_only
def test_parts_of_one_tensor_and_an_expanded_gradient(monkeypatch):
    small_tiles(monkeypatch, 0)
    case = random_sequences(2, [25, 8], widths=(4, 4), dtype=torch.float32).to(DEVICE)
    whole = torch.cat([part.detach().flatten(1) for part in (case.q, case.k, case.v)], 1).requires_grad_()
    parts = [part.unflatten(1, (2, 4)) for part in whole.split(8, 1)]
    hstu_attention(*parts, *case.arguments()[3:], implementation="triton").sum().backward()
    case.grad = torch.ones_like(case.grad)
    expected = torch.cat([part.flatten(1) for part in case.exact()[1:4]], 1)
    assert_close([whole.grad], [expected], torch.float32)


@run_only
@pytest.mark.parametrize("lengths", [[0], [0, 1, 0], [1, 1]])
@pytest.mark.parametrize("score", ["silu", "softmax"])
def test_empty_sequences(lengths, score, monkeypatch):
    small_tiles(monkeypatch, 0)
    case = random_sequences(0, lengths, dtype=torch.float32, score=score).to(DEVICE)
    assert_close(case.by(hstu_attention, implementation="triton"), case.exact(), torch.float32)


@run_only
def test_great_scores_and_biases_do_not_overflow(monkeypatch):
    small_tiles(monkeypatch, 0)
    for score in ("silu", "softmax"):
        case = random_sequences(8, [6, 21], dtype=torch.float32, score=score).to(DEVICE)
        with torch.no_grad():
            case.q.mul_(1e4)
            case.position_bias.add_(1e3)
        found = case.by(hstu_attention, implementation="triton")
        assert all(torch.isfinite(part).all() for part in found)


@triton.jit
def _bucket_of_each(queries, keys, starts, out, count, num_starts, last, BLOCK: tl.constexpr, UNKNOWN: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    asked = tl.load(queries + place, mask=place < count, other=0)
    known = tl.load(keys + place, mask=place < count, other=0)
    bucket = hstu_kernels.time_bucket(asked, known, starts, num_starts, last, 1 / 0.301, UNKNOWN)
    tl.store(out + place, bucket.to(tl.int64), mask=place < count)


@run_only
@pytest.mark.parametrize("last", [128, 70, 5])
def test_buckets_of_time_to_the_second(last):
    starts = bucket_starts(128, torch.device("cpu"))
    elapsed = torch.cat([starts - 1, starts, starts[:-1] + 1, torch.tensor([0, 1, 2, 3, UNKNOWN_TIME])]).to(DEVICE)
    starts = bucket_starts(last, torch.device(DEVICE))
    begin = torch.arange(len(elapsed), device=DEVICE) * 1000
    # Beside the greatest starts there is no room for another time than 0.
    begin = torch.where((elapsed.abs() > 2**60) | (elapsed == UNKNOWN_TIME), 0, begin)
    for queries, keys in ((begin, begin + elapsed), (begin + elapsed, begin)):
        found = torch.empty_like(elapsed)
        sizes = (len(elapsed), len(starts), last)
        _bucket_of_each[(4,)](queries, keys, starts, found, *sizes, BLOCK=128, UNKNOWN=UNKNOWN_TIME)
        assert found.tolist() == time_buckets(queries, keys, last).tolist()
    assert found.unique().tolist()[-1] == last + 1


@run_only
def test_results_repeat_to_the_bit():
    case = random_sequences(4, [70, 0, 41], widths=(16, 16), heads=1, dtype=torch.bfloat16).to(DEVICE)
    first, second = (case.by(hstu_attention, implementation="triton") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


TYPES = {
    **dict.fromkeys(("position_bias", "time_bias", "lse", "along", "by_place", "by_bucket"), "*fp32"),
    **dict.fromkeys(("starts", "offsets", "timestamps", "query_timestamps"), "*i64"),
    **dict.fromkeys(("q", "k", "v", "grad", "out", "dq", "dk", "dv"), "*bf16"),
    "inverse_length": "fp32",
}
COMPILED = {
    "attend": (hstu_kernels.attend, "ATTEND"),
    "query_gradients": (hstu_gradient_kernels.query_gradients, "QUERY_GRADIENTS"),
    "key_gradients": (hstu_gradient_kernels.key_gradients, "KEY_GRADIENTS"),
    "bias_gradients": (hstu_bias_kernel.bias_gradients, "BIAS_GRADIENTS"),
}


@compiled_only
@pytest.mark.parametrize(
    ("size", "dtype", "width", "biased", "shared"),
    [
        (0, "bf16", 64, False, 160),
        (0, "bf16", 64, True, 160),
        (1, "bf16", 128, True, 160),
        (2, "bf16", 256, True, 99),
        (2, "fp32", 128, True, 99),
    ],
)
@pytest.mark.parametrize("name", list(COMPILED))
def test_kernels_compile(name, size, dtype, width, biased, shared):
    """For an H100; and no program asks for more shared memory, in kB, than the GPUs have that get these tiles."""
    kernel, tiles = COMPILED[name]
    if name == "bias_gradients" and not biased:
        pytest.skip("there is no bias")
    tile = getattr(hstu_launch, tiles)[size, biased]
    widths = ("QK", "VALUE", "QK_BLOCK", "VALUE_BLOCK")
    constants = {**dict.fromkeys(widths, width), "POSITION": biased, "TIME": biased}
    constants |= {"BY_LENGTH": False, "SOFTMAX": False, "PRECISION": "tf32x3", "PER_LOG": 3.3, "UNKNOWN": UNKNOWN_TIME}
    if name == "bias_gradients":
        constants |= {"SIDE": tile.kept, "BUCKETS_BLOCK": 256, "WANT_POSITION": True, "WANT_TIME": True}
    else:
        constants |= {"KEPT": tile.kept, "PASSING": tile.passing}
    names = [parameter.name for parameter in kernel.params]
    signature = {
        part: "constexpr" if part in constants else TYPES.get(part, "i32").replace("bf16", dtype) for part in names
    }
    aligned = {(place,): [["tt.divisibility", 16]] for place, part in enumerate(names) if signature[part][0] == "*"}
    source = ASTSource(kernel, signature, {(names.index(part),): value for part, value in constants.items()}, aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= shared * 1024
