"""Batches of training rows: padded, folded or packed.

A row has `input_ids`, `labels` of the same length (-100: none) and maybe `task`. Three layouts give the same losses
and gradients:

* padded: (B, T), filled up on the right. A causal model never looks to the right, so the filling needs no mask and no
  positions; attention runs in its fastest form, and labels say which states count.
* folded: (F, T), T being the longest row's length: short rows share a line, so F is smaller than B. Positions start
  again at every row, from which transformers' masks see where one row ends.
* packed: (1, sum of lengths), one line without filling, for FlashAttention, which goes by the same positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from llmrec.examples import IGNORED
from llmrec.exceptions import BackboneError, DataError
from llmrec.training.packing import pack_decreasing

Layout = Literal["padded", "folded", "packed"]
Row = Mapping[str, Any]


def padded(rows: Sequence[Row], tasks: Sequence[str] = (), pad_token_id: int = 0) -> dict[str, Tensor]:
    """One tensor row per row, filled up on the right with a token that nothing looks at.

    >>> rows = [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, {"input_ids": [5], "labels": [-100]}]
    >>> padded(rows)["input_ids"]
    tensor([[5, 6, 7],
            [5, 0, 0]])

    Args:
        rows: B rows.
        tasks: names; a row's `task` is its place among them.
        pad_token_id: any id of the vocabulary.

    Returns:
        `input_ids`, `labels`, `tasks` (B, T), int64; a task of -1 is none. The first label of a row is taken away,
        because nothing stands before it.

    Raises:
        DataError: if a row is empty, its labels are of another length, or its task is not known.
    """
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), length), pad_token_id, dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORED, dtype=torch.long)
    numbers = torch.full((len(rows), length), -1, dtype=torch.long)
    for place, row in enumerate(rows):
        tokens, wanted = _tensors(row)
        ids[place, : len(tokens)] = tokens
        labels[place, : len(tokens)] = wanted
        numbers[place] = _task(row, tasks)
    return {"input_ids": ids, "labels": labels, "tasks": numbers}


def packed(rows: Sequence[Row], tasks: Sequence[str] = (), pad_token_id: int = 0) -> dict[str, Tensor]:
    """All rows one behind another in a single tensor row; `pad_token_id` is not used.

    >>> packed([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7, 8], "labels": [7, 8]}])["labels"]
    tensor([[-100,    6, -100,    8]])

    Args and raises: as for `padded`.

    Returns:
        `input_ids`, `labels`, `tasks` and `position_ids` (1, T), int64.
    """
    pairs = [_tensors(row) for row in rows]
    counts = [len(tokens) for tokens, _ in pairs]
    numbers = [torch.full((count,), _task(row, tasks)) for row, count in zip(rows, counts, strict=True)]
    return {
        "input_ids": torch.cat([tokens for tokens, _ in pairs])[None],
        "labels": torch.cat([wanted for _, wanted in pairs])[None],
        "tasks": torch.cat(numbers)[None],
        "position_ids": torch.cat([torch.arange(count) for count in counts])[None],
    }


def folded(rows: Sequence[Row], tasks: Sequence[str] = (), pad_token_id: int = 0) -> dict[str, Tensor]:
    """Rows in as few lines of the longest one's length as first-fit decreasing needs.

    Where that saves less than a tenth of the lines, it is `padded`, whose attention needs no mask.

    >>> rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    >>> rows += [{"input_ids": [3, 4], "labels": [3, 4]}]
    >>> folded(rows)["input_ids"], folded(rows)["position_ids"]
    (tensor([[5, 6, 7],
            [8, 3, 4]]), tensor([[0, 1, 2],
            [0, 0, 1]]))

    Args and raises: as for `padded`.

    Returns:
        `input_ids`, `labels`, `tasks` and `position_ids` (F, T), int64. Each token of filling is alone, at position 0.
    """
    pairs = [_tensors(row) for row in rows]
    counts = [len(tokens) for tokens, _ in pairs]
    lines = pack_decreasing(counts, max(counts))
    if len(lines) > 0.9 * len(rows):
        return padded(rows, tasks, pad_token_id)
    shape = (len(lines), max(counts))
    made = {
        "input_ids": torch.full(shape, pad_token_id),
        "labels": torch.full(shape, IGNORED),
        "tasks": torch.full(shape, -1),
        "position_ids": torch.zeros(shape, dtype=torch.long),
    }
    for line, held in enumerate(lines):
        begin = 0
        for place in held.tolist():
            end = begin + counts[place]
            made["input_ids"][line, begin:end], made["labels"][line, begin:end] = pairs[place]
            made["tasks"][line, begin:end] = _task(rows[place], tasks)
            made["position_ids"][line, begin:end] = torch.arange(counts[place])
            begin = end
    return made


def _tensors(row: Row) -> tuple[Tensor, Tensor]:
    tokens = torch.as_tensor(row["input_ids"], dtype=torch.long)
    labels = torch.as_tensor(row["labels"], dtype=torch.long).clone()
    if not len(tokens) or len(tokens) != len(labels):
        raise DataError(
            f"A training row has {len(tokens)} tokens and {len(labels)} labels. "
            "Give it at least one token, and each token a label, -100 for none."
        )
    labels[0] = IGNORED
    return tokens, labels


def _task(row: Row, tasks: Sequence[str]) -> int:
    name = row.get("task")
    if name is None or not tasks:
        return -1
    try:
        return tasks.index(name)
    except ValueError:
        raise DataError(
            f"A training row is of the task {name!r}, and the tasks are {', '.join(tasks)}. Name all tasks beforehand."
        ) from None


@dataclass(frozen=True)
class Collator:
    """Makes batches of rows, for a DataLoader; items that are bins of rows (`packing.Bins`) are opened.

    Attributes:
        layout: "padded", "folded" or "packed".
        tasks: names of the rows' tasks.
        pad_token_id: any id of the vocabulary.
    """

    layout: Layout
    tasks: tuple[str, ...] = ()
    pad_token_id: int = 0

    def __call__(self, items: Sequence[Row]) -> dict[str, Tensor]:
        rows = [row for item in items for row in item.get("rows", (item,))]
        make = {"padded": padded, "folded": folded, "packed": packed}[self.layout]
        return make(rows, self.tasks, self.pad_token_id)


def choose_layout(asked: str, attn_implementation: str) -> tuple[Layout, str]:
    """A layout, and the reason for it.

    Args:
        asked: "auto", "padded", "folded" or "packed".
        attn_implementation: of the model's config.

    Raises:
        BackboneError: if `asked` is none of these.

    >>> choose_layout("auto", "sdpa")[0]
    'folded'
    """
    for layout in get_args(Layout):
        if asked == layout:
            return layout, "it was asked for"
    if asked != "auto":
        raise BackboneError(f"The layout {asked!r} is not known. Choose auto, {', '.join(get_args(Layout))}.")
    if "flash" in attn_implementation:
        return "packed", f"{attn_implementation} attends within each row of a pack, so nothing is spent on filling"
    return "folded", (
        f"{attn_implementation} takes a mask, so short rows can share a line; in one long line it would compute "
        "attention between all rows"
    )


@torch.no_grad()
def check_restarts(wrapped: Any, device: torch.device | str = "cpu") -> None:
    """Tries whether attention and positions of a model start again where `position_ids` do, as folded rows need it.

    A row must give the same whatever stands before it in the pack, and the same as alone. Three forward passes of some
    tokens.

    Raises:
        BackboneError: if they do not.
    """
    first, other, second = [1, 2, 3, 4, 5], [5, 4, 2, 2, 1], [3, 1, 2, 5]

    def logits(*rows: list[int]) -> Tensor:
        batch = packed([{"input_ids": row, "labels": row} for row in rows])
        given = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
        # Cached keys would make transformers take a restart for something else.
        found: Tensor = wrapped(**given, use_cache=False).logits[0, -len(second) :].double()
        return found

    training = wrapped.training
    wrapped.eval()
    try:
        before, changed, alone = logits(first, second), logits(other, second), logits(second)
    finally:
        wrapped.train(training)
    size = alone.abs().max()
    # The same sums in the same order, against the same sums in another order.
    rounding = 1e-5 if next(wrapped.parameters()).dtype in (torch.float32, torch.float64) else 1e-2
    if (before - changed).abs().max() > rounding * size or (before - alone).abs().max() > 10 * rounding * size:
        raise BackboneError(
            f"{type(wrapped).__name__} lets a row look at the row before it in the same line: its attention does not "
            "start again where position_ids do. Use the layout 'padded'."
        )
