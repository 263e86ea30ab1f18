"""Training rows: a prompt's token ids and the answer's, one form for every task.

A row has `input_ids` and `labels` of one length, and the name of its `task`; labels are -100 where the loss does not
look. Only an answer's tokens ever carry a label.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from llmrec.catalog import Catalog
from llmrec.exceptions import PromptError
from llmrec.prompt import Event, Prompt
from llmrec.vocabulary import PlainText

IGNORED = -100


class Row(TypedDict):
    """One training example.

    Attributes:
        input_ids: (T,) token ids, opened by the start token.
        labels: (T,) the same where the loss looks, -100 elsewhere.
        task: whose example it is.
    """

    input_ids: list[int]
    labels: list[int]
    task: str


def answered(prompt: list[int], answer: list[int], task: str) -> Row:
    """The row of a prompt's tokens and its answer's, of which the answer alone is learnt."""
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer, "task": task}


def windows(length: int, max_history: int) -> Iterator[tuple[int, int, int]]:
    """Overlapping windows over a sequence in which every item is a target once: (begin, first target, end) of each.

    The first window is as long as it may be; later ones move by half of `max_history`, and what was a target already
    is context only.

    >>> list(windows(9, 4))
    [(0, 0, 5), (2, 5, 7), (4, 7, 9)]
    """
    stride = max(1, max_history // 2)
    done = 0
    while done < length:
        end = min(length, done + (max_history + 1 if done == 0 else stride))
        yield max(0, end - max_history - 1), done, end
        done = end


def sequence_row(catalog: Catalog, items: Sequence[int], context: int, start: int) -> Row:
    """The row of a window of catalog rows, of which the first `context` are no targets.

    Only for a bare prompt, where the prompt of a shorter history is a prefix of the longer one's. The first item of a
    history is a target too, so that an empty history has a learnt answer.
    """
    answer = catalog.tokens_of_rows(items[context:])
    return answered([start, *catalog.tokens_of_rows(items[:context])], answer, "sequence")


def next_item_rows(
    prompt: Prompt,
    catalog: Catalog,
    histories: Sequence[npt.NDArray[np.integer]],
    targets: Sequence[int],
    text: PlainText,
    start: int,
    max_history: int,
    events: Sequence[Sequence[Event]] | None = None,
    variables: Sequence[Mapping[str, Any]] | None = None,
) -> Iterator[Row]:
    """One row per target: the prompt of its history (at most `max_history` items), then the target as label.

    Args:
        prompt: the template.
        catalog: with token ids.
        histories: catalog rows, oldest first.
        targets: a catalog row per history.
        text: what encodes the text between items.
        start: the token that opens a prompt.
        max_history: the most recent items that the prompt shows.
        events: one per item of every history, or None.
        variables: what else the template uses, by name, per history; or None.

    Raises:
        PromptError: if the template uses what it is not given.
    """
    for place, (history, target) in enumerate(zip(histories, targets, strict=True)):
        recent = None if events is None else events[place][-max_history:]
        given = {} if variables is None else variables[place]
        tokens = prompt.encode(catalog, history[-max_history:].tolist(), text, start, recent, **given)
        yield answered(tokens, catalog.tokens_of(target), "next_item")


def check_bare(prompt: Prompt) -> None:
    """Raises PromptError if whole sequences cannot be learnt with this prompt, which has text around semantic IDs."""
    if not prompt.is_bare:
        raise PromptError(
            "The task 'sequence' needs a prompt of semantic IDs alone, and this template has text around them. "
            "Say --tasks next_item, or take the template prompts/semantic_ids.jinja."
        )


def check_lengths(rows: Iterable[Row], limit: int, longest_item: int = 0) -> int:
    """The tokens of the longest row, none of which is longer than a model reads.

    Args:
        rows: any, also a stream; read once.
        limit: the most tokens that the model reads (`max_position_embeddings`).
        longest_item: for rows whose prompts are searched after: the tokens of the catalog's longest item, for which
            every prompt has to leave room, however short its own answer is.

    Raises:
        PromptError: if a row is longer. Nothing is ever cut, because half an item is none.
    """
    longest, longer, worst = 0, 0, ""
    for row in rows:
        length = len(row["input_ids"])
        if longest_item:
            length = max(length, row["labels"].count(IGNORED) + longest_item)
        longer += length > limit
        if length > longest:
            longest, worst = length, row["task"]
    if longer:
        raise PromptError(
            f"{longer} row(s) are longer than the {limit} tokens that the model reads; the longest has {longest}, of "
            f"the task {worst!r}. Lower --max_history or --max_text_tokens, take a template that shows less of every "
            "item, or a model with a longer context."
        )
    return longest
