"""Entropies: golden values, and the definitions by brute force on random sequences."""

import math
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.data.entropy import (
    _looked_up,
    _walked,
    approximate_entropy,
    dictionary_entropy,
    entropies,
    longest_earlier_matches,
    real_entropy,
    shannon_entropy,
)

SEQUENCES = st.lists(st.integers(0, 3), min_size=0, max_size=40) | st.lists(st.integers(-2, 20), max_size=60)


def occurs(run: Sequence[int], within: Sequence[int]) -> bool:
    return any(list(within[i : i + len(run)]) == list(run) for i in range(len(within) - len(run) + 1))


def matches_by_definition(tokens: Sequence[int]) -> list[int]:
    return [
        max(length for length in range(len(tokens) - j + 1) if occurs(tokens[j : j + length], tokens[:j]))
        for j in range(len(tokens))
    ]


def dictionary_by_definition(tokens: Sequence[int]) -> float:
    seen: set[tuple[int, ...]] = set()
    total = 0
    for start in range(len(tokens)):
        for end in range(start + 1, len(tokens) + 1):
            run = tuple(tokens[start:end])
            if run not in seen:
                seen.add(run)
                total += len(run)
                break
        else:
            total += len(tokens) - start + 1
    return len(tokens) * math.log(len(tokens)) / total


def approximate_by_definition(tokens: Sequence[int], m: int) -> float:
    def phi(length: int) -> float:
        windows = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
        return sum(math.log(sum(a == b for b in windows) / len(windows)) for a in windows) / len(windows)

    return abs(phi(m) - phi(m + 1))


def test_golden_values() -> None:
    """Published and hand-computed figures: [1, 2] * 10 has 1 + 1 + 3 + 3 + ... + 9 + 9 + 11 + 10 + ... + 2 = 115."""
    assert real_entropy(np.array([1, 2] * 10)) == pytest.approx(20 * math.log(20) / 115)
    assert real_entropy(np.array([1, 2] * 10)) == pytest.approx(0.521, abs=5e-4)
    assert real_entropy(np.array([1, 2, 1, 2, 3])) == pytest.approx(1.0059, abs=5e-5)
    assert dictionary_entropy(np.array([1, 2] * 10)) == pytest.approx(0.722, abs=5e-4)
    assert dictionary_entropy(np.array([1, 2, 1, 2, 3])) == pytest.approx(1.1496, abs=5e-5)
    assert approximate_entropy(np.array([85, 80, 89] * 17), 2) == pytest.approx(1.0996541105257052e-05, rel=1e-9)
    assert shannon_entropy(np.array([7, 7, 7, 1])) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


@settings(max_examples=400, deadline=None)
@given(SEQUENCES)
def test_matches_are_those_of_the_definition(tokens: list[int]) -> None:
    assert longest_earlier_matches(np.array(tokens, dtype=np.int64)).tolist() == matches_by_definition(tokens)


@pytest.mark.parametrize(
    "tokens",
    [
        [0] * 50,
        [0, 1] * 25,
        [0, 0, 1] * 15,
        list(range(30)) + list(range(30)),
        list(range(20)) * 3 + [0],
        [int(bit) for number in range(24) for bit in f"{number:b}"],
        [int(bit) for bit in "0100101001001010010100100101001001"],
    ],
)
def test_matches_in_periodic_and_nested_sequences(tokens: list[int]) -> None:
    assert longest_earlier_matches(np.array(tokens)).tolist() == matches_by_definition(tokens)


@settings(max_examples=200, deadline=None)
@given(SEQUENCES.filter(lambda tokens: len(tokens) > 1))
def test_the_dictionary_variant_is_that_of_the_definition(tokens: list[int]) -> None:
    assert dictionary_entropy(np.array(tokens)) == pytest.approx(dictionary_by_definition(tokens))


@settings(max_examples=200, deadline=None)
@given(SEQUENCES, st.integers(0, 4))
def test_approximate_entropy_is_that_of_the_definition(tokens: list[int], m: int) -> None:
    if len(tokens) < m + 1:
        assert approximate_entropy(np.array(tokens, dtype=np.int64), m) == 0
    else:
        assert approximate_entropy(np.array(tokens), m) == pytest.approx(
            approximate_by_definition(tokens, m), abs=1e-12
        )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=60), st.randoms(use_true_random=False))
def test_how_items_are_numbered_does_not_matter(tokens: list[int], random: object) -> None:
    names = [900, 3, -70, 12, 5000, 41]
    random.shuffle(names)  # type: ignore[attr-defined]
    renamed = np.array([names[token] for token in tokens])
    for figure in (shannon_entropy, approximate_entropy, real_entropy, dictionary_entropy):
        assert figure(renamed) == pytest.approx(figure(np.array(tokens)), abs=1e-12)


def test_a_user_without_repeats_has_an_approximate_entropy_of_the_length_alone() -> None:
    assert approximate_entropy(np.arange(25), 2) == pytest.approx(math.log(24 / 23))


def test_coin_tosses_have_nearly_the_entropy_of_a_coin() -> None:
    tosses = np.random.default_rng(3).integers(0, 2, 60_000)
    assert real_entropy(tosses) == pytest.approx(math.log(2), rel=0.06)
    assert approximate_entropy(tosses, 2) == pytest.approx(math.log(2), rel=1e-3)
    assert shannon_entropy(tosses) == pytest.approx(math.log(2), rel=1e-3)


def test_short_sequences() -> None:
    empty, one = np.zeros(0, dtype=np.int64), np.array([4])
    for figure in (shannon_entropy, approximate_entropy, real_entropy, dictionary_entropy):
        assert figure(empty) == 0
        assert figure(one) == 0
    assert longest_earlier_matches(empty).tolist() == []
    assert longest_earlier_matches(one).tolist() == [0]


def test_long_sequences_take_no_long_time_even_periodic_ones() -> None:
    start = time.perf_counter()
    assert longest_earlier_matches(np.arange(100_000) % 2)[60_000] == 40_000
    assert longest_earlier_matches(np.random.default_rng(0).integers(0, 3000, 100_000)).max() < 20
    assert time.perf_counter() - start < 8


@settings(max_examples=200, deadline=None)
@given(SEQUENCES | st.lists(st.integers(0, 1), max_size=200) | st.integers(0, 150).map(lambda n: [0, 1, 0, 2] * n))
def test_runs_looked_up_whole_are_those_that_are_walked(tokens: list[int]) -> None:
    if len(tokens) > 1:
        numbers = np.unique(tokens, return_inverse=True)[1].astype(np.int64)
        assert _looked_up(numbers) == _walked(numbers, len(tokens) ** 2 + 1)


@pytest.mark.parametrize("period", [1, 7, 30])
def test_the_dictionary_variant_takes_no_long_time_where_a_log_repeats_itself(period: int) -> None:
    start = time.process_time()
    found = dictionary_entropy(np.tile(np.arange(period), 80_000 // period))
    assert time.process_time() - start < 6
    assert 0 < found < 0.2


def test_figures_of_a_log() -> None:
    rows = np.array([9, 1, 2, 1, 2, 9, 3, 9], dtype=np.int32)
    starts, ends = np.array([1, 4, 6, 6]), np.array([3, 4, 6, 7])
    figures = entropies(rows, starts, ends)
    assert (figures["users"], figures["tokens"], figures["tokens_in_all"]) == (2, 3, 3)
    tokens = np.array([1, 2, 3])
    assert figures["real"] == real_entropy(tokens)
    assert figures["quality"] == pytest.approx(1 / real_entropy(tokens))
    assert figures["effective_data"] == pytest.approx(3 / real_entropy(tokens))
    assert figures["dictionary_quality"] == pytest.approx(1 / dictionary_entropy(tokens))
    assert figures["approximate_m1"] == approximate_entropy(tokens, 1)
    assert entropies(rows, starts, starts)["quality"] is None


def test_a_large_log_is_a_seeded_sample_of_whole_users() -> None:
    generator = np.random.default_rng(5)
    lengths = generator.integers(1, 9, 400)
    ends = np.cumsum(lengths)
    rows = np.repeat(np.arange(400), lengths)  # a user's number is his item
    first = entropies(rows, ends - lengths, ends, seed=1, max_tokens=500)
    assert first == entropies(rows, ends - lengths, ends, seed=1, max_tokens=500)
    assert first != entropies(rows, ends - lengths, ends, seed=2, max_tokens=500)
    assert first["tokens_in_all"] == len(rows)
    assert 492 <= first["tokens"] <= 500
    assert first["effective_data"] == pytest.approx(len(rows) * first["quality"])
    # Whole users: each brings one item, and no item comes twice but beside itself.
    assert math.exp(first["shannon"]) <= first["users"] + 1e-9
    assert entropies(rows, ends - lengths, ends, max_tokens=len(rows))["users"] == 400
