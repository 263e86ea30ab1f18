"""Copies: every figure by its definition on random logs, and plants that are found."""

import numpy as np
import pytest
from logs import split_of

from llmrec.data.copies import equal_users
from llmrec.data.leaks import (
    repeats,
)


@pytest.mark.parametrize("seed", range(5))
def test_equal_users_are_those_of_the_definition(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sequences = [generator.integers(0, 3, int(generator.integers(0, 7))).tolist() for _ in range(400)]
    split = split_of(sequences)
    earlier: set[tuple[int, ...]] = set()
    trimmed: set[tuple[int, ...]] = set()
    copies = long = near = 0
    for own in map(tuple, sequences):
        runs = {run for run in (own, own[1:], own[:-1]) if len(run) >= 5 and len(set(run)) >= 3}
        copies += own in earlier
        long += own in earlier and own in runs
        near += own not in earlier and bool(runs & trimmed)
        earlier |= {own} - {()}
        trimmed |= runs
    found = equal_users(split)
    assert found["users"] == copies > 0
    assert found["long_users"] == long > 0
    assert found["near_users"] == near > 0
    enough = sum(len(own) >= 5 for own in sequences)
    assert found["long_share"] == pytest.approx(long / enough)
    assert found["near_share"] == pytest.approx(near / enough)
    for first, second in found["examples"][:long]:
        assert first != second
        assert sequences[int(first[1:])] == sequences[int(second[1:])]
        assert len(sequences[int(first[1:])]) >= 5


@pytest.mark.parametrize("cut", [slice(1, None), slice(None, -1), slice(1, -1)])
def test_a_copy_that_lacks_an_end_is_found_and_one_that_lacks_both_is_not(cut: slice) -> None:
    sequences = [list(range(9 * user, 9 * user + 7)) for user in range(20)]
    found = equal_users(split_of([*sequences, sequences[4][cut], [7, 7, 7, 7, 7, 7], [7, 7, 7, 7, 7]]))
    alike = cut != slice(1, -1)
    assert (found["users"], found["near_users"]) == (0, int(alike))
    assert found["examples"] == [["u4", "u20"]] * alike


def test_users_who_are_there_twice_over_are_counted() -> None:
    one = [0, 1, 2, 3]
    each_twice = [item for item in one for _ in range(2)]
    habits = [[0, 1] * 4, [5] * 8, [0, 1, 2, 0, 1], [0, 1, 2, 0, 1, 3], [0, 1, 0, 1], [0, 1, 2, 0, 1, 2, 0]]
    found = repeats(split_of([one * 2, each_twice, [0, 1, 2, 0, 1, 2], *habits]))
    assert found["doubled_users"] == 3
    assert found["doubled_share"] == pytest.approx(3 / 7)


def test_sequences_are_compared_and_not_only_their_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrec.data.copies._mixed", np.zeros_like)
    assert equal_users(split_of([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 1, 2, 3, 4]]))["users"] == 1


def test_the_same_items_in_another_order_are_no_equal_users() -> None:
    assert equal_users(split_of([[0, 1, 2, 3, 4], [0, 1, 2, 4, 3], [0, 1, 2, 3]]))["users"] == 0
