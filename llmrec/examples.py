"""Training rows: histories become token ids with labels, one builder for every stage.

A row has `input_ids` and `labels` of one length; labels are -100 where the loss does not look. Only item tokens ever
carry a label.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from llmrec.catalog import Catalog
from llmrec.exceptions import PromptError
from llmrec.prompt import Prompt
from llmrec.vocabulary import PlainText

IGNORED = -100
Supervision = Literal["sequence", "next_item"]
Row = dict[str, list[int]]


def sequence_rows(
    catalog: Catalog, sequences: Sequence[npt.NDArray[np.integer]], start: int, max_history: int
) -> Iterator[Row]:
    """One pass over a history trains all its positions: every item is a target once, with what came before as context.

    Only for a bare prompt, where the prompt of a shorter history is a prefix of the longer one's. The first item is a
    target too, so that an empty history has a learnt answer. Sequences longer than `max_history + 1` items become
    overlapping windows, in which the items already seen as targets are context only.

    Args:
        catalog: with token ids.
        sequences: catalog rows, oldest first.
        start: the token that opens a prompt.
        max_history: the most items of context that a target has.
    """
    stride = max(1, max_history // 2)
    for sequence in sequences:
        done = 0  # items that have been targets
        while done < len(sequence):
            end = min(len(sequence), done + (max_history + 1 if done == 0 else stride))
            begin = max(0, end - max_history - 1)
            tokens = catalog.item_tokens[sequence[begin:end]].reshape(-1).tolist()
            context = (done - begin) * catalog.num_levels
            yield {
                "input_ids": [start, *tokens],
                "labels": [IGNORED] * (1 + context) + tokens[context:],
            }
            done = end


def next_item_rows(
    prompt: Prompt,
    catalog: Catalog,
    histories: Sequence[npt.NDArray[np.integer]],
    targets: Sequence[int],
    text: PlainText,
    start: int,
    max_history: int,
) -> Iterator[Row]:
    """One row per target: the prompt of its history (at most `max_history` items), then the target as label."""
    for history, target in zip(histories, targets, strict=True):
        tokens = prompt.encode(catalog, history[-max_history:].tolist(), text, start)
        item = catalog.item_tokens[target].tolist()
        yield {"input_ids": tokens + item, "labels": [IGNORED] * len(tokens) + item}


def training_rows(
    prompt: Prompt,
    catalog: Catalog,
    sequences: Sequence[npt.NDArray[np.integer]],
    text: PlainText,
    start: int,
    max_history: int,
    supervision: Supervision,
) -> Iterator[Row]:
    """The rows of training sequences: whole sequences at once, or one row per item from the second on.

    Raises:
        PromptError: if "sequence" is asked for with a prompt that is more than the history's semantic IDs.
    """
    if supervision == "sequence":
        if not prompt.is_bare:
            raise PromptError(
                "Supervision 'sequence' needs a prompt of semantic IDs alone, and this template has text around them. "
                "Use supervision 'next_item', or the template prompts/semantic_ids.jinja."
            )
        yield from sequence_rows(catalog, sequences, start, max_history)
        return
    for sequence in sequences:
        histories = [sequence[:end] for end in range(1, len(sequence))]
        yield from next_item_rows(prompt, catalog, histories, sequence[1:].tolist(), text, start, max_history)
