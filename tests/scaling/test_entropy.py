"""Entropies: golden values, and the definitions by brute force on random sequences."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.scaling.entropy import (
    _by_first_occurrence,
    _dense,
    approximate_entropy,
    compression,
    dictionary_entropy,
    entropies,
    longest_earlier_matches,
    real_entropy,
    shannon_entropy,
    users_approximate_entropy,
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
@given(st.lists(st.integers(0, 5), min_size=2, max_size=60), st.permutations([900, 3, -70, 12, 5000, 41]))
def test_how_items_are_numbered_does_not_matter(tokens: list[int], names: list[int]) -> None:
    renamed = np.array([names[token] for token in tokens])
    assert compression(renamed) == compression(np.array(tokens))
    figures: tuple[Callable[[Any], float], ...] = (shannon_entropy, approximate_entropy, real_entropy)
    for figure in (*figures, dictionary_entropy):
        assert figure(renamed) == pytest.approx(figure(np.array(tokens)), abs=1e-12)


def approximate_by_distance(tokens: Sequence[int], m: int, r: float) -> float:
    """As published code has it: windows are alike if no two of their item numbers lie further apart than r."""

    def phi(length: int) -> float:
        windows = [tokens[i : i + length] for i in range(len(tokens) - length + 1)]
        alike = [sum(max(abs(x - y) for x, y in zip(a, b, strict=True)) <= r for b in windows) for a in windows]
        return sum(math.log(count / len(windows)) for count in alike) / len(windows)

    return abs(phi(m) - phi(m + 1))


def test_a_distance_between_item_numbers_measures_the_numbering() -> None:
    """The published golden value has r = 3 but no two items so close; where there are, it is another figure."""
    golden = 1.0996541105257052e-05
    assert approximate_by_distance([85, 80, 89] * 17, 2, 3) == pytest.approx(golden, rel=1e-6)
    assert approximate_entropy(np.array([85, 80, 89] * 17), 2) == pytest.approx(golden, rel=1e-6)
    tokens = np.random.default_rng(0).integers(0, 6, 80)
    apart = tokens * 10
    assert approximate_by_distance(tokens.tolist(), 1, 1) < 0.8 * approximate_by_distance(apart.tolist(), 1, 1)
    assert approximate_entropy(tokens, 1) == approximate_entropy(apart, 1)
    assert approximate_entropy(tokens, 1) == pytest.approx(approximate_by_distance(tokens.tolist(), 1, 0))


LOGS = st.lists(st.lists(st.integers(0, 4), max_size=9), min_size=1, max_size=12)


def in_rows(log: Sequence[Sequence[int]]) -> tuple[Any, Any, Any]:
    """Item numbers with a gap before every user, and where users begin and end."""
    rows = np.array([item for user in log for item in [99, *user]])
    ends = np.cumsum([len(user) + 1 for user in log])
    return rows, ends - [len(user) for user in log], ends


@settings(max_examples=300, deadline=None)
@given(LOGS, st.integers(1, 3))
def test_the_users_mean_is_that_of_every_user_alone(log: list[list[int]], m: int) -> None:
    found = users_approximate_entropy(*in_rows(log), m)
    asked = [user for user in log if len(user) > m]
    assert (found["m"], found["users"]) == (m, len(asked))
    if not asked:
        assert found["mean"] is found["length_only_share"] is found["length_only_mean"] is found["warning"] is None
        return
    expected = np.mean([approximate_by_definition(user, m) for user in asked])
    assert found["mean"] == pytest.approx(expected, abs=1e-12)
    grams = [Counter(tuple(user[i : i + m]) for i in range(len(user) - m + 1)) for user in asked]
    share = np.mean([max(counts.values()) == 1 for counts in grams])
    assert found["length_only_share"] == pytest.approx(share)
    assert (found["warning"] is not None) == (share >= 0.9)


def test_users_who_never_repeat_are_warned_of() -> None:
    """The values for 25, 50 and 100 items: .0426, .0206, .0102 (published by the authors' definition, m = 2)."""
    for length, expected in ((25, 0.0426), (50, 0.0206), (100, 0.0102)):
        log = [np.random.default_rng(seed).permutation(300)[:length].tolist() for seed in range(20)]
        found = users_approximate_entropy(*in_rows(log))
        assert found["mean"] == pytest.approx(expected, abs=5e-5)
        assert found["length_only_mean"] == pytest.approx(found["mean"])
        assert found["length_only_share"] == 1
        assert "100.0% of the users have no run of 2 items twice" in found["warning"]
    log = [[1, 2] * 10] * 3 + [list(range(20))] * 20
    assert users_approximate_entropy(*in_rows(log))["warning"] is None
    assert "no item twice" in users_approximate_entropy(*in_rows(log[3:]), 1)["warning"]


def test_compression_is_zstd_s_of_32_bit_numbers_in_order_of_first_occurrence() -> None:
    tokens = np.random.default_rng(1).integers(0, 256, 100_000) * 7 - 300
    found = compression(tokens)
    assert (found["codec"], found["level"]) == ("zstd", 9)
    assert 2 < found["ratio"] < 4  # one byte of four is random, and no code is shorter than the entropy
    assert found["nats"] == pytest.approx(32 * math.log(2) / found["ratio"])
    order: dict[int, int] = {}
    raw = b"".join(order.setdefault(token, len(order)).to_bytes(4, "little") for token in tokens.tolist())
    packed = pyarrow.Codec("zstd", compression_level=9).compress(raw)
    assert found["ratio"] == len(raw) / packed.size
    assert pyarrow.decompress(packed, len(raw), codec="zstd").to_pybytes() == raw
    assert compression(np.tile(np.arange(100), 1000))["ratio"] > 500
    assert compression(tokens, level=1)["ratio"] != found["ratio"]
    assert compression(tokens[:0]) == {"codec": "zstd", "level": 9, "ratio": None, "nats": None}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-5, 5) | st.integers(-(10**15), 10**15), max_size=30))
def test_items_are_numbered_in_their_order_and_as_they_first_occur(values: list[int]) -> None:
    tokens = np.array(values, dtype=np.int64)
    ordered = sorted(set(values))
    assert _dense(tokens).tolist() == [ordered.index(value) for value in values]
    first = list(dict.fromkeys(values))
    assert _by_first_occurrence(tokens).tolist() == [first.index(value) for value in values]


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
    assert figures["dictionary_effective_data"] == pytest.approx(3 / dictionary_entropy(tokens))
    assert figures["approximate_m2"] == approximate_entropy(tokens, 2)
    assert figures["approximate_users"] == users_approximate_entropy(rows, starts, ends, 2)
    assert figures["shannon"] == shannon_entropy(tokens)
    assert figures["compression"] == compression(tokens)
    assert entropies(rows, starts, starts)["quality"] is None


def test_figures_are_announced_before_they_are_made() -> None:
    said: list[str] = []
    rows = np.arange(6)
    entropies(rows, np.array([0]), np.array([6]), announce=said.append)
    assert said == ["real entropy", "dictionary entropy", "approximate entropy", "compression"]


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
