"""What each step is asked for, against a loop."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.examples import IGNORED
from llmrec.reasoning.tasks import StepTask, step_labels


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(0, 4), length=st.integers(1, 8))
def test_the_next_item_of_an_action(seed: int, rows: int, length: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 30, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.3] = IGNORED
    actions = torch.randint(0, 3, (rows, length), generator=generator)
    tasks = [StepTask(), StepTask(2), StepTask(1, 0.5)]
    found = step_labels(labels, actions, tasks)
    assert found.shape == (rows, length, 3)
    for row in range(rows):
        for place in range(length):
            for number, task in enumerate(tasks):
                expected = IGNORED
                if labels[row, place] != IGNORED:
                    for later in range(place, length):
                        if labels[row, later] != IGNORED and task.action in (None, int(actions[row, later])):
                            expected = int(labels[row, later])
                            break
                assert found[row, place, number] == expected


def test_where_nobody_knows_what_was_done_only_any_event_is_found() -> None:
    found = step_labels(torch.tensor([[3, 4]]), None, [StepTask(1), StepTask()])
    assert found.tolist() == [[[IGNORED, 3], [IGNORED, 4]]]
