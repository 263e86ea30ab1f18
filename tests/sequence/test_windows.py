"""Training windows and batches against loops over the histories."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sequence_logs import ACTIONS, random_split

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.examples import IGNORED
from llmrec.exceptions import DataError
from llmrec.sequence.events import EventConfig
from llmrec.sequence.histories import LoggedHistories
from llmrec.sequence.stochastic_length import thinned_length
from llmrec.sequence.windows import EpochBatches, TrainingWindows, windows_of


@given(length=st.integers(0, 60), begin=st.integers(0, 5), longest=st.integers(1, 20), stride=st.integers(0, 20))
def test_every_item_but_the_first_is_a_target_once(length, begin, longest, stride):
    stride = min(stride, longest)
    windows = windows_of(begin, begin + length, longest, "all", stride)
    targets = Counter(place for window in windows for place in range(window.first, window.end))
    assert targets == Counter(range(begin + 1, begin + length))
    for window in windows:
        assert window.end - 1 - window.begin <= longest
        assert begin <= window.begin < window.first < window.end
        if stride:
            # All but the first of a history give each target as much context as the stride promises.
            assert window.begin == begin or window.first - window.begin >= longest - stride + 1


@given(length=st.integers(0, 60), longest=st.integers(1, 20))
def test_the_last_window_alone(length, longest):
    windows = windows_of(0, length, longest, "last")
    assert len(windows) == (length >= 2)
    for window in windows:
        assert window == (max(0, length - 1 - longest), length, max(0, length - 1 - longest) + 1)


@pytest.mark.parametrize(("longest", "stride"), [(0, 0), (4, 5)])
def test_strides_that_cannot_be_are_refused(longest, stride):
    with pytest.raises(DataError, match="stride"):
        windows_of(0, 9, longest, "all", stride)


def events():
    return EventConfig(actions=list(ACTIONS), domains=["books", "toys"], action_tokens="added", domain_tokens="added")


def dataset(split=None, **options):
    histories = LoggedHistories(split or random_split(), events())
    return TrainingWindows(histories, **({"max_history": 5} | options))


@pytest.mark.parametrize("stride", [0, 2])
def test_a_batch_says_of_each_place_what_comes_next(stride):
    split = random_split()
    windows = dataset(split, stride=stride)
    batch = windows.__getitems__([(0, place) for place in range(len(windows))])
    number = {"": 0, None: 0} | {name: place + 1 for place, name in enumerate(ACTIONS)}
    seen = Counter()
    for row, window in enumerate(windows.windows):
        for place in range(batch["mask"].shape[1]):
            at = window.begin + place
            inside = at < window.end - 1
            assert bool(batch["mask"][row, place]) == inside
            if not inside:
                assert batch["labels"][row, place] == IGNORED
                continue
            assert batch["items"][row, place] == split.rows[at]
            assert batch["timestamps"][row, place] == split.timestamps[at]
            assert batch["next_timestamps"][row, place] == split.timestamps[at + 1]
            assert batch["actions"][row, place] == number[split.actions[at]]
            assert batch["next_actions"][row, place] == number[split.actions[at + 1]]
            if at + 1 >= window.first:
                assert batch["labels"][row, place] == split.rows[at + 1]
                seen[at + 1] += 1
            else:
                assert batch["labels"][row, place] == IGNORED
    starts = set(split.offsets[:-1].tolist())
    expected = Counter(place for place in np.flatnonzero(split.in_training).tolist() if place not in starts)
    assert seen == expected
    assert sorted(batch["first_items"].tolist()) == sorted(
        split.rows[start]
        for start in split.offsets[:-1].tolist()
        if (np.diff(split.offsets)[list(split.offsets).index(start)] >= 4)
    )


def test_no_held_out_item_is_learnt_from():
    split = random_split()
    windows = dataset(split)
    held = set(split.positions["valid"].tolist()) | set(split.positions["test"].tolist())
    assert not held & {place for window in windows.windows for place in range(window.begin, window.end)}


def test_draws_hang_on_seed_epoch_and_window_alone():
    split = random_split(longest=40)
    windows = dataset(split, max_history=30, alpha=1.3)
    one, other = windows.__getitems__([(3, 4), (3, 7)]), windows.__getitems__([(3, 7)])
    torch.testing.assert_close(one["items"][1][one["mask"][1]], other["items"][0][other["mask"][0]])
    epochs = {
        tuple(windows.__getitems__([(epoch, int(windows.lengths.argmax()))])["items"][0].tolist())
        for epoch in range(8)
    }
    assert len(epochs) > 4
    again = dataset(split, max_history=30, alpha=1.3, seed=1)
    place = int(windows.lengths.argmax())
    assert any(
        windows[(epoch, place)]["items"].tolist() != again[(epoch, place)]["items"].tolist() for epoch in range(4)
    )


def test_thinned_histories_ask_for_what_truly_came_next():
    split = random_split(longest=40, items=400)
    windows = dataset(split, max_history=30, alpha=1.3)
    short = thinned_length(30, 1.3)
    follows = set(zip(split.rows[:-1].tolist(), split.rows[1:].tolist(), strict=True))
    thinned = 0
    for place in range(len(windows)):
        batch = windows[(0, place)]
        assert batch["mask"].sum() in (windows.lengths[place], short)
        thinned += int(batch["mask"].sum() < windows.lengths[place])
        pairs = zip(batch["items"][0].tolist(), batch["labels"][0].tolist(), strict=True)
        assert all(pair in follows for pair in pairs)
    assert thinned > 3


@pytest.mark.parametrize("place", ["action_tokens", "domain_tokens"])
def test_what_is_thinned_is_asked_for_under_the_tokens_that_stand_before_it(place):
    split = random_split(longest=40, items=400, unknown=0.0)
    told = EventConfig(actions=list(ACTIONS), domains=["books", "toys"], **{place: "before"})
    windows = TrainingWindows(LoggedHistories(split, told), max_history=30, alpha=1.3)
    thinned = 0
    for number in range(len(windows)):
        batch = {name: tensor[0] for name, tensor in windows[(0, number)].items() if tensor.ndim == 2}
        thinned += int(len(batch["items"]) < windows.lengths[number])
        torch.testing.assert_close(batch["labels"][:-1], batch["items"][1:])
        for name in ("actions", "domains", "timestamps"):
            torch.testing.assert_close(batch[f"next_{name}"][:-1], batch[name][1:])
        last = windows.windows[number].end - 1
        assert batch["labels"][-1] == split.rows[last]
        assert batch["next_actions"][-1] == windows.histories.columns["actions"][last]
    assert thinned > 3


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"take": "last"}, {"action_weights": [1, 0, 2, 0.5]}], ids=str)
def test_target_counts_are_those_of_an_epochs_labels(options):
    split = random_split()
    windows = dataset(split, **options)
    labels = windows.__getitems__([(0, place) for place in range(len(windows))])["labels"]
    expected = np.bincount(labels[labels != IGNORED].numpy(), minlength=split.num_items)
    np.testing.assert_array_equal(windows.target_counts(), expected)
    assert expected.sum() != split.train_counts.sum()


def test_target_counts_of_a_cloze_model_are_those_of_what_it_reads():
    split = random_split()
    windows = dataset(split, hidden_share=0.3)
    batch = windows.__getitems__([(0, place) for place in range(len(windows))])
    expected = np.bincount(batch["items"][batch["mask"]].numpy(), minlength=split.num_items)
    np.testing.assert_array_equal(windows.target_counts(), expected)


def test_hidden_items_are_the_labels_and_a_half_hides_the_last_alone():
    split = random_split(users=200)
    windows = dataset(split, hidden_share=0.3)
    indices = [(0, place) for place in range(len(windows))]
    batch = windows.__getitems__(indices)
    hidden, mask = batch["hidden"], batch["mask"]
    assert hidden.dtype == torch.bool
    assert not (hidden & ~mask).any()
    torch.testing.assert_close(batch["labels"], torch.where(hidden, batch["items"], IGNORED))
    ends = mask.sum(1) - 1
    alone = (hidden.sum(1) == 1) & hidden[torch.arange(len(hidden)), ends]
    assert 0.45 < alone.float().mean() < 0.75
    assert (hidden.sum(1) >= 1).all()
    # The last training item is there as an input that can be hidden: behind the longest history, as it will be asked.
    assert mask.sum(1).max() == 6
    shown = (mask & ~hidden).sum(1)
    assert shown[alone].max() == shown.max() == 5
    assert "next_actions" not in batch


def test_weights_by_action_and_none_for_zero():
    split = random_split(unknown=0.0)
    windows = dataset(split, action_weights=[1.0, 3.0, 0.5, 0.0])
    batch = windows.__getitems__([(0, place) for place in range(len(windows))])
    taken = batch["next_actions"]
    labelled = batch["labels"] != IGNORED
    weights = torch.tensor([1.0, 3.0, 0.5, 0.0])[taken]
    torch.testing.assert_close(batch["weights"][labelled], weights[labelled])
    torch.testing.assert_close(labelled, batch["mask"] & (taken != 3))


def test_a_filling_has_no_labels():
    windows = dataset()
    filling = windows[(0, -1 - 3)]
    assert (filling["labels"] == IGNORED).all()
    assert len(filling["first_items"]) == 0
    torch.testing.assert_close(filling["items"], windows[(0, 3)]["items"])


def test_unknown_times_stay_unknown():
    split = random_split()
    times = split.timestamps.copy()
    times[::3] = np.nan
    split = replace(split, timestamps=times)
    batch = dataset(split).__getitems__([(0, 0), (0, 1)])
    assert (batch["timestamps"] == UNKNOWN_TIME).any()


def test_histories_of_one_item_teach_nothing():
    with pytest.raises(DataError, match="nothing follows"):
        dataset(random_split(longest=3))


@given(
    count=st.integers(1, 40), size=st.integers(1, 9), budget=st.sampled_from([0, 1, 7, 30]),
    processes=st.integers(1, 3), epoch=st.integers(0, 3),
)  # fmt: skip
def test_each_epoch_has_each_window_once_over_all_processes(count, size, budget, processes, epoch):
    lengths = np.random.default_rng(count).integers(1, 12, count)
    shares = [EpochBatches(lengths, size, budget, 5, process, processes) for process in range(processes)]
    assert len({len(share) for share in shares}) == 1
    found = []
    for share in shares:
        share.set_epoch(epoch)
        batches = list(share)
        assert len(batches) == len(share)
        found += batches
    pairs = [pair for batch in found for pair in batch]
    assert {pair[0] for pair in pairs} == {epoch}
    assert sorted(window for _, window in pairs if window >= 0) == list(range(count))
    assert sum(window < 0 for _, window in pairs) < processes
    for batch in found:
        sizes = lengths[[window for _, window in batch if window >= 0]]
        assert not budget or sizes.sum() <= budget or len(batch) == 1
        assert budget or len(batch) <= size


def test_epochs_have_orders_of_their_own_that_come_again():
    batches = EpochBatches(np.arange(1, 30), 4, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        orders.append([[window for _, window in batch] for batch in batches])
    assert orders[0] == orders[2] != orders[1]


def test_with_a_budget_windows_of_like_length_come_together():
    lengths = np.random.default_rng(0).integers(1, 50, 300)
    spread = [np.ptp(lengths[[window for _, window in batch]]) for batch in EpochBatches(lengths, 1, 200)]
    assert np.mean(spread) < 3
