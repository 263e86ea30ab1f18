"""Tasks of growing commitment, one for each step of thought: the next item of any event, the next that was bought."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmrec.examples import IGNORED

ANY = "any"  # the next event, whatever it is


class StepTask(NamedTuple):
    """What a step is to find.

    Attributes:
        action: the number of the action of which the next item is asked for (`EventConfig.action`); None: of any.
        weight: what its loss counts.
    """

    action: int | None = None
    weight: float = 1.0


def step_labels(labels: Tensor, next_actions: Tensor | None, tasks: Sequence[StepTask]) -> Tensor:
    """The item that each task asks for at each place.

    A task of an action asks for the first labelled item at or behind the place that was taken under it, inside the
    window; none if there is none. A place without a label asks for nothing.

    Args:
        labels: (B, S) the next item's row, or `IGNORED`.
        next_actions: (B, S) the numbers of what is done with it; None: of none is known what was done.
        tasks: of the K steps.

    Returns:
        (B, S, K) rows, or `IGNORED`.

    >>> labels, actions = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[1, 2, 1, 1]])
    >>> step_labels(labels, actions, [StepTask(), StepTask(action=2)])[0].T
    tensor([[   5,    6,    7,    8],
            [   6,    6, -100, -100]])
    """
    known = labels != IGNORED
    length = labels.shape[1]
    columns = torch.arange(length, device=labels.device)
    found = []
    for task in tasks:
        if task.action is None:
            found.append(labels)
            continue
        wanted = known & (torch.zeros_like(known) if next_actions is None else next_actions == task.action)
        firsts = torch.where(wanted, columns, length).flip(1).cummin(dim=1).values.flip(1)
        behind = torch.cat((labels, torch.full_like(labels[:, :1], IGNORED)), dim=1)
        found.append(behind.gather(1, firsts).masked_fill(~known, IGNORED))
    return torch.stack(found, dim=2)
