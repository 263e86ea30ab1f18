"""Cleaning: all filters in their order, to the fixed point, and an account of everything that they removed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from llmrec.data import filters
from llmrec.data.columns import ITEM, POSITION, TIMESTAMP, USER
from llmrec.data.filters import Cleaned, Duplicates, EmptyTitles, Step, UnknownItems, Unrated, UnusedItems
from llmrec.data.flaws import Flaws
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.exceptions import DataError


@dataclass(frozen=True)
class CleaningReport:
    """The account of a cleaning.

    Attributes:
        steps: in the order in which they ran; each begins with the counts that the one before it left.
        left_out: rows that reading left out before, of interactions and of items, by reason.
    """

    steps: list[Step]
    left_out: dict[str, dict[str, int]]

    @property
    def before(self) -> dict[str, int]:
        """The counts of the data as they came."""
        return self.steps[0].before

    @property
    def after(self) -> dict[str, int]:
        """The counts of what is left."""
        return self.steps[-1].after

    def document(self) -> dict[str, Any]:
        """The report in JSON's types: `before`, `after`, `removed`, `steps`, `left_out_on_reading`."""
        return {
            "left_out_on_reading": self.left_out,
            "before": self.before,
            "after": self.after,
            "removed": filters.difference(self.before, self.after),
            "steps": [step.document() for step in self.steps],
        }


def clean(
    interactions: Interactions,
    items: Items,
    *,
    flaws: Flaws | None = None,
    empty_titles: EmptyTitles = "keep",
    unknown_items: UnknownItems = "keep",
    min_rating: float | None = None,
    unrated: Unrated = "drop",
    duplicates: Duplicates = "exact",
    user_core: int = 0,
    item_core: int = 0,
    min_length: int = 0,
    max_length: int | None = None,
    unused_items: UnusedItems = "keep",
    announce: Callable[[str], None] = lambda step: None,
) -> tuple[Interactions, Items, CleaningReport]:
    """All steps, in the order of their arguments.

    K-core and lengths influence each other: they are repeated, in this order, until a whole round removes nothing.
    What is left satisfies all of them at once, and cleaning it again changes nothing. Kept rows keep their order, with
    one exception: where the rows of a user that had no time (or position) have gone, the rest is ordered by time (or
    position), as a reader of the result would order it; how many users that moved is counted.

    Args:
        interactions: the log.
        items: the table.
        flaws: what the table was like before it was read; None says nothing about entities and titles.
        empty_titles: items without a title of their own stay with another text, go with their interactions, or are
            an error.
        unknown_items: items of interactions alone join the table with their id for a title, their interactions go, or
            they are an error.
        min_rating: the lowest rating that counts as taking the item.
        unrated: whether interactions without a rating stay.
        duplicates: which repeats go; see `filters.drop_duplicates`.
        user_core: the fewest interactions of a user.
        item_core: the fewest interactions of an item.
        min_length: the fewest interactions of a user, again: another name of `user_core`, and the larger one counts.
        max_length: the most interactions of a user; older ones go.
        unused_items: whether items of the table without any interaction stay.
        announce: is called with the name of each step before it runs.

    Raises:
        DataError: if a policy refuses, a setting is impossible, or nothing is left.
    """
    if flaws is None and empty_titles != "keep" and items.missing_titles:
        raise DataError(
            f"{items.missing_titles} item(s) came without a title, and nothing says which. "
            "Give flaws=find_flaws(frame) of the table as it was read, or keep them."
        )
    if min(user_core, item_core, min_length) < 0:
        raise DataError(
            f"The fewest interactions are {user_core} of a user's core, {item_core} of an item's, {min_length} of a "
            "history, but a count cannot be negative. Give 0 or more."
        )
    left_out = {"interactions": interactions.dropped, "items": items.dropped}
    steps: list[Step] = []

    def run(step: Callable[..., Cleaned], *arguments: Any, repeat: int = 1) -> bool:
        nonlocal interactions, items
        announce(step.__name__.replace("_", " "))
        interactions, items, done = step(interactions, items, *arguments)
        if repeat == 1 or done.changes:
            steps.append(replace(done, round=repeat))
        if not len(interactions):
            raise DataError(
                f"The step {done.name!r} ({', '.join(f'{k} {v}' for k, v in done.settings.items())}) leaves none of "
                f"{done.before['interactions']} interaction(s) of {done.before['users']} user(s). Ask for less."
            )
        return done.changes

    frame = interactions.frame
    gaps = any(frame[name].null_count() for name in (TIMESTAMP, POSITION) if name in frame.columns)
    # Ids are compared again and again: as numbers, which are found in one pass, they stay in the processor's cache.
    interactions = filters.with_frame(interactions, frame.with_columns(pl.col(USER, ITEM).cast(pl.Categorical)))
    if flaws is not None:
        run(filters.tell_entities, flaws)
        run(filters.settle_titles, flaws, empty_titles)
    run(filters.settle_unknown, unknown_items)
    if min_rating is not None:
        run(filters.threshold_ratings, min_rating, unrated)
    run(filters.drop_duplicates, duplicates)
    changes, repeat = True, 0
    while changes:
        changes, repeat = False, repeat + 1
        if max(user_core, item_core) > 1:
            changes |= run(filters.keep_core, user_core, item_core, repeat=repeat)
        if min_length > 1:
            changes |= run(filters.drop_short, min_length, repeat=repeat)
        if max_length is not None:
            changes |= run(filters.keep_recent, max_length, repeat=repeat)
    if gaps:
        run(filters.order_again)
    if unused_items == "drop":
        run(filters.drop_unused, flaws or Flaws())
    named = interactions.frame.with_columns(pl.col(USER, ITEM).cast(pl.String))
    interactions = filters.with_frame(interactions, named)
    return filters.without_empty_columns(interactions), items, CleaningReport(steps, left_out)
