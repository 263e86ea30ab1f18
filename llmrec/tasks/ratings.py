"""The yes-or-no question whether a user will like an item (TALLRec, arXiv 2305.00447), learnt from ratings."""

from functools import cached_property
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from llmrec.data.split import Split
from llmrec.tasks.task import Case, Task

YES, NO = " Yes", " No"  # the answers as they are encoded, behind a prompt that ends without a space


class YesNo(Task):
    """What a user liked and disliked before, and a candidate -> "Yes" or "No", for every rated training interaction.

    A rating of `TaskData.like_threshold` or more is a "Yes". The answer is the word's tokens, without an end token.
    """

    name: ClassVar[str] = "yes_no"
    offers: ClassVar[frozenset[str]] = frozenset({"liked", "disliked", "candidate"})
    has_history: ClassVar[bool] = False

    @cached_property
    def places(self) -> npt.NDArray[np.int64]:
        """The log's places of the candidates."""
        if self.data.split.ratings is None:
            return np.zeros(0, dtype=np.int64)
        return np.flatnonzero(self.data.split.in_training & np.isfinite(self.data.split.ratings))

    def size(self) -> int:
        return len(self.places)

    def case(self, number: int, draw: int) -> Case:
        place, data = int(self.places[number]), self.data
        assert data.split.ratings is not None
        liked, disliked = rated_before(data.split, place, data.max_history, data.like_threshold)
        answer = YES if data.split.ratings[place] >= data.like_threshold else NO
        variables = {"liked": liked, "disliked": disliked, "candidate": int(data.split.rows[place])}
        return Case(data.text.encode(answer), variables=variables)

    def lacking(self) -> str:
        return "no training interaction has a rating"


def rated_before(split: Split, place: int, max_history: int, threshold: float) -> tuple[list[int], list[int]]:
    """The items that a user had liked and disliked before an interaction, oldest first, as the prompt shows them.

    Args:
        split: with ratings.
        place: of the interaction in `split.rows`, of any part.
        max_history: so many rated interactions are shown, the most recent ones, likes and dislikes together.
        threshold: the least rating of a like.

    Returns:
        Item rows, without those that have no rating.
    """
    assert split.ratings is not None
    begin = int(split.offsets[split.owner[place]])
    rated = begin + np.flatnonzero(np.isfinite(split.ratings[begin:place]))[-max_history:]
    likes = split.ratings[rated] >= threshold
    return split.rows[rated[likes]].tolist(), split.rows[rated[~likes]].tolist()
