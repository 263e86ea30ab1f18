"""The pilot's grid: what is dropped for the budget, in which order, and what is never dropped."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.exceptions import DataError
from llmrec.scaling.grid import GridRequest, fit_grid

TOKENS = {0.25: 250_000, 0.5: 500_000, 1.0: 1_000_000}
REQUEST = GridRequest([1, 2, 4, 8], [16, 32, 64], [0.25, 0.5, 1.0], [0, 1])


def seconds(depth, width, tokens):
    return 10 + tokens * depth * width * 1e-6


def fitted(minutes, **changes):
    return fit_grid(replace(REQUEST, **changes), TOKENS, seconds, minutes)


def told_apart(cells):
    """Whether depth, width and share each have an effect that can be solved for, by exact elimination."""
    from fractions import Fraction

    levels = [sorted(set(values)) for values in zip(*cells, strict=True)]
    rows = []
    for cell in cells:
        row = [Fraction(1)]
        for value, known in zip(cell, levels, strict=True):
            row += [Fraction(int(value == level)) for level in known[1:]]
        rows.append(row)
    for column in range(len(rows[0])):  # with every column a pivot, the next one stands one row lower
        pivot = next((place for place in range(column, len(rows)) if rows[place][column]), None)
        if pivot is None:
            return False
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for place in range(column + 1, len(rows)):
            factor = rows[place][column] / rows[column][column]
            rows[place] = [a - factor * b for a, b in zip(rows[place], rows[column], strict=True)]
    return True


def test_a_budget_with_room_takes_everything_shortest_first():
    grid = fitted(1000)
    assert not grid.left_out
    assert len(grid.trials) == 4 * 3 * 3 * 2
    assert [trial.seed for trial in grid.trials] == [0] * 36 + [1] * 36
    for seed in (0, 1):
        times = [trial.seconds for trial in grid.trials if trial.seed == seed]
        assert times == sorted(times)
    one = grid.trials[0]
    assert (one.depth, one.width, one.share, one.tokens, one.held_out) == (1, 16, 0.25, 250_000, False)
    assert one.seconds == seconds(1, 16, 250_000)
    assert grid.seconds == pytest.approx(sum(trial.seconds for trial in grid.trials))
    assert grid.notes() == []


def test_repetitions_go_first_and_the_longest_of_them_first():
    whole, grid = fitted(1000), fitted(85)
    assert {reason for _, reason in grid.left_out} == {"repetition"}
    assert grid.seconds <= 85 * 60
    dropped = [trial for trial, _ in grid.left_out]
    assert {trial.seed for trial in dropped} == {1}
    assert [trial.seconds for trial in dropped] == sorted((trial.seconds for trial in dropped), reverse=True)
    # With the last one that was dropped it would not have fitted.
    assert grid.seconds + dropped[-1].seconds > 85 * 60
    assert dropped[0].cell == (8, 64, 1.0)
    assert sorted(map(repr, [*grid.trials, *dropped])) == sorted(map(repr, whole.trials))


def test_then_cells_go_and_what_is_left_is_told_apart():
    grid = fitted(20)
    assert grid.seconds <= 20 * 60
    reasons = [reason for _, reason in grid.left_out]
    assert reasons == sorted(reasons, reverse=True)  # all repetitions before the first cell
    assert len(grid.cells) >= 7
    assert told_apart(grid.cells)
    assert {trial.seed for trial in grid.trials} == {0}
    assert "One seed does not tell what is noise" in " ".join(grid.notes())


@given(
    depths=st.lists(st.integers(1, 20), min_size=2, max_size=4, unique=True),
    widths=st.lists(st.integers(1, 200), min_size=2, max_size=4, unique=True),
    shares=st.lists(st.sampled_from(list(TOKENS)), min_size=1, max_size=3, unique=True),
    seeds=st.lists(st.integers(0, 9), min_size=1, max_size=2, unique=True),
    part=st.floats(0.02, 1.1),
    held=st.booleans(),
)
def test_whatever_is_asked_for_what_is_kept_suffices_or_is_refused(depths, widths, shares, seeds, part, held):
    pairs = [(max(depths), max(widths))] if held else []
    # A level, a curve (a slope) of depth and of width, a slope of data.
    needed = min(len(depths), 3) + min(len(widths), 3) - 1 + (len(shares) > 1)
    try:
        request = GridRequest(depths, widths, shares, seeds, pairs)
    except DataError:
        full = [cell for cell in itertools.product(depths, widths, shares) if not pairs or cell[:2] != pairs[0]]
        assert len(full) <= needed or not told_apart(full) or held
        return
    everything = fit_grid(request, TOKENS, seconds, 1e9)
    budget = part * everything.seconds / 60
    try:
        grid = fit_grid(request, TOKENS, seconds, budget)
    except DataError as error:
        least = float(str(error).split("at least ")[1].split(" minutes")[0])
        assert least >= budget
        # What it asks for is enough, and not much more than is needed.
        assert fit_grid(request, TOKENS, seconds, least).seconds <= 60 * least + 1e-6
        assert least * 60 - fit_grid(request, TOKENS, seconds, least).seconds <= 6 + 1e-6
        return
    assert grid.seconds <= 60 * budget * (1 + 1e-9)
    assert told_apart(grid.cells)
    assert len(grid.cells) > needed
    for values, asked, fewest in zip(zip(*grid.cells, strict=True), (depths, widths, shares), (3, 3, 2), strict=True):
        assert len(set(values)) >= min(fewest, len(asked))
    assert len({trial.seed for trial in grid.trials if trial.held_out}) == (len(seeds) if held else 0)
    assert sorted(map(repr, [*grid.trials, *(trial for trial, _ in grid.left_out)])) == sorted(
        map(repr, everything.trials)
    )


def test_a_budget_below_the_smallest_model_is_refused_with_what_to_add():
    # The smallest takes 14 seconds.
    with pytest.raises(
        DataError, match=r"budget of 0\.2 minutes is below the smallest model, 1 layers of width 16 on 25%"
    ):
        fitted(0.2)
    with pytest.raises(
        DataError, match=r"In 1 minutes there is no room .* Give at least [\d.]+ minutes, for the 7 train"
    ):
        fitted(1)
    for budget in (0, -3, float("nan")):
        with pytest.raises(DataError, match="Give more than none"):
            fitted(budget)


def test_what_is_held_out_is_trained_and_not_fitted_to():
    grid = fitted(1000, held_out=[(8, 64), (12, 96)])
    held = [trial for trial in grid.trials if trial.held_out]
    assert sorted(trial.cell for trial in held) == [(8, 64, 1.0)] * 2 + [(12, 96, 1.0)] * 2
    assert sorted(trial.seed for trial in held) == [0, 0, 1, 1]
    assert not any(cell[:2] == (8, 64) for cell in grid.cells)
    assert len(grid.cells) == (4 * 3 - 1) * 3
    # They take their part of the budget, and stay.
    small = fitted(60, held_out=[(8, 64), (12, 96)])
    assert sum(trial.held_out for trial in small.trials) == 4
    assert small.seconds <= 3600
    with pytest.raises(DataError, match="and 4 held out"):
        fitted(40, held_out=[(8, 64), (12, 96)])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"depths": [4]}, r"One depth, 4, does not tell what depth is good for. Add two more with --depths"),
        ({"widths": []}, "No width does not tell"),
        ({"depths": [2, 2, 4]}, "depths are 2, 2, 4. Name each once"),
        ({"depths": [0, 2]}, "is 0. Both count from 1"),
        ({"shares": [0.5, 1.5]}, "A share is 1.5"),
        ({"shares": []}, "no share"),
        ({"seeds": []}, "seeds are"),
        ({"seeds": [-1]}, "none negative"),
        ({"held_out": [(0, 3)]}, "is 0. Both"),
        (
            {"held_out": [(2, 16), (2, 32), (2, 64)], "depths": [1, 2]},
            "has 9 cells, and the law 5 unknowns: a fit needs 6",
        ),
        ({"depths": [1, 2], "widths": [8, 16, 32], "held_out": [(2, 16), (2, 32), (1, 8)]}, "tell depth, width"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_grids_that_no_law_can_be_fitted_to_are_refused(changes, said):
    with pytest.raises(DataError, match=said):
        replace(REQUEST, **changes)


def test_what_a_small_grid_cannot_tell_is_said():
    grid = fit_grid(GridRequest([1, 2], [8, 16, 32], [1.0], [0]), TOKENS, seconds, 1000)
    notes = grid.notes()
    assert len(notes) == 3
    assert notes[0] == "Two depths tell a slope, and no peak. Add a third."
    assert notes[1].startswith("One share")
    assert notes[2].startswith("One seed")
