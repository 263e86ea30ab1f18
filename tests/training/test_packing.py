import itertools

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import random_rows

from llmrec.exceptions import DataError
from llmrec.training.packing import (
    Bins,
    EndlessStream,
    ShareOfRows,
    ShareOfStream,
    pack_decreasing,
    pack_in_order,
    pad_to_budget,
    row_lengths,
)

LENGTHS = st.lists(st.integers(1, 20), max_size=80)


def first_fit(lengths, budget, order):
    """By its definition: each row in turn into the first bin with room."""
    bins, room = [], []
    for row in order:
        place = next((at for at, left in enumerate(room) if left >= lengths[row]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(budget)
        bins[place].append(row)
        room[place] -= lengths[row]
    return [sorted(rows) for rows in bins]


@given(LENGTHS, st.integers(20, 50))
def test_first_fit_decreasing_by_its_definition(lengths, budget):
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    assert [rows.tolist() for rows in pack_decreasing(lengths, budget)] == first_fit(lengths, budget, order)


@given(LENGTHS, st.integers(20, 50))
def test_in_order_a_bin_is_closed_when_the_next_row_does_not_fit(lengths, budget):
    bins = [rows.tolist() for rows in pack_in_order(lengths, budget)]
    assert [row for rows in bins for row in rows] == list(range(len(lengths)))
    sums = [sum(lengths[row] for row in rows) for rows in bins]
    assert all(total <= budget for total in sums)
    assert all(total + lengths[rows[0]] > budget for total, rows in zip(sums, bins[1:], strict=False))


@given(LENGTHS, st.integers(20, 50))
def test_padded_bins_hold_like_lengths_within_the_budget(lengths, budget):
    bins = pad_to_budget(lengths, budget)
    assert sorted(row for rows in bins for row in rows.tolist()) == list(range(len(lengths)))
    of = [[lengths[row] for row in rows] for rows in bins]
    assert all(len(found) * max(found) <= budget for found in of)
    assert all(min(left) >= max(right) for left, right in itertools.pairwise(of))
    assert all((len(left) + 1) * max(left) > budget for left in of[:-1])


def test_rows_that_do_not_fit_are_refused():
    for pack in (pack_decreasing, pack_in_order, pad_to_budget):
        with pytest.raises(DataError, match="9 tokens and a batch at most 8"):
            pack([3, 9], 8)
        with pytest.raises(DataError, match="Row 1 has no tokens"):
            pack([3, 0], 8)


@pytest.mark.parametrize("layout", ["padded", "folded", "packed"])
def test_bins_hold_every_row_once_and_the_seed_decides(layout):
    rows = random_rows(0, 50)
    bins = Bins(rows, 30, layout, seed=1)
    held = [row for place in range(len(bins)) for row in bins[place]["rows"]]
    assert sorted(map(str, held)) == sorted(map(str, rows))
    assert len(bins) < len(rows)
    assert row_lengths(bins).tolist() == [
        sum(len(row["input_ids"]) for row in bins[place]["rows"]) for place in range(len(bins))
    ]
    same, other = Bins(rows, 30, layout, seed=1), Bins(rows, 30, layout, seed=2)
    assert [found.tolist() for found in same.bins] == [found.tolist() for found in bins.bins]
    assert [found.tolist() for found in other.bins] != [found.tolist() for found in bins.bins]


def test_lengths_of_a_shuffled_dataset():
    rows = random_rows(1, 40)
    data = datasets.Dataset.from_list(rows).shuffle(seed=3).select(range(30))
    assert row_lengths(data).tolist() == [len(row["input_ids"]) for row in data]
    assert row_lengths(rows).tolist() == [len(row["input_ids"]) for row in rows]
    assert row_lengths(data.select([])).tolist() == []


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 4))
def test_processes_share_the_rows_and_keep_step(count, batch_size, processes):
    rows = [{"input_ids": [place] * (1 + place % 4), "labels": [place] * (1 + place % 4)} for place in range(count)]
    for kind in (ShareOfRows, ShareOfStream):
        shares = [kind(rows, batch_size, process, processes) for process in range(processes)]
        if kind is ShareOfRows:
            taken = [[[share[place] for place in batch] for batch in share.batches] for share in shares]
        else:
            taken = [list(share) for share in shares]
            taken = [[found[at : at + batch_size] for at in range(0, len(found), batch_size)] for found in taken]
        # As many batches in each process, none too large, and every row with its labels exactly once.
        assert len({len(batches) for batches in taken}) == 1
        every = [row for batches in taken for batch in batches for row in batch]
        assert all(len(batch) <= batch_size for batches in taken for batch in batches)
        labelled = [row["input_ids"][0] for row in every if row["labels"] == row["input_ids"]]
        assert sorted(labelled) == list(range(count))
        blank = [row for row in every if row["labels"] != row["input_ids"]]
        assert all(set(row["labels"]) == {-100} for row in blank)
        assert len(blank) < processes


def test_batches_are_of_like_lengths_the_longest_first():
    rows = random_rows(2, 23)
    share = ShareOfRows(rows, 4)
    lengths = [len(rows[place]["input_ids"]) for batch in share.batches for place in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert len(share) == 23
    assert np.concatenate(share.batches).tolist() == sorted(
        range(23), key=lambda place: (-len(rows[place]["input_ids"]), place)
    )


def test_an_endless_stream_begins_again_and_is_never_empty():
    rows = [{"input_ids": [n]} for n in range(3)]
    assert [row["input_ids"][0] for row in itertools.islice(EndlessStream(rows), 8)] == [0, 1, 2, 0, 1, 2, 0, 1]
    with pytest.raises(DataError, match="is empty"):
        next(iter(EndlessStream([])))
