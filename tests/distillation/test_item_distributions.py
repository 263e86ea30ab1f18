"""A language model's distributions over items, by their definition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_teachers import split_of

from llmrec.distillation.item_distributions import ItemDistributions, training_places
from llmrec.distillation.soft_targets import divergence
from llmrec.exceptions import DataError


@pytest.fixture(scope="module")
def split():
    return split_of()


def test_training_places_are_targets_with_a_history(split):
    places = training_places(split)
    begins, ends = split.offsets[:-1], split.train_ends
    expected = [place for begin, end in zip(begins, ends, strict=True) for place in range(begin + 1, end)]
    assert places.tolist() == expected
    some = training_places(split, 20, seed=3)
    assert some.tolist() == sorted(set(some.tolist()))
    assert len(some) == 20
    assert set(some.tolist()) <= set(expected)
    assert training_places(split, 20, seed=4).tolist() != some.tolist()


def test_items_that_may_not_be_recommended_have_none():
    live = np.array([True, True, False, True])
    table = ItemDistributions(np.array([7]), np.array([[1, -1]]), np.log(np.array([[0.4, 1e-30]])), live)
    got = table.at(torch.tensor([7]))[0].log_probabilities(0, 1, 1.0, torch.float64).exp()
    np.testing.assert_allclose(got[0].numpy(), [0.3, 0.4, 0.0, 0.3], atol=1e-6)


def test_interactions_without_one_are_told():
    table = ItemDistributions(np.array([3, 9]), np.array([[0], [1]]), np.zeros((2, 1), np.float32), np.ones(2, bool))
    _, there = table.at(torch.tensor([9, 4, 3, 12, 0]))
    assert there.tolist() == [True, False, True, False, False]
    found = table.at(torch.tensor([9, 4, 3]))[0].log_probabilities(0, 2, 1.0, torch.float64)
    assert found.argmax(1).tolist() == [1, 0]


def test_arrays_that_do_not_fit_and_unknown_rules_are_refused():
    places = np.arange(3)
    with pytest.raises(DataError, match="'popular'"):
        ItemDistributions(places, np.zeros((3, 1), int), np.zeros((3, 1)), np.ones(2, bool), "popular")
    with pytest.raises(DataError, match="ascending"):
        ItemDistributions(np.array([2, 1]), np.zeros((2, 1), int), np.zeros((2, 1)), np.ones(2, bool))


def test_a_uniform_rest_is_a_distribution_by_hand():
    table = ItemDistributions(
        np.array([0]), np.array([[2, 0]]), np.log(np.array([[0.5, 0.25]], dtype=np.float32)), np.ones(6, bool)
    )
    got = table.at(torch.tensor([0]))[0].log_probabilities(0, 1, 1.0, torch.float64)[0]
    expected = [0.25, 0.0625, 0.5, 0.0625, 0.0625, 0.0625]
    assert [round(math.exp(value), 6) for value in got.tolist()] == expected


@pytest.mark.parametrize("rest", ["uniform", "none"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_short_lists_and_retired_items_at_any_temperature_are_the_definition(rest, temperature):
    rng = np.random.default_rng(0)
    live = np.array([True] * 6 + [False])
    rows, scores = np.full((5, 6), -1), np.full((5, 6), -np.inf, np.float32)
    p = np.zeros((5, 7))
    for place, length in enumerate([1, 2, 3, 5, 6]):
        rows[place, :length] = rng.permutation(6)[:length]
        given = rng.dirichlet(np.ones(length)) * 0.9
        scores[place, :length] = np.log(given)
        if rest == "uniform":
            p[place, :6] = 0.1 / max(1, 6 - length)
        p[place, rows[place, :length]] = given
    table = ItemDistributions(np.arange(5), rows, scores, live, rest)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        got = table.at(torch.arange(5))[0].log_probabilities(0, 5, temperature, dtype)
        assert got.dtype == dtype
        expected = p ** (1 / temperature) / (p ** (1 / temperature)).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(got.exp().numpy(), expected, atol=tolerance)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    rest=st.sampled_from(["uniform", "none"]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    direction=st.sampled_from(["forward", "reverse"]),
)
def test_the_divergence_from_a_table_is_that_from_its_distribution_over_all_items(seed, rest, temperature, direction):
    rng = np.random.default_rng(seed)
    count, width, most = int(rng.integers(1, 6)), int(rng.integers(1, 6)), int(rng.integers(6, 12))
    live = rng.random(most) < 0.7
    live[rng.permutation(most)[:2]] = True
    names = np.flatnonzero(live)
    rows, scores = np.full((count, width), -1), np.full((count, width), -np.inf, np.float32)
    for place in range(count):
        length = int(rng.integers(1, min(width, len(names)) + 1))  # sometimes all that may be recommended
        rows[place, :length] = rng.permutation(names)[:length]
        scores[place, :length] = np.log(rng.dirichlet(np.ones(length)) * rng.choice([0.3, 1.0]))
    teaching, _ = ItemDistributions(np.arange(count), rows, scores, live, rest).at(torch.arange(count))
    own = torch.from_numpy(rng.normal(size=(count, most)) * 3).log_softmax(dim=-1)
    begin = int(rng.integers(count))
    other = teaching.log_probabilities(0, count, temperature, torch.float64)[begin:]
    expected = divergence(own[begin:], other, direction)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        got = teaching.divergence(own[begin:].to(dtype, copy=True), begin, count, temperature, direction)
        for mine, theirs in zip(got, expected, strict=True):
            assert mine.dtype == dtype
            np.testing.assert_allclose(mine.numpy(), theirs.numpy(), rtol=tolerance, atol=tolerance)


def test_a_student_that_says_what_its_table_says_has_nothing_to_learn():
    live = np.array([True, True, False, True, True])
    table = ItemDistributions(np.array([0]), np.array([[3, 0, -1]]), np.log(np.array([[0.6, 0.1, 0.0]]) + 1e-30), live)
    teaching = table.at(torch.tensor([0]))[0]
    own = torch.tensor([[0.1, 0.15, 1e-300, 0.6, 0.15]], dtype=torch.float64).log()
    each, slope = teaching.divergence(own, 0, 1, 1.0, "forward")
    assert abs(each.item()) < 1e-7
    assert slope.abs().max() < 1e-7


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_autocast_leaves_the_divergence_over_a_large_catalog_as_it_is(half):
    count = 20_000  # Σ log q is beyond what float16 holds
    rows, scores = np.arange(5)[None], np.log(np.full((1, 5), 0.1, np.float32))
    teaching = ItemDistributions(np.array([0]), rows, scores, np.ones(count, bool)).at(torch.tensor([0]))[0]
    own = torch.randn(1, count, generator=torch.Generator().manual_seed(0)).log_softmax(dim=-1)
    expected = divergence(own, teaching.log_probabilities(0, 1, 1.0, torch.float32), "forward")
    with torch.autocast("cpu", half):
        found = teaching.divergence(own.clone(), 0, 1, 1.0, "forward")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
