"""The flags that scripts and commands share: the files' own column names, and how interactions are split."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from llmrec.data.columns import (
    ACTION,
    DOMAIN,
    ITEM,
    POSITION,
    RATING,
    TIMESTAMP,
    TITLE,
    USER,
    WEIGHT,
    ColumnNames,
)
from llmrec.data.timestamps import TimestampUnit
from llmrec.exceptions import DataError

if TYPE_CHECKING:
    from llmrec.data.interactions import Interactions
    from llmrec.data.items import Items
    from llmrec.data.split import Split

SplitName = Literal["leave-one-out", "global-temporal", "by-sample", "cold-users"]


@dataclass
class ColumnArguments:
    """What the files call their columns, and how their values are read."""

    user_column: str = field(default=USER, metadata={"help": "The interactions' column of user ids."})
    item_column: str = field(default=ITEM, metadata={"help": "The column of item ids, in both files."})
    timestamp_column: str = field(default=TIMESTAMP, metadata={"help": "The interactions' column of times, if any."})
    position_column: str = field(default=POSITION, metadata={"help": "The interactions' column of places, if any."})
    rating_column: str = field(default=RATING, metadata={"help": "The interactions' column of ratings, if any."})
    action_column: str = field(
        default=ACTION, metadata={"help": "The interactions' column of what was done (view, purchase), if any."}
    )
    domain_column: str = field(
        default=DOMAIN, metadata={"help": "The interactions' column of shops or categories, if any."}
    )
    weight_column: str = field(default=WEIGHT, metadata={"help": "The interactions' column of weights, if any."})
    title_column: str = field(default=TITLE, metadata={"help": "The items' column of titles."})
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "The items' columns that join the title; default: all that read like text."}
    )
    timestamp_unit: TimestampUnit = field(
        default="auto",
        metadata={"help": "The times' unit; auto finds and says it, order takes any numbers as they are."},
    )
    invalid_rows: Literal["error", "drop"] = field(
        default="error", metadata={"help": "Rows without ids or with impossible values: stop, or drop and count them."}
    )

    def names(self) -> ColumnNames:
        """As the readers take them."""
        return ColumnNames(
            user=self.user_column,
            item=self.item_column,
            timestamp=self.timestamp_column,
            position=self.position_column,
            rating=self.rating_column,
            action=self.action_column,
            domain=self.domain_column,
            weight=self.weight_column,
            title=self.title_column,
            text=None if self.text_columns is None else tuple(self.text_columns),
        )

    def read_interactions(self, path: str | Path) -> "Interactions":
        """Reads interactions as the flags say; raises as `Interactions.read` does."""
        from llmrec.data.interactions import Interactions

        return Interactions.read(path, self.names(), self.timestamp_unit, self.invalid_rows)

    def read_items(self, path: str | Path) -> "Items":
        """Reads the table of items as the flags say; raises as `Items.read` does."""
        from llmrec.data.items import Items

        return Items.read(path, self.names(), self.invalid_rows)


@dataclass
class SplitArguments:
    """How interactions are split. Every stage of one recommender takes the same values."""

    split: SplitName = field(
        default="leave-one-out",
        metadata={
            "help": "leave-one-out: every user's last item. global-temporal: what comes after a moment, for everyone. "
            "by-sample: samples sorted by time, 8:1:1. cold-users: users held out whole."
        },
    )
    valid_share: float = field(
        default=0.1, metadata={"help": "Share for validation: of interactions, samples or users. Not leave-one-out."}
    )
    test_share: float = field(default=0.1, metadata={"help": "Share for the test, likewise."})
    valid_time: str | None = field(
        default=None,
        metadata={
            "help": "global-temporal: when training ends, unix seconds or ISO 8601 (UTC, also YYYYMMDD); "
            "default: by share."
        },
    )
    test_time: str | None = field(default=None, metadata={"help": "global-temporal: when the test begins, likewise."})
    targets: Literal["all", "first"] = field(
        default="all", metadata={"help": "global-temporal: ask for every later item of a user, or for the first."}
    )
    min_history: int = field(
        default=3, metadata={"help": "leave-one-out: users with fewer interactions are training alone."}
    )
    split_seed: int = field(default=0, metadata={"help": "cold-users: the seed by which users are drawn."})
    ties: Literal["stable", "shuffle"] = field(
        default="stable",
        metadata={"help": "Equal times keep position or file order, or are shuffled, to measure what order matters."},
    )
    tie_seed: int = field(default=0, metadata={"help": "The seed of shuffled ties."})

    def make(self, interactions: "Interactions", items: "Items") -> "Split":
        """The split of these interactions; raises DataError if they cannot be split so."""
        from llmrec.data import protocols

        for name, seed in (("--split-seed", self.split_seed), ("--tie-seed", self.tie_seed)):
            if seed < 0:
                raise DataError(f"{name} is {seed}, but a seed is not negative. Give 0 or more.")
        if self.ties == "shuffle":
            interactions = interactions.shuffled_ties(self.tie_seed)
        if self.split == "leave-one-out":
            split = protocols.leave_one_out(interactions, items, self.min_history)
        elif self.split == "global-temporal":
            valid_time, test_time = _seconds(self.valid_time), _seconds(self.test_time)
            split = protocols.global_temporal(
                interactions, items, self.valid_share, self.test_share, valid_time, test_time, self.targets
            )
        elif self.split == "by-sample":
            split = protocols.by_sample(interactions, items, self.valid_share, self.test_share)
        elif self.split == "cold-users":
            split = protocols.cold_users(interactions, items, self.valid_share, self.test_share, self.split_seed)
        else:
            raise DataError(
                f"There is no split {self.split!r}. Name leave-one-out, global-temporal, by-sample or cold-users."
            )
        ties = {"ties": self.ties} | ({"tie_seed": self.tie_seed} if self.ties == "shuffle" else {})
        return replace(split, protocol={**split.protocol, **ties})

    @classmethod
    def from_protocol(cls, protocol: Mapping[str, Any]) -> Self:
        """The values that make this protocol again (`Split.protocol`), as an artefact records it."""
        values = dict(protocol)
        if "seed" in values:
            values["split_seed"] = values.pop("seed")
        for name in ("valid_time", "test_time"):
            if name in values:
                # With a point, by which a number of eight digits is no day.
                values[name] = repr(float(values[name]))
        return cls(**values)


def _seconds(moment: str | None) -> float | None:
    """Unix seconds, from a number or an ISO 8601 date; without a zone it is UTC.

    Eight digits are a day (YYYYMMDD) where they can be one from 1980 to 2100, as the reader of times takes them.
    """
    if moment is None:
        return None
    text = moment.strip()
    seconds = _number(text)
    if seconds is not None and not _is_day(text):
        return seconds
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError as error:
        raise DataError(
            f"{moment!r} is neither unix seconds nor an ISO 8601 time. Write 1400000000 or 2014-05-13."
        ) from error
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _is_day(text: str) -> bool:
    if not re.fullmatch(r"[0-9]{8}", text) or not "1980" <= text[:4] <= "2100":
        return False
    try:
        date(int(text[:4]), int(text[4:6]), int(text[6:]))
    except ValueError:
        return False
    return True
