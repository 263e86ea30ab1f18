"""HSTU's attention: the definition against sums written out, and the chunked way against the definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_sequences import random_sequences

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.exceptions import BackboneError
from llmrec.kernels import hstu_chunks, hstu_kernels
from llmrec.kernels.hstu_attention import hstu_attention, hstu_attention_reference

WAYS = [("max_length", "silu"), ("length", "silu"), ("max_length", "softmax")]


def same(found, expected, tolerance=1e-10):
    return len(found) == len(expected) and all(
        torch.allclose(one.double(), other.double(), atol=tolerance, rtol=tolerance)
        for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize(("normalize_by", "score"), WAYS)
def test_the_definition_is_the_sums_of_equation_2(normalize_by, score):
    case = random_sequences(3, [3, 0, 1, 4], normalize_by=normalize_by, score=score)
    for part in case.learnt():
        part.requires_grad_(False)
    found = hstu_attention_reference(*case.arguments())
    for begin, end in zip(case.offsets[:-1].tolist(), case.offsets[1:].tolist(), strict=True):
        for place in range(end - begin):
            for head in range(2):
                scores = []
                for other in range(place + 1):
                    asked, known = case.query_timestamps[begin + place], case.timestamps[begin + other]
                    bucket = min(48, math.floor(math.log(max(1, abs(int(asked - known)))) / 0.301))
                    if UNKNOWN_TIME in (int(asked), int(known)):
                        bucket = 49
                    product = sum(
                        float(one * two)
                        for one, two in zip(case.q[begin + place, head], case.k[begin + other, head], strict=True)
                    )
                    scores.append(product + float(case.position_bias[place - other] + case.time_bias[bucket]))
                if score == "softmax":
                    total = sum(math.exp(value) for value in scores)
                    weights = [math.exp(value) / total for value in scores]
                else:
                    divisor = case.max_length if normalize_by == "max_length" else place + 1
                    weights = [value / (1 + math.exp(-value)) / divisor for value in scores]
                expected = sum(weight * case.v[begin + other, head] for other, weight in enumerate(weights))
                assert torch.allclose(found[begin + place, head], expected, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    way=st.sampled_from(WAYS),
    position=st.booleans(),
    time=st.booleans(),
    known=st.booleans(),
    asked=st.booleans(),
    at_once=st.sampled_from([1, 30, 200, 10_000]),
)
def test_chunked_is_the_definition_forwards_and_backwards(seed, way, position, time, known, asked, at_once):
    case = random_sequences(
        seed, position=position, time=time, known=known, asked=asked, normalize_by=way[0], score=way[1]
    )
    usual, hstu_chunks.SCORES = hstu_chunks.SCORES, at_once
    try:
        found = case.by(hstu_attention, implementation="chunked")
    finally:
        hstu_chunks.SCORES = usual
    assert same(found, case.exact())


def test_chunked_is_the_definition_in_the_sizes_that_are_used():
    case = random_sequences(0, [300, 129, 290, 128, 1, 64, 300])
    assert same(case.by(hstu_attention), case.exact())


@pytest.mark.parametrize("score", ["silu", "softmax"])
def test_never_more_scores_than_said(score, monkeypatch):
    held = []
    scores_of = hstu_chunks._scores

    def watched(*arguments):
        scores, buckets = scores_of(*arguments)
        held.append(scores.numel())
        return scores, buckets

    monkeypatch.setattr(hstu_chunks, "_scores", watched)
    monkeypatch.setattr(hstu_chunks, "SCORES", 3000)
    case = random_sequences(1, [150, 40, 40, 40, 7, 7, 7, 7, 7, 7], score=score)
    assert same(case.by(hstu_attention), case.exact())
    assert max(held) <= 3000
    assert len(held) < 80  # short ones are taken together
    held.clear()
    monkeypatch.setattr(hstu_chunks, "SCORES", 100)  # less than one query's
    assert same(case.by(hstu_attention), case.exact())
    assert max(held) == 2 * 150


def test_a_later_item_and_another_sequence_change_nothing():
    case = random_sequences(5, [6, 9])
    before = hstu_attention(*case.arguments())
    with torch.no_grad():
        for part in (case.q, case.k, case.v):
            part[4:6] += 1.0  # the end of the first
    case.timestamps[4:6] += 7
    after = hstu_attention(*case.arguments())
    assert torch.equal(before[:4], after[:4])
    assert torch.equal(before[6:], after[6:])
    assert not torch.allclose(before[4:6], after[4:6])


@pytest.mark.parametrize("lengths", [[0], [0, 0, 0], [1], [0, 1, 0]])
@pytest.mark.parametrize("score", ["silu", "softmax"])
def test_empty_sequences(lengths, score):
    case = random_sequences(0, lengths, score=score)
    found = case.by(hstu_attention)
    assert same(found, case.exact())
    assert all(torch.isfinite(part).all() for part in found)


def test_no_sequence_at_all():
    case = random_sequences(0, [])
    out = hstu_attention(*case.arguments())
    out.backward(case.grad)
    assert out.shape == (0, 2, 3)
    assert case.q.grad.shape == (0, 2, 5)
    assert not case.position_bias.grad.any()


def test_parts_of_one_tensor_and_an_expanded_gradient():
    case = random_sequences(2, [5, 8], widths=(4, 4))
    whole = torch.cat([part.detach().flatten(1) for part in (case.q, case.k, case.v)], 1).requires_grad_()
    parts = [part.unflatten(1, (2, 4)) for part in whole.split(8, 1)]
    hstu_attention(*parts, *case.arguments()[3:]).sum().backward()
    case.grad = torch.ones_like(case.grad)
    expected = torch.cat([part.flatten(1) for part in case.exact()[1:4]], 1)
    assert torch.allclose(whole.grad, expected)


def test_what_is_frozen_gets_no_gradient():
    case = random_sequences(4, [4, 7])
    exact = case.exact()
    case.position_bias.requires_grad_(False)
    case.k.requires_grad_(False)
    hstu_attention(*case.arguments()).backward(case.grad)
    assert case.position_bias.grad is None
    assert case.k.grad is None
    assert torch.allclose(case.time_bias.grad, exact[5])
    assert torch.allclose(case.q.grad, exact[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("score", ["silu", "softmax"])
def test_narrow_types_are_summed_in_float32(dtype, score):
    case = random_sequences(6, [40, 33], dtype=dtype, score=score)
    found, expected = case.by(hstu_attention), case.exact()
    assert [part.dtype for part in found] == [dtype] * 4 + [torch.float32] * 2
    for one, other in zip(found, expected, strict=True):
        # One rounding of the result; a softmax's gradients use the rounded output too.
        bound = 4 * torch.finfo(one.dtype).eps * (1 + other.abs().max())
        assert (one - other).abs().max() <= (bound if one.dtype == dtype else 100 * torch.finfo(dtype).eps)


def test_autocast_changes_nothing():
    case = random_sequences(7, [12, 5], dtype=torch.float32)
    expected = case.by(hstu_attention)
    with torch.autocast("cpu", torch.bfloat16):
        found = case.by(hstu_attention)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_great_scores_do_not_overflow():
    for score in ("silu", "softmax"):
        case = random_sequences(8, [6], dtype=torch.float32, score=score)
        with torch.no_grad():
            case.q *= 1e4
        assert all(torch.isfinite(part).all() for part in case.by(hstu_attention))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k": torch.zeros(9, 2, 4)}, "queries (9, 2, 5), keys (9, 2, 4)"),
        ({"v": torch.zeros(8, 2, 3)}, "values (8, 2, 3)"),
        ({"v": torch.zeros(9, 2, 3, dtype=torch.float32)}, "torch.float32"),
        ({"offsets": torch.tensor([0, 4, 9], dtype=torch.int32)}, "torch.int32"),
        ({"offsets": torch.tensor([0, 4, 8])}, "share out 9 items"),
        ({"offsets": torch.tensor([1, 4, 9])}, "share out 9 items"),
        ({"offsets": torch.tensor([0, 5, 4, 9])}, "share out 9 items"),
        ({"max_length": 4, "position_bias": None}, "sequences of up to 4"),
        ({"max_length": 0}, "greatest length of 0"),
        ({"position_bias": torch.zeros(6)}, "position_bias of HSTU's attention has shape (6,). Pass (7,)"),
        ({"time_bias": torch.zeros(2)}, "time_bias of HSTU's attention has shape (2,)"),
        ({"timestamps": torch.zeros(3, dtype=torch.int64)}, "timestamps of HSTU's attention has shape (3,)"),
        ({"query_timestamps": torch.zeros(9)}, "query_timestamps of HSTU's attention are torch.float32"),
        ({"score": "relu"}, "score of HSTU's attention cannot be 'relu'"),
        ({"normalize_by": "none"}, "normalize_by of HSTU's attention cannot be 'none'"),
    ],
)
def test_what_does_not_fit_is_refused(changes, said):
    case = random_sequences(0, [4, 5])
    assert case.max_length == 7
    for name, value in changes.items():
        setattr(case, name, value)
    with pytest.raises(BackboneError) as raised:
        hstu_attention(*case.arguments())
    assert said in str(raised.value)


def test_triton_is_refused_where_nothing_runs_it():
    case = random_sequences(0, [4, 5], dtype=torch.float32)
    if hstu_kernels.interpreted():
        pytest.skip("Triton's interpreter runs the kernels here")
    with pytest.raises(BackboneError, match="No Triton kernel"):
        hstu_attention(*case.arguments(), implementation="triton")
    with pytest.raises(BackboneError, match="'triton3'"):
        hstu_attention(*case.arguments(), implementation="triton3")
