"""The steps of cleaning: each takes interactions and items, and returns what stays and an account of what went."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import polars as pl

from llmrec.data.columns import ACTION, ITEM, POSITION, RATING, TIMESTAMP, USER
from llmrec.data.core import item_codes, k_core, user_codes
from llmrec.data.flaws import Flaws
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.exceptions import DataError

Duplicates = Literal["exact", "first", "last", "keep"]
EmptyTitles = Literal["keep", "drop", "error"]
UnknownItems = Literal["keep", "drop", "error"]
Unrated = Literal["drop", "keep"]
UnusedItems = Literal["keep", "drop"]

EXAMPLES = 3


@dataclass(frozen=True)
class Step:
    """What one step did.

    Attributes:
        name: such as "k-core".
        settings: what it was asked for.
        before: counts of "interactions", "users" and "items" (those that occur in them), and "table", the item
            table's rows.
        after: the same counts of what the step left.
        notes: further counts, such as the rows without a rating.
        examples: up to three of each that went: rows of interactions, users, items, and ids of table rows.
        round: 1, or how often the filters that influence each other had run.
    """

    name: str
    settings: dict[str, Any]
    before: dict[str, int]
    after: dict[str, int]
    notes: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[Any]] = field(default_factory=dict)
    round: int = 1

    @property
    def removed(self) -> dict[str, int]:
        """Before minus after; negative for what was added."""
        return difference(self.before, self.after)

    @property
    def changes(self) -> bool:
        """Whether anything is otherwise than before."""
        return self.before != self.after

    def document(self) -> dict[str, Any]:
        """The step in JSON's types."""
        return {
            "step": self.name,
            "round": self.round,
            "settings": self.settings,
            "before": self.before,
            "after": self.after,
            "removed": self.removed,
            "notes": self.notes,
            "examples": self.examples,
        }


Cleaned = tuple[Interactions, Items, Step]


def tell_entities(interactions: Interactions, items: Items, flaws: Flaws) -> Cleaned:
    """HTML entities in item texts, which reading replaces by their characters: how many texts had some."""
    notes = {"texts_with_entities": flaws.escaped_texts, "items_with_entities": flaws.escaped_items}
    before = _counts(interactions, items)
    examples = {"texts": flaws.examples} if flaws.examples else {}
    return interactions, items, Step("HTML entities", {}, before, before, notes, examples)


def settle_titles(interactions: Interactions, items: Items, flaws: Flaws, policy: EmptyTitles = "keep") -> Cleaned:
    """Items that came without a title: kept with their first text or id, dropped with their interactions, or refused.

    Raises:
        DataError: if there are any and the policy is "error".
    """
    bare = items.frame[ITEM].is_in(pl.Series(flaws.untitled, dtype=pl.String).implode())
    found = items.frame.filter(bare)
    if policy == "error" and len(found):
        raise DataError(
            f"{len(found)} item(s) have no title, such as {found[ITEM][0]!r}. "
            "Fill them in, or choose --empty-titles keep or drop."
        )
    settings = {"empty_titles": policy}
    notes = {"items_without_title": len(found)}
    if policy == "keep":
        return _kept("empty titles", settings, interactions, items, None, None, notes)
    of_these = interactions.frame[ITEM].is_in(found[ITEM].implode())
    return _kept("empty titles", settings, interactions, items, ~of_these, ~bare, notes, flaws.untitled)


def settle_unknown(interactions: Interactions, items: Items, policy: UnknownItems = "keep") -> Cleaned:
    """Interactions whose item has no row in the table: kept (the item is added, its id its title), dropped or refused.

    Raises:
        DataError: if there are any and the policy is "error".
    """
    known = interactions.frame[ITEM].is_in(items.frame[ITEM].implode())
    unknown = interactions.frame.filter(~known)[ITEM].unique(maintain_order=True)
    notes = {"unknown_items": len(unknown), "interactions_of_unknown_items": int((~known).sum())}
    settings = {"unknown_items": policy}
    if policy == "error" and len(unknown):
        raise DataError(
            f"{len(unknown)} item(s) of {notes['interactions_of_unknown_items']} interaction(s) are not in the item "
            f"table, such as {unknown[0]!r}. Add them to it, or choose --unknown-items keep or drop."
        )
    if policy == "keep":
        before = _counts(interactions, items)
        items = items.with_missing(interactions)
        examples = {"added": unknown.head(EXAMPLES).to_list()} if len(unknown) else {}
        after = before | {"table": len(items)}
        return interactions, items, Step("unknown items", settings, before, after, notes, examples)
    return _kept("unknown items", settings, interactions, items, known, None, notes)


def threshold_ratings(
    interactions: Interactions, items: Items, threshold: float, unrated: Unrated = "drop"
) -> Cleaned:
    """Explicit ratings to implicit feedback: rows rated `threshold` or more stay; those without a rating are counted.

    Raises:
        DataError: if the interactions have no ratings.
    """
    if RATING not in interactions.frame.columns:
        raise DataError(
            f"The interactions have no ratings, so a threshold of {threshold:g} cannot be held against them. "
            "Name their column with --rating-column, or leave --min-rating out."
        )
    ratings = interactions.frame[RATING]
    kept = (ratings >= threshold).fill_null(unrated == "keep")
    settings = {"min_rating": threshold, "unrated": unrated}
    return _kept(
        "rating threshold", settings, interactions, items, kept, None, {"rows_without_rating": ratings.null_count()}
    )


def drop_duplicates(interactions: Interactions, items: Items, which: Duplicates = "exact") -> Cleaned:
    """Repeats: "exact" keeps the first of equal user, item and timestamp (and action, where there are actions).

    "first" and "last" keep one row of each user and item. A row without a timestamp is nobody's exact repeat: nothing
    says that both are one event. Such rows are counted.
    """
    frame = interactions.frame
    notes: dict[str, int] = {}
    kept = None
    if which == "exact":
        absent = frame[TIMESTAMP].is_null() if TIMESTAMP in frame.columns else pl.repeat(True, len(frame), eager=True)
        notes["rows_without_timestamp"] = int(absent.sum())
        if not absent.all():
            keys = [USER, ITEM, TIMESTAMP, *([ACTION] if ACTION in frame.columns else [])]
            kept = frame.select(pl.struct(keys).is_first_distinct()).to_series() | absent
    elif which != "keep":
        pair = pl.struct(USER, ITEM)
        kept = frame.select(pair.is_first_distinct() if which == "first" else pair.is_last_distinct()).to_series()
    return _kept("duplicates", {"duplicates": which}, interactions, items, kept, None, notes)


def keep_core(interactions: Interactions, items: Items, user_core: int, item_core: int) -> Cleaned:
    """The k-core, iterated to its fixed point; see `llmrec.data.core.k_core`."""
    kept, passes = k_core(user_codes(interactions.frame), item_codes(interactions.frame), user_core, item_core)
    settings = {"user_core": user_core, "item_core": item_core}
    return _kept("k-core", settings, interactions, items, pl.Series(kept), None, {"passes": passes})


def drop_short(interactions: Interactions, items: Items, length: int) -> Cleaned:
    """Users with fewer than `length` interactions go."""
    users = user_codes(interactions.frame)
    return _kept(
        "min length", {"min_length": length}, interactions, items, pl.Series(np.bincount(users)[users] >= length)
    )


def keep_recent(interactions: Interactions, items: Items, length: int) -> Cleaned:
    """Of every user the most recent `length` interactions stay.

    Raises:
        DataError: if `length` is below 1.
    """
    if length < 1:
        raise DataError(f"The longest history is {length}, which leaves nothing. Give 1 or more.")
    users = user_codes(interactions.frame)
    ends = np.cumsum(np.bincount(users))
    recent = ends[users] - np.arange(len(users)) <= length
    return _kept("max length", {"max_length": length}, interactions, items, pl.Series(recent))


def drop_unused(interactions: Interactions, items: Items, flaws: Flaws = Flaws()) -> Cleaned:  # noqa: B008 (frozen)
    """Items of the table that no interaction has go."""
    used = items.frame[ITEM].is_in(interactions.frame[ITEM].unique().implode())
    return _kept("unused items", {"unused_items": "drop"}, interactions, items, None, used, None, flaws.untitled)


def order_again(interactions: Interactions, items: Items) -> Cleaned:
    """Orders a user by time, or by position, where every row has one by now: the rows without may have gone.

    That is how a reader orders what is written, and so nothing moves when the result is read. Moved users are counted.
    """
    frame = interactions.frame
    # The reader orders the rows' numbers, in place of their items.
    keys = [name for name in (USER, TIMESTAMP, POSITION) if name in frame.columns]
    numbered = frame.select(*keys, pl.int_range(pl.len()).alias(ITEM))
    order = Interactions.from_frame(numbered, timestamp_unit="order").frame[ITEM].cast(pl.Int64)
    moved = frame[USER].filter(order != pl.int_range(len(frame), eager=True)).unique(maintain_order=True)
    again = with_frame(interactions, frame[order])
    counts = _counts(interactions, items)
    examples = {"moved_users": moved.head(EXAMPLES).to_list()} if len(moved) else {}
    return again, items, Step("order", {}, counts, counts, {"moved_users": len(moved)}, examples)


def without_empty_columns(interactions: Interactions) -> Interactions:
    """Without the columns that no longer have a single value, which counts as absent."""
    frame = interactions.frame
    empty = [name for name in frame.columns if frame[name].null_count() == len(frame)]
    return with_frame(interactions, frame.drop(empty))


def _kept(
    name: str,
    settings: dict[str, Any],
    interactions: Interactions,
    items: Items,
    rows: pl.Series | None = None,
    table: pl.Series | None = None,
    notes: dict[str, int] | None = None,
    untitled: Sequence[str] = (),
) -> Cleaned:
    """The step that keeps the True of (M,) `rows` and of (N,) `table`; None keeps all."""
    before = _counts(interactions, items)
    after = dict(before)
    examples: dict[str, list[Any]] = {}
    if rows is not None and not rows.all():
        gone = interactions.frame.filter(~rows)
        interactions = with_frame(interactions, interactions.frame.filter(rows))
        after = _counts(interactions, items)
        examples["interactions"] = gone.head(EXAMPLES).to_dicts()
        for part, column in (("users", USER), ("items", ITEM)):
            if after[part] < before[part]:
                left = interactions.frame[column].unique().implode()
                lost = gone[column].unique(maintain_order=True)
                examples[part] = lost.filter(~lost.is_in(left)).head(EXAMPLES).to_list()
    if table is not None and not table.all():
        examples["table"] = items.frame.filter(~table)[ITEM].head(EXAMPLES).to_list()
        items = _with_table(items, table, untitled)
        after = after | {"table": len(items)}
    return interactions, items, Step(name, settings, before, after, notes or {}, examples)


def with_frame(interactions: Interactions, frame: pl.DataFrame) -> Interactions:
    """The frame in place of the log's own; what was said about the log's times and reading holds on."""
    timed = TIMESTAMP in frame.columns
    missing, unit = (frame[TIMESTAMP].null_count(), interactions.time_unit) if timed else (0, None)
    return Interactions(frame, missing, unit, interactions.dropped)


def _with_table(items: Items, table: pl.Series, untitled: Sequence[str]) -> Items:
    """The items of True; those that `with_missing` appended stand at the end, and came without a title either."""
    appended = pl.int_range(len(items), eager=True) >= len(items) - items.appended
    bare = appended | items.frame[ITEM].is_in(pl.Series(untitled, dtype=pl.String).implode())
    missing = items.missing_titles - int((bare & ~table).sum())
    kept = items.frame.filter(table)
    return Items(kept, missing, int((appended & table).sum()), items.text_columns, items.dropped)


def _counts(interactions: Interactions, items: Items) -> dict[str, int]:
    frame = interactions.frame
    users = int(frame[USER].rle_id()[-1]) + 1 if len(frame) else 0
    return {"interactions": len(frame), "users": users, "items": frame[ITEM].n_unique(), "table": len(items)}


def difference(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """Before minus after, count by count."""
    return {name: before[name] - after[name] for name in before}
