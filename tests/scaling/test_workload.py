import numpy as np
import polars as pl
import pytest

from llmrec.data.arguments import SplitArguments
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.examples import windows
from llmrec.exceptions import DataError
from llmrec.scaling.cost import cost_of
from llmrec.scaling.language import LanguageShape
from llmrec.scaling.shape import Shape
from llmrec.scaling.workload import Workload
from llmrec.sequence.events import EventConfig
from llmrec.sequence.histories import LoggedHistories
from llmrec.sequence.windows import TrainingWindows

LENGTHS = (3, 5, 9, 14, 25)  # of which leave-one-out takes two each


@pytest.fixture(scope="module")
def split():
    rows = [
        (f"u{user}", f"i{(user + step) % 30}", step) for user, count in enumerate(LENGTHS) for step in range(count)
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    log = Interactions.from_frame(frame)
    return SplitArguments().make(log, Items.from_interactions(log))


@pytest.mark.parametrize(("take", "stride"), [("all", 0), ("all", 2), ("last", 0)])
def test_windows_are_those_that_are_trained(split, take, stride):
    workload = Workload.of_windows(split, 6, take, stride)
    trained = TrainingWindows(LoggedHistories(split, EventConfig()), 6, take, stride)
    assert workload.lengths.tolist() == trained.lengths.tolist()
    labels = [int((trained[0, number]["labels"] >= 0).sum()) for number in range(len(trained))]
    assert workload.targets.tolist() == labels
    assert (workload.items, workload.max_history) == (split.num_items, 6)
    if take == "all":  # each user's events but the first
        assert workload.tokens == sum(count - 3 for count in LENGTHS)


def test_rows_are_those_of_their_task(split):
    sequence, single = (Workload.of_rows(split, 6, task) for task in ("sequence", "next_item"))
    assert sequence.tokens == sum(count - 2 for count in LENGTHS)
    assert len(sequence.lengths) == sum(len(list(windows(count - 2, 6))) for count in LENGTHS)
    assert max(sequence.lengths) == max(single.lengths) == 7
    assert single.tokens == len(single.lengths) == sum(count - 3 for count in LENGTHS)


def test_the_cost_is_that_of_each_window(split):
    workload = Workload.of_windows(split, 6, "all", 2)
    shape = Shape("llama", 2, 16, 2, 1)
    single = [
        cost_of(Shape("llama", 2, 16, split.num_items, length, targets=targets, max_history=6)).window.total
        for length, targets in zip(workload.lengths.tolist(), workload.targets.tolist(), strict=True)
    ]
    cost = workload.cost(shape)
    assert cost.flops(workload.tokens) == pytest.approx(sum(single))
    assert cost.shape.items == split.num_items
    assert cost.parameters == cost_of(Shape("llama", 2, 16, split.num_items, 6)).parameters
    rows = Workload.of_rows(split, 6, "sequence")
    language = LanguageShape("llama", 2, 16, 64, 3, 1)
    assert rows.cost(language).flops(rows.tokens) == pytest.approx(
        sum(
            cost_of(LanguageShape("llama", 2, 16, 64, 3, length, targets=targets)).window.total
            for length, targets in zip(rows.lengths.tolist(), rows.targets.tolist(), strict=True)
        )
    )


def test_a_share_of_the_users_is_theirs_alone(split):
    users = np.array([False, True, False, True, True])
    whole, some = (Workload.of_windows(split, 6, users=chosen) for chosen in (None, users))
    assert some.tokens == sum(count - 3 for count, chosen in zip(LENGTHS, users, strict=True) if chosen)
    assert (some.items, some.tokens < whole.tokens) == (whole.items, True)
    rows = Workload.of_rows(split, 6, "sequence", users)
    assert rows.tokens == sum(count - 2 for count, chosen in zip(LENGTHS, users, strict=True) if chosen)


def test_nothing_to_learn_is_said():
    frame = pl.DataFrame({"user_id": ["a"] * 3, "item_id": ["x", "y", "z"], "timestamp": [1, 2, 3]})
    log = Interactions.from_frame(frame)
    split = SplitArguments().make(log, Items.from_interactions(log))
    with pytest.raises(DataError, match="No training history has two items"):
        Workload.of_windows(split, 6)
