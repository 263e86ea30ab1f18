"""The suffix automaton: its matches and its tree against definitions, and the bounds that its arrays are made for."""

import json

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.scaling.suffix_automaton import Tokens, _empty, _grow, earlier_matches, links

SEQUENCES = st.lists(st.integers(0, 3), min_size=1, max_size=40) | st.lists(
    st.integers(0, 30), min_size=1, max_size=60
)


def numbered(tokens: npt.ArrayLike) -> Tokens:
    return np.unique(tokens, return_inverse=True)[1].astype(np.int32)


def matches_by_runs(tokens: Tokens) -> list[int]:
    """A match of l tokens is there if the first place of that run ends before its last one begins."""
    n = len(tokens)
    matches = [0] * n
    places = list(range(n))
    length = 0
    while places:
        length += 1
        first: dict[bytes, int] = {}
        for place in range(n - length + 1):
            first.setdefault(tokens[place : place + length].tobytes(), place)
        runs = [(place, first.get(tokens[place : place + length].tobytes(), place)) for place in places]
        places = [place for place, begin in runs if place + length <= n and begin + length <= place]
        for place in places:
            matches[place] = length
    return matches


def thue_morse(n: int) -> list[int]:
    return [bin(number).count("1") % 2 for number in range(n)]


def fibonacci(n: int) -> list[int]:
    before, word = [1], [0]
    while len(word) < n:
        before, word = word, word + before
    return word[:n]


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("one", [0]),
        ("equal", [0] * 300),
        ("distinct", list(range(400))),
        ("twice", [*range(200), *range(200)]),
        ("backwards", [*range(200), *range(199, -1, -1)]),
        ("thue-morse", thue_morse(500)),
        ("fibonacci", fibonacci(500)),
        ("hub", [item for other in range(1, 200) for item in (0, other)]),  # one state with very many edges
        ("two hubs", [item for other in range(2, 150) for item in (0, other, 1, other)]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_matches_in_sequences_of_all_kinds(name: str, tokens: list[int]) -> None:
    sequence = numbered(tokens)
    assert earlier_matches(sequence).tolist() == matches_by_runs(sequence)


@pytest.mark.parametrize("items", [2, 7, 60, 3000, 20_000])
def test_matches_in_random_sequences_of_many_items(items: int) -> None:
    generator = np.random.default_rng(items)
    sequence = numbered((generator.random(20_000) ** 2 * items).astype(np.int64))
    assert earlier_matches(sequence).tolist() == matches_by_runs(sequence)


def test_long_sequences_that_repeat_themselves_take_a_step_a_token() -> None:
    """Matches here sum to n^2 / 4; an algorithm that walks them one by one would not end."""
    n = 1_000_000
    ones = earlier_matches(np.zeros(n, dtype=np.int32))
    places = np.arange(n)
    assert (ones == np.minimum(places, n - places)).all()
    pairs = earlier_matches((places % 2).astype(np.int32))
    assert (pairs == np.minimum(places // 2 * 2, n - places)).all()
    order = np.random.default_rng(0).permutation(n // 2)
    twice = earlier_matches(np.concatenate([order, order]).astype(np.int32))
    assert (twice[: n // 2] == 0).all()
    assert (twice[n // 2 :] == n // 2 - np.arange(n // 2)).all()


@settings(max_examples=200, deadline=None)
@given(SEQUENCES)
def test_the_tree_s_nodes_are_the_runs_that_end_at_the_same_places(tokens: list[int]) -> None:
    """Every run is in the state of its places; a state's longest run is its `length`, and its link is one set up."""
    sequence = numbered(tokens)
    runs: dict[tuple[int, ...], list[int]] = {}
    for begin in range(len(tokens)):
        for end in range(begin + 1, len(tokens) + 1):
            runs.setdefault(tuple(sequence[begin:end].tolist()), []).append(end)
    longest: dict[tuple[int, ...], int] = {}
    for run, ends in runs.items():
        longest[tuple(ends)] = max(longest.get(tuple(ends), 0), len(run))
    tree = links(sequence)
    assert sorted(tree.length.tolist()) == sorted([0, *longest.values()])
    assert tree.link[0] == -1
    for end, state in enumerate(tree.beginnings.tolist(), start=1):
        depth = end
        assert tree.length[state] == end
        while state != 0:
            state = tree.link[state]
            shorter = tree.length[state]
            # All of the runs above the link's longest have the places of this state; the link's have more.
            sizes = range(shorter + 1, depth + 1)
            alike = {tuple(runs[tuple(sequence[end - size : end].tolist())]) for size in sizes}
            assert len(alike) == 1
            if shorter:
                assert len(runs[tuple(sequence[end - shorter : end].tolist())]) > len(alike.pop())
            depth = shorter


@pytest.mark.parametrize("items", [1, 2, 3, 50, 2000])
def test_there_are_no_more_states_and_edges_than_there_is_room_for(items: int) -> None:
    generator = np.random.default_rng(items)
    sequences = [generator.integers(0, items, 2000), np.arange(2000) % items, np.array([0] + [1] * 998 + [2])]
    for tokens in sequences:
        sequence = numbered(tokens)
        automaton = _empty(len(sequence))
        _, states = _grow(automaton, sequence)
        assert states <= 2 * len(sequence)
        assert (automaton.keys != 0).sum() < len(sequence) <= len(automaton.keys) // 2
        assert not automaton.length[states:].any()


def test_the_loops_stay_inside_their_arrays(run_python) -> None:  # type: ignore[no-untyped-def]
    """Compiled code does not look; as plain Python it does, and finds the same."""
    done = run_python(
        """
import json
import numpy as np
from llmrec.scaling.run_dictionary import new_run_lengths
from llmrec.scaling.suffix_automaton import earlier_matches
np.seterr(over="ignore")
found = []
for seed, items in enumerate((1, 2, 3, 40, 400)):
    tokens = np.unique(np.random.default_rng(seed).integers(0, items, 400), return_inverse=True)[1].astype(np.int32)
    found.append([earlier_matches(tokens).tolist(), new_run_lengths(tokens).tolist()])
print(json.dumps(found))
""",
        NUMBA_DISABLE_JIT="1",
    )
    assert done.returncode == 0, done.stderr
    from llmrec.scaling.run_dictionary import new_run_lengths

    for seed, (items, found) in enumerate(zip((1, 2, 3, 40, 400), json.loads(done.stdout), strict=True)):
        tokens = numbered(np.random.default_rng(seed).integers(0, items, 400))
        assert found == [earlier_matches(tokens).tolist(), new_run_lengths(tokens).tolist()]
