"""Stochastic length against equation 4, by counting."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.exceptions import DataError
from llmrec.sequence.stochastic_length import keeps_all, kept_places, thinned_length


@given(
    longest=st.integers(1, 300),
    share=st.floats(0, 1),
    alpha=st.floats(1.01, 2.0),
    choice=st.sampled_from(["recent", "random", "latest"]),
    seed=st.integers(0, 99),
)
def test_places_are_ascending_and_end_with_the_last(longest, share, alpha, choice, seed):
    length = max(1, round(share * longest))
    places = kept_places(length, longest, alpha, np.random.default_rng(seed), choice)
    assert len(places) in (length, thinned_length(longest, alpha))
    assert (np.diff(places) > 0).all()
    assert places[-1] == length - 1
    assert places[0] >= 0
    if length <= longest ** (alpha / 2):
        assert len(places) == length
    if choice == "latest":
        assert (np.diff(places) == 1).all()


@pytest.mark.parametrize(("length", "longest", "alpha"), [(40, 64, 1.5), (64, 64, 1.5), (100, 128, 1.7)])
def test_long_histories_stay_whole_as_often_as_equation_4_says(length, longest, alpha):
    rng = np.random.default_rng(0)
    whole = np.mean([len(kept_places(length, longest, alpha, rng)) == length for _ in range(4000)])
    expected = longest**alpha / length**2
    assert keeps_all(length, longest, alpha) == pytest.approx(min(1, expected))
    assert whole == pytest.approx(min(1, expected), abs=0.03)


def test_recent_items_are_kept_more_often_and_random_ones_alike():
    rng = np.random.default_rng(1)
    counts = {}
    for choice in ("recent", "random"):
        kept = np.zeros(60)
        for _ in range(3000):
            places = kept_places(60, 60, 1.4, rng, choice)
            if len(places) < 60:
                kept[places] += 1
        counts[choice] = kept[:-1] / kept[-1]
    thirds = [part.mean() for part in np.array_split(counts["recent"], 3)]
    assert thirds[0] < 0.7 * thirds[1] < 0.7 * thirds[2]
    assert counts["random"].std() < 0.03
    # All the weight is given out: the expected number is one less than the thinned length.
    assert counts["random"].sum() == pytest.approx(thinned_length(60, 1.4) - 1, abs=1e-9)


def test_two_thins_nothing():
    assert len(kept_places(500, 500, 2.0, np.random.default_rng(0))) == 500


@pytest.mark.parametrize("alpha", [1.0, 2.1, float("nan")])
def test_an_alpha_outside_is_refused(alpha):
    with pytest.raises(DataError, match="alpha"):
        thinned_length(100, alpha)


def test_a_history_beyond_the_longest_is_refused():
    with pytest.raises(DataError, match="Cut it first"):
        kept_places(11, 10, 1.5, np.random.default_rng(0))
