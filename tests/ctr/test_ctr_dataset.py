import numpy as np
import pytest
import torch
from ctr_factories import make_rows, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.ctr.dataset import Cases, Windows, collate
from llmrec.ctr.histories import Histories
from llmrec.ctr.items import CandidateItems
from llmrec.ctr.negatives import draw_negatives, thin_negatives
from llmrec.ctr.rows import MISSING
from llmrec.exceptions import ArtefactError, DataError


def catalogue_of(rows):
    return np.arange(len(rows.item_ids), dtype=np.int64) + 1


def test_a_case_is_its_history_and_itself():
    rows = make_rows([0, 1, 0, 0], [2, 0, 1, 0], [[1], [0], [0], [1]], timestamps=[3, 4, 5, 6])
    cases = Cases(
        rows, Histories.of(rows), catalogue_of(rows), np.array([3, 1]), 2, np.array([1, 2, 3, 4], np.float32)
    )
    first, second = cases[0], cases[1]
    assert first.items.tolist() == [3, 2, 1]
    assert first.actions.tolist() == [2, 1, 3]  # liked, disliked, asked
    assert first.timestamps.tolist() == [3, 5, 6]
    assert first.labels.tolist() == [[MISSING], [MISSING], [1]]
    assert first.weights.tolist() == [4, 4, 4]
    assert (second.items.tolist(), second.labels.tolist()) == ([1], [[0]])
    assert cases.lengths().tolist() == [3, 1]
    assert [len(cases[case].items) for case in range(2)] == [3, 1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_windows_ask_for_every_row_once_behind_its_own_history(seed, max_history):
    rows = random_rows(seed, count=50, num_labels=2, missing=True, tied=True)
    rng = np.random.default_rng(seed)
    chosen = np.flatnonzero((rows.labels >= 0).any(axis=1) & (rng.random(50) < 0.8))
    weights = rng.integers(0, 3, size=50).astype(np.float32)
    windows = Windows(rows, catalogue_of(rows), chosen, max_history, weights)
    asked = []
    for window in range(len(windows)):
        row = windows[window]
        assert len(row.items) == windows.lengths()[window] <= max_history + 1
        for place in np.flatnonzero((row.labels != MISSING).any(axis=1)):
            seen = min(place, max_history)
            asked.append(
                (
                    row.items[: place + 1].tolist(),
                    row.actions[:place].tolist(),
                    row.labels[place].tolist(),
                    row.weights[place],
                )
            )
            # Only a user's first events know less than half of what a model may read.
            assert seen >= (max_history + 1) // 2 or seen == place
    # By looking at all rows: what each asked row's history ends with, of the chosen rows.
    order = sorted(chosen.tolist(), key=lambda row: (rows.users[row], rows.timestamps[row], row))
    wanted = [row for row in order if weights[row] > 0]
    assert len(asked) == len(wanted)
    for (items, actions, labels, weight), row in zip(asked, wanted, strict=True):
        mine = [other for other in order if rows.users[other] == rows.users[row]]
        before = mine[: mine.index(row)][-len(actions) :] if actions else []
        assert items == [*(rows.items[before] + 1).tolist(), int(rows.items[row]) + 1]
        assert (labels, weight) == (rows.labels[row].tolist(), weights[row])
        assert len(actions) >= min(mine.index(row), max_history // 2)
    with pytest.raises(DataError, match="max_history"):
        Windows(rows, catalogue_of(rows), chosen, 0)


def test_batches_are_padded_on_the_right():
    rows = make_rows([0, 0, 1], [1, 2, 3], [1, 0, 1])
    batch = collate(
        [*(Cases(rows, Histories.of(rows), catalogue_of(rows), np.arange(3), 5)[case] for case in range(3))]
    )
    assert batch["items"].tolist() == [[2, 0], [2, 3], [4, 0]]
    assert batch["mask"].tolist() == [[True, False], [True, True], [True, False]]
    assert batch["labels"][..., 0].tolist() == [[1, MISSING], [MISSING, 0], [1, MISSING]]
    assert batch["timestamps"][0].tolist() == [0, UNKNOWN_TIME]
    assert batch["actions"].dtype == batch["labels"].dtype == torch.int64


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 1.0), st.booleans())
def test_thinned_negatives_count_for_all(seed, share, reweigh):
    rows = random_rows(seed, count=40, num_labels=2, missing=True)
    chosen = np.arange(0, 40, 2)
    weights = thin_negatives(rows, chosen, share, reweigh, seed)
    positive = (rows.labels == 1).any(axis=1)
    negatives = chosen[~positive[chosen]]
    assert (weights[chosen[positive[chosen]]] == 1).all()
    assert (weights[1::2] == 0).all()
    kept = np.count_nonzero(weights[negatives])
    assert kept == (max(1, round(share * len(negatives))) if len(negatives) else 0)
    if reweigh:
        assert weights[negatives].sum() == pytest.approx(len(negatives), rel=1e-5)
    else:
        assert weights[negatives].sum() == kept
    assert (weights == thin_negatives(rows, chosen, share, reweigh, seed)).all()


def test_drawn_negatives_are_items_that_the_user_never_had():
    rows = random_rows(3, count=60, num_labels=2, missing=True)
    rows.part[40:] = 1
    histories = Histories.of(rows)
    longer, again = draw_negatives(rows, histories, 2, seed=1)
    positives = np.flatnonzero((rows.labels == 1).any(axis=1))
    assert len(longer) == 60 + 2 * len(positives)
    had = {user: set(rows.items[rows.users == user].tolist()) for user in range(7)}
    for place in range(60, len(longer)):
        source = positives[(place - 60) // 2]
        assert longer.items[place] not in had[longer.users[place]]
        assert longer.items[place] in rows.items[rows.part <= rows.part[source]]
        assert (longer.labels[place] == np.where(rows.labels[source] == MISSING, MISSING, 0)).all()
        assert longer.users[place] == rows.users[source]
        assert longer.part[place] == rows.part[source]
        assert again.before(place, 9).items.tolist() == histories.before(source, 9).items.tolist()
    assert len(again.events.items) == 60  # drawn rows are in no history
    same, _ = draw_negatives(rows, histories, 2, seed=1)
    assert same.items.tolist() == longer.items.tolist()
    assert len(draw_negatives(rows, histories, 0)[0]) == 60


def test_a_user_who_had_everything_gets_no_negatives():
    rows = make_rows([0, 0, 1], [0, 1, 0], [1, 1, 1])
    longer, _ = draw_negatives(rows, Histories.of(rows), 3)
    assert longer.users[3:].tolist() == [1, 1, 1]
    assert longer.items[3:].tolist() == [1, 1, 1]


def test_shares_and_numbers_that_make_no_sense_are_refused():
    rows = random_rows()
    with pytest.raises(DataError, match="share of negatives"):
        thin_negatives(rows, np.arange(5), 0)
    with pytest.raises(DataError, match="cannot be drawn"):
        draw_negatives(rows, Histories.of(rows), -1)


def test_items_are_numbered_from_one_and_saved(tmp_path):
    rows = make_rows([0, 0, 0, 0], [3, 1, 3, 2], [1, 0, 1, 0], part=[0, 0, 0, 1])
    items = CandidateItems.of_training(rows, np.flatnonzero(rows.part == 0))
    assert items.ids == ("1", "3")
    assert CandidateItems.of_training(rows, np.array([0, 1, 2]), min_count=2).ids == ("3",)
    assert items.rows(["3", "2", "1"]).tolist() == [2, 0, 1]
    assert len(items) == 3
    items.save(tmp_path)
    assert CandidateItems.load(tmp_path).ids == items.ids
    (tmp_path / "items.json").write_text('{"ids": [1, 2]}')
    with pytest.raises(ArtefactError, match="cannot be read"):
        CandidateItems.load(tmp_path)
    with pytest.raises(DataError, match="once"):
        CandidateItems(["a", "a"])
