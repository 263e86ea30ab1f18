"""One level's selection over static shapes, against its definition with Python lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_levels import random_case, same, selection_by_definition

from llmrec.exceptions import CatalogError
from llmrec.kernels.select import Level, normalizer, pad_keys, places, select, select_padded


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 100_000),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    at_once=st.sampled_from([1, 7, 64, 1 << 22]),
)
def test_selection_is_its_definition_to_the_bit(seed, dtype, at_once):
    case = random_case(seed, dtype)
    assert same(select_padded(*case.arguments(), at_once=at_once), selection_by_definition(case))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 100_000), at_once=st.sampled_from([1, 50, 1 << 22]))
def test_probabilities_over_legal_children_alone(seed, at_once):
    case = random_case(seed, torch.float64, hostile=False)
    case.logits = torch.randn(case.logits.shape, dtype=torch.float64)  # distinct, so that rounding decides no tie
    case.score = torch.randn(case.score.shape, dtype=torch.float64)
    case.normal = None
    expected = selection_by_definition(random_like(case), over_legal=True)
    found = select_padded(*case.arguments(), at_once=at_once)
    assert torch.equal(found.node, expected.node)
    assert torch.allclose(found.score, expected.score, atol=1e-12)
    assert torch.allclose(found.gain, expected.gain, atol=1e-12)


def random_like(case):
    """The case with normalisers that nothing may look at."""
    copy = type(case)(**vars(case))
    copy.normal = torch.full(case.score.shape, torch.nan, dtype=case.score.dtype)
    return copy


def test_equal_scores_go_to_the_lower_node_and_signed_zeros_are_equal():
    level = Level.of(torch.tensor([0, 2, 4], dtype=torch.int32), torch.tensor([0, 1, 0, 1], dtype=torch.int32))
    logits = torch.tensor([[[-0.0, 0.0], [0.0, -0.0]]])
    found = select(level, logits, torch.tensor([[-0.0, -0.0]]), torch.tensor([[0, 1]]), 2, torch.zeros(1, 2))
    assert found.node.tolist() == [[0, 1]]
    assert found.parent.tolist() == [[0, 0]]


def test_a_level_without_children_leaves_dead_places():
    level = Level.of(torch.tensor([0, 0], dtype=torch.int32), torch.zeros(0, dtype=torch.int32))
    found = select(level, torch.zeros(2, 1, 3), torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.long), 2)
    assert found.node.tolist() == found.token.tolist() == [[0, 0], [0, 0]]
    assert torch.isinf(found.score).all()
    assert found.gain.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_the_last_node_may_have_no_children():
    level = Level.of(torch.tensor([0, 2, 2], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32))
    found = select(level, torch.zeros(1, 2, 3), torch.zeros(1, 2), torch.tensor([[0, 1]]), 4, torch.zeros(1, 2))
    assert found.node.tolist() == [[0, 1, 0, 0]]
    assert found.score.tolist() == [[0.0, 0.0, -torch.inf, -torch.inf]]


def test_normalisers_are_over_the_vocabulary_asked_for():
    logits = torch.randn(2, 3, 10)
    assert torch.equal(normalizer(logits, torch.float32), logits.logsumexp(-1))
    some = torch.tensor([1, 4, 7])
    assert torch.equal(normalizer(logits, torch.float32, some), logits[..., some].logsumexp(-1))
    half = logits.bfloat16()
    assert torch.equal(normalizer(half, torch.float32), half.float().logsumexp(-1))


def test_too_many_candidates_or_keys_are_refused():
    level = Level(torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), 2**30)
    with pytest.raises(CatalogError, match="3 beams with 1073741824 children"):
        select(level, torch.zeros(1, 3, 1), torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.long), 1)
    with pytest.raises(CatalogError, match="2 excluded nodes do not fit 1"):
        pad_keys(torch.tensor([1, 2]), 1)


def test_keys_get_powers_of_two_of_places():
    assert places([0, 1, 16, 17, 1000]) == [0, 16, 16, 32, 1024]
    assert all(place >= count for place, count in zip(places(range(300)), range(300), strict=True))
