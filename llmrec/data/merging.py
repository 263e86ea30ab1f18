"""Logs of several domains (shops, categories) as one log, in which nothing that one domain holds out is given away."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from llmrec.data.columns import DOMAIN, ITEM, POSITION, TIMESTAMP, USER
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.exceptions import DataError

logger = logging.getLogger(__name__)

HELD_OUT = 2  # a user's last interactions in a domain, which leave-one-out asks for
_LEAST = HELD_OUT + 1  # with fewer, a user is not asked in that domain
_LOG, _PLACE, _OWN = "log", "place", "own"


@dataclass(frozen=True)
class MergeReport:
    """What a merge found and did.

    Attributes:
        interactions: of each domain, as they came.
        users: of each domain.
        items: of each domain, those of its table included.
        shared_users: users of more than one domain.
        merged_users: of these, those whose interactions are one sequence in the order of time.
        separated_users: of these, those of whom the order between domains is unknown: one user per domain now.
        untimed: the domains without a clock.
        renamed_items: ids that more than one domain has, which now begin with their domain's name.
        rows: interactions that came out; the context that separated users have twice or more is counted each time.
    """

    interactions: dict[str, int]
    users: dict[str, int]
    items: dict[str, int]
    shared_users: int
    merged_users: int
    separated_users: int
    untimed: list[str]
    renamed_items: int
    rows: int


def merge(
    logs: Mapping[str, Interactions], tables: Mapping[str, Items] | None = None
) -> tuple[Interactions, Items, MergeReport]:
    """One log and one table of items of several domains.

    * Every interaction gets its domain's name in the column `domain`, and a new position. Ids stay as they are, but:
      an item id that two domains have becomes `DOMAIN:ITEM` in each of them, for it is two items.
    * A user of several domains whose interactions all have a time, by a clock, is one sequence in the order of time;
      of equal times the domain that is named first comes first, then what came first in its log.
    * Of any other user of several domains the order between these is unknown. A user USER becomes one user
      `USER@DOMAIN` for each domain with three interactions or more, whose sequence is what the other domains have,
      without its last two, and then all of the own domain. So leave-one-out asks for the last item in each domain, as
      it would in the domain alone, and no sequence knows what another is asked for. Times of the other domains are
      left out: positions say the order. What these domains hold may have happened after what is asked for, so such
      users are not for protocols that go by time.
    * A domain in which such a user has fewer than three interactions holds nothing out: all of it is context of the
      others; and a user who has three in none stays apart in each, too short to be asked.

    Args:
        logs: two or more, by the domains' names.
        tables: of items, for some or all of the domains.

    Raises:
        DataError: if there are fewer than two logs, a table is of no log, a name cannot be one, a new id is taken
            already, or the tables' columns do not fit together.
    """
    tables = dict(tables or {})
    _check_names(logs, tables)
    frames = []
    for number, (name, log) in enumerate(logs.items()):
        if DOMAIN in log.frame.columns:
            logger.warning("%s: its column of domains is replaced by the name %s", name, name)
        frame = log.frame.with_columns(pl.lit(name).alias(DOMAIN), pl.lit(number).alias(_LOG))
        if not _has_clock(log) and TIMESTAMP in frame.columns:
            frame = frame.with_columns(pl.lit(None, dtype=pl.Int64).alias(TIMESTAMP))
        frames.append(frame.with_row_index(_PLACE))
    rows = pl.concat(frames, how="diagonal_relaxed")
    if TIMESTAMP not in rows.columns:
        rows = rows.with_columns(pl.lit(None, dtype=pl.Int64).alias(TIMESTAMP))
    untimed = [name for name, log in logs.items() if not _has_clock(log)]
    if untimed:
        logger.warning(
            "no clock in %s, so it is unknown how interactions of different domains lie among each other: users of "
            "several domains become one user per domain. Split by leave-one-out alone",
            " and ".join(untimed),
        )
    table, renamed = _table(logs, tables)
    clashes = table.filter(pl.col("old") != pl.col(ITEM)).select("old", DOMAIN, pl.col(ITEM).alias("new"))
    rows = rows.join(clashes, left_on=[ITEM, DOMAIN], right_on=["old", DOMAIN], how="left", maintain_order="left")
    rows = rows.with_columns(pl.coalesce("new", ITEM).alias(ITEM)).drop("new")

    users = rows.group_by(USER, maintain_order=True).agg(
        (pl.col(_LOG).n_unique() > 1).alias("shared"),
        (pl.col(_LOG).n_unique() > 1).and_(pl.col(TIMESTAMP).null_count() > 0).alias("apart"),
    )
    users = users.with_row_index("first")
    rows = rows.join(users, on=USER, how="left", maintain_order="left")
    merged = rows.filter(~pl.col("apart")).sort(
        "first", pl.when("shared").then(TIMESTAMP), _LOG, _PLACE, maintain_order=True
    )
    separated = _separated(rows.filter("apart"), list(logs))
    taken = separated.select(USER).unique().join(users.select(USER), on=USER, how="semi")[USER]
    if len(taken):
        raise DataError(
            f"The user id {taken.sort()[0]!r} is in a log already, and would be the name of a user of one domain. "
            "Name the domains otherwise."
        )
    kept = [name for name in rows.columns if name not in (_LOG, _PLACE, "first", "shared", "apart", POSITION)]
    joined = pl.concat([merged, separated], how="diagonal").sort("first", maintain_order=True)
    frame = joined.select(*kept, pl.int_range(pl.len()).over(USER).alias(POSITION))
    report = MergeReport(
        interactions={name: len(log) for name, log in logs.items()},
        users={name: log.frame[USER].n_unique() for name, log in logs.items()},
        items={name: int((table[DOMAIN] == name).sum()) for name in logs},
        shared_users=int(users["shared"].sum()),
        merged_users=int((users["shared"] & ~users["apart"]).sum()),
        separated_users=int(users["apart"].sum()),
        untimed=untimed,
        renamed_items=renamed,
        rows=frame.height,
    )
    if report.separated_users > 0 and not untimed:
        logger.warning(
            "%d user(s) of several domains have interactions without a time, and become one user per domain. Split by "
            "leave-one-out alone",
            report.separated_users,
        )
    missing = sum(items.missing_titles for items in tables.values())
    # Times are seconds by now, whatever the logs had.
    return Interactions.from_frame(frame, timestamp_unit="s"), Items(table.drop("old"), missing), report


def _separated(rows: pl.DataFrame, names: list[str]) -> pl.DataFrame:
    """The sequences `USER@DOMAIN` of users of whom the order between domains is unknown, in order."""
    length, behind = pl.len().over(USER, _LOG), pl.len().over(USER, _LOG) - 1 - pl.int_range(pl.len()).over(USER, _LOG)
    rows = rows.sort("first", _LOG, _PLACE).with_columns(
        (length >= _LEAST).alias("asked"), ((length < _LEAST) | (behind >= HELD_OUT)).alias("context")
    )
    owned = rows.select(USER, "asked", pl.col(_LOG).alias(_OWN)).unique(maintain_order=True)
    # Who is asked nowhere stays apart everywhere.
    owned = owned.with_columns(pl.col("asked").any().over(USER).alias("anywhere"))
    owned = owned.filter(pl.col("asked") | ~pl.col("anywhere")).drop("asked")
    joined = rows.join(owned, on=USER, how="inner")
    inside = pl.col(_LOG) == pl.col(_OWN)
    joined = joined.filter(inside | (pl.col("context") & pl.col("anywhere")))
    joined = joined.sort("first", _OWN, inside, _LOG, _PLACE)
    name = pl.col(_OWN).replace_strict(dict(enumerate(names)), return_dtype=pl.String)
    return joined.with_columns(
        (pl.col(USER) + "@" + name).alias(USER), pl.when(inside).then(TIMESTAMP).alias(TIMESTAMP)
    ).drop(_OWN, "asked", "context", "anywhere")


def _table(logs: Mapping[str, Interactions], tables: Mapping[str, Items]) -> tuple[pl.DataFrame, int]:
    """The items of all domains, each with its domain and the id that it had (`old`); and how many ids were renamed."""
    frames = []
    for name, log in logs.items():
        items = tables[name].with_missing(log) if name in tables else Items.from_interactions(log)
        if DOMAIN in items.frame.columns:
            logger.warning("%s: the items' column of domains is replaced by the name %s", name, name)
        frames.append(items.frame.with_columns(pl.lit(name).alias(DOMAIN)))
    try:
        table = pl.concat(frames, how="diagonal_relaxed")
    except (pl.exceptions.SchemaError, pl.exceptions.InvalidOperationError) as error:
        raise DataError(
            f"The tables of items have columns of one name and different kinds: {' '.join(str(error).split())}. "
            "Rename one of them."
        ) from error
    table = table.with_columns(pl.col(ITEM).alias("old"))
    shared = pl.len().over(ITEM) > 1
    renamed = table.filter(shared)[ITEM].n_unique()
    table = table.with_columns(pl.when(shared).then(pl.col(DOMAIN) + ":" + pl.col(ITEM)).otherwise(ITEM).alias(ITEM))
    repeated = table.filter(pl.col(ITEM).is_duplicated())[ITEM]
    if len(repeated):
        raise DataError(
            f"The item id {repeated[0]!r} is there already, and would be the name of an item of one domain. "
            "Name the domains otherwise."
        )
    if renamed:
        logger.warning(
            "%d item id(s) are in more than one domain and now begin with their domain's name, such as %r",
            *(renamed, table.filter(pl.col(ITEM) != pl.col("old"))[ITEM][0]),
        )
    return table, renamed


def _has_clock(log: Interactions) -> bool:
    """Whether a log's times are moments, and not numbers of an order."""
    return TIMESTAMP in log.frame.columns and log.time_unit != "order"


def _check_names(logs: Mapping[str, Interactions], tables: Mapping[str, Items]) -> None:
    if len(logs) < 2:
        raise DataError(f"There are {len(logs)} logs to merge. Give two or more, each as NAME=FILE.")
    for name in logs:
        if not name.strip() or name != name.strip() or not name.isprintable() or set(name) & set("@:="):
            raise DataError(f"{name!r} cannot be a domain's name. Use letters, digits, - and _.")
    if unknown := [name for name in tables if name not in logs]:
        raise DataError(f"There are items of {unknown[0]!r} and no log of that name. Name one of {', '.join(logs)}.")
