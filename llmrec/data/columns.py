"""The names of columns: the canonical ones, which exist here once, and those of a user's file."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

from llmrec.exceptions import DataError

logger = logging.getLogger(__name__)

USER = "user_id"
ITEM = "item_id"
TIMESTAMP = "timestamp"
POSITION = "position"
RATING = "rating"
ACTION = "action"
DOMAIN = "domain"
WEIGHT = "weight"
TITLE = "title"

# Compared without case, underscores, spaces and RecBole's ":token"; the first that a file has is taken.
_ALIASES = {
    USER: ("userid", "user", "uid", "reviewerid", "customerid", "customer", "visitorid", "sessionid"),
    ITEM: ("itemid", "item", "iid", "parentasin", "asin", "movieid", "productid", "product", "articleid", "sku"),
    TIMESTAMP: ("timestamp", "time", "unixreviewtime", "unixtime", "ts", "datetime", "date"),
    POSITION: ("position", "pos", "sequenceposition"),
    RATING: ("rating", "ratings", "overall", "stars", "starrating", "score"),
    ACTION: (
        *("action", "actiontype", "event", "eventtype", "behavior", "behaviour", "behaviortype", "behaviourtype"),
        *("interactiontype", "feedbacktype"),
    ),
    DOMAIN: ("domain", "domainid", "domainname", "market", "marketplace", "maincategory"),
    WEIGHT: ("weight", "interactionweight", "sampleweight"),
    TITLE: ("title", "name", "producttitle", "productname", "movietitle", "itemtitle", "itemname"),
}
FLAGS = {
    USER: "--user-column",
    ITEM: "--item-column",
    TIMESTAMP: "--timestamp-column",
    POSITION: "--position-column",
    RATING: "--rating-column",
    ACTION: "--action-column",
    DOMAIN: "--domain-column",
    WEIGHT: "--weight-column",
    TITLE: "--title-column",
}


NO_HEADER = "It seems to have no header: write the names of the columns into its first line, such as user_id,item_id"
_VALUE = re.compile(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?")


@dataclass(frozen=True)
class ColumnNames:
    """What a file calls its columns; a value that differs from the canonical name counts as chosen by the user.

    An empty name says that an optional column is not to be read, whatever the file holds.

    Attributes:
        user: ids of users, required in interactions.
        item: ids of items, required in interactions and items.
        timestamp: times, as numbers of any unit, ISO 8601 or a date type, optional.
        position: place inside the user's sequence, optional.
        rating: how much the user liked it, a number, optional.
        action: what was done (the behaviour, such as view or purchase), optional.
        domain: the shop, market or category where it was done, optional.
        weight: how much the interaction counts, a number, optional.
        title: what an item is called, optional.
        text: the item columns that go into its text, or None for every column that reads like text.
    """

    user: str = USER
    item: str = ITEM
    timestamp: str = TIMESTAMP
    position: str = POSITION
    rating: str = RATING
    action: str = ACTION
    domain: str = DOMAIN
    weight: str = WEIGHT
    title: str = TITLE
    text: tuple[str, ...] | None = None

    @overload
    def find(
        self, canonical: str, available: Sequence[str], source: str, required: Literal[True], also: Sequence[str] = ...
    ) -> str: ...
    @overload
    def find(
        self, canonical: str, available: Sequence[str], source: str, required: bool = ..., also: Sequence[str] = ...
    ) -> str | None: ...
    def find(
        self,
        canonical: str,
        available: Sequence[str],
        source: str,
        required: bool = False,
        also: Sequence[str] = (),
    ) -> str | None:
        """The column of `available` that plays the part of `canonical`, or None if there is none and none is needed.

        A chosen name is taken as it is. Otherwise the canonical name is, or else a common alias, which is logged.

        Args:
            canonical: one of this module's constants.
            available: the columns that the file has.
            source: the file's name, for messages.
            required: whether to raise rather than to return None.
            also: further aliases, in lower case, that are safe in this file alone.

        Raises:
            DataError: if a chosen or a required column is not there.

        >>> ColumnNames().find(ITEM, ["userId", "parent_asin", "asin"], "reviews.csv")
        'parent_asin'
        """
        wanted = self._name(canonical)
        if wanted == "" and not required:
            return None
        if wanted in available:
            return wanted
        if wanted.split(":")[0] in available:  # as RecBole's header has it, where the type has left the name
            return wanted.split(":")[0]
        if wanted == canonical:
            by_plain_name: dict[str, str] = {}
            for name in available:
                by_plain_name.setdefault(_plain(name), name)
            for alias in (*_ALIASES[canonical], *also):
                if alias in by_plain_name:
                    logger.info("%s: column %r is taken as %s", source, by_plain_name[alias], canonical)
                    return by_plain_name[alias]
            if not required:
                return None
        raise DataError(
            f"{source} has no column {wanted!r}; its columns are {', '.join(map(repr, available))}. "
            + (f"{NO_HEADER}." if are_values(available) else f"Say which one it is with {FLAGS[canonical]} NAME.")
        )

    def is_chosen(self, canonical: str) -> bool:
        """Whether the user named the column that plays this part, or said that none does."""
        return self._name(canonical) != canonical

    def _name(self, canonical: str) -> str:
        return {
            USER: self.user,
            ITEM: self.item,
            TIMESTAMP: self.timestamp,
            POSITION: self.position,
            RATING: self.rating,
            ACTION: self.action,
            DOMAIN: self.domain,
            WEIGHT: self.weight,
            TITLE: self.title,
        }[canonical]


def are_values(names: Sequence[str]) -> bool:
    """Whether a header reads like a first row: one of its names is a number.

    >>> are_values(["u1", "17", "1400000000"]), are_values(["user_id", "item_id"])
    (True, False)
    """
    return any(_VALUE.fullmatch(name.strip()) for name in names)


def _plain(name: str) -> str:
    # RecBole's atomic files write "item_id:token".
    return name.split(":")[0].strip().lower().replace("_", "").replace(" ", "")
